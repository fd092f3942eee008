#!/usr/bin/env python3
"""Pretraining speed on one GPU: our entry script beside HuggingFace and a plain PyTorch loop, in one run.

    python benchmarks/gpu_pretrain.py                    # everything that fits into --minutes, most telling cases first
    python benchmarks/gpu_pretrain.py --only 7B --minutes 30
    python benchmarks/gpu_pretrain.py --smoke            # toy sizes on the CPU: proves that this script works

Every figure comes from a process of its own. Contenders see the same shapes, batches and number of micro-batches, bf16
arithmetic with fp32 copies of the weights in the optimizer, and no dropout (7B: our gradients are summed in bf16, which
leaves room for activations; the peers' are fp32):

ours         pretrain_gpt.py on a command line; time per step from its own log
ours fp8     the same with --fp8-format hybrid
ours graphs  the same with --enable-cuda-graph (the smallest model, where launches cost most)
huggingface  transformers' GPT2LMHeadModel (sdpa), autocast, torch.compile, fused AdamW
plain        a GPT in 60 lines of PyTorch in the manner of nanoGPT: sdpa, autocast, torch.compile, fused AdamW

Model FLOPs are Megatron's (full attention, logits, no recomputation); MFU is their rate over 989 dense bf16 TFLOP/s, for fp8
too. A contender that runs out of memory is tried again with half the micro-batch and twice as many. What time or memory
does not allow stays "not measured". Ceilings measured in the same run: a device copy, and 8192^3 products in bf16 and fp8.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.training.flops import num_floating_point_operations

ROOT = Path(__file__).resolve().parents[1]
PEAK_TFLOPS = 989.0
CLIP, RATE = 1.0, 1e-4
NOT_MEASURED = "not measured"
CONTENDERS = ("ours", "ours fp8", "ours graphs", "huggingface", "plain")
MARKS = ("<!-- gpu: begin -->", "<!-- gpu: end -->")


@dataclass(frozen=True)
class Case:
    """A GPT-2-like model and its batch: `micro` sequences at a time, `count` times per step."""

    name: str
    layers: int
    hidden: int
    heads: int
    seq: int
    micro: int
    count: int = 4
    vocab: int = 50304
    half_gradients: bool = False

    @property
    def label(self) -> str:
        """Name and sequence length."""
        return f"{self.name} s{self.seq}"

    def flops(self) -> float:
        """Model FLOPs of one step."""
        return num_floating_point_operations(
            Namespace(
                group_query_attention=False, num_attention_heads=self.heads, hidden_size=self.hidden, seq_length=self.seq,
                num_layers=self.layers, kv_channels=self.hidden // self.heads, num_experts=None, swiglu=False,
                ffn_hidden_size=4 * self.hidden, padded_vocab_size=self.vocab,
            ),
            self.micro * self.count,
        )  # fmt: skip


CASES = {
    case.label: case
    for case in (
        Case("124M", 12, 768, 12, 1024, 32),
        Case("355M", 24, 1024, 16, 2048, 16),
        Case("1.3B", 24, 2048, 16, 2048, 8),
        Case("2.7B", 32, 2560, 32, 2048, 4),
        Case("7B", 32, 4096, 32, 2048, 2, half_gradients=True),
        Case("7B", 32, 4096, 32, 4096, 1, half_gradients=True),
        Case("toy", 2, 64, 2, 32, 2, count=2, vocab=128),
    )
}

#: In this order, until time is up.
PROGRAM = [
    *(("ours", f"{name}") for name in ("124M s1024", "1.3B s2048", "7B s4096")),
    ("ours fp8", "7B s4096"),
    *(("plain", name) for name in ("124M s1024", "1.3B s2048")),
    *(("huggingface", name) for name in ("124M s1024", "1.3B s2048")),
    *(("ours", name) for name in ("355M s2048", "2.7B s2048", "7B s2048")),
    *(("ours fp8", name) for name in ("1.3B s2048", "7B s2048", "2.7B s2048")),
    ("ours graphs", "124M s1024"),
    *(
        (who, name)
        for name in ("7B s4096", "7B s2048", "355M s2048", "2.7B s2048")
        for who in ("plain", "huggingface")
    ),
    *(("ours fp8", name) for name in ("355M s2048", "124M s1024")),
]
SMOKE = [(who, "toy s32") for who in CONTENDERS]


# One contender, in a process of its own --------------------------------------------------------------------------


def ours(case: Case, who: str, steps: int) -> float:
    """Seconds per step of the entry script, by its own log."""
    import pretrain_gpt

    flags = {
        "num-layers": case.layers, "hidden-size": case.hidden, "num-attention-heads": case.heads,
        "seq-length": case.seq, "max-position-embeddings": case.seq, "micro-batch-size": case.micro,
        "global-batch-size": case.micro * case.count, "train-iters": 3 * steps, "lr": RATE,
        "lr-decay-style": "constant", "tokenizer-type": "NullTokenizer", "vocab-size": case.vocab - 1, "eval-iters": 0,
        "log-interval": steps, "num-workers": 2, "clip-grad": CLIP, "attention-dropout": 0, "hidden-dropout": 0,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--mock-data", "--bf16", "--transformer-impl", "local", "--cross-entropy-loss-fusion"]
    if case.half_gradients:
        words += ["--accumulate-allreduce-grads-in-bf16"]
    if who == "ours fp8":
        words += ["--fp8-format", "hybrid", "--fp8-recipe", "delayed"]
    if who == "ours graphs":
        words += ["--enable-cuda-graph"]
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        sys.argv = ["pretrain_gpt.py", *words, "--metrics-file", str(metrics)]
        pretrain_gpt.run()
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return min(line["elapsed_ms"] for line in lines[1:] if line["kind"] == "train") / 1e3


class PlainBlock(nn.Module):
    """Attention and MLP, pre-norm."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        h = case.hidden
        self.heads = case.heads
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.proj = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, h] -> [b, s, h]."""
        b, s, h = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, h // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, h)
        )
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """A GPT with tied word embeddings that returns its mean loss."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(case.vocab, case.hidden), nn.Embedding(case.seq, case.hidden)
        self.blocks = nn.ModuleList(PlainBlock(case) for _ in range(case.layers))
        self.norm = nn.LayerNorm(case.hidden)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens, labels [b, s] -> the mean loss."""
        x = self.words(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.words.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def peer(case: Case, who: str, steps: int) -> float:
    """Seconds per step of HuggingFace's model or the plain one, under a training loop of a few lines."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    with torch.device(where):
        model: Any = PlainGPT(case) if who == "plain" else _huggingface(case)
    fused = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    run: Callable[..., Any] = torch.compile(model) if where == "cuda" else model
    tokens = torch.randint(case.vocab, (case.count, case.micro, case.seq + 1), device=where)

    def step() -> None:
        for batch in tokens:
            with torch.autocast(where, dtype=torch.bfloat16):
                if who == "plain":
                    loss = run(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
                else:
                    loss = run(input_ids=batch[:, :-1].contiguous(), labels=batch[:, :-1].contiguous()).loss
            (loss / case.count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        fused.step()
        fused.zero_grad(set_to_none=True)

    for _ in range(steps):
        step()
    times = []
    for _ in range(2):
        _synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        _synchronize()
        times.append((time.perf_counter() - start) / steps)
    return min(times)


def _huggingface(case: Case) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=case.vocab, n_positions=case.seq, n_embd=case.hidden, n_layer=case.layers, n_head=case.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh",
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def child(job: dict[str, Any]) -> None:
    """Run one contender and print its result as the last line."""
    case, who, steps = Case(**job["case"]), job["who"], job["steps"]
    try:
        seconds = ours(case, who, steps) if who.startswith("ours") else peer(case, who, steps)
    except torch.OutOfMemoryError:
        print(json.dumps({"out_of_memory": True}))
        return
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


# The comparison --------------------------------------------------------------------------------------------------


def measure(who: str, case: Case, steps: int, seconds_left: float) -> dict[str, Any]:
    """Figures of one contender, or why there are none; halves the micro-batch while memory does not suffice."""
    job = json.dumps({"who": who, "case": asdict(case), "steps": steps})
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    command = [sys.executable, __file__, "--child", job]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=max(seconds_left, 1),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": "out of time"}
    if done.returncode:
        return {
            "failed": "\n".join(done.stderr.strip().splitlines()[-3:]) or f"exit status {done.returncode}"
        }
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if result.get("out_of_memory"):
        if case.micro == 1:
            return {"failed": "out of memory"}
        smaller = replace(case, micro=case.micro // 2, count=case.count * 2)
        return measure(who, smaller, steps, seconds_left - (time.monotonic() - start))
    seconds = result["seconds"]
    tflops = case.flops() / seconds / 1e12
    return {
        "micro_batch": case.micro,
        "step_ms": 1e3 * seconds,
        "tokens_per_second": case.micro * case.count * case.seq / seconds,
        "model_tflops": tflops,
        "mfu": tflops / PEAK_TFLOPS,
        "peak_gib": result["peak_bytes"] / 2**30,
    }


def ceilings() -> dict[str, float]:
    """What this device copies and multiplies at best, measured on random data: TB/s and TFLOP/s."""
    if not torch.cuda.is_available():
        return {}
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    spent = _milliseconds(functools.partial(target.copy_, source))
    found = {"copy_tb_per_s": 2 * source.nbytes / spent / 1e9}
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found["bf16_tflops"] = 2 * n**3 / _milliseconds(lambda: a @ b) / 1e9
    if torch.cuda.get_device_capability() >= (8, 9):
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device="cuda")
        product = functools.partial(torch._scaled_mm, a8, b8, one, one, out_dtype=torch.bfloat16)
        found["fp8_tflops"] = 2 * n**3 / _milliseconds(product) / 1e9
    return found


def release_memory() -> None:
    """Return what this process holds on the device: the contenders need it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _milliseconds(run: Callable[[], Any], repeats: int = 20) -> float:
    times = []
    for _ in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def operations(seconds_left: float) -> list[dict[str, Any]]:
    """Time of each operation's implementations and their share of the copy bandwidth (benchmarks/kernels.py)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [
            sys.executable,
            "benchmarks/kernels.py",
            "--dtype",
            "bfloat16",
            "--repeats",
            "10",
            "--json",
            str(path),
        ]
        try:
            subprocess.run(command, cwd=ROOT, capture_output=True, timeout=max(seconds_left, 1), check=False)
        except subprocess.TimeoutExpired:
            return []
        return json.loads(path.read_text()) if path.exists() else []


def table(results: dict[str, Any]) -> str:
    """Results as Markdown, with "not measured" for what is missing."""
    runs = results.get("runs", {})
    head = results.get("device")
    about = (
        f"{head}, {results['date']}, torch {results['torch']}, {results['python']}."
        if head
        else "No GPU was had yet."
    )
    rows = [
        "| model | micro-batch | contender | tokens/s | model TFLOP/s | MFU | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES.values():
        if case.name == "toy":
            continue
        for who in CONTENDERS:
            if (who, case.label) not in PROGRAM:
                continue
            run = runs.get(f"{case.label} {who}", {})
            if "step_ms" in run:
                rows.append(
                    f"| {case.label} | {run['micro_batch']} | {who} | {run['tokens_per_second']:,.0f} "
                    f"| {run['model_tflops']:.0f} | {100 * run['mfu']:.1f} % | {run['peak_gib']:.1f} |"
                )
            else:
                rows.append(f"| {case.label} | {case.micro} | {who} | {NOT_MEASURED} | | | |")
    return "\n".join([about, "", *rows])


def insert(path: Path, text: str) -> None:
    """Put the table between its marks in a page that has them."""
    page = path.read_text(encoding="utf-8")
    if MARKS[0] in page:
        before, _, rest = page.partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        path.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="start nothing after this many minutes")
    parser.add_argument(
        "--steps", type=int, default=4, help="steps per timed stretch; two are timed after one to warm up"
    )
    parser.add_argument("--only", default="", help="cases and contenders whose label contains this")
    parser.add_argument("--output", type=Path, help="folder of the JSON file (default benchmarks/results)")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on any machine; writes no tables")
    parser.add_argument("--table", type=Path, help="only rewrite the tables from this JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return 0
    pages = [ROOT / "README.md", ROOT / "docs" / "gpu.md"]
    if options.table:
        for page in pages:
            insert(page, table(json.loads(options.table.read_text())))
        return 0
    if not options.smoke and not torch.cuda.is_available():
        print("error: there is no GPU. Fix: run --smoke for a trial at toy size", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": f"Python {sys.version.split()[0]}",
        "ceilings": ceilings(),
        "runs": {},
    }
    release_memory()
    print(f"{device}, torch {torch.__version__}; ceilings: {results['ceilings'] or NOT_MEASURED}", flush=True)
    failed = False
    path = (options.output or ROOT / "benchmarks" / "results") / f"gpu_{device.replace(' ', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for who, label in SMOKE if options.smoke else PROGRAM:
        name = f"{label} {who}"
        if options.only not in name:
            continue
        left = deadline - time.monotonic()
        run = measure(who, CASES[label], options.steps, left) if left > 0 else {"failed": "out of time"}
        results["runs"][name] = run
        failed |= "failed" in run and run["failed"] not in ("out of time", "out of memory")
        shown = run.get("failed") or (
            f"{run['tokens_per_second']:12,.0f} tokens/s {run['model_tflops']:8.2f} TFLOP/s {100 * run['mfu']:5.1f} % MFU "
            f"{run['peak_gib']:6.1f} GiB (micro-batch {run['micro_batch']})"
        )
        print(f"{name:<26} {shown}", flush=True)
        # What was measured survives whatever comes next.
        path.write_text(json.dumps(results, indent=1) + "\n")
    if not options.smoke:
        results["operations"] = operations(deadline + 60 - time.monotonic())
        path.write_text(json.dumps(results, indent=1) + "\n")
        for page in pages:
            insert(page, table(results))
    print(f"written to {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
