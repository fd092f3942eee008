"""Programs that use `megatron.core` as a library: their own module, loop, loss and configuration, no command line."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import ModelParallelConfig, dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.training.checkpointing import save_dataloader_state
from megatron.training.global_vars import set_args
from megatron.training.training import get_model
from megatron.training.utils import unwrap_model
from tests.gang.harness import run_gang


def constant_losses(stages: int, chunks: int | None, microbatches: int) -> list[Any]:
    """Body: evaluate a module that is no model of ours, under a configuration that knows no transformer."""
    parallel_state.initialize_model_parallel(1, stages, chunks)

    def forward_step(iterator: Any, model: torch.nn.Module) -> Any:
        number = next(iterator)
        return torch.full((4, 2, 8), float(number)), lambda output: (output.mean(), {"mean": number})

    model: Any = torch.nn.Linear(4, 1)
    model.set_input_tensor = lambda tensor: None
    model.model_type = ModelType.encoder_or_decoder
    model.config = ModelParallelConfig(
        pipeline_model_parallel_size=stages, pipeline_dtype=torch.float32 if stages > 1 else None
    )
    model.config.hidden_size = 8
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(range(9)) for _ in range(chunks or 1)],
        model=[model] * (chunks or 1),
        num_microbatches=microbatches,
        seq_length=4,
        micro_batch_size=2,
        forward_only=True,
    )


@pytest.mark.parametrize(("stages", "chunks"), [(1, None), (2, None), (2, 2)])
def test_schedules_drive_any_module(stages: int, chunks: int | None) -> None:
    *others, last = run_gang(stages, constant_losses, stages, chunks, 4)
    assert last == [{"mean": number} for number in range(4)]
    assert all(reported == [] for reported in others)


def one_iterator_for_two_chunks(iterator: Any, error: type[Exception]) -> str:
    """Body: the error of an interleaved pipeline whose chunks would share an iterator."""
    parallel_state.initialize_model_parallel(1, 2, 2)
    model: Any = torch.nn.Linear(4, 1)
    model.model_type = ModelType.encoder_or_decoder
    model.config = ModelParallelConfig(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    with pytest.raises(error) as raised:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterator,
            model=[model, model],
            num_microbatches=2,
            seq_length=4,
            micro_batch_size=2,
        )
    return str(raised.value)


@pytest.mark.parametrize(("iterator", "error"), [(range(9), AssertionError), ([range(9)], RuntimeError)])
def test_each_chunk_needs_an_iterator(iterator: Any, error: type[Exception]) -> None:
    for said in run_gang(2, one_iterator_for_two_chunks, iterator, error):
        assert "one iterator for each of the 2 model chunks" in said


def uneven_microbatches() -> str:
    """Body: the error of an interleaved pipeline whose microbatches do not divide."""
    with pytest.raises(RuntimeError) as raised:
        constant_losses(2, 2, 3)
    return str(raised.value)


def test_what_v09_refuses_with_a_runtime_error_is_one() -> None:
    for said in run_gang(2, uneven_microbatches):
        assert "groups of 2" in said and "--global-batch-size" in said


def batches(lengths: tuple[int, ...]) -> Iterator[dict[str, Tensor]]:
    source = torch.Generator().manual_seed(3)
    for length in itertools.cycle(lengths):
        tokens = torch.randint(0, 64, (2, length), generator=source)
        yield {"tokens": tokens, "labels": tokens.roll(-1, 1), "mask": torch.ones(2, length)}


def forward_step(iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> Any:
    batch = next(iterator)
    length = batch["tokens"].size(1)
    positions = torch.arange(length).expand(2, length)
    hidden = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    output = model(batch["tokens"], positions, hidden, labels=batch["labels"])
    return output, partial(mean_loss, batch["mask"])


def mean_loss(mask: Tensor, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = (output.float() * mask).sum() / mask.sum()
    return loss, {"lm loss": loss.detach()}


def by_size(weight: Tensor) -> None:
    """Weights that depend on nothing but the whole matrix's size, so on no layout."""
    torch.nn.init.normal_(weight, 0.0, 0.1, torch.Generator().manual_seed(weight.numel()))


def train(
    tp: int,
    pp: int,
    chunks: int | None,
    sharded: bool,
    folder: str,
    *,
    resume: bool = False,
    lengths: tuple[int, ...] = (8,),
) -> list[float]:
    """Body: four steps of a loop as a user writes it, or the last two from a checkpoint; losses on the last stage."""
    parallel_state.initialize_model_parallel(tp, pp, chunks)
    model_parallel_cuda_manual_seed(123)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=16,
        num_attention_heads=4,
        use_cpu_initialization=True,
        init_method=by_size,
        output_layer_init_method=by_size,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=chunks,
        variable_seq_lengths=len(lengths) > 1,
        deallocate_pipeline_outputs=pp > 1,
    )
    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=sharded, use_distributed_optimizer=sharded, grad_reduce_in_fp32=True
    )
    model = []
    for chunk in range(chunks or 1):
        if chunks:
            parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
        part = GPTModel(
            config,
            get_gpt_layer_local_spec(),
            64,
            8,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        part.model_type = ModelType.encoder_or_decoder
        model.append(DistributedDataParallel(config, ddp_config, part, disable_bucketing=chunk > 0))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-2, use_distributed_optimizer=sharded, params_dtype=torch.float32), model
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-2,
        min_lr=1e-3,
        lr_warmup_steps=2,
        lr_decay_steps=10,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=10,
        wd_incr_style="constant",
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if sharded:
        config.no_sync_func = [part.no_sync for part in model] if chunks else model[0].no_sync

    def state(loading: bool) -> dict[str, Any]:
        records = {}
        for chunk, part in enumerate(model):
            if chunks:
                parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
            records[f"model{chunk}" if chunks else "model"] = part.module.sharded_state_dict()
        own = optimizer.sharded_state_dict(records if chunks else records["model"], is_loading=loading)
        return {**records, "optimizer": own, "scheduler": scheduler.state_dict()}

    iterators = [batches(lengths) for _ in model]
    first = 0
    if resume:
        loaded = dist_checkpointing.load(state(loading=True), folder)
        for chunk, part in enumerate(model):
            part.module.load_state_dict(loaded[f"model{chunk}" if chunks else "model"])
        optimizer.load_state_dict(loaded["optimizer"])
        scheduler.load_state_dict(loaded["scheduler"])
        first = 2
        for iterator in iterators:
            for _ in range(4 * first):
                next(iterator)
    losses = []
    for step in range(first, 4):
        if step == 2 and not resume:
            dist_checkpointing.save(state(loading=False), folder)
        for part in model:
            part.zero_grad_buffer()
        optimizer.zero_grad()
        reported = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if chunks else iterators[0],
            model=model if chunks else model[0],
            num_microbatches=4,
            seq_length=8,
            micro_batch_size=2,
            forward_only=False,
        )
        updated, norm, _ = optimizer.step()
        assert updated and norm > 0, f"step {step} was skipped"
        scheduler.step(increment=1)
        losses += [one["lm loss"].item() for one in reported]
    return losses


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("tp", "pp", "chunks"), [(2, 1, None), (1, 2, None), (1, 2, 2)])
def test_a_training_loop_of_ones_own(
    tmp_path: Path, tp: int, pp: int, chunks: int | None, sharded: bool
) -> None:
    """It computes one process's losses, learns, and goes on from its own checkpoint as if it had not stopped."""
    for folder in ("layout", "alone"):
        (tmp_path / folder).mkdir()
    ranks = tp * pp
    whole = run_gang(ranks, train, tp, pp, chunks, sharded, str(tmp_path / "layout"))[-1]
    (alone,) = run_gang(1, train, 1, 1, None, sharded, str(tmp_path / "alone"))
    assert len(whole) == 16 and whole == pytest.approx(alone, rel=1e-5)
    assert sum(whole[-4:]) < sum(whole[:4])
    resumed = run_gang(ranks, train, tp, pp, chunks, sharded, str(tmp_path / "layout"), resume=True)[-1]
    assert resumed == whole[-8:]


@pytest.mark.parametrize("chunks", [None, 2])
def test_microbatches_of_different_lengths(tmp_path: Path, chunks: int | None) -> None:
    """With `variable_seq_lengths` stages tell each other the shapes; no stage is told the lengths."""
    for folder in ("layout", "alone"):
        (tmp_path / folder).mkdir()
    lengths = (5, 8, 3, 7, 2)
    found = run_gang(2, train, 1, 2, chunks, False, str(tmp_path / "layout"), lengths=lengths)[-1]
    (alone,) = run_gang(1, train, 1, 1, None, False, str(tmp_path / "alone"), lengths=lengths)
    assert found == pytest.approx(alone, rel=1e-5)


def _half_without_saying(bf16: bool) -> tuple[torch.dtype, bool]:
    """Body: `get_model` with a provider whose configuration says nothing of precision."""
    parallel_state.initialize_model_parallel()
    ddp = DistributedDataParallelConfig()
    set_args(Namespace(**vars(ddp), fp16=False, bf16=bf16, data_parallel_random_init=False,
        virtual_pipeline_model_parallel_size=None, encoder_pipeline_model_parallel_size=0,
        overlap_param_gather_with_optimizer_step=False))  # fmt: skip

    def provider(pre_process: bool, post_process: bool) -> torch.nn.Module:
        module: Any = torch.nn.Linear(4, 4)
        module.config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
        return module

    (chunk,) = get_model(provider)
    (inner,) = unwrap_model([chunk])
    return inner.weight.dtype, inner.config.bf16


def test_the_arguments_decide_the_precision_a_provider_leaves_open() -> None:
    assert run_gang(1, _half_without_saying, True) == [(torch.bfloat16, False)]
    assert run_gang(1, _half_without_saying, False) == [(torch.float32, False)]


class Loader:
    """A user's data loader that knows where it is."""

    iterable: Any

    def __init__(self, place: int) -> None:
        self.iterable = Namespace(save_state=lambda: {"place": place})


def save_loaders(folder: str) -> None:
    """Body: every rank offers a state of its own to be saved."""
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    save_dataloader_state(Loader(torch.distributed.get_rank()), 7, folder)


def test_one_rank_of_those_that_read_the_same_samples_saves_its_loader(tmp_path: Path) -> None:
    """Four ranks, two of each read the same samples (context parallel): the first of them writes."""
    run_gang(4, save_loaders, str(tmp_path))
    saved = {path.name: load_file(path) for path in tmp_path.rglob("*.pt")}
    assert saved == {
        f"train_dataloader_dprank{replica:03d}.pt": {"dataloader_state_dict": {"place": 2 * replica}}
        for replica in range(2)
    }
