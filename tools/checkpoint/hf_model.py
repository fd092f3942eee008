"""transformers' own model of a HuggingFace directory, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megatron.core.errors import CheckpointError
from tools.checkpoint.hf_families import family_of_config
from tools.checkpoint.streamed_model import stream, without_weights


class HuggingFaceModel:
    """Logits of a directory; `dtype` rounds weights as the conversion did."""

    def __init__(
        self,
        directory: Path,
        model_type: str,
        get: Callable[[str], torch.Tensor | None],
        dtype: torch.dtype | None = None,
    ) -> None:
        from tools.checkpoint.loader_hf import read_config

        self._directory, self._get, self._dtype = directory, get, dtype
        config = read_config(directory)
        self._family = family_of_config(config, model_type)
        self._architecture = (config.get("architectures") or [""])[0]
        self.vocabulary: int = config["vocab_size"]
        self.positions: int = config.get("max_position_embeddings") or config["n_positions"]
        self.overrides: dict[str, object] = {}
        self.source_overrides: dict[str, object] = {}

    def logits(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """tokens [b, s] -> logits [b, s, v] (BERT: and those of the binary head, [b, 2])."""
        try:
            import transformers
        except ImportError as error:
            raise CheckpointError(
                "--verify", "transformers is not installed", "install it, or pass --no-verify"
            ) from error
        config = transformers.AutoConfig.from_pretrained(self._directory)
        make = getattr(transformers, self._family.auto_class).from_config
        if self._architecture == "MegatronBertForMaskedLM":
            make = transformers.AutoModelForMaskedLM.from_config
        with without_weights():
            # Attention in plain matrix products: what others sum in another order they round differently.
            model = make(config, attn_implementation="eager", dtype=torch.float32)
        model = stream(model, self._weight)
        with torch.no_grad():
            if self._family.model_type == "T5":
                bias = self._weight("final_logits_bias")
                model.final_logits_bias = bias.float()
                return [model(input_ids=tokens, decoder_input_ids=tokens, use_cache=False).logits]
            output = model(tokens, use_cache=False) if self._family.model_type == "GPT" else model(tokens)
        if self._family.model_type == "GPT":
            return [output.logits]
        if hasattr(output, "prediction_logits"):
            return [output.prediction_logits, output.seq_relationship_logits]
        return [output.logits]

    def _weight(self, name: str) -> torch.Tensor:
        value = self._experts(name) if ".mlp.experts." in name else self._get(name.replace(*_ROUTER))
        for tied in _TIED.get(name, ()):
            if value is None:
                value = self._get(tied)
        if value is None:
            raise CheckpointError(
                str(self._directory), f"it has no tensor {name}", "check that it is complete"
            )
        return value if self._dtype is None else value.to(self._dtype)

    def _experts(self, name: str) -> torch.Tensor | None:
        """All experts' matrices, which in memory are one tensor (transformers 5) or as in the files (4)."""
        layer, _, leaf = name.partition(".mlp.experts.")
        if leaf not in _EXPERTS:
            return self._get(name.replace(".mlp.", ".block_sparse_moe."))
        experts: list[torch.Tensor] = []
        while True:
            place = f"{layer}.block_sparse_moe.experts.{len(experts)}"
            parts = [self._get(f"{place}.{matrix}.weight") for matrix in _EXPERTS[leaf]]
            found = [part for part in parts if part is not None]
            if len(found) != len(parts):
                return torch.stack(experts) if experts else None
            experts.append(torch.cat(found))


# transformers' Mixtral has its modules under other names in memory than in its files.
_ROUTER = (".mlp.gate.weight", ".block_sparse_moe.gate.weight")
_EXPERTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}

# Names of tied tensors that files need not have -> those that they have.
_TIED = {
    "lm_head.weight": ("model.embed_tokens.weight", "transformer.wte.weight", "model.shared.weight"),
    "model.encoder.embed_tokens.weight": ("model.shared.weight",),
    "model.decoder.embed_tokens.weight": ("model.shared.weight",),
    "cls.predictions.decoder.weight": ("bert.embeddings.word_embeddings.weight",),
    "cls.predictions.decoder.bias": ("cls.predictions.bias",),
}
