"""A corpus of English prose that every machine has: the docstrings of Python's standard library, as JSON lines."""

from __future__ import annotations

import ast
import inspect
import json
import random
import sys
import sysconfig
import warnings
from pathlib import Path

#: Not the library itself, or tables of characters rather than text.
LEFT_OUT = {"site-packages", "test", "idlelib", "lib2to3", "encodings"}
#: Shorter docstrings are labels, not text.
SHORTEST = 200


def main(output: Path, limit_megabytes: float) -> None:
    """Write `{"text": docstring}` per module, class and function that has a long one, until the limit."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(library.rglob("*.py"))
    random.Random(0).shuffle(paths)  # neighbours resemble each other; training and validation should too
    written = documents = 0
    with output.open("w", encoding="utf-8") as file:
        for path in paths:
            relative = path.relative_to(library)
            if relative.parts[0] in LEFT_OUT or "tests" in relative.parts:
                continue
            for text in docstrings(path):
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text)
                documents += 1
            if written > limit_megabytes * 2**20:
                break
    print(f"{documents} documents, {written / 2**20:.1f} MiB of text from {library} -> {output}")


def docstrings(path: Path) -> list[str]:
    """The long docstrings of a source file, without their indentation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in other people's strings
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [inspect.cleandoc(text) for text in found if text is not None and len(text) >= SHORTEST]


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0)
