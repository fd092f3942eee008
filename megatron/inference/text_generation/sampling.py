"""Drawing tokens, under the name by which v0.9's applications import it."""

from megatron.core.inference.sampling import (
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)

__all__ = ["modify_logits_for_top_k_filtering", "modify_logits_for_top_p_filtering", "sample"]
