"""The index algorithms, in numpy: which tokens, sentences or datasets make up sample k.

Each function returns exactly what a plain sequential walk over documents or samples would. The walks are
replaced by closed forms over cumulative sums where these exist, and by lanes that walk in step where they do not.
"""

from __future__ import annotations

import math

import numpy

from megatron.core.errors import DataError

# Rows written per step: bounds the temporaries of an index of any size to a few tens of MiB.
_CHUNK = 1 << 21


def count_samples(tokens: int, seq_length: int, drop_last: bool, add_extra: int) -> int:
    """Samples of `seq_length` (+ `add_extra` shared with the next) in a stream of so many tokens."""
    if drop_last:
        return (tokens - add_extra) // seq_length
    # The quotient is rounded to 32 bits by definition of the format: existing indices have this many rows.
    return math.ceil(numpy.float32(tokens - add_extra) / numpy.float32(seq_length))


def build_sample_idx(
    sizes: numpy.ndarray,
    doc_idx: numpy.ndarray,
    seq_length: int,
    num_epochs: int,
    tokens_per_epoch: int,
    drop_last: bool = True,
    add_extra: int = 1,
) -> numpy.ndarray:
    """Where each sample begins: int64 [samples + 1, 2] of (position in doc_idx, token offset in that document).

    sizes int32 [sequences] in tokens, doc_idx int32 [documents x epochs]. Sample k is tokens
    k * seq_length to (k + 1) * seq_length + add_extra of the documents laid end to end, so its end is found in
    their cumulative sizes; row k + 1 lies in the document that holds its last token.
    """
    tokens = num_epochs * tokens_per_epoch
    if seq_length < 1 or num_epochs < 1 or tokens <= add_extra:
        raise DataError(
            "sample index",
            f"{tokens} tokens in {num_epochs} epochs cannot be cut into sequences of {seq_length}",
            "use a corpus of at least two tokens and a positive --seq-length",
        )
    samples = count_samples(tokens, seq_length, drop_last, add_extra)
    index = numpy.zeros((samples + 1, 2), dtype=numpy.int64)
    ends = numpy.cumsum(sizes[doc_idx], dtype=numpy.int64)
    total = int(ends[-1])
    # Rows up to here end on a token that exists; without drop_last one more ends with the stream.
    whole = min(samples, (total - add_extra) // seq_length)
    if samples > whole + 1:
        raise DataError(
            "sample index",
            f"{samples} samples of {seq_length} tokens were asked of {total} tokens",
            "the lengths in the index do not add up to tokens_per_epoch: rebuild the .idx",
        )
    # rows_before[i]: rows whose last token lies before the end of document i.
    rows_before = numpy.clip((ends - add_extra) // seq_length, 0, whole)
    starts = ends - sizes[doc_idx]
    for first in range(1, whole + 1, _CHUNK):
        last = min(first + _CHUNK - 1, whole)
        low = int(numpy.searchsorted(rows_before, first))
        high = int(numpy.searchsorted(rows_before, last)) + 1
        bounds = numpy.clip(rows_before[low:high], first - 1, last)
        rows = numpy.diff(bounds, prepend=first - 1)
        index[first : last + 1, 0] = numpy.repeat(numpy.arange(low, high), rows)
        index[first : last + 1, 1] = numpy.arange(first, last + 1) * seq_length
        index[first : last + 1, 1] -= numpy.repeat(starts[low:high], rows)
    if samples > whole:
        index[samples] = doc_idx.size - 1, int(sizes[doc_idx[-1]]) - add_extra
    return index
