"""Random states as a rank of its own has them, without a process group."""

from tests.unit.models.conftest import random_states

__all__ = ["random_states"]
