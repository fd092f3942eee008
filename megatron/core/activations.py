"""Activation functions that torch does not provide."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0) squared, any shape (So et al. 2021, "Primer")."""
    return torch.pow(F.relu(x), 2)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), any shape: the logistic approximation of GELU (Hendrycks and Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


def openai_gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, any shape: the form GPT-2 was trained with."""
    return F.gelu(x, approximate="tanh")
