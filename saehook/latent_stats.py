"""Each latent's statistics on text, from clean activations; what `saehook stats` stores in an SAE's file."""

from __future__ import annotations

from typing import Any

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


def read_rows(hooked: HookedSAEs, ids: Any) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """x [rows, n, d_in], y [rows, n, d_out] and the mask [rows, n] for each attached SAE, on the device of x; rows of several
    lengths are padded on the left."""
    group: list[ReadAction] = []
    sites = dict.fromkeys(site for one in hooked.attached.values() for site in (one.reads, one.writes))
    readers = {site: ReadAction(group, stop=True) for site in sites}
    hooked.run(ids, readers)
    found = {}
    for name, (sae, reads, writes) in hooked.attached.items():
        x, y = readers[reads], readers[writes]
        assert x.value is not None
        assert y.value is not None
        found[name] = (x.value, y.value.to(x.value.device), x.mask(sae.mask_rule))
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
            for site, (x, y, mask) in read_rows(hooked, batch).items():
                firing, histogram, error = measured[site]
                sae = hooked.saes[site]
                for some, target in zip(sae.pieces(x[mask]), sae.pieces(y[mask]), strict=True) if mask.any() else ():
                    out = sae(some)
                    firing.update(out.acts)
                    histogram.update(out.acts)
                    error.update(target - out.x_hat)
    stats = {}
    for site, (firing, histogram, error) in measured.items():
        if firing.count is None:
            raise ArgumentError(
                f"no token of the text is in the mask of the SAE at {site}, so there is nothing to measure. Give real text."
            )
        stats[site] = stats_of(firing, histogram, error.mean)
    return stats
