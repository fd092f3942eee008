"""Trees of state compared and grouped, and what the metadata of a checkpoint says of tensors in flat pieces."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch

from megatron.core.dist_checkpointing import ShardedTensor, load_plain_tensors, load_tensors_metadata, save
from megatron.core.dist_checkpointing.dict_utils import diff, map_reduce
from tests.unit.checkpointing.toy import one_process


def test_trees_are_compared_by_content() -> None:
    """Kinds of dicts, parameters and tensors, and numbers of equal value do not differ; paths name what does."""
    module = torch.nn.Linear(2, 1)
    plain = {name: value.detach().clone() for name, value in module.named_parameters()}
    assert diff(module.state_dict(), plain) == ([], [], [])
    assert diff(dict(module.named_parameters()), plain) == ([], [], [])
    assert diff({"a": 1, "b": [1, 2]}, OrderedDict(a=1.0, b=[1, 2])) == ([], [], [])
    left, right, unequal = diff({"a": [1, {"x": 2}], "b": 0}, {"a": [1, {"x": 3, "y": 4}], "c": 0})
    assert left == [("b",)] and right == [("c",), ("a", 1, "y")]
    assert unequal == [(("a", 1, "x"), int, int)]
    assert diff({"a": torch.zeros(2)}, {"a": torch.zeros(3)})[2] == [(("a",), torch.Tensor, torch.Tensor)]
    assert diff({"a": {}}, {"a": []})[2] == [(("a",), dict, list)]


def test_groups_need_no_order_of_their_keys() -> None:
    pairs = [("b", 1), (None, 2), ("b", 3), ((0, 1), 4)]
    assert map_reduce(pairs, lambda pair: pair[0], lambda pair: pair[1], sum) == {"b": 4, None: 2, (0, 1): 4}


def test_flat_pieces_are_read_whole_and_flat(tmp_path: Path) -> None:
    """A tensor of several axes in flat pieces is flat as a whole, in the order of its elements; others keep their shape."""
    whole = torch.arange(24.0).view(2, 4, 3)
    cells = [whole[:, :2], whole[:, 2:]]
    records = {"plain": ShardedTensor.from_rank_offsets("plain", whole)}
    for number, cell in enumerate(cells):
        for piece in (slice(0, 5), slice(5, 12)):
            records[f"{number} {piece}"] = ShardedTensor.from_rank_offsets_flat(
                "flat", cell.flatten()[piece], cell.shape, (1, number, 2), flattened_range=piece
            )
    with one_process():
        save(records, str(tmp_path))
        described = load_tensors_metadata(str(tmp_path))
        loaded = load_plain_tensors(str(tmp_path))
    assert described["flat"].flattened_range == slice(0, 24) and described["plain"].flattened_range is None
    assert described["flat"].local_shape == described["flat"].global_shape == (2, 4, 3)
    assert torch.equal(loaded["flat"], torch.arange(24.0)) and torch.equal(loaded["plain"], whole)


def test_tensors_without_elements_are_stored(tmp_path: Path) -> None:
    """So that they are known by their key; an empty piece of a tensor that has elements is not."""
    empty = ShardedTensor.from_rank_offsets("empty", torch.empty(0, 3, dtype=torch.int16))
    with one_process():
        save({"empty": empty}, str(tmp_path))
        (loaded,) = load_plain_tensors(str(tmp_path)).values()
    assert loaded.shape == (0, 3) and loaded.dtype == torch.int16
