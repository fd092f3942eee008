"""What layouts cost on the CPU: Python time of the framework, memory against the formula, step time against the prediction.

    python benchmarks/layouts.py                 # all three, about five minutes on two quiet cores
    python benchmarks/layouts.py --only overhead
    python benchmarks/layouts.py --json benchmarks/results/cpu_layouts.json
    python benchmarks/layouts.py --tables benchmarks/results/cpu_layouts.json   # put its figures into docs/scale.md
    python benchmarks/layouts.py --calibrate cpu.json   # measure this machine; tools/explain.py takes it as --profile

Overhead: a model so small that only Python is left to time. Steps of three sizes give, by differences, the time per layer
that a rank holds and per micro-batch, in milliseconds and as a ratio to the bare model in a loop (forward, loss, backward;
no schedule, no gradient buffers). A thread's own work counts, not its waiting for other ranks.
Memory: bytes of live tensors at their peak over what the explanation of the same command says.
Time: measured steps over predicted ones, with a profile measured here minutes before. Wants quiet cores, one per rank.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.surroundings import surroundings
from megatron.core import parallel_state
from megatron.core.collectives import all_gather_single
from megatron.core.fusions.blocked_attention import blocked
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.training import training
from megatron.training.explain import explain, hardware, reconsider
from megatron.training.explain.hardware import PROFILES, DeviceProfile
from tests.gang.harness import run_gang
from tests.runs.live_memory import COUNTABLE, measured
from tests.runs.pretraining import run_script

COMMON = (
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 1000 --num-workers 0 --eval-iters 0 --distributed-backend gloo "
    "--transformer-impl local --attention-dropout 0 --hidden-dropout 0 --lr 1e-4 "
)
TINY = "--hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 "
SMALL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256 "
)

#: name: (ranks, replicas, flags)
LAYOUTS = {
    "one rank": (1, 1, ""),
    "tp2": (2, 1, "--tensor-model-parallel-size 2"),
    "tp2+sp": (2, 1, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, 1, "--pipeline-model-parallel-size 2"),
    "pp2 x vpp2": (
        2,
        1,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage {per_chunk}",
    ),
    "cp2": (2, 1, "--context-parallel-size 2"),
    "dp2": (2, 2, ""),
    "dp2+distopt+overlap": (2, 2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
}


PAGE = Path(__file__).resolve().parents[1] / "docs/scale.md"
BEGIN, END = "<!-- measured on a CPU -->", "<!-- /measured on a CPU -->"
Record = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Layers of the model and micro-batches of a step."""

    layers: int
    microbatches: int


def step_times(argv: list[str]) -> list[tuple[float, float]]:
    """Body: of every training step of a run on this rank, seconds by the clock and of this thread's work."""
    original = training.train_step
    found: list[tuple[float, float]] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        dist.barrier()
        start, worked = time.perf_counter(), time.thread_time()
        result = original(*args, **kwargs)
        found.append((time.perf_counter() - start, time.thread_time() - worked))
        return result

    with mock.patch.object(training, "train_step", timed):
        run_script(argv)
    return found


def step_seconds(ranks: int, words: str) -> tuple[float, float]:
    """(by the clock, worked) of the fastest step of a run after its first two; the slowest rank counts."""
    per_rank = run_gang(ranks, step_times, words.split(), timeout_s=300)
    steps = list(zip(*per_rank))[2:]
    return min(max(clock for clock, _ in step) for step in steps), min(
        max(work for _, work in step) for step in steps
    )


# Overhead ----------------------------------------------------------------------------------------------------------


def overhead(iterations: int) -> Iterator[Record]:
    """Milliseconds per layer and per micro-batch, and their ratio to the bare model."""
    print("Python time of the framework, ms (ratio to the bare model on one rank)")
    print(f"{'layout':<22}{'per layer and micro-batch':>28}{'per micro-batch':>20}{'per step':>12}")
    small, deep, long = Size(4, 4), Size(12, 4), Size(4, 12)
    bare = _parts({size: bare_seconds(size) for size in (small, deep, long)})
    yield _row("bare model", bare, bare)
    for name, (ranks, replicas, flags) in LAYOUTS.items():
        seconds = {}
        for size in (small, deep, long):
            words = COMMON + TINY + flags.format(per_chunk=size.layers // 4)
            words += f" --num-layers {size.layers} --global-batch-size {size.microbatches * replicas}"
            seconds[size] = step_seconds(ranks, f"{words} --train-iters {iterations}")[1]
        yield _row(name, _parts(seconds, 2 if "--pipeline" in flags else 1), bare)


def _parts(seconds: dict[Size, float], stages: int = 1) -> tuple[float, float, float]:
    """(per held layer and micro-batch, per micro-batch beside its layers, the rest of a step)."""
    (small, a), (deep, b), (long, c) = seconds.items()
    layer = (b - a) / ((deep.layers - small.layers) // stages * small.microbatches)
    batch = (c - a) / (long.microbatches - small.microbatches) - small.layers // stages * layer
    return layer, batch, a - small.microbatches * (batch + small.layers // stages * layer)


def _row(name: str, parts: tuple[float, ...], bare: tuple[float, ...]) -> Record:
    layer, batch, step = (round(1e3 * part, 3) for part in parts)
    ratios = [round(part / one, 2) for part, one in zip(parts[:2], bare)]
    print(
        f"{name:<22}{f'{layer:.2f} ({ratios[0]})':>28}{f'{batch:.2f} ({ratios[1]})':>20}{step:>12.2f}",
        flush=True,
    )
    return {"layout": name, "layer_ms": layer, "microbatch_ms": batch, "step_ms": step, "ratios": ratios}


def bare_seconds(size: Size, repeats: int = 20) -> float:
    """The same model called in a loop, in a process of its own like the others."""
    return run_gang(1, _bare_body, size.layers, size.microbatches, repeats)[0]


def _bare_body(layers: int, microbatches: int, repeats: int) -> float:
    parallel_state.initialize_model_parallel()
    get_cuda_rng_tracker().add("model-parallel-rng", 1)
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), 1024, 16, share_embeddings_and_output_weights=True)
    tokens = torch.randint(0, 1000, (1, 16))
    positions = torch.arange(16).unsqueeze(0)
    found = []
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(microbatches):
            model(tokens, positions, None, labels=tokens).mean().backward()
        found.append(time.thread_time() - start)
    return min(found[2:])


# Memory ------------------------------------------------------------------------------------------------------------


def memory() -> Iterator[Record]:
    """Bytes per rank, counted and said."""
    print("peak memory per rank, MiB: counted from live tensors / by the formula (ratio)")
    for name, (ranks, replicas, flags) in LAYOUTS.items():
        words = COMMON + COUNTABLE + SMALL + flags.format(per_chunk=1)
        words += f" --micro-batch-size 2 --global-batch-size {8 * replicas} --train-iters 2"
        plan = explain([*words.split(), "--world-size", str(ranks), "--device", "cpu"])
        counted = run_gang(ranks, measured, words.split())
        for stage, said in enumerate(plan.memory):
            total = sum(counted[stage * ranks // len(plan.memory)].values())
            where = f"{name}, stage {stage}" if len(plan.memory) > 1 else name
            ratio = round(total / said.total, 3)
            print(f"{where:<30}{total / 2**20:8.1f} / {said.total / 2**20:8.1f} ({ratio})", flush=True)
            yield {"layout": where, "counted_bytes": total, "formula_bytes": int(said.total), "ratio": ratio}


# Time --------------------------------------------------------------------------------------------------------------


def predictions(iterations: int) -> Iterator[Record]:
    """Seconds per step, measured and predicted."""
    profiles = {ranks: calibrate(ranks) for ranks in (1, 2)}
    for ranks, profile in profiles.items():
        speed = f"GEMM {profile.peak / 1e9:.0f} GFLOP/s, attention {profile.attention_share * profile.peak / 1e9:.0f}"
        print(
            f"each of {ranks} busy: {speed}, memory {profile.memory / 1e9:.1f} GB/s, loopback {profile.link / 1e9:.2f}"
        )
    print("seconds per step: measured / predicted with these profiles (ratio)")
    for name, (ranks, replicas, flags) in LAYOUTS.items():
        if ranks > (os.cpu_count() or 1):
            continue
        words = COMMON + SMALL + flags.format(per_chunk=1)
        words += f" --micro-batch-size 4 --global-batch-size {16 * replicas} --train-iters {iterations}"
        plan = explain([*words.split(), "--world-size", str(ranks), "--device", "cpu"])
        expected = reconsider(plan, profile=profiles[ranks]).step.seconds
        found, _ = step_seconds(ranks, words)
        ratio = round(found / expected, 2)
        print(f"{name:<22}{found:8.3f} / {expected:8.3f} ({ratio})", flush=True)
        yield {
            "layout": name,
            "seconds": round(found, 4),
            "predicted_seconds": round(expected, 4),
            "ratio": ratio,
        }


def calibrate(ranks: int = 1) -> DeviceProfile:
    """Measure one core of this machine while `ranks` are busy: GEMMs, attention, memory, loopback."""
    gemms, attention, bandwidth, launch = run_gang(ranks, _compute_body)[-1]
    rates = run_gang(2, _link_body)
    link, latency = min(rate for rate, _ in rates), max(delay for _, delay in rates)
    peak, half_rows, half_depth = _fit(gemms)
    return replace(
        PROFILES["cpu"],
        peak=peak,
        peak_fp32=peak,
        gemm_share=1.0,
        half_rows=half_rows,
        half_depth=half_depth,
        attention_share=attention / peak,
        memory=bandwidth,
        memory_share=1.0,
        link=link,
        network=link,
        link_share=1.0,
        network_share=1.0,
        latency_s=latency,
        launch_s=launch,
        step_s=0.0,
        jitter=0.0,
    )


def _best(work: Callable[[], Any], repeats: int = 7) -> float:
    """Seconds of the fastest of several calls."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def _compute_body() -> tuple[list[tuple[int, int, int, float]], float, float, float]:
    """Body: GEMMs as (m, n, k, seconds), attention FLOP/s, bytes/s of passes over memory, seconds to start an operation."""
    gemms = []
    for m, n, k in ((256, 256, 256), (1024, 256, 256), (1024, 1024, 256), (1024, 256, 1024), (1024, 768, 256),
                    (1024, 1024, 1024), (2048, 2048, 512), (1024, 64, 256), (64, 1024, 1024)):  # fmt: skip
        a, b = torch.randn(m, k), torch.randn(n, k)
        gemms.append((m, n, k, _best(lambda a=a, b=b: torch.nn.functional.linear(a, b))))
    s, b, heads, width = 256, 4, 4, 64
    q, key, value = (torch.randn(s, b, heads, width, requires_grad=True) for _ in range(3))
    scale = width**-0.5

    def attend() -> Tensor:
        return blocked(q, key, value, causal=True, scale=scale)

    forward = _best(attend)
    half = (1 + 128 / s) / 2
    attention = 4 * s * s * b * heads * width * half / forward
    # The tensors between the layers of a small model: some megabytes, partly in a cache.
    x, y = torch.randn(1024, 1024), torch.randn(1024, 1024)
    bandwidth = 3 * x.numel() * 4 / _best(lambda: torch.add(x, y))
    one = torch.ones(1)
    launch = _best(lambda: [torch.add(one, one) for _ in range(1000)]) / 1000
    return gemms, attention, bandwidth, launch


def _link_body() -> tuple[float, float]:
    """Body: bytes/s of an all-gather of four megabytes, and the time of one of four bytes."""

    def gather(numel: int) -> float:
        part = torch.ones(numel // 2)
        whole = torch.empty(numel)
        dist.barrier()
        return _best(lambda: all_gather_single(whole, part), repeats=15)

    small, large = gather(2), gather(1 << 20)
    return (1 << 20) * 4 / 2 / max(large - small, 1e-9), small / 2


def _fit(gemms: list[tuple[int, int, int, float]]) -> tuple[float, float, float]:
    """(peak, half_rows, half_depth) of seconds = 2 m n k / peak (1 + rows/m + rows/n + depth/k), by least squares."""
    inverse = numpy.array([seconds / (2 * m * n * k) for m, n, k, seconds in gemms])
    terms = numpy.array([(1.0, 1 / m + 1 / n, 1 / k) for m, n, k, _ in gemms])
    # Relative errors count, or the small shapes would decide alone.
    base, rows, depth = numpy.linalg.lstsq(terms / inverse[:, None], numpy.ones(len(inverse)), rcond=None)[0]
    base = max(base, inverse.min() / 2)
    return 1 / base, max(rows, 0.0) / base, max(depth, 0.0) / base


# Tables ------------------------------------------------------------------------------------------------------------


def tables(record: Record) -> list[str]:
    """The record as Markdown."""
    packages = ", ".join(f"{name} {number}" for name, number in record["packages"].items())
    lines = [
        f"`{record['command']}` on {record['cores']} cores ({record['processor']}), Python {record['python']}, {packages}; "
        f"load average before and after {' and '.join(str(load) for load in record['load average'])}.",
        "",
        "| layout | Python, ms per layer and micro-batch (ratio to the bare model) | ms per micro-batch beside layers "
        "| ms per step beside micro-batches |",
        "|---|---|---|---|",
    ]
    for row in record["overhead"]:
        per_layer, per_batch = row["ratios"]
        lines.append(
            f"| {row['layout']} | {row['layer_ms']:.2f} ({per_layer}) | {row['microbatch_ms']:.2f} ({per_batch}) "
            f"| {row['step_ms']:.2f} |"
        )
    lines += ["", "| rank of | counted, MiB | by the formula, MiB | ratio |", "|---|---|---|---|"]
    for row in record["memory"]:
        counted, said = row["counted_bytes"] / 2**20, row["formula_bytes"] / 2**20
        lines.append(f"| {row['layout']} | {counted:.1f} | {said:.1f} | {row['ratio']} |")
    lines += ["", "| layout | step, s | predicted, s | ratio |", "|---|---|---|---|"]
    for row in record["time"]:
        lines.append(f"| {row['layout']} | {row['seconds']} | {row['predicted_seconds']} | {row['ratio']} |")
    return lines


def fill_page(record: Record) -> None:
    """Put the tables between the markers of docs/scale.md."""
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(
        "\n".join([f"{head}{BEGIN}", "", *tables(record), "", f"{END}{rest.split(END)[1]}"]), encoding="utf-8"
    )


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("overhead", "memory", "time"), help="one of the three comparisons")
    parser.add_argument("--iterations", type=int, default=12, help="training steps per measurement")
    parser.add_argument("--json", type=Path, help="keep the figures there")
    parser.add_argument("--tables", type=Path, help="put figures kept by --json into docs/scale.md and stop")
    parser.add_argument("--calibrate", metavar="FILE", help="write a profile of this machine and stop")
    args = parser.parse_args()
    if args.tables:
        fill_page(json.loads(args.tables.read_text(encoding="utf-8")))
        return
    if args.calibrate:
        hardware.save(calibrate(), args.calibrate)
        return
    record = surroundings(["torch", "numpy"])
    before = round(os.getloadavg()[0], 1)
    measure = {
        "overhead": lambda: overhead(args.iterations),
        "memory": memory,
        "time": lambda: predictions(args.iterations),
    }
    for name, rows in measure.items():
        if args.only in (None, name):
            record[name] = list(rows())
    record["load average"] = [before, round(os.getloadavg()[0], 1)]
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
