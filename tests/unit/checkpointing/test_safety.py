"""No file of a checkpoint can run code, and nothing a stranger writes ends in a traceback."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.dist_checkpointing import durable
from megatron.core.dist_checkpointing.safe_load import UnsafeFileError, load_file
from megatron.core.dist_checkpointing.strategies.torch import StoredTensors
from megatron.core.errors import CheckpointError
from tests.unit.checkpointing.toy import Run, arguments, one_process

MARK = "this ran"


class _Malicious:
    """Leaves a file behind when unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def _payloads(trace: Path) -> list[Any]:
    return [
        _Malicious(os.system, f"echo {MARK} > {trace}"),
        _Malicious(eval, f"open({str(trace)!r}, 'w').write({MARK!r})"),
        _Malicious(exec, f"open({str(trace)!r}, 'w').write({MARK!r})"),
        _Malicious(os.mkdir, str(trace)),
        _Malicious(getattr, "text", "upper"),
        _Malicious(__import__, "subprocess"),
        _Malicious(torch.load, str(trace)),
    ]


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    with one_process():
        yield


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_malicious_pickles_are_refused(tmp_path: Path, number: int, options: dict[str, Any]) -> None:
    trace, path = tmp_path / "trace", tmp_path / "file.pt"
    payload = _payloads(trace)[number]
    for content in (payload, {"model": {"w": payload}}, argparse.Namespace(lr=payload)):
        torch.save(content, path, **options)
        with pytest.raises(CheckpointError, match=r"could run code|plain tensors"):
            load_file(path)
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError):
            load_file(path)
    assert not trace.exists()


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_every_pickled_file_is_guarded(tmp_path: Path, ckpt_format: str) -> None:
    """The payload in each file of a checkpoint, with and without matching checksums; no older one takes its place."""
    root, trace = tmp_path / "run", tmp_path / "trace"
    run = Run(arguments(root, ckpt_format=ckpt_format))
    run.step()
    run.save()
    run.step()
    run.save()
    newest = root / "iter_0000002"
    for path in sorted(newest.rglob("*")):
        if not path.is_file() or path.suffix == ".json":
            continue
        original, manifest = path.read_bytes(), durable.read_manifest(newest)
        payload = _payloads(trace)[0]
        if path.name == ".metadata":
            path.write_bytes(pickle.dumps(payload))
        elif path.suffix == ".distcp":
            stored = StoredTensors(newest)
            blob = tmp_path / "blob"
            torch.save(payload, blob)
            infos = [
                info for info in stored.metadata.storage_data.values() if info.relative_path == path.name
            ]
            content = bytearray(original)
            for info in infos:
                small = blob.read_bytes()
                content[info.offset : info.offset + info.length] = small[: info.length].ljust(
                    info.length, b"\0"
                )
            path.write_bytes(content)
        else:
            torch.save(payload, path)
        name = path.relative_to(newest).as_posix()
        durable.write_manifest(newest, {**manifest, name: durable.checksum_file(path)})
        resumed = Run(arguments(root, ckpt_format=ckpt_format))
        if path.suffix != ".distcp":
            with pytest.raises(UnsafeFileError, match="could run code"):
                resumed.load()
        else:
            # The payload may not fit its slot; then the file is damaged and the one before is used.
            with contextlib.suppress(UnsafeFileError):
                assert resumed.load() == 1
        assert not trace.exists(), path
        path.write_bytes(original)
        durable.write_manifest(newest, manifest)
    assert Run(arguments(root, ckpt_format=ckpt_format)).load() == 2


def test_opting_out_loads_anything(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"model": 1, "x": _Malicious(os.mkdir, str(trace))}, tmp_path / "file.pt")
    assert load_file(tmp_path / "file.pt", allow_unsafe_pickle=True)["model"] == 1
    assert trace.is_dir()


def test_unknown_megatron_classes_become_stand_ins(tmp_path: Path) -> None:
    """Old files pickle loss scalers and enums of packages that are gone; their attributes survive."""
    module = type(os)("megatron.fp16.loss_scaler")
    scaler = type("DynamicLossScaler", (), {"__module__": module.__name__})
    module.DynamicLossScaler = scaler  # type: ignore[attr-defined]
    import sys

    sys.modules[module.__name__] = module
    try:
        value = scaler()
        value.cur_scale = 1024.0
        torch.save({"scaler": value}, tmp_path / "file.pt")
    finally:
        del sys.modules[module.__name__]
    loaded = load_file(tmp_path / "file.pt")["scaler"]
    assert loaded.cur_scale == 1024.0
    assert type(loaded).__name__ == "DynamicLossScaler"


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_random_bytes_never_escape_as_tracebacks(tmp_path: Path, ckpt_format: str) -> None:
    """200 random changes, checksums removed: each load succeeds or ends in a CheckpointError."""
    run = Run(arguments(tmp_path, ckpt_format=ckpt_format))
    run.step()
    run.save()
    directory, chance = tmp_path / "iter_0000001", random.Random(2)
    (directory / durable.MANIFEST_FNAME).unlink()
    files = [p for p in sorted(directory.rglob("*")) if p.is_file()]
    for _ in range(200):
        path = chance.choice(files)
        original = path.read_bytes()
        content = bytearray(original)
        for _ in range(chance.choice([1, 1, 4, 32])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content) + 1)])])
        with contextlib.suppress(CheckpointError):
            assert Run(arguments(tmp_path, ckpt_format=ckpt_format)).load() == 1
        path.write_bytes(original)


@pytest.mark.parametrize("content", ["", "x", "-3", "0", "1e3", "release2", "99999999999999999999", "１２"])
def test_bad_tracker(tmp_path: Path, content: str) -> None:
    run = Run(arguments(tmp_path))
    run.step()
    run.save()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
    with (
        pytest.raises(CheckpointError) if content != "99999999999999999999" else pytest.MonkeyPatch.context()
    ):
        Run(arguments(tmp_path)).load()
