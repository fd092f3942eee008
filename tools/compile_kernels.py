#!/usr/bin/env python3
"""Compile every Triton kernel for GPUs this machine does not have and list what each one costs.

    python tools/compile_kernels.py --targets sm_80 sm_90 sm_100

The public functions of the kernels are called with ordinary CPU tensors of representative shapes; each
launch is caught and compiled instead of run, so the list holds every kernel with exactly the block sizes,
warps and argument types that training would use. Columns: registers per thread, bytes of stack (spilled
registers), bytes of shared memory. Exit status 1 if a kernel does not compile, exceeds the shared memory of
its target, or spills beyond `--allow-stack`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.core.kernels.triton import (
    attention,
    bias_activation,
    bias_dropout_add,
    cross_entropy,
    embedding_grad,
    fp8_quantize,
    masked_softmax,
    multi_tensor,
    norm,
    rope,
    state_space,
)

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes one block may use
STACK_LIMIT = 16  # bytes: a few values parked outside the loops cost nothing
POINTER = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64", torch.bool: "*i1", torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel with the types, constants and options of a launch."""

    kernel: JITFunction[Any] = field(compare=False, hash=False)
    name: str
    types: tuple[tuple[str, str], ...]  # argument -> Triton type, "constexpr" for constants
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]  # arguments known to be multiples of 16
    options: tuple[tuple[str, int], ...]

    def label(self) -> str:
        shown = [f"{n}={v}" for n, v in self.constants + self.options]
        data = next((t[1:] for _, t in self.types if t.startswith("*")), "")
        return f"{self.name} {data} {' '.join(shown)}"


@dataclass(frozen=True)
class Cost:
    """What the assembler says of one compiled kernel."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix_instructions: str


def exists_on(launch: Launch, capability: int) -> bool:
    """Whether the target has the number formats of a launch: fp8 came with 8.9."""
    return capability >= 89 or not any(kind.startswith("*fp8") for _, kind in launch.types)


def describe(kernel: JITFunction[Any], args: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    """Types, constants and options as Triton would derive them from a launch with these arguments."""
    names = kernel.arg_names
    values = dict(zip(names, args)) | {n: v for n, v in named.items() if n in names}
    options = tuple(sorted((n, v) for n, v in named.items() if n not in names))
    constants, types, divisible = [], [], []
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            constants.append((parameter.name, value))
            types.append((parameter.name, "constexpr"))
            continue
        types.append((parameter.name, type_of(value)))
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            divisible.append(parameter.name)
    return Launch(kernel, kernel.__name__, tuple(types), tuple(constants), tuple(divisible), options)


def type_of(value: Any) -> str:
    """Triton's name for the type of a launch argument."""
    if isinstance(value, Tensor):
        return POINTER[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@contextmanager
def caught(launches: dict[Launch, None]) -> Iterator[None]:
    """Inside the block kernels are not launched but entered in `launches`."""
    original = JITFunction.run

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches[describe(self, args, named)] = None

    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = original  # type: ignore[method-assign]


def compile_for(launch: Launch, capability: int) -> Cost:
    """Compile one launch for compute capability `capability` (90 = 9.0) and read its costs from the binary."""
    names = launch.kernel.arg_names
    constants = {(names.index(n),): v for n, v in launch.constants}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in launch.divisible}
    source = ASTSource(launch.kernel, dict(launch.types), constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    return read_cost(compiled.asm["cubin"], compiled.metadata.shared, compiled.asm["ptx"])


def read_cost(cubin: bytes, shared: int, ptx: str) -> Cost:
    """Registers and stack as cuobjdump reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    kinds = [k for k in ("wgmma", "tcgen05.mma", "mma.sync") if k in ptx]
    return Cost(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], shared, kinds[0] if kinds else "")


def backward(outputs: Any) -> None:
    """Run the backward pass of one or several outputs."""
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        output.backward(torch.ones_like(output), retain_graph=True)


def training_shapes(dtype: torch.dtype, heads: tuple[int, ...]) -> dict[str, Callable[[], None]]:
    """One call of every public function, at the widths of a 7B model."""

    def t(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.ones(shape, dtype=kind).requires_grad_(kind.is_floating_point)

    def attend(width: int, drop: float) -> None:
        q, k = t(256, 1, 4, width), t(256, 1, 2, width)
        backward(attention.attention(q, k, t(256, 1, 2, width), causal=True, scale=0.1, dropout_p=drop))

    def scan(width: int, state: int) -> None:
        inputs = (t(1, 256, 4, width), t(1, 256, 4, kind=torch.float32), t(4, kind=torch.float32))
        shared = (t(1, 256, 2, state), t(1, 256, 2, state))
        backward(
            state_space.state_space_scan(*inputs, *shared, 128, t(1, 4, width, state, kind=torch.float32))
        )

    def lists() -> list[list[Tensor]]:
        return [[t(4096, kind=torch.float32).detach()] for _ in range(4)]

    adam_options: dict[str, Any] = {
        "step": 1,
        "lr": 1e-3,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
    wide = 4096
    ids = torch.zeros(16, dtype=torch.int64)
    angles = torch.ones(16, 1, 1, 128)
    table = {
        "layer_norm": lambda: backward(norm.layer_norm(t(2, wide), t(wide), t(wide), 1e-5)),
        "residual_layer_norm": lambda: backward(
            norm.residual_layer_norm(t(2, wide), t(2, wide), t(wide), t(wide), 1e-5)
        ),
        "rms_norm": lambda: backward(norm.rms_norm(t(2, wide), t(wide), 1e-5)),
        "residual_rms_norm": lambda: backward(norm.residual_rms_norm(t(2, wide), t(2, wide), t(wide), 1e-5)),
        "bias_gelu": lambda: backward(bias_activation.bias_gelu(t(2, wide), t(wide))),
        "bias_swiglu": lambda: backward(bias_activation.bias_swiglu(t(2, wide), t(wide))),
        "swiglu": lambda: backward(bias_activation.bias_swiglu(t(2, wide), None)),
        "bias_geglu": lambda: backward(bias_activation.bias_geglu(t(2, wide), t(wide))),
        "bias_dropout_add": lambda: backward(
            bias_dropout_add.bias_dropout_add(t(2, wide), t(wide), t(2, wide), 0.1)
        ),
        "bias_add": lambda: backward(bias_dropout_add.bias_dropout_add(t(2, wide), None, t(2, wide), 0.0)),
        "causal_softmax": lambda: backward(masked_softmax.masked_softmax(t(1, 1, 2, 2048), None, 0.5, True)),
        "masked_softmax": lambda: backward(
            masked_softmax.masked_softmax(
                t(1, 1, 2, 2048), torch.zeros(1, 1, 2, 2048, dtype=torch.bool), 0.5, False
            )
        ),
        "rope": lambda: backward(rope.rope(t(16, 1, 32, 128), angles)),
        "rope_interleaved": lambda: backward(rope.rope(t(16, 1, 32, 128), angles, True)),
        "rope_packed": lambda: backward(
            rope.rope(t(16, 32, 128), angles, False, torch.tensor([0, 6, 16], dtype=torch.int32))
        ),
        "vocab_cross_entropy": lambda: backward(cross_entropy.vocab_cross_entropy(t(16, 32000), ids)),
        "smoothed_cross_entropy": lambda: backward(
            cross_entropy.vocab_cross_entropy(t(16, 50304), ids, None, 0.1)
        ),
        "embedding_grad": lambda: embedding_grad.embedding_grad(
            ids, t(16, wide), t(8, wide, kind=torch.float32)
        ),
    }
    one = torch.ones(())
    for fmt in (torch.float8_e4m3fn, torch.float8_e5m2):
        table[f"{str(fmt)[6:]}_quantize"] = lambda fmt=fmt: (
            fp8_quantize.quantize(t(64, wide).detach(), one, fmt, one, True) and None
        )
    # The registry offers attention in half precision only.
    for width in heads if dtype != torch.float32 else ():
        table[f"attention_{width}"] = lambda w=width: attend(w, 0.0)
        table[f"attention_{width}_dropout"] = lambda w=width: attend(w, 0.1)
    # So it does the state-space scan.
    for width, state in ((64, 128), (128, 128)) if dtype != torch.float32 else ():
        table[f"state_space_scan_{width}_{state}"] = lambda w=width, n=state: scan(w, n)
    if dtype == torch.float32:
        table["l2_norm"] = lambda: multi_tensor.l2_norm(lists()[0]) and None
        table["scale"] = lambda: multi_tensor.scale(lists()[0], lists()[1], 0.5) and None
        table["adam"] = lambda: multi_tensor.adam(*lists(), **adam_options)
        table["sgd"] = lambda: multi_tensor.sgd(
            *lists()[:3], lr=0.1, momentum=0.9, weight_decay=0.1, first_step=False
        )
    return table


def all_launches(
    dtype: torch.dtype, heads: tuple[int, ...] = (64, 128, 256), only: str = ""
) -> dict[Launch, None]:
    """Every distinct launch of the public functions whose name contains `only`."""
    launches: dict[Launch, None] = {}
    with caught(launches):
        for name, call in training_shapes(dtype, heads).items():
            if only in name:
                call()
    return launches


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=["sm_80", "sm_90", "sm_100"], help="architectures")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"], help="data types")
    parser.add_argument(
        "--heads", nargs="+", type=int, default=[64, 128, 256], help="head sizes of attention"
    )
    parser.add_argument("--only", default="", help="functions whose name contains this")
    parser.add_argument(
        "--allow-stack", type=int, default=STACK_LIMIT, help="bytes of stack that are no failure"
    )
    options = parser.parse_args()
    failures = 0
    print(f"{'target':7} {'regs':>4} {'stack':>5} {'shared':>7}  {'matrix':12} kernel")
    for name in options.dtypes:
        for launch in all_launches(getattr(torch, name), tuple(options.heads), options.only):
            for target in options.targets:
                number = int(target.removeprefix("sm_"))
                if not exists_on(launch, number):
                    continue
                cost = compile_for(launch, number)
                bad = cost.stack_bytes > options.allow_stack or cost.shared_bytes > SHARED_LIMIT.get(
                    number, 1 << 30
                )
                failures += bad
                print(
                    f"{target:7} {cost.registers:4} {cost.stack_bytes:5} {cost.shared_bytes:7}  "
                    f"{cost.matrix_instructions:12} {launch.label()}{'   <-- too much' if bad else ''}",
                    flush=True,
                )
    print(
        f"{failures} kernels exceed their limits" if failures else "all kernels compile within their limits"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
