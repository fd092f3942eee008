"""The TransformerEngine wrappers against a double of that package which records what it is given.

The package itself needs a GPU; what is checked here is the translation of our configuration into its
arguments, the form of the results, and that nothing imports it by accident.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megatron.core import device
from megatron.core.errors import ConfigError
from megatron.core.kernels import registry
from megatron.core.kernels.capability import Capabilities, pretend
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

PACKAGE = "megatron.core.extensions.transformer_engine"


class Recorder(torch.nn.Module):
    """Keeps the constructor's arguments; forward returns them with those of the call."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.args, self.options = args, options

    def forward(self, *args: Any, **options: Any) -> Any:
        self.call = options
        out = args[0] * 2
        return (out, "bias") if self.options.get("return_bias") else out


@pytest.fixture
def wrappers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    te = types.ModuleType("transformer_engine")
    layers = ("Linear", "LayerNormLinear", "LayerNorm", "RMSNorm", "DotProductAttention")
    te.pytorch = types.SimpleNamespace(**{name: type(name, (Recorder,), {}) for name in layers})
    te.pytorch.distributed = types.SimpleNamespace(CudaRNGStatesTracker=object, checkpoint=None)
    te.common = types.SimpleNamespace(recipe=types.SimpleNamespace(DelayedScaling=object))
    monkeypatch.setitem(sys.modules, "transformer_engine", te)
    yield importlib.import_module(PACKAGE)
    for name in [n for n in sys.modules if n.startswith(PACKAGE)]:
        del sys.modules[name]


def config(**fields: Any) -> TransformerConfig:
    base: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**(base | fields))


def linear(wrappers: Any, kind: str, **fields: Any) -> Any:
    options: dict[str, Any] = {
        "config": config(), "init_method": torch.nn.init.zeros_, "bias": True, "skip_bias_add": True, "is_expert": False,
    }  # fmt: skip
    return getattr(wrappers, kind)(32, 64, **(options | fields))


def test_linears_say_how_they_are_divided_and_return_output_and_bias(wrappers: Any) -> None:
    x = torch.ones(2, 1, 32)
    column = linear(wrappers, "TEColumnParallelLinear", gather_output=False)
    row = linear(wrappers, "TERowParallelLinear", input_is_parallel=True, skip_bias_add=False)
    fused = linear(wrappers, "TELayerNormColumnParallelLinear", gather_output=False)
    assert [m.options["parallel_mode"] for m in (column, row, fused)] == ["column", "row", "column"]
    assert column(x)[1] == "bias" and row(x)[1] is None and fused(x)[1] == "bias"
    assert torch.equal(row(x)[0], 2 * x)
    assert row.options["in_features"] == 32 and row.options["out_features"] == 64
    assert fused.options["normalization"] == "LayerNorm" and fused.options["eps"] == 1e-5


def test_layers_are_told_what_to_overlap(wrappers: Any) -> None:
    """The names of TransformerEngine's arguments are those of its documentation; experts take no part."""
    overlapping = config(
        tensor_model_parallel_size=2, sequence_parallel=True, tp_comm_overlap=True,
        tp_comm_overlap_rs=False, tp_comm_bulk_wgrad=False, tp_comm_overlap_disable_qkv=True,
    )  # fmt: skip

    def told(kind: str, name: str, **fields: Any) -> dict[str, Any]:
        layer = linear(wrappers, kind, config=overlapping, tp_comm_buffer_name=name, **fields)
        return {key: value for key, value in layer.options.items() if key.startswith("ub_")}

    assert told("TERowParallelLinear", "proj", input_is_parallel=True) == {
        "ub_name": "proj", "ub_overlap_ag": True, "ub_overlap_rs": False,
    }  # fmt: skip
    bulk = {"ub_overlap_rs_dgrad": False, "ub_bulk_dgrad": True, "ub_bulk_wgrad": False}
    for name, gathers in (("qkv", False), ("fc1", True)):
        fused = told("TELayerNormColumnParallelLinear", name, gather_output=False)
        assert fused == {"ub_name": name, "ub_overlap_ag": gathers, **bulk}
    assert told("TEColumnParallelLinear", "fc1", gather_output=False, is_expert=True) == {}
    assert "ub_name" not in linear(wrappers, "TEColumnParallelLinear", gather_output=False).options


def test_buffers_are_started_for_the_tokens_of_a_pass(wrappers: Any) -> None:
    started: list[dict[str, Any]] = []

    def initialize_ub(shape: Any, tp_size: Any, use_fp8: Any, ub_cfgs: Any, bootstrap_backend: Any) -> None:
        started.append(locals() | {"started": None})

    te = sys.modules["transformer_engine"]
    te.pytorch.module = types.SimpleNamespace(base=types.SimpleNamespace(initialize_ub=initialize_ub))
    wrappers.start_user_buffers(
        config(tensor_model_parallel_size=2), 48, {"qkv_fprop": {"method": "ring_exchange"}}
    )
    (call,) = started
    assert (call["shape"], call["tp_size"], call["use_fp8"]) == ([48, 32], 2, False)
    assert call["ub_cfgs"] == {"qkv_fprop": {"method": "ring_exchange"}}
    assert call["bootstrap_backend"] == "nccl"


def test_fp8_weights_are_refreshed_in_the_first_microbatch_only(wrappers: Any) -> None:
    column = linear(wrappers, "TEColumnParallelLinear", gather_output=False)
    column(torch.ones(1, 1, 32))
    assert column.call == {"is_first_microbatch": True}
    column(torch.ones(1, 1, 32))
    assert column.call == {"is_first_microbatch": False}


def test_what_the_package_cannot_do_is_refused(wrappers: Any) -> None:
    with pytest.raises(ValueError, match="cannot gather"):
        linear(wrappers, "TEColumnParallelLinear", gather_output=True)
    with pytest.raises(ValueError, match="divided input"):
        linear(wrappers, "TERowParallelLinear", input_is_parallel=False)
    with pytest.raises(ValueError, match="query-key layer scaling"):
        wrappers.TEDotProductAttention(
            config(apply_query_key_layer_scaling=True), 1, AttnMaskType.causal, "self"
        )


def test_norm_follows_the_configuration(wrappers: Any) -> None:
    norm = wrappers.TENorm(config(normalization="RMSNorm", layernorm_zero_centered_gamma=True), 32, 1e-6)
    assert type(norm).__name__ == "RMSNorm" and norm.args == (32,)
    assert norm.options == {"eps": 1e-6, "sequence_parallel": False, "zero_centered_gamma": True}


def test_packed_documents_are_padding_to_the_package(wrappers: Any) -> None:
    attention = wrappers.TEDotProductAttention(config(attention_dropout=0.2), 3, AttnMaskType.causal, "self")
    assert attention.options["attention_dropout"] == 0.2 and attention.options["layer_number"] == 3
    edges = torch.tensor([0, 2, 5], dtype=torch.int32)
    q = torch.ones(5, 4, 8)
    attention(q, q, q, None, AttnMaskType.causal, PackedSeqParams("thd", edges, edges, 3, 3))
    assert attention.call["attn_mask_type"] == "padding_causal" and attention.call["cu_seqlens_q"] is edges
    attention(q, q, q, None, AttnMaskType.causal)
    assert attention.call == {"attn_mask_type": "causal"}


def test_a_given_mask_is_looked_at(wrappers: Any) -> None:
    attention = wrappers.TEDotProductAttention(config(), 1, AttnMaskType.causal, "self")
    q = torch.ones(5, 1, 4, 8)
    attention(q, q, q, torch.ones(5, 5, dtype=torch.bool), AttnMaskType.causal)
    assert attention.call == {"attn_mask_type": "arbitrary"}
    attention(q, q, q, None, AttnMaskType.padding)
    assert attention.call == {"attn_mask_type": "padding"}


H100 = Capabilities((9, 0), "H100", torch.__version__, {"transformer_engine": "2.4"})


def test_the_layer_is_of_that_package_where_it_can_run(wrappers: Any) -> None:
    registry.forget_choices()
    with pretend(H100), device.planning("cuda"):
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    assert registry.report()[-1].chosen == "transformer_engine"
    assert spec.module.__name__ == "TETransformerLayer"
    layer = build_module(spec, config=config(), layer_number=1)
    parts = {name: type(module).__name__ for name, module in layer.named_modules()}
    assert parts["self_attention.linear_qkv"] == parts["mlp.linear_fc1"] == "TELayerNormColumnParallelLinear"
    assert parts["self_attention.core_attention"] == "TEDotProductAttention"
    assert parts["self_attention.q_layernorm"] == "LayerNorm"
    assert parts["input_layernorm"] == parts["pre_mlp_layernorm"] == "IdentityOp", (
        "fused into the linear layers"
    )
    with pretend(H100), device.planning("cuda"):
        experts = get_gpt_layer_with_transformer_engine_spec(num_experts=4)
    assert experts.submodules.mlp.submodules.linear_fc1.__name__ == "TEColumnParallelLinear"


def test_elsewhere_it_is_our_own_and_the_table_says_why() -> None:
    registry.forget_choices()
    with pretend(Capabilities()):
        spec = get_gpt_layer_with_transformer_engine_spec(fp8="hybrid")
    assert spec.module is TransformerLayer
    (choice,) = registry.report()
    assert choice.refused == (
        ("transformer_engine", "needs a CUDA device; needs transformer_engine>=1.0, not installed"),
    )


def test_fp8_layers_run_under_the_packages_context(wrappers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions.transformer_engine import layer as te_layer

    entered: list[Any] = []

    @contextmanager
    def fp8_autocast(**options: Any) -> Iterator[None]:
        entered.append(options)
        yield

    te = sys.modules["transformer_engine"]
    te.pytorch.fp8_autocast = fp8_autocast
    te.common.recipe.Format = types.SimpleNamespace(HYBRID="hybrid format", E4M3="e4m3 format")
    te.common.recipe.Float8CurrentScaling = lambda fp8_format: ("current", fp8_format)
    monkeypatch.setattr(te_layer.parallel_state, "get_amax_reduction_group", lambda *_: "ranks")
    with monkeypatch.context() as patched:
        patched.setattr(te_layer.TransformerLayer, "forward", lambda self, x: (x, None))
        for fields, expected in (
            ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, [("current", "hybrid format")]),
            ({"fp8": None}, []),
        ):
            entered.clear()
            module = build_module(te_layer.gpt_layer_spec(), config=config(**fields), layer_number=1)
            module(torch.ones(1))
            assert [options["fp8_recipe"] for options in entered] == expected
    with pytest.raises(ConfigError, match="recompute"):
        build_module(
            te_layer.gpt_layer_spec(),
            config=config(fp8="e4m3", fp8_recipe="tensorwise", recompute_granularity="selective"),
            layer_number=1,
        )
