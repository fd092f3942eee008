"""Samples and epochs per source, from the index files alone: nothing is shuffled, cached or written."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import get_blend_from_list, normalize

#: The margin that blends are built with (see BlendedMegatronDatasetBuilder).
_MARGIN = 1.005
_NAMES = ("train", "validation", "test")


def lines(args: Namespace, wanted: tuple[int, int, int], windows: bool) -> list[str]:
    """What each split draws from each source. `windows`: samples are windows over documents, as GPT's are."""
    if args.mock_data:
        return [f"> {name} data: {count} samples, synthetic" for name, count in zip(_NAMES, wanted) if count]
    result: list[str] = []
    per_split = (args.train_data_path, args.valid_data_path, args.test_data_path)
    for index, (name, count) in enumerate(zip(_NAMES, wanted)):
        blend = get_blend_from_list(per_split[index] if any(per_split) else args.data_path)
        if blend is None or not count:
            continue
        span = (0.0, 1.0)
        if not any(per_split):
            vector = parse_and_normalize_split(args.split)
            found = convert_split_vector_to_split_matrix(vector)[index]
            if found is None:
                continue
            span = found
        prefixes, weights = blend
        shares = normalize(weights) if weights else [1 / len(prefixes)] * len(prefixes)
        result.append(f"> {name} data: {count} samples")
        result += [
            _source(
                prefix,
                share,
                math.ceil(count * share * _MARGIN) if len(prefixes) > 1 else count,
                span,
                args,
                windows,
            )
            for prefix, share in zip(prefixes, shares)
        ]
    return result


def _source(
    prefix: str, share: float, samples: int, span: tuple[float, float], args: Namespace, windows: bool
) -> str:
    text = f">   {prefix}: weight {share:.4g}, {samples} samples"
    if not Path(f"{prefix}.idx").exists():
        return f"{text} (the file is not here: epochs unknown)"
    index = IndexedDataset(prefix, mmap=True)
    lengths = index.sequence_lengths
    if not windows:
        return f"{text}, from {len(lengths)} sentences"
    first, last = (round(edge * len(lengths)) for edge in span)
    tokens = int(lengths[first:last].sum(dtype="int64"))
    if not tokens:
        return f"{text}: its share holds no tokens"
    epochs = max(1, -(-(samples * args.seq_length + 1) // tokens))
    return f"{text}, {epochs} epoch(s) of {tokens:,} tokens"
