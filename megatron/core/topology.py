"""The rank grid as integers: which ranks form which group, for any order of the axes.

Nothing here starts a process or touches torch, so a layout for 6,144 ranks can be planned on a laptop.

The world is a mixed-radix number. In the order `tp-cp-ep-dp-pp` the tensor axis varies fastest, the pipeline axis
slowest. Experts live on ranks of the data axis: `ep` divides `dp` and appears as an axis of its own only in the
groups that concern experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product

from megatron.core.errors import InvariantError, ScheduleError

EmbeddingRanks = Callable[[list[int]], list[int]]

#: The axes an order may name. An axis left out of the order is appended if its size is one.
AXES = ("tp", "pp", "dp", "ep", "cp")

#: Group kind -> (axes it spans, whether the expert axis is a separate one in it).
GROUP_AXES: dict[str, tuple[str, bool]] = {
    "dp": ("dp", False),
    "dp_cp": ("dp-cp", False),
    "cp": ("cp", False),
    "mp": ("tp-pp", False),
    "tp_ep_pp": ("tp-ep-pp", True),
    "tp": ("tp", False),
    "pp": ("pp", False),
    "tp_dp_cp": ("tp-dp-cp", False),
    "tp_dp": ("tp-dp", False),
    "tp_cp": ("tp-cp", False),
    "ep": ("ep", True),
    "tp_ep": ("tp-ep", True),
    "dp_modulo_ep": ("dp", True),
    "dp_modulo_ep_cp": ("dp-cp", True),
}


def generate_masked_orthogonal_rank_groups(
    world_size: int, parallel_size: list[int], mask: list[bool]
) -> list[list[int]]:
    """Cut the grid along the masked axes.

    parallel_size: extent of every axis, fastest first; mask: the axes a group spans. Each group holds the ranks
    that agree on all other axes, ordered with the first masked axis varying fastest; groups are ordered likewise
    by the axes that were not masked. ValueError if the extents do not tile the world.
    """
    strides, total = [], 1
    for size in parallel_size:
        strides.append(total)
        total *= size
    if len(mask) != len(parallel_size):
        raise ValueError(f"mask has {len(mask)} entries for {len(parallel_size)} axes")
    inside = [(size, stride) for size, stride, spans in zip(parallel_size, strides, mask) if spans]
    group_size = 1
    for size, _ in inside:
        group_size *= size
    if total == 0 or world_size % group_size:
        raise ValueError(f"axes of sizes {parallel_size} do not tile a world of {world_size} ranks")

    outside = [(size, stride) for size, stride, spans in zip(parallel_size, strides, mask) if not spans]
    if world_size < total:
        raise ValueError(f"axes of sizes {parallel_size} need {total} ranks, the world has {world_size}")
    if world_size > total:  # a grid that repeats: the surplus is a slowest axis of its own
        outside.append((world_size // total, total))
    return [[start + step for step in _offsets(inside)] for start in _offsets(outside)]


def _offsets(axes: list[tuple[int, int]]) -> list[int]:
    """All sums of coordinate x stride, first axis fastest."""
    ranges = [range(0, size * stride, stride) for size, stride in reversed(axes)]
    return [sum(coordinates) for coordinates in product(*ranges)]


class RankGenerator:
    """Rank lists of one grid `tp x ep | dp x pp x cp` laid out in `order`, e.g. `"tp-cp-ep-dp-pp"`.

    rank_offset shifts every rank: the decoder's grid starts after the encoder's. RuntimeError if `order` leaves
    out an axis larger than one.
    """

    def __init__(self, tp: int, ep: int, dp: int, pp: int, cp: int, order: str, rank_offset: int = 0) -> None:
        self.tp, self.ep, self.dp, self.pp, self.cp = tp, ep, dp, pp, cp
        self.rank_offset = rank_offset
        self.world_size = tp * dp * pp * cp
        self.name_to_size = {"tp": tp, "pp": pp, "dp": dp, "ep": ep, "cp": cp}
        order = order.lower()
        named = order.split("-")
        if len(set(named)) != len(named) or not set(named) <= set(AXES):
            raise RuntimeError(f"the axis order {order!r} must name each of {', '.join(AXES)} at most once")
        for axis, size in self.name_to_size.items():
            if axis in named:
                continue
            if size != 1:
                raise RuntimeError(
                    f"the size of {axis} is {size}, but the axis order {order!r} does not say where it goes"
                )
            named.append(axis)
        if dp % ep:
            raise RuntimeError(f"expert-parallel size {ep} must divide the data-parallel size {dp}")
        self.order = self.order_w_ep = "-".join(named)
        self.order_wo_ep = "-".join(axis for axis in named if axis != "ep")
        self.ordered_size_w_ep = [dp // ep if axis == "dp" else self.name_to_size[axis] for axis in named]
        self.ordered_size_wo_ep = [self.name_to_size[axis] for axis in named if axis != "ep"]

    def get_mask(self, order: str, token: str) -> list[bool]:
        """For each axis of `order`, whether the dash-joined `token` names it."""
        return [axis in token.split("-") for axis in order.split("-")]

    def get_ranks(self, token: str, independent_ep: bool = False) -> list[list[int]]:
        """All groups spanning the axes of `token`, e.g. `"tp-dp"`.

        With independent_ep the data axis is cut into `ep` x `dp/ep`; without it `dp` is whole and `ep` does not
        exist as an axis.
        """
        sizes, order = (
            (self.ordered_size_w_ep, self.order_w_ep)
            if independent_ep
            else (self.ordered_size_wo_ep, self.order_wo_ep)
        )
        groups = generate_masked_orthogonal_rank_groups(self.world_size, sizes, self.get_mask(order, token))
        return [[rank + self.rank_offset for rank in group] for group in groups]


def default_embedding_ranks(pp_ranks: list[int], split_rank: int | None = None) -> list[int]:
    """Pipeline ranks that hold a word embedding or its tied copy: first, last and the decoder's first stage."""
    stages = {0, len(pp_ranks) - 1} | ({split_rank} if split_rank is not None else set())
    return [pp_ranks[stage] for stage in sorted(stages)]


def default_position_embedding_ranks(pp_ranks: list[int], split_rank: int | None = None) -> list[int]:
    """Pipeline ranks that hold position embeddings: the first stage and the decoder's first stage."""
    stages = {0} | ({split_rank} if split_rank is not None else set())
    return [pp_ranks[stage] for stage in sorted(stages)]


@dataclass(frozen=True)
class Layout:
    """Sizes of all axes; from them every group of every rank.

    An encoder with pipeline stages of its own occupies the first ranks and may use fewer tensor-parallel ranks
    than the decoder; dp and cp are common to both.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    order: str = "tp-cp-ep-dp-pp"
    encoder_tp: int = 0
    encoder_pp: int = 0
    pp_split: int | None = None
    embedding_ranks: EmbeddingRanks | None = None
    position_embedding_ranks: EmbeddingRanks | None = None

    def __post_init__(self) -> None:
        for name, least in (("tp", 1), ("pp", 1), ("cp", 1), ("ep", 1), ("encoder_tp", 0), ("encoder_pp", 0)):
            if getattr(self, name) < least:
                raise RuntimeError(f"the {name} size must be at least {least}, got {getattr(self, name)}")
        if self.encoder_tp and not self.encoder_pp:
            raise InvariantError(
                "encoder_tensor_model_parallel_size",
                "an encoder with ranks of its own needs pipeline stages",
                "set encoder_pipeline_model_parallel_size",
            )
        if self.encoder_tp > self.tp or (self.encoder_tp and self.tp % self.encoder_tp):
            raise InvariantError(
                "encoder_tensor_model_parallel_size", f"{self.encoder_tp} must divide the decoder's {self.tp}"
            )
        if self.world_size % self.model_size:
            encoder = (
                f", encoder {self._encoder_tp} x {self.encoder_pp} x {self.cp}" if self.encoder_pp else ""
            )
            raise ScheduleError(
                "parallel sizes",
                f"world size ({self.world_size}) is not divisible by the {self.model_size} ranks of one model "
                f"replica (tensor {self.tp} x pipeline {self.pp} x context {self.cp}{encoder})",
                "use a multiple of that many ranks",
            )
        if self.dp % self.ep:
            raise ScheduleError(
                "--expert-model-parallel-size",
                f"data-parallel size ({self.dp}) is not divisible by expert-parallel size ({self.ep})",
                "choose one that divides it, or use more ranks",
            )

    @property
    def _encoder_tp(self) -> int:
        """An encoder without its own tensor-parallel size uses the decoder's."""
        return self.encoder_tp or self.tp

    @property
    def encoder_model_size(self) -> int:
        """Ranks of one replica's encoder stages; 0 without them."""
        return self._encoder_tp * self.encoder_pp * self.cp

    @property
    def model_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tp * self.pp * self.cp + self.encoder_model_size

    @property
    def dp(self) -> int:
        """Replicas of the model."""
        return self.world_size // self.model_size

    @cached_property
    def decoder(self) -> RankGenerator:
        """The grid of the decoder, which is the whole world without encoder stages."""
        offset = self.encoder_model_size * self.dp
        return RankGenerator(self.tp, self.ep, self.dp, self.pp, self.cp, self.order, rank_offset=offset)

    @cached_property
    def encoder(self) -> RankGenerator | None:
        """The grid of the encoder's own stages, or None."""
        if not self.encoder_pp:
            return None
        return RankGenerator(self._encoder_tp, 1, self.dp, self.encoder_pp, self.cp, self.order)

    def groups(self, kind: str) -> list[list[int]]:
        """All groups of one kind: a key of GROUP_AXES, `"embd"` or `"pos_embd"`. ValueError on another name."""
        if kind == "embd":
            choose = self.embedding_ranks or partial(default_embedding_ranks, split_rank=self.pp_split)
            return [choose(ranks) for ranks in self.groups("pp")]
        if kind == "pos_embd":
            choose = self.position_embedding_ranks or partial(
                default_position_embedding_ranks, split_rank=self.pp_split
            )
            return [choose(ranks) for ranks in self.groups("pp")]
        if kind not in GROUP_AXES:
            raise ValueError(f"unknown group {kind!r}; known: {', '.join([*GROUP_AXES, 'embd', 'pos_embd'])}")
        return list(self._joined(*GROUP_AXES[kind]))

    def _joined(self, token: str, independent_ep: bool) -> Iterator[list[int]]:
        decoder_groups = self.decoder.get_ranks(token, independent_ep)
        if self.encoder is None:
            yield from decoder_groups
            return
        encoder_groups = self.encoder.get_ranks(token, independent_ep)
        if "pp" not in token.split("-"):
            yield from encoder_groups
            yield from decoder_groups
            return
        # Stages of one replica belong together, so a pipeline joins the encoder ranks of its own replica and
        # context shard. Several tensor ranks of the decoder share one encoder rank where the encoder has fewer.
        home = {rank: group for group in encoder_groups for rank in group}
        for group in decoder_groups:
            joined = {member for rank in group for member in home[self._encoder_rank_of(rank)]}
            yield sorted(joined) + group

    def _encoder_rank_of(self, decoder_rank: int) -> int:
        """The first-stage encoder rank that feeds the pipeline of a decoder rank."""
        assert self.encoder is not None, "only a layout with encoder stages has encoder ranks"
        place = self._coordinates(self.decoder, decoder_rank)
        place["tp"] = place["tp"] * self._encoder_tp // self.tp
        place["pp"] = 0
        rank, stride = 0, 1
        for axis in self.encoder.order_wo_ep.split("-"):
            rank += place[axis] * stride
            stride *= self.encoder.name_to_size[axis]
        return rank

    @staticmethod
    def _coordinates(grid: RankGenerator, rank: int) -> dict[str, int]:
        rest, place = rank - grid.rank_offset, {}
        for axis, size in zip(grid.order_wo_ep.split("-"), grid.ordered_size_wo_ep):
            rest, place[axis] = divmod(rest, size)
        return place

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands: its index along `tp cp dp pp` (stages of the encoder come first)."""
        if self.encoder is not None and rank < self.decoder.rank_offset:
            return self._coordinates(self.encoder, rank)
        place = self._coordinates(self.decoder, rank)
        place["pp"] += self.encoder_pp
        return place
