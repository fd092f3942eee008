"""What `--spec` may name, and what is said of anything else."""

from __future__ import annotations

import pytest

from megatron.core.errors import FlagError
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.training.specs import named_spec

BERT = "megatron.core.models.bert.bert_layer_specs"
GPT = "megatron.core.models.gpt.gpt_layer_specs"
MAMBA = "megatron.core.models.mamba.mamba_layer_specs"
BLOCK = "megatron.core.transformer.transformer_block"


def test_names_of_specifications() -> None:
    assert named_spec([BERT, "bert_layer_local_spec"]) is bert_layer_local_spec
    assert named_spec([MAMBA, "mamba_stack_spec"], of_a_stack=True) is mamba_stack_spec


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "a module and a name in it make one"),
        ("local", "a module and a name in it make one"),
        ("no.module thing", "No module named 'no'"),
        (f"{GPT} thing", "has no attribute 'thing'"),
        (f"{GPT} get_gpt_layer_local_spec", "it is a function, no ModuleSpec of a layer"),
        (f"{BLOCK} TransformerBlockSubmodules", "it is a type, no ModuleSpec of a layer"),
    ],
)
def test_other_names_are_refused(words: str, said: str) -> None:
    with pytest.raises(FlagError, match=rf"--spec.*{said}.* Fix: "):
        named_spec(words.split())


def test_a_layer_is_no_stack() -> None:
    with pytest.raises(
        FlagError, match="it is the ModuleSpec of a TransformerLayer, no ModuleSpec of a stack"
    ):
        named_spec([BERT, "bert_layer_local_spec"], of_a_stack=True)


def test_layers_one_by_one_are_no_stack() -> None:
    with pytest.raises(FlagError, match="it is a function, no ModuleSpec of a stack"):
        named_spec([GPT, "get_gpt_layer_local_spec"], of_a_stack=True)
