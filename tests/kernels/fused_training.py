"""A small GPT trained with all fused paths beside the same model trained with none."""

from __future__ import annotations

from unittest import mock

import torch

from megatron.core import device
from megatron.core.kernels import capability, registry
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

S, B, V = 8, 2, 64
FUSED = {"layer_norm", "bias_gelu", "bias_dropout_add", "rope", "vocab_cross_entropy"}


def losses(kernels: str, where: str, steps: int) -> list[float]:
    """Losses of gradient descent with `kernels`: "eager", or all fused operations from "torch" or "triton"."""
    fused = kernels != "eager"
    torch.manual_seed(4)
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=2, ffn_hidden_size=48, hidden_dropout=0.0,
        attention_dropout=0.0, use_cpu_initialization=True, bias_activation_fusion=fused, bias_dropout_fusion=fused,
        apply_rope_fusion=fused, cross_entropy_loss_fusion=fused, persist_layer_norm=fused, masked_softmax_fusion=fused,
        attention_softmax_in_fp32=True,
    )  # fmt: skip
    if not fused:  # the fused gelu is the tanh form
        config.activation_func = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    packages = {"triton": "3.6"} if kernels == "triton" else {}
    machine = capability.Capabilities((9, 0), "this device", torch.__version__, packages)
    kind = "cuda" if kernels == "triton" else where
    registry.forget_choices()
    with capability.pretend(machine), mock.patch.object(device, "kind", return_value=kind):
        model = GPTModel(config, get_gpt_layer_local_spec(), V, S, position_embedding_type="rope").to(where)
        chosen = {choice.op: choice.chosen for choice in registry.report()}
        assert not fused or all(chosen[op] == kernels for op in FUSED), chosen
        data = torch.randint(V, (B, S + 1), generator=torch.Generator().manual_seed(1)).to(where)
        positions = torch.arange(S, device=where).expand(B, S)
        result = []
        for _ in range(steps):
            model.zero_grad()
            loss = model(data[:, :-1], positions, None, labels=data[:, 1:]).mean()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.2 * parameter.grad)
            result.append(loss.item())
    return result


def assert_equal_training(kernels: str, where: str, steps: int, exact_steps: int) -> None:
    """The first steps agree to fp32 rounding; training amplifies it, so later ones within 1 %."""
    eager, fused = losses("eager", where, steps), losses(kernels, where, steps)
    assert eager[-1] < eager[0], "the model learned"
    differences = [abs(a - b) / a for a, b in zip(eager, fused)]
    assert max(differences[:exact_steps]) < 1e-5, differences[:exact_steps]
    assert max(differences) < 1e-2, max(differences)
