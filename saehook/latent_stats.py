"""Each latent's statistics on text, from clean activations; what `saehook stats` stores in an SAE's file."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from saehook.calibration import stats_of
from saehook.editing import ReadAction
from saehook.errors import ArgumentError
from saehook.hooked_saes import HookedSAEs
from saehook.metrics import Firing, Histogram, Moments
from saehook.sae import LatentStats
from saehook.tokenization import Windows


class Clean(NamedTuple):
    """Clean activations of the tokens in an SAE's mask."""

    x: Tensor
    """What it reads, [n, d_in]."""
    y: Tensor
    """What it reconstructs, [n, d_out]: x, but for a transcoder."""
    mask: Tensor
    """[rows, length] bool on the CPU."""


def read_sites(hooked: HookedSAEs, ids: Tensor) -> dict[str, Clean]:
    """Clean activations for every attached SAE, by its site."""
    group: list[ReadAction] = []
    sites = dict.fromkeys(site for one in hooked.attached.values() for site in (one.reads, one.writes))
    readers = {site: ReadAction(group, stop=True) for site in sites}
    hooked.run(ids, readers)
    found = {}
    for name, (sae, reads, writes) in hooked.attached.items():
        read, written = readers[reads], readers[writes]
        assert read.value is not None
        assert written.value is not None
        mask = read.mask(sae.mask_rule)
        found[name] = Clean(read.value[mask], written.value[mask.to(written.value.device)], mask.cpu())
    return found


def measure_stats(hooked: HookedSAEs, tokens: Windows | Tensor, *, progress: bool = True) -> dict[str, LatentStats]:
    """Statistics of every attached SAE on text, by site; what the units `max` and `quantile` and `error="mean"` need.

    Raises:
        ArgumentError: no token of the text is in the mask of one of the SAEs.
    """
    ids = tokens.ids if isinstance(tokens, Windows) else tokens
    measured = {site: (Firing(), Histogram(sae.d_sae, sae.device), Moments()) for site, sae in hooked.saes.items()}
    with torch.no_grad():
        for batch in tqdm(
            ids.split(max(1, 4096 // ids.shape[1])), desc="measuring", unit="batch", disable=not progress
        ):
            for site, clean in read_sites(hooked, batch).items():
                firing, histogram, error = measured[site]
                sae = hooked.saes[site]
                for x, y in zip(sae.pieces(clean.x), sae.pieces(clean.y), strict=True) if len(clean.x) else ():
                    out = sae(x)
                    firing.update(out.acts)
                    histogram.update(out.acts)
                    error.update(y - out.x_hat)
    stats = {}
    for site, (firing, histogram, error) in measured.items():
        if firing.count is None:
            raise ArgumentError(
                f"no token of the text is in the mask of the SAE at {site}, so there is nothing to measure. Give real text."
            )
        stats[site] = stats_of(firing, histogram, error.mean)
    return stats
