"""An SAE on held-out sequences: sums over the tokens of each, so that ratios and their intervals can be made of them."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from reproduction.bootstrap import Table
from reproduction.data import Data, HeldOut, LanguageModel, Site
from saehook import SAE, BatchTopK, JumpReLU, TopK
from saehook.editing import ReplaceAction
from saehook.metrics import Moments, token_kl
from saehook.reconstruction import Fidelity
from saehook.suite.progressive_code import with_topk
from saehook.suite.sample import Sample

ROWS = 8
"""Sequences that the language model runs at a time."""


@torch.no_grad()
def fidelity(sae: SAE, held: HeldOut) -> tuple[Fidelity, Tensor]:
    """Reconstruction of the tokens that count, and x_hat [n, d_in] of them in order."""
    moments = Moments()
    moments.update(held.x[held.mask])
    found = Fidelity(sae, moments.mean)
    return found, found.update(held.x, held.x, held.mask)


@torch.no_grad()
def table(sae: SAE, data: Data, *, loss: bool = True) -> Table:
    """`n`, `error`, `variance`, `l0`, `square_hat`, `product`, ... (`saehook.reconstruction`), and at a site of a language
    model, with `loss`, `delta_ce`, `kl` and their number of tokens `n_loss`; [sequences] each."""
    held = data.held_out()
    found, x_hat = fidelity(sae, held)
    sums = dict(found.sums.by_sequence())
    if loss and isinstance(data, Site):
        sums |= spliced(data.lm, data.site, held, x_hat)
    return sums


@torch.no_grad()
def spliced(lm: LanguageModel, site: str, held: HeldOut, x_new: Tensor) -> Table:
    """What the model loses with `x_new` [n, d_in] on the tokens that count."""
    assert held.ids is not None
    clean = _clean_logits(lm, held)
    counts = held.mask.sum(1).tolist()
    new = torch.split(x_new, [sum(counts[i : i + ROWS]) for i in range(0, len(counts), ROWS)])
    found: dict[str, list[Tensor]] = {"delta_ce": [], "kl": [], "n_loss": []}
    for i, values in zip(range(0, len(held.ids), ROWS), new, strict=True):
        rows = slice(i, i + ROWS)
        ids, mask = held.ids[rows], held.mask[rows]
        logits = lm.model.run(ids, {site: ReplaceAction(mask, lambda _, values=values: values)}).logits.float().cpu()
        found["delta_ce"].append(_loss_sums(logits, ids, mask) - _loss_sums(clean[rows], ids, mask))
        kl = token_kl(clean[rows], logits).double() * mask
        found["kl"].append(kl[:, :-1].sum(1).cpu())
        found["n_loss"].append(mask[:, :-1].sum(1).double())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _loss_sums(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Sum of the next-token cross-entropies of each sequence over the tokens of the mask that predict another, [rows] float64."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").double()
    return (losses * mask[:, :-1]).sum(1)


def _clean_logits(lm: LanguageModel, held: HeldOut) -> Tensor:
    """[sequences, SEQUENCE, vocabulary], made once."""
    assert held.ids is not None
    if (clean := lm.clean_logits) is None:
        parts = [lm.model.run(ids, {}).logits.float().cpu() for ids in held.ids.split(ROWS)]
        clean = lm.clean_logits = torch.cat(parts)
    return clean


@torch.no_grad()
def mean_l0(sae: SAE, data: Data) -> float:
    """Mean number of latents that fire on a token."""
    held = data.held_out()
    return float((sae.encode(held.x[held.mask]) > 0).sum(-1).double().mean())


@torch.no_grad()
def at_l0(sae: SAE, data: Data, wanted: float) -> SAE:
    """The same weights at that mean L0 on the measured sequences, as near as the rule allows: TopK by another k, one
    threshold, or all thresholds of a JumpReLU times one factor. A ReLU stays as it is."""
    activation = sae.config.activation
    if isinstance(activation, TopK):
        return with_topk(sae, max(1, round(wanted)))
    if not isinstance(activation, (BatchTopK, JumpReLU)):
        return sae
    assert sae.threshold is not None
    held = data.held_out()
    threshold = sae.threshold.detach().clamp(min=torch.finfo(torch.float32).tiny)
    factors = sae.pre_acts(held.x[held.mask]) / threshold
    most = min(round(wanted * len(factors)), factors.numel() - 1)
    factor = float(factors.flatten().kthvalue(factors.numel() - most).values)
    other = copy.deepcopy(sae)
    other.set_threshold(threshold * max(factor, 0.0))
    return other


@torch.no_grad()
def sample(sae: SAE, data: Data, sequences: int | None = None) -> Sample:
    """The tokens that count as the suite's metrics take them; of the first so many sequences."""
    held = data.held_out()
    x, mask = held.x[:sequences], held.mask[:sequences]
    row, column = mask.nonzero(as_tuple=True)
    kept = x[mask]
    return Sample(data.site, sae, kept, kept, row, column, len(x), 0)


def in_dtype(sae: SAE, dtype: torch.dtype) -> SAE:
    """A copy with weights of another dtype."""
    return copy.deepcopy(sae).to(dtype)
