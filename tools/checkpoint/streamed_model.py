"""Run a model whose weights stay in files: a layer is filled when it is called and emptied when it returns.

Works for any module, ours and transformers' alike: the layers are the members of its module lists; everything else
(embeddings, heads) is filled when first used and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

Lookup = Callable[[str], torch.Tensor]


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside have parameters without data (buffers, such as rotary tables, are real)."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        own = module._parameters[name]
        if own is not None and own.device.type != "meta":
            empty = nn.Parameter(own.detach().to("meta"), requires_grad=False)
            # Parallel layers note on a parameter how it is cut.
            empty.__dict__.update(own.__dict__)
            module._parameters[name] = empty

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _InDouble(TorchDispatchMode):
    """Whatever asks for fp32 gets float64, steps that models always take in fp32 (norms, softmax) too."""

    reading = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if not _InDouble.reading and options.get("dtype") is torch.float32:
            options = {**options, "dtype": torch.float64}
        return func(*args, **options)


@contextmanager
def double_precision() -> Iterator[None]:
    """Models made and run inside compute in float64; weights are read as they are stored."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InDouble():
            yield
    finally:
        torch.set_default_dtype(usual)


def stream(model: nn.Module, lookup: Lookup) -> nn.Module:
    """Make `model` (built `without_weights`) take each weight from `lookup(name)`, in fp32, when it is needed.

    In float64 inside `double_precision`.
    """
    layers = {
        f"{name}.{index}": layer
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index, layer in enumerate(module)
    }
    # Experts are lists inside layers: the outermost list counts.
    outer = {
        name: layer
        for name, layer in layers.items()
        if not any(name.startswith(f"{other}.") for other in layers)
    }
    for name, layer in outer.items():
        layer.register_forward_pre_hook(_Filler(name, lookup), with_kwargs=True)
        layer.register_forward_hook(_empty)
    filled: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        if any(name == layer or name.startswith(f"{layer}.") for layer in outer):
            continue
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                # Tied weights are one parameter under several names, and stay one.
                if id(parameter) not in filled:
                    filled[id(parameter)] = _filled(f"{name}.{leaf}" if name else leaf, lookup, parameter)
                module._parameters[leaf] = filled[id(parameter)]
    return model.eval()


class _Filler:
    """Fills a layer before it runs."""

    def __init__(self, name: str, lookup: Lookup) -> None:
        self._name, self._lookup = name, lookup

    def __call__(self, layer: nn.Module, args: object, kwargs: object) -> None:
        for name, module in layer.named_modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is not None:
                    path = ".".join(part for part in (self._name, name, leaf) if part)
                    module._parameters[leaf] = _filled(path, self._lookup, parameter)


def _empty(layer: nn.Module, args: object, output: object) -> None:
    for module in layer.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _filled(name: str, lookup: Lookup, parameter: nn.Parameter) -> nn.Parameter:
    _InDouble.reading = True
    try:
        value = lookup(name)
    finally:
        _InDouble.reading = False
    value = value.to(torch.get_default_dtype())
    full = nn.Parameter(value.reshape(parameter.shape), requires_grad=False)
    full.__dict__.update(parameter.__dict__)
    return full
