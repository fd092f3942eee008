"""Conversions against recorded checkpoints of other layouts, and against HuggingFace's own models and converters."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import torch

from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.dist_checkpointing.strategies.resharding import Box
from megatron.core.dist_checkpointing.strategies.torch import StoredTensors
from tools.checkpoint.conversion import main

GOLDEN = Path(__file__).parents[2] / "golden" / "checkpoints"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    for model in ("gpt", "llama", "bert", "t5", "moe", "vpp", "legacy_gpt", "legacy_bert"):
        with tarfile.open(GOLDEN / model / "checkpoints.tar.xz") as archive:
            archive.extractall(root / model, filter="data")
    return root


def _convert(model_type: str, loader: str, saver: str, source: Path, target: Path, *extra: str) -> None:
    command = ["--model-type", model_type, "--loader", loader, "--saver", saver]
    assert main([*command, "--load-dir", str(source), "--save-dir", str(target), *extra]) == 0


def _sizes(tp: int, pp: int) -> list[str]:
    return ["--target-tensor-parallel-size", str(tp), "--target-pipeline-parallel-size", str(pp)]


def _model(directory: Path, rank: str = "mp_rank_00") -> dict[str, torch.Tensor]:
    (path,) = directory.glob(f"*/{rank}/model_optim_rng.pt")
    weights = load_file(path)["model"]
    return {n: v for n, v in weights.items() if isinstance(v, torch.Tensor)}


def _noted(directory: Path) -> Any:
    """The arguments in a checkpoint's files."""
    path, *_ = directory.glob("*/mp_rank_00*/model_optim_rng.pt")
    return load_file(path)["args"]


def _assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    ("model", "kind", "source"),
    [
        ("gpt", "GPT", "tp2pp2"),
        ("gpt", "GPT", "torch_dist"),
        ("llama", "GPT", "tp2pp2"),
        ("llama", "GPT", "torch_dist"),
        ("bert", "BERT", "tp2pp2"),
        ("bert", "BERT", "torch_dist"),
        ("t5", "T5", "tp2pp1"),
        ("t5", "T5", "tp2enc1dec1"),
        ("t5", "T5", "torch_dist"),
        ("vpp", "GPT", "tp1pp2vpp2"),
    ],
)
def test_merging_gives_the_recorded_whole(
    recorded: Path, tmp_path: Path, model: str, kind: str, source: str
) -> None:
    _convert(kind, "mcore", "mcore", recorded / model / source, tmp_path / "out", *_sizes(1, 1))
    _assert_same(_model(tmp_path / "out"), _model(recorded / model / "tp1pp1"))
    # The recorded Llama was trained without --no-position-embedding; v0.9's saver keeps what the source notes.
    assert _noted(tmp_path / "out").add_position_embedding is True


@pytest.mark.parametrize(("model", "kind"), [("gpt", "GPT"), ("llama", "GPT"), ("bert", "BERT")])
def test_cutting_gives_the_recorded_parts(recorded: Path, tmp_path: Path, model: str, kind: str) -> None:
    _convert(kind, "mcore", "mcore", recorded / model / "tp1pp1", tmp_path / "out", *_sizes(2, 2))
    for rank in ("mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001", "mp_rank_01_001"):
        _assert_same(_model(tmp_path / "out", rank), _model(recorded / model / "tp2pp2", rank))


@pytest.mark.parametrize("source", ["tp1pp1", "tp2pp2", "v3_layernorm"])
def test_first_generation_round_trip(recorded: Path, tmp_path: Path, source: str) -> None:
    """Nested layouts of several ages become one and the same model, and the layout HuggingFace's scripts read."""
    _convert("GPT", "megatron", "mcore", recorded / "legacy_gpt" / source, tmp_path / "new", *_sizes(1, 1))
    _convert("GPT", "mcore", "megatron", tmp_path / "new", tmp_path / "old", *_sizes(1, 1))
    (path,) = (tmp_path / "old").glob("*/mp_rank_00/model_optim_rng.pt")
    (reference,) = (recorded / "legacy_gpt" / "v3_layernorm").glob("*/mp_rank_00/model_optim_rng.pt")
    ours, theirs = (load_file(p)["model"]["language_model"] for p in (path, reference))
    _assert_same(ours["encoder"], {n: v for n, v in theirs["encoder"].items() if isinstance(v, torch.Tensor)})
    for table in ("word_embeddings", "position_embeddings"):
        assert torch.equal(ours["embedding"][table]["weight"], theirs["embedding"][table]["weight"])


@pytest.mark.parametrize(("model", "kind"), [("legacy_gpt", "GPT"), ("legacy_bert", "BERT")])
def test_converters_find_the_layout_they_expect(
    recorded: Path, tmp_path: Path, model: str, kind: str
) -> None:
    """Keys in order, and tensors, of the file that transformers 4.46's unmodified converters were recorded to read."""
    options = [*_sizes(1, 1), "--no-verify"]
    _convert(kind, "megatron", "torch_dist", recorded / model / "tp1pp1", tmp_path / "new", *options)
    _convert(kind, "torch_dist", "megatron", tmp_path / "new", tmp_path / "old", *options)

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        leaves: dict[str, Any] = {}
        for key, value in tree.items():
            name = f"{prefix}{key}."
            leaves.update(flat(value, name) if isinstance(value, dict) else {name: value})
        return {name: value for name, value in leaves.items() if "_extra_state" not in name}

    (ours,) = (tmp_path / "old").glob("*/mp_rank_00/model_optim_rng.pt")
    (theirs,) = (recorded / model / "v3_layernorm").glob("*/mp_rank_00/model_optim_rng.pt")
    written, expected = flat(load_file(ours)["model"]), flat(load_file(theirs)["model"])
    _assert_same(written, expected)
    language_model = load_file(ours)["model"]["language_model"]
    stack = list(language_model["encoder"])
    # The converters stop at the first name that is no layer's, and want each weight before its bias.
    assert [name for name in stack if name.startswith("layers.")] == stack[:-2]
    for name in stack:
        if name.endswith("query_key_value.bias"):
            assert stack.index(name.replace("bias", "weight")) < stack.index(name)


def test_torch_dist_has_the_recorded_keys(recorded: Path, tmp_path: Path) -> None:
    """Every key and every tensor that v0.9 wrote, from files of ranks; random states belong to a run."""
    for model, kind, source in [
        ("gpt", "GPT", "tp2pp2"),
        ("llama", "GPT", "tp2pp2"),
        ("bert", "BERT", "tp2pp2"),
        ("t5", "T5", "tp2pp1"),
        ("moe", "GPT", "tp1pp2ep2"),
    ]:
        target = tmp_path / model
        _convert(kind, "mcore", "torch_dist", recorded / model / source, target, *_sizes(1, 1))
        ours = StoredTensors(target / "iter_0000100")
        theirs = StoredTensors(recorded / model / "torch_dist" / "iter_0000100")
        assert set(ours.keys()) == {k for k in theirs.keys() if not k.startswith("rng_state")}, model  # noqa: SIM118
        for key in ours.keys():  # noqa: SIM118 not a mapping
            if ours.is_tensor(key):
                assert ours.shape(key) == theirs.shape(key)
                box = Box((0,) * len(ours.shape(key)), ours.shape(key))
                one, other = torch.empty(box.shape), torch.empty(box.shape)
                ours.read_box(key, box, one)
                theirs.read_box(key, box, other)
                assert torch.equal(one, other), key


def test_torch_dist_is_read_by_plain_torch(recorded: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    _convert("GPT", "mcore", "torch_dist", recorded / "gpt" / "tp2pp2", tmp_path / "out")
    dcp_to_torch_save(tmp_path / "out" / "iter_0000100", tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=False)
    whole = _model(recorded / "gpt" / "tp1pp1")
    assert torch.equal(plain["embedding.word_embeddings.weight"], whole["embedding.word_embeddings.weight"])
    qkv = plain["decoder.layers.self_attention.linear_qkv.weight"]
    for layer in range(2):
        assert torch.equal(qkv[layer], whole[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"])


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("source", ["tp1pp2ep2", "grouped", "torch_dist"])
def test_experts_in_any_layout(recorded: Path, tmp_path: Path, source: str, ep: int) -> None:
    options = [*_sizes(1, 2), "--target-expert-parallel-size", str(ep), "--no-verify"]
    _convert("GPT", "mcore", "mcore", recorded / "moe" / source, tmp_path / "cut", *options)
    if ep == 2:
        for rank in ("mp_rank_00_000_000", "mp_rank_00_000_001", "mp_rank_00_001_000", "mp_rank_00_001_001"):
            _assert_same(_model(tmp_path / "cut", rank), _model(recorded / "moe" / "tp1pp2ep2", rank))
    _convert("GPT", "mcore", "mcore", tmp_path / "cut", tmp_path / "whole", *_sizes(1, 1), "--no-verify")
    _assert_same(_model(tmp_path / "whole"), _model(recorded / "moe" / "tp1pp1"))


@pytest.mark.parametrize(
    ("model", "kind", "source", "auto", "options"),
    [
        ("gpt", "GPT", "torch_dist", "AutoModelForCausalLM", []),
        ("llama", "GPT", "tp2pp2", "AutoModelForCausalLM", []),
        ("llama", "GPT", "tp2pp2", "AutoModelForCausalLM", ["--hf-model-type", "mistral"]),
        ("moe", "GPT", "tp1pp2ep2", "AutoModelForCausalLM", []),
        ("bert", "BERT", "tp2pp2", "AutoModelForPreTraining", []),
        ("t5", "T5", "tp2enc1dec1", "AutoModelForSeq2SeqLM", []),
    ],
)
def test_to_huggingface_and_back(
    recorded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    kind: str,
    source: str,
    auto: str,
    options: list[str],
) -> None:
    """transformers loads what was written and computes the recorded logits; importing it gives the same bits."""
    transformers = pytest.importorskip("transformers")
    _convert(kind, "mcore", "hf", recorded / model / source, tmp_path / "hf", *options)
    theirs, info = getattr(transformers, auto).from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    batch = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / model / "batch.npz").items()}
    expected = torch.from_numpy(np.load(GOLDEN / model / "expected.npz")["logits"])
    with torch.no_grad():
        if kind == "GPT":
            logits = theirs.eval()(batch["tokens"]).logits
        elif kind == "BERT":
            mask = batch["padding_mask"]
            output = theirs.eval()(batch["tokens"], attention_mask=mask, token_type_ids=batch["types"])
            # Queries at padding see nothing in one implementation and everything in the other.
            logits = output.prediction_logits * mask.unsqueeze(-1)
            expected = expected.view_as(logits) * mask.unsqueeze(-1)
        else:
            logits = _t5_logits(theirs.eval(), batch)
            real = batch["dec_mask"][:, :, :1]  # every real position sees the first
            logits, expected = logits * real, expected.view_as(logits) * real
    assert (logits - expected.view_as(logits)).abs().max() <= 1e-5
    _convert(kind, "hf", "mcore", tmp_path / "hf", tmp_path / "back")
    _assert_same(_model(tmp_path / "back"), _model(recorded / model / "tp1pp1"))
    assert len(re.findall(r"max \|dlogit\| \S*e-0[7-9]", capsys.readouterr().out)) == 2


def _t5_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a HuggingFace model, with Megatron's masks [b, query, key] reduced to the keys that are padding."""
    return model(
        input_ids=batch["text_enc"],
        attention_mask=batch["enc_mask"].amax(1).long(),
        decoder_input_ids=batch["text_dec"],
        decoder_attention_mask=batch["dec_mask"].amax(1).long(),
    ).logits


def _random_model(directory: Path, config: Any, auto: str) -> None:
    import transformers

    torch.manual_seed(3)
    model = getattr(transformers, auto).from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory, max_shard_size="60KB")


_TINY = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ("Llama", {"head_dim": 16, "tie_word_embeddings": True}),
        (
            "Llama",
            {
                "max_position_embeddings": 32768,
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
                },
            },
        ),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Mistral", {"sliding_window": 40}),
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": None}),
        ("GPT2", {"activation_function": "gelu_new", "n_inner": 40}),
        ("GPT2", {"activation_function": "gelu", "tie_word_embeddings": False}),
    ],
)  # fmt: skip
def test_from_huggingface_and_back(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """Random models of each family: cut for four ranks and written again, every tensor is the same."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file as load_safetensors

    tiny = {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = getattr(transformers, f"{kind}Config")(**{**(tiny if kind == "GPT2" else _TINY), **changes})
    _random_model(tmp_path / "hf", config, "AutoModelForCausalLM")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    _convert("GPT", "hf", "mcore", tmp_path / "hf", tmp_path / "cut", *_sizes(2, 2))
    assert (tmp_path / "cut" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    # As v0.9's Mixtral loader notes it, and its scripts for rotary models, with --no-position-embedding, expect it.
    assert _noted(tmp_path / "cut").add_position_embedding is (kind == "GPT2")
    options = ["--hf-model-type", "mistral"] if kind == "Mistral" else []
    _convert("GPT", "mcore", "hf", tmp_path / "cut", tmp_path / "back", *options)
    assert (tmp_path / "back" / "tokenizer.json").exists()

    def tensors(directory: Path) -> dict[str, torch.Tensor]:
        files = sorted(directory.glob("*.safetensors"))
        return {name: value for file in files for name, value in load_safetensors(file).items()}

    _assert_same(tensors(tmp_path / "back"), tensors(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("config", "kind", "reason"),
    [
        ({"model_type": "t5"}, "T5", "relative position biases"),
        ({"model_type": "bert"}, "BERT", "norms after the residual"),
        ({"model_type": "bloom"}, "GPT", "are not converted"),
        ({"model_type": "llama", "mlp_bias": True}, "GPT", "mlp_bias"),
        ({"model_type": "llama", "attention_bias": True}, "GPT", "attention_bias"),
        ({"model_type": "llama", "rope_scaling": {"type": "yarn"}}, "GPT", "yarn"),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "GPT",
            "scale_attn_by_inverse_layer_idx",
        ),
        ({"model_type": "gpt2", "activation_function": "relu"}, "GPT", "the activation relu"),
        ({"model_type": "megatron-bert", "hidden_act": "gelu_new"}, "BERT", "hidden_act gelu_new"),
    ],
)
def test_foreign_models_are_refused_by_name(
    tmp_path: Path, config: dict[str, Any], kind: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hf").mkdir()
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 8, "max_position_embeddings": 8}
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**_TINY, **sizes, **config}))
    safetensors_torch.save_file({"x": torch.zeros(1)}, tmp_path / "hf" / "model.safetensors")
    command = ["--model-type", kind, "--loader", "hf", "--saver", "mcore", "--load-dir", str(tmp_path / "hf")]
    assert main([*command, "--save-dir", str(tmp_path / "out")]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    """The round trip through both of our formats gives the same bits in the same dtype, and --bf16 rounds."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TINY)).to(dtype)
    model.save_pretrained(tmp_path / "hf")
    for number, (loader, saver) in enumerate([("hf", "mcore"), ("mcore", "torch_dist"), ("mcore", "hf")]):
        source = tmp_path / ("hf" if number == 0 else str(number - 1))
        _convert("GPT", loader, saver, source, tmp_path / str(number))
    original = safetensors_torch.load_file(tmp_path / "hf" / "model.safetensors")
    assert {value.dtype for value in original.values()} == {dtype}
    _assert_same(safetensors_torch.load_file(tmp_path / "2" / "model.safetensors"), original)
    _convert("GPT", "hf", "mcore", tmp_path / "hf", tmp_path / "rounded", "--bf16")
    assert {value.dtype for value in _model(tmp_path / "rounded").values()} == {torch.bfloat16}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _garble_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:16] = b"\xff" * 8
    path.write_bytes(content)


def _settings(**changes: Any) -> Any:
    def change(path: Path) -> None:
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))

    return change


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("model.safetensors.index.json", lambda path: path.write_text("[]"), "index.json: cannot be used"),
        (
            "model.safetensors.index.json",
            lambda path: path.write_bytes(b"\xff"),
            "index.json: cannot be used",
        ),
        ("model.safetensors.index.json", lambda path: path.write_text("{}"), "lacks 'weight_map'"),
        ("model-00001-of-*.safetensors", _cut, "damaged or was cut short"),
        ("model-00001-of-*.safetensors", _garble_header, "damaged or was cut short"),
        ("model-00001-of-*.safetensors", Path.unlink, "the file is missing"),
        ("config.json", lambda path: path.write_text("[]"), "it holds a list"),
        ("config.json", _settings(hidden_size="absent"), "it lacks 'hidden_size'"),
        ("config.json", _settings(num_hidden_layers=-1), "num_layers is -1"),
        ("config.json", _settings(intermediate_size=64), "config.json says [64, 32]"),
        ("config.json", _settings(vocab_size=128), "config.json says [128, 32]"),
        ("config.json", _settings(num_key_value_heads=1), "config.json says [48, 32]"),
        (
            "config.json",
            _settings(num_attention_heads=6, num_key_value_heads=3, head_dim=8),
            "tensors of transformer layer 0 do not have the shapes",
        ),
    ],
)
def test_damaged_huggingface_directories_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Any, reason: str
) -> None:
    """Index, shards and configuration cut, garbled, missing or of another model: one line, and nothing is published."""
    transformers = pytest.importorskip("transformers")
    _random_model(tmp_path / "hf", transformers.LlamaConfig(**_TINY), "AutoModelForCausalLM")
    (path,) = (tmp_path / "hf").glob(file)
    damage(path)
    command = [
        "--model-type",
        "GPT",
        "--loader",
        "hf",
        "--saver",
        "mcore",
        "--load-dir",
        str(tmp_path / "hf"),
    ]
    assert main([*command, "--save-dir", str(tmp_path / "out")]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out" / "release").exists()


def test_files_without_arguments_are_refused(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Version 0 says nothing of its model; a run loads it, a conversion cannot."""
    command = ["--model-type", "GPT", "--loader", "mcore", "--saver", "mcore"]
    command += ["--load-dir", str(recorded / "legacy_gpt" / "v0"), "--save-dir", str(tmp_path / "out")]
    assert main(command) == 1
    assert "its arguments lack num_layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "kind", "change", "reason"),
    [
        ("bert", "BERT", {"bias_gelu_fusion": True}, "exact GELU in the head"),
        ("llama", "GPT", {"rotary_percent": 0.5}, "rotary_percent 0.5"),
        ("gpt", "GPT", {"squared_relu": True}, "squared_relu"),
        ("gpt", "GPT", {"kv_channels": 32}, "heads of another size"),
        ("t5", "T5", {"norm_epsilon": 1e-6}, "norm_epsilon 1e-06"),
        ("moe", "GPT", {"moe_router_load_balancing_type": "sinkhorn"}, "routing of the kind sinkhorn"),
    ],
)
def test_what_huggingface_lacks_is_refused_by_name(
    recorded: Path,
    tmp_path: Path,
    model: str,
    kind: str,
    change: dict[str, Any],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "in" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    (original,) = (recorded / model / "tp1pp1").glob("*/mp_rank_00/model_optim_rng.pt")
    state = load_file(original)
    vars(state["args"]).update(change)
    torch.save(state, path)
    (tmp_path / "in" / "latest_checkpointed_iteration.txt").write_text("release")
    command = ["--model-type", kind, "--loader", "mcore", "--saver", "hf", "--load-dir", str(tmp_path / "in")]
    assert main([*command, "--save-dir", str(tmp_path / "out")]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_experts_are_written_as_recorded(recorded: Path, tmp_path: Path) -> None:
    """Every name and tensor of the Mixtral that was made of the recorded model by other means."""
    _convert("GPT", "mcore", "hf", recorded / "moe" / "grouped", tmp_path / "hf", "--no-verify")
    ours, theirs = (
        safetensors_torch.load_file(directory / "model.safetensors")
        for directory in (tmp_path / "hf", recorded / "moe" / "hf")
    )
    _assert_same(ours, theirs)


def test_plug_ins_of_ones_own(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Modules on the Python path, found by name; messages, keys and their order are those of v0.9's protocol."""
    (tmp_path / "saver_notes.py").write_text(
        "import json\n"
        "def add_arguments(parser):\n"
        "    parser.add_argument('--notes', required=True)\n"
        "def save_checkpoint(queue, args):\n"
        "    md = queue.get()\n"
        "    notes = [[md.model_type, md.num_layers, md.output_layer, md.swiglu, md.checkpoint_args.seq_length]]\n"
        "    while (message := queue.get()) != 'done':\n"
        "        name = message.pop('name')\n"
        "        notes.append([name, {key: list(tensor.shape) for key, tensor in message.items()}])\n"
        "    open(args.notes, 'w').write(json.dumps(notes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = recorded / "llama" / "tp2pp2"
    _convert("GPT", "mcore", "notes", source, tmp_path / "out", "--notes", str(tmp_path / "notes.json"))
    assert "not verified: the saver saver_notes has no model to run" in capsys.readouterr().out
    layer = {
        "input norm weight": [64], "post norm weight": [64], "qkv weight": [128, 64], "dense weight": [64, 64],
        "mlp l0 weight W": [96, 64], "mlp l0 weight V": [96, 64], "mlp l1 weight": [64, 96],
    }  # fmt: skip
    assert json.loads((tmp_path / "notes.json").read_text()) == [
        ["GPT", 2, True, True, 16],
        ["embeddings", {"word embeddings": [256, 64]}],
        ["transformer layer 0", layer],
        ["transformer layer 1", layer],
        ["final norm", {"weight": [64]}],
        ["output layer", {"weight": [256, 64]}],
    ]


def test_the_table_as_written_is_the_vocabulary_converters_are_told(recorded: Path, tmp_path: Path) -> None:
    _convert("GPT", "mcore", "megatron", recorded / "gpt" / "tp1pp1", tmp_path, "--true-vocab-size", "100")
    (told,) = tmp_path.glob("*/hf_config.json")
    (written,) = tmp_path.glob("*/mp_rank_00/model_optim_rng.pt")
    embedding = load_file(written)["model"]["language_model"]["embedding"]["word_embeddings"]["weight"]
    assert json.loads(told.read_text())["vocab_size"] == len(embedding) == 128


def test_a_plug_in_that_breaks_is_no_success(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "saver_broken.py").write_text(
        "def add_arguments(parser): pass\ndef save_checkpoint(queue, args): queue.get().no_such_setting\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    command = ["--model-type", "GPT", "--loader", "mcore", "--saver", "broken"]
    assert main([*command, "--load-dir", str(recorded / "gpt" / "tp1pp1"), "--save-dir", str(tmp_path)]) == 1
    assert "the saver saver_broken failed" in capsys.readouterr().err


def test_a_wrong_conversion_is_found(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A saver that mixes up two projections: the logits give it away."""
    from tools.checkpoint import hf_rules

    right = hf_rules.unpack

    def wrong(*arguments: Any) -> list[torch.Tensor]:
        q, k, v = right(*arguments)
        return [q, v, k]

    command = ["--model-type", "GPT", "--loader", "mcore", "--saver", "hf"]
    command += ["--load-dir", str(recorded / "gpt" / "tp1pp1"), "--save-dir", str(tmp_path / "out")]
    monkeypatch.setattr(hf_rules, "unpack", wrong)
    assert main(command) == 1
    told = capsys.readouterr()
    assert "computes other logits" in told.err and "NOT verified on 64" in told.out


def test_logits_beyond_the_digits_of_fp32_are_compared_in_float64(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With logits of dozens fp32 alone misses the tolerance by rounding; nothing is tolerated for that."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{**_TINY, "num_hidden_layers": 4, "hidden_size": 128})
    _random_model(tmp_path / "hf", config, "AutoModelForCausalLM")
    path = next(file for file in (tmp_path / "hf").glob("*.safetensors") if "lm_head.weight" in _names(file))
    weights = safetensors_torch.load_file(path)
    weights["lm_head.weight"] *= 100
    safetensors_torch.save_file(weights, path, {"format": "pt"})
    _convert("GPT", "hf", "mcore", tmp_path / "hf", tmp_path / "own")
    line = re.search(
        r"verified on 64 random tokens in float64: max \|dlogit\| (\S+) "
        r"\(logits up to (\S+), allowed 1e-05; fp32's rounding leaves (\S+)\)",
        capsys.readouterr().out,
    )
    assert line is not None
    assert float(line[1]) < 1e-10 and float(line[2]) > 10 and 1e-5 < float(line[3]) < 1e-2
    assert torch.get_default_dtype() is torch.float32


def _names(file: Path) -> set[str]:
    return set(safetensors_torch.load_file(file))


_MEASURED = """
import sys, threading, time
from argparse import Namespace
from tools.checkpoint import conversion

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

peak = before = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

import torch, tools.checkpoint.verification, tools.checkpoint.hf_model, transformers, pretrain_gpt
import tools.checkpoint.saver_mcore, tools.checkpoint.saver_torch_dist, safetensors
from transformers import AutoModelForCausalLM, LlamaForCausalLM
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
before = peak = anonymous()
threading.Thread(target=watch, daemon=True).start()
status = conversion.main(sys.argv[1:])
print(f"peak {peak - before:.0f}")
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("saver", "layers"),
    [
        ("mcore", 32),
        ("hf", 32),
        pytest.param("torch_dist", 32, marks=pytest.mark.slow),
        pytest.param("mcore", 128, marks=pytest.mark.slow),
        pytest.param("hf", 128, marks=pytest.mark.slow),
        pytest.param("torch_dist", 128, marks=pytest.mark.slow),
    ],
)
def test_memory_is_a_few_layers(tmp_path: Path, saver: str, layers: int) -> None:
    """A model of any number of layers of 6 MiB is converted and verified in the memory of a few of them."""
    pytest.importorskip("transformers")
    hidden, heads = 256, 4
    weights = {
        "model.embed_tokens.weight": torch.randn(128, hidden) * 0.02,
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": torch.randn(128, hidden) * 0.02,
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[f"{prefix}self_attn.{name}.weight"] = torch.randn(hidden, hidden) * 0.02
        for name, shape in (("gate_proj", (1707, 256)), ("up_proj", (1707, 256)), ("down_proj", (256, 1707))):
            weights[f"{prefix}mlp.{name}.weight"] = torch.randn(shape) * 0.02
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = torch.ones(hidden)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": hidden,
        "intermediate_size": 1707, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    (tmp_path / "hf").mkdir()
    safetensors_torch.save_file(weights, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    del weights
    source, loader = tmp_path / "hf", "hf"
    if saver == "hf":
        _convert("GPT", "hf", "mcore", source, tmp_path / "in", *_sizes(2, 2), "--no-verify")
        source, loader = tmp_path / "in", "mcore"
    command = ["--model-type", "GPT", "--loader", loader, "--saver", saver]
    command += ["--load-dir", str(source), "--save-dir", str(tmp_path / "out")]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    match = re.search(r"^peak (\d+)", done.stdout, re.M)
    assert match is not None, done.stdout
    print(f"{saver}: {layers * 6} MiB of layers, at most {match[1]} MiB of memory")
    assert int(match[1]) < 64, done.stdout


@pytest.mark.parametrize("option", [["--loader", "nowhere"], ["--saver", "json"]])
def test_unknown_plugins_are_named(
    tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model-type", "GPT", "--load-dir", "a", "--save-dir", str(tmp_path), *option]) == 2
    assert option[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loader", "saver", "flag", "value"),
    [
        ("mcore", "hf", "--megatron-path", "elsewhere"),
        ("mcore", "hf", "--position-embedding-type", "rope"),
        ("mcore", "hf", "--loader-transformer-impl", "local"),
        ("hf", "mcore", "--model-size", "7B"),
        ("hf", "torch_dist", "--saver-transformer-impl", "local"),
        ("hf", "megatron", "--megatron-path", "elsewhere"),
    ],
)
def test_flags_of_older_command_lines_are_said_to_do_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loader: str, saver: str, flag: str, value: str
) -> None:
    command = ["--model-type", "GPT", "--loader", loader, "--saver", saver]
    assert (
        main([*command, "--load-dir", str(tmp_path), "--save-dir", str(tmp_path / "out"), flag, value]) != 0
    )
    assert f"{flag} has no effect: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    ["--max-queue-size 0", "--max-shard-megabytes 0", "--true-vocab-size -1", "--target-tensor-parallel-size 0",
     "--target-pipeline-parallel-size -2", "--bf16 --fp16"],
)  # fmt: skip
def test_values_without_a_meaning_are_refused(capsys: pytest.CaptureFixture[str], words: str) -> None:
    saver = "hf" if "shard" in words else "mcore"
    command = [
        "--model-type",
        "GPT",
        "--loader",
        "hf",
        "--saver",
        saver,
        "--load-dir",
        "a",
        "--save-dir",
        "b",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*command, *words.split()])
    assert ended.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "words", "said"),
    [
        ("gpt", "--saver mcore --target-tensor-parallel-size 3", "--target-tensor-parallel-size: 3 does not divide"),
        ("gpt", "--saver mcore --target-pipeline-parallel-size 3", "--target-pipeline-parallel-size: 3 does not"),
        ("gpt", "--saver mcore --target-expert-parallel-size 2", "the model has no experts"),
        ("gpt", "--saver mcore --vocab-file nowhere", "--vocab-file nowhere: it is no JSON vocabulary"),
        ("gpt", "--saver mcore --tokenizer-dir nowhere", "--tokenizer-dir nowhere: it has none of"),
        ("gpt", "--saver mcore --model-type T5", "it is no T5 model. Fix: give another --model-type"),
        ("llama", "--saver hf --hidden-act gelu", "--hidden-act: the model has SwiGLU"),
    ],
)  # fmt: skip
def test_what_a_model_does_not_have_is_refused(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, words: str, said: str
) -> None:
    command = ["--model-type", "GPT", "--loader", "mcore", "--load-dir", str(recorded / model / "tp1pp1")]
    assert main([*command, "--save-dir", str(tmp_path / "out"), *words.split()]) != 0
    message = capsys.readouterr().err
    assert said in message and " Fix: " in message
