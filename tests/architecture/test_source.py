"""What every source file keeps to, so that a reader need not check it: read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CORE = REPOSITORY / "megatron" / "core"
SOURCES = sorted(
    [
        *(path for folder in ("megatron", "tools", "tasks") for path in (REPOSITORY / folder).rglob("*.py")),
        *REPOSITORY.glob("pretrain_*.py"),
    ]
)
CORE_SOURCES = [path for path in SOURCES if CORE in path.parents]

#: Where CUDA may be touched, and where the word may besides say which kind of machine something is about.
DEVICE_CODE = ("megatron/core/device.py", "megatron/core/kernels/", "megatron/core/extensions/")
ABOUT_DEVICES = (*DEVICE_CODE, "megatron/core/flags.py", "megatron/core/fusions/", "megatron/training/config/rules/",
                 "megatron/training/explain/", "tools/compile_kernels.py")  # fmt: skip
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(paths: list[Path]) -> Iterator[tuple[str, ast.AST]]:
    """Each syntax node with its place, `file:line`."""
    for path in paths:
        for node in ast.walk(tree_of(path)):
            yield f"{name_of(path)}:{getattr(node, 'lineno', 0)}", node


def functions(paths: list[Path]) -> Iterator[tuple[str, Function]]:
    for place, node in nodes(paths):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{place} {node.name}", node


def called_name(node: ast.AST) -> str:
    """`f` of a call `f(..)` or `module.f(..)`."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def is_device_kernel(node: ast.AST) -> bool:
    """Whether Triton compiles this function: its parameters are pointers and constants of another language."""
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(decorator).startswith(("triton.", "jit")) for decorator in decorators)


def explained_by_decorator(node: ast.AST) -> bool:
    """Rules say why and what to do, overloads repeat a signature, device kernels are described by what calls them."""
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    return is_device_kernel(node) or any(name.startswith(("rule(", "overload")) for name in decorators)


def test_only_device_code_touches_cuda() -> None:
    paths = [path for path in SOURCES if not name_of(path).startswith(DEVICE_CODE)]
    touching = {
        place
        for place, node in nodes(paths)
        if (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda"))
        or called_name(node) == "cuda"
        or (isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda:"))
    }
    assert not touching


def test_only_rules_and_providers_speak_of_cuda() -> None:
    paths = [path for path in SOURCES if not name_of(path).startswith(ABOUT_DEVICES)]
    assert not {
        place for place, node in nodes(paths) if isinstance(node, ast.Constant) and node.value == "cuda"
    }


def test_the_library_has_no_command_line_and_no_environment() -> None:
    """Layer 0 (device.py, jit.py) and what finds packages and rendezvous read the environment for the others."""
    readers = ("megatron/core/device.py", "megatron/core/jit.py", "megatron/core/kernels/")
    # Old checkpoints hold the argparse.Namespace of their run.
    namespaces = ("megatron/core/dist_checkpointing/safe_load.py",)
    found = set()
    for place, node in nodes(CORE_SOURCES):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        environment = isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
        if (
            ("argparse" in imported and not place.startswith(namespaces))
            or called_name(node) == "get_args"
            or (environment and not place.startswith(readers))
        ):
            found.add(place)
    assert not found


def test_few_places_ask_for_the_arguments() -> None:
    """`get_args()` is for entry scripts; functions of the shell get a context or plain values, or have v0.9's signature."""
    calls = [place for place, node in nodes(SOURCES) if called_name(node) == "get_args"]
    shell = [place for place in calls if place.startswith("megatron/training/")]
    assert len(shell) <= 3, shell
    assert len(calls) <= 24


def test_the_library_never_ends_the_process() -> None:
    assert not {p for p, node in nodes(CORE_SOURCES) if called_name(node) in ("exit", "_exit", "quit")}


def test_asserts_say_what_is_wrong() -> None:
    assert not {p for p, node in nodes(SOURCES) if isinstance(node, ast.Assert) and node.msg is None}


def test_no_handler_catches_everything() -> None:
    broad = set()
    for place, node in nodes(SOURCES):
        if isinstance(node, ast.ExceptHandler):
            kinds = ast.unparse(node.type) if node.type else "everything"
            reraises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if kinds in ("everything", "Exception", "BaseException") and not reraises:
                broad.add(place)
    assert not broad


@pytest.mark.parametrize("folder", ["megatron/core", "megatron/training", "tools"])
def test_files_open_with_their_purpose(folder: str) -> None:
    silent = {
        name_of(path)
        for path in SOURCES
        if name_of(path).startswith(folder) and path.stat().st_size and not ast.get_docstring(tree_of(path))
    }
    assert not silent


def test_every_function_of_the_library_is_annotated() -> None:
    bare = set()
    for place, function in functions(CORE_SOURCES):
        arguments = function.args
        every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
        every += [arg for arg in (arguments.vararg, arguments.kwarg) if arg is not None]
        missing = [arg.arg for arg in every if arg.annotation is None and arg.arg not in ("self", "cls")]
        if (missing or function.returns is None) and not is_device_kernel(function):
            bare.add(f"{place}: {', '.join(missing) or 'return'}")
    assert not bare


def test_every_public_forward_says_its_shapes() -> None:
    """A docstring with shapes in brackets, such as [s, b, h], on each `forward` of a public class.

    What passes its arguments on says that instead.
    """
    transparent = ("any shape", "wrapped m", "passed on", "Any arguments")
    silent = set()
    for path in CORE_SOURCES:
        for owner in ast.walk(tree_of(path)):
            if not isinstance(owner, ast.ClassDef) or owner.name.startswith("_"):
                continue
            for function in owner.body:
                if isinstance(function, ast.FunctionDef) and function.name == "forward":
                    text = (ast.get_docstring(function) or "") + (ast.get_docstring(owner) or "")
                    if "[" not in text and not any(phrase in text for phrase in transparent):
                        silent.add(f"{name_of(path)}:{function.lineno} {owner.name}")
    assert not silent


def test_public_names_are_explained() -> None:
    silent = set()
    for path in CORE_SOURCES:
        for node in tree_of(path).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and not explained_by_decorator(node) and ast.get_docstring(node) is None:
                silent.add(f"{name_of(path)}:{node.lineno} {node.name}")
    assert not silent
