"""Our own model of a Megatron checkpoint, in one process and fp32, as `pretrain_*.py` would build it."""

from __future__ import annotations

import contextlib
import importlib
import io
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import parallel_state, tensor_parallel
from megatron.core.errors import CheckpointError
from megatron.core.timers import Timers
from megatron.training import global_vars
from megatron.training.config import parser
from megatron.training.context import TrainContext
from tools.checkpoint import names
from tools.checkpoint.sources import DistributedSource, TorchSource, whole
from tools.checkpoint.streamed_model import stream, without_weights

_ENTRY_SCRIPTS = {"GPT": "pretrain_gpt", "BERT": "pretrain_bert", "T5": "pretrain_t5"}

# However the checkpoint was trained, it is run by one process in fp32 with plain modules.
_ONE_PROCESS = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "encoder_tensor_model_parallel_size": 0,
    "encoder_pipeline_model_parallel_size": 0,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "expert_model_parallel_size": 1,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "moe_grouped_gemm": False,
    "moe_expert_capacity_factor": None,
    "moe_token_dispatcher_type": "allgather",
    "params_dtype": torch.float32,
    "fp16": False,
    "bf16": False,
    "fp8": None,
    "fp32_residual_connection": False,
    "transformer_impl": "local",
    "use_flash_attn": False,
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "spec": None,
    "rank": 0,
    "world_size": 1,
    "mock_data": False,
}


class MegatronModel:
    """Logits of a checkpoint."""

    def __init__(self, source: TorchSource | DistributedSource, md: Namespace) -> None:
        self._source, self._md = source, md
        self.vocabulary = getattr(source.args, "padded_vocab_size", None) or 0
        self.positions = md.max_position_embeddings
        self.overrides: dict[str, Any] = {}

    def logits(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """tokens [b, s] -> logits [b, s, v] (BERT: and those of the binary head, [b, 2])."""
        args = self._arguments()
        script = importlib.import_module(_ENTRY_SCRIPTS[self._md.model_type])
        with _one_process(), global_vars.using(TrainContext(args, Timers(0, "minmax"))), torch.no_grad():
            with without_weights(), contextlib.redirect_stdout(io.StringIO()):
                model = script.model_provider()
            model = stream(model, _Weights(self._source, self._md).get)
            batch, length = tokens.shape
            nothing_hidden = torch.zeros(batch, length, length, dtype=torch.bool)
            if self._md.model_type == "GPT":
                positions = torch.arange(length).expand_as(tokens)
                return [model(tokens, positions, None)]
            if self._md.model_type == "BERT":
                kinds = torch.zeros_like(tokens) if args.bert_binary_head else None
                outputs = model(tokens, torch.ones_like(tokens), tokentype_ids=kinds)
                return [output for output in outputs if output is not None]
            return [model(tokens, tokens, nothing_hidden, None, nothing_hidden)]

    def _arguments(self) -> Namespace:
        args = Namespace(**{flag.dest: flag.cli_default for flag in parser.all_flags()})
        vars(args).update(
            {name: value for name, value in vars(self._source.args).items() if value is not None}
        )
        vars(args).update(_ONE_PROCESS)
        vars(args).update(self.overrides)
        if not getattr(args, "kv_channels", None):
            args.kv_channels = args.hidden_size // args.num_attention_heads
        if self._md.model_type == "T5":
            args.encoder_num_layers = names.encoder_depth(args)
            # What the entry script wants of its data.
            args.vocab_extra_ids = getattr(args, "vocab_extra_ids", 0) or 1
            args.decoder_seq_length = getattr(args, "decoder_seq_length", None) or args.seq_length
        return args


class _Weights:
    """Weights by today's state-dict names."""

    def __init__(self, source: TorchSource | DistributedSource, md: Namespace) -> None:
        self._source = source
        self._where = {}
        for message in names.messages(md):
            number = "" if message.layer is None else f"{message.layer}."
            for entry in message.entries:
                for name in (entry.name, *entry.aliases):
                    self._where[f"{message.prefix}{number}{name}"] = (message, entry)
        self._message: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def get(self, name: str) -> torch.Tensor:
        expert = None
        plain = name
        if ".local_experts." in name:
            head, _, rest = name.partition("experts.local_experts.")
            number, _, rest = rest.partition(".")
            plain, expert = head + rest, int(number)
        if plain not in self._where:
            raise CheckpointError(str(self._source.path), f"the model's weight {name} is not converted")
        message, entry = self._where[plain]
        if self._message[0] != message.name:
            self._message = (message.name, whole(self._source, message))
        tensors = self._message[1]
        value = tensors.get(entry.key)
        if value is None and f"{entry.key} W" in tensors:
            gate, up = tensors[f"{entry.key} W"], tensors[f"{entry.key} V"]
            value = torch.cat([gate, up] if expert is None else [gate[expert], up[expert]])
        elif value is not None and expert is not None:
            value = value[expert]
        if value is None:
            raise CheckpointError(
                str(self._source.path), f"it has no weight {name}", "check that it is complete"
            )
        return value


@contextmanager
def _one_process() -> Iterator[None]:
    """Process groups of a world of one, unless a caller has them."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
    finally:
        tensor_parallel.random.destroy_rng_tracker()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
