"""Recorded command lines of v0.9 have the same outcome here, value by value."""

from __future__ import annotations

import csv
import dataclasses
import enum
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron.core.errors import FlagError
from megatron.core.kernels import capability
from megatron.training import arguments

GOLDEN = Path(__file__).parent / "arguments"
RECORDS = json.loads((GOLDEN / "validate_args.json").read_text())["cases"]
MACHINES = {
    "cuda": capability.Capabilities(
        (9, 0), "H100", "2.13.0", {"transformer_engine": "1.9", "flash_attn": "2.7"}
    ),
    "cpu": capability.Capabilities(),
}
#: Where our outcome differs on purpose: (machine or "any", case) -> (our outcome, reason).
DIFFERENCES = {
    ("any", "checkpoint_activations"): (
        "error",
        "v0.9 prints advice and exits with status 0, as if it had trained",
    ),
    ("any", "legacy_torch"): ("error", "there is no second model stack"),
    ("cpu", "no_env"): ("ok", "CUDA_DEVICE_MAX_CONNECTIONS orders CUDA streams; there are none"),
    ("cpu", "env_wrong"): ("ok", "CUDA_DEVICE_MAX_CONNECTIONS orders CUDA streams; there are none"),
    ("cpu", "sp_tp2_no_env"): ("ok", "CUDA_DEVICE_MAX_CONNECTIONS orders CUDA streams; there are none"),
    ("cpu", "deterministic_no_env"): ("ok", "NCCL_ALGO is about nccl, and gloo is used"),
    ("cpu", "deterministic_bad_env"): ("ok", "NCCL_ALGO is about nccl, and gloo is used"),
}
#: Values that differ on purpose on a CPU: the defaults that need a GPU fall back with a notice.
CPU_VALUES = {"transformer_impl": "local", "distributed_backend": "gloo"}


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, torch.dtype) else value


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("case", RECORDS, ids=lambda case: case["name"])
def test_recorded_outcome(case: dict, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_ALGO", "LOCAL_RANK", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in case["env"].items():
        monkeypatch.setenv(name, value)
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    with capability.pretend(MACHINES[machine]):
        try:
            args = arguments.parse_args(argv=case["argv"])
            before = dict(vars(args))
            after = vars(arguments.validate_args(args, dict(case["defaults"])))
            outcome = "ok"
        except FlagError as error:
            outcome = "error"
            assert error.exit_code == 2
        except SystemExit as ended:
            outcome = "exit"
            assert ended.code == case["exit_code"]
    different = DIFFERENCES.get(("any", case["name"])) or DIFFERENCES.get((machine, case["name"]))
    if different is not None:
        assert outcome == different[0]
        return
    assert outcome == case["outcome"]
    if outcome != "ok":
        return
    ours = {"args_given", "notices", *(CPU_VALUES if machine == "cpu" else ())}
    changed = {name for name in before if name in after and before[name] != after[name]} - ours
    assert {name: [plain(before[name]), plain(after[name])] for name in changed} == case["changed"]
    assert {name: plain(after[name]) for name in after if name not in before} == case["added"]
    assert sorted(set(before) - set(after)) == case["deleted"]
    if machine == "cpu":
        assert {name: after[name] for name in CPU_VALUES} == CPU_VALUES


def recorded_classes() -> list[dict[str, str]]:
    with (GOLDEN / "config_classes.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.mark.parametrize("row", recorded_classes(), ids=lambda row: f"{row['module']}.{row['name']}")
def test_recorded_class(row: dict[str, str]) -> None:
    """Fields in the same order with the same defaults; what v0.9 does not have is keyword-only."""
    present = getattr(importlib.import_module(row["module"]), row["name"])
    signature = f"dict{row['signature']}"
    recorded = eval(signature, {"torch": torch, "F": F, "dict": dict})  # a line of our own fixture
    if issubclass(present, enum.Enum):
        members = {member.name: member.value for member in present}
        assert recorded.items() <= members.items()
        return
    inherited = {item.name for base in present.__mro__[1:-1] for item in dataclasses.fields(base)}
    fields = [item for item in dataclasses.fields(present) if item.name not in inherited and not item.kw_only]
    assert [(item.name, item.default) for item in fields] == list(recorded.items())
    assert [type(item.default) for item in fields] == [type(value) for value in recorded.values()]
