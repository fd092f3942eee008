"""Errors that teach: every message says what is wrong, why, and how to mend it."""

from __future__ import annotations

from typing import Any


def explain(subject: str, why: str, fix: str | None = None) -> str:
    """The one sentence form of every user-facing error: `<subject>: <why>. Fix: <fix>.`"""
    text = f"{subject}: {why.rstrip('.')}."
    if fix is None:
        return text
    return f"{text} Fix: {fix}" if fix.endswith("?") else f"{text} Fix: {fix.rstrip('.')}."


class MegatronError(Exception):
    """Base of the errors that entry points report in one line, without a traceback.

    `exit_code` is the status with which a command ends: 2 for usage, 1 for everything else.
    """

    exit_code = 1

    def __init__(self, subject: str, why: str, fix: str | None = None) -> None:
        super().__init__(explain(subject, why, fix))
        self.subject, self.why, self.fix = subject, why, fix

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors of worker processes are pickled on their way to the one that reports them."""
        return type(self), (self.subject, self.why, self.fix)


class ConfigError(MegatronError, ValueError):
    """A configuration object holds values that contradict each other."""


class FlagError(ConfigError):
    """The command line asks for something that cannot be; `subject` names the flags."""

    exit_code = 2


class CheckpointError(MegatronError):
    """A checkpoint file is missing, damaged, foreign or of another shape; `subject` names it."""


class DataError(MegatronError):
    """A data, index or vocabulary file is missing, damaged or foreign; `subject` names it."""


class InvariantError(ConfigError, AssertionError):
    """A ConfigError where v0.9 asserts, so that callers who catch AssertionError there keep working."""


class ScheduleError(ConfigError, RuntimeError):
    """A ConfigError where v0.9 raises RuntimeError, for the same reason."""


class BlendError(DataError, IndexError):
    """A DataError where v0.9 raises IndexError, for the same reason."""


class TrainingError(MegatronError):
    """A run cannot go on: a loss or gradient is not a number, replicas disagree, a rank is lost."""
