"""Every kind of input gives the documents of the plain file; shards divide it exactly."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.errors import DataError, FlagError
from megatron.training.preprocessing.documents import BadDocument, read_documents
from megatron.training.preprocessing.inputs import Shard, count_lines, find_inputs, lines_before, read_chunks
from tests.unit.preprocess.runs import NULL, digests, documents_of, number_documents, run, write_jsonl


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", number_documents(500))


@pytest.fixture
def expected(corpus: Path, tmp_path: Path) -> list[str]:
    run("--input", corpus, *NULL, "--workers", 1, "--output-prefix", tmp_path / "plain")
    return digests(tmp_path / "plain_text_document")


@pytest.mark.parametrize(
    "kind", ["gz", "zst", "parquet", "directory", "pattern", "stdin", "crlf", "no final newline", "bom"]
)
def test_same_bytes_from_every_kind(
    kind: str, corpus: Path, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = corpus.read_bytes()
    folder = tmp_path / "inputs"
    folder.mkdir()
    source = folder / f"corpus.{kind}"
    if kind == "gz":
        source.write_bytes(gzip.compress(lines[:5000]) + gzip.compress(lines[5000:]))
    elif kind == "zst":
        import pyarrow

        with pyarrow.output_stream(str(source), compression="zstd") as stream:
            stream.write(lines)
    elif kind == "parquet":
        import pyarrow.parquet

        table = pyarrow.table(
            {"id": list(range(500)), "text": [json.loads(line)["text"] for line in lines.splitlines()]}
        )
        pyarrow.parquet.write_table(table, str(source), row_group_size=77)
    elif kind in ("directory", "pattern"):
        cut = lines.index(b"\n", len(lines) // 2) + 1
        (folder / "a.jsonl").write_bytes(lines[:cut])
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[cut:]))
        (folder / "notes.md").write_text("not data")
        source = folder if kind == "directory" else folder / "*.json*"
    elif kind == "stdin":
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines), close=lambda: None))
        source = Path("-")
    elif kind == "crlf":
        source.write_bytes(lines.replace(b"\n", b"\r\n"))
    elif kind == "no final newline":
        source.write_bytes(lines.removesuffix(b"\n"))
    else:
        source.write_bytes(b"\xef\xbb\xbf" + lines)
    run("--input", source, *NULL, "--workers", 2, "--output-prefix", tmp_path / "out")
    assert digests(tmp_path / "out_text_document") == expected


def test_lists_of_texts_in_parquet(tmp_path: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.table({"text": [["1 2", "3"], [], ["4"]]})
    pyarrow.parquet.write_table(table, str(tmp_path / "a.parquet"))
    run(
        "--input",
        tmp_path / "a.parquet",
        *NULL,
        "--workers",
        1,
        "--append-eod",
        "--output-prefix",
        tmp_path / "out",
    )
    assert documents_of(tmp_path / "out_text_document") == [[1, 2, 3, 50000], [], [4, 50000]]


def test_empty_inputs_give_empty_datasets(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    for i, name in enumerate(("empty.jsonl", "empty.jsonl.gz")):
        run("--input", tmp_path / name, *NULL, "--workers", 1, "--output-prefix", tmp_path / f"{i}")
        assert documents_of(tmp_path / f"{i}_text_document") == []
        assert (tmp_path / f"{i}_text_document.idx").stat().st_size == 42


@given(
    sizes=st.lists(st.lists(st.integers(0, 60), max_size=12), min_size=1, max_size=3),
    count=st.integers(1, 6),
    chunk_bytes=st.integers(1, 50),
    final_newline=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_shards_and_chunks_hold_every_line_once(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[list[int]],
    count: int,
    chunk_bytes: int,
    final_newline: bool,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    paths, lines = [], []
    for i, file_sizes in enumerate(sizes):
        content = [f"{i}-{j}-".encode() + b"x" * size + b"\n" for j, size in enumerate(file_sizes)]
        if content and not final_newline:
            content[-1] = content[-1][:-1]
        path = folder / str(i)
        path.write_bytes(b"".join(content))
        paths.append(str(path))
        lines += [line.rstrip(b"\n") for line in content]
    seen: list[bytes] = []
    for index in range(count):
        for chunk in read_chunks(paths, keys=[], shard=Shard(index, count), chunk_bytes=chunk_bytes):
            data = chunk.read()
            assert count_lines(chunk) == len(data.splitlines())
            assert lines_before(chunk.path, chunk.offset) == Path(chunk.path).read_bytes()[
                : chunk.offset
            ].count(b"\n")
            seen += data.splitlines()
    assert seen == lines


@given(
    sizes=st.lists(st.integers(0, 40), max_size=20),
    chunk_bytes=st.integers(1, 60),
    resume_after=st.integers(0, 20),
)
@settings(max_examples=60, deadline=None)
def test_compressed_streams_continue_anywhere(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], chunk_bytes: int, resume_after: int
) -> None:
    path = tmp_path_factory.mktemp("stream") / "a.gz"
    content = b"".join(b"x" * size + b"\n" for size in sizes)
    path.write_bytes(gzip.compress(content))
    chunks = list(read_chunks([str(path)], keys=[], chunk_bytes=chunk_bytes))
    assert b"".join(chunk.read() for chunk in chunks) == content
    assert [chunk.first_line for chunk in chunks] == [
        content[: chunk.offset].count(b"\n") for chunk in chunks
    ]
    stop = chunks[min(resume_after, len(chunks) - 1)].end
    rest = list(read_chunks([str(path)], keys=[], chunk_bytes=chunk_bytes, start=(0, stop)))
    assert b"".join(chunk.read() for chunk in rest) == content[stop:]


@pytest.mark.parametrize("text", ["3/3", "-1/2", "1", "a/b", "1/0", ""])
def test_shards_are_written_i_of_n(text: str) -> None:
    with pytest.raises(FlagError, match="--shard"):
        Shard.parse(text)


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="no file has this name"):
        find_inputs(str(tmp_path / "absent*.jsonl"))
    with pytest.raises(FlagError, match="the directory holds no file"):
        find_inputs(str(tmp_path))


@pytest.mark.parametrize("damage", ["short", "altered"])
def test_damaged_gzip(damage: str, tmp_path: Path) -> None:
    content = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(1000)))
    middle = len(content) // 2
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content[:middle] + (b"" if damage == "short" else b"\xff" * 20 + content[middle + 20 :]))
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be decompressed"):
        list(read_chunks([str(path)], keys=["text"]))


@pytest.mark.parametrize("damage", ["short", "altered"])
def test_damaged_parquet(damage: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [str(i * i) for i in range(1000)]}), path)
    content = path.read_bytes()
    path.write_bytes(content[:1000] if damage == "short" else content[:8] + b"\xff" * 500 + content[508:])
    with pytest.raises(DataError, match=r"a.parquet: cannot be read as a table"):
        list(read_chunks([str(path)], keys=["text"]))


def test_a_cell_of_a_table_that_is_not_text_is_one_malformed_document(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    cells = pyarrow.array([b"good", b"\xff", None])
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, cells.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    (chunk,) = read_chunks([str(tmp_path / "a.parquet")], keys=["text"])
    good, *bad = read_documents(chunk, ["text"])
    assert good.texts == ["good"]
    assert [str(line.texts).partition(",")[0] for line in bad] == [
        "'text' holds bytes",
        "'text' holds NoneType",
    ]


@pytest.mark.parametrize("blank", [1, 2, 3])
def test_blank_lines_are_counted_one_by_one(blank: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" * blank)
    (chunk,) = read_chunks([str(path)], keys=["text"])
    assert len(list(read_documents(chunk, ["text"]))) == count_lines(chunk) == blank


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "the line is empty"),
        (b"   ", "the line is empty"),
        (b"{", "not JSON: .* at character 2"),
        (b"[1]", "holds a list, not an object"),
        (b'{"title": "a"}', r"no key 'text' \(it has: title\)"),
        (b'{"text": null}', "'text' holds NoneType"),
        (b'{"text": ["a", 1]}', "'text' holds list"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_malformed_lines(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    (chunk,) = read_chunks([str(path)], keys=["text"])
    first, bad, last = read_documents(chunk, ["text"])
    assert first.texts == last.texts == ["good"]
    assert isinstance(bad.texts, BadDocument)
    with pytest.raises(BadDocument, match=reason):
        raise bad.texts
