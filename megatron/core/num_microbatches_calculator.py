"""How many microbatches a step has: constant, or ramping up with the samples consumed."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

logger = logging.getLogger(__name__)

#: Under v0.9's name: tests of users' programs set it to None.
_GLOBAL_NUM_MICROBATCHES_CALCULATOR: NumMicroBatchesCalculator | None = None


def _current() -> NumMicroBatchesCalculator:
    assert _GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None, (
        "num microbatches calculator is not initialized; call init_num_microbatches_calculator() first"
    )
    return _GLOBAL_NUM_MICROBATCHES_CALCULATOR


def get_num_microbatches() -> int:
    """Microbatches of the coming step, per replica."""
    return _current().get()


def get_current_global_batch_size() -> int:
    """Samples per step by the ramp-up rule, before rounding down to whole microbatches."""
    return _current().get_current_global_batch_size()


def get_micro_batch_size() -> int:
    """Samples per microbatch and replica."""
    return _current().get_micro_batch_size()


def get_current_running_global_batch_size() -> int:
    """Samples that the coming step really consumes."""
    return _current().get_current_running_global_batch_size()


def update_num_microbatches(
    consumed_samples: int, consistency_check: bool = True, verbose: bool = False
) -> None:
    """Recompute the counts for a number of samples consumed so far."""
    _current().update(consumed_samples, consistency_check, verbose)


def init_num_microbatches_calculator(
    rank: int,
    rampup_batch_size: Sequence[int | str] | None,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    decrease_batch_size_if_needed: bool = False,
) -> None:
    """Make the process-wide calculator; AssertionError if there is one already.

    rampup_batch_size: None, or (start size, increment, samples over which to ramp up).
    decrease_batch_size_if_needed: round sizes that do not fill whole microbatches down instead of refusing them.
    """
    assert _GLOBAL_NUM_MICROBATCHES_CALCULATOR is None, "num microbatches calculator is already initialized"
    reconfigure_num_microbatches_calculator(
        rank,
        rampup_batch_size,
        global_batch_size,
        micro_batch_size,
        data_parallel_size,
        decrease_batch_size_if_needed,
    )


def destroy_num_microbatches_calculator() -> None:
    """Forget the process-wide calculator."""
    global _GLOBAL_NUM_MICROBATCHES_CALCULATOR
    _GLOBAL_NUM_MICROBATCHES_CALCULATOR = None


def reconfigure_num_microbatches_calculator(
    rank: int,
    rampup_batch_size: Sequence[int | str] | None,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    decrease_batch_size_if_needed: bool = False,
) -> None:
    """Replace the process-wide calculator."""
    global _GLOBAL_NUM_MICROBATCHES_CALCULATOR
    _GLOBAL_NUM_MICROBATCHES_CALCULATOR = _build_num_microbatches_calculator(
        rank,
        rampup_batch_size,
        global_batch_size,
        micro_batch_size,
        data_parallel_size,
        decrease_batch_size_if_needed,
    )


def _build_num_microbatches_calculator(
    rank: int,
    rampup_batch_size: Sequence[int | str] | None,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    decrease_batch_size_if_needed: bool,
) -> NumMicroBatchesCalculator:
    if rampup_batch_size is None:
        constant = ConstantNumMicroBatchesCalculator(
            global_batch_size, micro_batch_size, data_parallel_size, decrease_batch_size_if_needed, rank
        )
        if rank == 0:
            logger.info(f"setting number of microbatches to constant {constant.get()}")
        return constant
    assert len(rampup_batch_size) == 3, (
        "--rampup-batch-size takes three numbers: start batch size, increment, ramp-up samples; "
        f"got {list(rampup_batch_size)}"
    )
    start, increment, samples = (int(value) for value in rampup_batch_size)
    if rank == 0:
        logger.info(
            f"will use batch size rampup starting from global batch size {start} to global batch size "
            f"{global_batch_size} with batch size increments {increment} over {samples} samples."
        )
    return RampupBatchsizeNumMicroBatchesCalculator(
        global_batch_size,
        micro_batch_size,
        data_parallel_size,
        decrease_batch_size_if_needed,
        rank,
        start,
        increment,
        samples,
    )


class NumMicroBatchesCalculator(ABC):
    """The counts in force: microbatches, and the batch size by rule and as run."""

    def __init__(self) -> None:
        self.num_micro_batches = 0
        self.current_global_batch_size = 0
        self.current_running_global_batch_size = 0
        self.micro_batch_size = 0

    def get(self) -> int:
        """Microbatches per step and replica."""
        return self.num_micro_batches

    def get_current_global_batch_size(self) -> int:
        """Samples per step by rule."""
        return self.current_global_batch_size

    def get_micro_batch_size(self) -> int:
        """Samples per microbatch and replica."""
        return self.micro_batch_size

    def get_current_running_global_batch_size(self) -> int:
        """Samples per step as run."""
        return self.current_running_global_batch_size

    @abstractmethod
    def update(self, consumed_samples: int, consistency_check: bool, verbose: bool = False) -> None:
        """Set the counts for a number of samples consumed so far."""


class ConstantNumMicroBatchesCalculator(NumMicroBatchesCalculator):
    """The same count in every step.

    AssertionError if the global batch is not a multiple of micro batch x replicas (unless it may be decreased),
    or smaller than one of them.
    """

    def __init__(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_size: int,
        decrease_batch_size_if_needed: bool,
        rank: int,
    ) -> None:
        super().__init__()
        unit = micro_batch_size * data_parallel_size
        running = _rounded_down(global_batch_size, unit, decrease_batch_size_if_needed, rank)
        assert running % unit == 0, _indivisible(global_batch_size, micro_batch_size, data_parallel_size)
        assert running >= unit, (
            f"global batch size ({global_batch_size}) is smaller than micro batch size ({micro_batch_size}) "
            f"times data parallel size ({data_parallel_size})"
        )
        self.num_micro_batches = running // unit
        self.current_global_batch_size = global_batch_size
        self.current_running_global_batch_size = running
        self.micro_batch_size = micro_batch_size

    def update(self, consumed_samples: int, consistency_check: bool, verbose: bool = False) -> None:
        """Nothing changes."""


class RampupBatchsizeNumMicroBatchesCalculator(NumMicroBatchesCalculator):
    """Batch size grows from `start` by `increment` in equal steps of samples until `ramup_samples` are consumed.

    ZeroDivisionError where the ramp has no steps (start equals the final size) or no samples: such a ramp is a
    constant batch size.
    """

    def __init__(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_size: int,
        decrease_batch_size_if_needed: bool,
        rank: int,
        start_global_batch_size: int,
        batch_size_increment: int,
        ramup_samples: int,
    ) -> None:
        super().__init__()
        for name, value in (
            ("global batch size", global_batch_size),
            ("start batch size", start_global_batch_size),
            ("batch size increment", batch_size_increment),
            ("micro batch size", micro_batch_size),
            ("data parallel size", data_parallel_size),
        ):
            assert value > 0, f"{name} must be positive, got {value}"
        assert ramup_samples >= 0, f"ramp-up samples must not be negative, got {ramup_samples}"
        growth = global_batch_size - start_global_batch_size
        assert growth >= 0, (
            f"the ramp-up starts at {start_global_batch_size}, above the global batch size {global_batch_size}"
        )
        assert growth % batch_size_increment == 0, (
            f"the growth from {start_global_batch_size} to the global batch size {global_batch_size} is not a "
            f"multiple of the increment {batch_size_increment}"
        )
        if growth == 0 or ramup_samples == 0:
            raise ZeroDivisionError(
                "--rampup-batch-size: a ramp from "
                f"{start_global_batch_size} to {global_batch_size} over {ramup_samples} samples has no steps; "
                "drop the flag for a constant batch size"
            )
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.data_parallel_size = data_parallel_size
        self.decrease_batch_size_if_needed = decrease_batch_size_if_needed
        self.rank = rank
        self.start_global_batch_size = start_global_batch_size
        self.batch_size_increment = batch_size_increment
        self.ramup_samples = ramup_samples
        self.micro_batch_times_data_parallel_size = micro_batch_size * data_parallel_size
        self.rampup_samples_per_increment = ramup_samples / (growth // batch_size_increment)
        self.update(0, consistency_check=False)

    def update(self, consumed_samples: int, consistency_check: bool, verbose: bool = False) -> None:
        """Set the counts; consistency_check refuses a size that does not fill whole microbatches."""
        before = self.current_running_global_batch_size
        if consumed_samples > self.ramup_samples:
            size = self.global_batch_size
        else:
            steps = int(consumed_samples / self.rampup_samples_per_increment)
            size = self.start_global_batch_size + steps * self.batch_size_increment
            assert size <= self.global_batch_size, (
                f"the ramp-up reached {size}, above the global batch size {self.global_batch_size}"
            )
        unit = self.micro_batch_times_data_parallel_size
        if consistency_check and not self.decrease_batch_size_if_needed:
            assert size % unit == 0, _indivisible(size, self.micro_batch_size, self.data_parallel_size)
        running = _rounded_down(
            size, unit, self.decrease_batch_size_if_needed, self.rank if verbose else None
        )
        self.current_global_batch_size = size
        self.current_running_global_batch_size = running
        self.num_micro_batches = running // unit
        if verbose and self.rank == 0 and before not in (0, running):
            logger.info(f"ramping up batch size from {before} to {running}")


def _rounded_down(size: int, unit: int, allowed: bool, speaker: int | None) -> int:
    """The largest multiple of `unit` not above `size` where rounding is allowed, else `size` itself."""
    if not allowed or size % unit == 0:
        return size
    running = size // unit * unit
    if speaker == 0:
        logger.info(
            f"decreasing batch size from {size} to {running} to keep whole microbatches of {unit} samples"
        )
    return running


def _indivisible(size: int, micro_batch_size: int, data_parallel_size: int) -> str:
    return (
        f"global batch size ({size}) is not divisible by micro batch size ({micro_batch_size}) times data "
        f"parallel size ({data_parallel_size}); choose a multiple or pass --decrease-batch-size-if-needed"
    )
