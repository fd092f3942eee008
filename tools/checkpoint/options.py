"""Kinds of command line options that loaders and savers share."""

from __future__ import annotations

import argparse
import sys
from typing import Any


class WithoutEffect(argparse.Action):
    """An option of older command lines that nothing reads: its user is told so, with its help as the reason."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Report the option."""
        print(f"{option_string} has no effect: {self.help}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def positive(text: str) -> int:
    """A number that counts something; the parser reports any other."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number; give 1 or more")
    return number
