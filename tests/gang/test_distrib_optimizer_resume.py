"""Resuming v0.9's recorded optimizer checkpoints, in their own layout and in others, continues its recorded run."""

from __future__ import annotations

import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.gang.harness import run_gang
from tests.unit.checkpointing.zarr_files import zarr_copy

GOLDEN = Path(__file__).parents[1] / "golden/checkpoints/opt"
ITERATION = "iter_0000002"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded checkpoint directories, unpacked."""
    directory = tmp_path_factory.mktemp("opt")
    with tarfile.open(GOLDEN / "checkpoints.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    return directory


class Run:
    """The recorded run (tests/golden/checkpoints/opt/config.json) in a layout of one's choice."""

    def __init__(
        self,
        tp: int,
        pp: int,
        ddp: dict[str, Any],
        global_batch_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        parallel_state.initialize_model_parallel(tp, pp)
        tensor_parallel.random.model_parallel_cuda_manual_seed(123)
        config = TransformerConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0,
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, pipeline_dtype=dtype,
            attention_softmax_in_fp32=True, **(half := {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16}),
        )  # fmt: skip
        self.model = GPTModel(
            config,
            get_gpt_layer_local_spec(),
            vocab_size=256,
            max_sequence_length=24,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=True,
        )
        for param in self.model.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
        wrapped = Float16Module(config, self.model) if any(half.values()) else self.model
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **ddp)
        self.wrapped = DistributedDataParallel(config, ddp_config, wrapped)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=1e-3, min_lr=1e-5, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0,
                use_distributed_optimizer=ddp_config.use_distributed_optimizer, initial_loss_scale=64.0,
                params_dtype=dtype, **half,
            ),
            [self.wrapped],
        )  # fmt: skip
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=1e-3, min_lr=1e-5, lr_warmup_steps=2 * global_batch_size,
            lr_decay_steps=10 * global_batch_size, lr_decay_style="cosine", start_wd=0.1, end_wd=0.1,
            wd_incr_steps=10 * global_batch_size, wd_incr_style="constant",
        )  # fmt: skip
        self.global_batch_size = global_batch_size
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        config.no_sync_func = self.wrapped.no_sync

    def train(self, steps: int) -> list[tuple[float | None, float]]:
        """(loss on the last stage, gradient norm) of each step; every rank gets the whole recorded batch."""
        recorded = np.load(GOLDEN / "batch.npz")
        tokens, labels = torch.from_numpy(recorded["tokens"]), torch.from_numpy(recorded["labels"])
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        mask = torch.from_numpy(recorded["loss_mask"])

        def loss_func(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = (output.float() * mask).sum() / mask.sum()
            return loss, {"loss": loss.detach()}

        def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
            return model(tokens, positions, None, labels=labels), partial(loss_func)

        rows = []
        for _ in range(steps):
            self.wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
            reports = get_forward_backward_func()(
                forward_step_func=forward_step, data_iterator=None, model=[self.wrapped], num_microbatches=1,
                seq_length=tokens.shape[1], micro_batch_size=tokens.shape[0],
            )  # fmt: skip
            success, norm, _ = self.optimizer.step()
            assert success
            self.scheduler.step(self.global_batch_size)
            rows.append((reports[0]["loss"].item() if reports else None, norm))
        if self.wrapped.ddp_config.overlap_param_gather:
            self.wrapped.disable_forward_pre_hook()
            self.wrapped.enable_forward_pre_hook()
        return rows

    def sharded_state(self, is_loading: bool, **kind: Any) -> dict[str, Any]:
        """What a distributed checkpoint holds of this run."""
        model = self.model.sharded_state_dict()
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, **kind)
        return {"model": model, "optimizer": optimizer, "opt_param_scheduler": self.scheduler.state_dict()}

    def load_distributed(self, directory: Path, **kind: Any) -> None:
        """Weights, optimizer and schedule from a distributed checkpoint."""
        state = dist_checkpointing.load(self.sharded_state(True, **kind), str(directory))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._load_schedule(state["opt_param_scheduler"])

    def _load_schedule(self, stored: dict[str, Any]) -> None:
        """Steps are samples: with another number of replicas the same iterations have another number of them."""
        factor = self.scheduler.lr_decay_steps / stored["lr_decay_steps"]
        self.scheduler.load_state_dict(
            {key: int(value * factor) if key.endswith("steps") else value for key, value in stored.items()}
        )

    def load_torch(self, directory: Path) -> None:
        """Weights, optimizer and schedule from a checkpoint in the torch format."""
        state = load_file(directory / "mp_rank_00/model_optim_rng.pt")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._load_schedule(state["opt_param_scheduler"])
        if (directory / "mp_rank_00/distrib_optim.pt").exists():
            self.optimizer.load_parameter_state(directory / "mp_rank_00/distrib_optim.pt")

    def weights(self) -> dict[str, Tensor]:
        """Copies of this rank's parameters."""
        return {name: param.detach().clone() for name, param in self.model.named_parameters()}


def _resume(directory: str, tp: int, pp: int, ddp: dict[str, Any], kind: dict[str, Any]) -> Any:
    source = Path(directory) / ITERATION
    replicas = dist.get_world_size() // (tp * pp)
    run = Run(tp, pp, ddp, 2 * replicas)
    if (source / "metadata.json").exists():
        run.load_distributed(source, **kind)
    else:
        run.load_torch(source)
    return run.train(2), run.weights()


SHARDED = {"use_distributed_optimizer": True}
DPZERO = {"sharding_type": "dp_zero_gather_scatter"}
OVERLAPPED = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 4000}
RESUMES = [
    # checkpoint, ranks, tp, pp, wrapper, sharding type
    ("torch_dp1", 1, 1, 1, {}, {}),
    ("torch_dp1", 2, 1, 1, {}, {}),
    ("torch_dp2_distopt", 2, 1, 1, SHARDED, {}),
    ("torch_dp2_distopt", 2, 1, 1, OVERLAPPED, {}),
    ("torch_dp2_distopt", 4, 1, 1, SHARDED, {}),
    ("torch_dp2_distopt", 1, 1, 1, SHARDED, {}),
    ("td_dp1", 1, 1, 1, {}, {}),
    ("td_dp1", 4, 2, 2, {}, {}),
    ("td_dp2_distopt", 2, 1, 1, SHARDED, {}),
    ("td_dp2_distopt", 2, 1, 1, OVERLAPPED, {}),
    ("td_dp2_distopt", 2, 2, 1, SHARDED, {}),
    ("td_dp2_distopt", 2, 1, 2, SHARDED, {}),
    ("td_dp2_distopt", 4, 1, 2, SHARDED, {}),
    ("td_dp2_dpzero", 2, 1, 1, SHARDED, DPZERO),
    ("td_dp2_dpzero", 4, 1, 1, SHARDED, DPZERO),
]


@pytest.mark.parametrize("name,ranks,tp,pp,ddp,kind", RESUMES)
def test_recorded_run_continues(checkpoints, name, ranks, tp, pp, ddp, kind):
    results = run_gang(ranks, _resume, str(checkpoints / name), tp, pp, ddp, kind)
    _check_continues(name, results, compare_weights=tp == pp == 1)


@pytest.mark.parametrize(
    "name,ranks,tp,pp,ddp,kind",
    [
        ("td_dp1", 1, 1, 1, {}, {}),
        ("td_dp2_distopt", 2, 1, 1, SHARDED, {}),
        ("td_dp2_distopt", 4, 2, 1, SHARDED, {}),
        ("td_dp2_dpzero", 2, 1, 1, SHARDED, DPZERO),
    ],
)
def test_recorded_run_continues_from_the_older_format(checkpoints, tmp_path, name, ranks, tp, pp, ddp, kind):
    """The recorded distributed checkpoint rewritten as zarr, where optimizer state lies unflattened."""
    zarr_copy(checkpoints / name / ITERATION, tmp_path / ITERATION)
    results = run_gang(ranks, _resume, str(tmp_path), tp, pp, ddp, kind)
    _check_continues(name, results, compare_weights=tp == pp == 1)


def _check_continues(name: str, results: list[Any], compare_weights: bool) -> None:
    recorded = np.load(GOLDEN / "resume.npz")[f"{name}/run/traj"][2:]
    final = np.load(GOLDEN / "params_after_step4.npz")
    for rows, weights in results:
        for (loss, norm), (recorded_loss, recorded_norm) in zip(rows, recorded):
            assert loss is None or loss == pytest.approx(recorded_loss, abs=1e-6)
            assert norm == pytest.approx(recorded_norm, rel=2e-6)
        if compare_weights:
            for key, value in weights.items():
                deviation = (value - torch.from_numpy(final[key])).abs()
                if key.endswith("linear_qkv.bias"):
                    # Softmax does not see what all keys share: the gradient is rounding noise, and Adam scales it up.
                    deviation.view(4, 3, 8)[:, 1] = 0.0
                assert deviation.max() < 2e-6, key


def _save_and_resume(
    directory: str, tp: int, pp: int, ddp: dict[str, Any], kind: dict[str, Any], dtype: torch.dtype
) -> bool:
    """Train on, save, train on; then load what was saved into a fresh run: is its future the same, bit for bit?"""
    replicas = dist.get_world_size() // (tp * pp)
    first = Run(tp, pp, ddp, 2 * replicas, dtype)
    first.train(2)
    dist_checkpointing.save(first.sharded_state(False, **kind), directory)
    straight = first.train(2)
    parallel_state.destroy_model_parallel()
    second = Run(tp, pp, ddp, 2 * replicas, dtype)
    second.load_distributed(Path(directory), **kind)
    again = second.train(2)
    same = all(torch.equal(value, second.weights()[key]) for key, value in first.weights().items())
    return same and straight == again


BUCKETS = {"sharding_type": "fully_sharded_bucket_space"}


@pytest.mark.parametrize(
    "ranks,tp,pp,ddp,kind,dtype",
    [
        (1, 1, 1, {}, {}, torch.float32),
        (4, 2, 2, {}, {}, torch.float32),
        (4, 2, 1, SHARDED, {}, torch.float32),
        (4, 1, 2, SHARDED, {}, torch.float32),
        (2, 1, 1, SHARDED, DPZERO, torch.float32),
        (2, 1, 1, OVERLAPPED, BUCKETS, torch.float32),
        (2, 1, 1, {}, {}, torch.bfloat16),
        (2, 1, 2, {}, {}, torch.float16),
        (4, 2, 1, SHARDED, {}, torch.bfloat16),
        (2, 1, 1, OVERLAPPED, {}, torch.float16),
        (2, 1, 1, SHARDED, DPZERO, torch.float16),
    ],
)
def test_own_checkpoints_resume_bitwise(tmp_path, ranks, tp, pp, ddp, kind, dtype):
    assert run_gang(ranks, _save_and_resume, str(tmp_path), tp, pp, ddp, kind, dtype) == [True] * ranks
