"""The table of operations and their implementations: who can run here, who was chosen, and why.

An implementation says what it needs (device, compute capability, packages) and may look at the `Spec` of
one use of the operation and answer with a reason for declining. Nothing raises to say no, and nothing heavy
is imported to ask: a registered loader imports its own kernel only when it is chosen.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron.core import device
from megatron.core.errors import FlagError
from megatron.core.kernels import capability
from megatron.core.kernels.capability import Capabilities, version_tuple

HALF = (torch.float16, torch.bfloat16)

_FUSIONS = "megatron.core.fusions."
_TRITON = "megatron.core.kernels.triton"

# op -> modules whose import registers its implementations; imported at the first `select` of that op
PROVIDERS: dict[str, tuple[str, ...]] = {
    "core_attention": (
        _FUSIONS + "core_attention",
        _FUSIONS + "blocked_attention",
        _FUSIONS + "flex_attention",
        _TRITON,
        "megatron.core.extensions.flash_attention",
        "megatron.core.context_parallel.ring",
    ),
    "masked_softmax": (_FUSIONS + "fused_softmax", _TRITON),
    "layer_norm": (_FUSIONS + "fused_layer_norm", _TRITON),
    "residual_layer_norm": (_FUSIONS + "fused_layer_norm", _TRITON),
    "rms_norm": (_FUSIONS + "fused_rms_norm", _TRITON),
    "residual_rms_norm": (_FUSIONS + "fused_rms_norm", _TRITON),
    "bias_gelu": (_FUSIONS + "fused_bias_gelu", _TRITON),
    "bias_swiglu": (_FUSIONS + "fused_bias_swiglu", _TRITON),
    "bias_geglu": (_FUSIONS + "fused_bias_geglu", _TRITON),
    "bias_dropout_add": (_FUSIONS + "fused_bias_dropout", _TRITON),
    "rope": (_FUSIONS + "fused_rope", _TRITON),
    "vocab_cross_entropy": (_FUSIONS + "fused_cross_entropy", _TRITON),
    "linear_cross_entropy": (_FUSIONS + "linear_cross_entropy", _TRITON),
    "linear_wgrad_accumulate": (_FUSIONS + "grad_accumulation",),
    "embedding_grad": (_FUSIONS + "embedding_grad", _TRITON),
    "state_space_scan": ("megatron.core.ssm.state_space", _TRITON),
    "gpt_layer": ("megatron.core.models.gpt.gpt_layer_specs",),
    "fp8_quantize": ("megatron.core.fp8.quantize", _TRITON),
    "fp8_gemm": ("megatron.core.fp8.gemm",),
    "l2_norm": (_FUSIONS + "multi_tensor", _TRITON),
    "scale": (_FUSIONS + "multi_tensor", _TRITON),
    "adam": (_FUSIONS + "multi_tensor", _TRITON),
    "sgd": (_FUSIONS + "multi_tensor", _TRITON),
}


@dataclass(frozen=True)
class Spec:
    """What one use of an operation will see; operations that must know more subclass it."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Needs:
    """What an implementation requires of the machine; package versions are minima."""

    cuda: bool = False
    capability: tuple[int, int] | None = None
    packages: Mapping[str, str] = field(default_factory=dict)

    def missing(self, found: Capabilities) -> list[str]:
        """Every unmet requirement in words; empty when all are met."""
        unmet = []
        if self.cuda and not found.has_cuda:
            unmet.append("needs a CUDA device")
        elif self.capability is not None and (found.compute or (0, 0)) < self.capability:
            have = "none" if found.compute is None else "{}.{}".format(*found.compute)
            unmet.append("needs compute capability {}.{}, this device has {}".format(*self.capability, have))
        for package, minimum in self.packages.items():
            version = found.packages.get(package)
            if version is None:
                unmet.append(f"needs {package}>={minimum}, not installed")
            elif version_tuple(version) < version_tuple(minimum):
                unmet.append(f"needs {package}>={minimum}, {version} is installed")
        return unmet


Loader = Callable[[], Callable[..., Any]]
Accepts = Callable[[Any], "str | None"]


@dataclass(frozen=True)
class Entry:
    """One implementation of an operation; the highest rank that can run and accepts the use is preferred."""

    op: str
    name: str
    rank: int
    needs: Needs
    accepts: Accepts | None
    load: Loader

    def refusal(self, spec: Spec | None, found: Capabilities) -> str | None:
        """Why this implementation cannot serve `spec` on this machine (machine only when None); None if it
        can.
        """
        unmet = self.needs.missing(found)
        if spec is not None:
            if self.needs.cuda and spec.device != "cuda" and found.has_cuda:
                unmet.append(f"needs tensors on a CUDA device, this run uses {spec.device}")
            reason = self.accepts(spec) if self.accepts is not None else None
            if reason is not None:
                unmet.append(reason)
        return "; ".join(unmet) or None


@dataclass(frozen=True)
class Demand:
    """An implementation the user asked for by name; `flag` is what was typed and appears in the error."""

    name: str
    flag: str = ""


@dataclass(frozen=True)
class Choice:
    """One line of the start-up kernel table."""

    op: str
    chosen: str
    demanded: bool
    spec: Spec
    refused: tuple[tuple[str, str], ...]  # better-ranked implementations and why each was passed over


_entries: dict[str, dict[str, Entry]] = {}
_choices: dict[tuple[str, str, Spec], Choice] = {}
_planning: list[bool] = []


def register(
    op: str, name: str, *, rank: int, needs: Needs = Needs(), accepts: Accepts | None = None
) -> Callable[[Loader], Loader]:
    """Enter the decorated loader (no arguments, returns the implementation) as `name` of `op`.

    `accepts(spec)` returns None, or the reason why this use is declined. A name is registered once: a
    second one is a ValueError.
    """

    def enter(load: Loader) -> Loader:
        named = _entries.setdefault(op, {})
        if name in named:
            raise ValueError(f"{op}/{name} is registered twice")
        named[name] = Entry(op, name, rank, needs, accepts, load)
        return load

    return enter


def entries(op: str) -> list[Entry]:
    """Implementations of `op`, preferred first; imports its providers (never their kernels)."""
    if op not in PROVIDERS:
        raise ValueError(f"unknown operation {op!r}; known: {', '.join(PROVIDERS)}")
    for module in PROVIDERS[op]:
        importlib.import_module(module)
    return sorted(_entries.get(op, {}).values(), key=lambda entry: (-entry.rank, entry.name))


def select(
    op: str,
    spec: Spec,
    allow: Collection[str] | None = None,
    demand: str | Demand | None = None,
) -> Callable[..., Any]:
    """Choose an implementation of `op` for `spec`, record the choice, and return it loaded.

    `allow` limits the candidates (a preference the caller derived from defaults); `demand` names the only
    acceptable one: if it cannot run a FlagError says everything that is missing and what would run instead.
    """
    if _planning and spec.device == "meta":
        spec = replace(spec, device=device.kind())
    found = capability.probe()
    candidates = [entry for entry in entries(op) if allow is None or entry.name in allow]
    refused = [(entry, entry.refusal(spec, found)) for entry in candidates]
    able = [entry for entry, reason in refused if reason is None]
    if demand is not None:
        return _select_demanded(
            op, spec, demand if isinstance(demand, Demand) else Demand(demand), able, found
        )
    if not able:
        why = ", ".join(f"{entry.name}: {reason}" for entry, reason in refused) or "none is allowed"
        raise ValueError(f"no implementation of {op} can serve {spec}: {why}")
    best = able[0]
    _record(
        best, spec, False, tuple((e.name, r) for e, r in refused if r is not None and e.rank >= best.rank)
    )
    return _load(best)


def _select_demanded(
    op: str, spec: Spec, demand: Demand, able: list[Entry], found: Capabilities
) -> Callable[..., Any]:
    known = {entry.name: entry for entry in entries(op)}
    subject = demand.flag or f"{op}/{demand.name}"
    if demand.name not in known:
        raise FlagError(subject, f"there is no {op}/{demand.name}", f"choose one of {', '.join(known)}")
    entry = known[demand.name]
    reason = entry.refusal(spec, found)
    if reason is not None:
        instead = next((e.name for e in able), None)
        fix = f"drop the flag to use {instead}" if instead and demand.flag else None
        if instead and not demand.flag:
            fix = f"use {instead}"
        raise FlagError(subject, f"{op}/{demand.name} cannot run here: {reason}", fix)
    _record(entry, spec, True, ())
    return _load(entry)


def _record(entry: Entry, spec: Spec, demanded: bool, refused: tuple[tuple[str, str], ...]) -> None:
    choice = Choice(entry.op, entry.name, demanded, spec, refused)
    _choices[(entry.op, entry.name, spec)] = choice


def report() -> list[Choice]:
    """Every distinct choice made so far, in the order made: the start-up kernel table."""
    return list(_choices.values())


@contextmanager
def planning() -> Iterator[dict[tuple[str, str, Spec], Choice]]:
    """Inside the block `select` chooses as ever but loads nothing, and its choices go into the yielded table alone.

    For plans of machines whose packages are not installed here: what `select` returns must not be called.
    """
    global _choices
    before, _choices = _choices, {}
    _planning.append(True)
    try:
        yield _choices
    finally:
        _planning.pop()
        _choices = before


def _load(entry: Entry) -> Callable[..., Any]:
    return functools.partial(_refuse_to_run, entry) if _planning else entry.load()


def _refuse_to_run(entry: Entry, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        f"{entry.op}/{entry.name} was chosen for a plan and cannot run; build the model outside planning()"
    )


def forget_choices() -> None:
    """Empty the report (a new model is about to be built in the same process)."""
    _choices.clear()


def table_hash() -> str:
    """Fingerprint of what every implementation could do on this machine, equal on all ranks that will
    choose alike.

    It covers availability rather than the choices made, because pipeline stages use different operations;
    with equal flags (compared elsewhere) equal availability means equal choices.
    """
    found = capability.probe()
    lines = [
        f"{op}/{entry.name} {entry.rank} {entry.refusal(None, found) or 'ready'}"
        for op in sorted(PROVIDERS)
        for entry in entries(op)
    ]
    lines.append(f"compute {found.compute} torch {found.torch_version}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
