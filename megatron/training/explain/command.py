"""A command line as people write it in their scripts: launcher, entry script, flags."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core import device
from megatron.core.errors import FlagError

#: Entry scripts by the name of their model.
SCRIPTS = {
    "gpt": "pretrain_gpt",
    "hybrid": "pretrain_mamba",
    "bert": "pretrain_bert",
    "t5": "pretrain_t5",
}
#: Those of models that predict the next token: samples are windows over documents, attention sees the past.
CAUSAL = (SCRIPTS["gpt"], SCRIPTS["hybrid"])
DEVICES = ("h100", "h200", "a100", "cpu")

USAGE = """Say what a training command will do, without doing it: no process group, no memory, no GPU.

    python tools/explain.py [torchrun ...] [pretrain_gpt.py|pretrain_mamba.py|pretrain_bert.py|pretrain_t5.py]
                            <its flags> [--world-size N] [--device {h100,h200,a100,cpu}] [--profile FILE]

--world-size: number of ranks; else what torchrun's --nnodes x --nproc-per-node say, else the variable WORLD_SIZE, else 1.
--device: the machine to plan for; else this one, or H100s where more ranks are asked for than this one has cores.
--profile: a JSON file with a measured device profile (benchmarks/layouts.py --calibrate writes one of this machine).
The entry script is pretrain_gpt.py unless it is named. Print the flags themselves with `--help` of the entry script."""


@dataclass(frozen=True)
class Command:
    """What was asked: the entry script (module name), its flags, the number of ranks, the device to plan for."""

    script: str
    flags: tuple[str, ...]
    world_size: int
    device: str
    profile: str | None
    notes: tuple[str, ...]


def understand(words: Sequence[str], environment: dict[str, str] | None = None) -> Command:
    """Take a command line apart. FlagError for a world size or device that makes no sense."""
    env = dict(os.environ if environment is None else environment)
    own, rest = _own_options(list(words))
    launcher, script, flags = _split_at_script(rest)
    notes = []
    ranks = _ranks(own.get("--world-size"), launcher, env)
    planned = own.get("--device")
    if planned is None:
        planned, note = _default_device(ranks)
        notes.append(note)
    if planned not in DEVICES:
        raise FlagError("--device", f"{planned!r} is not known", f"choose one of {', '.join(DEVICES)}")
    return Command(script, tuple(flags), ranks, planned, own.get("--profile"), tuple(notes))


def _own_options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options of this tool, and all other words."""
    own: dict[str, str] = {}
    rest: list[str] = []
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        # Training has a --profile too, without a value.
        of_training = word == "--profile" and (not words or words[0].startswith("--"))
        if name not in ("--world-size", "--device", "--profile") or of_training:
            rest.append(word)
            continue
        if not equals and not words:
            raise FlagError(name, "needs a value", f"add it: {name} VALUE")
        own[name] = value if equals else words.pop(0)
    return own, rest


def _split_at_script(words: list[str]) -> tuple[list[str], str, list[str]]:
    """(launcher's words, entry script, flags); without an entry script all words are flags of GPT."""
    names = {f"{module}.py": module for module in SCRIPTS.values()}
    names |= {module.replace("_", "-"): module for module in SCRIPTS.values()}  # the console scripts
    for position, word in enumerate(words):
        if word in names or Path(word).name in names:
            return words[:position], names[Path(word).name], words[position + 1 :]
    return [], SCRIPTS["gpt"], words


def _ranks(given: str | None, launcher: list[str], env: dict[str, str]) -> int:
    """Number of ranks; FlagError unless it is a positive number."""
    if given is not None:
        return _positive("--world-size", given)
    sizes = _launcher_sizes(launcher)
    if sizes:
        return sizes.get("nnodes", 1) * sizes.get("nproc-per-node", 1)
    return _positive("WORLD_SIZE", env.get("WORLD_SIZE", "1"))


def _launcher_sizes(launcher: list[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for position, word in enumerate(launcher):
        name, equals, value = word.partition("=")
        name = name.lstrip("-").replace("_", "-")
        if name not in ("nnodes", "nproc-per-node") or not word.startswith("-"):
            continue
        text = value if equals else launcher[position + 1] if position + 1 < len(launcher) else ""
        # An elastic range min:max counts as its max.
        sizes[name] = _positive(f"--{name}", text.rpartition(":")[2])
    return sizes


def _positive(subject: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise FlagError(subject, f"{text!r} is not a positive number of ranks", "give --world-size N")
    return int(text)


def _default_device(ranks: int) -> tuple[str, str]:
    name = device.device_name().lower()
    known = next((each for each in DEVICES if each in name), None)
    cores = os.cpu_count() or 1
    if known == "cpu" and ranks > cores:
        return (
            "h100",
            f"planned for H100s: {ranks} ranks are more than the {cores} cores here (--device says otherwise)",
        )
    if known is None:
        return "h100", f"no profile of {device.device_name()}: planned for H100s (--device says otherwise)"
    return known, f"planned for this machine: {device.device_name()}"
