"""The index algorithms, in numpy: which tokens, sentences or datasets make up sample k.

Each function returns exactly what a plain sequential walk over documents or samples would. The walks are
replaced by closed forms over cumulative sums where these exist, and by lanes that walk in step where they do not.
"""

from __future__ import annotations

import math

import numpy

from megatron.core.errors import DataError

# Documents (and on average rows) per step: few enough that temporaries stay in the cache and in mapped memory.
_CHUNK = 1 << 17


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
    row = 1
    read = 0
    chunk = max(1, min(_CHUNK, _CHUNK * doc_idx.size // max(samples, 1)))
    for first in range(0, doc_idx.size, chunk):
        lengths = sizes[doc_idx[first : first + chunk]]
        ends = numpy.cumsum(lengths, dtype=numpy.int64)
        ends += read
        read = int(ends[-1])
        stop = min((read - add_extra) // seq_length, samples) + 1
        if stop > row:
            begins = numpy.arange(row, stop, dtype=numpy.int64) * seq_length
            documents = numpy.searchsorted(ends, begins + (add_extra - 1), side="right")
            index[row:stop, 0] = documents + first
            index[row:stop, 1] = begins - ends[documents] + lengths[documents]
            row = stop
    if row == samples:  # without drop_last the final row may end with the stream instead of on a token
        index[row] = doc_idx.size - 1, int(sizes[doc_idx[-1]]) - add_extra
    elif row < samples:
        raise DataError(
            "sample index",
            f"{samples} samples of {seq_length} tokens were asked of {read} tokens",
            "the lengths in the index do not add up to tokens_per_epoch: rebuild the .idx",
        )
    return index


def blend_datasets(
    weights: numpy.ndarray, size: int, limits: numpy.ndarray | None = None
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Which dataset each of `size` samples comes from (int16), and which of its samples it is (int64).

    Step s takes the dataset that lags furthest behind its share: the largest weight * max(s, 1) - taken, the
    lowest number among equals. weights float64 [n]; with `limits` int64 [n] a dataset is passed over once that
    many of its samples are taken.
    """
    dataset_index = numpy.zeros(size, dtype=numpy.int16)
    sample_index = numpy.zeros(size, dtype=numpy.int64)
    taken = numpy.zeros(weights.size, dtype=numpy.int64)
    for step in range(size):
        lag = weights * float(max(step, 1)) - taken
        if limits is not None:
            lag[taken >= limits] = -numpy.inf
        chosen = int(numpy.argmax(lag))
        dataset_index[step] = chosen
        sample_index[step] = taken[chosen]
        taken[chosen] += 1
    return dataset_index, sample_index
