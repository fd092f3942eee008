"""Where the time of a profiled step went: on traces written by hand, whose answer is known, and on one recorded here."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron.training import profiling
from megatron.training.profiling import (
    ATTENTION,
    COMMUNICATION,
    ELEMENTWISE,
    GEMM,
    IDLE,
    OPTIMIZER,
    Profiler,
    read_trace,
    report,
    summarize,
)


def span(category: str, name: str, start: float, length: float, thread: int = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "tid": thread}


def written(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "toy.pt.trace.json"
    path.write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *entries]}))
    return path


def test_kernels_of_an_accelerator(tmp_path: Path) -> None:
    """Two streams: computation [0, 100) [110, 200), communication [80, 140), the update [230, 260) in its range."""
    path = written(
        tmp_path,
        span("user_annotation", "ProfilerStep#4", 0, 130),
        span("user_annotation", "ProfilerStep#5", 130, 130),
        span("cpu_op", "aten::mm", 0, 300, thread=1),  # the host; does not count where there are kernels
        span("kernel", "sm90_xmma_gemm_bf16", 0, 60),
        span("kernel", "pytorch_flash::flash_fwd_kernel", 60, 40),
        span("kernel", "ncclDevKernel_AllReduce_Sum", 80, 60, thread=20),
        span("kernel", "vectorized_elementwise_kernel", 110, 90),
        span("gpu_user_annotation", "optimizer", 229, 40),
        span("kernel", "multi_tensor_apply_kernel", 230, 30),
    )
    events, steps = read_trace(path)
    summary = summarize(events, steps)
    assert steps == 2
    assert summary.kinds == {
        GEMM: 60, ATTENTION: 40, ELEMENTWISE: 90, OPTIMIZER: 30, COMMUNICATION: 10, IDLE: 30
    }  # fmt: skip
    assert summary.hidden_communication == 50
    (gap,) = summary.gaps
    assert (gap.start, gap.length) == (200, 30)
    assert (gap.after, gap.before) == ("vectorized_elementwise_kernel", "multi_tensor_apply_kernel")
    lines = report(summary)
    assert lines[0] == "> profile of 2 step(s), 0.13 ms each:"
    assert any(line.startswith(">   GEMM") and line.endswith("0.03 ms  23.1 %") for line in lines)
    assert "(and 0.03 ms under computation)" in "\n".join(lines)


def test_operators_of_a_cpu_count_without_what_they_call(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        span("cpu_op", "aten::linear", 0, 50),
        span("cpu_op", "aten::addmm", 10, 30),
        span("cpu_op", "aten::gelu", 60, 20),
        span("cpu_op", "gloo:all_reduce", 80, 5),
        span("user_annotation", "optimizer", 100, 30),
        span("cpu_op", "aten::_foreach_add_", 100, 10),
        span("cpu_op", "aten::scaled_dot_product_attention", 140, 60),
        span("cpu_op", "aten::mul", 150, 20),
        span("cpu_op", "aten::mul", 0, 10, thread=9),  # a thread that does little
    )
    summary = summarize(*read_trace(path))
    assert summary.kinds == {
        GEMM: 50, ATTENTION: 40, ELEMENTWISE: 40, OPTIMIZER: 10, COMMUNICATION: 5, IDLE: 55
    }  # fmt: skip
    assert [gap.length for gap in summary.gaps] == [30, 15, 10]


def test_nothing_is_no_time(tmp_path: Path) -> None:
    summary = summarize(*read_trace(written(tmp_path)))
    assert sum(summary.kinds.values()) == 0 and not summary.gaps
    assert report(summary)


@pytest.mark.parametrize(
    ("name", "kind"),
    {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNN": GEMM,
        "aten::_scaled_mm": GEMM,
        "aten::mm": GEMM,
        "aten::addmm_": GEMM,
        "mkldnn::_linear_pointwise": GEMM,
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": ATTENTION,
        "attention_key_grad": ATTENTION,
        "ncclDevKernel_ReduceScatter_Sum_bf16": COMMUNICATION,
        "aten::native_layer_norm": ELEMENTWISE,
        "aten::addcmul_": ELEMENTWISE,
    }.items(),
)
def test_kinds_by_name(name: str, kind: str) -> None:
    assert profiling.kind_of(name) == kind


def arguments(folder: Path, **changes: Any) -> Namespace:
    values = {
        "profile": True, "profile_ranks": [0], "use_pytorch_profiler": False, "profile_step_start": 1,
        "profile_step_end": 3, "tensorboard_dir": str(folder), "save": None,
    }  # fmt: skip
    return Namespace(**(values | changes))


def test_a_profiled_run_writes_a_trace_and_says_where_the_time_went(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NSYS_PROFILING_SESSION_ID", raising=False)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    profiler = Profiler(arguments(tmp_path))
    weight = torch.randn(256, 256)
    for iteration in range(4):
        profiler.before(iteration)
        (weight @ weight).relu()
        profiler.after(iteration + 1)
    (trace,) = tmp_path.glob("*.pt.trace.json")
    printed = capsys.readouterr().out
    assert f"> trace: {trace}" in printed
    assert "> profile of 2 step(s)" in printed
    events, _ = read_trace(trace)
    assert any(event.kind == GEMM for event in events)


def test_under_nsys_its_range_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with (
        mock.patch.object(profiling.device, "start_external_profiler") as start,
        mock.patch.object(profiling.device, "stop_external_profiler") as stop,
    ):
        profiler = Profiler(arguments(tmp_path))
        calls = []
        for iteration in range(5):
            profiler.before(iteration)
            calls.append((start.call_count, stop.call_count))
            profiler.after(iteration + 1)
    assert calls == [(0, 0), (1, 0), (1, 0), (1, 1), (1, 1)]
