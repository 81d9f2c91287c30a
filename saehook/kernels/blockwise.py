"""Encoding without the pre-activations of all latents at once: some latents at a time, of which only those that fire are kept.

For SAEs so wide that [n_tokens, d_sae] would be most of the memory. The definition is `activation_fns.activate` of all
pre-activations; of equal ones at the k-th place any may be kept, as there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saehook.kernels.selection import Selection

ENTRIES_AT_ONCE = 2**20
"""Pre-activations that are held together: 4 MiB in float32."""
LATENTS_AT_ONCE = 2**16
"""At most; with few tokens that is what bounds a block."""


def encode_topk(inputs: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Selection]:
    """The k largest pre-activations of each token of `inputs` [n, d_in], without those that are not positive.

    Exact: the k largest of all are among the k largest so far and those of the next block.
    """
    n, d_sae = len(inputs), len(b_enc)
    values, latents = inputs.new_empty(n, 0), torch.empty(n, 0, dtype=torch.long, device=inputs.device)
    for block in _blocks(n, d_sae):
        pre_acts = torch.addmm(b_enc[block], inputs, W_enc[:, block])
        best, columns = pre_acts.topk(min(k, pre_acts.shape[1]), dim=-1, sorted=False)
        values, latents = torch.cat([values, best], 1), torch.cat([latents, columns + block.start], 1)
        values, kept = values.topk(min(k, values.shape[1]), dim=-1, sorted=False)
        latents = latents.gather(1, kept)
    tokens, places = (~(values <= 0)).nonzero(as_tuple=True)  # NaN stays, to be seen
    return values[tokens, places], Selection(tokens, latents[tokens, places], n, d_sae, order="token")


def encode_above(inputs: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None) -> tuple[Tensor, Selection]:
    """All positive pre-activations of `inputs` [n, d_in] above `threshold` (a scalar or [d_sae]; None: 0)."""
    n, d_sae = len(inputs), len(b_enc)
    lower = b_enc.new_zeros(d_sae) if threshold is None else threshold.detach().clamp_min(0).expand(d_sae)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for block in _blocks(n, d_sae):
        pre_acts = torch.addmm(b_enc[block], inputs, W_enc[:, block])
        tokens, columns = (~(pre_acts <= lower[block])).nonzero(as_tuple=True)
        parts.append((pre_acts[tokens, columns], tokens, columns + block.start))
    values, tokens, latents = (torch.cat(each) for each in zip(*parts, strict=True))
    tokens, order = tokens.sort(stable=True)
    return values[order], Selection(tokens, latents[order], n, d_sae, order="token")


def _blocks(n_tokens: int, d_sae: int) -> Iterator[slice]:
    """Latents that are treated together."""
    size = max(1, min(LATENTS_AT_ONCE, ENTRIES_AT_ONCE // max(1, n_tokens)))
    return (slice(first, min(first + size, d_sae)) for first in range(0, d_sae, size))
