"""Encode a corpus with one Ray task per shard, then merge.

    python examples/preprocessing/ray_shards.py --shards 64 --cpus-per-shard 4 --input 'corpus/*.jsonl.gz' \\
        --output-prefix data/corpus --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt \\
        --append-eod --workers 4

All other options are those of tools/preprocess_data.py. On a cluster, set RAY_ADDRESS; otherwise this machine is used.
A shard whose machine is lost is started again elsewhere and continues where it stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"


def run_tool(options: list[str]) -> int:
    """Run the tool in its own process; its exit status."""
    return subprocess.run([sys.executable, str(TOOL), *options]).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, required=True, help="Number of shards.")
    parser.add_argument(
        "--cpus-per-shard", type=float, default=1, help="Cores a shard takes; match --workers."
    )
    args, options = parser.parse_known_args()
    import ray

    ray.init()
    encode = ray.remote(num_cpus=args.cpus_per_shard, max_retries=3)(run_tool)
    tasks = [
        encode.remote([*options, "--shard", f"{i}/{args.shards}", "--resume"]) for i in range(args.shards)
    ]
    failed = [i for i, status in enumerate(ray.get(tasks)) if status]
    if failed:
        print(
            f"shards {' '.join(map(str, failed))} failed; run the command again to continue them",
            file=sys.stderr,
        )
        return 1
    return run_tool([*options, "--merge-shards", str(args.shards)])


if __name__ == "__main__":
    sys.exit(main())
