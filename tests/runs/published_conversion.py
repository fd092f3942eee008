"""A random GPT-2 with a tokenizer of its own, generated from by our tool and by transformers' converters and pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
PROMPT = "the quick brown fox"
TOKENS = 24
_TEXT = ["the quick brown fox jumps over the lazy dog and runs away from the brown bear"] * 4

_PIPELINE = """
import sys
from transformers import AutoTokenizer, pipeline
model, tokenizer, prompt, tokens = sys.argv[1:]
run = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(tokenizer))
print("TEXT" + run(prompt, max_new_tokens=int(tokens), do_sample=False)[0]["generated_text"])
"""

_BERT_OUTPUTS = """
import sys
import numpy, torch
from transformers import MegatronBertForPreTraining
directory, batch_file, output_file = sys.argv[1:]
model, info = MegatronBertForPreTraining.from_pretrained(directory, output_loading_info=True)
assert not any(info.values()), info
batch = {name: torch.from_numpy(value) for name, value in numpy.load(batch_file).items()}
with torch.no_grad():
    output = model.eval()(
        batch["tokens"], attention_mask=batch["padding_mask"], token_type_ids=batch["types"])
numpy.savez(output_file, logits=output.prediction_logits, binary_logits=output.seq_relationship_logits)
"""


def command(*arguments: object, path: Path | None = None, cwd: Path | None = None, **environment: str) -> str:
    """Run a Python program in a process of its own; its output. `path` precedes the installed packages."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path or ROOT), **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_model(directory: Path) -> None:
    """A random GPT-2 and a byte-level tokenizer, as HuggingFace stores them."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(_TEXT, vocab_size=300, special_tokens=["<|endoftext|>"])
    directory.mkdir(parents=True)
    tokenizer.save_model(str(directory))
    size = tokenizer.get_vocab_size()
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **tokens).save_pretrained(
        directory
    )
    tokenizer.save_model(str(directory))
    # The class that every version of transformers knows.
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2TokenizerFast"}')
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=size, n_embd=64, n_layer=3, n_head=4, n_positions=64, activation_function="gelu_new"
    )
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)


def convert(*arguments: object, model_type: str = "GPT") -> str:
    """tools/checkpoint/convert.py."""
    return command(ROOT / "tools" / "checkpoint" / "convert.py", "--model-type", model_type, *arguments)


def ours(checkpoint: Path, tokenizer: Path) -> str:
    """What tools/generate_text.py continues the prompt with, greedily."""
    output = command(
        ROOT / "tools" / "generate_text.py", "--load", checkpoint, "--use-checkpoint-args", "--prompt", PROMPT,
        "--out-seq-length", TOKENS, "--top-k", 1, "--vocab-file", tokenizer / "vocab.json", "--merge-file",
        tokenizer / "merges.txt", "--tokenizer-type", "GPT2BPETokenizer", "--micro-batch-size", 1,
        "--ckpt-format", "torch", "--make-vocab-size-divisible-by", 1,
    )  # fmt: skip
    return output.strip().splitlines()[-1]


def pipeline(model: Path, tokenizer: Path, transformers_path: Path | None = None) -> str:
    """What transformers' pipeline continues the prompt with, greedily."""
    output = command("-c", _PIPELINE, model, tokenizer, PROMPT, TOKENS, path=transformers_path)
    return output.partition("TEXT")[2].rstrip("\n")


def bert_outputs(model: Path, batch: Path, output: Path, transformers_path: Path) -> Mapping[str, np.ndarray]:
    """`logits` and `binary_logits` that transformers' Megatron-BERT computes of the batch in an .npz file."""
    command("-c", _BERT_OUTPUTS, model, batch, output, path=transformers_path)
    return np.load(output)
