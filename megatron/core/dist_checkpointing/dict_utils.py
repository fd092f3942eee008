"""Walk, split and merge the nested dicts and lists that state dicts are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch

Tree = dict | list


def extract_matching_values(
    x: Tree, predicate: Callable[[Any], bool], return_lists_as_dicts: bool = False
) -> tuple[Tree, Tree]:
    """Split the leaves of `x` by `predicate` into two trees: (matching, the rest).

    Empty containers go to the second tree, so that merging the two restores `x`. With `return_lists_as_dicts`
    a list becomes a dict from position to value, which keeps positions meaningful after the split.
    """
    if isinstance(x, list):
        if return_lists_as_dicts:
            return _split_items(enumerate(x), predicate, return_lists_as_dicts)
        matching, rest = _split_items(enumerate(x), predicate, return_lists_as_dicts)
        return list(matching.values()), list(rest.values())
    if isinstance(x, dict):
        return _split_items(x.items(), predicate, return_lists_as_dicts)
    raise ValueError(f"a state dict is made of dicts and lists, not {type(x).__name__}")


def _split_items(
    items: Iterable[tuple[Any, Any]], predicate: Callable[[Any], bool], return_lists_as_dicts: bool
) -> tuple[dict, dict]:
    matching: dict = {}
    rest: dict = {}
    for key, value in items:
        if isinstance(value, (list, dict)):
            inner_matching, inner_rest = extract_matching_values(value, predicate, return_lists_as_dicts)
            if inner_matching:
                matching[key] = inner_matching
            if inner_rest or not value:
                rest[key] = inner_rest
        elif predicate(value):
            matching[key] = value
        else:
            rest[key] = value
    return matching, rest


def nested_values(x: Tree) -> Iterator[Any]:
    """Every leaf of `x`, depth first."""
    for value in x.values() if isinstance(x, dict) else x:
        if isinstance(value, (dict, list)):
            yield from nested_values(value)
        else:
            yield value


def nested_items_iter(x: Tree) -> Iterator[tuple[Tree, Any, Any]]:
    """(container, key or position, leaf) of every leaf of `x`; the container may be written to."""
    for key, value in x.items() if isinstance(x, dict) else enumerate(x):
        if isinstance(value, (dict, list)):
            yield from nested_items_iter(value)
        else:
            yield x, key, value


def dict_map(f: Callable[[Any], Any], d: dict) -> None:
    """Replace each value of `d` (one level) by f(value)."""
    for key, value in d.items():
        d[key] = f(value)


def dict_map_with_key(f: Callable[[Any, Any], Any], d: dict) -> None:
    """Replace each value of `d` (one level) by f(key, value)."""
    for key, value in d.items():
        d[key] = f(key, value)


def dict_list_map_inplace(f: Callable[[Any], Any], x: Any) -> Any:
    """Replace every leaf of `x` by f(leaf), writing into the containers of `x`; returns the result."""
    if isinstance(x, dict):
        for key, value in x.items():
            x[key] = dict_list_map_inplace(f, value)
        return x
    if isinstance(x, list):
        x[:] = [dict_list_map_inplace(f, value) for value in x]
        return x
    return f(x)


def dict_list_map_outplace(f: Callable[[Any], Any], x: Any) -> Any:
    """A new tree with every leaf of `x` replaced by f(leaf)."""
    if isinstance(x, dict):
        return {key: dict_list_map_outplace(f, value) for key, value in x.items()}
    if isinstance(x, list):
        return [dict_list_map_outplace(f, value) for value in x]
    return f(x)


def merge(x1: Any, x2: Any, key: tuple[Hashable, ...] = ()) -> Any:
    """Merge `x2` into `x1` (in place) and return it; two different leaves in one place are a ValueError.

    A list may be merged with a dict from position to value, the form in which split lists are stored.
    """
    if isinstance(x1, dict) and isinstance(x2, dict):
        for name, value in x2.items():
            x1[name] = merge(x1[name], value, (*key, name)) if name in x1 else value
        return x1
    if isinstance(x1, list) and isinstance(x2, list):
        if len(x1) != len(x2):
            raise ValueError(f"cannot merge lists of {len(x1)} and {len(x2)} values at {key}")
        x1[:] = [merge(a, b, (*key, i)) for i, (a, b) in enumerate(zip(x1, x2))]
        return x1
    raise ValueError(f"two values for one place: {type(x1).__name__} and {type(x2).__name__} at {key}")


def map_reduce(
    xs: Iterable[Any],
    key_fn: Callable[[Any], Hashable] = lambda x: x,
    value_fn: Callable[[Any], Any] = lambda x: x,
    reduce_fn: Callable[[list], Any] = lambda x: x,
) -> dict:
    """Group `xs` by key_fn, collect value_fn of each, reduce every group; keys come in the order of their first members."""
    groups: dict[Any, list] = defaultdict(list)
    for x in xs:
        groups[key_fn(x)].append(value_fn(x))
    return {key: reduce_fn(group) for key, group in groups.items()}


def diff(x1: Any, x2: Any, prefix: tuple = ()) -> tuple[list, list, list]:
    """Compare two trees: (paths only in x1, paths only in x2, (path, type1, type2) of unequal leaves).

    Trees are compared by their content: an OrderedDict may equal a dict, a parameter a tensor. Tensors are equal when all
    their values are, wherever they are; leaves that carry a `data` tensor compare that.
    """
    only_left: list = []
    only_right: list = []
    mismatch: list = []
    if any(isinstance(x1, kind) and isinstance(x2, kind) for kind in (dict, list)):
        left = dict(x1.items() if isinstance(x1, dict) else enumerate(x1))
        right = dict(x2.items() if isinstance(x2, dict) else enumerate(x2))
        only_left = [(*prefix, key) for key in left if key not in right]
        only_right = [(*prefix, key) for key in right if key not in left]
        for key in left.keys() & right.keys():
            for total, part in zip(
                (only_left, only_right, mismatch), diff(left[key], right[key], (*prefix, key))
            ):
                total.extend(part)
    elif not _leaves_equal(x1, x2):
        mismatch.append((prefix, type(x1), type(x2)))
    return only_left, only_right, mismatch


def _leaves_equal(x1: Any, x2: Any) -> bool:
    if isinstance(x1, torch.Tensor) and isinstance(x2, torch.Tensor):
        return x1.shape == x2.shape and bool(torch.all(x1.cpu() == x2.cpu()))
    if type(x1) is type(x2) and isinstance(getattr(x1, "data", None), torch.Tensor):
        return _leaves_equal(x1.data, x2.data)
    return bool(x1 == x2)


def inspect_types(x: Any, prefix: tuple = (), indent: int = 4) -> None:
    """Print the shape of a tree: keys, types, tensor shapes."""
    print_indent = " " * (indent * len(prefix))
    if isinstance(x, (dict, list)):
        print(f"{print_indent}{type(x).__name__} of {len(x)}")
        for key, value in x.items() if isinstance(x, dict) else enumerate(x):
            print(f"{print_indent}> {key}:")
            inspect_types(value, (*prefix, key), indent)
    else:
        shape = f" {tuple(x.shape)}" if isinstance(x, torch.Tensor) else ""
        print(f"{print_indent}{type(x).__name__}{shape}")
