"""A command line worked out: its arguments, model, memory, traffic and time, as values."""

from __future__ import annotations

import contextlib
import io
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron.core.errors import FlagError
from megatron.core.kernels import capability, registry
from megatron.core.kernels.capability import Capabilities
from megatron.training.arguments import parse_args, validate_for_training
from megatron.training.config import build, rules
from megatron.training.config.rules import loop
from megatron.training.explain import hardware, inventory, memory, parameters, steptime, traffic
from megatron.training.explain.command import Command, understand
from megatron.training.explain.hardware import DeviceProfile
from megatron.training.explain.inventory import ChunkWork
from megatron.training.explain.memory import StageMemory
from megatron.training.explain.parameters import Stages
from megatron.training.explain.steptime import StepTime
from megatron.training.explain.traffic import Traffic
from megatron.training.explain.vocabulary import Vocabulary, vocabulary
from megatron.training.explain.workload import Workload, workload
from megatron.training.initialize import prepare_args

#: What the entry scripts call their models.
_MODELS = {
    "pretrain_gpt": "GPT",
    "pretrain_mamba": "hybrid models",
    "pretrain_bert": "BERT",
    "pretrain_t5": "T5",
}
#: What an entry script would fill in.
_DEFAULT_TOKENIZERS = {
    "pretrain_gpt": "GPT2BPETokenizer",
    "pretrain_mamba": "GPT2BPETokenizer",
    "pretrain_bert": "BertWordPieceLowerCase",
    "pretrain_t5": "BertWordPieceLowerCase",
}
_COMPUTE = {"h100": (9, 0), "h200": (9, 0), "a100": (8, 0)}
#: Packages that come with every torch for CUDA.
_WITH_CUDA = {"triton": "3.0"}
_FLASH_ATTN = "2.8"
#: CPU attention beyond this length does not keep probabilities (see blocked_attention.FLASH_LENGTH).
_BLOCKED_UP_TO = 2048


@dataclass(frozen=True)
class Reading:
    """A command line whose arguments are finished; `remarks` are what had to be assumed or left out to finish them."""

    command: Command
    machine: Capabilities
    args: Namespace
    remarks: list[str]
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Explanation:
    """Everything that can be said about a command before it runs."""

    reading: Reading
    choices: list[registry.Choice]
    stages: Stages
    works: tuple[tuple[ChunkWork, ...], ...]
    workload: Workload
    profile: DeviceProfile
    memory: tuple[StageMemory, ...]
    step: StepTime

    @property
    def args(self) -> Namespace:
        """The finished arguments."""
        return self.reading.args

    def traffic(self, stage: int) -> list[Traffic]:
        """What a rank of a stage sends per step."""
        return traffic.of_stage(self.workload, self.profile, stage, self.stages, self.works[stage])


def read(command: Command) -> Reading:
    """Finish the arguments of a command for the machine it is planned for; FlagError where it would stop."""
    machine, remarks = machine_of(command)
    with capability.pretend(machine), _environment(command):
        args, more = arguments(command, machine)
    words = vocabulary(args)
    remarks = [*command.notes, *remarks, *more]
    if words.note is not None:
        remarks.append(words.note)
    return Reading(command, machine, args, remarks, words)


def explain(words: Sequence[str]) -> Explanation:
    """Work out a command line; FlagError where the command itself would stop."""
    reading = read(understand(words))
    command, args = reading.command, reading.args
    profile = hardware.load(command.profile) if command.profile else hardware.PROFILES[command.device]
    stages, choices = parameters.build(args, command.script, reading.machine)
    # Without an order of the micro batches there is no step to explain; what else stops a command is only said.
    rules.check(args, [rule for rule in rules.TRAINING if rule.holds is loop.interleaved_micro_batches_group])
    kind = attention_kind(choices, args)
    fused_scan = any(choice.op == "state_space_scan" and choice.chosen == "triton" for choice in choices)
    numbers = workload(args, stages, command.script, kind, fused_scan, not reading.machine.has_cuda)
    return _assemble(reading, choices, stages, numbers, profile)


def _assemble(
    reading: Reading,
    choices: list[registry.Choice],
    stages: Stages,
    numbers: Workload,
    profile: DeviceProfile,
) -> Explanation:
    works = tuple(tuple(inventory.chunk_work(numbers, chunk) for chunk in row) for row in stages)
    memories = tuple(
        memory.stage_memory(numbers, stage, stages[stage], works[stage]) for stage in range(len(stages))
    )
    step = steptime.predict(numbers, profile, stages, works)
    return Explanation(reading, choices, stages, works, numbers, profile, memories, step)


def reconsider(e: Explanation, profile: DeviceProfile | None = None, **changes: object) -> Explanation:
    """The same command with some numbers of its workload, or the device, changed: what would it be if ..."""
    numbers = replace(e.workload, **changes)  # type: ignore[arg-type]
    return _assemble(e.reading, e.choices, e.stages, numbers, profile or e.profile)


def machine_of(command: Command) -> tuple[Capabilities, list[str]]:
    """The machine planned for, and what was assumed of it: packages of this one, triton and demanded ones on any GPU."""
    here = capability.probe()
    if command.device == "cpu":
        return Capabilities(None, "cpu", here.torch_version, here.packages), []
    packages, remarks = {**_WITH_CUDA, **here.packages}, []
    if "--use-flash-attn" in command.flags and "flash_attn" not in packages:
        packages["flash_attn"] = _FLASH_ATTN
        remarks.append("assumed: flash-attn is installed on the cluster")
    return Capabilities(
        _COMPUTE[command.device], command.device.upper(), here.torch_version, packages
    ), remarks


def arguments(command: Command, machine: Capabilities) -> tuple[Namespace, list[str]]:
    """Finished arguments, and what had to be said or left out to finish them."""
    remarks: list[str] = []
    args = parse_args(argv=command.flags)
    args.rank, args.world_size = 0, command.world_size
    if args.transformer_impl == "transformer_engine" and machine.has_cuda:
        reads = "transformer_impl" not in rules.UNREAD[_MODELS[command.script]]
        if reads and "transformer_engine" not in machine.packages:
            remarks.append(
                "Transformer Engine is not here: planned with this library's own layers (equal parameters)"
            )
        args.transformer_impl = "local"
        args.args_given = [name for name in args.args_given if name != "transformer_impl"]
    if args.train_iters and args.rampup_batch_size is not None:
        remarks.append(
            "this command will not start: --rampup-batch-size counts samples, so give --train-samples instead of "
            "--train-iters; explained without the ramp-up"
        )
        args.rampup_batch_size = None
    with contextlib.redirect_stdout(io.StringIO()):
        prepare_args(args, {"tokenizer_type": _DEFAULT_TOKENIZERS[command.script]})
    args.notices += rules.unread_by(_MODELS[command.script], args)
    # Which is read here, whatever the tokenizer, where its files are missing.
    args.args_given = [name for name in args.args_given if name != "vocab_size"]
    try:
        validate_for_training(args)
        rules.check(args, rules.FROM_FILES)
    except FlagError as error:
        remarks.append(f"this command will not start: {error}")
    build.configs(args)
    return args, remarks


@contextlib.contextmanager
def _environment(command: Command) -> Iterator[None]:
    """The variables that scripts for GPUs export, and not those of a launcher that runs this tool."""
    before = dict(os.environ)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.update(RANK="0", WORLD_SIZE=str(command.world_size))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def attention_kind(choices: Sequence[registry.Choice], args: Namespace) -> str:
    """How the chosen attention treats scores (see Workload)."""
    chosen = {choice.chosen for choice in choices if choice.op == "core_attention"}
    if "matmul_softmax" in chosen:
        return "scores"
    short = args.attention_dropout > 0 or args.seq_length <= _BLOCKED_UP_TO
    return "blocked" if "blocked" in chosen and short else "flash"
