"""Documents packed into one row: their losses and gradients are those of each document alone, on every attention path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.kernels import registry
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.training.batch import get_ltor_masks_and_position_ids

EOD, LENGTH = 31, 150
# Documents with their end: one of a single token, some longer than a block of queries; the last is cut off.
SIZES = (70, 1, 3, 66, 10)
MODELS: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "rotary, grouped queries": {"positions": "rope", "num_query_groups": 2},
    "recomputed attention": {"recompute_granularity": "selective"},
    "layer scaling": {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
}


def build(positions: str = "learned_absolute", **changes: Any) -> GPTModel:
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0, **changes
    )  # fmt: skip
    torch.manual_seed(7)
    model = GPTModel(
        config, get_gpt_layer_local_spec(), EOD + 1, LENGTH, position_embedding_type=positions
    ).double()
    with (
        torch.no_grad()
    ):  # biases start at zero and norms at one: in general position a mistake in either shows
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def row() -> tuple[Tensor, Tensor]:
    """Tokens and labels [1, s]."""
    text = torch.randint(0, EOD, (LENGTH + 1,), generator=torch.Generator().manual_seed(3))
    text[torch.tensor(SIZES[:-1]).cumsum(0) - 1] = EOD
    return text[None, :-1], text[None, 1:]


def gradients(model: GPTModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model: GPTModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [s] of each document run by itself, its end left out, and the gradients of their sum."""
    tokens, labels = row()
    losses = []
    for document, following in zip(tokens[0].split(SIZES), labels[0].split(SIZES)):
        loss = model(document[None], torch.arange(document.numel())[None], None, labels=following[None])[0]
        losses.append(loss * (document != EOD))
    together = torch.cat(losses)
    return together.detach(), gradients(model, together.sum())


def with_masks(model: GPTModel) -> Tensor:
    """Losses [s] of the row, as `--reset-position-ids --reset-attention-mask --eod-mask-loss` make its masks."""
    tokens, labels = row()
    attention_mask, loss_mask, positions = get_ltor_masks_and_position_ids(tokens, EOD, True, True, True)
    return (model(tokens, positions, attention_mask, labels=labels) * loss_mask)[0]


def with_offsets(model: GPTModel) -> Tensor:
    """Losses [s] of the row with the offsets of its documents, which variable-length kernels take."""
    tokens, labels = row()
    _, loss_mask, positions = get_ltor_masks_and_position_ids(tokens, EOD, True, True, True)
    offsets = torch.tensor([0, *torch.tensor(SIZES).cumsum(0)], dtype=torch.int32)
    packed = PackedSeqParams("thd", offsets, offsets, max(SIZES), max(SIZES))
    return (model(tokens, positions, None, labels=labels, packed_seq_params=packed) * loss_mask)[0]


@pytest.mark.parametrize("run", [with_masks, with_offsets])
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("path", ["matmul_softmax", "sdpa", "blocked"])
def test_packed_gradients_are_the_sum_of_the_documents(
    path: str, model_name: str, run: Callable[[GPTModel], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    select = registry.select

    def select_path(operation: str, *arguments: Any, **options: Any) -> Any:
        if operation == "core_attention":
            options["allow"] = (path,)
        return select(operation, *arguments, **options)

    monkeypatch.setattr(registry, "select", select_path)
    model = build(**MODELS[model_name])
    # Under masks a document is rotated by its place in the row, and the tables of sines are kept in fp32.
    bound = 1e-7 if "rotary" in model_name and run is with_masks else 1e-11
    expected_losses, expected = alone(model)
    losses = run(model)
    torch.testing.assert_close(losses, expected_losses, rtol=bound, atol=bound)
    actual = gradients(model, losses.sum())
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max() / gradient.abs().max()
        assert error < bound, f"{name}: {error:.1e}"


def test_without_resets_documents_do_differ() -> None:
    """The comparison above is not one of things that are equal anyway."""
    model = build()
    tokens, labels = row()
    losses = model(tokens, torch.arange(LENGTH)[None], None, labels=labels)[0]
    assert (losses - alone(model)[0]).abs().max() > 1e-3
