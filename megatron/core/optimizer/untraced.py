"""Torch optimizers without the import of torch's compiler."""

from __future__ import annotations

import inspect

import torch


class Untraced(torch.optim.Optimizer):
    """A torch optimizer whose bookkeeping is called directly.

    Torch wraps these four methods to keep its graph tracer out of them, and the wrapper imports the whole compiler
    at its first call: more than a second, in a process that may never compile anything.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class Sgd(Untraced, torch.optim.SGD):
    """torch.optim.SGD, untraced."""
