"""Latents found by what is known of them: by the token that their direction raises, and by the texts on which they fire."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehook.errors import ArgumentError
from saehook.hooked_saes import HookedSAEs


class Aligned(NamedTuple):
    """A latent, and how its direction lies to a token's."""

    latent: int
    cosine: float
    """Of W_dec[latent] and the token's row of the unembedding."""
    logit: float
    """What one unit of activation adds to the token's logit, the final norm left out."""


class Contrast(NamedTuple):
    """A latent on two texts, or sets of texts."""

    latent: int
    here: float
    """Mean activation over the tokens of the mask of the first."""
    there: float
    """Over those of the second."""
    largest: float
    """Activation in the first."""

    @property
    def difference(self) -> float:
        """`here` - `there`."""
        return self.here - self.there


@torch.no_grad()
def latents_for_token(hooked: HookedSAEs, token: int | str, site: str | None = None, n: int = 20) -> list[Aligned]:
    """The n latents whose decoder rows raise a token most, by cosine.

    Raises:
        ArgumentError: no single token, or a site that is not as wide as the residual stream.
    """
    sae = hooked.saes[hooked.resolve_site(site)]
    unembedding = hooked.lm.get_output_embeddings()
    if unembedding is None or unembedding.weight.shape[-1] != sae.d_out:
        raise ArgumentError(
            f"the SAE writes vectors of width {sae.d_out}, and the model's unembedding does not read them. Choose an SAE of the "
            "residual stream."
        )
    if isinstance(token, str):
        ids = hooked.tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1:
            raise ArgumentError(f"{token!r} is {len(ids)} tokens; one is expected. Give a single one, or its id.")
        token = ids[0]
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < len(unembedding.weight):
        raise ArgumentError(f"token {token!r} is outside 0..{len(unembedding.weight) - 1}.")
    direction = unembedding.weight[token].detach().float()
    rows = sae.W_dec.detach().float().to(direction.device)
    logits = rows @ direction
    cosines = logits / (rows.norm(dim=-1) * direction.norm()).clamp_min(1e-30)
    values, latents = cosines.topk(min(n, len(cosines)))
    return [Aligned(i, value, float(logits[i])) for i, value in zip(latents.tolist(), values.tolist(), strict=True)]


@torch.no_grad()
def latents_here_not_there(
    hooked: HookedSAEs, here: Any, there: Any, site: str | None = None, n: int = 20
) -> list[Contrast]:
    """The n latents whose mean activation is furthest above in one text than in another; fewer if fewer are above.

    Args:
        here, there: a text, ids, or a list of either.

    Raises:
        ArgumentError: a text without a token of the mask.
    """
    name = hooked.resolve_site(site)
    (a, largest), (b, _) = (_means(hooked, text, name) for text in (here, there))
    values, latents = (a - b).topk(min(n, len(a)))
    chosen = latents[values > 0].tolist()
    return [Contrast(i, float(a[i]), float(b[i]), float(largest[i])) for i in chosen]


def _means(hooked: HookedSAEs, text: Any, site: str) -> tuple[Tensor, Tensor]:
    """Mean and largest activation of each latent over the tokens of the mask, [d_sae] each."""
    found = hooked.latents(text, site)
    total, largest = torch.zeros(hooked.saes[site].d_sae), torch.zeros(hooked.saes[site].d_sae)
    tokens = 0
    for row in found if isinstance(found, list) else [found]:
        positions, latents, acts = (each.cpu() for each in row.fired)
        counted = row.mask[positions]
        latents, acts = latents[counted], acts[counted].float()
        total.index_add_(0, latents, acts)
        largest.scatter_reduce_(0, latents, acts, "amax")
        tokens += int(row.mask.sum())
    if not tokens:
        raise ArgumentError("a text to compare has no token that counts. Write some more.")
    return total / tokens, largest
