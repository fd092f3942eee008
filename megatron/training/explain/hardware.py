"""Device profiles: a handful of measured or published numbers per device, and the time laws that use them.

Published peaks and link speeds are the vendor's; the efficiencies are one set per device, the same for every model and
layout (docs/scale.md says where each comes from).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from megatron.core.errors import FlagError
from megatron.training.explain.work import Gemm

GB = 1e9
TFLOP = 1e12


@dataclass(frozen=True)
class DeviceProfile:
    """One kind of device in nodes of `per_node`, joined by a fast link inside and a network between nodes.

    Rates in FLOP/s and bytes/s, per device and direction. A GEMM [m, k] x [k, n] runs at
    `peak * gemm_share / (1 + half_rows/m + half_rows/n + half_depth/k)`: the shares of tiles that are filled and of the
    time spent in the main loop. `peak` is that of half-precision operands; `peak_fp8` and `peak_fp32` take its place for
    others (torch multiplies fp32 matrices in fp32 unless told otherwise). `attention_share` of the peak is what fused
    attention reaches, `memory_share` of the bandwidth what passes over memory reach, `link_share` and
    `network_share` of links and adapters what transfers reach. `hidden_tensor` is the share of
    tensor-parallel transfers that overlap hides. `launch_s` is added to every GEMM and attention, `step_s` to every
    step (data, logging, the optimizer's host work), and `jitter` is what a step takes longer than its parts: stragglers.
    `capacity` is the device's memory in bytes.
    """

    name: str
    peak: float
    peak_fp8: float
    peak_fp32: float
    gemm_share: float
    half_rows: float
    half_depth: float
    attention_share: float
    memory: float
    memory_share: float
    link: float
    network: float
    link_share: float
    network_share: float
    per_node: int
    hidden_tensor: float
    latency_s: float
    launch_s: float
    step_s: float
    jitter: float
    capacity: float

    def peak_of(self, operand_bytes: int) -> float:
        """The peak of products whose operands take so many bytes an element."""
        return {1: self.peak_fp8, 2: self.peak, 4: self.peak_fp32}[operand_bytes]

    def gemm_seconds(self, gemm: Gemm, operand_bytes: int) -> float:
        """Time of a GEMM, or of a batch of equal ones."""
        m, n, k, batch = gemm
        share = self.gemm_share / (1 + self.half_rows / m + self.half_rows / n + self.half_depth / k)
        return self.launch_s + 2.0 * m * n * k * batch / (self.peak_of(operand_bytes) * share)

    def pass_seconds(self, moved_bytes: float) -> float:
        """Time to read and write so many bytes of device memory."""
        return moved_bytes / (self.memory * self.memory_share)

    def attention_seconds(self, flops: float, operand_bytes: int) -> float:
        """Time of fused attention with so many FLOPs (only those that a causal mask leaves)."""
        return self.launch_s + flops / (self.peak_of(operand_bytes) * self.attention_share)

    def group_rate(self, ranks: int, stride: int) -> float:
        """Bytes/s per rank of a ring over `ranks` that stand `stride` apart in the world.

        Inside a node the link counts. Across nodes each rank in a node brings its own network adapter to the ring, up to
        what the link inside can carry on.
        """
        if ranks * stride <= self.per_node:
            return self.link * self.link_share
        here = max(1, self.per_node // stride)
        return min(here * self.network * self.network_share, self.link * self.link_share)

    def ring_seconds(self, size_bytes: float, ranks: int, stride: int) -> float:
        """Time of an all-gather or reduce-scatter whose whole tensor has `size_bytes` (an all-reduce takes two)."""
        if ranks == 1:
            return 0.0
        return self.latency_s * ranks + size_bytes * (ranks - 1) / ranks / self.group_rate(ranks, stride)

    def send_seconds(self, size_bytes: float, stride: int) -> float:
        """Time to hand `size_bytes` to the rank `stride` further on."""
        near = stride < self.per_node
        rate = self.link * self.link_share if near else self.network * self.network_share
        return self.latency_s + size_bytes / rate


H100 = DeviceProfile(
    name="h100",
    peak=989.5 * TFLOP,
    peak_fp8=1979 * TFLOP,
    peak_fp32=66.9 * TFLOP,
    gemm_share=0.64,
    half_rows=96,
    half_depth=256,
    attention_share=0.40,
    memory=3350 * GB,
    memory_share=0.62,
    link=450 * GB,
    network=50 * GB,
    link_share=0.78,
    network_share=0.90,
    per_node=8,
    hidden_tensor=0.7,
    latency_s=8e-6,
    launch_s=4e-6,
    step_s=0.03,
    jitter=0.05,
    capacity=80 * GB,
)

#: By name; an H200 is an H100 with faster memory.
PROFILES = {
    "h100": H100,
    "h200": replace(H100, name="h200", memory=4800 * GB, capacity=141 * GB),
    # The same software: what differs is the chip, and that its matrix units are not held back by power.
    "a100": replace(
        H100,
        name="a100",
        peak=312 * TFLOP,
        peak_fp8=312 * TFLOP,  # without units of its own
        peak_fp32=19.5 * TFLOP,
        gemm_share=0.80,
        memory=2039 * GB,
        link=300 * GB,
        network=25 * GB,
    ),
    # A laptop core with gloo over loopback; benchmarks/layouts.py --calibrate measures the one at hand.
    "cpu": DeviceProfile(
        name="cpu",
        peak=100e9,
        peak_fp8=100e9,  # emulated
        peak_fp32=100e9,
        gemm_share=0.9,
        half_rows=16,
        half_depth=32,
        attention_share=0.5,
        memory=10 * GB,
        memory_share=0.6,
        link=1.5 * GB,
        network=0.1 * GB,
        link_share=0.8,
        network_share=0.8,
        per_node=64,
        hidden_tensor=0.0,
        latency_s=1e-4,
        launch_s=2e-5,
        step_s=0.0,
        jitter=0.05,
        capacity=8 * GB,
    ),
}


def load(path: str) -> DeviceProfile:
    """A profile from a JSON file with the fields of DeviceProfile; FlagError if it is not one."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise FlagError(
            f"--profile {path}", str(error), "write one with benchmarks/layouts.py --calibrate"
        ) from None
    wanted = {item.name for item in fields(DeviceProfile)}
    if not isinstance(values, dict) or set(values) != wanted:
        raise FlagError(
            f"--profile {path}",
            f"needs exactly the fields {', '.join(sorted(wanted))}",
            "write one with benchmarks/layouts.py --calibrate",
        )
    return DeviceProfile(**values)


def save(profile: DeviceProfile, path: str) -> None:
    """Write a profile as JSON."""
    Path(path).write_text(json.dumps(asdict(profile), indent=1) + "\n")
