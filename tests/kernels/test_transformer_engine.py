"""The TransformerEngine wrappers against a double of that package which records what it is given.

The package itself needs a GPU; what is checked here is the translation of our configuration into its
arguments, the form of the results, and that nothing imports it by accident.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

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
