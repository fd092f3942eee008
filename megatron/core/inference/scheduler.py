"""The queue of requests: a bounded number is active, the rest wait their turn."""

from __future__ import annotations

import time
from collections import OrderedDict

from megatron.core.errors import InvariantError
from megatron.core.inference.common_inference_params import CommonInferenceParams
from megatron.core.inference.inference_request import InferenceRequest, Status
from megatron.core.inference.utils import Counter

Pool = OrderedDict[str, InferenceRequest]


class Scheduler:
    """Three pools of requests by id, each in the order of arrival: waiting, active (at most `max_batch_size`), completed."""

    def __init__(self, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self.active_request_pool: Pool = OrderedDict()
        self.waiting_request_pool: Pool = OrderedDict()
        self.completed_request_pool: Pool = OrderedDict()
        self.request_counter = Counter()

    def add_request(
        self,
        prompt: str,
        prompt_tokens: list[int],
        inference_parameters: CommonInferenceParams,
        arrival_time: float | None = None,
    ) -> None:
        """Take a request in: into the active pool while there is room, else into the waiting one."""
        has_room = len(self.active_request_pool) < self.max_batch_size
        request = InferenceRequest(
            request_id=str(next(self.request_counter)),
            prompt=prompt,
            inference_parameters=inference_parameters,
            prompt_tokens=prompt_tokens,
            arrival_time=time.time() if arrival_time is None else arrival_time,
            status=Status.ACTIVE_BUT_NOT_GENERATING_TOKENS if has_room else Status.WAITING_IN_QUEUE,
        )
        pool = self.active_request_pool if has_room else self.waiting_request_pool
        pool[request.request_id] = request

    def have_requests_pending(self) -> bool:
        """Whether anything is active or waiting."""
        return bool(self.active_request_pool or self.waiting_request_pool)

    def add_earliest_waiting_request_to_active_pool(self) -> None:
        """Activate the request that has waited longest; InvariantError if there is no room for it."""
        if len(self.active_request_pool) >= self.max_batch_size:
            raise InvariantError(
                "max_batch_size", f"{self.max_batch_size} requests are active, which is all there may be"
            )
        request_id, request = self.waiting_request_pool.popitem(last=False)
        request.status = Status.ACTIVE_BUT_NOT_GENERATING_TOKENS
        self.active_request_pool[request_id] = request

    def update_requests_pools(self, result_dict: Pool | None = None) -> None:
        """Move what `result_dict` calls completed out of the active pool, and fill that up from the waiting one."""
        for request_id, result in list((result_dict or {}).items()):
            if result.status == Status.COMPLETED:
                self.completed_request_pool[request_id] = self.active_request_pool.pop(request_id)
        while self.waiting_request_pool and len(self.active_request_pool) < self.max_batch_size:
            self.add_earliest_waiting_request_to_active_pool()
