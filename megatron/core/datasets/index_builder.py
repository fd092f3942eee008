"""The index algorithms, in numpy: which tokens, sentences or datasets make up sample k.

Each function returns exactly what a plain sequential walk over documents or samples would. The walks are
replaced by closed forms over cumulative sums where these exist, and by lanes that walk in step where they do not.
"""

from __future__ import annotations

import itertools
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy

from megatron.core.errors import DataError

# Documents with a longer sentence are left out of BERT and T5 samples.
_MAX_SENTENCE_TOKENS = 512

# Target lengths drawn at once.
_DRAWS = 1 << 16

# Blending walks many stretches of the sample order side by side. This many lags are computed per step, which keeps
# them in the cache; stretches shorter than this many steps are not worth their overhead.
_BLEND_CELLS = 1 << 16
_BLEND_MIN_STEPS = 512

# Ends of rows searched for at once.
_SEARCHES = 1 << 14

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

    The order is cut into lanes that walk at the same time, each from a guess of what was taken before it. A walk
    forgets a wrong guess after a while, because the lags of a wrong state pull it back; so where a lane did end
    elsewhere than the next one began, the next one walks again from there, until all agree. By induction over the
    lanes the result is then that of one walk.
    """
    if size == 0:
        return numpy.empty(0, dtype=numpy.int16), numpy.empty(0, dtype=numpy.int64)
    steps = -(-size // max(1, min(_BLEND_CELLS // weights.size, size // _BLEND_MIN_STEPS)))
    first_steps = numpy.arange(0, size, steps)
    dataset_index = numpy.empty((first_steps.size, steps), dtype=numpy.int16)
    sample_index = numpy.empty((first_steps.size, steps), dtype=numpy.int64)
    begins = _expected_taken(weights, first_steps)
    ends = numpy.empty_like(begins)
    lanes = numpy.arange(first_steps.size)
    while lanes.size:
        taken = begins[lanes]
        chosen, numbers = _walk_blend(weights, first_steps[lanes], taken, steps, limits)
        dataset_index[lanes], sample_index[lanes], ends[lanes] = chosen.T, numbers.T, taken
        lanes = numpy.flatnonzero((ends[:-1] != begins[1:]).any(axis=1)) + 1
        begins[lanes] = ends[lanes - 1]
    return dataset_index.reshape(-1)[:size], sample_index.reshape(-1)[:size]


def _expected_taken(weights: numpy.ndarray, steps: numpy.ndarray) -> numpy.ndarray:
    """About how many samples of each dataset precede each of `steps`: float64 [lanes, n], exact at step 0."""
    shares = steps[:, None] * weights
    taken = numpy.floor(shares)
    by_remainder = numpy.argsort(numpy.argsort(taken - shares, axis=1, kind="stable"), axis=1)
    return taken + (by_remainder < steps[:, None] - taken.sum(axis=1, keepdims=True))


def _walk_blend(
    weights: numpy.ndarray,
    first_steps: numpy.ndarray,
    taken: numpy.ndarray,
    steps: int,
    limits: numpy.ndarray | None,
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Walk lanes side by side: choices int16 and their numbers int64, both [steps, lanes].

    Updates `taken`, float64 [lanes, n] and contiguous: the search for the furthest then runs along memory.
    """
    lanes = first_steps.size
    chosen = numpy.empty((steps, lanes), dtype=numpy.int16)
    numbers = numpy.empty((steps, lanes), dtype=numpy.int64)
    lags = numpy.empty_like(taken)
    first_cell, flat = numpy.arange(lanes) * weights.size, taken.reshape(-1)
    for step in range(steps):
        position = numpy.maximum(first_steps + step, 1).astype(numpy.float64)
        numpy.multiply(position[:, None], weights, out=lags)
        lags -= taken
        if limits is not None:
            lags[taken >= limits] = -numpy.inf
        furthest = lags.argmax(axis=1)
        chosen[step] = furthest
        cells = first_cell + furthest
        numbers[step] = counts = flat.take(cells)
        flat.put(cells, counts + 1)
    return chosen, numbers


def build_mapping(
    docs: numpy.ndarray,
    sizes: numpy.ndarray,
    num_epochs: int,
    max_num_samples: int,
    max_seq_length: int,
    short_seq_prob: float,
    seed: int,
    min_num_sent: int,
) -> numpy.ndarray:
    """Sentence spans for BERT and T5: [rows, 3] of (first sentence, end sentence, target length), shuffled.

    docs int64 [documents + 1] are boundaries in sentences, sizes int32 [sentences] in tokens. Sentences of a
    document are joined until they reach the target, which is `max_seq_length` or, with the given probability, a
    random shorter one. Whole epochs are made until there are `max_num_samples` rows. Documents of fewer than
    `min_num_sent` sentences, or with a sentence above 512 tokens, are left out. dtype uint32, or uint64 for more
    than 2^32 - 1 sentences.
    """
    if seed <= 0 or max_seq_length <= 1:
        raise DataError(
            "sentence index",
            f"seed {seed} and target length {max_seq_length} must be above 0 and 1",
            "set --seed and --seq-length accordingly",
        )
    documents = _usable_documents(docs, sizes, min_num_sent)
    if not documents and max_num_samples > 0:
        raise DataError(
            "sentence index",
            f"none of {docs.size - 1} documents has {min_num_sent} sentences of at most {_MAX_SENTENCE_TOKENS} tokens",
            "preprocess with --split-sentences, or give the split a larger share",
        )
    targets = _target_lengths(max_seq_length, short_seq_prob, seed)
    rows = _walk_sentences(
        documents, sizes, num_epochs, max_num_samples, max_seq_length, targets, min_num_sent
    )
    dtype = numpy.uint64 if sizes.size > numpy.iinfo(numpy.uint32).max else numpy.uint32
    return rows.astype(dtype)[_shuffled_rows(rows.shape[0], seed + 1)]


def _usable_documents(docs: numpy.ndarray, sizes: numpy.ndarray, min_num_sent: int) -> list[tuple[int, int]]:
    """First and end sentence of each document that takes part."""
    firsts, ends = docs[:-1], docs[1:]
    too_long = numpy.concatenate([[0], numpy.cumsum(sizes > _MAX_SENTENCE_TOKENS)])
    sentences = ends - firsts
    usable = (sentences >= max(min_num_sent, 1)) & ((sentences <= 1) | (too_long[ends] == too_long[firsts]))
    return list(zip(firsts[usable].tolist(), ends[usable].tolist()))


def _target_lengths(max_seq_length: int, short_seq_prob: float, seed: int) -> Iterator[numpy.ndarray]:
    """The endless stream of target lengths in blocks: one 32-bit Mersenne Twister output each, none if all are equal."""
    if short_seq_prob == 0:
        yield from itertools.repeat(numpy.full(_DRAWS, max_seq_length, dtype=numpy.int64))
    ratio = math.floor(1.0 / short_seq_prob + 0.5)  # halves round away from zero, as in C
    random = numpy.random.RandomState(seed)
    while True:
        values = random.randint(0, 1 << 32, size=_DRAWS, dtype=numpy.uint32).astype(numpy.int64)
        yield numpy.where(values % ratio == 0, 2 + values % (max_seq_length - 1), max_seq_length)


def _walk_sentences(
    documents: Sequence[tuple[int, int]],
    sizes: numpy.ndarray,
    num_epochs: int,
    max_num_samples: int,
    max_seq_length: int,
    targets: Iterator[numpy.ndarray],
    min_num_sent: int,
) -> numpy.ndarray:
    """The rows in document order, int64 [rows, 3]; documents are (first, end) sentences.

    A row ends at the first sentence that fulfils target and minimum, provided two or more sentences remain after
    it, else at the end of the document. Each document draws one target, and each row one for its successor. How
    much one document draws decides what the next one gets, so this is a walk; it finds only where rows end.
    """
    before = numpy.concatenate([[0], numpy.cumsum(sizes, dtype=numpy.int64)])
    least = max(min_num_sent, 1)
    # Where a row of the longest target ends, for every sentence that it may begin with; other targets are rare.
    ends_by_start = _ends_by_start(before, max_seq_length, least).data
    lengths_before = before.data
    drawn: list[numpy.ndarray] = []

    def draws() -> Iterator[list[int]]:
        for block in targets:
            drawn.append(block)
            yield block.tolist()

    draw = itertools.chain.from_iterable(draws()).__next__
    stops = array("q")
    rows_before = array("q")
    for _ in range(num_epochs):
        if len(stops) >= max_num_samples:
            break
        for start, end in documents:
            rows_before.append(len(stops))
            last_stop = end - 2
            target = draw()
            while start < end:
                if target == max_seq_length:
                    start = ends_by_start[start]
                else:
                    stop = bisect_left(lengths_before, lengths_before[start] + target, start, end + 1)
                    start = stop if stop >= start + least else start + least
                if start > last_stop:
                    start = end
                stops.append(start)
                target = draw()
    rows = numpy.empty((len(stops), 3), dtype=numpy.int64)
    if not rows.size:
        return rows
    first_rows = numpy.array(rows_before)
    rows[:, 1] = stops
    rows[1:, 0] = rows[:-1, 1]
    rows[first_rows, 0] = numpy.resize([first for first, _ in documents], first_rows.size)
    # Row r of document d (from 0, over all epochs) is made with draw r + d.
    of_document = numpy.zeros(len(stops), dtype=numpy.int64)
    of_document[first_rows[1:]] = 1
    rows[:, 2] = numpy.concatenate(drawn)[numpy.cumsum(of_document) + numpy.arange(len(stops))]
    return rows


def _ends_by_start(before: numpy.ndarray, target: int, least: int) -> numpy.ndarray:
    """For every sentence the end, int64, of the fewest sentences from there on, `least` or more, that reach `target`.

    `before` are the tokens before each sentence, and in all. Part by part, because the search in a part of the
    array stays in the cache.
    """
    count = before.size - 1
    ends = numpy.arange(least, count + least)
    for first in range(0, count, _SEARCHES):
        wanted = before[first : min(first + _SEARCHES, count)] + target
        stop = int(numpy.searchsorted(before, wanted[-1])) + 1
        part = ends[first : first + wanted.size]
        numpy.maximum(part, numpy.searchsorted(before[first:stop], wanted) + first, out=part)
    return ends


def _shuffled_rows(count: int, seed: int) -> numpy.ndarray:
    """The order that swapping i = count - 1 .. 1 with a 64-bit Mersenne Twister output modulo i + 1 leaves."""
    order = numpy.arange(count, dtype=numpy.int64)
    if count > 1:
        places = order.data
        partners = _mt19937_64(seed, count - 1) % numpy.arange(count, 1, -1, dtype=numpy.uint64)
        for i, j in zip(range(count - 1, 0, -1), partners.data):
            places[i], places[j] = places[j], places[i]
    return order


def _mt19937_64(seed: int, count: int) -> numpy.ndarray:
    """`count` outputs of the 64-bit Mersenne Twister, which numpy does not have: uint64 [count].

    M. Matsumoto and T. Nishimura, "Mersenne Twister" (1998); T. Nishimura, "Tables of 64-bit Mersenne Twisters"
    (2000), the parameters of C++'s std::mt19937_64.
    """
    words, middle = 312, 156
    state_words = [seed & 0xFFFFFFFFFFFFFFFF]
    for i in range(1, words):
        previous = state_words[-1]
        state_words.append((6364136223846793005 * (previous ^ (previous >> 62)) + i) & 0xFFFFFFFFFFFFFFFF)
    state = numpy.array(state_words, dtype=numpy.uint64)
    upper, lower = numpy.uint64(0xFFFFFFFF80000000), numpy.uint64(0x7FFFFFFF)
    matrix, one = numpy.uint64(0xB5026F5AA96619E9), numpy.uint64(1)

    def mix(high: numpy.ndarray, low: numpy.ndarray) -> numpy.ndarray:
        word = (high & upper) | (low & lower)
        return (word >> one) ^ numpy.where(word & one, matrix, numpy.uint64(0))

    outputs = numpy.empty(-(-count // words) * words, dtype=numpy.uint64)
    for start in range(0, count, words):
        # Word i of the new state needs words i and i + 1 of the old one and word i + 156, old in the first half.
        mixed = mix(state[:-1], state[1:])
        new = outputs[start : start + words]
        new[:middle] = state[middle:] ^ mixed[:middle]
        new[middle:-1] = new[: middle - 1] ^ mixed[middle:]
        new[-1:] = new[middle - 1 : middle] ^ mix(state[-1:], new[:1])
        state = new.copy()
    outputs ^= (outputs >> numpy.uint64(29)) & numpy.uint64(0x5555555555555555)
    outputs ^= (outputs << numpy.uint64(17)) & numpy.uint64(0x71D67FFFEDA60000)
    outputs ^= (outputs << numpy.uint64(37)) & numpy.uint64(0xFFF7EEE000000000)
    outputs ^= outputs >> numpy.uint64(43)
    return outputs[:count]
