"""Activations of one text at every attached SAE, read once and shared by the metrics; and the model's loss when something is
done to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saehook.edit_blocks import LatentBlock
from saehook.editing import Action, EditAction
from saehook.errors import ArgumentError
from saehook.interventions import Program
from saehook.latent_stats import read_rows
from saehook.positions import TokenView
from saehook.sae import SAE
from saehook.tokenization import Windows

if TYPE_CHECKING:
    from saehook.hooked_model import HookedModel
    from saehook.hooked_saes import HookedSAEs

MAX_NUMBERS = 2**24
"""Numbers of one temporary tensor."""


@dataclass(frozen=True)
class Sample:
    """The tokens of one SAE's mask whose activations are finite."""

    site: str
    """Name of the SAE."""
    sae: SAE
    x: Tensor
    """What it reads, [n, d_in]."""
    y: Tensor
    """What it reconstructs, [n, d_out]: x, but for a transcoder."""
    row: Tensor
    """The window of each token, [n] int64."""
    column: Tensor
    """Its place there, [n] int64."""
    windows: int
    not_finite: int
    """Tokens left out because an activation is NaN or infinite."""

    def __len__(self) -> int:
        return len(self.x)

    def parts(self, width: int | None = None) -> Iterator[slice]:
        """The tokens, as many at a time as may have `width` numbers each (default: d_sae)."""
        size = max(1, MAX_NUMBERS // max(1, width or self.sae.d_sae))
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def by_window(self, values: Tensor) -> Tensor:
        """Sums over the tokens of each window that has any, [windows] float64, from one value for each token, [n]."""
        sums = torch.zeros(self.windows, dtype=torch.float64, device=values.device)
        counted = torch.bincount(self.row, minlength=self.windows) > 0
        return sums.index_add_(0, self.row.to(values.device), values.double())[counted.to(values.device)]

    def counts(self) -> Tensor:
        """On how many tokens each latent fires, [d_sae] int64."""
        total = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=self.x.device)
        for part in self.parts():
            total += (self.sae.encode(self.x[part]) > 0).sum(0)
        return total

    def thinned(self, tokens: int) -> Sample:
        """About that many tokens, evenly spaced, of all windows."""
        return self._only(torch.arange(len(self), device=self.row.device) % max(1, round(len(self) / tokens)) == 0)

    def some_windows(self, tokens: int) -> Sample:
        """About that many tokens, in whole windows evenly spaced over the text."""
        return self._only(self.row % max(1, round(len(self) / tokens)) == 0)

    def _only(self, kept: Tensor) -> Sample:
        return dataclasses.replace(self, **{name: getattr(self, name)[kept] for name in ("x", "y", "row", "column")})

    def acts_of(self, latents: Tensor) -> Tensor:
        """Activations of some latents, [n, len(latents)] float32."""
        found = [self.sae.encode(self.x[part])[:, latents].float() for part in self.parts()]
        return torch.cat(found)


@torch.no_grad()
def read_samples(hooked: HookedSAEs, tokens: Windows | Tensor) -> dict[str, Sample]:
    """A `Sample` for each attached SAE, by its name.

    Raises:
        ArgumentError: no windows, windows of a single token, or an SAE for which no token counts, or none is finite.
    """
    ids = ids_of(tokens)
    found: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in hooked.sites}
    for start in range(0, len(ids), max(1, 4096 // ids.shape[1])):
        batch = ids[start : start + max(1, 4096 // ids.shape[1])]
        for name, (x, y, mask) in read_rows(hooked, batch).items():
            row, column = mask.nonzero(as_tuple=True)
            found[name].append((x[mask], y[mask], row + start, column))
    samples = {}
    for name, parts in found.items():
        x, y, row, column = (torch.cat(column) for column in zip(*parts, strict=True))
        finite = x.isfinite().all(-1) & y.isfinite().all(-1)
        if not finite.any():
            why = "none of them is finite" if len(x) else "no token of the text is in its mask"
            raise ArgumentError(f"nothing can be measured for the SAE at {name}: {why}. Give real text.")
        samples[name] = Sample(
            site=name,
            sae=hooked.saes[name],
            x=x[finite],
            y=y[finite],
            row=row[finite],
            column=column[finite],
            windows=len(ids),
            not_finite=int((~finite).sum()),
        )
    return samples


def ids_of(tokens: Windows | Tensor) -> Tensor:
    """Windows of ids [n, length].

    Raises:
        ArgumentError: there is no window, or the windows have a single token.
    """
    ids = tokens.ids if isinstance(tokens, Windows) else tokens
    if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] < 2:
        raise ArgumentError(
            f"the windows have shape {tuple(ids.shape)}; at least one of at least two tokens is expected. The text may be "
            "empty after tokenisation: give real text."
        )
    return ids


def spread(ids: Tensor, tokens: int) -> Tensor:
    """Windows [n, length] that hold at most so many tokens (at least one window), evenly spaced over the text."""
    n = max(1, min(len(ids), tokens // ids.shape[1]))
    return ids[(torch.arange(n) * len(ids)) // n]


class AddAction:
    """Adds vectors to single tokens of single rows; others keep their bits."""

    def __init__(self, row: Tensor, column: Tensor, vectors: Tensor) -> None:
        """`row`, `column`: [n] int64, no pair twice; `vectors`: [n, d]."""
        self.row, self.column, self.vectors = row, column, vectors

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        new = x.clone()
        place = (self.row.to(x.device), self.column.to(x.device))
        new[place] = (x[place].float() + self.vectors.to(x.device).float()).to(x.dtype)
        return new


@torch.no_grad()
def window_losses(hooked: HookedSAEs, ids: Tensor, counted: Tensor, actions: Mapping[str, Action]) -> Tensor:
    """Sum of the next-token cross-entropies of each window, [rows] float64 in nats, over the tokens that are `counted`
    [rows, length] and predict another."""
    return (token_losses(hooked.run(ids, actions).logits, ids) * counted[:, :-1]).sum(1)


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of each next token from logits [rows, length, vocabulary], [rows, length - 1] float64 in nats."""
    targets = ids[:, 1:].to(logits.device)
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=logits.device)
    for row in range(len(ids)):  # one at a time: tokens × vocabulary in float32 only once
        log_probs = logits[row, :-1].float().log_softmax(-1)
        losses[row] = -log_probs.gather(1, targets[row, :, None])[:, 0].double()
    return losses.cpu()


@torch.no_grad()
def spliced_losses(hooked: HookedSAEs, sample: Sample, tokens: Windows | Tensor, sae: SAE | None) -> Tensor:
    """Sum of the losses of each window over the sample's tokens that predict another, [windows with any] float64 in nats.

    Args:
        tokens: the windows that the sample is of.
        sae: whose reconstruction takes the place of the activations at the sample's site; None is the clean model.
    """
    ids, counted = counted_tokens(sample, tokens)
    program = Program(splice=True)
    actions = {}
    if sae is not None:
        actions = hooked.where_written(
            sample.site, lambda source: EditAction([LatentBlock(sae, [], program, source=source)], program)
        )
    rows = rows_at_once(hooked, ids.shape[1])
    parts = zip(ids.split(rows), counted.split(rows), strict=True)
    return torch.cat([window_losses(hooked, batch, mask, actions) for batch, mask in parts])


def counted_tokens(sample: Sample, tokens: Windows | Tensor) -> tuple[Tensor, Tensor]:
    """The windows that hold a token of the sample, [windows, length], and which tokens are in it, bool of that shape."""
    ids = ids_of(tokens)
    counted = torch.zeros(ids.shape, dtype=torch.bool)
    counted[sample.row.cpu(), sample.column.cpu()] = True
    used = counted.any(1)
    return ids[used], counted[used]


def rows_at_once(hooked: HookedSAEs | HookedModel, length: int) -> int:
    """Windows whose logits are held together."""
    return max(1, MAX_NUMBERS // (length * hooked.lm.get_input_embeddings().num_embeddings))
