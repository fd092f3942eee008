"""One chunk of input to its documents: each a list of texts per key, or the reason why it is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.training.preprocessing.inputs import BYTE_ORDER_MARK, Chunk

Texts = str | list[str]


class BadDocument(ValueError):
    """A line that holds no usable document; the message says why."""


@dataclass(frozen=True)
class Line:
    """One document: its length in the input, in characters, and what was read or why nothing was."""

    characters: int
    texts: list[Texts] | BadDocument


def read_documents(chunk: Chunk, keys: list[str]) -> Iterator[Line]:
    """The documents of a chunk in order, blank lines and malformed ones included as BadDocument."""
    if chunk.batch is not None:
        columns = [_cells(chunk.batch.column(key)) for key in keys]
        for row in zip(*columns):
            try:
                texts = [_checked(value, key) for value, key in zip(row, keys)]
                yield Line(sum(map(len, texts)), texts)
            except BadDocument as reason:
                yield Line(0, reason)
        return
    decode = json.JSONDecoder().decode
    for line in _lines(chunk):
        try:
            yield Line(len(line) + 1, _document(decode, line, keys))
        except BadDocument as reason:
            yield Line(len(line) + 1, reason)


def _cells(column: Any) -> list[object]:
    """The values of a column of a table; those that are not UTF-8 stay bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_cell(value) for value in column]


def _cell(value: Any) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error.object


def _lines(chunk: Chunk) -> Iterator[str | bytes]:
    """The lines of a chunk without their ends; one that is not UTF-8 stays bytes.

    Lines end as in a text file: at a newline, a carriage return, or both.
    """
    data = chunk.read()
    if chunk.offset == 0:
        data = data.removeprefix(BYTE_ORDER_MARK)
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if not data:
        return
    data = data.removesuffix(b"\n")
    try:
        yield from data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        for line in data.split(b"\n"):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError:
                yield line


def _document(decode: object, line: str | bytes, keys: list[str]) -> list[Texts]:
    if isinstance(line, bytes):
        raise BadDocument("the line is not UTF-8; convert the file, for instance with iconv")
    if not line or line.isspace():
        raise BadDocument("the line is empty")
    try:
        document = decode(line)  # type: ignore[operator]
    except json.JSONDecodeError as error:
        raise BadDocument(f"the line is not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise BadDocument("the line is nested too deeply") from error
    if not isinstance(document, dict):
        raise BadDocument(
            f"the line holds a {type(document).__name__}, not an object with the keys {' '.join(keys)}"
        )
    for key in keys:
        if key not in document:
            present = " ".join(document) or "none"
            raise BadDocument(f"the document has no key {key!r} (it has: {present[:200]}); see --json-keys")
    return [_checked(document[key], key) for key in keys]


def _checked(value: object, key: str) -> Texts:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise BadDocument(f"{key!r} holds {type(value).__name__}, not a text or a list of texts")
