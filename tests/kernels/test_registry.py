"""Choosing implementations: demands stop, preferences fall back, everything is reported and hashed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron.core.errors import FlagError
from megatron.core.fusions.core_attention import AttentionSpec
from megatron.core.kernels import registry
from megatron.core.kernels.capability import Capabilities, pretend, probe, version_tuple
from megatron.core.kernels.registry import Demand, Needs, Spec
from megatron.core.ssm.state_space import ScanSpec

LAPTOP = Capabilities(torch_version="2.13.0")
H100 = Capabilities((9, 0), "H100", "2.13.0", {"triton": "3.9.0", "flash_attn": "2.7.4"})
V100 = Capabilities((7, 0), "V100", "2.13.0", {"triton": "3.9.0", "flash_attn": "2.7.4"})
BF16 = AttentionSpec("cuda", torch.bfloat16, head_dim=128, heads=32, groups=8)


def preferred(op: str, spec: Spec, machine: Capabilities) -> str:
    """The first implementation that can serve `spec` on `machine` (not loaded: its packages are not here)."""
    return next(e.name for e in registry.entries(op) if e.refusal(spec, machine) is None)


def test_preference_follows_the_machine() -> None:
    assert preferred("core_attention", AttentionSpec(), LAPTOP) == "blocked"
    assert preferred("core_attention", BF16, H100) == "flash_attn"
    assert preferred("core_attention", AttentionSpec("cuda", torch.float32), H100) == "sdpa"
    assert (
        preferred("core_attention", AttentionSpec("cuda", torch.bfloat16, packed=True), V100)
        == "matmul_softmax"
    )
    without_flash = Capabilities((9, 0), "H100", "2.13.0", {"triton": "3.9.0"})
    assert (
        preferred("core_attention", AttentionSpec("cuda", torch.bfloat16, packed=True), without_flash)
        == "triton"
    )
    assert preferred("rms_norm", Spec("cuda", torch.bfloat16), H100) == "triton"
    assert preferred("rms_norm", Spec("cuda", torch.float64), H100) == "torch"
    assert preferred("rms_norm", Spec("cpu", torch.float32), H100) == "torch", (
        "the run uses the CPU of a GPU machine"
    )
    assert preferred("adam", Spec("cuda"), H100) == "torch"


def test_every_attention_spec_has_a_provider_without_context_parallelism() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bits in range(64):
            masked, packed, dropout, window, scaling, causal = (bool(bits >> i & 1) for i in range(6))
            for device, machine in (("cpu", LAPTOP), ("cuda", H100), ("cuda", V100)):
                spec = AttentionSpec(
                    device, dtype, masked=masked, packed=packed, dropout=dropout, window=window,
                    layer_scaling=scaling, causal=causal,
                )  # fmt: skip
                assert preferred("core_attention", spec, machine)


def test_an_unmet_demand_names_everything_that_is_missing_and_the_way_out() -> None:
    with pretend(LAPTOP), pytest.raises(FlagError) as error:
        registry.select("core_attention", AttentionSpec(), demand=Demand("flash_attn", "--use-flash-attn"))
    assert str(error.value) == (
        "--use-flash-attn: core_attention/flash_attn cannot run here: needs a CUDA device; "
        "needs flash_attn>=2.1, not installed; takes fp16 or bf16 (add --bf16). Fix: drop the flag to use blocked."
    )
    with pytest.raises(FlagError, match=r"there is no core_attention/magic.*choose one of"):
        registry.select("core_attention", AttentionSpec(), demand="magic")


def test_reasons_are_precise() -> None:
    flash = next(e for e in registry.entries("core_attention") if e.name == "flash_attn")
    assert flash.refusal(BF16, V100) == "needs compute capability 8.0, this device has 7.0"
    old = Capabilities((9, 0), "H100", "2.13.0", {"flash_attn": "2.0.9"})
    assert flash.refusal(BF16, old) == "needs flash_attn>=2.1, 2.0.9 is installed"
    assert flash.refusal(AttentionSpec("cuda", torch.bfloat16, head_dim=288), H100) == (
        "takes head sizes that are multiples of 8 up to 256, not 288"
    )
    assert flash.refusal(AttentionSpec("cpu", torch.bfloat16), H100) == (
        "needs tensors on a CUDA device, this run uses cpu"
    )


def test_the_scan_is_chosen_by_type_and_sizes() -> None:
    bf16 = ScanSpec("cuda", torch.bfloat16, width=64, state=128)
    assert preferred("state_space_scan", bf16, H100) == "triton"
    assert preferred("state_space_scan", replace(bf16, dtype=torch.float16), H100) == "triton"
    for spec, machine, reason in (
        (replace(bf16, device="cpu"), LAPTOP, "needs a CUDA device; needs triton>=3.0, not installed"),
        (bf16, V100, "needs compute capability 8.0, this device has 7.0"),
        (replace(bf16, dtype=torch.float32), H100, "takes fp16 or bf16 (add --bf16)"),
        (replace(bf16, state=256), H100, "takes heads and states of up to 128 numbers, not 256"),
    ):
        assert preferred("state_space_scan", spec, machine) == "torch"
        triton = next(e for e in registry.entries("state_space_scan") if e.name == "triton")
        assert triton.refusal(spec, machine) == reason


def test_a_met_demand_overrides_rank_and_allow_limits_preference() -> None:
    eager = registry.select("core_attention", AttentionSpec(), demand="matmul_softmax")
    assert eager.__name__ == "matmul_softmax"
    assert registry.report()[-1].demanded
    assert registry.select("core_attention", AttentionSpec(head_dim=8), allow=("sdpa",)).__name__ == "sdpa"
    with pytest.raises(
        ValueError, match=r"no implementation of core_attention.*flash_attn: needs a CUDA device"
    ):
        registry.select("core_attention", AttentionSpec(), allow=("flash_attn",))
    with pytest.raises(ValueError, match="unknown operation 'atention'"):
        registry.select("atention", Spec())


def test_report_tells_who_was_passed_over_and_why() -> None:
    registry.forget_choices()
    with pretend(LAPTOP):
        registry.select("rms_norm", Spec())
        registry.select("rms_norm", Spec())
    (choice,) = registry.report()
    assert (choice.op, choice.chosen, choice.demanded) == ("rms_norm", "torch", False)
    assert choice.refused == (("triton", "needs a CUDA device; needs triton>=3.0, not installed"),)


def test_table_hash_is_equal_on_equal_machines_whatever_was_chosen() -> None:
    with pretend(H100):
        first = registry.table_hash()
        registry.entries("rope")
        assert registry.table_hash() == first
    with pretend(Capabilities((9, 0), "another name", "2.13.0", {"triton": "3.9.0", "flash_attn": "2.7.4"})):
        assert registry.table_hash() == first, "the marketing name of the device decides nothing"
    with pretend(V100):
        assert registry.table_hash() != first


def test_names_are_registered_once_and_versions_compare_as_numbers() -> None:
    with pytest.raises(ValueError, match="rms_norm/torch is registered twice"):
        registry.entries("rms_norm") and registry.register("rms_norm", "torch", rank=1)(lambda: max)
    assert version_tuple("2.13.0+cpu") == (2, 13, 0) > version_tuple("2.9rc1") == (2, 9)
    assert Needs(packages={"x": "2.10"}).missing(Capabilities(packages={"x": "2.9"})) == [
        "needs x>=2.10, 2.9 is installed"
    ]
    assert probe() is probe()


def test_importing_and_selecting_loads_no_optional_package() -> None:
    code = (
        "import sys, torch\n"
        "from megatron.core.kernels import registry\n"
        "from megatron.core.fusions.core_attention import AttentionSpec\n"
        "for op in registry.PROVIDERS:\n"
        "    registry.select(op, AttentionSpec())\n"
        "heavy = {'triton', 'transformer_engine', 'flash_attn', 'apex'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
