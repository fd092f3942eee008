"""Rotary position embedding: the table of angles and its application to queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core import device, parallel_state
from megatron.core.fusions.fused_rope import fused_rope, rope_eager
from megatron.core.inference_params import InferenceParams
from megatron.core.kernels import registry
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = [
    "FrequencyScaling",
    "RotaryEmbedding",
    "apply_rotary_pos_emb",
    "apply_rotary_pos_emb_bshd",
    "apply_rotary_pos_emb_thd",
    "choose_rotation",
    "get_pos_emb_on_this_cp_rank",
]


@dataclass(frozen=True)
class FrequencyScaling:
    """Stretch slow rotations for longer contexts, as Llama 3.1 does (arXiv:2407.21783, section 3.4.2).

    Wavelengths beyond original_length / low are slowed by `factor`, those below original_length / high are
    kept, and those between blend. Lengths in tokens.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def apply(self, inv_freq: Tensor) -> Tensor:
        """Angular frequencies [d/2] -> scaled [d/2]."""
        turns = self.original_length * inv_freq / (2 * math.pi)
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        return inv_freq * (keep + (1.0 - keep) / self.factor)


def get_pos_emb_on_this_cp_rank(pos_emb: Tensor, seq_dim: int, pg_collection: Any = None) -> Tensor:
    """The part of a table [.., s, ..] for this context parallel rank's positions.

    The sequence is cut in 2 cp pieces of which rank r holds r and 2 cp - 1 - r, so that causal work is even.
    """
    groups = parallel_state.resolve(pg_collection)
    cp, rank = groups.size("cp"), groups.rank("cp")
    pieces = pos_emb.chunk(2 * cp, dim=seq_dim)
    return torch.cat((pieces[rank], pieces[2 * cp - 1 - rank]), dim=seq_dim)


class RotaryEmbedding(nn.Module):
    """Angles position * base^(-2i/d) for the first `rotary_percent` of each head (Su et al.,
    arXiv:2104.09864).

    `seq_len_interpolation_factor` divides positions (linear interpolation, arXiv:2306.15595); `rope_scaling`
    changes frequencies. Nothing is stored in checkpoints.
    """

    def __init__(
        self,
        kv_channels: int,
        rotary_percent: float,
        rotary_interleaved: bool = False,
        seq_len_interpolation_factor: float | None = None,
        rotary_base: float = 10000,
        use_cpu_initialization: bool = False,
        *,
        rope_scaling: FrequencyScaling | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        dim = int(kv_channels * rotary_percent) if rotary_percent < 1.0 else kv_channels
        if dim < 2 or dim % 2:
            raise ValueError(
                f"rotary embedding of {dim} of {kv_channels} channels cannot be paired; choose --rotary-percent (and "
                "--kv-channels) so that an even number of channels turns"
            )
        self.rotary_interleaved = rotary_interleaved
        self.seq_len_interpolation_factor = seq_len_interpolation_factor
        self.cp_size = parallel_state.resolve(pg_collection).size("cp")
        self.pg_collection = pg_collection
        where = torch.device("cpu") if use_cpu_initialization else device.current()
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=where) / dim
        # A plain attribute, not a buffer: converting the model to half precision must not round the
        # frequencies.
        self.inv_freq = 1.0 / (rotary_base**exponent)
        if rope_scaling is not None:
            self.inv_freq = rope_scaling.apply(self.inv_freq)
        self._table: tuple[int, int, Tensor] | None = None

    def forward(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """fp32 angles [max_seq_len, 1, 1, d] of positions offset .. offset + max_seq_len - 1.

        Both members of a pair carry the same angle. With context parallelism only this rank's max_seq_len /
        cp rows.
        """
        if self._table is not None and self._table[:2] == (max_seq_len, offset):
            return self._table[2]
        if self.inv_freq.device != device.current():
            self.inv_freq = self.inv_freq.to(device.current())
        positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=self.inv_freq.dtype) + offset
        if self.seq_len_interpolation_factor is not None:
            positions = positions / self.seq_len_interpolation_factor
        angles = torch.outer(positions, self.inv_freq)
        if self.rotary_interleaved:
            table = angles.repeat_interleave(2, dim=-1)
        else:
            table = torch.cat((angles, angles), dim=-1)
        table = table[:, None, None, :]
        if self.cp_size > 1:
            table = get_pos_emb_on_this_cp_rank(table, 0, self.pg_collection)
        if not torch.is_inference_mode_enabled():  # a table made there could not take part in training later
            self._table = (max_seq_len, offset, table)
        return table

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Old checkpoints stored the frequencies; they are computed, so the key is dropped."""
        state_dict.pop(f"{prefix}inv_freq", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def get_rotary_seq_len(
        self,
        inference_params: InferenceParams | None,
        transformer: nn.Module,
        transformer_input: Tensor | None,
        transformer_config: TransformerConfig,
    ) -> int:
        """How many positions the table must cover for this input [s/sp/cp, b, h]: the whole sequence, or
        the cache.
        """
        if inference_params is not None:
            return inference_params.max_sequence_length
        received = getattr(transformer, "input_tensor", None)
        sequence = transformer_input if received is None else received
        if sequence is None:
            raise ValueError(
                "the stage has neither an input nor an input tensor to take the sequence length from"
            )
        length = sequence.size(0)
        if transformer_config.sequence_parallel:
            length *= transformer_config.tensor_model_parallel_size
        return length * transformer_config.context_parallel_size


def apply_rotary_pos_emb_bshd(t: Tensor, freqs: Tensor, rotary_interleaved: bool = False) -> Tensor:
    """Rotate t [s, b, np, hn] by angles [s, 1, 1, d]; channels from d on pass."""
    return fused_rope(t, freqs, rotary_interleaved)


def apply_rotary_pos_emb_thd(
    t: Tensor, cu_seqlens: Tensor, freqs: Tensor, rotary_interleaved: bool = False
) -> Tensor:
    """Rotate packed documents t [tokens, np, hn], each from position 0; cu_seqlens [documents + 1]."""
    return fused_rope(t, freqs, rotary_interleaved, cu_seqlens)


def apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, config: TransformerConfig, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Rotate t [s, b, np, hn], or with cu_seqlens packed documents [tokens, np, hn], by angles [s, 1, 1, d]."""
    rotate = fused_rope if config.apply_rope_fusion else rope_eager
    return rotate(t, freqs, config.rotary_interleaved, cu_seqlens)


def choose_rotation(config: TransformerConfig) -> Callable[[Tensor, Tensor, bool, Tensor | None], Tensor]:
    """The function (t, freqs, interleaved, cu_seqlens) -> rotated t that serves this configuration on this device."""
    if not config.apply_rope_fusion:
        return rope_eager
    return registry.select("rope", registry.Spec(device.kind(), config.params_dtype))
