"""What an SAE gives with another number of latents than it was trained with (Gao et al. 2024, sections 5.3 and A.6).

Test-time k: the k' largest pre-activations of each token, then ReLU, whatever the SAE's own rule. Where the error never rises
with k', the latents are a progressive code; plain TopK is one only up to the k that it was trained with, Multi-TopK and
BatchTopK further. Test-time θ: the same from one fixed threshold for all latents and tokens, at the same mean number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saehook.activation_fns import jumprelu, topk
from saehook.config import Activation, JumpReLU, TopK
from saehook.errors import ArgumentError
from saehook.sae import SAE
from saehook.suite.measure import Measure, between, ratio
from saehook.suite.sample import Sample, counted_tokens, spliced_losses

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs
    from saehook.tokenization import Windows


def default_ks(d_sae: int) -> list[int]:
    """1, 2, 4, ... up to an eighth of the latents, and at most 512."""
    return [2**i for i in range(10) if 2**i <= max(1, d_sae // 8)]


def progressive_code(sample: Sample, ks: Sequence[int] | None = None) -> list[Measure]:
    """FVU at each k', then at the θ that keeps as many on average, and how far the error falls with k'.

    `fvu_topk.K`, `fvu_threshold.K`; `progressive_up_to` is the largest k' up to which no step raises the FVU.

    Raises:
        ArgumentError: a k' outside 1..d_sae, or a mean of the sample's y that explains all of it.
    """
    ks = sorted(set(default_ks(sample.sae.d_sae) if ks is None else ks))
    if not ks or ks[0] < 1 or ks[-1] > sample.sae.d_sae:
        raise ArgumentError(f"k' = {list(ks)}; one or more numbers from 1 to d_sae = {sample.sae.d_sae} are expected.")
    y = sample.y.double()
    variance = (y - y.mean(0)).square().sum(-1)
    if not float(variance.sum()) > 0:
        raise ArgumentError(
            f"all {len(sample)} activations at {sample.site} are the same: there is nothing to explain."
        )
    thresholds = thresholds_for(sample, ks)
    by_k = [_errors(sample, k=k) for k in ks]
    by_threshold = [_errors(sample, threshold=threshold) for threshold in thresholds]
    whole = sample.by_window(variance)

    def measure(name: str, errors: Tensor, note: str) -> Measure:
        return ratio(name, "FVU", sample.by_window(errors), whole, of="windows", tokens=len(sample), note=note)

    measures = [
        measure(f"fvu_topk.{k}", errors, f"L0 {float(l0.mean()):.4g}") for k, (errors, l0) in zip(ks, by_k, strict=True)
    ]
    measures += [
        measure(f"fvu_threshold.{k}", errors, f"θ {threshold:.4g}, L0 {float(l0.mean()):.4g}")
        for k, threshold, (errors, l0) in zip(ks, thresholds, by_threshold, strict=True)
    ]
    last = progressive_up_to(ks, [float(errors.sum()) for errors, _ in by_k])
    low, high = _span(ks, [sample.by_window(errors) for errors, _ in by_k])
    n = len(whole)
    note = f"of k' up to {ks[-1]}" + ("" if last < ks[-1] else ": all of them")
    measures.append(Measure("progressive_up_to", last, "latents", low, high, n, "windows", len(sample), note=note))
    return measures


def progressive_up_to(ks: Sequence[int], errors: Sequence[float]) -> int:
    """The largest k' that is reached from the first without a step that raises the error."""
    for before, (error, after) in zip(ks, zip(errors, errors[1:], strict=False), strict=False):
        if after > error:
            return before
    return ks[-1]


def _span(ks: Sequence[int], errors: Sequence[Tensor]) -> tuple[float, float]:
    """95 % interval of `progressive_up_to` over windows."""
    table = torch.stack(list(errors)).cpu()
    n = table.shape[1]
    if n < 2:
        return float("nan"), float("nan")
    drawn = torch.randint(n, (200, n), generator=torch.Generator().manual_seed(0))
    found = torch.tensor([progressive_up_to(ks, table[:, rows].sum(1).tolist()) for rows in drawn]).double()
    return between(found)


@torch.no_grad()
def thresholds_for(sample: Sample, ks: Sequence[int]) -> list[float]:
    """For each k' the θ above which that many pre-activations of a token are on average, 0 where fewer are positive."""
    most = min(sample.sae.d_sae, 4 * max(ks, default=0))
    kept = [sample.sae.pre_acts(sample.x[part]).relu().topk(most, dim=-1).values.flatten() for part in sample.parts()]
    values = torch.cat(kept).sort(descending=True).values
    return [float(values[len(sample) * k]) if len(sample) * k < len(values) else 0.0 for k in ks]


@torch.no_grad()
def _errors(sample: Sample, *, k: int | None = None, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """‖y - y_hat‖² and L0 of each token, both [n] float64."""
    errors, l0 = [], []
    for part in sample.parts():
        pre_acts = sample.sae.pre_acts(sample.x[part])
        acts = topk(pre_acts, k) if k is not None else jumprelu(pre_acts, torch.tensor(threshold).to(pre_acts.device))
        errors.append((sample.y[part] - sample.sae.decode(acts, sample.x[part])).double().square().sum(-1))
        l0.append((acts > 0).double().sum(-1))
    return torch.cat(errors), torch.cat(l0)


def with_topk(sae: SAE, k: int) -> SAE:
    """The same weights, not copied, with TopK(k) as their rule."""
    return _with_rule(sae, TopK(k=k))


def with_threshold(sae: SAE, threshold: float) -> SAE:
    """The same weights, not copied; a latent fires where its pre-activation is above `threshold`, whatever the SAE's rule."""
    other = _with_rule(sae, JumpReLU())
    other.threshold = torch.nn.Parameter(torch.full((sae.d_sae,), threshold, device=sae.device), requires_grad=False)
    return other


def _with_rule(sae: SAE, activation: Activation) -> SAE:
    other = SAE(dataclasses.replace(sae.config, activation=activation), device="meta")
    for name, parameter in sae.named_parameters():
        if name != "threshold":
            setattr(other, name, parameter)
    other.mask_rule = sae.mask_rule
    return other


@torch.no_grad()
def loss_by_k(hooked: HookedSAEs, sample: Sample, tokens: Windows | Tensor, ks: Sequence[int]) -> list[Measure]:
    """The loss that the model gains with this SAE spliced in at each k', `delta_ce_topk.K`, and at the θ that keeps as many
    on average, `delta_ce_threshold.K`; nats per token.

    Args:
        tokens: the windows that the sample is of.
    """
    n = counted_tokens(sample, tokens)[1][:, :-1].double().sum(1)
    clean = spliced_losses(hooked, sample, tokens, None)

    def measure(name: str, sae: SAE, note: str = "") -> Measure:
        lost = spliced_losses(hooked, sample, tokens, sae) - clean
        return ratio(name, "nats per token", lost, n, of="windows", tokens=int(n.sum()), note=note)

    measures = [measure(f"delta_ce_topk.{k}", with_topk(sample.sae, k)) for k in ks]
    for k, threshold in zip(ks, thresholds_for(sample, ks), strict=True):
        sae = with_threshold(sample.sae, threshold)
        measures.append(measure(f"delta_ce_threshold.{k}", sae, f"θ {threshold:.4g}"))
    return measures
