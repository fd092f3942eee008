"""Layers as recorded functions: what is recorded, what is replayed, and that gradients are those of the layer.

Recording needs a GPU (tests/kernels/test_gpu.py); here a double runs the modules as the recorder would, warm-up included.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core import device
from megatron.core.errors import ConfigError
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.cuda_graphs import record_layers
from megatron.core.transformer.transformer_config import TransformerConfig

S, B, V = 16, 2, 32


def config(**fields: Any) -> TransformerConfig:
    base: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "use_cpu_initialization": True,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "enable_cuda_graph": True,
    }  # fmt: skip
    return TransformerConfig(**(base | fields))


def gpt(fields: TransformerConfig, rope: bool) -> GPTModel:
    torch.manual_seed(3)
    kind = "rope" if rope else "learned_absolute"
    return GPTModel(fields, get_gpt_layer_local_spec(), V, S, position_embedding_type=kind)


class Recorder:
    """Runs forward and backward three times as torch.cuda.make_graphed_callables does, and counts replays."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(
        self, modules: tuple[torch.nn.Module, ...], samples: tuple[tuple[Any, ...], ...]
    ) -> tuple[Any, ...]:
        for module, sample in zip(modules, samples):
            inputs = (*(x for x in sample if x.requires_grad), *module.parameters())
            for _ in range(3):
                output = module(*sample)
                torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True)
        return tuple(self._counted(module) for module in modules)

    def _counted(self, module: torch.nn.Module) -> Any:
        def replay(*inputs: torch.Tensor) -> torch.Tensor:
            self.replays += 1
            return module(*inputs)

        return replay


@pytest.mark.parametrize("fields", [{}, {"fp8": "hybrid", "fp8_recipe": "tensorwise"}], ids=["plain", "fp8"])
@pytest.mark.parametrize("rope", [False, True])
def test_a_recorded_model_computes_the_same(rope: bool, fields: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, recorded = gpt(config(**fields), rope), gpt(config(**fields), rope)
    recorder = Recorder()
    monkeypatch.setattr(device, "record_graphs", recorder)
    assert record_layers([recorded], recorded.config, S, B) == 2
    tokens = torch.randint(V, (B, S))
    for step in range(2):
        for model in (plain, recorded):
            model.zero_grad()
            model.set_is_first_microbatch()
            model(tokens, torch.arange(S).expand(B, S), None, labels=tokens).mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * parameter.grad)
        assert recorder.replays == 2 * (step + 1)
    for (name, mine), theirs in zip(recorded.named_parameters(), plain.parameters()):
        assert torch.equal(mine, theirs), name
    assert set(recorded.state_dict()) == set(plain.state_dict())


def test_other_calls_run_the_layer_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorder = gpt(config(), rope=True), Recorder()
    monkeypatch.setattr(device, "record_graphs", recorder)
    record_layers([model], model.config, S, B)
    short = torch.randint(V, (B, S // 2))
    model(short, torch.arange(S // 2).expand(B, S // 2), None)
    tokens, positions = torch.randint(V, (B, S)), torch.arange(S).expand(B, S)
    model(tokens, positions, torch.zeros(1, 1, S, S, dtype=torch.bool))
    with torch.no_grad():
        model(tokens, positions, None)
    model.eval()
    model(tokens, positions, None)
    assert recorder.replays == 0


def test_without_an_accelerator_nothing_is_recorded() -> None:
    with pytest.raises(RuntimeError, match="only an accelerator"):
        record_layers([gpt(config(), rope=False)], config(), S, B)
    with pytest.raises(ConfigError, match="delayed scales"):
        config(fp8="hybrid")
