"""The token types of the file format. Apart from the reader, so that encoding a corpus need not import torch."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy


class DType(Enum):
    """Token types by their code in the index file."""

    uint8 = 1
    int8 = 2
    int16 = 3
    int32 = 4
    int64 = 5
    float64 = 6
    float32 = 7
    uint16 = 8

    @classmethod
    def code_from_dtype(cls, value: Any) -> int:
        """The code of a numpy dtype; KeyError if the format has none."""
        return cls[numpy.dtype(value).name].value

    @classmethod
    def dtype_from_code(cls, value: int) -> type[numpy.number]:
        """The numpy type of a code; ValueError if there is none."""
        return getattr(numpy, cls(value).name)

    @staticmethod
    def size(key: Any) -> int:
        """Bytes per token, of a code or a dtype."""
        return numpy.dtype(DType.dtype_from_code(key) if isinstance(key, int) else key).itemsize

    @staticmethod
    def optimal_dtype(cardinality: int | None) -> type[numpy.number]:
        """uint16 for a vocabulary below 65500 ids, else int32. The bound is part of the format's convention."""
        return numpy.uint16 if cardinality is not None and cardinality < 65500 else numpy.int32
