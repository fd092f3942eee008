"""Mamba-2's mixer: what stands in the place of attention in a state-space layer (arXiv:2405.21060).

Project to z, x, B, C and dt; convolve and activate (x, B, C) along the sequence; run the state-space recurrence; gate
with z, normalise, project back. Heads and groups are divided over tensor-parallel ranks, each a mixer of its own between
the column-parallel projection and the row-parallel one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from megatron.core import device, parallel_state
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.errors import InvariantError
from megatron.core.inference_params import InferenceParams
from megatron.core.kernels import registry
from megatron.core.ssm.sections import cut_sections, mixer_sizes
from megatron.core.ssm.state_space import ScanSpec, causal_conv, scan_step
from megatron.core.tensor_parallel import get_cuda_rng_tracker, placement
from megatron.core.tensor_parallel.placement import Placed, make_sharded_tensors_for_checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import init_method_normal

#: Standard deviation of output projections, divided by the root of the depth; --init-method-std does not reach them.
_OUT_PROJ_STD = 0.02
_ROWS = Placed(dim=0, over="tp")
#: As torch draws the weights of linear and convolution layers: uniform within 1 / sqrt(inputs).
_kaiming = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))


class ExtendedRMSNorm(nn.Module):
    """RMS norm over groups of channels, with a gate: norm(x silu(z)) w, or norm(x) w silu(z)."""

    PLACEMENT = {"weight": _ROWS}  # weight [d_inner/tp]

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps, self.group_size, self.norm_before_gate = eps, group_size or hidden_size, norm_before_gate
        placement.apply(self)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x, z [.., d_inner/tp] -> the same in the weight's dtype; computed in fp32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, gate = x.to(wide), None if z is None else F.silu(z.to(wide))
        if gate is not None and not self.norm_before_gate:
            x = x * gate
        grouped = x.unflatten(-1, (-1, self.group_size))
        grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        x = grouped.flatten(-2) * self.weight.to(wide)
        if gate is not None and self.norm_before_gate:
            x = x * gate
        return x.to(self.weight.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The weight, divided over tensor-parallel ranks."""
        own = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(own, prefix, {"weight": 0}, sharded_offsets)


@dataclass
class MambaMixerSubmodules:
    """The two projections of a mixer."""

    in_proj: ModuleSpec | type | None = None
    out_proj: ModuleSpec | type | None = None


class MambaMixer(MegatronModule):
    """h -> h through a state per head that is handed on from position to position.

    Arguments are Mamba-2's: `d_state` numbers of state per channel, a convolution over `d_conv` positions, `expand` x
    d_model inner channels in heads of `headdim`, `ngroups` groups of heads that share B and C. `use_mem_eff_path` keeps
    of everything between the projections only its input, and computes it again in the backward pass.
    """

    PLACEMENT = {"dt_bias": _ROWS, "A_log": _ROWS, "D": _ROWS}  # each [np/tp]

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 8,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 128,
        use_mem_eff_path: bool = True,
        layer_number: int | None = None,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        if dt_init != "random" or dt_scale != 1.0:
            raise InvariantError(
                "dt_init, dt_scale",
                "they shape Mamba-1's projection to dt, which Mamba-2 does not have",
                "drop them",
            )
        groups = parallel_state.resolve(pg_collection)
        self.tp_rank, self.tp_size = groups.rank("tp"), groups.size("tp")
        self.sizes = mixer_sizes(d_model, d_state, expand, headdim, ngroups)
        self.local = self.sizes.per_rank(self.tp_size)
        self.d_model, self.d_state, self.d_conv, self.headdim = d_model, d_state, d_conv, headdim
        self.D_has_hdim = D_has_hdim
        self.chunk_size = chunk_size
        self.use_mem_eff_path = use_mem_eff_path
        self.layer_number = layer_number
        scans = ScanSpec(device.kind(), config.params_dtype, width=headdim, state=d_state)
        self._scan = registry.select("state_space_scan", scans)

        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            sum(self.sizes.in_proj.values()),
            config=config,
            init_method=lambda weight: weight,  # drawn section by section below
            gather_output=False,
            bias=bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            pg_collection=pg_collection,
        )
        where = torch.device("cpu") if config.use_cpu_initialization else device.current()
        channels = sum(self.local.conv.values())
        # It holds the parameters under their names; `causal_conv` computes with them.
        self.conv1d = nn.utils.skip_init(
            nn.Conv1d,
            channels,
            channels,
            d_conv,
            groups=channels,
            padding=d_conv - 1,
            bias=conv_bias,
            device=where,
            dtype=config.params_dtype,
        )
        placement.apply(self.conv1d, {"weight": _ROWS, "bias": _ROWS})

        heads = self.local.nheads
        self.dt_bias = Parameter(torch.empty(heads, dtype=config.params_dtype, device=where))
        self.A_log = Parameter(torch.empty(heads, dtype=torch.float32, device=where))
        skip = self.local.d_inner if D_has_hdim else heads
        self.D = Parameter(torch.ones(skip, dtype=torch.float32, device=where))
        placement.apply(self)
        if config.perform_initialization:
            self._draw_parameters(conv_init, A_init_range, (dt_min, dt_max, dt_init_floor))

        self.norm: ExtendedRMSNorm | None = None
        if rmsnorm:
            self.norm = ExtendedRMSNorm(
                self.local.d_inner,
                group_size=self.local.d_inner // self.local.ngroups,
                norm_before_gate=norm_before_gate,
                device=where,
                dtype=config.params_dtype,
            )
        self.out_proj = build_module(
            submodules.out_proj,
            self.sizes.d_inner,
            d_model,
            config=config,
            init_method=init_method_normal(_OUT_PROJ_STD / math.sqrt(config.num_layers)),
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            pg_collection=pg_collection,
        )

    def _draw_parameters(
        self, conv_init: float | None, decay: tuple[float, float], dt: tuple[float, float, float]
    ) -> None:
        """Initial values; `decay`: range of -A, `dt`: smallest, largest and floor of softplus(dt_bias)."""
        dt_min, dt_max, dt_floor = dt
        bound = 1 / math.sqrt(self.d_conv)
        heads = {"heads": self.sizes.nheads}
        draw_conv = _kaiming if conv_init is None else partial(nn.init.uniform_, a=-conv_init, b=conv_init)
        with torch.no_grad():
            self.in_proj.weight.copy_(self._drawn((self.d_model,), self.sizes.in_proj, _kaiming))
            self.conv1d.weight.copy_(self._drawn((1, self.d_conv), self.sizes.conv, draw_conv))
            if self.conv1d.bias is not None:
                uniform = partial(nn.init.uniform_, a=-bound, b=bound)
                self.conv1d.bias.copy_(self._drawn((), self.sizes.conv, uniform))
            share = self._drawn((), heads, nn.init.uniform_)
            spread = (share * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).exp()
            spread = spread.clamp(min=dt_floor)
            self.dt_bias.copy_(spread + torch.log(-torch.expm1(-spread)))  # softplus of it is `spread`
            a, b = decay
            self.A_log.copy_(self._drawn((), heads, partial(nn.init.uniform_, a=a, b=b)).log())

    def _drawn(
        self, rest: tuple[int, ...], sections: Mapping[str, int], draw: Callable[[Tensor], Any]
    ) -> Tensor:
        """This rank's fp32 values [rows/tp, *rest] of a parameter with these sections of rows.

        As other weights: drawn whole from the host generator and cut, or this rank's alone under the tracker.
        """
        rows = sum(sections.values())
        if self.config.use_cpu_initialization:
            whole = torch.empty(rows, *rest)
            draw(whole)
            return cut_sections(whole, list(sections.values()), self.tp_rank, self.tp_size)
        piece = torch.empty(rows // self.tp_size, *rest, device=device.current())
        with get_cuda_rng_tracker().fork():
            draw(piece)
        return piece

    def forward(
        self, hidden_states: Tensor, inference_params: InferenceParams | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s/sp, b, h] -> output [s/sp, b, h] and the unadded bias [h] (None without biases).

        With `inference_params` the positions continue those the cache has seen.
        """
        if inference_params is not None:
            conv_state, ssm_state = self._states(inference_params, hidden_states.size(1))
            if inference_params.sequence_len_offset > 0 and hidden_states.size(0) == 1:
                output, bias, _, _ = self.step(hidden_states, conv_state, ssm_state)
                return output, bias
        projected = self.in_proj(hidden_states)[0].transpose(0, 1)  # [b, s, in_proj/tp]
        if inference_params is not None:
            mixed = self._continue(projected, conv_state, ssm_state)
        elif self.use_mem_eff_path and torch.is_grad_enabled():
            mixed, _ = checkpoint(self._mix, projected, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed, _ = self._mix(projected)
        return self.out_proj(mixed.transpose(0, 1).contiguous())

    def _mix(
        self, projected: Tensor, before: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Everything between the projections.

        projected [b, s, in_proj/tp], before [b, d_conv - 1, c]: what the convolution saw last, state
        [b, np/tp, hn, n] -> [b, s, d_inner/tp] and the state behind the last position.
        """
        z, mixed, dt = self._parts(projected)
        mixed = F.silu(causal_conv(mixed, self.conv1d.weight, self.conv1d.bias, before))
        x, B, C = self._heads(mixed)
        y, state = self._scan(
            x, self._dt(dt), self._A(dt), B, C, self.chunk_size, state, operands=projected.dtype
        )
        return self._gated(y + self._skip(x), z), state

    def _continue(self, projected: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """`_mix` for positions behind those of the states, which move on in place."""
        _, new, _ = self._parts(projected)
        mixed, state = self._mix(projected, conv_state[..., 1:].transpose(1, 2), ssm_state)
        seen = torch.cat((conv_state, new.transpose(1, 2).to(conv_state.dtype)), dim=-1)
        conv_state.copy_(seen[..., -self.d_conv :])
        ssm_state.copy_(state)
        return mixed

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """One position of every sample by the recurrence itself.

        hidden_states [1, b, h], conv_state [b, c, d_conv], ssm_state [b, np/tp, hn, n] -> output [1, b, h], the
        unadded bias, and the states, moved on in place. InvariantError for more positions.
        """
        if hidden_states.size(0) != 1:
            raise InvariantError(
                "step", f"it takes one position, not {hidden_states.size(0)}", "call forward"
            )
        z, mixed, dt = self._parts(self.in_proj(hidden_states)[0].squeeze(0))
        conv_state.copy_(torch.cat((conv_state[..., 1:], mixed.unsqueeze(-1).to(conv_state.dtype)), dim=-1))
        window = conv_state.transpose(1, 2)  # [b, d_conv, c]
        mixed = F.silu(causal_conv(window[:, -1:], self.conv1d.weight, self.conv1d.bias, window[:, :-1]))
        x, B, C = self._heads(mixed.squeeze(1))
        y, state = scan_step(x, self._dt(dt), self._A(dt), B, C, ssm_state)
        ssm_state.copy_(state)
        output, bias = self.out_proj(self._gated(y + self._skip(x), z).unsqueeze(0))
        return output, bias, conv_state, ssm_state

    def _parts(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[.., in_proj/tp] -> z [.., d_inner/tp], (x, B, C) [.., c] and dt [.., np/tp]."""
        sizes = self.local
        z, mixed, dt = projected.split((sizes.d_inner, sum(sizes.conv.values()), sizes.nheads), dim=-1)
        return z, mixed, dt

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, B, C) [.., c] -> x [.., np/tp, hn], B and C [.., ng/tp, n]."""
        x, B, C = mixed.split(list(self.local.conv.values()), dim=-1)
        return (
            x.unflatten(-1, (-1, self.headdim)),
            B.unflatten(-1, (-1, self.d_state)),
            C.unflatten(-1, (-1, self.d_state)),
        )

    def _dt(self, dt: Tensor) -> Tensor:
        """[.., np/tp] -> positive step sizes in fp32."""
        wide = torch.promote_types(dt.dtype, torch.float32)
        return F.softplus(dt.to(wide) + self.dt_bias.to(wide))

    def _A(self, like: Tensor) -> Tensor:
        """Negative decay rates [np/tp] in fp32 (fp64 where the activations are)."""
        return -self.A_log.to(torch.promote_types(like.dtype, torch.float32)).exp()

    def _skip(self, x: Tensor) -> Tensor:
        """D x: [.., np/tp, hn] -> the same."""
        D = self.D.to(x.dtype)
        return x * (D.view(-1, self.headdim) if self.D_has_hdim else D.unsqueeze(-1))

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """y [.., np/tp, hn] in fp32, z [.., d_inner/tp] -> [.., d_inner/tp] in the dtype of z."""
        y = y.flatten(-2)
        if self.norm is None:
            return (y * F.silu(z.to(y.dtype))).to(z.dtype)
        return self.norm(y, z)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Empty states for a batch: convolution [b, c, d_conv] and recurrence [b, np/tp, hn, n], however long it gets.

        The recurrence's is fp32 unless `dtype` says otherwise: it is summed up over the whole sequence.
        """
        del max_seqlen
        weight = self.in_proj.weight
        sizes = self.local
        conv_state = weight.new_zeros(batch_size, sum(sizes.conv.values()), self.d_conv, dtype=dtype)
        ssm_state = weight.new_zeros(
            batch_size,
            sizes.nheads,
            self.headdim,
            self.d_state,
            dtype=dtype or torch.promote_types(weight.dtype, torch.float32),
        )
        return conv_state, ssm_state

    def _states(self, inference_params: InferenceParams, batch: int) -> tuple[Tensor, Tensor]:
        """This layer's states for the current samples, made on first use and zeroed where a sequence begins."""
        assert self.layer_number is not None, "a mixer that decodes is known by its layer number"
        memory = inference_params.key_value_memory_dict
        if self.layer_number not in memory:
            states = self.allocate_inference_cache(
                inference_params.max_batch_size, inference_params.max_sequence_length
            )
            # Samples second, as of keys and values: there beam search reorders them.
            memory[self.layer_number] = (states[0].transpose(0, 1), states[1].transpose(0, 1))
        first = inference_params.batch_size_offset
        if first + batch > inference_params.max_batch_size:
            raise InvariantError(
                "state cache",
                f"of {inference_params.max_batch_size} samples cannot take sample {first + batch}",
                "create InferenceParams with a larger maximum",
            )
        conv_state, ssm_state = (
            state.transpose(0, 1)[first : first + batch] for state in memory[self.layer_number]
        )
        if inference_params.sequence_len_offset == 0:
            conv_state.zero_()
            ssm_state.zero_()
        return conv_state, ssm_state

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As every module's; stacked parameters are stored section by section, so that other ranks can divide them."""
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        rows = dict.fromkeys(self.PLACEMENT, 0)
        sharded = make_sharded_tensors_for_checkpoint(own, prefix, rows, sharded_offsets)
        for name, module in self.named_children():
            if module is self.conv1d:
                held = module.state_dict(prefix="", keep_vars=True)
                part = make_sharded_tensors_for_checkpoint(
                    held, f"{prefix}{name}.", dict.fromkeys(held, 0), sharded_offsets
                )
            else:
                part = sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata)
            sharded.update(part)
        for name, sections in (("in_proj", self.local.in_proj), ("conv1d", self.local.conv)):
            for key in (f"{prefix}{name}.weight", f"{prefix}{name}.bias"):
                if isinstance(sharded.get(key), ShardedTensor):
                    sharded[key] = in_sections(sharded[key], sections)
        return sharded


def in_sections(whole: ShardedTensor, sections: Mapping[str, int]) -> ShardedTensorFactory:
    """Describe a rank's stacked rows as one tensor per section, stored as `<key>.<section>`.

    InvariantError unless the sections make up the rows.
    """
    if sum(sections.values()) != whole.local_shape[0]:
        raise InvariantError(whole.key, f"{dict(sections)} are not its {whole.local_shape[0]} rows")
    cell = whole.without_data()

    def pieces(key: str, t: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> Any:
        described = replace(
            cell, key=key, data=t, dtype=t.dtype, replica_id=replica_id, flattened_range=flattened_range
        )
        parts, start = [], 0
        for name, rows in sections.items():
            # A distributed optimizer's slice need not reach into every section.
            parts += [replace(part, key=f"{key}.{name}") for part in described.narrow(0, start, rows)]
            start += rows
        return parts

    def merge(parts: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat(parts)

    assert whole.data is not None, "a parameter that is described has values"
    return ShardedTensorFactory(whole.key, whole.data, pieces, merge, whole.replica_id)
