"""The published scaling runs as command lines, and what the explanation predicts for them.

`python -m tests.plans.published` prints the comparison of docs/scale.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.training.explain import Explanation, explain, reconsider
from megatron.training.flops import num_floating_point_operations

FACTS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden/published_scaling.json").read_text())

#: What is not published, by one rule for all H100 rows: the largest of these micro-batches that leaves a tenth of memory.
MICRO_BATCHES = (4, 2, 1)
MEMORY_SHARE = 0.9

#: The modern recipe: bf16, fused attention, no dropout, no recomputation, everything overlapped, one layer per chunk.
RECIPE = (
    "--device h100 --bf16 --use-flash-attn --attention-dropout 0 --hidden-dropout 0 --sequence-parallel "
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
)
#: The recipe of 2021: fp16, scores in memory, full recomputation, 1F1B, nothing overlapped.
OLD_RECIPE = (
    "--device a100 --fp16 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
)


@dataclass(frozen=True)
class Prediction:
    """One run: seconds per step, TFLOP/s per GPU by the formula, and their share of the peak in percent."""

    explanation: Explanation
    seconds: float
    tflops: float
    mfu: float


def predict_h100(model: dict[str, Any], gpus: int, tp: int, pp: int, global_batch: int) -> Prediction:
    """A run of the modern recipe at the largest micro-batch that fits."""
    common = FACTS["weak_scaling_h100"]
    dp = gpus // (tp * pp)
    for micro in MICRO_BATCHES:
        if global_batch % (micro * dp * pp):
            continue
        words = RECIPE + _model(model, common["sequence"], common["vocabulary"])
        words += f"--micro-batch-size {micro} --global-batch-size {global_batch} --world-size {gpus} "
        words += f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} "
        words += "--num-layers-per-virtual-pipeline-stage 1 " if pp > 1 else ""
        # The flag that overlaps tensor-parallel transfers is known, but nothing here can run it yet.
        plan = reconsider(explain(words.split()), overlap_tensor=True)
        if max(stage.total for stage in plan.memory) <= MEMORY_SHARE * plan.profile.capacity:
            break
    return _prediction(plan)


def predict_a100() -> Prediction:
    """GPT-3 175B on 1,024 A100."""
    run = FACTS["gpt3_175b_a100"]
    words = OLD_RECIPE + _model(run, run["sequence"], 51200)
    words += f"--micro-batch-size 1 --global-batch-size {run['global_batch']} --world-size {run['gpus']} "
    words += f"--tensor-model-parallel-size {run['tp']} --pipeline-model-parallel-size {run['pp']}"
    return _prediction(reconsider(explain(words.split()), attention="scores"))


def _model(model: dict[str, Any], sequence: int, vocabulary: int) -> str:
    return (
        f"--num-layers {model['layers']} --hidden-size {model['hidden']} --num-attention-heads {model['heads']} "
        f"--seq-length {sequence} --max-position-embeddings {sequence} --train-iters 10 --lr 1e-4 --mock-data "
        f"--tokenizer-type NullTokenizer --vocab-size {vocabulary - 1} --make-vocab-size-divisible-by 1 "
    )


def _prediction(plan: Explanation) -> Prediction:
    flops = num_floating_point_operations(plan.args, plan.args.global_batch_size)
    rate = flops / plan.args.world_size / plan.step.seconds
    return Prediction(plan, plan.step.seconds, rate / 1e12, 100 * rate / plan.profile.peak)


def table() -> list[str]:
    """The comparison as a Markdown table."""
    lines = [
        "| run | GPUs | micro-batch | published MFU | predicted | difference |",
        "|---|---|---|---|---|---|",
    ]
    weak = FACTS["weak_scaling_h100"]
    for row in weak["rows"]:
        found = predict_h100(row, row["gpus"], row["tp"], row["pp"], row["global_batch"])
        known = 100 * row["tflops_per_gpu"] / weak["peak_tflops"]
        micro = found.explanation.args.micro_batch_size
        lines.append(
            f"| {row['model']} | {row['gpus']:,} | {micro} | {known:.1f} % | {found.mfu:.1f} % | {found.mfu - known:+.1f} |"
        )
    strong = FACTS["strong_scaling_h100"]
    for point in strong["points"]:
        found = predict_h100(strong, point["gpus"], 8, 6, strong["global_batch"])
        known, micro = point["mfu_percent"], found.explanation.args.micro_batch_size
        lines.append(
            f"| 175B, strong | {point['gpus']:,} | {micro} | {known} % | {found.mfu:.1f} % | {found.mfu - known:+.1f} |"
        )
    old, found = FACTS["gpt3_175b_a100"], predict_a100()
    known, more = old["seconds_per_iteration"], 100 * (found.seconds / old["seconds_per_iteration"] - 1)
    lines.append(f"| 175B, A100 | {old['gpus']:,} | 1 | {known} s | {found.seconds:.1f} s | {more:+.0f} % |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
