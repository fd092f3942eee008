"""Imports point down: the contracts of `.importlinter` hold, no module escapes them, and there is no cycle."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = ("megatron.core", "megatron.training", "megatron.inference", "megatron.legacy", "tasks")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*ROOTS, exclude_type_checking_imports=True, cache_dir=None)


def layers() -> list[list[str]]:
    """The modules of each layer, highest first."""
    contract = configparser.ConfigParser()
    contract.read(REPOSITORY / ".importlinter", encoding="utf-8")
    lines = contract["importlinter:contract:layers"]["layers"].split("\n")
    return [[name.strip(" ()") for name in line.split(":")] for line in lines if line.strip()]


def test_contracts_hold() -> None:
    run = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    ]
    done = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_has_one_layer(graph: grimp.ImportGraph) -> None:
    """Packages that span layers hold only re-exports themselves; every other module is in exactly one layer."""
    listed = [name for layer in layers() for name in layer]
    assert len(set(listed)) == len(listed)
    spanning = {name.rpartition(".")[0] for name in listed} | {
        "megatron.core.models.common",
        "megatron.core.models",
    }
    for module in graph.modules - spanning:
        owners = [name for name in listed if module == name or module.startswith(name + ".")]
        assert len(owners) == 1, f"{module} is in the layers of {owners}: name it in .importlinter"


def test_no_module_imports_itself_in_a_circle(graph: grimp.ImportGraph) -> None:
    """Depth first; packages' re-exports are imports too."""
    done: set[str] = set()
    for start in sorted(graph.modules):
        path: list[str] = []
        todo = [(start, 0)]
        while todo:
            module, depth = todo.pop()
            del path[depth:]
            assert module not in path, " -> ".join([*path[path.index(module) :], module])
            if module in done:
                continue
            path.append(module)
            below = graph.find_modules_directly_imported_by(module)
            todo += [(name, depth + 1) for name in sorted(below - done)]
            if not below - done:
                done.add(module)
        done.add(start)
