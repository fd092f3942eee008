"""Generate knowledge or responses after a few examples, by a model here or behind a text generation server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Iterator
from http.client import HTTPException

from megatron.core.dist_checkpointing import durable
from megatron.core.errors import DataError, FlagError, MegatronError
from megatron.core.inference.common_inference_params import CommonInferenceParams
from megatron.core.inference.engines.mcore_engine import MCoreEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.text_generation_controllers.simple_text_generation_controller import (
    SimpleTextGenerationController,
)
from megatron.training.checkpointing import load_checkpoint
from megatron.training.global_vars import get_tokenizer
from megatron.training.setup import get_model
from pretrain_gpt import model_provider
from tasks.msdp.text import read_lines, read_samples, response_prompt

#: Prompts -> what the model says after each.
Generate = Callable[[list[str]], list[str]]
TIMEOUT_S = 600


def main(args: Namespace) -> None:
    """Write a line of generated text for each sample; with a model, all of its ranks must call."""
    prompts = list(build_prompts(args))
    if args.api_prompt:
        generate, batch = ask_server(args), 1
    else:
        generate, batch = ask_model(args, prompts), args.micro_batch_size
    answers: list[str] = []
    for first in range(0, len(prompts), batch):
        answers += map(first_line, generate(prompts[first : first + batch]))
        if args.rank == 0 and len(answers) // args.log_interval > first // args.log_interval:
            print(f"generated {len(answers)} of {len(prompts)} lines", flush=True)
    if args.rank == 0:
        output = args.sample_output_file or f"{args.sample_input_file}.out"
        durable.write_text(output, "".join(f"{answer}\n" for answer in answers))
        print(f"wrote {output}\ndone :-)", flush=True)


def first_line(generated: str) -> str:
    """The answer: examples in a prompt take a line each, so what follows the first line is about something else."""
    return generated.partition("\n")[0].strip()


def build_prompts(args: Namespace) -> Iterator[str]:
    """The prompt of each sample: examples, a line each, and the sample without its answer."""
    if args.prompt_type == "knowledge":
        examples = read_knowledge_examples(args.prompt_file)
        for sample in read_samples(args.sample_input_file, fields=2):
            key = f"{sample.topic} {sample.turns[-1]}"
            if key not in examples:
                raise DataError(
                    sample.place, f"{args.prompt_file} has no examples for {key!r}",
                    "make that file from this one: preprocessing.py --func get_knwl_gen_prompts",
                )  # fmt: skip
            yield lines_of(examples[key]) + f"( {sample.turns[-1]} ) {sample.topic} =>"
    else:
        shown = lines_of(read_lines(args.prompt_file)[: args.num_prompt_examples])
        for sample in read_samples(args.sample_input_file, fields=3):
            yield shown + response_prompt(sample)


def lines_of(examples: list[str]) -> str:
    """Examples with their ends of line."""
    return "".join(f"{example.strip()} \n" for example in examples)


def read_knowledge_examples(path: str) -> dict[str, list[str]]:
    """Examples by topic and last turn; the first ones of a key stay."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            ((key, examples),) = json.loads(line).items()
            if not all(isinstance(example, str) for example in examples):
                raise TypeError("examples are texts")
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(
                f"{path}:{number}", "not {topic and last turn: [examples]}",
                "give what preprocessing.py --func get_knwl_gen_prompts writes",
            ) from error  # fmt: skip
        found.setdefault(key, examples)
    return found


def ask_server(args: Namespace) -> Generate:
    """Prompts go to --megatron-api-url, one by one."""

    def generate(prompts: list[str]) -> list[str]:
        return [ask(args.megatron_api_url, prompt, args.out_seq_length) for prompt in prompts]

    return generate


def ask(url: str, prompt: str, tokens_to_generate: int) -> str:
    """What the model behind `url` says greedily after a prompt."""
    body = {"prompts": [prompt], "tokens_to_generate": tokens_to_generate, "top_k": 1}
    request = urllib.request.Request(
        url,
        data=json.dumps(body).encode("utf-8"),
        headers={"Content-Type": "application/json; charset=UTF-8"},
        method="PUT",
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            text = json.load(response)["text"][0]
    except urllib.error.HTTPError as error:
        said = error.read(500).decode("utf-8", "replace")
        raise MegatronError(url, f"the server answers {error.code}: {said}", "see its log") from error
    except (OSError, HTTPException) as error:
        raise MegatronError(
            url, f"the server cannot be reached: {error}", "check --megatron-api-url"
        ) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        why = f"its answer is not what a text generation server says ({error!r})"
        raise MegatronError(url, why, "check --megatron-api-url") from error
    return text[len(prompt) :]


def ask_model(args: Namespace, prompts: list[str]) -> Generate:
    """The model of --load; FlagError where it has no room for one of the prompts and its answer."""
    args.exit_on_missing_checkpoint = True
    model = get_model(model_provider, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    controller = SimpleTextGenerationController(GPTInferenceWrapper(model[0], args), get_tokenizer())
    longest = max((len(controller.tokenize_prompt(prompt)) for prompt in prompts), default=0)
    if longest + args.out_seq_length > args.max_position_embeddings:
        raise FlagError(
            "--max-position-embeddings",
            f"{longest} prompt tokens and {args.out_seq_length} new ones exceed its {args.max_position_embeddings}",
            "lower --num-prompt-examples or --out-seq-length",
        )
    engine = MCoreEngine(controller, max_batch_size=args.micro_batch_size)
    wanted = CommonInferenceParams(top_k=1, num_tokens_to_generate=args.out_seq_length)

    def generate(batch: list[str]) -> list[str]:
        return [request.generated_text or "" for request in engine.generate(batch, wanted)]

    return generate
