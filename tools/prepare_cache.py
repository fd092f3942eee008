"""Build the dataset index files of a run ahead of it, on one CPU node.

    python tools/prepare_cache.py --world-size 1024 pretrain_gpt.py <the flags of the run>

The run then finds its indices in `--data-cache-path` (or below each data path) and starts without building any. The
flags are those of the run, unchanged: the seed, lengths and numbers of samples decide what is built. `--world-size` is
the number of ranks of the run; the batch size may depend on it.
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch.distributed as dist

import megatron.training.training
from megatron.core import parallel_state
from megatron.training.arguments import notices, parse_args, validate_args
from megatron.training.cli import run_main
from megatron.training.config import rules
from megatron.training.data import build_train_valid_test_datasets
from megatron.training.global_vars import rebuild_tokenizer, set_args


def build_instead_of_pretraining(
    train_valid_test_dataset_provider: Callable[..., Any],
    *_: Any,
    extra_args_provider: Callable[[Any], Any] | None = None,
    args_defaults: dict[str, Any] | None = None,
    model_name: str | None = None,
    **__: Any,
) -> None:
    """Stands in for `pretrain`: takes the command line and the datasets of the script, and builds them."""
    args = validate_args(parse_args(extra_args_provider), args_defaults or {})
    for line in (*notices(args), *rules.unread_by(model_name, args)):
        print(f"> {line}", flush=True)
    set_args(args)
    rebuild_tokenizer(args)
    # A world of one, in which this process is the rank that builds, whatever the layout of the run.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    start = time.monotonic()
    splits = build_train_valid_test_datasets(train_valid_test_dataset_provider)
    counts = ", ".join(
        f"{name} {'none' if dataset is None else f'{len(dataset):,} samples'}"
        for name, dataset in zip(("train", "validation", "test"), splits)
    )
    print(f"> indices are ready after {time.monotonic() - start:.1f} s: {counts}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Run the entry script with `pretrain` replaced."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--world-size", type=int, default=1, help="Ranks of the run (default 1)")
    parser.add_argument("script", help="Entry script of the run, such as pretrain_gpt.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="Its flags")
    options = parser.parse_args()
    if not os.path.isfile(options.script):
        parser.error(f"{options.script}: no such script")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(options.world_size))
    sys.argv = [options.script, *options.flags]
    for module in (megatron.training, megatron.training.training):
        module.pretrain = build_instead_of_pretraining  # type: ignore[attr-defined]
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    run_main(main)
