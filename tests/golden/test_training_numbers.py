"""Microbatch counts, timer reports and random seeds against recordings of v0.9 (tests/golden/training)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch

from megatron.core import num_microbatches_calculator as calculator
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as tp_random
from megatron.core.timers import Timers

_FOLDER = Path(__file__).parent / "training"
_ERRORS = {"AssertionError": AssertionError, "ZeroDivisionError": ZeroDivisionError}


def _cases(name: str) -> list[Any]:
    cases = json.loads((_FOLDER / f"{name}.json").read_text())["cases"]
    return [pytest.param(case, id=case.get("name", str(index))) for index, case in enumerate(cases)]


@pytest.fixture(autouse=True)
def _clean() -> Any:
    yield
    calculator.destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    tp_random.destroy_rng_tracker()


def _train(case: dict[str, Any], iterations: int) -> dict[str, Any]:
    """What the training loop does with the calculator; rows of (iteration, consumed, counts) before each step."""
    consumed = skipped = 0
    rows, saves = [], []
    for iteration in range(iterations):
        before = calculator.get_num_microbatches()
        calculator.update_num_microbatches(consumed, consistency_check=False)
        now = calculator.get_num_microbatches()
        if now != before and iteration:
            assert now > before, "the number of microbatches only grows"
            saves.append(iteration)
        calculator.update_num_microbatches(consumed, consistency_check=True)
        running = calculator.get_current_running_global_batch_size()
        current = calculator.get_current_global_batch_size()
        rows.append([iteration, consumed, now, current, running])
        consumed += case["data_parallel_size"] * case["micro_batch_size"] * now
        skipped += current - running
    return {"rows": rows, "consumed": consumed, "skipped": skipped, "saves": saves}


@pytest.mark.parametrize("case", _cases("num_microbatches"))
def test_microbatch_counts(case: dict[str, Any]) -> None:
    def start() -> None:
        calculator.init_num_microbatches_calculator(
            0,
            case["rampup_batch_size"],
            case["global_batch_size"],
            case["micro_batch_size"],
            case["data_parallel_size"],
            case["decrease_batch_size_if_needed"],
        )

    if case.get("error_at") == "init":
        with pytest.raises(_ERRORS[case["error"]]):
            start()
        return
    start()
    assert calculator.get_micro_batch_size() == case["micro_batch_size"]
    if "error_at" in case:
        with pytest.raises(_ERRORS[case["error"]]):
            _train(case, case["iterations_run"] + 1)
        calculator.destroy_num_microbatches_calculator()
        start()
    run = _train(case, case["iterations_run"])
    recorded = {row[0]: row for row in case["rows"]}
    assert [row for row in run["rows"] if row[0] in recorded] == list(recorded.values())
    kept = -1
    for row in run["rows"]:  # rows that were not recorded repeat the counts of the last recorded one
        kept = row[0] if row[0] in recorded else kept
        assert row[2:] == recorded[kept][2:]
    assert run["consumed"] == case["consumed_after"]
    assert run["skipped"] == case["skipped_after"]
    assert run["saves"] == case["checkpoint_saves_at_iteration"]


@pytest.mark.parametrize("case", _cases("timer_strings"))
def test_timer_reports(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(case["seconds_per_rank"][0])
    seconds = torch.tensor([[rank[name] for name in names] for rank in case["seconds_per_rank"]])
    timers = Timers(log_level=2, log_option=case["option"])
    for name in names:
        timers(name)
    monkeypatch.setattr(timers, "_times_of_all_ranks", lambda *_: seconds)
    assert timers.get_all_timers_string(names, normalizer=case["normalizer"]) == case["string"]
    writer = mock.Mock()
    timers.write(names, writer, 5, normalizer=case["normalizer"])
    written = [list(call.args) for call in writer.add_scalar.call_args_list]
    assert [[tag, step] for tag, _, step in written] == [[tag, step] for tag, _, step in case["tensorboard"]]
    for (_, value, _), (_, recorded, _) in zip(written, case["tensorboard"]):
        assert value == pytest.approx(recorded, rel=1e-6)


@pytest.mark.parametrize("case", _cases("rng_seeds"))
def test_seeds_and_draws(case: dict[str, Any]) -> None:
    seed = case["seed"] + 100 * case["pp_rank"]
    if case["data_parallel_random_init"]:
        seed += 10 * case["dp_rank"]
    parallel_state.set_tensor_model_parallel_rank(case["tp_rank"])
    parallel_state.set_expert_model_parallel_rank(case["ep_rank"])
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    tp_random.model_parallel_cuda_manual_seed(seed)
    tracker = tp_random.get_cuda_rng_tracker()
    assert seed == case["default_seed"]
    assert list(tracker.get_states()) == list(case["tracker_seeds"])
    for name, recorded in case["tracker_seeds"].items():
        expected = torch.Generator().manual_seed(recorded).get_state()
        assert torch.equal(tracker.get_states()[name], expected), name

    def two() -> list[float]:
        return torch.rand(2).tolist()

    def forked(*name: str) -> list[float]:
        with tracker.fork(*name):
            return two()

    assert random.random() == case["python_random_first"]
    assert numpy.random.rand() == case["numpy_random_first"]
    assert two() == case["torch_default_generator_first_two_rand_cpu"]
    assert forked() == case["model_parallel_fork_first_two_rand_cpu"]
    assert forked() == case["model_parallel_fork_second_entry_two_rand_cpu"]
    expert = tp_random.get_expert_parallel_rng_tracker_name()
    assert forked(expert) == case["expert_fork_two_rand_cpu"]
    data = tp_random.get_data_parallel_rng_tracker_name()
    assert forked(data) == case["data_parallel_fork_two_rand_cpu"]
    assert two() == case["torch_default_generator_next_two_rand_cpu"]
