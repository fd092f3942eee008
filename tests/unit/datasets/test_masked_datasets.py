"""BERT and T5 datasets against recordings, random draws included."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset, T5MaskedWordPieceDatasetConfig
from megatron.core.errors import ConfigError, DataError
from tests.unit.datasets.support import (
    GOLDEN,
    SPLITS,
    RecordedTokenizer,
    assert_same,
    cache_files,
    config_arguments,
    load_case,
    recorded_samples,
)

KINDS: dict[str, Any] = {
    "bert": (BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig),
    "t5": (T5MaskedWordPieceDataset, T5MaskedWordPieceDatasetConfig),
}
CASES = [(kind, path.name) for kind in KINDS for path in sorted((GOLDEN / kind).iterdir())]


def build(kind: str, arguments: dict[str, Any], sizes: list[int | None]) -> list[Any]:
    cls, config = KINDS[kind]
    return BlendedMegatronDatasetBuilder(cls, sizes, lambda: True, config(**arguments)).build()


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_recorded_case(kind: str, case: str, tmp_path: Path) -> None:
    meta = load_case(kind, case)
    arguments = {**config_arguments(meta), "path_to_cache": str(tmp_path)}
    datasets = build(kind, arguments, meta["sizes"])
    assert cache_files(tmp_path) == sorted(meta["cache_files"])
    for split, dataset in zip(SPLITS, datasets):
        recorded = meta["splits"][split]
        assert len(dataset) == recorded["len"]
        assert dataset.unique_description == recorded["description"]
        index = np.load(GOLDEN / kind / case / f"{split}_sample_index.npy")
        assert_same(dataset.sample_index, index, f"{split} sample index")
        samples = recorded_samples(kind, case, split)
        for row, number in enumerate(recorded["sample_indices"]):
            if "numpy_random_seed_before_each_sample" in meta:
                np.random.seed(meta["numpy_random_seed_before_each_sample"])
            sample = dataset[number]
            assert set(sample) == set(samples)
            for field, values in samples.items():
                assert_same(sample[field], values[row], f"{split} sample {number} {field}")


def test_one_epoch_without_a_size(tmp_path: Path) -> None:
    """The mapping of one epoch: whole documents, each sentence exactly once, unless its document is left out."""
    arguments = {**config_arguments(load_case("bert", "no_binary_head")), "path_to_cache": str(tmp_path)}
    dataset = build("bert", {**arguments, "split": "1"}, [None, 0, 0])[0]
    spans = dataset.sample_index[np.argsort(dataset.sample_index[:, 0])]
    assert (spans[1:, 0] >= spans[:-1, 1]).all()
    sentences = sum(int(end - first) for first, end, _ in spans)
    lengths, bounds = dataset.dataset.sequence_lengths, dataset.dataset.document_indices
    kept = [
        (a, b) for a, b in itertools.pairwise(bounds) if b - a == 1 or (b > a and lengths[a:b].max() <= 512)
    ]
    assert sentences == sum(b - a for a, b in kept)


def test_nothing_requested_gives_an_empty_dataset(tmp_path: Path) -> None:
    arguments = {**config_arguments(load_case("bert", "default")), "path_to_cache": str(tmp_path)}
    train, valid, _ = build("bert", arguments, [10, 0, 0])
    assert len(train) >= 10 and len(valid) == 0


def test_errors_name_the_option(tmp_path: Path) -> None:
    bert = {**config_arguments(load_case("bert", "default")), "path_to_cache": str(tmp_path)}
    t5 = {**config_arguments(load_case("t5", "default")), "path_to_cache": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"--mask-prob: 1\.5"):
        build("bert", {**bert, "masking_probability": 1.5}, [1, 1, 1])
    with pytest.raises(ConfigError, match="masking_max_ngram: required"):
        build("bert", {**bert, "masking_max_ngram": None}, [1, 1, 1])
    with pytest.raises(ConfigError, match="--vocab-extra-ids"):
        build("t5", {**t5, "tokenizer": RecordedTokenizer("bert")}, [1, 1, 1])
    with pytest.raises(DataError, match="raise --decoder-seq-length"):
        dataset = build("t5", {**t5, "sequence_length_decoder": 3}, [100, 1, 1])[0]
        [dataset[i] for i in range(len(dataset))]
    with pytest.raises(DataError, match=r"none of \d+ documents has 2 sentences"):
        blend = (["bin/gpt_text_document"], None)
        build("bert", {**bert, "blend": blend}, [100, 1, 1])
