"""v0.9's text generation: prompts to text by sampling or beam search, on every layout but an interleaved pipeline."""

from megatron.inference.text_generation.api import (
    beam_search_and_post_process,
    generate,
    generate_and_post_process,
)

__all__ = ["beam_search_and_post_process", "generate", "generate_and_post_process"]
