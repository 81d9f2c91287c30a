"""Facts about latents that need no language model: how evenly they are used, and how their directions lie."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saehook.sae import SAE
from saehook.suite.measure import Measure, Z, median, ratio
from saehook.suite.sample import MAX_NUMBERS, Sample


def effective_latents(counts: Tensor) -> float:
    """exp of the entropy of how firings [d_sae] are shared out: n where n latents fire equally often, 1 where one has all."""
    share = counts.double() / counts.sum()
    return float(torch.special.entr(share).sum().exp())


def max_cosine(W: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest cosine of each row of `W` [n, d] with a row of `other` [m, d], and which one it is, both [n].

    Without `other`: with another row of `W` itself. A row of zeros has cosine 0 with all.
    """
    rows = F.normalize(W.detach().float(), dim=-1)
    against = rows if other is None else F.normalize(other.detach().float(), dim=-1)
    values, indices = [], []
    size = max(1, MAX_NUMBERS // len(against))
    for start in range(0, len(rows), size):
        cosines = rows[start : start + size] @ against.T
        if other is None:
            own = torch.arange(len(cosines), device=W.device)
            cosines[own, own + start] = -float("inf")
        best = cosines.max(-1)
        values.append(best.values)
        indices.append(best.indices)
    return torch.cat(values), torch.cat(indices)


def alignment(sae: SAE) -> Tensor | None:
    """Cosine of each latent's encoder column and decoder row, [d_sae]; None for a transcoder, where they are of two sites."""
    if sae.is_transcoder:
        return None
    return F.cosine_similarity(sae.W_enc.detach().float().T, sae.W_dec.detach().float(), dim=-1)


@torch.no_grad()
def latent_quality(sample: Sample) -> list[Measure]:
    """Of the latents that fire on the sample; resampled are latents, or windows for `uniformity`.

    `uniformity` = effective latents / alive latents; `decoder_cosine` = the median of the largest cosine with another alive
    latent, `near_duplicates` the share above 0.9; `encoder_decoder_cosine` the median.
    """
    sae, tokens = sample.sae, len(sample)
    counts = sample.counts()
    alive = (counts > 0).nonzero()[:, 0]
    note = f"{len(alive)} of {sae.d_sae} latents are alive on {tokens:,} tokens"
    measures = [_uniformity(sample, alive, counts)]
    if len(alive) > 1:
        nearest = max_cosine(sae.W_dec[alive])[0]
        measures.append(median("decoder_cosine", "cosine", nearest, of="latents", tokens=tokens, note=note))
        share = (nearest > 0.9).double()
        measures.append(ratio("near_duplicates", "of the alive latents", share, of="latents", tokens=tokens, note=note))
    if (aligned := alignment(sae)) is not None:
        measures.append(
            median("encoder_decoder_cosine", "cosine", aligned[alive], of="latents", tokens=tokens, note=note)
        )
    return measures


def _uniformity(sample: Sample, alive: Tensor, counts: Tensor) -> Measure:
    """With the interval of a jackknife over windows: a bootstrap's draws would miss windows, and with them rare latents."""
    by_window = torch.zeros(sample.windows, sample.sae.d_sae, dtype=torch.float32)
    for part in sample.parts():
        fires = (sample.sae.encode(sample.x[part]) > 0).float().cpu()
        by_window.index_add_(0, sample.row[part].cpu(), fires)
    by_window = by_window[by_window.sum(1) > 0].double()
    n = len(by_window)
    error = float("nan")
    if n > 1:
        without = by_window.sum(0) - by_window
        values = torch.tensor([effective_latents(left) / max(1, int((left > 0).sum())) for left in without])
        error = Z * float(((n - 1) * values.double().var(correction=0)).sqrt())
    value = effective_latents(counts) / max(1, len(alive))
    note = f"{effective_latents(counts):.0f} effective of {len(alive)} alive latents"
    low, high = value - error, value + error
    return Measure("uniformity", value, "of the alive latents", low, high, n, "windows", len(sample), note=note)
