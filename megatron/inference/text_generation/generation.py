"""Scoring, decoding and beam search over a batch of ids (spec: inference, sections 4 to 9).

All ranks of the model call these functions with the same batch and parameters. What is refused is refused on every rank, as
ValueError, before the first step. Results are on the first pipeline stage; other stages return None in their place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.inference.sampling import check_sampling, log_probs_of, top_log_probs, without_padding
from megatron.inference.text_generation.beam_utils import BeamHypotheses
from megatron.inference.text_generation.communication import (
    broadcast_from_last_pipeline_stage,
    broadcast_from_last_to_first_pipeline_stage,
    copy_from_last_to_first_pipeline_stage,
)
from megatron.inference.text_generation.forward_step import ForwardStep
from megatron.inference.text_generation.sampling import sample
from megatron.inference.text_generation.tokenization import end_of_document, ids_of, usable_vocab_size
from megatron.training import get_args, get_tokenizer

#: "\n" and "\n\n" of GPT-2's vocabulary, for tokenizers that have no newline of their own.
_GPT2_NEWLINE, _GPT2_DOUBLE_NEWLINE = 198, 628
#: What a forbidden token's logit becomes. It is finite: a log-probability of it can be printed.
_FORBIDDEN = -1e10
#: Lengths to this power are floats still.
_STEEPEST = 32

#: Makes a callable from (model, rows, length): (tokens, positions, mask) -> logits, None before the last stage.
MakeForwardStep = Callable[..., Any]


@torch.no_grad()
def score_and_return_on_first_stage(
    model: torch.nn.Module, tokens: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Log-probabilities of prompts [b, s] -> tokens, lengths, fp32 log-probs [b, s - 1], logits [b, s, v].

    Entry i is about token i + 1. The logits are returned on the last stage, the log-probabilities on the first.
    """
    rows, length = tokens.shape
    _check_room(get_args(), rows, length)
    step = ForwardStep(model, rows, length)
    logits = step(tokens, _positions(tokens), None)
    log_probs = None if logits is None else log_probs_of(logits[:, :-1], tokens[:, 1:])
    log_probs = broadcast_from_last_to_first_pipeline_stage((rows, length - 1), torch.float32, log_probs)
    return tokens, lengths, log_probs, logits


def top_log_probs_on_first_stage(
    logits: Tensor | None, count: int, rows: int, length: int
) -> list[Tensor | None]:
    """The `count` most probable next tokens under the last stage's logits [rows, length, v], on the first stage.

    -> their log-probabilities and ids, each [rows, length, count].
    """
    best: tuple[Tensor | None, Tensor | None] = (None, None)
    if logits is not None:
        best = top_log_probs(logits, count, usable_vocab_size(get_tokenizer()))
    return [
        broadcast_from_last_to_first_pipeline_stage((rows, length, count), dtype, tensor)
        for dtype, tensor in zip((torch.float32, torch.int64), best)
    ]


@torch.no_grad()
def generate_tokens_probs_and_return_on_first_stage(
    model: torch.nn.Module,
    forward_step: MakeForwardStep,
    tokens: Tensor,
    lengths: Tensor,
    return_output_log_probs: bool = False,
    top_k: int = 0,
    top_p: float = 0.0,
    top_p_decay: float = 0.0,
    top_p_bound: float = 0.0,
    temperature: float = 1.0,
    use_eod_token_for_early_termination: bool = True,
    stop_on_double_eol: bool = False,
    stop_on_eol: bool = False,
    prevent_newline_after_colon: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    """Continue prompts of these lengths [b], row by row at the front of `tokens` [b, s], by sampling.

    -> tokens [b, n], lengths of prompts and answers [b], fp32 log-probabilities [b, n - 1] if wanted, None for logits.
    A row goes on after its end until all have ended; its length says how much of it counts.
    """
    args, tokenizer = get_args(), get_tokenizer()
    rows, length = tokens.shape
    _check_room(args, rows, length)
    vocab_size = usable_vocab_size(tokenizer)
    check_sampling(top_k, top_p, temperature, vocab_size)
    stops = _Stops.of(tokenizer, args, stop_on_double_eol, stop_on_eol)
    forbid = _forbid_newline_after_colon(tokenizer) if prevent_newline_after_colon else None
    step = forward_step(model, rows, length)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    positions = _positions(tokens)
    ended = torch.full_like(lengths, length)
    done = torch.zeros_like(lengths, dtype=torch.bool)
    log_probs = None
    if return_output_log_probs and last:
        log_probs = torch.empty(rows, length - 1, dtype=torch.float32, device=tokens.device)
    start, end = 0, length - 1
    for end in range(int(lengths.min()), length):
        logits = step(tokens[:, start:end], positions[:, start:end], None)
        if last:
            if forbid is not None:
                forbid(tokens[:, end - 1], logits)
            chosen = sample(logits[:, -1], top_k, top_p, temperature, vocab_size)
            # Ranks that draw by themselves must not drift apart; all draw, for equal random states, and one counts.
            _from_first_tensor_rank(chosen)
            started = lengths <= end
            tokens[started, end] = chosen[started]
            if log_probs is not None:
                log_probs[:, start:end] = log_probs_of(logits, tokens[:, start + 1 : end + 1])
            stopped = started & stops(chosen, tokens[:, end - 1])
            ended[stopped & ~done] = end + 1
            done |= stopped
        if top_p > 0.0 and top_p_decay > 0.0:
            top_p *= top_p_decay
            # A decay without bound must not arrive at 0, which means no filter.
            top_p = max(top_p, top_p_bound if top_p_bound > 0.0 else sys.float_info.min)
        copy_from_last_to_first_pipeline_stage(rows, torch.int64, tokens[:, end])
        start = end
        all_done = broadcast_from_last_pipeline_stage(1, torch.uint8, done.all().view(1).to(torch.uint8))
        if use_eod_token_for_early_termination and all_done.item():
            break
    tokens = tokens[:, : end + 1]
    final = broadcast_from_last_to_first_pipeline_stage(rows, torch.int64, ended if last else None)
    if return_output_log_probs:
        log_probs = None if log_probs is None else log_probs[:, :end].contiguous()
        log_probs = broadcast_from_last_to_first_pipeline_stage((rows, end), torch.float32, log_probs)
    return tokens, final, log_probs, None


@torch.no_grad()
def beam_search_and_return_on_first_stage(
    model: torch.nn.Module,
    forward_step: MakeForwardStep,
    tokens: Tensor,
    lengths: Tensor,
    beam_size: int,
    stop_token: int,
    num_return_gen: int,
    length_penalty: float,
    prevent_newline_after_colon: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Continue one prompt, `tokens` [1, s], by the most probable sequences of `beam_size` beams.

    -> tokens [n, s] and fp32 scores [n], best first, of at most `num_return_gen` hypotheses. One that ended at `stop_token`
    lacks that and is filled up with the end-of-document id.
    """
    args, tokenizer = get_args(), get_tokenizer()
    prompt_length, length = int(lengths.max()), min(tokens.size(1), args.max_position_embeddings)
    vocab_size = usable_vocab_size(tokenizer)
    _check_beams(args, tokens.size(0), beam_size, prompt_length, length, vocab_size)
    _check_choice(num_return_gen, length_penalty)
    forbid = _forbid_newline_after_colon(tokenizer) if prevent_newline_after_colon else None
    step = forward_step(model, beam_size, length)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    beams = tokens[:, :length].repeat(beam_size, 1)
    positions = _positions(beams)
    scores = torch.zeros(beam_size, dtype=torch.float32, device=tokens.device)
    found = BeamHypotheses(beam_size, length_penalty)
    order = torch.zeros(beam_size, dtype=torch.long, device=tokens.device)
    done = torch.zeros(1, dtype=torch.uint8, device=tokens.device)
    start = 0
    for end in range(prompt_length, length):
        logits = step(beams[:, start:end], positions[:, start:end], None)
        if last:
            if forbid is not None:
                forbid(beams[:, end - 1], logits)
            totals = without_padding(logits[:, -1].log_softmax(-1), vocab_size) + scores[:, None]
            # At first all beams are the same.
            totals = totals[:1] if start == 0 else totals
            order, words, scores = _extend(totals, beams, stop_token, found, end + 1 - prompt_length)
            beams = beams[order]
            beams[:, end] = words
            done.fill_(found.is_done(totals.max().item(), end + 1 - prompt_length))
        done = broadcast_from_last_pipeline_stage(1, torch.uint8, done)
        if done.item():
            break
        copy_from_last_to_first_pipeline_stage(beams.shape, torch.int64, beams)
        order = broadcast_from_last_pipeline_stage(beam_size, torch.int64, order)
        if step.inference_params.key_value_memory_dict:  # a stage may have no layer that remembers
            step.inference_params.swap_key_value_dict(order)
        start = end

    if last and not done.item():
        for beam, score in zip(beams, scores.tolist()):
            found.add(beam, score, length - prompt_length)
    return _best_on_first_stage(found, num_return_gen, length, tokens.device)


def _extend(
    totals: Tensor, beams: Tensor, stop_token: int, found: BeamHypotheses, new_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The next beams out of the summed log-probabilities [1 or w, v] of their continuations.

    -> which beam each comes from, its new word, its score, each [w]. Hypotheses that end here go to `found`.
    """
    width, size = totals.size(1), beams.size(0)
    # The order of equals is part of the result.
    ordered, places = totals.reshape(-1).sort(descending=True, stable=True)
    chosen: list[tuple[int, int, float]] = []
    ranked = zip(ordered[: 2 * size].tolist(), places[: 2 * size].tolist())
    for rank, (score, place) in enumerate(ranked):
        beam, word = divmod(place, width)
        if word != stop_token:
            chosen.append((beam, word, score))
        elif rank < size:
            found.add(beams[beam].clone(), score, new_length)
        if len(chosen) == size:
            break
    order, words, scores = zip(*chosen)
    return (
        torch.tensor(order, device=beams.device),
        torch.tensor(words, device=beams.device),
        torch.tensor(scores, dtype=torch.float32, device=beams.device),
    )


def _best_on_first_stage(
    found: BeamHypotheses, wanted: int, length: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Tokens [n, length] and scores [n] of the last stage's best hypotheses, on the first stage."""
    tokens = scores = count = None
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        best = found.best(wanted)
        tokens = torch.stack([hypothesis for _, hypothesis in best])
        scores = torch.tensor([score for score, _ in best], dtype=torch.float32, device=device)
        count = torch.tensor([len(best)], device=device)
    rows = int(broadcast_from_last_pipeline_stage(1, torch.int64, count).item())
    return (
        broadcast_from_last_to_first_pipeline_stage((rows, length), torch.int64, tokens),
        broadcast_from_last_to_first_pipeline_stage(rows, torch.float32, scores),
    )


def _check_room(args: Any, rows: int, length: int) -> None:
    """The limits of a request; the messages are those that clients know."""
    if length > args.max_position_embeddings:
        raise ValueError("Length of prompt + tokens_to_generate longer than allowed")
    if rows * length > args.max_tokens_to_oom:
        raise ValueError(f"Too many tokens.  {rows * length} is greater than {args.max_tokens_to_oom}")


def _check_beams(
    args: Any, prompts: int, beam_size: int, prompt_length: int, length: int, vocab_size: int
) -> None:
    if prompts != 1:
        raise ValueError(f"a beam search continues one prompt, not {prompts}")
    if prompt_length >= length:
        raise ValueError("context length + tokens_to_generate too large")
    if not 1 <= beam_size < vocab_size:
        raise ValueError(f"beam_size {beam_size} is not between 1 and the vocabulary's {vocab_size - 1}")
    _check_room(args, beam_size, length)


def _check_choice(num_return_gen: int, length_penalty: float) -> None:
    if num_return_gen < 1:
        raise ValueError(f"num_return_gen {num_return_gen} asks for nothing")
    if not abs(length_penalty) <= _STEEPEST:
        raise ValueError(f"length_penalty {length_penalty} is not between {-_STEEPEST} and {_STEEPEST}")


def _positions(tokens: Tensor) -> Tensor:
    """0, 1, ... for every row: int64 [b, s]."""
    return torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)


def _from_first_tensor_rank(tensor: Tensor) -> None:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        source = parallel_state.get_tensor_model_parallel_src_rank()
        dist.broadcast(tensor, source, parallel_state.get_tensor_model_parallel_group())


@dataclass(frozen=True)
class _Stops:
    """Which token ends a row: one of `ids`, or `doubled` after itself."""

    ids: tuple[int, ...]
    doubled: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, args: Any, on_double_eol: bool, on_eol: bool) -> _Stops:
        """The end of a document (`args.eos_id` where that exists), unless rows end with lines."""
        if on_double_eol or on_eol:
            single, double = _newlines(tokenizer)
            return cls(double, doubled=single) if on_double_eol else cls((*double, single))
        end = getattr(args, "eos_id", None)
        return cls((end_of_document(tokenizer) if end is None else end,))

    def __call__(self, tokens: Tensor, previous: Tensor) -> Tensor:
        """For tokens [b] and those before them [b]: bool [b]."""
        stopped = torch.isin(tokens, torch.tensor(self.ids, dtype=torch.long, device=tokens.device))
        if self.doubled is not None:
            stopped |= (tokens == self.doubled) & (previous == self.doubled)
        return stopped


def _newlines(tokenizer: Any) -> tuple[int, tuple[int, ...]]:
    """The id of a line end and, if there is one, that of two: the tokenizer's own, or GPT-2's if it has none."""
    single, double = _ids_or_none(tokenizer, "\n"), _ids_or_none(tokenizer, "\n\n")
    if not single:
        return _GPT2_NEWLINE, (_GPT2_DOUBLE_NEWLINE,)
    # Some engines put a word boundary before what they are given: the last id is the newline.
    return single[-1], tuple(double) if len(double) == 1 else ()


def _ids_or_none(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, none if the tokenizer has no words for it."""
    try:
        return ids_of(tokenizer, text)
    except ValueError:
        return []


def _forbid_newline_after_colon(tokenizer: Any) -> Callable[[Tensor, Tensor], None] | None:
    """A function of the tokens [b] fed last and their logits [b, n, v]: no line ends right after a colon.

    None for a tokenizer that has no colon or no newline.
    """
    colon, newline = _ids_or_none(tokenizer, ":"), _ids_or_none(tokenizer, "\n")
    if not colon or not newline:
        return None

    def forbid(fed: Tensor, logits: Tensor) -> None:
        logits[fed == colon[-1], -1, newline[-1]] = _FORBIDDEN

    return forbid
