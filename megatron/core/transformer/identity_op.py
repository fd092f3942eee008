"""The do-nothing choices of a layer specification."""

from typing import Any

import torch


class IdentityOp(torch.nn.Module):
    """Return the first argument unchanged; takes whatever the module it replaces would take."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x of any shape -> x."""
        return x


class IdentityFuncOp(IdentityOp):
    """Stand-in for a function factory such as bias-dropout-add: calling it gives the identity function."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Any arguments -> a function x -> x."""
        return super().forward
