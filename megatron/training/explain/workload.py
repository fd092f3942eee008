"""What one step computes: the numbers of a finished command line that time, traffic and memory depend on."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass

from megatron.training.explain.command import CAUSAL
from megatron.training.explain.parameters import Chunk, Parameter, Stages, stages_of


@dataclass(frozen=True)
class Workload:
    """Sizes of the model, the batch and the layout; bytes are per element.

    `tokens` are those of one micro-batch on one rank before tensor parallelism divides them, `keys` the length that
    attention reaches over, `attention` how scores are treated: "flash" (never stored), "blocked" (this library's CPU
    kernel: causal blocks stored) or "scores" (all stored).
    """

    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocab: int
    seq: int
    decoder_seq: int
    micro: int
    gated: bool
    dropout: bool
    attention_dropout: bool
    rope: bool
    biases: bool
    causal: bool
    attention: str
    experts: int
    topk: int
    tp: int
    cp: int
    dp: int
    ep: int
    stages: int
    chunks: int
    microbatches: int
    sequence_parallel: bool
    bytes: int
    residual_bytes: int
    gradient_bytes: int
    recompute: str
    recompute_method: str
    recompute_layers: int
    distributed_optimizer: bool
    adam: bool
    overlap_gradients: bool
    overlap_gather: bool
    overlap_tensor: bool
    overlap_pipeline: bool
    world: int
    on_cpu: bool
    softmax_in_fp32: bool
    fused_activation: bool
    encoder_decoder: bool
    distribute_saved: bool
    fp8_wgrad: bool
    fp8_weights: bool
    fused_scan: bool

    def weight_bytes(self, param: Parameter) -> int:
        """What an element of a parameter takes, in memory and on the wire."""
        return 1 if param.fp8 and self.fp8_weights else self.bytes

    def sent_bytes(self, chunks: Iterable[Chunk]) -> int:
        """All parameters of these chunks, as they are gathered."""
        return sum(p.numel * self.weight_bytes(p) for chunk in chunks for p in chunk.parameters)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.seq * self.micro // self.cp

    @property
    def decoder_tokens(self) -> int:
        """Tokens of a micro-batch that a decoder beside an encoder sees."""
        return self.decoder_seq * self.micro // self.cp

    @property
    def keyed_heads(self) -> float:
        """Heads of keys (and of values) on one rank."""
        return max(1.0, self.groups / self.tp)

    @property
    def distributed_segments(self) -> float:
        """Share of a recomputed segment's input that a rank keeps."""
        return 1 / self.tp if self.distribute_saved and not self.sequence_parallel else 1.0

    @property
    def replicated(self) -> float:
        """Share of the tokens that a rank holds outside of the divided matrices."""
        return 1 / self.tp if self.sequence_parallel else 1.0

    @property
    def message_bytes(self) -> float:
        """What one pipeline stage sends to the next per micro-batch, on each rank."""
        return self.tokens * self.replicated * self.hidden * self.residual_bytes


def workload(
    args: Namespace, stages: Stages, script: str, attention: str, fused_scan: bool, on_cpu: bool
) -> Workload:
    """Read the numbers off finished arguments."""
    half = args.fp16 or args.bf16
    in_fp32 = args.accumulate_allreduce_grads_in_fp32 or not half
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    return Workload(
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        heads=args.num_attention_heads,
        groups=groups,
        head=args.kv_channels,
        vocab=args.padded_vocab_size,
        seq=args.seq_length,
        decoder_seq=args.decoder_seq_length or args.seq_length,
        micro=args.micro_batch_size,
        gated=args.swiglu,
        dropout=args.hidden_dropout > 0,
        attention_dropout=args.attention_dropout > 0,
        rope=args.position_embedding_type == "rope",
        biases=args.add_bias_linear,
        causal=script in CAUSAL,
        attention=attention,
        experts=args.num_experts or 0,
        topk=args.moe_router_topk if args.num_experts else 1,
        tp=args.tensor_model_parallel_size,
        cp=args.context_parallel_size,
        dp=args.data_parallel_size,
        ep=args.expert_model_parallel_size,
        stages=stages_of(args),
        chunks=len(stages[0]),
        microbatches=args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
        sequence_parallel=args.sequence_parallel,
        bytes=2 if half else 4,
        residual_bytes=4 if args.fp32_residual_connection or not half else 2,
        gradient_bytes=4 if in_fp32 else 2,
        recompute=args.recompute_granularity or "none",
        recompute_method=args.recompute_method or "none",
        recompute_layers=args.recompute_num_layers or 0,
        distributed_optimizer=args.use_distributed_optimizer,
        adam=args.optimizer == "adam",
        overlap_gradients=args.overlap_grad_reduce,
        overlap_gather=args.overlap_param_gather,
        overlap_tensor=args.tp_comm_overlap,
        overlap_pipeline=args.overlap_p2p_comm,
        world=args.world_size,
        on_cpu=on_cpu,
        softmax_in_fp32=args.attention_softmax_in_fp32,
        fused_activation=args.bias_swiglu_fusion if args.swiglu else args.bias_gelu_fusion,
        encoder_decoder=script == "pretrain_t5",
        distribute_saved=args.distribute_saved_activations,
        fp8_wgrad=args.fp8_wgrad,
        fp8_weights=args.fp8_param_gather,
        fused_scan=fused_scan,
    )
