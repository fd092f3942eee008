"""Which training samples are shown to the model as examples before it generates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron.core import device
from megatron.core.errors import FlagError
from tasks.msdp.text import NO_KNOWLEDGE, Sample, read_samples, response_prompt, spaced, tokenize

DATA_TYPES = ("wow_seen", "wow_unseen", "woi")
KNOWLEDGE_EXAMPLES = 10
RESPONSE_EXAMPLES = 20
#: Turns of a dialogue that are compared.
LAST_TURNS = 3
#: Knowledge of other topics is shown if it is no longer, and understood without what was said before.
MOST_WORDS = 20
REFERRING = ("It", "it", "This", "this")
#: What a response takes over from its knowledge counts in runs of this many tokens.
SHORTEST_RUN = 10

#: Texts -> their vectors [n, h].
Encode = Callable[[list[str]], Tensor]


def response_examples(train_file: str, seed: int) -> list[str]:
    """Samples whose response is made mostly, not wholly, of their knowledge; in random order."""
    examples = []
    for sample in read_samples(train_file):
        response, knowledge = tokenize(sample.response), tokenize(sample.knowledge)
        taken = tokens_taken_over(response, set(knowledge))
        if 0.6 * len(response) <= taken <= 0.9 * len(response) and taken >= 0.8 * len(knowledge):
            examples.append(f"{response_prompt(sample)} {spaced(sample.response)}")
    np.random.RandomState(seed).shuffle(examples)
    return examples[:RESPONSE_EXAMPLES]


def tokens_taken_over(response: list[str], knowledge: set[str]) -> int:
    """Tokens of a response in runs of ten or more that are all in the knowledge."""
    runs = (len(list(run)) for known, run in groupby(response, knowledge.__contains__) if known)
    return sum(length for length in runs if length >= SHORTEST_RUN)


def knowledge_examples(test_file: str, train_file: str, data_type: str, encode: Encode) -> list[str]:
    """For each test sample a JSON line, `{topic and last turn: [examples]}`, the example most like it last.

    A topic of the training data has examples of its own; any other gets those of other topics, one of each.
    """
    tests = list(read_samples(test_file, fields=2))
    pool = ExamplePool(read_samples(train_file), {sample.topic for sample in tests}, data_type, encode)
    return [
        json.dumps({f"{sample.topic} {sample.turns[-1]}": pool.most_similar(sample)}) + "\n"
        for sample in tests
    ]


class ExamplePool:
    """Training samples fit to be shown, with the vectors of their dialogues."""

    def __init__(
        self, samples: Iterable[Sample], test_topics: set[str], data_type: str, encode: Encode
    ) -> None:
        self._names_topic = data_type != "wow_seen"
        self._encode = encode
        kept = [sample for sample in samples if self._fits(sample, test_topics)]
        self._topics = [sample.topic for sample in kept]
        self._examples = [f"( {sample.turns[-1]} ) {sample.topic} => {sample.knowledge}" for sample in kept]
        self._vectors = encode([self._dialogue(sample) for sample in kept]) if kept else torch.empty(0, 0)

    def _fits(self, sample: Sample, test_topics: set[str]) -> bool:
        """Whether a sample has knowledge that says what it is about."""
        knowledge = sample.knowledge
        if knowledge in (NO_KNOWLEDGE, ""):
            return False
        if self._names_topic and ("(" in knowledge or ")" in knowledge or sample.topic not in knowledge):
            return False
        return sample.topic in test_topics or (
            len(knowledge.split()) <= MOST_WORDS and not knowledge.startswith(REFERRING)
        )

    def _dialogue(self, sample: Sample) -> str:
        """What is compared: the last turns, with the topic where topics are new to the model."""
        turns = " ".join(sample.turns[-LAST_TURNS:])
        return f"( {sample.topic} ) {turns}" if self._names_topic else turns

    def most_similar(self, sample: Sample) -> list[str]:
        """At most ten examples, the most similar one last."""
        if not self._examples:
            return []
        similarity = self._vectors @ self._encode([self._dialogue(sample)])[0]
        ranked = similarity.argsort(descending=True, stable=True).tolist()
        own = [number for number in ranked if self._topics[number] == sample.topic]
        if not own:  # the best of each other topic
            best: dict[str, int] = {}
            for number in ranked:
                best.setdefault(self._topics[number], number)
            own = list(best.values())
        return [self._examples[number] for number in own[:KNOWLEDGE_EXAMPLES]][::-1]


def load_encoder(model_file: str) -> Encode:
    """The question encoder of Dense Passage Retrieval (Karpukhin et al. 2020) in a directory of transformers."""
    if not Path(model_file).is_dir():
        raise FlagError(
            "--model_file", f"{model_file} is not a directory",
            "give the directory of a DPR question encoder with its tokenizer, as save_pretrained of transformers writes it",
        )  # fmt: skip
    try:
        from transformers import AutoTokenizer, DPRQuestionEncoder
    except ImportError as error:
        raise FlagError(
            "--model_file", "the encoder needs transformers", "pip install transformers"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_file, local_files_only=True)
        encoder = DPRQuestionEncoder.from_pretrained(model_file, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FlagError(
            "--model_file", f"{model_file} holds no DPR question encoder with its tokenizer: {error}",
            "save both there with save_pretrained",
        ) from error  # fmt: skip
    encoder = encoder.to(device.current()).eval()
    longest = encoder.config.max_position_embeddings

    @torch.no_grad()
    def encode(texts: list[str], rows: int = 32) -> Tensor:
        parts = []
        for first in range(0, len(texts), rows):
            batch = tokenizer(
                texts[first : first + rows],
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            parts.append(encoder(**batch.to(device.current())).pooler_output.float().cpu())
        return torch.cat(parts)

    return encode
