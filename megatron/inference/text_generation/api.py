"""Text in, text out: what servers and scripts call (spec: inference, section 2).

Every function is called by all ranks of the job; global rank 0 passes the request and the others the model alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.inference.text_generation.communication import (
    broadcast_float_list,
    broadcast_int_list,
    prepare_on_rank,
)
from megatron.inference.text_generation.forward_step import ForwardStep
from megatron.inference.text_generation.generation import (
    MakeForwardStep,
    beam_search_and_return_on_first_stage,
    generate_tokens_probs_and_return_on_first_stage,
    score_and_return_on_first_stage,
    top_log_probs_on_first_stage,
)
from megatron.inference.text_generation.tokenization import (
    detokenize_generations,
    end_of_document,
    tokenize_prompts,
    usable_vocab_size,
)
from megatron.training import get_tokenizer

#: Texts, or their ids.
Prompts = Sequence[str | Sequence[int]]
#: Texts, their segments, log-probabilities if wanted, rows of ids; and logits if wanted.
Generated = (
    tuple[list[str], list[list[str]], list[list[float]] | None, list[list[int]]]
    | tuple[list[str], list[list[str]], list[list[float]] | None, list[list[int]], Tensor | None]
)


def generate_and_post_process(
    model: torch.nn.Module,
    forward_step: MakeForwardStep = ForwardStep,
    prompts: Prompts | None = None,
    tokens_to_generate: int = 0,
    return_output_log_probs: bool = False,
    top_k_sampling: int = 0,
    top_p_sampling: float = 0.0,
    top_p_decay: float = 0.0,
    top_p_bound: float = 0.0,
    temperature: float = 1.0,
    add_BOS: bool = False,
    use_eod_token_for_early_termination: bool = True,
    stop_on_double_eol: bool = False,
    stop_on_eol: bool = False,
    prevent_newline_after_colon: bool = False,
    random_seed: int = -1,
    return_logits: bool = False,
    detokenize_segments: bool = True,
) -> Generated | None:
    """Continue prompts, or with no `tokens_to_generate` score them.

    -> on the first pipeline stage texts (prompt and answer), their segments token by token, per row the log-probabilities
    of every token after the first (None unless wanted), and the uncut rows of ids; None on other stages. `return_logits`
    adds the logits [b, s, v], of a score without pipeline. ValueError on every rank for a request that is refused.
    """
    tokens, lengths, log_probs, logits = generate(
        model,
        forward_step=forward_step,
        prompts=prompts,
        tokens_to_generate=tokens_to_generate,
        return_output_log_probs=return_output_log_probs,
        top_k_sampling=top_k_sampling,
        top_p_sampling=top_p_sampling,
        top_p_decay=top_p_decay,
        top_p_bound=top_p_bound,
        temperature=temperature,
        add_BOS=add_BOS,
        use_eod_token_for_early_termination=use_eod_token_for_early_termination,
        stop_on_double_eol=stop_on_double_eol,
        stop_on_eol=stop_on_eol,
        prevent_newline_after_colon=prevent_newline_after_colon,
        random_seed=random_seed,
    )
    if not parallel_state.is_pipeline_first_stage(ignore_virtual=True):
        return None
    assert lengths is not None, "the first stage has the lengths"
    rows, texts, segments = detokenize_generations(tokens, lengths, detokenize_segments)
    wanted = None
    if return_output_log_probs and log_probs is not None:
        wanted = [row[: length - 1] for row, length in zip(log_probs.tolist(), lengths.tolist())]
    if return_logits:
        return texts, segments, wanted, rows, logits
    return texts, segments, wanted, rows


def generate(
    model: torch.nn.Module,
    forward_step: MakeForwardStep | None = None,
    prompts: Prompts | None = None,
    tokens_to_generate: int = 0,
    return_output_log_probs: bool = False,
    top_k_sampling: int = 0,
    top_p_sampling: float = 0.0,
    top_p_decay: float = 0.0,
    top_p_bound: float = 0.0,
    temperature: float = 1.0,
    add_BOS: bool = False,
    use_eod_token_for_early_termination: bool = True,
    stop_on_double_eol: bool = False,
    stop_on_eol: bool = False,
    prevent_newline_after_colon: bool = False,
    random_seed: int = -1,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The same in ids: tokens [b, s], lengths [b], log-probabilities [b, s - 1], logits [b, s, v] of a score."""
    integers, floats = _shared(
        [
            tokens_to_generate,
            return_output_log_probs,
            top_k_sampling,
            add_BOS,
            use_eod_token_for_early_termination,
            stop_on_double_eol,
            stop_on_eol,
            prevent_newline_after_colon,
            random_seed,
        ],
        [top_p_sampling, top_p_decay, top_p_bound, temperature],
    )
    tokens_to_generate, with_log_probs, top_k, add_bos, use_eod, double_eol, eol, no_newline, seed = integers
    top_p, decay, bound, temperature = floats
    if seed != -1:
        torch.manual_seed(seed)
    tokens, lengths = tokenize_prompts(prompts, tokens_to_generate, bool(add_bos))
    if tokens_to_generate == 0:
        return score_and_return_on_first_stage(model, tokens, lengths)
    return generate_tokens_probs_and_return_on_first_stage(
        model,
        ForwardStep if forward_step is None else forward_step,
        tokens,
        lengths,
        return_output_log_probs=bool(with_log_probs),
        top_k=top_k,
        top_p=top_p,
        top_p_decay=decay,
        top_p_bound=bound,
        temperature=temperature,
        use_eod_token_for_early_termination=bool(use_eod),
        stop_on_double_eol=bool(double_eol),
        stop_on_eol=bool(eol),
        prevent_newline_after_colon=bool(no_newline),
    )


def beam_search_and_post_process(
    model: torch.nn.Module,
    forward_step: MakeForwardStep = ForwardStep,
    prompts: Prompts | None = None,
    tokens_to_generate: int = 0,
    beam_size: int = 0,
    add_BOS: bool = False,
    stop_token: int = 50256,
    num_return_gen: int = 1,
    length_penalty: float = 1,
    prevent_newline_after_colon: bool = False,
    detokenize_segments: bool = True,
    *,
    strip_padding: bool = False,
) -> tuple[list[str], list[list[str]], list[float]] | None:
    """Continue one prompt by beam search.

    -> on the first pipeline stage the texts of at most `num_return_gen` hypotheses, best first, their segments and their
    scores; None on other stages. A hypothesis that ended early is filled up with the end-of-document id, which its text
    shows unless `strip_padding`.
    """
    tokens, scores = beam_search(
        model,
        forward_step,
        prompts=prompts,
        tokens_to_generate=tokens_to_generate,
        beam_size=beam_size,
        add_BOS=add_BOS,
        stop_token=stop_token,
        num_return_gen=num_return_gen,
        length_penalty=length_penalty,
        prevent_newline_after_colon=prevent_newline_after_colon,
    )
    if tokens is None or scores is None or not parallel_state.is_pipeline_first_stage(ignore_virtual=True):
        return None
    lengths = torch.full((tokens.size(0),), tokens.size(1))
    if strip_padding:
        text = (tokens != end_of_document(get_tokenizer())).long()
        # How many ids are left when those of the padding are taken from the end.
        lengths = (text.flip(1).cumsum(1) > 0).sum(1)
    _, texts, segments = detokenize_generations(tokens, lengths, detokenize_segments)
    return texts, segments, scores.tolist()


def beam_search(
    model: torch.nn.Module,
    forward_step: MakeForwardStep,
    prompts: Prompts | None = None,
    tokens_to_generate: int = 0,
    beam_size: int = 0,
    add_BOS: bool = False,
    stop_token: int = 50256,
    num_return_gen: int = 1,
    length_penalty: float = 1,
    prevent_newline_after_colon: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The same in ids: tokens [n, s] and scores [n]."""
    integers, (penalty,) = _shared(
        [tokens_to_generate, beam_size, add_BOS, stop_token, num_return_gen, prevent_newline_after_colon],
        [length_penalty],
    )
    tokens_to_generate, beam_size, add_bos, stop_token, num_return_gen, no_newline = integers
    tokens, lengths = tokenize_prompts(prompts, tokens_to_generate, bool(add_bos))
    return beam_search_and_return_on_first_stage(
        model,
        forward_step,
        tokens,
        lengths,
        beam_size,
        stop_token,
        num_return_gen,
        penalty,
        prevent_newline_after_colon=bool(no_newline),
    )


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt's ids; of each after the first its log-probability and, if asked for, the most probable ids and theirs."""

    tokens: list[int]
    log_probs: list[float]
    top: list[dict[int, float]]


def score_prompts(
    model: torch.nn.Module, prompts: Prompts | None = None, top_n: int = 0
) -> list[ScoredPrompt] | None:
    """Score prompts, and tell the `top_n` most probable tokens of each place; on the first pipeline stage, else None."""
    (top_n,), _ = _shared([top_n], [])
    if not 0 <= top_n <= usable_vocab_size(get_tokenizer()):
        raise ValueError(f"there are no {top_n} most probable tokens")
    tokens, lengths, log_probs, logits = score_and_return_on_first_stage(model, *tokenize_prompts(prompts, 0))
    values = ids = None
    if top_n > 0:
        values, ids = top_log_probs_on_first_stage(logits, top_n, *tokens.shape)
    if log_probs is None:
        return None
    scored = []
    for row, length in enumerate(lengths.tolist()):
        top = []
        if values is not None and ids is not None:
            pairs = zip(ids[row, : length - 1].tolist(), values[row, : length - 1].tolist())
            top = [dict(zip(*place)) for place in pairs]
        scored.append(ScoredPrompt(tokens[row, :length].tolist(), log_probs[row, : length - 1].tolist(), top))
    return scored


def _shared(integers: list[int], floats: list[float]) -> tuple[list[int], list[float]]:
    """Rank 0's numbers, exactly, on every rank; ValueError on all for one that does not fit 64 bits."""

    def prepare() -> tuple[list[int], list[float]]:
        exact = [int(number) for number in integers]
        too_large = [number for number in exact if not -(2**63) <= number < 2**63]
        if too_large:
            raise ValueError(f"{too_large[0]} does not fit an integer of 64 bits")
        return exact, [float(number) for number in floats]

    own_integers, own_floats = prepare_on_rank(prepare) or (None, None)
    return (
        broadcast_int_list(len(integers), own_integers).tolist(),
        broadcast_float_list(len(floats), own_floats).tolist(),
    )
