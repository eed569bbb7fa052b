r"""From bytes and operations to seconds: a roofline with the network as its third roof.

    step, at best    max(compute, memory, network)      everything overlaps, higher utilisation, all links at once
    step, at worst   max(compute, memory) + network     nothing overlaps, lower utilisation, a torus by one dimension
                                                        after the other

    compute = operations / (utilisation x peak)         memory = bytes accessed / (utilisation x bandwidth)

A group of P devices that exchange data lies in q pods or nodes of m = P / q devices each. A result of n bytes moves
inside of them, and then between them, where every device brings its share 1 / m through its own way out:

    all-reduce           2 (m - 1) / m n / link    +  2 (q - 1) / q (n / m) / out
    all-gather             (m - 1) / m n / link    +    (q - 1) / q (n / m) / out
    reduce-scatter         (m - 1) / m n P / link  +    (q - 1) / q (n P / m) / out
    all-to-all, switched   (m - 1) / P n / link    +    (P - m) / P n / out
    all-to-all, torus      (m / P) n s / (8 w)     +    the same,   s devices along a ring, w bytes/s of a link one way

The last line is the cut of the torus in two halves. To each the latency of its steps is added.

What the compiled programs do not say is assumed, and the assumptions are the constants below.

References: Williams, Waterman, Patterson, "Roofline", CACM 2009. Thakur et al., "Optimization of Collective
Communication Operations in MPICH", IJHPCA 2005.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

COMPUTE = (0.6, 0.3)
"""Share of the peak that products of this size reach, at best and at worst: assumed."""
MEMORY = (0.8, 0.6)
"""Share of the memory's bandwidth, likewise."""
RING = 16
"""Devices along a side of the largest torus."""
ACTIVATIONS = 0.5
"""Programs are compiled in float32; on an accelerator activations, and tokens on their way to experts, are bfloat16."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A device and its network.

    Attributes:
      name: of the device.
      flops: peak operations per second in bfloat16, dense.
      memory: bytes.
      bandwidth: of the memory, bytes/s.
      link: bytes/s that a device sends to others of its pod or node, over all its links, one way.
      axes: dimensions of the torus; 0: a switch.
      pod: devices of a pod or node.
      out: bytes/s that a device sends out of its pod or node.
      hop_s, out_s: seconds of a step inside and outside: assumed.
      source: where the numbers are from.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    axes: int
    pod: int
    out: float
    hop_s: float
    out_s: float
    source: str


# Links: half of the published bidirectional figures. Out of a v5e pod: two 100 Gbit/s cards for the 8 chips of a host.
V5E = Hardware(
    "TPU v5e",
    flops=197e12,
    memory=16e9,
    bandwidth=819e9,
    link=200e9,
    axes=2,
    pod=256,
    out=25e9 / 8,
    hop_s=1e-6,
    out_s=50e-6,
    source="docs.cloud.google.com/tpu/docs/v5e (read); latencies assumed",
)
V5P = Hardware(
    "TPU v5p",
    flops=459e12,
    memory=95e9,
    bandwidth=2765e9,
    link=600e9,
    axes=3,
    pod=8960,
    out=50e9 / 8,
    hop_s=1e-6,
    out_s=50e-6,
    source="docs.cloud.google.com/tpu/docs/v5p (read); a slice has at most 6,144 chips; latencies assumed",
)
H100 = Hardware(
    "H100 SXM",
    flops=989e12,
    memory=80e9,
    bandwidth=3350e9,
    link=450e9,
    axes=0,
    pod=8,
    out=50e9,
    hop_s=5e-6,
    out_s=10e-6,
    source="NVIDIA's data sheet as others quote it (not read there): 1,979 TFLOP/s with sparsity, NVLink 900 GB/s both "
    "ways; one 400 Gbit/s card per GPU and latencies assumed",
)
H200 = dataclasses.replace(
    H100,
    name="H200 SXM",
    memory=141e9,
    bandwidth=4800e9,
    source="as H100; 141 GB, NVLink and 400 Gbit/s cards also in a system description of MLPerf Inference 4.1",
)
ALL = (V5E, V5P, H100, H200)


class Exchange(NamedTuple):
    """A collective, as far as its time goes.

    Attributes:
      kind: as in `mtjax.collectives`.
      size: n, bytes of the result on one device.
      group: P.
      inside: devices of a group's first pod or node, for each size of pods: {pod: m}.
      times: in one step.
    """

    kind: str
    size: float
    group: int
    inside: dict[int, int]
    times: int = 1


class Prediction(NamedTuple):
    """Of one step on one kind of hardware; pairs are (at best, at worst).

    Attributes:
      compute, memory, network: seconds of each.
      step: seconds.
      efficiency: the step without the network over the step with it, where everything overlaps and where nothing does;
        both with the higher utilisation, which leaves less time to hide the network in.
      fits: whether the estimated peak fits into the memory of a device.
      limit: what is longest, at worst.
      by_kind: seconds of the network for each kind of collective, at worst.
    """

    compute: tuple[float, float]
    memory: tuple[float, float]
    network: tuple[float, float]
    step: tuple[float, float]
    efficiency: tuple[float, float]
    fits: bool
    limit: str
    by_kind: dict[str, float]


def members(group: Sequence[int], pods: Sequence[int]) -> dict[int, int]:
    """How many of a group are in the pod of its first device, for each size of pods.

    >>> members([0, 8, 16], [8, 256])
    {8: 1, 256: 3}
    """
    return {pod: sum(device // pod == group[0] // pod for device in group) for pod in pods}


def exchange_seconds(one: Exchange, hardware: Hardware, *, best: bool) -> float:
    """Seconds of one collective, once.

    >>> ring = Exchange("all-reduce", 8e9, 8, {8: 8})
    >>> round(exchange_seconds(ring, H100, best=True), 4), round(2 * 7 / 8 * 8e9 / 450e9, 4)
    (0.0311, 0.0311)
    """
    p, m = max(one.group, 1), one.inside[hardware.pod]
    q = p / m
    ways = {"all-reduce": 2.0, "reduce-scatter": float(p)}.get(one.kind, 1.0)
    if p == 1:
        return 0.0
    if one.kind == "collective-permute":
        return one.size / (hardware.link if m > 1 else hardware.out) + (hardware.hop_s if m > 1 else hardware.out_s)
    # The best: data spread over all dimensions of the torus. The worst: one dimension at a time, groups along a ring.
    torus = hardware.axes > 0
    cube = m ** (1 / hardware.axes) if torus else m
    side = cube if best else max(cube, min(m, RING))
    link = hardware.link if best or not torus else hardware.link / hardware.axes
    if "all-to-all" in one.kind:
        one_way = hardware.link / (2 * hardware.axes) if torus else hardware.link
        direct = (m - 1) / p * one.size / link
        inside = max(direct, m / p * one.size * side / (8 * one_way)) if torus and m > 1 else direct
        outside = (p - m) / p * one.size / hardware.out
    else:
        inside = ways * (m - 1) / m * one.size / link
        outside = ways * (q - 1) / q * one.size / m / hardware.out
    rounds = 2 if one.kind == "all-reduce" else 1
    hops = max(hardware.axes * cube, side) / 2 if torus else math.log2(m)
    waits = rounds * ((hops * hardware.hop_s if m > 1 else 0.0) + math.ceil(math.log2(q)) * hardware.out_s)
    return inside + outside + waits


def predict(
    *, flops: float, accessed: float, exchanges: Sequence[Exchange], peak_bytes: float, hardware: Hardware
) -> Prediction:
    """Seconds of a step.

    Args:
      flops: operations on one device.
      accessed: bytes from and to the memory of one device, all in float32.
      exchanges: collectives; bytes in float32.
      peak_bytes: of memory on one device.
      hardware: what it runs on.
    """
    compute = tuple(flops / (share * hardware.flops) for share in COMPUTE)
    memory = tuple(ACTIVATIONS * accessed / (share * hardware.bandwidth) for share in MEMORY)
    network = tuple(
        sum(one.times * exchange_seconds(in_bfloat16(one), hardware, best=best) for one in exchanges)
        for best in (True, False)
    )
    alone = tuple(max(pair) for pair in zip(compute, memory, strict=True))
    step = (max(alone[0], network[0]), alone[1] + network[1])
    by_kind: dict[str, float] = {}
    for one in exchanges:
        seconds = one.times * exchange_seconds(in_bfloat16(one), hardware, best=False)
        by_kind[one.kind] = by_kind.get(one.kind, 0.0) + seconds
    longest = {"compute": compute[1], "memory": memory[1], "network": network[1]}
    return Prediction(
        compute,
        memory,
        network,
        step,
        (alone[0] / max(alone[0], network[0]), alone[0] / (alone[0] + network[1])),
        bool(peak_bytes <= hardware.memory),
        max(longest, key=longest.get),
        by_kind,
    )


def in_bfloat16(one: Exchange) -> Exchange:
    """Tokens travel to experts as bfloat16; gradients and parameters as float32."""
    return one._replace(size=one.size * ACTIVATIONS) if "all-to-all" in one.kind else one
