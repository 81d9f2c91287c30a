"""The largest pre-activations over all devices, exactly. Of equal ones the first are kept: of lower tokens, then of lower latents.

Every device has some latents, in the order of the devices, and every row of devices some tokens. Nothing of the size of the
pre-activations is sent. What is not positive is left out: its activation is 0, and nothing flows through it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saehook.distributed.mesh import Mesh
from saehook.kernels import Largest, Pairs, Selection
from saehook.kernels.running import first_of_equals

BUTTERFLY_FROM = 8
"""Devices, a power of two, from which candidates are merged in pairs: log2(n) times k a token, not n - 1 times."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element."""
MAX = torch.distributed.ReduceOp.MAX
WHAT = "top-k"


def topk(pre_acts: Tensor, k: int, mesh: Mesh, d_sae: int, widest: int, *, butterfly: bool | None = None) -> Selection:
    """The pairs here that are among the k largest of their token, of `pre_acts` [n, latents here]; ordered by token.

    `d_sae` are the latents of all devices, `widest` the most that one has.
    """
    largest = first_of_equals(pre_acts, min(k, widest))
    tokens, places = kept_of(largest, k, mesh, d_sae, widest, butterfly=butterfly)
    return Selection(tokens, largest.latents[tokens, places], *pre_acts.shape, order="token")


def kept_of(
    largest: Largest, k: int, mesh: Mesh, d_sae: int, widest: int, *, butterfly: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens and places in `largest` [n, at least min(k, latents here)] of what is among the k largest of all devices.

    Each sends its k largest values of each token: from these all find the k-th largest of all, and how many equal to it the
    devices before have.
    """
    k, width = min(k, d_sae), min(k, widest)
    values = largest.values
    mine = values.new_full((len(values), width), -torch.inf)
    mine[:, : values.shape[1]] = values
    latent = mesh.sizes["latent"]
    if butterfly is None:
        butterfly = latent >= BUTTERFLY_FROM and latent.bit_count() == 1
    least, ties = (_butterfly if butterfly else _gathered)(mine, k, mesh)
    equal = values == least
    kept = (values > least) | (equal & (equal.cumsum(1) <= ties[:, None]))
    tokens, places = ((kept & (values > 0)) | values.isnan()).nonzero(as_tuple=True)
    return tokens, places


def _gathered(mine: Tensor, k: int, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """The k-th largest of each token [n, 1], and how many equal to it are kept here [n], from each device's largest [n, c]."""
    every = mesh.gather(mine, "latent", WHAT)
    flat = every.permute(1, 0, 2).reshape(len(mine), len(every) * mine.shape[1])
    least = flat.topk(k).values[:, -1:]
    return least, _share(k - (flat > least).sum(1), (every == least).sum(2), mesh)


def _share(wanted: Tensor, ties: Tensor, mesh: Mesh) -> Tensor:
    """How many of `wanted` [n] are taken here, where devices have `ties` [devices, n] and the first give first."""
    place = mesh.places["latent"]
    return (wanted - ties[:place].sum(0)).clamp_min(0).minimum(ties[place])


def _butterfly(mine: Tensor, k: int, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """The same, merged in pairs."""
    largest, distance = mine, 1
    while distance < mesh.sizes["latent"]:
        other = mesh.swap(largest, mesh.places["latent"] ^ distance, WHAT)
        merged = torch.cat([largest, other], 1)
        largest = merged.topk(min(k, merged.shape[1])).values
        distance *= 2
    least = largest[:, k - 1 : k]
    ties = (mine == least).sum(1)
    number = mesh.reduce_(((mine >= least).sum(1)).to(torch.int32), "latent", WHAT)
    if bool(((number <= k) | (least[:, 0] <= 0)).all()):
        return least, ties
    above = (largest > least).sum(1)
    return least, _share(k - above, mesh.gather(ties.to(torch.int32), "latent", WHAT).long(), mesh)


def batch_topk(pre_acts: Tensor, k: int, mesh: Mesh, latents: Tensor, d_sae: int) -> Selection:
    """The pairs here that are among the tokens x k largest of the whole batch, of `pre_acts` [n, latents here]; `latents` says
    which these are among all `d_sae`."""
    tokens, columns = (~(pre_acts <= 0)).nonzero(as_tuple=True)
    found = Pairs(pre_acts[tokens, columns], tokens, columns)
    kept = kept_of_batch(found, k, mesh, latents, d_sae, len(pre_acts))
    return Selection(tokens[kept], columns[kept], *pre_acts.shape, order="token")


def kept_of_batch(found: Pairs, k: int, mesh: Mesh, latents: Tensor, d_sae: int, n_tokens: int) -> Tensor:
    """Which of the pairs here, bool [m], are among the tokens x k largest of the whole batch. `found` are those that are positive
    here, or as many of the largest of them.

    The smallest that is kept is found byte by byte from histograms summed over all devices: 2 KiB for each byte.
    """
    values = found.values
    tokens = mesh.gather(torch.tensor([n_tokens], device=values.device), "data", WHAT).view(-1)
    cut = nth_largest(values, min(k, d_sae) * int(tokens.sum()), mesh, "all")
    if cut is None:
        return torch.ones_like(values, dtype=torch.bool)
    least, wanted, ties = cut
    kept = (values > least) | values.isnan()
    equal = values == least
    if ties > wanted:
        first_token = int(tokens[: mesh.places["data"]].sum())
        places = (found.tokens[equal] + first_token) * d_sae + latents[found.latents[equal]]
        lowest = torch.cat(mesh.gather_some(places.sort().values[:wanted], "all", WHAT)).sort().values
        equal[equal.clone()] = places <= lowest[wanted - 1]
    return kept | equal


def nth_largest(values: Tensor, n: int, mesh: Mesh, axis: str) -> tuple[Tensor, int, int] | None:
    """Of positive floating-point numbers [m] on each device of the axis: the n-th largest of all, how many equal to it are
    among the n largest, and how many there are. None where there are fewer than n in all, or n is 0.

    The bits of positive numbers are ordered as the numbers are, so they can be found from the highest byte down.
    """
    bits = values.abs().view(INTEGERS[values.element_size()]).long()
    found, wanted, ties = 0, n, 0
    for shift in range(8 * values.element_size() - 8, -1, -8):
        byte = (bits >> shift) & 255
        counts = mesh.reduce_(torch.bincount(byte, minlength=256), axis, WHAT)
        from_top = counts.flip(0).cumsum(0)
        if wanted == 0 or from_top[-1] < wanted:
            return None
        place = int((from_top < wanted).sum())
        wanted -= int(from_top[place - 1]) if place else 0
        ties = int(counts[255 - place])
        bits = bits[byte == 255 - place]
        found |= (255 - place) << shift
    least = torch.tensor([found], dtype=INTEGERS[values.element_size()], device=values.device).view(values.dtype)
    return least[0], wanted, ties


def largest_pairs(selected: Selection, values: Tensor, k: int, of: int, mesh: Mesh) -> Tensor:
    """Which of the pairs that `topk` gave for `of` are among the k largest of their token, as ascending indices; `values` [m]
    are theirs."""
    order = selected.positions.argsort()  # by token, then by latent
    tokens = selected.tokens[order]
    columns = torch.arange(len(order), device=order.device) - torch.searchsorted(tokens, tokens)
    widest = int(mesh.reduce_((columns.max() + 1 if len(columns) else columns.sum()).clone(), "latent", WHAT, MAX))
    matrix = values.new_zeros(selected.n_tokens, widest)
    index = order.new_zeros(selected.n_tokens, widest)
    matrix[tokens, columns], index[tokens, columns] = values[order], order
    kept = topk(matrix, k, mesh, max(k, of), widest)
    return index[kept.tokens, kept.latents].sort().values
