"""Fingerprints of a corpus: where each document lies, a hash of its id and its band keys; the texts stay in their files."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from loose_json import (
    CorpusError,
    Line,
    LineError,
    chunks,
    cores,
    ordered_map,
    parse,
    read_lines,
    read_pickle,
    text_of,
)
from minhash import MinHasher
from numpy.typing import NDArray

TEXT_KEY = "text"
PROGRESS_DOCUMENTS = 10_000


class Place(NamedTuple):
    """Where a document lies: file, key of its id, offset in bytes, and the hash of the id that was there."""

    path: str
    key: str
    offset: int
    id_hash: int


class Family(NamedTuple):
    """What two fingerprints must have in common to be compared."""

    num_seeds: int
    num_bands: int
    seed: int


@dataclass
class Fingerprints:
    """Of n documents; `inputs` holds (file, key of the id), which `file` [n] counts. Bands are `keys` [n, bands]."""

    family: Family
    inputs: list[tuple[str, str]]
    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    id_hash: NDArray[np.uint64]
    keys: NDArray[np.uint64]

    def place(self, number: int) -> Place:
        """Where document `number` lies."""
        path, key = self.inputs[self.file[number]]
        return Place(path, key, int(self.offset[number]), int(self.id_hash[number]))

    def distinct(self) -> Fingerprints:
        """The first document of each id."""
        _, first = np.unique(self.id_hash, return_index=True)
        first.sort()
        columns = (column[first] for column in (self.file, self.offset, self.id_hash, self.keys))
        return Fingerprints(self.family, self.inputs, *columns)


def identify(document: dict[str, Any], key: str, line: Line) -> str:
    """A document's id as text."""
    value = document.get(key)
    return str(value) if isinstance(value, int) else text_of(document, key, line)


def hash_of(identity: str) -> int:
    """64 bits that stand for an id."""
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Fingerprinter:
    """A chunk of lines -> (offsets, hashes of ids, band keys) of its documents that are long enough to have a shingle."""

    def __init__(self, family: Family, key: str) -> None:
        self.hasher = MinHasher(*family)
        self.key = key

    def __call__(self, lines: list[Line]) -> tuple[list[int], list[int], list[NDArray[np.uint64]], int]:
        offsets, hashes, keys = [], [], []
        for line in lines:
            document = parse(line)
            fingerprint = self.hasher.fingerprint(text_of(document, TEXT_KEY, line))
            identity = identify(document, self.key, line)
            if fingerprint is not None:
                offsets.append(line.offset)
                hashes.append(hash_of(identity))
                keys.append(self.hasher.band_keys(fingerprint))
        return offsets, hashes, keys, len(lines)


def compute(inputs: list[tuple[str, str]], family: Family) -> Fingerprints:
    """Fingerprints of files of loose JSON, by as many processes as there are cores."""
    files, offsets, hashes = [], [], []
    keys = [np.empty((0, family.num_bands), np.uint64)]
    for number, (path, key) in enumerate(inputs):
        print(f" document processing {path} with key {key}", flush=True)
        total = 0
        found = ordered_map(Fingerprinter, (family, key), chunks(read_lines(path)), cores())
        for more_offsets, more_hashes, more_keys, count in found:
            files.append(np.full(len(more_offsets), number, np.int32))
            offsets.append(np.array(more_offsets, np.int64))
            hashes.append(np.array(more_hashes, np.uint64))
            keys.append(np.array(more_keys, np.uint64).reshape(-1, family.num_bands))
            before, total = total, total + count
            if total // PROGRESS_DOCUMENTS > before // PROGRESS_DOCUMENTS:
                print(f" [read]> processed {total} documents ...", flush=True)
    columns = (
        np.concatenate([np.empty(0, kind), *parts])
        for kind, parts in ((np.int32, files), (np.int64, offsets), (np.uint64, hashes))
    )
    named = [(os.path.abspath(path), key) for path, key in inputs]
    return Fingerprints(family, named, *columns, np.concatenate(keys))


def join(parts: list[Fingerprints]) -> Fingerprints:
    """One after the other. All must be of one family."""
    files, inputs = [], []
    for part in parts:
        files.append(part.file + np.int32(len(inputs)))
        inputs += part.inputs
    columns = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("offset", "id_hash", "keys")
    )
    return Fingerprints(parts[0].family, inputs, np.concatenate(files), *columns)


def save(fingerprints: Fingerprints, file: BinaryIO) -> None:
    """Write a pickle of plain numbers, texts and bytes."""
    names = ("file", "offset", "id_hash", "keys")
    columns = {name: getattr(fingerprints, name).tobytes() for name in names}
    kept = {"family": tuple(fingerprints.family), "inputs": fingerprints.inputs, **columns}
    pickle.dump(kept, file, protocol=4)


def load(path: str, family: Family) -> Fingerprints:
    """Read what `save` wrote. Errors: CorpusError for another file, or fingerprints of another family."""
    kept = read_pickle(path)
    try:
        inputs = [(str(name), str(key)) for name, key in kept["inputs"]]
        columns = [
            np.frombuffer(kept[name], kind)
            for name, kind in (("file", np.int32), ("offset", np.int64), ("id_hash", np.uint64))
        ]
        found = Family(*kept["family"])
        keys = np.frombuffer(kept["keys"], np.uint64).reshape(len(columns[0]), found.num_bands)
    except (KeyError, TypeError, ValueError) as error:
        raise CorpusError(
            path, f"these are no fingerprints that --save-fingerprints wrote ({error})", "compute them anew"
        ) from error
    if found != family:
        raise CorpusError(
            path,
            f"its fingerprints have --num-seeds {found.num_seeds} --num-bands {found.num_bands} --seed {found.seed}",
            "give the same flags",
        )
    return Fingerprints(found, inputs, *columns, keys)


class Reader:
    """Documents by their place; files stay open."""

    def __init__(self) -> None:
        self._files: dict[str, BinaryIO] = {}

    def read(self, place: Place) -> tuple[str, str]:
        """(id, text). Errors: CorpusError where the file is not what it was."""
        if place.path not in self._files:
            self._files[place.path] = open(place.path, "rb")  # noqa: SIM115 (closed with the process)
        file = self._files[place.path]
        file.seek(place.offset)
        line = Line(place.path, 1 if place.offset == 0 else 0, place.offset, file.readline())
        try:
            document = parse(line)
            identity, text = identify(document, place.key, line), text_of(document, TEXT_KEY, line)
        except LineError:
            identity = text = ""
        if hash_of(identity) != place.id_hash:
            raise CorpusError(
                place.path, "it has changed since its fingerprints were made", "compute them anew"
            )
        return identity, text


def bucket_places(fingerprints: Fingerprints, members: NDArray[np.int64]) -> Iterator[Place]:
    """Where the documents of a bucket lie."""
    return (fingerprints.place(int(number)) for number in members)
