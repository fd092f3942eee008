"""The saver's side of a conversion: messages taken in order, and the vocabulary made to fit."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from megatron.core.errors import CheckpointError, FlagError

_TABLES = {"embeddings": "word embeddings", "output layer": "weight", "lm head": "bias"}


def receive_any(queue: Any) -> Any:
    """The next message. CheckpointError if the loader failed."""
    message = queue.get()
    if isinstance(message, str) and message == "exit":
        raise CheckpointError("conversion", "the loader stopped")
    return message


def receive_metadata(queue: Any) -> Namespace:
    """The namespace with which every conversion begins."""
    return receive_any(queue)


def receive(queue: Any, name: str, checking: bool) -> dict[str, Any]:
    """The message of that name, without its name."""
    message = receive_any(queue)
    found = message.pop("name") if isinstance(message, dict) else message
    if found != name and checking:
        raise CheckpointError("conversion", f"expected the message {name!r}, the loader sent {found!r}")
    return message


def receive_end(queue: Any, save_dir: str) -> None:
    """The end of the model. CheckpointError if there is more."""
    if receive_any(queue) != "done":
        raise CheckpointError(
            save_dir, "the loader sent more than the model has", "pass --no-checking to ignore it"
        )


def leftover(message: dict[str, Any], checking: bool) -> None:
    """CheckpointError if the message holds what nobody took."""
    if message and checking:
        why = f"the loader sent {', '.join(message)}, which this model has no place for"
        raise CheckpointError("conversion", why, "pass --no-checking to leave it out")


def pad_vocabulary(message: dict[str, Any], name: str, md: Namespace, tp: int) -> int:
    """Make the vocabulary's table of a message as long as `tp` ranks need; returns its length, 0 if there is none.

    Rows beyond are cut; missing ones repeat the last.
    """
    key = _TABLES.get(name)
    if key is None or key not in message:
        return 0
    table = message[key]
    if md.true_vocab_size is None:
        if table.shape[0] % tp:
            why = f"{table.shape[0]} rows cannot be cut into {tp} parts"
            raise FlagError(
                "--target-tensor-parallel-size", why, "add --true-vocab-size so that the table is padded anew"
            )
        return table.shape[0]
    multiple = (md.make_vocab_size_divisible_by or 128) * tp
    size = -(-md.true_vocab_size // multiple) * multiple
    if size > table.shape[0]:
        filling = table[-1:].expand(size - table.shape[0], *table.shape[1:])
        message[key] = torch.cat([table, filling])
    else:
        message[key] = table[:size]
    return size
