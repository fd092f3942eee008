"""Transfers between pipeline neighbours: values, shapes told on the way, and sends that outlive their tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import p2p_communication as p2p
from megatron.core.pipeline_parallel.microbatch import deallocate_output_tensor
from tests.gang.harness import run_gang


def config_of(stages: int, variable: bool) -> ModelParallelConfig:
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=stages)
    return ModelParallelConfig(
        pipeline_model_parallel_size=stages, pipeline_dtype=torch.float32, variable_seq_lengths=variable
    )


def down_and_up(variable: bool) -> tuple[list[float], list[float]]:
    """Body: an activation walks down the pipeline, every stage adding one; a gradient walks back up, doubled by each."""
    config = config_of(dist.get_world_size(), variable)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    shape = (3, 2) if not variable else (1,)  # with variable lengths the shape asked for is not used
    arrived = p2p.recv_forward(shape, config)
    own = torch.zeros(3, 2) if arrived is None else arrived.detach() + 1
    assert own.shape == (3, 2)
    if arrived is not None:
        assert arrived.requires_grad
    p2p.send_forward(own, config)
    gradient = p2p.recv_backward(shape, config)
    back = torch.full((3, 2), 1.0) if gradient is None else gradient.detach() * 2
    p2p.send_backward(back, config)
    assert stage == int(own[0, 0])
    return own.flatten().tolist(), back.flatten().tolist()


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("stages", [2, 4])
def test_values_walk_down_and_gradients_up(stages: int, variable: bool) -> None:
    for stage, (activation, gradient) in enumerate(run_gang(stages, down_and_up, variable)):
        assert activation == [float(stage)] * 6
        assert gradient == [2.0 ** (stages - 1 - stage)] * 6


def ring_exchange() -> list[float]:
    """Body: everything with both neighbours at once, around the ring."""
    config = config_of(dist.get_world_size(), False)
    rank = dist.get_rank()
    from_prev, from_next = p2p.send_forward_backward_recv_forward_backward(
        torch.tensor([10.0 + rank]), torch.tensor([20.0 + rank]), True, True, (1,), config
    )
    assert from_prev is not None and from_next is not None
    return [from_prev.item(), from_next.item()]


@pytest.mark.parametrize("stages", [2, 4])
def test_all_four_transfers_of_one_group(stages: int) -> None:
    for rank, (from_prev, from_next) in enumerate(run_gang(stages, ring_exchange)):
        assert from_prev == 10.0 + (rank - 1) % stages
        assert from_next == 20.0 + (rank + 1) % stages


def send_then_empty() -> float:
    """Body: the sender empties its output right after starting the transfer, as the executor does."""
    config_of(2, False)
    group = p2p.pipeline_group()
    kwargs = {"group": group, "dtype": torch.float32, "device": torch.device("cpu")}
    if dist.get_rank() == 0:
        output = torch.full((1 << 18,), 3.0)
        transfer = p2p.start([p2p.Send(output, 1, 5)], [], **kwargs)
        deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
        assert output.numel() == 1
        torch.full((1 << 18,), 9.0)  # would reuse memory freed too early
        transfer.sent()
        return 3.0
    received = p2p.start([], [p2p.Receive((1 << 18,), 0, 5)], **kwargs).wait()[0]
    assert received.min() == received.max()
    return float(received.detach()[0])


def test_an_output_may_be_emptied_while_it_is_sent() -> None:
    assert run_gang(2, send_then_empty) == [3.0, 3.0]
