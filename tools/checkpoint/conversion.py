"""Run a loader and a saver against each other through a bounded queue."""

from __future__ import annotations

import argparse
import importlib
import queue as queues
import sys
import threading
from types import ModuleType
from typing import Any

from megatron.core.errors import FlagError, MegatronError
from tools.checkpoint import tokenizer_files, verification
from tools.checkpoint.options import positive

# Newer releases' names of the same plug-ins.
_RENAMED = {"core": "mcore", "legacy": "megatron"}

_HELP = """\
loaders:  mcore (any Megatron checkpoint; megatron and torch_dist are names of it), hf (llama_mistral is a name of it)
savers:   mcore (torch format), torch_dist, megatron (the first generation's names), hf
A plug-in of your own is a module loader_NAME or saver_NAME on the Python path.

  convert.py --model-type GPT --loader hf --saver mcore --load-dir llama --save-dir out --target-tensor-parallel-size 2
  convert.py --model-type GPT --loader mcore --saver hf --load-dir out --save-dir published
"""


class _Stopped(Exception):
    """The other side failed; this side has nothing to add."""


class Channel:
    """A bounded queue whose `put` gives up when the reader is gone."""

    def __init__(self, size: int) -> None:
        self._queue: queues.Queue[Any] = queues.Queue(size)
        self.abandoned = threading.Event()

    def put(self, item: Any) -> None:
        """Hand over an item, waiting for room."""
        while not self.abandoned.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queues.Full:
                continue
        raise _Stopped

    def get(self) -> Any:
        """The next item."""
        return self._queue.get()


def load_plugin(plugin_type: str, name: str) -> ModuleType:
    """The module `<type>_<name>` or `<name>`. FlagError if there is none or it is no plug-in."""
    name = _RENAMED.get(name, name)
    for candidate in (f"tools.checkpoint.{plugin_type}_{name}", f"{plugin_type}_{name}", name):
        try:
            module = importlib.import_module(candidate)
        except ModuleNotFoundError as error:
            if error.name is None or not candidate.startswith(error.name):
                raise
            continue
        if not hasattr(module, "add_arguments"):
            raise FlagError(
                f"--{plugin_type} {name}", f"{candidate} has no add_arguments", "name a conversion plug-in"
            )
        return module
    raise FlagError(f"--{plugin_type} {name}", f"there is no module {plugin_type}_{name}", "check the name")


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit status is 0 only if the saver finished."""
    try:
        return _convert(argv)
    except MegatronError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _convert(argv: list[str] | None) -> int:
    plugins = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    plugins.add_argument("--loader", default="megatron", help="module that reads")
    plugins.add_argument("--saver", default="megatron", help="module that writes")
    chosen, _ = plugins.parse_known_args(argv)
    loader, saver = load_plugin("loader", chosen.loader), load_plugin("saver", chosen.saver)
    parser = argparse.ArgumentParser(
        description="Convert checkpoints. The options below the first group are those of the chosen loader and saver.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[plugins],
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    parser.add_argument(
        "--model-type", required=True, choices=["GPT", "BERT", "T5"], help="what the checkpoint holds"
    )
    parser.add_argument("--load-dir", required=True, help="directory to read")
    parser.add_argument("--save-dir", required=True, help="directory to write")
    parser.add_argument(
        "--max-queue-size", type=positive, default=1, help="messages (layers, mostly) in flight"
    )
    parser.add_argument(
        "--no-verify", action="store_false", dest="verify", help="do not run both models and compare logits"
    )
    parser.add_argument(
        "--tokenizer-dir", help="tokenizer files to carry along; by default those beside the source"
    )
    parser.add_argument("--no-checking", action="store_false", dest="checking", help="ignore unused tensors")
    loader.add_arguments(parser)
    saver.add_arguments(parser)
    args = parser.parse_args(argv)
    tokenizer_files.find(args)  # a wrong directory is better known before the conversion
    channel = Channel(args.max_queue_size)
    failures: list[BaseException] = []
    finished = threading.Event()

    def save() -> None:
        try:
            saver.save_checkpoint(channel, args)
            finished.set()
        except (MegatronError, SystemExit, OSError) as error:
            failures.append(error)
        finally:
            channel.abandoned.set()

    thread = threading.Thread(target=save, name="saver")
    thread.start()
    try:
        loader.load_checkpoint(channel, args)
    except _Stopped:
        pass
    except BaseException:
        if not channel.abandoned.is_set():
            channel.put("exit")
        raise
    finally:
        thread.join()
    for failure in failures:
        raise failure
    if not finished.is_set():
        print(f"the saver {saver.__name__} failed; see above", file=sys.stderr)
        return 1
    tokenizer_files.carry(args, saver)
    if args.verify:
        verification.verify(loader, saver, args)
    return 0
