"""A stream of activations: cut into batches, and what its start says about a site."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from saehook import losses
from saehook.errors import ArgumentError, ShapeError, TrainingError
from saehook.kernels.device import send

Batch = Mapping[str, Tensor]
SKIPPED_AT_ONCE = 2**16


@runtime_checkable
class Resumable(Protocol):
    """A source of batches that can go on where it was, such as `harvest.Shuffled`."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and JSON-able data to go on from; None where that is not possible."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any], device: torch.device | str) -> None:
        """Go on from them."""
        ...


class Judged(Protocol):
    """A batch from which one can ask what happens downstream of it, such as `kl_tuning.KLBatch`."""

    activations: Batch

    def divergence(self, site: str, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        """KL(clean ‖ spliced), a scalar, with `x_hat` [n, width] at `site`, and its gradient."""
        ...


class JudgedBatches(Protocol):
    """Where they come from, such as `kl_tuning.KLBatches`."""

    def take(self, n_tokens: int) -> Judged:
        """The next batch."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON-able data to go on from."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from it."""
        ...


class Stream:
    """Cuts an iterator of activations into batches of any size, the same tokens for all sites."""

    def __init__(self, batches: Iterable[Tensor | Batch], d_in: Mapping[str, int], device: torch.device | str) -> None:
        """`d_in` is the width of each site, by name."""
        self.source: Iterator[Tensor | Batch] = iter(batches)
        self.d_in = dict(d_in)
        self.device = torch.device(device)
        self.held = 0
        self.parts: dict[str, list[Tensor]] = {site: [] for site in self.d_in}

    def available(self, n: int) -> int:
        """Tokens that can be taken at once, at most `n`."""
        while self.held < n and (part := next(self.source, None)) is not None:
            self._add(part)
        return min(n, self.held)

    def peek(self, n: int) -> dict[str, Tensor]:
        """The next `n` tokens, or what is left, without consuming them; float32, on the device."""
        self.available(n)
        for site, parts in self.parts.items():
            if len(parts) > 1:
                self.parts[site] = [torch.cat([p.to(parts[0].dtype) for p in parts])]
            elif not parts:
                self.parts[site] = [torch.empty(0, self.d_in[site])]
        return {site: send(parts[0][:n], self.device).float() for site, parts in self.parts.items()}

    def take(self, n: int) -> dict[str, Tensor]:
        """The next `n` tokens, or what is left."""
        rows = self.peek(n)
        taken = min(n, self.held)
        self.held -= taken
        for site, parts in self.parts.items():
            self.parts[site] = [part[taken:] for part in parts if part.shape[0] > taken]
        return rows

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Tensors (not copies) and data to go on from; no data where the source cannot say where it is."""
        inner = self.source.state() if isinstance(self.source, Resumable) else None
        if inner is None:
            return {}, None
        tensors, data = inner
        held = {f"held.{site}": torch.cat(parts) for site, parts in self.parts.items() if parts}
        return held | {f"source.{name}": x for name, x in tensors.items()}, data

    def load_state(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any] | None, taken: int) -> None:
        """Go on where `state` was taken, after `taken` tokens; a source that cannot is read up to there.

        Raises:
            TrainingError: the source ends before.
        """
        if data is None or not isinstance(self.source, Resumable):
            while taken > 0 and (n := self.available(min(taken, SKIPPED_AT_ONCE))) > 0:
                self.take(n)
                taken -= n
            if taken > 0:
                raise TrainingError("the activations end before the place where training stopped. Give the same ones.")
            return
        inner = {key.removeprefix("source."): x for key, x in tensors.items() if key.startswith("source.")}
        self.source.load_state(inner, data, self.device)
        for site in self.d_in:
            if (rows := tensors.get(f"held.{site}")) is not None:
                self.parts[site] = [rows]
                self.held = len(rows)

    def _add(self, part: Tensor | Batch) -> None:
        if isinstance(part, Tensor):
            if len(self.d_in) != 1:
                raise ArgumentError(
                    f"a plain tensor of activations cannot serve {len(self.d_in)} sites ({', '.join(self.d_in)}). "
                    "Yield a dict from each site to its tensor."
                )
            part = dict.fromkeys(self.d_in, part)
        rows = {site: self._checked(site, part) for site in self.d_in}
        sizes = {tensor.shape[0] for tensor in rows.values()}
        if len(sizes) != 1:
            raise ShapeError(f"the sites of one batch have {sorted(sizes)} tokens; all must have the same tokens.")
        if sizes == {0}:
            return
        self.held += sizes.pop()
        for site, tensor in rows.items():
            self.parts[site].append(tensor.detach())

    def _checked(self, site: str, part: Batch) -> Tensor:
        if site not in part:
            raise ArgumentError(f"a batch has no activations of {site!r}; it has {', '.join(part) or 'no site'}.")
        tensor = part[site]
        if tensor.ndim != 2 or tensor.shape[1] != self.d_in[site] or not tensor.is_floating_point():
            raise ShapeError(
                f"activations of {site!r} are {tensor.dtype} of shape {tuple(tensor.shape)}; floating-point numbers of "
                f"shape [tokens, {self.d_in[site]}] are expected."
            )
        return tensor


def geometric_median(x: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the smallest mean distance to the rows of `x` [n, d], by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(iterations):
        weights = 1 / torch.linalg.vector_norm(x - median, dim=-1).clamp(min=1e-12)
        previous, median = median, (weights @ x) / weights.sum()
        if torch.linalg.vector_norm(median - previous) <= tolerance * torch.linalg.vector_norm(median):
            break
    return median


@dataclass(frozen=True)
class InputFacts:
    """What the start of the stream says about a site."""

    scale: float
    """Factor that makes E‖x‖² = 1."""
    center: Tensor
    """Geometric median of the scaled tokens, [d_in]."""
    variance: Tensor
    """Total variance of the scaled tokens, a scalar."""

    @classmethod
    def measure(cls, sample: Tensor, site: str) -> InputFacts:
        """From the tokens `sample` [n, d_in].

        Raises:
            TrainingError: numbers that are not finite, or zeros only.
        """
        mean_square = float(sample.double().square().sum(-1).mean())
        if not math.isfinite(mean_square) or mean_square <= 0:
            what = "zero" if mean_square == 0 else "not finite"
            raise TrainingError(
                f"the activations of {site} are {what} before step 1 (mean ‖x‖² = {mean_square}). Check the language "
                "model and the mask; a model in float16 may overflow, bfloat16 or float32 will not."
            )
        scale = mean_square**-0.5
        scaled = sample * scale
        variance = losses.total_variance(scaled)
        return cls(scale, geometric_median(scaled), torch.where(variance > 0, variance, 1.0))
