"""Descriptions of modules as data: which class, which fixed arguments, which parts."""

import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModuleSpec:
    """One module to build.

    `module` is a class or function, or ("package.module", "Name") to import late; `params` are fixed keyword
    arguments of its constructor; `submodules` is the record that names its parts.
    """

    module: tuple[str, str] | type | Callable
    params: dict[str, Any] = field(default_factory=dict)
    submodules: Any = None


def import_module(module_path: tuple[str, ...] | list[str]) -> Any:
    """The object `module_path[1]` of module `module_path[0]`; ValueError if either does not exist."""
    if len(module_path) != 2:
        raise ValueError(f"layer specification {' '.join(module_path)}: a module and a name in it make one")
    base_path, name = module_path
    try:
        return getattr(importlib.import_module(base_path), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"layer specification {base_path} {name}: {error}. Name an importable module and an object in it."
        ) from error


def get_module(spec_or_module: Any, **additional_kwargs: Any) -> Any:
    """The class or function behind a spec, or behind a bare class, function or (module, name) pair."""
    module = spec_or_module.module if isinstance(spec_or_module, ModuleSpec) else spec_or_module
    if isinstance(module, (type, types.FunctionType)):
        return module
    return import_module(module)  # type: ignore[arg-type]


def build_module(spec_or_module: Any, *args: Any, pg_collection: Any = None, **kwargs: Any) -> Any:
    """Instantiate a spec or class with these arguments; functions are returned as they are.

    The spec's own `params` win over `kwargs`, and its `submodules` are passed on if there are any. An
    explicit `pg_collection` is handed to the constructor; None (the current groups) is left out, so that a
    user's module needs to know nothing of it.
    """
    module = get_module(spec_or_module)
    if isinstance(module, types.FunctionType):
        return module
    if isinstance(spec_or_module, ModuleSpec):
        kwargs = {**kwargs, **spec_or_module.params}
        if spec_or_module.submodules is not None:
            kwargs["submodules"] = spec_or_module.submodules
    if pg_collection is not None:
        kwargs["pg_collection"] = pg_collection
    try:
        return module(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{error} when instantiating {module.__name__}") from error
