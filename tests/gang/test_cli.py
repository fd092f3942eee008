"""Ranks that know each other say a shared error once and a private one where it happens."""

from __future__ import annotations

import contextlib
import io

import torch.distributed as dist

from megatron.core.errors import CheckpointError, FlagError, MegatronError
from megatron.training import cli
from tests.gang.harness import run_gang


def _said(error: MegatronError) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as text, contextlib.suppress(SystemExit):
        cli.stop(error)
    return text.getvalue()


def _shared() -> tuple[str, str]:
    return _said(FlagError("--a", "b", "c")), _said(CheckpointError("file", "gone", "find it"))


def _private() -> str:
    return _said(FlagError("--b", "b", "c")) if dist.get_rank() == 1 else ""


def test_shared_errors_are_said_once() -> None:
    for texts in zip(*run_gang(2, _shared)):
        assert sorted(bool(text) for text in texts) == [False, True]


def test_an_error_of_one_rank_is_not_lost() -> None:
    assert run_gang(2, _private) == ["", "error: --b: b. Fix: c.\n"]
