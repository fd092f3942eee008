"""What all scripts promise: standing alone, bad input in one line, whole files or none, bounded memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.openwebtext.support import RECORDED, SCRIPTS, Call, documents, process, write
from tools.openwebtext import add_id, cleanup_dataset, cleanup_fix_dataset, find_duplicates, merge_jsons

loose_json = sys.modules["loose_json"]


def test_scripts_stand_alone(tmp_path: Path) -> None:
    """A copy of the folder answers --help without this repository, and importing all of it loads no torch."""
    copy = shutil.copytree(SCRIPTS, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    names = sorted(path.stem for path in copy.glob("*.py"))
    assert len(names) == 16
    code = (
        "import importlib, sys; "
        f"[importlib.import_module(name) for name in {names}]; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'megatron', 'tools', 'ftfy', 'tokenizers'}))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON: Unterminated string"),
        (b'["a"]', "a JSON object is wanted, not list"),
        (b'{"url": "x", "text": "\xff"}', "not UTF-8 at byte 23 of the line"),
        (b"[" * 100_000, "not JSON: maximum recursion depth"),
        (b'{"text": 3, "url": "x"}', "its 'text' is no text"),
        (b'{"url": "x"}', "it has no 'text'"),
    ],
)
def test_bad_lines_are_named(call: Call, tmp_path: Path, line: bytes, reason: str) -> None:
    """By file and line, and an older output stays as it was."""
    data, output = tmp_path / "data", tmp_path / "out"
    data.write_bytes(b'\n{"text": "fine and long", "url": "a"}\r\n' + line + b"\n")
    output.write_text("older")
    words = ("--inputs", data, "url", "--output", output)
    with pytest.raises(loose_json.CorpusError) as stopped:
        call(find_duplicates, *words)
    assert str(stopped.value).startswith(f"{data}:3: {reason}")
    if b"url" not in line:
        flags = ("--input-file", data, "--output-file", output, "--id-prefix", "x")
        with pytest.raises(loose_json.CorpusError, match="data:3: "):
            call(add_id, *flags)
    assert output.read_text() == "older" and sorted(os.listdir(tmp_path)) == ["data", "out"]


def test_errors_are_one_line(tmp_path: Path) -> None:
    """From a worker process, about a flag, about a missing file and a missing package."""
    write(tmp_path / "data", [{"text": "x" * 20, "url": "a"}] * 200 + [7])
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "ftfy.py").write_text("raise ImportError('not here')")
    duplicates = ("find_duplicates.py", "--output", tmp_path / "out", "--inputs")
    cases = [
        (1, f"{tmp_path}/data:201: a JSON object is wanted", (*duplicates, tmp_path / "data", "url")),
        (2, "--inputs: a file is without its key", (*duplicates, tmp_path / "data")),
        (1, f"{tmp_path}/none: it cannot be used: No such file", (*duplicates, tmp_path / "none", "url")),
        (1, "ftfy: repairing texts needs it", ("cleanup_dataset.py", tmp_path / "data", tmp_path / "out")),
    ]
    for status, reason, words in cases:
        done = process(*words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(missing)})
        assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
        assert done.stderr.startswith(f"error: {reason}")
    assert "pip install '.[clean]'" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["data", "missing"]


def test_unusual_texts_survive(call: Call, tmp_path: Path) -> None:
    """Characters outside of ASCII stay, half a surrogate pair can only stay escaped, line separators are no line ends."""
    texts = ["é 漢字 \u2028 \x85", "half \ud800", "\ufeffmark"]
    data = write(tmp_path / "data", [{"text": text} for text in texts])
    data.write_bytes(b"\xef\xbb\xbf" + data.read_bytes())
    call(add_id, "--input-file", data, "--output-file", data, "--id-prefix", "x")  # into itself
    lines = data.read_bytes().decode("utf-8").split("\n")
    assert [json.loads(line)["text"] for line in lines if line] == texts
    assert "é 漢字 \u2028" in lines[0] and "\\ud800" in lines[1]


def test_texts_without_letters(call: Call, tmp_path: Path) -> None:
    """Have no language: the first cleaning leaves them out, the second filters them. Lines that are no JSON fare alike."""
    data = write(tmp_path / "data", [{"text": "12345"}])
    data.write_bytes(data.read_bytes() + b"{cut\n")
    lines = call(cleanup_dataset, data, tmp_path / "out")
    assert lines[0].startswith(f"    skipping {data}:1: its language is not to be told")
    assert lines[1].startswith(f"    skipping {data}:2: not JSON")
    assert (
        "documents: 2 | fixed text: 0 | non-english: 0" in lines[2] and (tmp_path / "out").read_bytes() == b""
    )
    words = ("--input-files", data, "--output-path", tmp_path, "--tasks", "remove_512_non_english")
    assert call(cleanup_fix_dataset, *words)[-1].startswith("  >> total docs: 2 remove_512 0")
    assert (tmp_path / "data_filtered").read_bytes() == data.read_bytes()
    assert (tmp_path / "data_cleaned").read_bytes() == b""


def test_merging(call: Call, tmp_path: Path) -> None:
    """In the order of names, without the file of an earlier run; a last line may lack its end."""
    write(tmp_path / "b.json", [{"n": 3}])
    (tmp_path / "a.json").write_text('{"n": 1}\r\n\n{"n":  2}')
    output = tmp_path / "merged_output.json"
    for _ in range(2):
        call(merge_jsons, "--json_path", tmp_path, "--output_file", output)
        assert output.read_text() == '{"n": 1}\n{"n":  2}\n{"n": 3}\n'


def test_fingerprints_are_checked(call: Call, tmp_path: Path) -> None:
    """Of other flags, of texts that changed, and pickles that would run code."""
    data = write(tmp_path / "data", [{"url": str(n), "text": "the same text " * 5} for n in range(3)])
    words = ("--load-fingerprints", tmp_path / "kept", "--output", tmp_path / "out")
    call(find_duplicates, "--inputs", data, "url", "--save-fingerprints", tmp_path / "kept")
    with pytest.raises(loose_json.CorpusError, match="have --num-seeds 100 --num-bands 10 --seed 1234"):
        call(find_duplicates, *words, "--seed", "1")
    write(data, [{"url": str(n), "text": "the same text " * 4} for n in range(3)])
    with pytest.raises(loose_json.CorpusError, match="it has changed since its fingerprints were made"):
        call(find_duplicates, *words)
    for harmful in (print, {"family": 1}):
        (tmp_path / "kept").write_bytes(pickle.dumps(harmful))
        with pytest.raises(loose_json.CorpusError, match="kept: "):
            call(find_duplicates, *words)


class Doubler:
    """A worker."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, number: int) -> int:
        return self.factor * number


@pytest.mark.parametrize("processes", [1, 2])
def test_items_are_read_as_results_are_taken(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loose_json, "cores", lambda: 2)
    read = 0

    def numbers() -> Iterator[int]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield number

    results = loose_json.ordered_map(Doubler, (2,), numbers(), processes)
    taken = [next(results) for _ in range(10)]
    assert read <= 10 + processes * loose_json.CHUNKS_PER_WORKER
    assert taken + list(results) == [2 * number for number in range(1000)]


def test_workers_give_the_same(tmp_path: Path) -> None:
    lines = {}
    for workers in ("1", "2"):
        done = process(
            "cleanup_dataset.py", RECORDED / "cleanup_in.jsonl", tmp_path / workers, "--workers", workers
        )
        lines[workers] = done.stdout.splitlines()[:-1]
    assert lines["1"] == lines["2"] and documents(tmp_path / "1") == documents(tmp_path / "2")
    assert cleanup_dataset.MIN_TOKENS == 128
