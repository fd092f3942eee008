"""A text corpus that every machine has: the sources of Python's own standard library, as JSON lines."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path


def main(output: Path, limit_megabytes: float) -> None:
    """Write `{"text": source}` per module, in path order, until the limit."""
    library = Path(sysconfig.get_paths()["stdlib"])
    written = documents = 0
    with output.open("w", encoding="utf-8") as file:
        for path in sorted(library.rglob("*.py")):
            relative = path.relative_to(library)
            if (
                relative.parts[0] in ("site-packages", "test", "idlelib", "lib2to3")
                or "tests" in relative.parts
            ):
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
