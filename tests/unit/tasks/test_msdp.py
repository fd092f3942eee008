"""Dialogue prompting against recordings of v0.9, plain selections of examples, and a server that answers."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from megatron.core.errors import DataError, FlagError, MegatronError
from megatron.training.config import parser
from tasks.msdp import main as msdp_main
from tasks.msdp import preprocessing, prompt
from tasks.msdp.metrics import F1Metric, normalize_answer
from tasks.msdp.text import tokenize
from tests.unit.tasks.support import RECORDED as TASKS

RECORDED = TASKS.parent / "msdp"


def preprocess(monkeypatch: pytest.MonkeyPatch, func: str, **files: object) -> None:
    words = [word for name, value in files.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["preprocessing.py", "--func", func, *words])
    preprocessing.main()


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, words)])
    msdp_main.run()


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("name", "raw"), [("wow", "wow.json"), ("woi", "woi.jsonl")])
def test_recorded_dialogues(name: str, raw: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("processed", "knwl_ref", "resp_ref")
    outputs = {f"{output}_file": tmp_path / output for output in names}
    preprocess(monkeypatch, f"process_{name}_dataset", raw_file=RECORDED / raw, **outputs)
    for output in names:
        assert (tmp_path / output).read_bytes() == (RECORDED / f"{name}_{output}.txt").read_bytes()


def test_recorded_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"test_file": RECORDED / "test_processed.txt", "processed_file": tmp_path / "out"}
    preprocess(monkeypatch, "prepare_input", knwl_gen_file=RECORDED / "knwl_gen.txt", **files)
    assert (tmp_path / "out").read_bytes() == (RECORDED / "prepared_input.txt").read_bytes()
    (tmp_path / "short").write_text("one line\n")
    with pytest.raises(DataError, match="short: 1 lines for the 2 samples"):
        preprocess(monkeypatch, "prepare_input", knwl_gen_file=tmp_path / "short", **files)


def test_recorded_scores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recorded = json.loads((RECORDED / "f1.json").read_text())
    for pair in recorded["pairs"]:
        assert normalize_answer(pair["guess"]) == pair["normalized_guess"]
        scores = F1Metric.compute_each_pair(pair["guess"], pair["answer"])
        assert list(scores) == (
            pytest.approx(pair["p_r_f1"], rel=1e-12) if pair["answer"] else [None, None, None]
        )
    columns = [[pair[side] for pair in recorded["pairs"]] for side in ("guess", "answer")]
    assert F1Metric.compute_all_pairs(*columns) == pytest.approx(recorded["mean"], rel=1e-12)
    # From files an end of document is no word, and `no_passages_used` is no answer.
    guesses, answers = tmp_path / "guesses", tmp_path / "answers"
    guesses.write_text("<|endoftext|>hi there\nanything\n\n")
    answers.write_text("hi\nno_passages_used\nx\n")
    run(monkeypatch, "--task", "MSDP-EVAL-F1", "--guess-file", guesses, "--answer-file", answers)
    assert capsys.readouterr().out == "Precision: 0.2500; recall: 0.5000; f1: 0.3333\ndone :-)\n"
    answers.write_text("hi\n")
    with pytest.raises(DataError, match="3 guesses for 1 answers"):
        run(monkeypatch, "--task", "MSDP-EVAL-F1", "--guess-file", guesses, "--answer-file", answers)


def test_dialogues_that_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for func, text, reason in (
        ("wow", "[{]", "raw: not JSON"),
        (
            "wow",
            '[{"dialog": [{"speaker": "0_Wizard"}]}]',
            "dialogue 0: not a dialogue of Wizard of Wikipedia",
        ),
        ("woi", '{"d": {"dialog_history": []}}\n{"d": 3}', "raw:2: not a dialogue of Wizard of the Internet"),
        ("woi", "{}\nnone", "raw:2: not JSON"),
    ):
        raw.write_text(text)
        with pytest.raises(DataError, match=reason):
            preprocess(monkeypatch, f"process_{func}_dataset", raw_file=raw, processed_file=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_examples_of_responses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs of ten tokens count; bounds belong to the range; the order is that of v0.9's random numbers."""
    known = [f"k{n}" for n in range(30)]

    def row(topic: str, taken: int, others: int, knowledge: int) -> str:
        response = " ".join([*known[:taken], *[f"o{n}" for n in range(others)]])
        return f"{topic}\tfirst turn [SEP] who's there?\t{' '.join(known[:knowledge])}\t{response}"

    kept = [row("least", 12, 8, 15), row("most", 18, 2, 18), row("knowledge", 12, 2, 15)]
    kept += [row(f"more{n}", 10 + n % 10, 2, 10 + n % 10) for n in range(22) if (10 + n % 10) <= 18]
    refused = [
        row("short run", 9, 1, 9),
        row("all", 20, 0, 20),
        row("little", 11, 9, 11),
        row("part", 12, 2, 16),
    ]
    train = tmp_path / "train"
    train.write_text("\n".join([*kept, *refused]) + "\n")
    preprocess(monkeypatch, "get_resp_gen_prompts", train_file=train, processed_file=tmp_path / "out", seed=7)
    wanted = []
    for topic, _, knowledge, response in (line.split("\t") for line in kept):
        said = (
            f"Topic: {topic}. User says: who 's there ? We know that: {knowledge} System replies: {response}"
        )
        wanted.append(said)
    np.random.seed(7)
    np.random.shuffle(wanted)
    assert len(wanted) > 20 and lines(tmp_path / "out") == wanted[:20]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small question encoder with random weights, as transformers saves it."""
    folder = tmp_path_factory.mktemp("dpr")
    vocabulary = TASKS / "vocab" / "bert-vocab.txt"
    tokenizer = transformers.DPRQuestionEncoderTokenizerFast(str(vocabulary))
    torch.manual_seed(5)
    config = transformers.DPRConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.DPRQuestionEncoder(config)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TRAIN = [
    ("Heron", "i like birds [SEP] which one?", "The Heron stands in water.", "a Heron"),
    ("Heron", "what is that", "A Heron (grey) is patient.", "yes"),
    ("Heron", "tell me about birds", "no_passages_used", "no"),
    ("Heron", "so many words", "One Heron " + "stood " * 30, "oh"),
    *[
        (f"Boat{n}", f"boat number {n} left at dawn", f"The Boat{n} left the harbour.", "it did")
        for n in range(12)
    ],
    ("Boat3", "did the seven boats come back", "Seven boats and Boat3 came back.", "they did"),
    ("Bread", "is it warm", "It is about Bread.", "yes"),
    ("Bread", "how is it made", "Dough must rest.", "slowly"),
    ("Roof", "long knowledge", "The Roof " + "leaked " * 20, "oh no"),
]
TESTS = [
    ("Heron", "hello [SEP] do birds eat fish?"),
    ("Lake", "one [SEP] two [SEP] the boats on the lake [SEP] at dawn?"),
]


@pytest.mark.parametrize("data_type", ["wow_seen", "wow_unseen", "woi"])
def test_examples_of_knowledge(
    data_type: str, encoder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against the encoder's vectors of single texts, sorted."""
    (tmp_path / "train").write_text("".join("\t".join(row) + "\n" for row in TRAIN))
    (tmp_path / "test").write_text("".join("\t".join((*row, "k", "r")) + "\n" for row in TESTS))
    preprocess(
        monkeypatch, "get_knwl_gen_prompts", test_file=tmp_path / "test", train_file=tmp_path / "train",
        model_file=encoder, data_type=data_type, processed_file=tmp_path / "out",
    )  # fmt: skip
    model = transformers.DPRQuestionEncoder.from_pretrained(encoder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)

    def vector(topic: str, turns: str) -> torch.Tensor:
        text = " ".join(turns.split(" [SEP] ")[-3:])
        text = text if data_type == "wow_seen" else f"( {topic} ) {text}"
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).pooler_output[0]

    shown = [row for row in TRAIN if row[2] != "no_passages_used"]
    if data_type != "wow_seen":
        shown = [row for row in shown if row[0] in row[2] and "(" not in row[2]]
    shown = [r for r in shown if r[0] == "Heron" or (len(r[2].split()) <= 20 and not r[2].startswith("It"))]
    found = dict(item for line in lines(tmp_path / "out") for item in json.loads(line).items())
    assert list(found) == ["Heron do birds eat fish?", "Lake at dawn?"]
    for (topic, turns), examples in zip(TESTS, found.values()):
        query = vector(topic, turns)
        ranked = sorted(shown, key=lambda row: -float(vector(row[0], row[1]) @ query))
        if topic == "Heron":
            chosen = [row for row in ranked if row[0] == "Heron"]
            assert len(chosen) == {"wow_seen": 3}.get(data_type, 2)
        else:
            topics = list(dict.fromkeys(row[0] for row in ranked))
            chosen = [next(row for row in ranked if row[0] == name) for name in topics]
            assert len(chosen) > 10
        wanted = [f"( {row[1].split(' [SEP] ')[-1]} ) {row[0]} => {row[2].strip()}" for row in chosen[:10]]
        assert examples == wanted[::-1]


def test_encoders_that_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = dict.fromkeys(("test_file", "train_file", "processed_file"), tmp_path / "x")
    for model, data_type, reason in (
        (tmp_path / "none", "woi", "--model_file: .*none is not a directory"),
        (tmp_path, "woi", "--model_file: .* holds no DPR question encoder"),
        (tmp_path, "seen", "--data_type: there is no seen"),
    ):
        with pytest.raises(FlagError, match=reason):
            preprocess(monkeypatch, "get_knwl_gen_prompts", model_file=model, data_type=data_type, **files)
    for func, reason in (("process_wow_dataset", "--raw_file: "), ("other", "--func: there is no other")):
        with pytest.raises(FlagError, match=reason):
            preprocess(monkeypatch, func)


class Server(BaseHTTPRequestHandler):
    """Says what each prompt asks for, as a text generation server does."""

    asked: list[dict] = []
    status = 200
    reply = "text"

    def do_PUT(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Content-Type"] == "application/json; charset=UTF-8"
        self.asked.append(body)
        self.send_response(self.status)
        self.end_headers()
        texts = [f"{prompt}  answer {len(self.asked)} é \nTopic: more" for prompt in body["prompts"]]
        self.wfile.write(json.dumps({self.reply: texts}).encode())

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Server]]]:
    """Its address, and the class that keeps what it was asked."""
    handler = type("Handler", (Server,), {"asked": []})
    monkeypatch.setenv("no_proxy", "localhost")
    with HTTPServer(("localhost", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://localhost:{running.server_port}/api", handler
        running.shutdown()
        thread.join()


def test_server_is_asked(
    server: tuple[str, type[Server]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, handler = server
    samples = tmp_path / "samples"
    samples.write_text("Heron\thi [SEP] who's there?\tIt stands.\tyes\nBread\twarm?\tk\t\n")
    examples = tmp_path / "examples"
    rows = [{"Heron who's there?": [" e1 ", "e2"]}, {"Bread warm?": []}, {"Heron who's there?": ["late"]}]
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--task",
        "MSDP-PROMPT",
        "--sample-input-file",
        samples,
        "--api-prompt",
        "--megatron-api-url",
        url,
    ]
    words += ["--out-seq-length", "12", "--prompt-file", examples, "--prompt-type"]
    run(monkeypatch, *words, "knowledge")
    assert lines(tmp_path / "samples.out") == ["answer 1 é", "answer 2 é"]
    prompts = ["e1 \ne2 \n( who's there? ) Heron =>", "( warm? ) Bread =>"]
    asked = [{"prompts": [text], "tokens_to_generate": 12, "top_k": 1} for text in prompts]
    assert handler.asked == asked
    handler.asked.clear()
    examples.write_text("first\nsecond \nthird\n")
    run(
        monkeypatch,
        *words,
        "response",
        "--num-prompt-examples",
        "2",
        "--sample-output-file",
        tmp_path / "out",
    )
    assert lines(tmp_path / "out") == ["answer 1 é", "answer 2 é"]
    shown = "first \nsecond \n"
    assert [body["prompts"][0] for body in handler.asked] == [
        f"{shown}Topic: Heron. User says: who 's there ? We know that: It stands . System replies:",
        f"{shown}Topic: Bread. User says: warm ? We know that: k System replies:",
    ]


def test_server_that_fails(
    server: tuple[str, type[Server]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, handler = server
    (tmp_path / "samples").write_text("T\tu\tk\tr\n")
    (tmp_path / "examples").write_text("one\n")
    words = ["--task", "MSDP-PROMPT", "--sample-input-file", tmp_path / "samples", "--api-prompt"]
    words += ["--prompt-file", tmp_path / "examples", "--prompt-type", "response", "--megatron-api-url"]
    monkeypatch.setattr(handler, "reply", "segments")
    with pytest.raises(MegatronError, match="its answer is not what a text generation server says"):
        run(monkeypatch, *words, url)
    monkeypatch.setattr(handler, "status", 503)
    with pytest.raises(MegatronError, match=r"the server answers 503: .*segments"):
        run(monkeypatch, *words, url)
    with pytest.raises(MegatronError, match="cannot be reached"):
        run(monkeypatch, *words, "http://localhost:1/api")
    assert not (tmp_path / "samples.out").exists()


def test_prompts_need_their_files(tmp_path: Path) -> None:
    samples, examples = tmp_path / "samples", tmp_path / "examples"
    args = Namespace(sample_input_file=str(samples), prompt_file=str(examples), prompt_type="knowledge")
    samples.write_text("T\tu\nBare\n")
    for text, reason in (
        ('{"T u": [1]}', "examples:1: not"),
        ('["T u"]', "examples:1: not"),
        ('{"T v": []}', "samples:1: .* has no examples for 'T u'"),
        ('{"T u": []}', "samples:2: 1 columns, not topic"),
    ):
        examples.write_text(text + "\n")
        with pytest.raises(DataError, match=reason):
            list(prompt.build_prompts(args))


def test_words_need_no_model() -> None:
    """Only the last full stop is a word of its own: the text is one sentence."""
    assert tokenize("Mr. Heron isn't (yet) here, he said.") == [
        "Mr.", "Heron", "is", "n't", "(", "yet", ")", "here", ",", "he", "said", ".",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["tasks_msdp", "tasks_msdp_preprocessing"])
def test_flags_are_v09s(name: str) -> None:
    parsers: dict[str, argparse.ArgumentParser] = {
        "tasks_msdp": parser.build(msdp_main.add_msdp_arguments),
        "tasks_msdp_preprocessing": preprocessing.build_parser(),
    }
    actions = {action.dest: action for action in parsers[name]._actions}
    with (RECORDED / "flags.tsv").open(newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if row["parser"] == name
        ]
    assert len(rows) == 11
    for row in rows:
        action = actions[row["dest"]]
        assert action.option_strings == [row["flags"]] and repr(action.default) == row["default"], row
        assert (list(action.choices) if action.choices else "") == (
            json.loads(row["choices"].replace("'", '"')) if row["choices"] else ""
        )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "--task: it is not said what to do"),
        (["--task", "MSDP"], "--task: there is no task MSDP"),
        (["--task", "MSDP-EVAL-F1", "--guess-file", "x"], "--answer-file: MSDP-EVAL-F1 needs it"),
        (["--task", "MSDP-PROMPT"], "--prompt-type: MSDP-PROMPT needs it"),
        (
            [
                "--task",
                "MSDP-PROMPT",
                "--prompt-type",
                "response",
                "--sample-input-file",
                "x",
                "--prompt-file",
                "x",
            ],
            "--load: MSDP-PROMPT needs it",
        ),
    ],
)
def test_what_is_missing_is_said(words: list[str], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FlagError, match=reason):
        run(monkeypatch, *words)
