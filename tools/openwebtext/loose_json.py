"""What the scripts of this directory share: reading and writing loose JSON, workers, and ending with one clear line.

Loose JSON is one object per line, in UTF-8. Nothing here needs more than the standard library.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Lines that a worker process gets at a time.
CHUNK_LINES = 64
#: Chunks under way per worker: what memory is bounded by.
CHUNKS_PER_WORKER = 4


class CorpusError(Exception):
    """A file cannot be used; the message names it, the reason and the fix. `exit_code` is that of the script."""

    exit_code = 1

    def __init__(self, subject: str, why: str, fix: str | None = None) -> None:
        super().__init__(f"{subject}: {why}." + (f" Fix: {fix}." if fix else ""))
        self.arguments = (subject, why, fix)

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors of worker processes are pickled on their way to the one that reports them."""
        return type(self), self.arguments


class UsageError(CorpusError):
    """The command line asks for something that cannot be."""

    exit_code = 2


class LineError(CorpusError):
    """A line of a file cannot be used; `subject` is `file:line`."""


def run(main: Callable[[], object]) -> None:
    """Run a script's `main`. What goes wrong with its files ends the process with one line and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what is printed of a text must never be what stops the script
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main()
    except CorpusError as error:
        message, code = str(error), error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        message, code = f"{error.filename}: it cannot be used: {error.strerror}.", 1
    except KeyboardInterrupt:
        message, code = "interrupted.", 130
    else:
        return
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(code)


def need(module: str, purpose: str) -> Any:
    """An optional package, imported when it is first used."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CorpusError(
            module, f"{purpose} needs it, and it cannot be imported ({error})", f"pip install {module}, "
            "or the `clean` extra of this repository: pip install '.[clean]'"
        ) from error  # fmt: skip


class Line(NamedTuple):
    """A line without its end, and where it is: number from 1, offset in bytes."""

    path: str
    number: int
    offset: int
    data: bytes

    @property
    def place(self) -> str:
        return f"{self.path}:{self.number}"


def read_lines(path: str) -> Iterator[Line]:
    """The lines of a file that are not blank."""
    offset = 0
    with open(path, "rb") as file:
        for number, data in enumerate(file, 1):
            if data.strip():
                yield Line(path, number, offset, data.rstrip(b"\r\n"))
            offset += len(data)


def parse(line: Line) -> dict[str, Any]:
    """The object of a line. Errors: LineError where there is none."""
    data = line.data.removeprefix(b"\xef\xbb\xbf") if line.number == 1 else line.data
    try:
        document = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LineError(line.place, f"not UTF-8 at byte {error.start + 1} of the line") from error
    except (ValueError, RecursionError) as error:
        raise LineError(line.place, f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise LineError(line.place, f"a JSON object is wanted, not {type(document).__name__}")
    return document


def text_of(document: dict[str, Any], key: str, line: Line) -> str:
    """The text under `key`. Errors: LineError where there is none."""
    value = document.get(key)
    if not isinstance(value, str):
        why = f"its {key!r} is no text" if key in document else f"it has no {key!r}"
        raise LineError(line.place, why)
    return value


def dump(document: Any) -> bytes:
    """A line of loose JSON with its end; non-ASCII characters stay as they are."""
    text = json.dumps(document, ensure_ascii=False)
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # halves of surrogate pairs can only be written as escapes
        return json.dumps(document).encode("ascii") + b"\n"


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Sets have a name in pickles, other plain values have none."""
        if (module, name) in (("builtins", "set"), ("builtins", "frozenset")):
            return set if name == "set" else frozenset
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def read_pickle(path: str) -> Any:
    """A pickle of numbers, texts, bytes and their containers. Errors: CorpusError for any other; no code of it is run."""
    with open(path, "rb") as file:
        try:
            return _PlainUnpickler(file).load()
        except (
            pickle.UnpicklingError,
            EOFError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
        ) as error:
            raise CorpusError(path, f"it is no pickle of plain values ({error})") from error


@contextmanager
def writing(path: str) -> Iterator[BinaryIO]:
    """A file that appears under its name, flushed to the disk, once everything is written; until then it is `.NAME.partial`.

    What is no regular file, such as a pipe, is written as it is.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            yield file
        return
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, f".{name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise
    entries = os.open(folder, os.O_RDONLY)  # the new name, too, must stay after a power cut
    try:
        os.fsync(entries)
    finally:
        os.close(entries)


def chunks(items: Iterable[Item], size: int = CHUNK_LINES) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one of what is left."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    worker: Callable[..., Callable[[Item], Result]], settings: tuple[Any, ...], items: Iterable[Item], processes: int
) -> Iterator[Result]:  # fmt: skip
    """`worker(*settings)(item)` of each item, in order, by at most `processes` processes and no more than there are cores.

    Each process makes its worker once. Items are read as results are taken, so memory does not grow with their number.
    """
    processes = min(processes, cores())
    if processes < 2:
        yield from map(worker(*settings), items)
        return
    pool = ProcessPoolExecutor(processes, initializer=_start, initargs=(worker, settings))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(_work, item))
            if len(pending) >= processes * CHUNKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise CorpusError(
            "a worker process", "it ended before its work", "see whether memory is short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Callable[[Any], Any]


def _start(worker: Callable[..., Callable[[Any], Any]], settings: tuple[Any, ...]) -> None:
    global _worker
    _worker = worker(*settings)


def _work(item: Any) -> Any:
    return _worker(item)
