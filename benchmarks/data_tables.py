"""Put the tables of benchmarks/results/{preprocess,datasets}.json into docs/data.md, between its two markers.

python benchmarks/data_tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "data.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def made_with(record: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {number}" for name, number in record["packages"].items())
    return [
        f"`{record['command']}`,",
        f"{record['cores']} cores ({record['processor']}), Python {record['python']}, {packages}.",
    ]


def preprocess_table(record: dict[str, Any]) -> list[str]:
    lines = [
        "| tokenizer | workers | MiB/s | x v0.9 | MiB/s of processor time | alone, MiB/s of processor time "
        "| largest process, MiB | load average |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["runs"]:
        rates = record["encoders alone, MiB/s of processor time"][row["tokenizer"]]
        alone = ", ".join(f"{encoder} {number}" for encoder, number in rates.items())
        lines.append(
            f"| {row['tokenizer']} | {row['workers']} | {row['MiB/s']} | {row['times v0.9']} "
            f"| {row['MiB/s of processor time']} | {alone} | {row['largest process MiB']} | {row['load average']} |"
        )
    return [
        f"{record['text MiB']} MiB of text, whole process with start-up, fastest of {record['repeats']} runs; beside it",
        "encoders alone (one thread, no files, no start-up), which are timed in the same run.",
        *made_with(record),
        "",
        *lines,
    ]


def dataset_table(record: dict[str, Any]) -> list[str]:
    lines = ["| | result | load average |", "|---|---|---|"]
    for row in record["results"]:
        numbers = {name: value for name, value in row.items() if name not in ("what", "load average")}
        result = ", ".join(
            f"{name.replace('_', ' ')} {value if isinstance(value, str) else f'{value:,}'}"
            for name, value in numbers.items()
        )
        lines.append(f"| {row['what']} | {result} | {row['load average']} |")
    return [*made_with(record), "", *lines]


def main() -> None:
    preprocess, datasets = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("preprocess", "datasets")
    )
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    measured = "\n".join([BEGIN, "", *preprocess_table(preprocess), "", *dataset_table(datasets), "", END])
    PAGE.write_text(head + measured + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
