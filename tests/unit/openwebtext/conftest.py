"""Fixtures of this directory."""

from tests.unit.openwebtext.support import call

__all__ = ["call"]
