"""The engine over a queue and static batches."""

from __future__ import annotations

import torch

from megatron.core.inference.common_inference_params import CommonInferenceParams
from megatron.core.inference.engines.abstract_engine import AbstractEngine
from megatron.core.inference.inference_request import InferenceRequest
from megatron.core.inference.scheduler import Scheduler
from megatron.core.inference.text_generation_controllers.simple_text_generation_controller import (
    SimpleTextGenerationController,
)


class MCoreEngine(AbstractEngine):
    """Completes prompts in batches of `max_batch_size`. With `random_seed` every call draws the same."""

    def __init__(
        self,
        text_generation_controller: SimpleTextGenerationController,
        max_batch_size: int,
        random_seed: int | None = None,
    ) -> None:
        self.text_generation_controller = text_generation_controller
        self.random_seed = random_seed
        self.scheduler = Scheduler(max_batch_size)

    def generate(  # type: ignore[override]
        self, prompts: list[str], common_inference_params: CommonInferenceParams
    ) -> list[InferenceRequest]:
        """The completed requests of these prompts, in the order of completion. All ranks of the model must call."""
        if self.random_seed is not None:
            torch.manual_seed(self.random_seed)
        before = len(self.scheduler.completed_request_pool)
        for prompt in prompts:
            tokens = self.text_generation_controller.tokenize_prompt(prompt)
            self.scheduler.add_request(prompt, tokens, common_inference_params)
        self.run_engine()
        return list(self.scheduler.completed_request_pool.values())[before:]

    def run_engine(self) -> None:
        """Decode batch after batch until nothing is pending."""
        while self.scheduler.have_requests_pending():
            active = self.scheduler.active_request_pool
            results = self.text_generation_controller.generate_all_output_tokens_static_batch(active)
            self.scheduler.update_requests_pools(results)
