"""Helpers of megatron.core.utils, the device on a CPU, the generation cache and the idle straggler detector."""

from __future__ import annotations

import importlib.metadata
import logging
import math

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version

from megatron.core import device, parallel_state, utils
from megatron.core import num_microbatches_calculator as calculator
from megatron.core.inference_params import InferenceParams


def test_divide_is_exact() -> None:
    assert utils.divide(12, 4) == 3
    with pytest.raises(AssertionError, match="13 is not divisible by 4"):
        utils.divide(13, 4)


@pytest.mark.parametrize(
    ("installed", "wanted", "equal_counts", "expected"),
    [
        ("1.9.0", "1.9.0", True, True),
        ("1.9.0", "1.9.0", False, False),
        ("1.10.0.dev0+abc", "1.9.5", True, True),
        ("1.9.0", "1.10", True, False),
        (None, "0.1", True, False),
    ],
)
def test_te_versions_compare_as_numbers(
    installed: str | None, wanted: str, equal_counts: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        assert name == "transformer-engine"
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    utils.get_te_version.cache_clear()
    try:
        found = utils.get_te_version()
        assert found == (None if installed is None else Version(installed))
        assert utils.is_te_min_version(wanted, check_equality=equal_counts) is expected
    finally:
        utils.get_te_version.cache_clear()


class _Wrapper(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def test_attributes_are_found_through_wrappers() -> None:
    inner = torch.nn.Linear(2, 2)
    inner.config, inner.model_type = "settings", None
    wrapped = _Wrapper(_Wrapper(inner))
    wrapped.module.config = None
    assert utils.get_model_config(wrapped) == "settings"
    assert utils.get_attr_wrapped_model(wrapped, "config") is None
    assert utils.get_attr_wrapped_model(wrapped, "model_type", return_model_obj=True) is inner
    assert utils.get_model_xattn(wrapped) is False
    with pytest.raises(RuntimeError, match="has an attribute 'absent'"):
        utils.get_attr_wrapped_model(wrapped, "absent")
    with pytest.raises(RuntimeError, match="not a list"):
        utils.get_attr_wrapped_model([wrapped], "config")


def test_viewless_tensors_share_memory_and_gradients() -> None:
    base = torch.arange(6.0, requires_grad=True)
    view = (base * 2).view(2, 3)
    assert utils.make_viewless_tensor(base, True, True) is base
    free = utils.make_viewless_tensor(view, requires_grad=True, keep_graph=True)
    assert free._base is None and free.data_ptr() == view.data_ptr()
    free.sum().backward()
    assert torch.equal(base.grad, torch.full((6,), 2.0))
    cut = utils.make_viewless_tensor(view, requires_grad=False, keep_graph=False)
    assert cut._base is None and cut.grad_fn is None
    with pytest.raises(AssertionError, match="viewless"):
        utils.assert_viewless_tensor([free, view])
    utils.safely_set_viewless_tensor_data(free, torch.zeros(1))
    assert free.shape == (1,)


def test_scratch_buffers_grow_and_are_reused() -> None:
    pool = utils.GlobalMemoryBuffer()
    large = pool.get_tensor((4, 5), torch.float32, "mpu")
    small = pool.get_tensor([2, 3], torch.float32, "mpu")
    assert small.shape == (2, 3) and small.data_ptr() == large.data_ptr()
    assert pool.get_tensor((2, 3), torch.float64, "mpu").data_ptr() != large.data_ptr()
    assert pool.get_tensor((30,), torch.float32, "mpu").numel() == 30


def test_initial_distributions() -> None:
    torch.manual_seed(0)
    drawn = torch.empty(200_000)
    utils.init_method_normal(0.5)(drawn)
    assert drawn.std().item() == pytest.approx(0.5, rel=0.01)
    utils.scaled_init_method_normal(0.5, num_layers=8)(drawn)
    assert drawn.std().item() == pytest.approx(0.5 / math.sqrt(16), rel=0.01)
    assert abs(drawn.mean().item()) < 1e-3


def test_multi_tensor_helpers() -> None:
    tensors = [torch.randn(5), torch.randn(2, 3), torch.randn(7).to(torch.bfloat16)]
    flag = torch.zeros(1, dtype=torch.int)
    total, each = utils.local_multi_tensor_applier(utils.local_multi_tensor_l2_norm, flag, [tensors], True)
    expected = [tensor.double().norm().item() for tensor in tensors]
    assert each is not None and each.tolist() == pytest.approx(expected, rel=1e-6)
    assert total.item() == pytest.approx(math.hypot(*expected), rel=1e-6)
    outputs = [torch.empty_like(tensor) for tensor in tensors]
    utils.local_multi_tensor_applier(utils.local_multi_tensor_scale, flag, [tensors, outputs], 0.5)
    assert all(torch.equal(out, tensor * 0.5) for out, tensor in zip(outputs, tensors))
    assert flag.item() == 0
    tensors[1][0, 0] = float("inf")
    utils.local_multi_tensor_applier(utils.local_multi_tensor_scale, flag, [tensors, tensors], 2.0)
    assert flag.item() == 1


def test_one_rank_logs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        utils.log_single_rank(logging.getLogger("x"), logging.INFO, "once")
    assert caplog.messages == ["once"]


def test_names_that_moved_are_still_here() -> None:
    for name in utils._MOVED:
        assert callable(getattr(utils, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = utils.nonsense


def test_device_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available", lambda: False)
    assert device.init(3) == device.current() == torch.device("cpu")
    assert device.kind() == "cpu" and device.capability() is None
    backend, notice = device.backend_for("nccl")
    assert backend == "gloo" and notice is not None and "--distributed-backend nccl" in notice
    assert device.backend_for("gloo") == ("gloo", None)
    device.manual_seed(3)
    first = torch.rand(2)
    state = device.get_rng_state()
    second = torch.rand(2)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(2), second)
    assert torch.equal(first, torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert set(device.memory_stats().values()) == {0}


def test_the_calculator_can_be_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests of users' programs do it: by its name in the module."""
    for sizes, expected in (((32, 8, 2, False), (2, 32, 32)), ((33, 8, 2, True), (2, 33, 32))):
        monkeypatch.setattr(calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", None)
        calculator.init_num_microbatches_calculator(0, None, *sizes)
        assert expected == (
            calculator.get_num_microbatches(),
            calculator.get_current_global_batch_size(),
            calculator.get_current_running_global_batch_size(),
        )
        with pytest.raises(AssertionError, match="already initialized"):
            calculator.init_num_microbatches_calculator(0, None, *sizes)


def test_groups_of_a_world_that_ended_are_forgotten() -> None:
    try:
        for _ in range(2):
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel()
            assert parallel_state.get_data_parallel_world_size() == 1
            dist.destroy_process_group()
    finally:
        parallel_state.destroy_model_parallel()


def test_generation_cache_swaps_samples() -> None:
    params = InferenceParams(max_batch_size=3, max_sequence_length=4)
    with pytest.raises(ValueError, match="empty"):
        params.swap_key_value_dict([0, 1, 2])
    cache = torch.arange(12).view(4, 3, 1, 1)
    params.key_value_memory_dict[1] = (cache, cache * 10)
    params.swap_key_value_dict([2, 0, 1])
    keys, values = params.key_value_memory_dict[1]
    assert torch.equal(keys, cache[:, [2, 0, 1]]) and torch.equal(values, keys * 10)
    with pytest.raises(ValueError, match="2 indices for a cached batch of 3"):
        params.swap_key_value_dict([1, 0])


def test_straggler_detector_is_harmless_when_off() -> None:
    detector = utils.StragglerDetector()
    assert detector is utils.StragglerDetector()
    if not device.available():
        detector.configure(4, 1, enabled=True)
        assert not detector.configured
    with detector(bdata=True), detector:
        pass
    with pytest.raises(KeyError), detector:
        raise KeyError("passes through")
    assert not detector.enabled and detector.report(1.0, 1) is False
    detector.reset()
    assert detector.elapsed()[:2] == (0, 0) and len(detector.elapsed()) == 6
