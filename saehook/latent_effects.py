"""Runs of the model that attribution reads its effects off: gradients where SAEs write, and rows with a latent ablated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saehook.attribution_metrics import Function, values_of
from saehook.edit_blocks import SourceAction, norm_of
from saehook.editing import Action, ChainAction
from saehook.errors import ArgumentError
from saehook.positions import TokenView

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs

MAX_NUMBERS = 2**24
"""Numbers of one temporary tensor: logits of a batch of ablated rows, activations of some tokens, decoder rows of some
latents."""


class Probe:
    """Asks for the gradient where SAEs write."""

    def __init__(self, sources: Sequence[SourceAction], shift: Tensor | None) -> None:
        """`sources`: what these SAEs read. `shift`: is subtracted, [rows, n, d]."""
        self.sources, self.shift = sources, shift
        self.view: TokenView
        self.leaf: Tensor

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        self.view = view
        for source in self.sources:
            source.take()  # it must come first
        if self.shift is not None:
            x = (x - self.shift).to(x.dtype)
        if not torch.is_grad_enabled():
            return x
        self.leaf = torch.zeros_like(x, requires_grad=True)
        return x + self.leaf


class Subtract:
    """Takes vectors from single tokens of single rows."""

    def __init__(self, row: Tensor, column: Tensor, vectors: Tensor) -> None:
        """`row`, `column`: [n] int64, no pair twice; `vectors`: [n, d]."""
        self.row, self.column, self.vectors = row, column, vectors

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        new = x.clone()
        new[self.row, self.column] = (x[self.row, self.column] - self.vectors).to(x.dtype)
        return new


class Active(NamedTuple):
    """The latents that fire on tokens of the mask at one site, token by token, all tensors [n]."""

    row: Tensor
    position: Tensor
    """Among the row's own tokens."""
    column: Tensor
    """In the padded row."""
    latent: Tensor
    activation: Tensor
    """z, float32."""
    weight: Tensor
    """z σ(x), float32: times W_dec[latent], what the latent adds."""


class Probed(NamedTuple):
    """What looks on in a run."""

    sources: dict[str, SourceAction]
    """By the site that is read."""
    probes: dict[str, Probe]
    """By the site that is written."""

    @property
    def actions(self) -> dict[str, Action]:
        """All of it by site."""
        both = {
            site: ChainAction([self.sources[site], self.probes[site]]) for site in self.sources if site in self.probes
        }
        return {**self.sources, **self.probes, **both}


def probed_at(hooked: HookedSAEs, names: Sequence[str], shift: Tensor | None = None) -> Probed:
    """Sources and probes of the SAEs of these names; `shift` as in `Probe`."""
    attached = [hooked.attached[name] for name in names]
    sources = {one.reads: SourceAction(one.reads) for one in attached}
    written = {
        one.writes: [sources[other.reads] for other in attached if other.writes == one.writes] for one in attached
    }
    return Probed(sources, {site: Probe(read, shift) for site, read in written.items()})


@torch.no_grad()
def active_latents(hooked: HookedSAEs, probed: Probed) -> dict[str, Active]:
    """By name of the SAE. Some tokens at a time, so that no [tokens, d_sae] is held."""
    found = {}
    for name, (sae, reads, writes) in hooked.attached.items():
        read, view = probed.sources[reads].take().detach(), probed.probes[writes].view
        places = view.mask(sae.mask_rule, norm_of(read)).nonzero()
        index = view.index.to(places.device)
        parts: list[Active] = []
        for row, column in (part.unbind(1) for part in places.split(max(1, MAX_NUMBERS // sae.d_sae))):
            x = read[row, column]
            acts, scale = sae.encode(x), sae.scale(x)
            token, latent = acts.nonzero(as_tuple=True)
            z = acts[token, latent].float()
            weight = z if scale is None else z * scale[token, 0].float()
            parts.append(Active(row[token], index[row, column][token], column[token], latent, z, weight))
        found[name] = Active(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return found


def logits_of(output: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """Those of each row, [S, vocab], without the padding on its left."""
    return [logits[-len(row) :] for logits, row in zip(output.logits, rows, strict=True)]


def gradients_at(
    hooked: HookedSAEs, rows: Sequence[Tensor], functions: Sequence[Function], probed: Probed
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward and one backward pass: the metric of each row, [rows], and ∂m/∂x by the site that is written, [rows, n, d]."""
    output = hooked.run(list(rows), probed.actions, gradients=True)
    values = values_of(functions, logits_of(output, rows))
    if not values.requires_grad:
        raise ArgumentError("the metric has no gradient with respect to the logits. Use exact=True, or one that has.")
    leaves = [probe.leaf for probe in probed.probes.values()]
    found = torch.autograd.grad(values.sum(), leaves, allow_unused=True, materialize_grads=True)
    return values.detach(), dict(zip(probed.probes, found, strict=True))


def mean_gradient(
    hooked: HookedSAEs,
    rows: Sequence[Tensor],
    functions: Sequence[Function],
    name: str,
    active: Active,
    steps: int,
) -> Tensor:
    """The mean of ∂m/∂x from x without what the active latents add to x, [rows, n, d] float32, by Gauss's rule."""
    W_dec = hooked.saes[name].W_dec.detach()
    longest = max(map(len, rows))
    added = torch.zeros(len(rows), longest, W_dec.shape[1], device=W_dec.device)
    flat = added.view(-1, W_dec.shape[1])
    for part in _parts(active, W_dec):
        place = active.row[part] * longest + active.column[part]
        flat.index_add_(0, place, active.weight[part, None] * W_dec[active.latent[part]].float())
    mean = torch.zeros_like(added)
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on -1..1, with weights that sum to 2
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        probed = probed_at(hooked, [name], (1 - node) / 2 * added)
        mean += weight / 2 * gradients_at(hooked, rows, functions, probed)[1][hooked.attached[name].writes]
    return mean


def along(active: Active, gradient: Tensor, W_dec: Tensor) -> Tensor:
    """z σ(x) ∂m/∂x · W_dec[latent], [n] float32."""
    W_dec = W_dec.detach()
    products = [
        (gradient[active.row[part], active.column[part]].float() * W_dec[active.latent[part]].float()).sum(-1)
        for part in _parts(active, W_dec)
    ]
    return active.weight * torch.cat(products)


def _parts(active: Active, W_dec: Tensor) -> tuple[Tensor, ...]:
    """Indices of all active latents, in parts whose decoder rows may be held."""
    return torch.arange(len(active.latent), device=active.latent.device).split(max(1, MAX_NUMBERS // W_dec.shape[1]))


@torch.no_grad()
def ablated(hooked: HookedSAEs, ids: Tensor, function: Function, name: str, active: Active, by_token: bool) -> Tensor:
    """What the metric loses with one latent ablated on one token, or on all, in the order of `active`, or of latents."""
    sae = hooked.saes[name]
    group = torch.arange(len(active.latent), device=active.latent.device)
    if not by_token:
        group = active.latent.unique(return_inverse=True)[1]
    n_groups = int(group.max()) + 1 if len(group) else 0
    vocab = hooked.lm.get_input_embeddings().num_embeddings
    at_once = max(1, MAX_NUMBERS // (len(ids) * vocab) - 1)
    effects = [torch.zeros(0, device=active.weight.device)]
    for first in range(0, n_groups, at_once):
        n = min(at_once, n_groups - first)
        chosen = ((group >= first) & (group < first + n)).nonzero()[:, 0]
        vectors = active.weight[chosen, None] * sae.W_dec[active.latent[chosen]].float()
        # The first row stays clean: what a batch of another shape rounds otherwise is no effect.
        subtract = Subtract(1 + group[chosen] - first, active.column[chosen], vectors)
        rows = ids.expand(n + 1, -1)
        output = hooked.run(rows, {hooked.attached[name].writes: subtract})
        values = values_of([function] * (n + 1), logits_of(output, list(rows)))
        effects.append((values[0] - values[1:]).float().to(active.weight.device))
    return torch.cat(effects)
