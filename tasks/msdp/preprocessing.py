#!/usr/bin/env python3
"""Files for dialogue prompting: `python tasks/msdp/preprocessing.py --func NAME ...`.

process_wow_dataset   Wizard of Wikipedia (--raw_file, JSON) to samples (--processed_file)
process_woi_dataset   Wizard of the Internet (--raw_file, JSON lines) to samples (--processed_file)
                      both also write references (--knwl_ref_file, --resp_ref_file)
get_knwl_gen_prompts  examples before the knowledge of each sample: --test_file, --train_file, --model_file (a DPR
                      question encoder), --data_type, --processed_file
get_resp_gen_prompts  examples before responses: --train_file, --seed, --processed_file
prepare_input         samples with generated knowledge: --test_file, --knwl_gen_file, --processed_file

A sample is a line of topic, turns joined by ` [SEP] `, knowledge and response, with tabs between them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.core.dist_checkpointing import durable
from megatron.core.errors import DataError, FlagError
from megatron.training.cli import run_main
from tasks.msdp.prompt_selection import (
    DATA_TYPES,
    RESPONSE_EXAMPLES,
    knowledge_examples,
    load_encoder,
    response_examples,
)
from tasks.msdp.text import (
    END_OF_DOCUMENT,
    NO_KNOWLEDGE,
    TURN_SEPARATOR,
    Sample,
    read_lines,
    read_samples,
    spaced,
)


def one_cell(text: str) -> str:
    """A text without what ends cells and lines."""
    return text.replace("\n", "").replace("\r", "").replace("\t", "")


def line_of(sample: Sample) -> str:
    """A sample as a line."""
    cells = (sample.topic, TURN_SEPARATOR.join(sample.turns), sample.knowledge, sample.response)
    return "\t".join(map(one_cell, cells)) + "\n"


def write_samples(
    samples: Iterator[Sample], processed_file: str, knwl_ref_file: str | None, resp_ref_file: str | None
) -> None:
    """Write samples, and the references of their knowledge and (word by word) their responses."""
    found = list(samples)
    durable.write_text(processed_file, "".join(map(line_of, found)))
    if knwl_ref_file is not None:
        durable.write_text(knwl_ref_file, "".join(one_cell(sample.knowledge) + "\n" for sample in found))
    if resp_ref_file is not None:
        lines = (spaced(one_cell(sample.response)) + "\n" for sample in found)
        durable.write_text(resp_ref_file, "".join(lines))
    print(f"> {len(found)} samples in {processed_file}", flush=True)


def parse_json(text: str, place: str) -> Any:
    """JSON, or a DataError that says where it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(place, f"not JSON: {error}", "give the file as it was published") from error


def wow_samples(path: str) -> Iterator[Sample]:
    """Samples of Wizard of Wikipedia: a wizard's turns, not the first of a dialogue, with the sentence they draw on."""
    for number, dialogue in enumerate(parse_json("\n".join(read_lines(path)), path)):
        place = f"{path}: dialogue {number}"
        try:
            turns: list[str] = []
            for turn in dialogue["dialog"]:
                text = turn["text"] if turn["text"].endswith(("?", ".", "!")) else turn["text"] + "."
                if turns and "wizard" in turn["speaker"].lower():
                    sentences, passages = (
                        list(turn[key].values()) for key in ("checked_sentence", "checked_passage")
                    )
                    if len(sentences) > 1:
                        raise DataError(place, "a turn has several checked sentences", "keep one of them")
                    knowledge = sentences[0] if sentences else NO_KNOWLEDGE
                    named = len(passages) == 1 and passages[0] != NO_KNOWLEDGE
                    topic = passages[0] if named else dialogue["chosen_topic"]
                    yield Sample(place, topic, list(turns), knowledge, text)
                turns.append(text)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                place,
                f"not a dialogue of Wizard of Wikipedia ({error!r})",
                "give the file as it was published",
            ) from error


def woi_samples(path: str) -> Iterator[Sample]:
    """Samples of Wizard of the Internet: a wizard's turns, not the first of a dialogue, that draw on a passage.

    Their topic is what the wizard searched for last.
    """
    for number, line in enumerate(read_lines(path), 1):
        place = f"{path}:{number}"
        dialogues = parse_json(line, place)
        try:
            for dialogue in dialogues.values():
                turns: list[str] = []
                topic = ""
                for item in dialogue["dialog_history"]:
                    if item["action"] == "Wizard => SearchAgent":
                        topic = item["text"]
                    elif item["action"] == "Apprentice => Wizard":
                        turns.append(one_cell(item["text"]))
                    elif item["action"] == "Wizard => Apprentice":
                        knowledge = selected_sentence(item.get("context"), place) if turns else None
                        if knowledge:
                            yield Sample(place, topic, list(turns), knowledge, item["text"])
                        turns.append(one_cell(item["text"]))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise DataError(
                place,
                f"not a dialogue of Wizard of the Internet ({error!r})",
                "give the file as it was published",
            ) from error


def selected_sentence(context: dict[str, Any] | None, place: str) -> str | None:
    """The sentence that a turn draws on: the first one selected of the last passage that has one; None without."""
    if context is None:
        return None
    (none_used, *_), *selected = context["selected_contents"]
    passages = [passage["content"] for passage in context["contents"]]
    if [len(flags) for flags in selected] != [len(sentences) for sentences in passages]:
        raise DataError(
            place, "what is selected does not fit the passages", "give the file as it was published"
        )
    if none_used:
        return None
    first = [
        next(sentence for sentence, used in zip(sentences, flags) if used)
        for sentences, flags in zip(passages, selected)
        if any(flags)
    ]
    return one_cell(first[-1]) if first else None


def process_wow_dataset(args: argparse.Namespace) -> None:
    """Wizard of Wikipedia to samples."""
    write_samples(wow_samples(args.raw_file), args.processed_file, args.knwl_ref_file, args.resp_ref_file)


def process_woi_dataset(args: argparse.Namespace) -> None:
    """Wizard of the Internet to samples."""
    write_samples(woi_samples(args.raw_file), args.processed_file, args.knwl_ref_file, args.resp_ref_file)


def get_knwl_gen_prompts(args: argparse.Namespace) -> None:
    """Examples for the knowledge of each test sample."""
    if args.data_type not in DATA_TYPES:
        raise FlagError(
            "--data_type", f"there is no {args.data_type}", f"give one of {', '.join(DATA_TYPES)}"
        )
    encode = load_encoder(args.model_file)
    lines = knowledge_examples(args.test_file, args.train_file, args.data_type, encode)
    durable.write_text(args.processed_file, "".join(lines))
    print(f"> examples for {len(lines)} samples in {args.processed_file}", flush=True)


def get_resp_gen_prompts(args: argparse.Namespace) -> None:
    """Examples for responses."""
    examples = response_examples(args.train_file, args.seed)
    if not examples:
        raise DataError(
            args.train_file, "no response takes over most of its knowledge", "give the whole training data"
        )
    durable.write_text(args.processed_file, "".join(f"{example}\n" for example in examples))
    fewer = "" if len(examples) == RESPONSE_EXAMPLES else f", fewer than the usual {RESPONSE_EXAMPLES}"
    print(f"> {len(examples)} examples{fewer} in {args.processed_file}", flush=True)


def prepare_input(args: argparse.Namespace) -> None:
    """Test samples with the knowledge that was generated for them."""
    generated = read_lines(args.knwl_gen_file)
    samples = list(read_samples(args.test_file))
    if len(generated) != len(samples):
        raise DataError(
            args.knwl_gen_file, f"{len(generated)} lines for the {len(samples)} samples of {args.test_file}",
            "give what was generated for that file",
        )  # fmt: skip
    knowledge = [line.strip().replace(END_OF_DOCUMENT, "") for line in generated]
    lines = (line_of(sample._replace(knowledge=known)) for sample, known in zip(samples, knowledge))
    durable.write_text(args.processed_file, "".join(lines))
    print(f"> {len(samples)} samples in {args.processed_file}", flush=True)


#: Functions by name, with the flags each needs.
FUNCTIONS: dict[str, tuple[Callable[[argparse.Namespace], None], tuple[str, ...]]] = {
    "process_wow_dataset": (process_wow_dataset, ("raw_file", "processed_file")),
    "process_woi_dataset": (process_woi_dataset, ("raw_file", "processed_file")),
    "get_knwl_gen_prompts": (
        get_knwl_gen_prompts,
        ("test_file", "train_file", "model_file", "data_type", "processed_file"),
    ),
    "get_resp_gen_prompts": (get_resp_gen_prompts, ("train_file", "processed_file")),
    "prepare_input": (prepare_input, ("test_file", "knwl_gen_file", "processed_file")),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--func", help="what to do")
    parser.add_argument("--raw_file", help="a data set as it was published")
    parser.add_argument("--processed_file", help="what is written")
    parser.add_argument("--knwl_ref_file", help="knowledge of each sample, to compare with")
    parser.add_argument("--resp_ref_file", help="response of each sample, to compare with")
    parser.add_argument("--knwl_gen_file", help="knowledge that was generated for each sample")
    parser.add_argument("--test_file", help="samples to generate for")
    parser.add_argument("--train_file", help="samples to take examples from")
    parser.add_argument("--model_file", help="directory of a DPR question encoder with its tokenizer")
    parser.add_argument("--data_type", help=", ".join(DATA_TYPES))
    parser.add_argument("--seed", type=int, default=1234, help="of the order of examples")
    return parser


def main() -> None:
    """Do what the command line says."""
    args = build_parser().parse_args()
    if args.func not in FUNCTIONS:
        why = "it is not said what to do" if args.func is None else f"there is no {args.func}"
        raise FlagError("--func", why, f"give one of {', '.join(FUNCTIONS)}")
    function, needed = FUNCTIONS[args.func]
    for name in needed:
        if getattr(args, name) is None:
            raise FlagError(f"--{name}", f"{args.func} needs it", "add it")
    function(args)


if __name__ == "__main__":
    run_main(main)
