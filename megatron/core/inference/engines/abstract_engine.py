"""What every engine offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class AbstractEngine(ABC):
    """Turns prompts into completed requests."""

    @staticmethod
    @abstractmethod
    def generate(*args: Any, **kwargs: Any) -> Any:
        """Complete prompts; subclasses say which arguments they take."""
