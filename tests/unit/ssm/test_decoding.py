"""Token by token with states equals the whole forward pass; states belong to samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.core.inference_params import InferenceParams
from megatron.core.models.mamba import MambaModel
from megatron.core.transformer import TransformerConfig
from tests.unit.ssm.support import toy_stack_spec

VOCAB, LENGTH, BATCH = 64, 19, 3


def model(**changes: object) -> MambaModel:
    config = TransformerConfig(
        num_layers=6, hidden_size=16, num_attention_heads=4, init_method_std=0.5, normalization="RMSNorm"
    )
    kinds = {"hybrid_override_pattern": "MM*-MM", "position_embedding_type": "rope", **changes}
    return MambaModel(config, toy_stack_spec, VOCAB, LENGTH, **kinds).double().eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def windows(model: MambaModel, tokens: Tensor, cuts: list[int], params: InferenceParams) -> Tensor:
    """Logits [b, s, v] of the windows between the cuts, one after the other."""
    logits = []
    for start, stop in zip([0, *cuts], [*cuts, tokens.size(1)]):
        positions = torch.arange(start, stop).expand(tokens.size(0), -1)
        logits.append(model(tokens[:, start:stop], positions, None, inference_params=params))
        params.sequence_len_offset += stop - start
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("positions", ["rope", "none", "learned_absolute"])
@pytest.mark.parametrize("cuts", [[*range(7, LENGTH)], [*range(1, LENGTH)], [2, 3, 10], []], ids=len)
def test_windows_equal_the_whole(tokens: Tensor, cuts: list[int], positions: str) -> None:
    """A prompt, then one token after the other, or several at a time; windows shorter than the convolution too."""
    ours = model(position_embedding_type=positions)
    whole = ours(tokens, torch.arange(LENGTH).expand_as(tokens), None)
    params = InferenceParams(BATCH, LENGTH)
    torch.testing.assert_close(windows(ours, tokens, cuts, params), whole, rtol=1e-11, atol=1e-11)


def test_samples_keep_their_states(tokens: Tensor) -> None:
    """Rows given in parts of the batch, and reordered half way as beam search does."""
    ours = model()
    params = InferenceParams(BATCH, LENGTH)
    with torch.no_grad():
        for first, stop in ((0, 2), (2, 3)):
            params.batch_size_offset = first
            ours(
                tokens[first:stop, :10],
                torch.arange(10).expand(stop - first, -1),
                None,
                inference_params=params,
            )
    params.batch_size_offset, params.sequence_len_offset = 0, 10
    order = [2, 0, 0]
    params.swap_key_value_dict(order)
    shuffled = torch.cat((tokens[order, :10], tokens[:, 10:]), dim=1)
    whole = ours(shuffled, torch.arange(LENGTH).expand_as(tokens), None)
    with torch.no_grad():
        for t in range(10, LENGTH):
            logits = ours(shuffled[:, t : t + 1], torch.full((BATCH, 1), t), None, inference_params=params)
            torch.testing.assert_close(logits[:, 0], whole[:, t], rtol=1e-11, atol=1e-11)
            params.sequence_len_offset += 1


def test_a_new_batch_begins_with_empty_states(tokens: Tensor) -> None:
    ours = model()
    params = InferenceParams(BATCH, LENGTH)
    first = windows(ours, tokens, [5], params)
    params.sequence_len_offset = 0
    torch.testing.assert_close(windows(ours, tokens, [5], params), first)
    with pytest.raises(ValueError, match="state cache"):
        params.sequence_len_offset, params.batch_size_offset = 0, 1
        windows(model(hybrid_override_pattern="MMMMMM"), tokens, [], params)


def test_states_of_a_stack_are_allocated_by_layer() -> None:
    caches = model().decoder.allocate_inference_cache(2, LENGTH)
    assert list(caches) == [0, 1, 4, 5]
    conv, ssm = caches[4]
    channels = 2 * 16 + 2 * 4 * 8
    assert conv.shape == (2, channels, 4) and ssm.shape == (2, 8, 4, 8)
    assert not conv.any() and not ssm.any()


def test_states_are_summed_up_in_single_precision() -> None:
    ours = model().bfloat16()
    conv, ssm = ours.decoder.layers[0].allocate_inference_cache(2, LENGTH)
    assert conv.dtype is torch.bfloat16 and ssm.dtype is torch.float32
