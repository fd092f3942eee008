"""What one batch remembers between the steps of text generation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron.core.errors import InvariantError


class InferenceParams:
    """Key/value cache and read positions of one generation batch.

    key_value_memory_dict maps a layer number to its (key, value) pair, each [max s, max b, ng, hn].
    """

    def __init__(self, max_batch_size: int, max_sequence_length: int) -> None:
        self.max_sequence_length = max_sequence_length
        self.max_batch_size = max_batch_size
        self.sequence_len_offset = 0
        self.batch_size_offset = 0
        self.key_value_memory_dict: dict[Any, tuple[Tensor, Tensor]] = {}

    def swap_key_value_dict(self, batch_idx: list[int] | Tensor) -> None:
        """Reorder the cached samples: position i of the batch becomes what sample `batch_idx[i]` was.

        Raises ValueError if nothing is cached or the new order has another length than the cached batch.
        """
        if not self.key_value_memory_dict:
            raise ValueError("swap_key_value_dict: the cache is empty; run a forward step first")
        for layer, (keys, values) in self.key_value_memory_dict.items():
            if len(batch_idx) != keys.shape[1]:
                raise InvariantError(
                    "swap_key_value_dict", f"{len(batch_idx)} indices for a cached batch of {keys.shape[1]}"
                )
            self.key_value_memory_dict[layer] = (keys[:, batch_idx], values[:, batch_idx])
