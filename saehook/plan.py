"""What a training run of one SAE costs, as arithmetic: memory, floating-point operations, bytes on the wire, days, what binds.

A step of a TopK SAE has one dense product, the encoder's; all else runs over the k latents a token that were kept. Latents are
sharded over the devices (each holds d_sae / latent of them and sees every token of its replica), or the batch over `data`
replicas, whose gradients are summed. What a device really does is a parameter (`Ceilings`); nothing is measured here.
Standard library only.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from saehook.errors import ArgumentError, FileError, FormatError

DAY = 86_400.0
BF16, FLOAT32 = 2, 4


@dataclass(frozen=True)
class Ceilings:
    """What one device reaches: measured numbers, not those of its data sheet."""

    name: str
    flops: float
    """Operations a second of a large bf16 product."""
    memory: float
    """Bytes that may be filled."""
    memory_bandwidth: float
    """Bytes a second."""
    link: float
    """Bytes a second between the devices of a node, for each of them."""
    network: float
    """Bytes a second between nodes, for the whole node."""
    per_node: int = 8


DEVICES = {
    "H200": Ceilings("H200", 600e12, 128e9, 4.0e12, 450e9, 400e9),
    "H100": Ceilings("H100", 600e12, 72e9, 2.8e12, 450e9, 400e9),
    "A100": Ceilings("A100", 190e12, 72e9, 1.7e12, 300e9, 200e9),
}
"""Round numbers at about six tenths of the peak product and eight tenths of the peak bandwidth; those of the H100 and A100 are
scaled from the H200's by data sheet. Give what your machines measure."""


class Storage(NamedTuple):
    """How weights and Adam's moments are kept."""

    name: str
    bytes: int
    """Of each parameter."""
    traffic: int
    """Bytes that one update of a parameter moves."""
    options: str = ""
    """Of `saehook train`."""
    blocks: int = 0
    """Numbers of both moments' blocks, each with a largest in float32; 0: none (`rounding`)."""


STORAGES = (
    Storage("all float32, with gradients", 16, 32),
    Storage("bf16 rounded stochastically, float32 moments", 10, 22, "--weights bfloat16"),
    Storage("float32, 8-bit moments", 6, 14, "--moments 8-bit", 256),
    Storage("bf16 rounded stochastically, 8-bit moments", 4, 10, "--weights bfloat16 --moments 8-bit", 256),
)
"""What `saehook train` offers, the most memory first. From the second on gradients go from the backward pass straight into the
optimiser, and are never whole."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is to be trained."""

    d_in: int
    d_sae: int
    k: int
    tokens: int
    batch_tokens: int = 131_072
    k_aux: int = 0
    """Dead latents that AuxK decodes for each token."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < (name != "k_aux"):
                least = "of at least 1 " if name != "k_aux" else ""
                raise ArgumentError(f"{name} is {value!r}; a whole number {least}is expected.")
        if max(self.k, self.k_aux) > self.d_sae:
            raise ArgumentError(f"k = {max(self.k, self.k_aux)} latents a token are more than d_sae = {self.d_sae}.")

    @property
    def parameters(self) -> int:
        """Of both matrices; the rest is nothing beside them."""
        return 2 * self.d_in * self.d_sae

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return math.ceil(self.tokens / self.batch_tokens)

    @property
    def product_flops(self) -> int:
        """Of the encoder's product, a step."""
        return 2 * self.batch_tokens * self.d_in * self.d_sae

    @property
    def sparse_flops(self) -> int:
        """Of all else, a step: five passes over the rows of the latents that were kept (decoding, the gradients of
        activations and of both matrices, the coefficient of the projection)."""
        return 10 * self.batch_tokens * (self.k + self.k_aux) * self.d_in

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return float(self.steps) * (self.product_flops + self.sparse_flops)

    @property
    def cached_bytes(self) -> int:
        """All activations in bf16 on a disk."""
        return self.tokens * self.d_in * BF16


@dataclass(frozen=True)
class Layout:
    """How many devices, and what each shares."""

    ceilings: Ceilings
    devices: int
    data: int = 1
    """Replicas, each with a part of the batch."""

    def __post_init__(self) -> None:
        if self.devices < 1 or self.data < 1 or self.devices % self.data:
            raise ArgumentError(
                f"{self.devices} devices do not make {self.data} replicas of equal size. Give a divisor of the devices."
            )

    @property
    def latent(self) -> int:
        """Devices that share one SAE."""
        return self.devices // self.data

    @property
    def nodes(self) -> int:
        return math.ceil(self.devices / self.ceilings.per_node)


@dataclass(frozen=True)
class Plan:
    """The run on these devices; times in seconds a step, sizes in bytes, each of one device."""

    training: Training
    layout: Layout
    storage: Storage

    @property
    def latents(self) -> float:
        """Latents on each device."""
        return self.training.d_sae / self.layout.latent

    @property
    def batch(self) -> float:
        """Tokens that each device sees in a step."""
        return self.training.batch_tokens / self.layout.data

    @property
    def state(self) -> float:
        """Weights and optimiser."""
        return self.training.parameters / self.layout.latent * self.storage.bytes

    @property
    def buffers(self) -> float:
        """Activations, reconstruction and residual of the batch in bf16, and the kept pairs with their lists; pre-activations
        exist block by block only."""
        t = self.training
        return self.batch * (3 * BF16 * t.d_in + 16 * (t.k + t.k_aux))

    @property
    def scales(self) -> float:
        """The largest numbers of the blocks of 8-bit moments."""
        blocks = self.storage.blocks and math.ceil(self.training.d_in / self.storage.blocks)
        return 2 * FLOAT32 * 2 * self.latents * blocks

    @property
    def memory(self) -> float:
        """All that must fit."""
        return self.state + self.scales + self.buffers

    @property
    def fits(self) -> bool:
        """Into the memory of one device."""
        return self.memory <= self.layout.ceilings.memory

    @property
    def whole_pre_acts(self) -> float:
        """Pre-activations in bf16, were they not made block by block."""
        return self.batch * self.latents * BF16

    @property
    def dense_gradient(self) -> float:
        """Gradients of both matrices in bf16, were they held whole."""
        return self.training.parameters / self.layout.latent * BF16

    @property
    def activation_bytes(self) -> float:
        """Wire: x gathered, x_hat summed (a ring sends everything twice), in bf16. 0 where nothing is sharded."""
        return 3 * self.batch * self.training.d_in * BF16 if self.layout.latent > 1 else 0.0

    @property
    def topk_gather_bytes(self) -> float:
        """Wire: every shard's k largest values, gathered by all."""
        t = self.training
        return self.batch * (t.k + t.k_aux) * FLOAT32 * self.layout.latent if self.layout.latent > 1 else 0.0

    @property
    def topk_butterfly_bytes(self) -> float:
        """The same merged pairwise, values with their latents."""
        t = self.training
        return self.batch * (t.k + t.k_aux) * 2 * FLOAT32 * math.log2(self.layout.latent)

    @property
    def topk_bytes(self) -> float:
        """The smaller of both: both are exact."""
        return min(self.topk_gather_bytes, self.topk_butterfly_bytes)

    @property
    def gradient_bytes(self) -> float:
        """Wire: gradients summed over the replicas, in bf16."""
        t, data = self.training, self.layout.data
        return 4 * t.d_sae * t.d_in * (data - 1) / self.layout.devices * BF16

    @property
    def wire_bytes(self) -> float:
        """All that a device sends in a step."""
        return self.activation_bytes + self.topk_bytes + self.gradient_bytes

    @property
    def product_seconds(self) -> float:
        """The encoder's product."""
        return self.training.product_flops / self.layout.devices / self.layout.ceilings.flops

    @property
    def memory_seconds(self) -> float:
        """The optimiser's traffic, and the rows that the sparse passes gather."""
        t, layout = self.training, self.layout
        rows = 10 * self.batch * (t.k + t.k_aux) / layout.latent * t.d_in
        return self.optimiser_seconds + rows / layout.ceilings.memory_bandwidth

    @property
    def optimiser_seconds(self) -> float:
        """One update of every parameter."""
        state = self.training.parameters / self.layout.latent * self.storage.traffic
        return state / self.layout.ceilings.memory_bandwidth

    @property
    def link_seconds(self) -> float:
        """Within a node."""
        return self.wire_bytes / self.layout.ceilings.link

    @property
    def network_seconds(self) -> float:
        """Between nodes: each sends once what its devices share of the batch."""
        return self.wire_bytes / self.layout.ceilings.network if self.layout.nodes > 1 else 0.0

    @property
    def parts(self) -> dict[str, float]:
        """What takes time in a step."""
        return {
            "encoder product": self.product_seconds,
            "memory traffic": self.memory_seconds,
            "links within a node": self.link_seconds,
            "network": self.network_seconds,
        }

    @property
    def binds(self) -> str:
        """The longest of `parts`."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def days(self) -> float:
        """At best: everything else hidden behind what binds."""
        return self.training.steps * max(self.parts.values()) / DAY

    @property
    def days_in_turn(self) -> float:
        """At worst: one after another."""
        return self.training.steps * sum(self.parts.values()) / DAY

    @property
    def read_rate(self) -> float:
        """Bytes a second at which cached activations would be read, by all devices together."""
        return self.training.cached_bytes / (self.days * DAY)

    @property
    def least_latents(self) -> float:
        """Latents on a device below which sending activations takes longer than multiplying them."""
        c = self.layout.ceilings
        return 3 * c.flops / (c.network if self.layout.nodes > 1 else min(c.network, c.link))

    @property
    def best_data(self) -> float:
        """Replicas with which least is sent: sqrt(3 · batch · devices / (4 · d_sae))."""
        t = self.training
        return math.sqrt(3 * t.batch_tokens * self.layout.devices / (4 * t.d_sae))


def plans(training: Training, layout: Layout) -> list[Plan]:
    """With every storage, the most exact first."""
    if layout.latent > training.d_sae:
        raise ArgumentError(f"{training.d_sae} latents cannot be shared by {layout.latent} devices. Use fewer devices.")
    return [Plan(training, layout, storage) for storage in STORAGES]


def best_plan(training: Training, layout: Layout) -> Plan:
    """The first that fits.

    Raises:
        ArgumentError: none does; the message says what would.
    """
    every = plans(training, layout)
    if found := next((plan for plan in every if plan.fits), None):
        return found
    least, c = every[-1], layout.ceilings
    ways = []
    if least.buffers < c.memory:
        room = c.memory - least.buffers
        a_parameter = (least.state + least.scales) * layout.latent / training.parameters
        latent = math.ceil(training.parameters * a_parameter / room)
        nodes = math.ceil(latent * layout.data / c.per_node)
        number = latent * layout.data if nodes <= 1 else nodes * c.per_node
        largest = int(room * layout.latent / (2 * training.d_in * a_parameter))
        ways += [f"{number} devices", f"d_sae of at most {largest:,}"]
        if layout.data > 1:
            ways.append("fewer replicas")
    else:
        size = int(training.batch_tokens * c.memory / least.buffers / 2)
        ways.append(f"a batch of {size:,} tokens")
    raise ArgumentError(
        f"{training.d_sae:,} latents of width {training.d_in:,} do not fit {layout.devices} x {c.name}: even with "
        f"{least.storage.name} ({least.storage.bytes} bytes a parameter) each device would hold {least.memory / 1e9:,.0f} GB, "
        f"and {c.memory / 1e9:,.0f} GB may be filled. What would fit: {', or '.join(ways)}."
    )


def devices_of(text: str, **measured: float | int | None) -> tuple[Ceilings, int]:
    """`64xH200` as ceilings and number; `measured` replaces fields of `Ceilings`.

    Raises:
        ArgumentError: another form, or a device that is not in `DEVICES` and not measured in full.
    """
    match = re.fullmatch(r"(?:(\d+)[x×])?([A-Za-z][\w.-]*)", text.strip())
    if match is None or match[1] == "0":
        raise ArgumentError(f"{text!r} names no devices; expected is e.g. 64xH200.")
    given = {name: value for name, value in measured.items() if value is not None}
    for name, value in given.items():
        if not value > 0 or not math.isfinite(value):
            raise ArgumentError(f"{name} is {value!r}; a number above 0 is expected.")
    name = match[2]
    known = next((c for known, c in DEVICES.items() if known.lower() == name.lower()), None)
    if known is None:
        fields = set(Ceilings.__dataclass_fields__) - {"name", "per_node"}
        if missing := sorted(fields - set(given)):
            raise ArgumentError(
                f"what a {name} reaches is not known ({', '.join(DEVICES)} are). Give what it measures: {', '.join(missing)}."
            )
        known = Ceilings(name, 0, 0, 0, 0, 0)
    return replace(known, **given), int(match[1] or 1)  # type: ignore[arg-type]


def width_of(folder: str | Path) -> int:
    """Width of the residual stream of a language model, from the `config.json` in its folder.

    Raises:
        FileError: there is none. FormatError: it does not say.
    """
    path = Path(folder) / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error}. Name a model's folder, or give --d-in.") from None
    except ValueError as error:
        raise FormatError(f"{path} is no JSON: {error}.") from None
    for part in (data, data.get("text_config")) if isinstance(data, dict) else ():
        for name in ("hidden_size", "n_embd", "d_model"):
            if isinstance(part, dict) and isinstance(part.get(name), int) and part[name] > 0:
                return part[name]
    raise FormatError(f"{path} says no hidden_size, n_embd or d_model. Give --d-in.")
