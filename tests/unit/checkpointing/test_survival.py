"""Never a lost checkpoint: damage of every kind is named, and the previous good checkpoint is used."""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.dist_checkpointing import durable
from megatron.core.errors import CheckpointError
from megatron.training.checkpointing.layout import saved_iterations
from tests.unit.checkpointing.toy import Run, arguments, one_process, same

FORMATS = ["torch", "torch_dist"]


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    with one_process():
        yield


def _two_checkpoints(tmp_path: Path, ckpt_format: str) -> tuple[Run, list[torch.Tensor]]:
    """A run saved at iterations 1 and 2, and its weights at iteration 1."""
    run = Run(arguments(tmp_path, ckpt_format=ckpt_format))
    run.step()
    run.save()
    first = run.weights()
    run.step()
    run.save()
    return run, first


@pytest.mark.parametrize("ckpt_format", FORMATS)
def test_resume_is_bitwise(tmp_path: Path, ckpt_format: str) -> None:
    run, _ = _two_checkpoints(tmp_path, ckpt_format)
    run.step()
    resumed = Run(arguments(tmp_path, ckpt_format=ckpt_format))
    assert resumed.load() == 2
    assert resumed.args.consumed_train_samples == 8
    resumed.step()
    assert same(resumed.weights(), run.weights())


def _damages(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    middle = len(content) // 2
    return {
        "flipped": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
        "truncated": content[:middle],
        "empty": b"",
        "zeroed": bytes(len(content)),
        "appended": content + b"x",
        "missing": None,
    }


@pytest.mark.parametrize("ckpt_format", FORMATS)
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "zeroed", "appended", "missing"])
def test_damaged_newest_is_named_and_the_one_before_used(
    tmp_path: Path, ckpt_format: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file of the newest checkpoint in turn."""
    _, first = _two_checkpoints(tmp_path, ckpt_format)
    newest = tmp_path / "iter_0000002"
    for path in sorted(p for p in newest.rglob("*") if p.is_file()):
        if path.name == durable.MANIFEST_FNAME and damage == "missing":
            continue  # a checkpoint without checksums is legal
        original = path.read_bytes()
        changed = _damages(path)[damage]
        path.unlink() if changed is None else path.write_bytes(changed)
        resumed = Run(arguments(tmp_path, ckpt_format=ckpt_format))
        assert resumed.load() == 1, path
        assert same(resumed.weights(), first), path
        printed = capsys.readouterr().out
        assert "the checkpoint of iteration 2" in printed and "using the checkpoint of iteration 1" in printed
        path.write_bytes(original)
    assert Run(arguments(tmp_path, ckpt_format=ckpt_format)).load() == 2


@pytest.mark.parametrize("ckpt_format", FORMATS)
def test_truncation_is_found_without_checksums(tmp_path: Path, ckpt_format: str) -> None:
    """Checkpoints of other programs have no checksums; a cut file is still never taken for a good one."""
    _, first = _two_checkpoints(tmp_path, ckpt_format)
    newest = tmp_path / "iter_0000002"
    (newest / durable.MANIFEST_FNAME).unlink()
    data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = data.read_bytes()
    for keep in random.Random(3).sample(range(len(content)), 12):
        data.write_bytes(content[:keep])
        resumed = Run(arguments(tmp_path, ckpt_format=ckpt_format))
        assert resumed.load() == 1
        assert same(resumed.weights(), first)


@pytest.mark.parametrize("ckpt_format", FORMATS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_failed_write_names_the_file_and_keeps_the_old(
    tmp_path: Path, ckpt_format: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = _two_checkpoints(tmp_path, ckpt_format)
    run.step()

    def fail(self: Any, data: Any) -> int:
        self.failure = OSError(code, os.strerror(code))
        raise self.failure

    with monkeypatch.context() as patched:
        patched.setattr(durable.ChecksumWriter, "write", fail)
        with pytest.raises(CheckpointError, match=re.escape(os.strerror(code))) as caught:
            run.save()
    assert str(tmp_path) in str(caught.value)
    assert saved_iterations(str(tmp_path)) == [2, 1]
    assert Run(arguments(tmp_path, ckpt_format=ckpt_format)).load() == 2
    run.save()
    assert Run(arguments(tmp_path, ckpt_format=ckpt_format)).load() == 3


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    _two_checkpoints(tmp_path, "torch")
    for path in tmp_path.rglob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"iter_0000002.*bytes instead of"):
        Run(arguments(tmp_path)).load()


def test_keep_last(tmp_path: Path) -> None:
    run = Run(arguments(tmp_path, keep_last_checkpoints=2))
    for _ in range(4):
        run.step()
        run.save()
    assert saved_iterations(str(tmp_path)) == [4, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "iter_0000003",
        "iter_0000004",
        "latest_checkpointed_iteration.txt",
    ]


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    run, _ = _two_checkpoints(tmp_path, "torch_dist")
    resumed = Run(arguments(tmp_path, ckpt_format="torch_dist", ckpt_step=1))
    assert resumed.load() == 1
    torch.manual_seed(77)
    resumed.step()
    resumed.args.ckpt_step = None
    resumed.save()
    again = Run(arguments(tmp_path, ckpt_format="torch_dist"))
    assert again.load() == 2
    assert same(again.weights(), resumed.weights()) and not same(again.weights(), run.weights())


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """The old directory was moved away and the new one not yet moved in."""
    _two_checkpoints(tmp_path, "torch")
    (tmp_path / "iter_0000002").rename(tmp_path / ".iter_0000002.replaced")
    assert Run(arguments(tmp_path)).load() == 2


def test_async_save_is_durable_only_when_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is taken at the call, failures are reported, the next save repairs them."""
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
    from megatron.training.async_utils import maybe_finalize_async_save

    run = Run(arguments(tmp_path, ckpt_format="torch_dist", async_save=True))
    run.step()
    saved = run.weights()
    run.save()
    run.step()
    assert "successfully" not in capsys.readouterr().out
    maybe_finalize_async_save(blocking=True)
    assert "successfully saved checkpoint from iteration       1" in capsys.readouterr().out
    resumed = Run(arguments(tmp_path, ckpt_format="torch_dist"))
    assert resumed.load() == 1 and same(resumed.weights(), saved)

    def full(*_: Any) -> Any:
        raise CheckpointError("disk", "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch_strategy, "write_items", full)
        run.save()
        while "failed" not in (printed := capsys.readouterr().out):
            maybe_finalize_async_save()
            time.sleep(0.01)
    assert "No space left on device" in printed
    assert saved_iterations(str(tmp_path)) == [1]
    run.step()
    run.save()
    maybe_finalize_async_save(blocking=True)
    assert Run(arguments(tmp_path, ckpt_format="torch_dist")).load() == 3
