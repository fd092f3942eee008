"""The server as users start it: a trained checkpoint on two ranks, asked over HTTP and by the client, ended by a signal."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron.core.errors import FlagError
from megatron.inference.arguments import GENERATION, SERVING
from megatron.training import arguments
from megatron.training.config import rules
from tests.gang.harness import run_gang
from tests.runs.pretraining import amended, run_script
from tests.runs.test_generate_text import MODEL, TRAINING, continue_prompts
from tools.text_generation_cli import put, send

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def serving(argv: list[str], log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The launcher of a server on two ranks that listens already, and the process that listens."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*launcher, "tools/run_text_generation_server.py", *argv],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"> process (\d+) serves on", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process, int(found[1])
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_server_answers_as_one_process_does_and_ends_by_a_signal(tmp_path: Path) -> None:
    run_gang(1, run_script, [*(MODEL + TRAINING).split(), "--save", str(tmp_path)])
    argv = [*MODEL.split(), "--load", str(tmp_path)]
    prompt = ["--prompt", "5 6 7", "--out-seq-length", "8", "--top-k", "1"]
    ((expected,),) = run_gang(1, continue_prompts, [*argv, *prompt])
    port, log = free_port(), tmp_path / "log.txt"
    layout = ["--pipeline-model-parallel-size", "2", "--port", str(port)]
    with serving([*argv, *layout], log) as (process, worker):

        def ask(**fields: Any) -> tuple[int, Any]:
            return put(
                f"http://localhost:{port}/api", {"prompts": ["5 6 7"], "tokens_to_generate": 8} | fields
            )

        status, greedy = ask(top_k=1, logprobs=True)
        assert (status, greedy["text"], greedy["segments"]) == (200, [expected], [expected.split()])
        assert len(greedy["logprobs"][0]) == 3 + 8 - 1 and max(greedy["logprobs"][0]) < 0.0
        # Refused by the engine of every rank, by the tokenizer of one, by the check of fields: the next answer is right.
        for bad, reason in (
            ({"tokens_to_generate": 100}, "Length of prompt + tokens_to_generate longer than allowed"),
            ({"prompts": ["hello"]}, "'hello' is not a list of ids"),
            ({"prompts": ["999"]}, "ids outside of the vocabulary"),
            ({"random_seed": 2**70}, "64 bits"),
            ({"top_k": 900}, "top_k"),
            ({"beam_width": 90}, "beam_size 90"),
        ):
            status, text = ask(**bad)
            assert status == 200 and reason in text
        drawn = [ask(random_seed=3, temperature=2.0)[1]["text"] for _ in range(2)]
        assert drawn[0] == drawn[1] != greedy["text"]
        _, scored = ask(prompts=greedy["text"], tokens_to_generate=0, logprobs=True)
        assert scored["logprobs"][0] == pytest.approx(greedy["logprobs"][0], abs=1e-5)
        _, beams = ask(beam_width=1, stop_token=60)
        # A single beam is greedy, and its score the mean log-probability of what it adds.
        assert beams["text"] == greedy["text"]
        assert beams["scores"] == pytest.approx([sum(greedy["logprobs"][0][2:]) / 8], abs=1e-5)

        status, completed = send(
            f"http://localhost:{port}/completions",
            {"prompt": "5 6 7", "max_tokens": 8, "temperature": 0, "echo": True},
            "POST",
        )
        assert status == 200 and completed["choices"][0]["text"] == expected
        _, scored = send(
            f"http://localhost:{port}/completions",
            {"prompt": [expected, "5"], "max_tokens": 0, "logprobs": 2, "echo": True},
            "POST",
        )
        of_text = scored["choices"][0]["logprobs"]
        assert of_text["token_logprobs"] == [
            None,
            *(pytest.approx(each, abs=1e-5) for each in greedy["logprobs"][0]),
        ]
        # What was chosen greedily is the most probable.
        for token, value, best in zip(
            expected.split()[3:], of_text["token_logprobs"][3:], of_text["top_logprobs"][3:]
        ):
            assert best[token] == value == max(best.values()) and len(best) == 2

        client = subprocess.run(
            [sys.executable, "tools/text_generation_cli.py", f"localhost:{port}"],
            cwd=REPOSITORY,
            input="5 6 7\n8\nhello\n8\n",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert client.returncode == 0 and "Megatron Response: \n5 6 7 " in client.stdout
        assert "Error 200: 'hello' is not a list of ids" in client.stdout

        os.kill(worker, signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()  # every rank ended, with status 0
    assert "> the server has ended" in log.read_text()


def test_a_taken_port_ends_every_rank(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refusals = run_gang(2, start_server, [*MODEL.split(), *LAYOUT, "--port", str(port)])
    assert refusals[0].startswith(f"--port {port}: it cannot be listened on") and refusals[1] == "ended"


HYBRID = (
    "--num-layers 4 --hybrid-override-pattern M*-- --spec tests.unit.ssm.support toy_stack_spec --normalization RMSNorm "
    "--position-embedding-type none --disable-bias-linear --untie-embeddings-and-output-weights "
)


def answered(argv: list[str]) -> Any:
    """Body: a hybrid model started as its server starts it, and what it says."""
    from unittest import mock

    import pretrain_mamba
    from megatron.inference.text_generation import beam_search_and_post_process, generate_and_post_process
    from tools import run_mamba_text_generation_server as program

    answers = []

    class Server:
        """Answers instead of listening; the other ranks do the same instead of following."""

        def __init__(self, model: Any, **_: Any) -> None:
            self.model = model

        def run(self, *_: Any) -> None:
            here = {"prompts": ["5 6 7"], "tokens_to_generate": 6} if os.environ["RANK"] == "0" else {}
            answers.append(generate_and_post_process(self.model, **here, top_k_sampling=1))
            answers.append(beam_search_and_post_process(self.model, **here, beam_size=3, num_return_gen=3))

    with (
        mock.patch.object(sys, "argv", ["run_mamba_text_generation_server.py", *argv]),
        mock.patch("megatron.inference.text_generation_server.MegatronServer", Server),
        mock.patch("tools.run_text_generation_server.follow", lambda model: Server(model).run()),
    ):
        assert program.model_provider is pretrain_mamba.model_provider
        program.main()
    return answers


def test_a_hybrid_model_is_served_from_stages_of_which_one_remembers_nothing(tmp_path: Path) -> None:
    words = [*MODEL.split(), *HYBRID.split()]
    run_gang(1, run_script, [*words, *TRAINING.split(), "--save", str(tmp_path)], "pretrain_mamba")
    words += ["--load", str(tmp_path)]
    ((drawn, beams),) = run_gang(1, answered, words)
    first, second = run_gang(2, answered, [*words, "--pipeline-model-parallel-size", "2"])
    assert first[0] == drawn and first[1][:2] == beams[:2] and second == [None, None]
    assert first[1][2] == pytest.approx(beams[2], abs=1e-5) and len(set(beams[0])) == 3


LAYOUT = ["--tensor-model-parallel-size", "2"]


def start_server(argv: list[str]) -> str:
    """Body: the server's program, up to its end."""
    from unittest import mock

    from tools import run_text_generation_server as program

    ignored = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with mock.patch.object(sys, "argv", ["run_text_generation_server.py", *argv]):
            program.main()
    except FlagError as refusal:
        return str(refusal)
    finally:
        for each, handler in ignored.items():
            signal.signal(each, handler)
    return "ended"


@pytest.mark.parametrize("rule", [*GENERATION, *SERVING], ids=lambda rule: rule.holds.__name__)
def test_refuses_what_cannot_generate(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for bad in ("", rule.bad):
        flags, _, ranks = bad.partition("@")
        words = amended(MODEL.split(), flags)
        sizes = re.findall(r"--(?:tensor-model|pipeline-model|context)-parallel-size (\d+)", flags)
        world = math.prod(map(int, sizes)) * int(ranks or 1)
        monkeypatch.setenv("WORLD_SIZE", str(world))
        args = arguments.validate_args(arguments.parse_args(argv=words), {})
        if not bad:
            rules.check(args, [*GENERATION, *SERVING])
            continue
        with pytest.raises(FlagError) as error:
            rules.check(args, [*GENERATION, *SERVING])
        assert error.value.subject == ", ".join(rule.flags)
