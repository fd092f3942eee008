"""The finished sequences of a beam search (spec: inference, section 9)."""

from __future__ import annotations

from torch import Tensor


class BeamHypotheses:
    """Keeps the `num_beams` best of the hypotheses it is shown.

    A hypothesis scores its summed log-probability over length^length_penalty: 0 compares sums, 1 means per token. `beams`
    holds (score, tokens) in the order of arrival.
    """

    def __init__(self, num_beams: int, length_penalty: float = 1.0, early_stopping: bool = False) -> None:
        """With `early_stopping` a search is done once there are `num_beams` hypotheses, however good others may become."""
        self.num_beams = num_beams
        self.length_penalty = length_penalty
        self.early_stopping = early_stopping
        self.beams: list[tuple[float, Tensor]] = []
        self.worst_score = 1e9

    def __len__(self) -> int:
        return len(self.beams)

    def add(self, hyp: Tensor, sum_logprobs: float, length: int) -> None:
        """Show a hypothesis: tokens [s], of which `length` count."""
        score = float(sum_logprobs) / length**self.length_penalty
        if len(self) < self.num_beams:
            self.beams.append((score, hyp))
            self.worst_score = min(score, self.worst_score)
        elif score > self.worst_score:
            worst = min(range(len(self.beams)), key=lambda at: self.beams[at][0])
            del self.beams[worst]
            self.beams.append((score, hyp))
            self.worst_score = min(kept for kept, _ in self.beams)

    def is_done(self, best_sum_logprobs: float, cur_len: int) -> bool:
        """Whether no open beam, the best of which has this sum at this length, can still replace a hypothesis."""
        if len(self) < self.num_beams:
            return False
        return (
            self.early_stopping or self.worst_score >= float(best_sum_logprobs) / cur_len**self.length_penalty
        )

    def best(self, count: int) -> list[tuple[float, Tensor]]:
        """At most `count` pairs of score and tokens, best first."""
        return sorted(self.beams, key=lambda scored: scored[0], reverse=True)[:count]
