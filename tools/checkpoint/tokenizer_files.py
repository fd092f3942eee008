"""A model is of no use without its tokenizer: its files travel along."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from types import ModuleType

from megatron.core.dist_checkpointing import durable
from megatron.core.errors import FlagError

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "generation_config.json",
)
_SUBDIRECTORY = "tokenizer"


def carry(args: Namespace, saver: ModuleType) -> None:
    """Copy tokenizer files from `--tokenizer-dir`, or from the source, to the target.

    A HuggingFace directory has them beside the model, a Megatron one in `tokenizer/`.
    """
    source = find(args)
    if source is None:
        return
    target = Path(args.save_dir)
    if not getattr(saver, "TOKENIZER_BESIDE_MODEL", False):
        target /= _SUBDIRECTORY
    copied = [name for name in _FILES if (source / name).is_file()]
    with durable.naming_path(target, "copying the tokenizer"):
        target.mkdir(parents=True, exist_ok=True)
        for name in copied:
            shutil.copyfile(source / name, target / name)
            durable.fsync_file(target / name)
    print(f"copied {', '.join(copied)} from {source} to {target}")


def find(args: Namespace) -> Path | None:
    """The directory to copy from, or None. FlagError if the one given has no tokenizer files."""
    if args.tokenizer_dir is not None:
        if not _has_any(Path(args.tokenizer_dir)):
            raise FlagError(
                f"--tokenizer-dir {args.tokenizer_dir}",
                f"it has none of {', '.join(_FILES)}",
                "check the path",
            )
        return Path(args.tokenizer_dir)
    for candidate in (Path(args.load_dir) / _SUBDIRECTORY, Path(args.load_dir)):
        if _has_any(candidate):
            return candidate
    return None


def _has_any(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _FILES)
