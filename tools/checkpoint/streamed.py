"""Files that are written tensor by tensor, so that a conversion never holds more than a layer.

`TorchFile` makes what torch.save makes: records of raw data, then the pickle that refers to them. `SafetensorsFile`
reserves the header's place and fills it in at the end.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing import durable
from megatron.core.dist_checkpointing.durable import Checksum, ChecksumWriter

# The classes by which torch's files name dtypes.
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
}
_SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


class Stored:
    """Stands in a state dict for a tensor that is in the file already."""

    def __init__(self, record: str, tensor: torch.Tensor) -> None:
        self.storage = _StoredData(record, tensor.dtype, tensor.numel())
        self.shape = tuple(tensor.shape)
        self.stride = torch.empty(self.shape, device="meta").stride()


class _StoredData:
    def __init__(self, record: str, dtype: torch.dtype, numel: int) -> None:
        self.record, self.dtype, self.numel = record, dtype, numel


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _StoredData):
            return ("storage", _STORAGES[obj.dtype], obj.record, "cpu", obj.numel)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Stored):
            geometry = (obj.storage, 0, obj.shape, obj.stride, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, geometry
        return NotImplemented


class TorchFile:
    """A file for torch.load, staged durably; CheckpointError names it if it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with durable.naming_path(path, "writing"):
            self._file = ChecksumWriter(path)
        self._archive = torch._C.PyTorchFileWriter(self._file)
        self._records = 0

    def add(self, tensor: torch.Tensor) -> Stored:
        """Write the tensor's data; returns what represents it in the object given to `finish`."""
        record = str(self._records)
        self._records += 1
        self._write(f"data/{record}", tensor.detach().contiguous())
        return Stored(record, tensor)

    def finish(self, obj: Any) -> Checksum:
        """Write the object that refers to the tensors, flush to the disk and close."""
        content = io.BytesIO()
        _Pickler(content, protocol=2).dump(obj)
        self._write("data.pkl", content.getvalue())
        self._write("byteorder", b"little")
        with durable.naming_path(self.path, "writing"):
            self._archive.write_end_of_file()
            self._file.close()
        return self._file.checksum()

    def _write(self, name: str, data: torch.Tensor | bytes) -> None:
        with durable.naming_path(self.path, "writing"):
            try:
                if isinstance(data, bytes):
                    self._archive.write_record(name, data, len(data))
                else:
                    own = data if data.untyped_storage().nbytes() == data.nbytes else data.clone()
                    self._archive.write_record(name, own.untyped_storage(), own.nbytes)
            except (RuntimeError, SystemError):
                # torch's archive writer reports a failed write as an error of its own.
                if self._file.failure is None:
                    raise
                raise self._file.failure from None


class SafetensorsFile:
    """A safetensors file whose tensors are written as they come."""

    HEADER_BYTES = 128 * 1024

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = len(json.dumps(self._entries))
        self.data_bytes = 0
        with durable.naming_path(path, "writing"):
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115 closed by finish()
            self._file.seek(8 + self.HEADER_BYTES)

    def names(self) -> list[str]:
        """Tensors so far."""
        return [name for name in self._entries if name != "__metadata__"]

    def has_room(self, name: str, tensor: torch.Tensor, limit_bytes: int) -> bool:
        """Whether the tensor fits below the limit and its entry into the header."""
        entry = len(json.dumps({name: self._entry(tensor)}))
        return (
            self.data_bytes + tensor.nbytes <= limit_bytes
            and self._header_bytes + entry + 2 <= self.HEADER_BYTES
        )

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor."""
        entry = self._entry(tensor)
        with durable.naming_path(self.path, "writing"):
            view = _bytes_of(tensor)
            while view:
                view = view[self._file.write(view) :]
        self._entries[name] = entry
        self._header_bytes += len(json.dumps({name: entry})) + 2
        self.data_bytes += tensor.nbytes

    def _entry(self, tensor: torch.Tensor) -> dict[str, Any]:
        return {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.data_bytes, self.data_bytes + tensor.nbytes],
        }

    def finish(self) -> None:
        """Write the header and flush to the disk."""
        header = json.dumps(self._entries).encode().ljust(self.HEADER_BYTES)
        with durable.naming_path(self.path, "writing"):
            self._file.seek(0)
            self._file.write(self.HEADER_BYTES.to_bytes(8, "little") + header)
            os.fsync(self._file.fileno())
            self._file.close()
