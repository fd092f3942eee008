"""Embeddings of texts: those of plain PyTorch from the same weights, and of transformers; on one process and on two."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import pretrain_bert
from megatron.core.enums import ModelType
from megatron.core.errors import MegatronError
from megatron.training import initialize_megatron
from megatron.training.checkpointing import save_checkpoint
from megatron.training.setup import get_model
from megatron.training.utils import unwrap_model
from tests.gang.harness import run_gang
from tests.reference import models as reference
from tests.runs.test_tasks import BERT
from tests.unit.tasks.support import RECORDED, tokenizer
from tools.bert_embedding import BertEmbedder, embed_json

TEXTS = [
    "the keeper counted seven boats",
    "<|endoftext|>a heron<|endoftext|>",
    "",
    "tea " * 40,
    "at dawn, when the boats came back!",
]
EMBEDDING = "--output-bert-embeddings --texts {0}/texts --blocks {0}/blocks --block-size 2 --load {1} "


def run_embedding(words: str) -> str:
    """Body: the tool; why it refuses, if it does."""
    with (
        mock.patch("sys.argv", ["embed_json.py", *words.split()]),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            embed_json.main()
        except MegatronError as error:
            return str(error)
    return ""


def embed_with_transformers(words: str, folder: str) -> list[np.ndarray]:
    """Body: the vectors of all texts, and of the first."""
    with mock.patch("sys.argv", ["x.py", *words.split()]), contextlib.redirect_stdout(io.StringIO()):
        initialize_megatron()
        embedder = BertEmbedder(2, 24, "huggingface", huggingface_model=folder)
    return [embedder.embed_text_dataset([{"text": text} for text in TEXTS]), embedder.embed_text(TEXTS[0])]


def save_bert(folder: str) -> dict[str, Tensor]:
    """Body: a BERT with weights in general position, saved; returns them."""
    words = [*BERT.split(), "--save", folder, "--save-interval", "1"]
    with mock.patch("sys.argv", ["x.py", *words]), contextlib.redirect_stdout(io.StringIO()):
        args = initialize_megatron().args
        model = get_model(pretrain_bert.model_provider, ModelType.encoder_or_decoder, wrap_with_ddp=False)
        noise = torch.Generator().manual_seed(3)
        for parameter in model[0].parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=noise)
        save_checkpoint(1, model, None, None, 0, args=args)
    return {name: value.detach().clone() for name, value in unwrap_model(model)[0].named_parameters()}


def plain_vectors(weights: dict[str, Tensor]) -> Tensor:
    """One text after the other: no padding, so no mask."""
    shape = reference.Shape(layers=2, heads=4, groups=4, head=8)
    words = tokenizer("bert")
    rows = []
    for text in TEXTS:
        tokens = words.tokenize(text.replace("<|endoftext|>", ""))[:22] or [words.pad]
        ids = torch.tensor([[words.cls, *tokens, words.sep]])
        x = reference.embed(weights, ids, torch.zeros_like(ids))
        hidden = reference.stack(weights, "encoder", x, torch.zeros(1, *[ids.size(1)] * 2, dtype=bool), shape)
        rows.append(hidden[0, 1:-1].mean(0))
    return torch.stack(rows)


def blocks_in(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(folder.iterdir()):
        with h5py.File(path) as file:
            found[path.name] = file["data"][:]
    return found


def test_blocks_hold_what_plain_pytorch_computes(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (weights,) = run_gang(1, save_bert, str(tmp_path / "bert"))
    words = BERT + EMBEDDING.format(tmp_path, tmp_path / "bert")
    assert run_gang(1, run_embedding, words) == [""]
    blocks = blocks_in(tmp_path / "blocks")
    assert list(blocks) == ["00-02.hdf5", "02-04.hdf5", "04-05.hdf5"]
    expected = plain_vectors(weights).numpy()
    np.testing.assert_allclose(np.concatenate(list(blocks.values())), expected, rtol=1e-5, atol=1e-6)
    # Two ranks make what is missing or damaged, and leave the rest alone.
    for name, content in (("00-02.hdf5", b"torn"), ("02-04.hdf5", None)):
        path = tmp_path / "blocks" / name
        path.unlink() if content is None else path.write_bytes(content)
    os.utime(tmp_path / "blocks" / "04-05.hdf5", (1, 1))
    assert run_gang(2, run_embedding, words) == ["", ""]
    again = blocks_in(tmp_path / "blocks")
    assert again.keys() == blocks.keys()
    for name in blocks:
        np.testing.assert_allclose(again[name], blocks[name], rtol=1e-6, atol=1e-7)
    assert (tmp_path / "blocks" / "04-05.hdf5").stat().st_mtime == 1
    (refusal,) = run_gang(1, run_embedding, f"{words} --block-size 3")
    assert "it holds 00-02.hdf5, which is no block of 5 texts, 3 each" in refusal


def test_huggingface(tmp_path: Path) -> None:
    """As transformers embeds each text alone; a text without tokens is 0."""
    torch.manual_seed(2)
    words = transformers.BertTokenizerFast(str(RECORDED / "vocab" / "bert-vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    bert = transformers.BertModel(config).eval()
    bert.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    expected = []
    for text in TEXTS:
        plain = text.replace("<|endoftext|>", "")
        inputs = words(plain, truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            hidden = bert(**inputs).last_hidden_state[0, 1:-1]
        expected.append(hidden.mean(0) if len(hidden) else torch.zeros(16))
    ((every, first),) = run_gang(1, embed_with_transformers, BERT + "--output-bert-embeddings", str(tmp_path))
    np.testing.assert_allclose(every, torch.stack(expected).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(first, every[0], rtol=1e-5, atol=1e-6)
    assert every[2].tolist() == [0.0] * 16


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("", "--output-bert-embeddings: a BERT for embeddings is told so"),
        ("--output-bert-embeddings", "--load: there is no model to embed with"),
        ("--output-bert-embeddings --load none", "--load none: it has no checkpoint"),
    ],
)
def test_what_it_refuses(flags: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text('{"text": "a"}\n{"text": 1}\n')
    (refusal,) = run_gang(
        1, run_embedding, f"{BERT} --texts {tmp_path}/texts --blocks {tmp_path}/blocks {flags}"
    )
    assert refusal.startswith(reason)


def test_bad_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "texts").write_bytes(b'{"text": "a"}\n{"text": 1}\nnone\n{"text": "\xff"}')
    texts = embed_json.JsonTexts(str(tmp_path / "texts"))
    assert len(texts) == 4 and texts[0] == {"text": "a"}
    for line in (1, 2, 3):
        with pytest.raises(MegatronError, match=f"texts:{line + 1}: not a JSON object with a text"):
            texts[line]
