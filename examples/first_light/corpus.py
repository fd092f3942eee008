"""A text corpus that every machine has: Python's own standard library, sources and documentation, as JSON lines."""

from __future__ import annotations

import json
import random
import sys
import sysconfig
from pathlib import Path

#: Not the library itself, or tables of characters rather than text.
LEFT_OUT = {"site-packages", "test", "idlelib", "lib2to3", "encodings"}


def main(output: Path, limit_megabytes: float) -> None:
    """Write `{"text": source}` per module until the limit."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(library.rglob("*.py"))
    random.Random(0).shuffle(paths)  # neighbours resemble each other; training and validation should too
    written = documents = 0
    with output.open("w", encoding="utf-8") as file:
        for path in paths:
            relative = path.relative_to(library)
            if relative.parts[0] in LEFT_OUT or "tests" in relative.parts:
                continue
            text = path.read_text(encoding="utf-8", errors="ignore")
            if written + len(text) > limit_megabytes * 2**20:
                break
            if text.strip():
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text)
                documents += 1
    print(f"{documents} documents, {written / 2**20:.1f} MiB of text from {library} -> {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 8.0)
