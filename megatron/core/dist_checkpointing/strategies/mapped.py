"""Tensors of a data file in place: mapped, not read, so that only the parts that are used come from the disk.

Each item is a torch archive (an uncompressed zip) with one small pickle that names the storage and its geometry.
That pickle is interpreted here, allowing nothing but one plain tensor; anything else is left to the general reader.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

_LOCAL_HEADER_BYTES = 30
_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _NotPlain(Exception):
    """The item is not one plain CPU tensor."""


class _Geometry(pickle.Unpickler):
    """Reads a tensor's pickle as (storage key, dtype, first element, size, stride)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (*storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module != "torch" or name not in _STORAGE_DTYPES:
            raise _NotPlain(name)
        return _STORAGE_DTYPES[name]

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        _, dtype, key, _, _ = pid
        return str(key), dtype


class MappedFile:
    """A data file; keeps the mapping alive as long as tensors of it exist."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            # Private and writable: torch wants writable memory, and nothing written reaches the file.
            empty = file.seek(0, io.SEEK_END) == 0
            self._memory = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, start: int, length: int) -> torch.Tensor | None:
        """The tensor stored at that place, as a view of the file; None if it needs the general reader."""
        item = memoryview(self._memory)[start : start + length]
        try:
            with zipfile.ZipFile(_View(item)) as archive:
                names = {name.split("/", 1)[-1]: archive.getinfo(name) for name in archive.namelist()}
            pickled = _record(item, names["data.pkl"])
            key, dtype, offset, size, stride = _Geometry(io.BytesIO(pickled)).load()
            data = _record(item, names[f"data/{key}"])
            flat = torch.frombuffer(data, dtype=dtype)
            return flat.as_strided(size, stride, offset)
        except (
            _NotPlain, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, LookupError, TypeError, ValueError,
            EOFError, RuntimeError, AttributeError, OverflowError, OSError,
        ):  # fmt: skip
            return None


class _View(io.RawIOBase):
    """Memory as a stream, without copying it."""

    def __init__(self, memory: memoryview) -> None:
        self._memory, self._position = memory, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._memory)}[whence]
        if origin + offset < 0:
            raise OSError("seek before the start")
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self._memory[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


def _record(item: memoryview, info: zipfile.ZipInfo) -> memoryview:
    name_bytes, extra_bytes = struct.unpack_from("<HH", item, info.header_offset + _LOCAL_HEADER_BYTES - 4)
    start = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if info.compress_type != zipfile.ZIP_STORED or start + info.file_size > len(item):
        raise _NotPlain(info.filename)
    return item[start : start + info.file_size]
