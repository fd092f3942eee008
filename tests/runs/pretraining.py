"""Whole pretraining runs inside a gang: the real entry script on a real command line, observed from outside."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.utils import get_model_config
from megatron.training import training
from megatron.training.global_vars import get_args
from megatron.training.utils import unwrap_model
from tests.gang.model_runs import piece_of
from tests.runs.routing import Rerouted, Routes, Routing

Tensors = dict[str, Tensor]


def run_script(argv: list[str], script: str = "pretrain_gpt") -> str:
    """Body: run an entry script in this process; returns what it printed. An exit with status 0 is a good end."""
    module = importlib.import_module(script)
    printed = io.StringIO()
    if "--metrics-file" not in argv and "--save" not in argv:
        argv = [*argv, "--metrics-file", os.devnull]
    with mock.patch.object(sys, "argv", [f"{script}.py", *argv]), contextlib.redirect_stdout(printed):
        try:
            module.run()
        except SystemExit as end:
            if end.code not in (0, None):
                raise
    return printed.getvalue()


def amended(words: list[str], bad: str) -> list[str]:
    """A command line with what a rule's counter-example adds; `-flag` in it takes `--flag` and its value away."""
    words = list(words)
    for word in bad.split():
        if word.startswith("-") and not word.startswith("--"):
            at = words.index("-" + word)
            del words[at : at + 2]
        else:
            words.append(word)
    return words


def records(argv: list[str], script: str = "pretrain_gpt") -> list[dict[str, Any]]:
    """Body: run an entry script; what its last rank wrote to metrics.jsonl (nothing on the others)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        run_script([*argv, "--metrics-file", str(path)], script)
        return read_records(path)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass
class Observed:
    """What one process computes in a few steps: everything other layouts must reproduce."""

    initial: Tensors = field(default_factory=dict)
    final: Tensors = field(default_factory=dict)
    gradients: list[Tensors] = field(default_factory=list)  # per step, over the whole model
    token_losses: list[Tensor] = field(default_factory=list)  # per step [global batch, s]
    norms: list[float] = field(default_factory=list)
    zeros: list[float] = field(default_factory=list)
    #: Per step, elements of gradients that are zero but for rounding.
    almost_zeros: list[int] = field(default_factory=list)
    routes: Routes = field(default_factory=dict)


def observe(argv: list[str], script: str = "pretrain_gpt", dtype: torch.dtype | None = None) -> Observed:
    """Body for one process: run and keep initial and final parameters, and per step gradients, losses and norms."""
    seen = Observed()

    def on_model(model: torch.nn.Module) -> None:
        # Biases start at zero and norms at one: in general position a mistake in either shows.
        noise = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for param in model.parameters():
                param.add_(
                    0.02 * torch.randn(param.shape, generator=noise, dtype=torch.float64).to(param.dtype)
                )
        seen.initial = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_gradients(model: list[torch.nn.Module]) -> None:
        plain = unwrap_model(model)[0]
        gradients = {n: p.main_grad.detach().clone() for n, p in plain.named_parameters()}
        seen.gradients.append(gradients)
        rounding = {torch.float64: 1e-13}.get(dtype, 1e-5)
        seen.almost_zeros.append(
            sum(int((g.abs() <= rounding * g.abs().max()).sum()) for g in gradients.values())
        )

    def on_update(model: list[torch.nn.Module], result: Any) -> None:
        _, norm, zeros = result
        seen.norms.append(norm)
        seen.zeros.append(zeros)
        plain = unwrap_model(model)[0]
        seen.final = {n: p.detach().clone() for n, p in plain.named_parameters()}

    routing = Routing()
    with _watched(script, dtype, on_model, on_gradients, on_update) as losses, routing.follow():
        run_script(argv, script)
    seen.token_losses, seen.routes = losses.steps(), routing.routes
    return seen


@dataclass
class Difference:
    """The largest relative differences found on one rank, each with its place."""

    gradient: tuple[float, str] = (0.0, "")
    parameter: tuple[float, str] = (0.0, "")
    token_loss: tuple[float, str] = (0.0, "")
    norm: tuple[float, str] = (0.0, "")
    zeros: list[str] = field(default_factory=list)
    rerouted: Rerouted = field(default_factory=Rerouted)

    def note(self, what: str, own: Tensor, expected: Tensor, where: str) -> None:
        scale = expected.abs().max().clamp_min(1e-30)
        error = ((own.to(expected.dtype) - expected).abs().max() / scale).item()
        if not error <= getattr(self, what)[0]:
            setattr(self, what, (error, where))

    def check(self, bounds: dict[str, float] | float, whose: str) -> None:
        """Fail unless each difference is within its bound, and the zeros were counted alike."""
        if not isinstance(bounds, dict):
            bounds = dict.fromkeys(("gradient", "parameter", "token_loss", "norm"), bounds)
        for what, bound in bounds.items():
            error, where = getattr(self, what)
            assert error <= bound, f"{whose}: {what} differs by {error:.2e} at {where}"
        assert not self.zeros, f"{whose}: number of zeros at {self.zeros}"


def compare(
    argv: list[str],
    expected: Observed,
    script: str = "pretrain_gpt",
    dtype: torch.dtype | None = None,
    same_routes: bool = False,
) -> Difference:
    """Body for any layout: run from `expected.initial`; this rank's largest differences from the one-process run.

    `same_routes`: tokens visit the experts they visited there.
    """
    worst = Difference()
    step = 0

    def on_model(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(piece_of(expected.initial, model, name, param))

    def on_gradients(model: list[torch.nn.Module]) -> None:
        for wrapped, chunk in zip(model, unwrap_model(model)):
            _gather_gradients(wrapped)
            for name, param in chunk.named_parameters():
                if getattr(param, "idle", False):
                    continue
                whole = piece_of(expected.gradients[step], chunk, name, param)
                worst.note("gradient", param.main_grad, whole, f"step {step}: {name}")

    def on_update(model: list[torch.nn.Module], result: Any) -> None:
        nonlocal step
        _, norm, zeros = result
        worst.note("norm", torch.tensor(norm), torch.tensor(expected.norms[step]), f"step {step}")
        # Where terms cancel, one order of summation gives zero and another the last bit.
        slack = expected.almost_zeros[step] - expected.zeros[step]
        if abs(zeros - expected.zeros[step]) > slack:
            worst.zeros.append(f"step {step}: {zeros}, not {expected.zeros[step]} within {slack}")
        step += 1
        if step == len(expected.norms):
            for wrapped, chunk in zip(model, unwrap_model(model)):
                if get_args().overlap_param_gather:
                    wrapped.start_param_sync(force_sync=True)
                for name, param in chunk.named_parameters():
                    if getattr(param, "idle", False):
                        continue
                    worst.note("parameter", param, piece_of(expected.final, chunk, name, param), name)

    routing = Routing(expected.routes if same_routes else {}, rerouted=worst.rerouted)
    with _watched(script, dtype, on_model, on_gradients, on_update) as losses, routing.follow():
        run_script(argv, script)
    for index, own in enumerate(losses.steps()):
        whole = expected.token_losses[index]
        worst.note("token_loss", own, losses.share_of(whole), f"step {index}")
    return worst


class _Losses:
    """Per-token losses of the micro-batches a last-stage rank has run."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._per_step = self._dp = self._cp = 1
        self._dp_rank = self._cp_rank = 0

    def add(self, output: Tensor, args: Namespace) -> None:
        self._dp, self._cp = args.data_parallel_size, args.context_parallel_size
        self._dp_rank = parallel_state.get_data_parallel_rank()
        self._cp_rank = parallel_state.get_context_parallel_rank()
        self._per_step = args.global_batch_size // (args.micro_batch_size * self._dp)
        self._batches.append(output.detach().clone())

    def steps(self) -> list[Tensor]:
        """Losses of each step on this rank [micro-batches * b, s/cp]."""
        size = self._per_step
        return [torch.cat(self._batches[i : i + size]) for i in range(0, len(self._batches), size)]

    def share_of(self, whole: Tensor) -> Tensor:
        """The part of a step's losses [global batch, s] that this rank computes."""
        micro = whole.view(self._per_step, self._dp, -1, whole.size(1))[:, self._dp_rank]
        rows = micro.reshape(-1, whole.size(1))
        pieces = rows.chunk(2 * self._cp, dim=1)
        return (
            torch.cat([pieces[self._cp_rank], pieces[2 * self._cp - 1 - self._cp_rank]], 1)
            if self._cp > 1
            else rows
        )


@contextlib.contextmanager
def _watched(
    script: str,
    dtype: torch.dtype | None,
    on_model: Callable[[torch.nn.Module], None],
    on_gradients: Callable[[list[torch.nn.Module]], None],
    on_update: Callable[[list[torch.nn.Module], Any], None],
) -> Iterator[_Losses]:
    """Look on while a script trains: at its model before training, its gradients before and its result after each update."""
    module = importlib.import_module(script)
    losses = _Losses()
    provider, forward_step, train_step = module.model_provider, module.forward_step, training.train_step

    def watched_provider(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model = provider(*args, **kwargs)
        if dtype is not None:
            model = model.to(dtype)
            config = get_model_config(model)
            config.params_dtype = config.pipeline_dtype = dtype
        on_model(model)
        return model

    def watched_forward_step(iterator: Any, model: torch.nn.Module) -> Any:
        output, loss_func = forward_step(iterator, model)
        if model.training and parallel_state.is_pipeline_last_stage():
            # BERT's output holds the order logits besides.
            losses.add(output[0] if isinstance(output, tuple) else output, get_args())
        return output, loss_func

    def watched_step(
        forward: Any, iterator: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        update = optimizer.step

        def step() -> Any:
            on_gradients(model)
            result = update()
            on_update(model, result)
            return result

        with mock.patch.object(optimizer, "step", step):
            return train_step(forward, iterator, model, optimizer, *args, **kwargs)

    with (
        mock.patch.object(module, "model_provider", watched_provider),
        mock.patch.object(module, "forward_step", watched_forward_step),
        mock.patch.object(training, "train_step", watched_step),
    ):
        yield losses


def _gather_gradients(chunk: Any) -> None:
    """With the distributed optimizer a rank holds only its shard of the reduced gradients: fetch the others'."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        for bucket in buffer.buckets:
            group = buffer.data_parallel_group
            shards = list(bucket.grad_data.chunk(dist.get_world_size(group)))
            dist.all_gather(shards, shards[dist.get_rank(group)].clone(), group=group)
