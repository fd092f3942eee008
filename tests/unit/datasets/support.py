"""Recorded dataset cases: their configuration, a tokenizer stand-in with the recorded ids, their samples."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "data"
SPLITS = ("train", "valid", "test")


class RecordedTokenizer:
    """The ids and the identity that a dataset asks of a tokenizer; reading any other raises AttributeError."""

    def __init__(self, name: str) -> None:
        recorded = json.loads((GOLDEN / "special_tokens.json").read_text())[name]
        description = recorded.pop("unique_description")
        self.unique_identifiers = json.loads(description, object_pairs_hook=OrderedDict)
        for key, value in recorded.items():
            setattr(self, key, value)
        pieces = (GOLDEN / "vocab" / "bert-vocab.txt").read_text(encoding="utf-8").splitlines()
        known = pieces if name.startswith("bert") else []
        self.inv_vocab = {i: known[i] if i < len(known) else f"piece{i}" for i in range(self.vocab_size)}


def load_case(kind: str, case: str) -> dict[str, Any]:
    """The recorded meta data of a case."""
    return json.loads((GOLDEN / kind / case / "meta.json").read_text())


def config_arguments(meta: dict[str, Any]) -> dict[str, Any]:
    """The recorded configuration as constructor arguments."""
    arguments = dict(meta["config"])
    for derived in ("split_matrix", "mock", "sequence_length_encoder"):
        arguments.pop(derived, None)
    if arguments["blend"] is not None:
        arguments["blend"] = tuple(arguments["blend"])
    if arguments["blend_per_split"] is not None:
        arguments["blend_per_split"] = [tuple(b) if b else None for b in arguments["blend_per_split"]]
    elif arguments["blend"] is None:
        arguments["split"] = None
    return {**arguments, "tokenizer": RecordedTokenizer(meta["tokenizer"])}


def recorded_samples(kind: str, case: str, split: str) -> dict[str, np.ndarray]:
    """Stacked fields of the recorded samples."""
    stored = np.load(GOLDEN / kind / case / f"{split}_samples.npz")
    fields = {}
    for key in stored:
        if key.endswith("__packbits"):
            name = key.removesuffix("__packbits")
            shape = stored[f"{name}__shape"]
            bits = np.unpackbits(stored[key])[: np.prod(shape)].reshape(shape)
            fields[name] = bits.astype(str(stored[f"{name}__dtype"]))
        elif not key.endswith(("__shape", "__dtype")):
            fields[key] = stored[key]
    return fields


def assert_same(actual: Any, expected: np.ndarray, what: str) -> None:
    """Equal in dtype, shape and every value."""
    array = np.asarray(actual)
    assert array.dtype == expected.dtype, f"{what}: dtype {array.dtype}, recorded {expected.dtype}"
    np.testing.assert_array_equal(array, expected, err_msg=what)


def cache_files(directory: Path) -> list[str]:
    """Names in a cache directory, without the fingerprints that only this implementation writes."""
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith("-fingerprint.json"))
