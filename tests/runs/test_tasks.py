"""Tasks from the command line to their last line: against plain PyTorch and, in every layout, against one process."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

import pretrain_gpt
from megatron.core.dist_checkpointing import load_plain_tensors
from megatron.core.enums import ModelType
from megatron.core.errors import FlagError
from megatron.training import arguments, initialize_megatron
from megatron.training.checkpointing import save_checkpoint
from megatron.training.config import parser
from megatron.training.setup import get_model
from megatron.training.utils import unwrap_model
from tasks import main as tasks_main
from tasks.arguments import FINETUNING, TASKS, add_tasks_arguments, check_task
from tasks.glue.mnli import MNLIDataset
from tasks.race.data import RaceDataset
from tasks.zeroshot_gpt.datasets import LambadaDataset
from tests.gang.harness import GangError, run_gang
from tests.reference import models as reference
from tests.runs.pretraining import amended
from tests.unit.tasks.support import RECORDED, expected, tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINTS = REPOSITORY / "tests" / "golden" / "checkpoints"
SHAPE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --num-workers 0 --no-bias-gelu-fusion "
    "--attention-dropout 0 --hidden-dropout 0 --distributed-backend gloo --metrics-file /dev/null "
)
BERT = (
    f"{SHAPE} --seq-length 24 --max-position-embeddings 24 --tokenizer-type BertWordPieceLowerCase "
    f"--vocab-file {RECORDED}/vocab/bert-vocab.txt --micro-batch-size 2 --lr 1e-2 --lr-warmup-fraction 0.1 "
    "--weight-decay 0.1 --log-interval 1 --eval-interval 3 --eval-iters 1 --save-interval 1000 "
)
GPT = (
    f"{SHAPE} --seq-length 32 --max-position-embeddings 32 --tokenizer-type GPT2BPETokenizer --micro-batch-size 3 "
    f"--vocab-file {RECORDED}/vocab/gpt-vocab.json --merge-file {RECORDED}/vocab/gpt-merges.txt --log-interval 5 "
)
GLUE, RACE = RECORDED / "glue", RECORDED / "race" / "RACE" / "dev"
MNLI_FILES = f"{GLUE}/MNLI/dev_matched.tsv {GLUE}/MNLI/train.tsv "
MNLI = f"--task MNLI --train-data {GLUE}/MNLI/train.tsv {GLUE}/MNLI/dev_matched.tsv --valid-data {MNLI_FILES}"
QQP = f"--task QQP --train-data {GLUE}/QQP/train.tsv --valid-data {GLUE}/QQP/train.tsv "
RACE_FILES = f"--task RACE --train-data {RACE}/middle {RACE}/high --valid-data {RACE}/high {RACE}/middle "
WIKI = f"--task WIKITEXT103 --valid-data {RECORDED}/zeroshot/wiki.test.tokens "


def run_task(words: str) -> str:
    """Body: one task; what this rank printed."""
    printed = io.StringIO()
    with mock.patch("sys.argv", ["main.py", *words.split()]), contextlib.redirect_stdout(printed):
        tasks_main.run()
    return printed.getvalue()


def last_rank(ranks: int, words: str) -> str:
    return run_gang(ranks, run_task, words)[-1]


def accuracies(text: str) -> list[tuple[str, ...]]:
    """Epoch, name, correct and total of each line about a data set, and of the overall lines."""
    return re.findall(r"\|epoch: (\S+)\| (?:metrics for )?(\S+): correct / total = (\d+) / (\d+) = ", text)


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"\| lm loss: (\S+) \|", text)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERTs as v0.9 wrote them, in several formats and of several ages."""
    folder = tmp_path_factory.mktemp("pretrained")
    for name in ("bert", "legacy_bert"):
        with tarfile.open(CHECKPOINTS / name / "checkpoints.tar.xz") as archive:
            archive.extractall(folder / name, filter="data")
    return folder


# ---- finetuning


@pytest.fixture(scope="module")
def finetuned(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model after one epoch of MNLI in one process, and what that printed."""
    folder = tmp_path_factory.mktemp("finetuned")
    start = f"--pretrained-checkpoint {pretrained}/bert/torch_dist --save {folder} --load {folder} --epochs 1"
    return folder, last_rank(1, BERT + MNLI + start)


def test_finetuning_prints_what_v09_prints(finetuned: tuple[Path, str]) -> None:
    _, text = finetuned
    wanted = [
        " > building MNLI dataset for training:",
        "  >> total number of samples: 6",
        "building train and validation dataloaders ...",
        " > building MNLI dataset for dev-matched:",
        "***WARNING*** could not find classification_head in the checkpoint, initializing to random",
        "done with setups ...",
        "training ...",
        "working on epoch 1 ...",
        " iteration        3/       3 | consumed samples:            6 |",
        " validation loss at iteration 3 | lm loss value: ",
        "saving checkpoint at iteration       3 to ",
        "calculating metrics ...",
        " > |epoch: 0| metrics for dev-matched: correct / total = ",
        " > |epoch: 0| metrics for train: correct / total = ",
        " >> |epoch: 0| overall: correct / total = ",
        "done :-)",
    ]
    position = 0
    for line in wanted:
        assert line in text[position:], line
        position = text.index(line, position) + 1


def test_finetuning_follows_plain_pytorch(finetuned: tuple[Path, str]) -> None:
    """Three epochs from the checkpoint's weights: losses and accuracy of the same steps in plain PyTorch."""
    folder, _ = finetuned
    text = last_rank(1, BERT + MNLI + f"--load {folder} --epochs 3 --finetune")
    rates = [float(value) for value in re.findall(r"learning rate: (\S+) \|", text)]
    weights = {key: value.requires_grad_() for key, value in weights_of(folder).items()}
    groups = [[p for p in weights.values() if (p.dim() > 1) is decayed] for decayed in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
    )
    paths = [f"{GLUE}/MNLI/train.tsv", f"{GLUE}/MNLI/dev_matched.tsv"]
    dataset = MNLIDataset("training", paths, tokenizer("bert"), 24)
    expected = []
    for step in range(9):
        epoch, batch = divmod(step, 3)
        sampler: Any = DistributedSampler(dataset, num_replicas=1, rank=0)
        sampler.set_epoch(1234 + epoch)
        samples = [dataset[index] for index in list(sampler)[2 * batch : 2 * batch + 2]]
        loss = F.cross_entropy(
            classify(weights, samples, "classification_head"), torch.tensor([s["label"] for s in samples])
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rates[step - 1] if step else 0.0  # a line shows the rate of the step after it
        optimizer.step()
        expected.append(loss.item())
    assert losses(text)[: len(expected)] == pytest.approx(expected, rel=2e-4)
    everything = [dataset[index] for index in range(len(dataset))]
    guesses = classify(weights, everything, "classification_head").argmax(-1)
    right = sum(int(guess) == sample["label"] for guess, sample in zip(guesses, everything))
    assert accuracies(text)[-1] == ("2", "overall", str(right), str(len(everything)))


#: What the norms of a layer are called in torch_dist files, and in a model of plain modules.
NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The weights in the newest checkpoint, layer by layer."""
    stored = load_plain_tensors(str(max(folder.glob("iter_*"))))
    weights: dict[str, Tensor] = {}
    for key, value in stored.items():
        if key.startswith("encoder.layers."):
            rest = key.removeprefix("encoder.layers.")
            for stored_name, name in NORMS.items():
                rest = rest.replace(stored_name, name)
            weights |= {f"encoder.layers.{layer}.{rest}": part.clone() for layer, part in enumerate(value)}
        elif isinstance(value, Tensor) and not key.startswith(("optimizer.", "rng_state")):
            weights[key] = value.clone()
    return weights


def classify(weights: dict[str, Tensor], samples: list[Any], head: str) -> Tensor:
    """Logits [b, n] of packed samples in plain PyTorch; a sample of several sequences gives one for each of them."""
    text, types, padding_mask = (
        torch.cat([torch.as_tensor(sample[key]).view(-1, sample[key].shape[-1]) for sample in samples])
        for key in ("text", "types", "padding_mask")
    )
    tokens = padding_mask.bool()
    hidden = ~(tokens[:, :, None] & tokens[:, None, :])
    shape = reference.Shape(layers=2, heads=4, groups=4, head=8)
    x = reference.stack(weights, "encoder", reference.embed(weights, text, types), hidden, shape)
    pooled = torch.tanh(reference.linear(weights, "pooler.dense", x[:, 0]))
    return reference.linear(weights, head, pooled).view(len(samples), -1)


TP2_PP2 = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --make-vocab-size-divisible-by 128 "
)
#: name: (ranks, flags); with two replicas a micro-batch is half as large.
LAYOUTS = {
    "tp2 + sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel --make-vocab-size-divisible-by 128"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "dp2 + distopt + overlap": (
        2,
        "--micro-batch-size 1 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "tp2 x pp2": (4, TP2_PP2),
    "tp2 x pp2 x dp2": (8, f"{TP2_PP2} --micro-batch-size 1 --sequence-parallel"),
}


@pytest.fixture(scope="module")
def continued(finetuned: tuple[Path, str]) -> str:
    return last_rank(
        1, BERT + MNLI + f"--load {finetuned[0]} --epochs 3 --eval-iters 0 --override-opt_param-scheduler"
    )


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow) if LAYOUTS[name][0] == 8 else name for name in LAYOUTS],
)
def test_layout_goes_on_as_one_process(layout: str, finetuned: tuple[Path, str], continued: str) -> None:
    ranks, flags = LAYOUTS[layout]
    text = last_rank(
        ranks,
        BERT
        + MNLI
        + f"--load {finetuned[0]} --epochs 3 --eval-iters 0 --override-opt_param-scheduler {flags}",
    )
    assert len(losses(text)) == 6 and losses(text) == pytest.approx(losses(continued), rel=1e-5)
    assert accuracies(text) == accuracies(continued) and len(accuracies(text)) == 6


@pytest.mark.parametrize(
    ("name", "source"), [("bert", "tp1pp1"), ("legacy_bert", "v0"), ("legacy_bert", "v3_layernorm")]
)
def test_pretrained_checkpoint_of_any_age(pretrained: Path, tmp_path: Path, name: str, source: str) -> None:
    """All start from the same encoder as v0.9's torch_dist file, or (legacy) as its newest form does."""
    newest = pretrained / name / ("torch_dist" if name == "bert" else "tp1pp1")
    first = []
    for directory in (newest, pretrained / name / source):
        text = last_rank(1, BERT + MNLI + f"--pretrained-checkpoint {directory} --epochs 1")
        assert "could not find classification_head" in text
        first.append(losses(text))
    assert first[0] == first[1] and len(first[0]) == 3


def test_resumed_run_is_the_uninterrupted_run(pretrained: Path, tmp_path: Path) -> None:
    """Stopped inside the second epoch, with dropout."""
    words = BERT + MNLI + f"--pretrained-checkpoint {pretrained}/bert/tp1pp1 --epochs 3 --hidden-dropout 0.1 "
    whole = last_rank(1, words + f"--save {tmp_path}/whole")
    parts = f"--save {tmp_path}/parts --load {tmp_path}/parts"
    with pytest.raises(GangError, match="SystemExit"):
        last_rank(1, words + parts + " --exit-interval 4")
    rest = last_rank(1, words + parts)
    assert "working on epoch 2" in rest and "working on epoch 1" not in rest
    assert losses(rest) == losses(whole)[-len(losses(rest)) :] and accuracies(rest) == accuracies(whole)[3:]


def test_race_in_one_process_and_many(pretrained: Path, tmp_path: Path) -> None:
    """Batches count sequences; probabilities, labels and ids are those of plain PyTorch, in the order of the files."""
    start = f"--pretrained-checkpoint {pretrained}/bert/torch_dist --epochs 2 --save {tmp_path}/race "
    text = last_rank(
        2, BERT + RACE_FILES + start + "--tensor-model-parallel-size 2 --make-vocab-size-divisible-by 128"
    )
    assert "could not find multichoice_head" in text
    assert (
        "iteration        4/       4 | consumed samples:           32 |" in text
        and "global batch size:     8" in text
    )
    weights = weights_of(tmp_path / "race")
    evaluation = BERT + RACE_FILES + f"--epochs 0 --load {tmp_path}/race --micro-batch-size 1 "
    for ranks, layout in ((1, ""), (4, "--pipeline-model-parallel-size 2")):
        found = last_rank(ranks, evaluation + layout)
        assert "evaluation only" in found or ranks > 1
        predictions = torch.load(tmp_path / "race" / "predictions_dev-high_dev-middle.pt", weights_only=True)
        total = 0
        for (name, (probabilities, labels, uids)), part in zip(predictions, ("high", "middle")):
            dataset = RaceDataset(name, [f"{RACE}/{part}"], tokenizer("bert"), 24)
            with torch.no_grad():
                expected = classify(weights, dataset.samples, "multichoice_head").softmax(-1)
            torch.testing.assert_close(torch.tensor(probabilities), expected, rtol=1e-5, atol=1e-6)
            assert name == f"dev-{part}"
            assert labels == [s["label"] for s in dataset.samples] and uids == [
                s["uid"] for s in dataset.samples
            ]
            right = int((expected.argmax(-1) == torch.tensor(labels)).sum())
            assert ("-1", name, str(right), str(len(labels))) in accuracies(found)
            total += right
        assert accuracies(found)[-1] == ("-1", "overall", str(total), "4")


def test_last_batch_and_every_sample_once(pretrained: Path) -> None:
    """Three questions of QQP in batches of two: the third is left out of training or, with --keep-last, alone."""
    start = f"--pretrained-checkpoint {pretrained}/bert/torch_dist --epochs 1 --eval-iters 0 "
    for ranks, more, steps in ((1, "", 1), (1, "--keep-last", 2), (2, "--micro-batch-size 1", 2)):
        text = last_rank(ranks, BERT + QQP + start + more)
        assert len(losses(text)) == steps
        assert [line[3] for line in accuracies(text)] == ["3", "3"]  # no sample is counted twice or left out


# ---- zero-shot evaluation


def save_gpt(folder: str) -> dict[str, Tensor]:
    """Body: a GPT with weights in general position, saved; returns them."""
    words = [
        *GPT.split(),
        "--task",
        "LAMBADA",
        "--valid-data",
        "none",
        "--save",
        folder,
        "--save-interval",
        "1",
    ]
    with mock.patch("sys.argv", ["main.py", *words]), contextlib.redirect_stdout(io.StringIO()):
        args = initialize_megatron(extra_args_provider=add_tasks_arguments).args
        model = get_model(pretrain_gpt.model_provider, ModelType.encoder_or_decoder, wrap_with_ddp=False)
        noise = torch.Generator().manual_seed(3)
        for parameter in model[0].parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=noise)
        save_checkpoint(1, model, None, None, 0, args=args)
    return {name: value.detach().clone() for name, value in unwrap_model(model)[0].named_parameters()}


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("gpt")
    return folder, run_gang(1, save_gpt, str(folder))[0]


def logits_of(weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    shape = reference.Shape(layers=2, heads=4, groups=4, head=8)
    with torch.no_grad():
        return reference.gpt(weights, shape, torch.tensor([tokens]))[0]


ZERO_SHOT_LAYOUTS = {
    "one": (1, ""),
    "dp2": (2, ""),
    "tp2 x pp2": (
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    ),
}


@pytest.mark.parametrize("layout", ZERO_SHOT_LAYOUTS)
@pytest.mark.parametrize("stride", [32, 5])
def test_perplexity_is_that_of_plain_pytorch(
    layout: str, stride: int, gpt: tuple[Path, dict[str, Tensor]]
) -> None:
    """Every token is predicted once, from as many tokens before it as its window has."""
    folder, weights = gpt
    tokens, original = wiki_tokens()
    length, total = 32, 0.0
    for target in range(1, len(tokens)):
        window = 0 if target <= length else math.ceil((target - length) / stride)
        start = window * stride
        own = logits_of(weights, tokens[start:target])[-1]
        total += F.cross_entropy(own, torch.tensor(tokens[target])).item()
    average, ratio = total / (len(tokens) - 1), (len(tokens) - 1) / (original - 1)
    ranks, flags = ZERO_SHOT_LAYOUTS[layout]
    text = last_rank(ranks, GPT + WIKI + f"--load {folder} --overlapping-eval {stride} {flags}")
    line = (
        f" validation results on WIKITEXT103 | avg loss: {average:.4E} | ppl: {math.exp(min(20, average)):.4E} |"
        f" adjusted ppl: {math.exp(min(20, average * ratio)):.4E} | token ratio: {ratio} |"
    )
    dashes = "-" * (len(line) + 1)
    assert f"{dashes}\n{line}\n{dashes}\n" in text


def wiki_tokens() -> tuple[list[int], int]:
    case = expected("zeroshot/expected_wikitext.json")[0]
    return case["tokens"], case["num_original_tokens"]


@pytest.mark.parametrize("layout", ZERO_SHOT_LAYOUTS)
@pytest.mark.parametrize("strict", [False, True])
def test_lambada_counts_what_plain_pytorch_guesses(
    layout: str, strict: bool, gpt: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Three of seven texts end as the model has them end; a repeated sample is counted by nobody."""
    folder, weights = gpt
    path = tmp_path / "lambada.jsonl"
    words = [f"the keeper counted {n} boats and" for n in ("seven", "three", "ten")]
    lines = [json.dumps({"text": text + end}) for text in words for end in (" was", " he wrote")]
    path.write_text("\n".join([*lines, json.dumps({"text": "he followed the music"})]) + "\n")
    dataset = LambadaDataset(str(path), tokenizer("gpt").eod, tokenizer("gpt"), 32, strict)
    # The model's own guess as the label of some: otherwise a random model would be right nowhere.
    right = 0
    for index in range(len(dataset)):
        context, label = dataset.tokens[index], dataset.labels[index]
        guesses = logits_of(weights, context + label)[len(context) - 1 : -1].argmax(-1)
        right += guesses.tolist() == label
    ranks, flags = ZERO_SHOT_LAYOUTS[layout]
    task = f"--task LAMBADA --valid-data {path} --load {folder} {'--strict-lambada' if strict else ''} "
    text = last_rank(ranks, GPT + task + flags)
    assert (
        f"| number correct: {right:.4E} | total examples: {7:.4E} | avg accuracy: {right / 7:.4E}\n" in text
    )


# ---- the command line


def test_flags_are_v09s() -> None:
    actions = {action.dest: action for action in parser.build(add_tasks_arguments)._actions}
    with (RECORDED / "flags.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 17
    for row in rows:
        action = actions[row["dest"]]
        assert row["flags"] in action.option_strings and repr(action.default) == row["default"], row
        assert str(action.nargs or "") == row["nargs"] or row["kind"] != "store", row
    # Only the meaning of --keep-last is another one than in training, which has it under a second name.
    assert actions["keep_last"].option_strings == ["--keep-last"]
    assert actions["keep_last_checkpoints"].option_strings == ["--keep-last-checkpoints"]


VALID = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --tokenizer-type NullTokenizer --vocab-size 100 --lr 1e-3 "
)


@pytest.mark.parametrize("rule", [*TASKS, *FINETUNING], ids=lambda rule: rule.holds.__name__)
def test_refuses_what_it_cannot_do(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for bad in ("", rule.bad):
        words = VALID.split()
        words += (
            ["--task", "MNLI", "--train-data", "a", "--epochs", "1"]
            if rule in FINETUNING
            else ["--task", "LAMBADA"]
        )
        words = amended([*words, "--valid-data", "b"], bad)
        args = arguments.validate_args(arguments.parse_args(add_tasks_arguments, argv=words))
        if not bad:
            check_task(args)
            continue
        with pytest.raises(FlagError) as error:
            check_task(args)
        assert error.value.subject == ", ".join(rule.flags)


def test_unread_flags_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    words = [
        *VALID.split(),
        "--task",
        "WIKITEXT103",
        "--valid-data",
        "a",
        "--epochs",
        "3",
        "--strict-lambada",
    ]
    args = arguments.validate_args(arguments.parse_args(add_tasks_arguments, argv=words))
    check_task(args)
    assert "--epochs has no effect on WIKITEXT103" in args.notices
    assert "--strict-lambada has no effect on WIKITEXT103" in args.notices


def test_plain_python_from_another_directory(tmp_path: Path) -> None:
    """One process without a launcher; without --load the model knows nothing, and says so in its perplexity."""
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "tasks" / "main.py"), *GPT.split(), *WIKI.split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "> working on iteration: 0" in lines and lines[-1] == "done :-)"
    assert " > number of original tokens: 53, number of detokenized tokens: 103" in lines
