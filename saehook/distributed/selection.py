"""The largest pre-activations over all devices, exactly. Of equal ones the first are kept: of lower tokens, then of lower latents.

Every device has some latents, in the order of the devices, and every row of devices some tokens. Nothing of the size of the
pre-activations is sent. What is not positive is left out: its activation is 0, and nothing flows through it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saehook import kernels
from saehook.distributed.mesh import Mesh
from saehook.kernels import Selection

BUTTERFLY_FROM = 8
"""Devices, a power of two, from which candidates are merged in pairs: log2(n) times k a token, not n - 1 times."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element."""
MAX = torch.distributed.ReduceOp.MAX
WHAT = "top-k"


def topk(pre_acts: Tensor, k: int, mesh: Mesh, d_sae: int, widest: int, *, butterfly: bool | None = None) -> Selection:
    """The pairs here that are among the k largest of their token, of `pre_acts` [n, latents here]; ordered by token.

    `d_sae` are the latents of all devices, `widest` the most that one has. Each sends its k largest values of each token:
    from these all find the k-th largest of all, and how many equal to it the devices before have.
    """
    n, here = pre_acts.shape
    k, width = min(k, d_sae), min(k, widest)
    if k == 0:
        return _pairs(pre_acts, torch.empty(0, 2, dtype=torch.long, device=pre_acts.device))
    asked = min(width + 1, here)
    latents = kernels.topk(pre_acts, asked, descending=True).latents.view(n, asked) if asked else pre_acts.long()
    values = pre_acts.gather(1, latents)
    mine = values.new_full((n, width), -torch.inf)
    mine[:, : min(width, here)] = values[:, :width]
    latent = mesh.sizes["latent"]
    if butterfly is None:
        butterfly = latent >= BUTTERFLY_FROM and latent.bit_count() == 1
    least, ties = (_butterfly if butterfly else _gathered)(mine, k, mesh)
    at_least, kept_ties = values == least, ties[:, None]
    # One more candidate than is sent: if that is a tie, too, there may be others outside of the list.
    unclear = (least > 0) & (at_least.sum(1, keepdim=True) > kept_ties)
    kept = (values > least.clamp_min(0)) | (at_least & (least > 0) & ~unclear) | values.isnan()
    pairs = kept.nonzero()
    pairs[:, 1] = latents[pairs[:, 0], pairs[:, 1]]
    if unclear.any():
        tokens = unclear.view(-1).nonzero().view(-1)
        equal = pre_acts[tokens] == least[tokens]
        first = (equal & (equal.cumsum(1) <= kept_ties[tokens])).nonzero()
        first[:, 0] = tokens[first[:, 0]]
        pairs = torch.cat([pairs, first])
        pairs = pairs[pairs[:, 0].argsort(stable=True)]
    return _pairs(pre_acts, pairs)


def _pairs(pre_acts: Tensor, pairs: Tensor) -> Selection:
    return Selection(pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), *pre_acts.shape, order="token")


def _gathered(mine: Tensor, k: int, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """The k-th largest of each token [n, 1], and how many equal to it are kept here [n], from each device's largest [n, c]."""
    every = mesh.gather(mine, "latent", WHAT)
    flat = every.permute(1, 0, 2).reshape(len(mine), -1)
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


def batch_topk(pre_acts: Tensor, k: int, mesh: Mesh, d_sae: int, first_latent: int) -> Selection:
    """The pairs here that are among the tokens x k largest of the whole batch, of `pre_acts` [n, latents here].

    The smallest that is kept is found byte by byte from histograms summed over all devices: 2 KiB for each byte.
    """
    pairs = (~(pre_acts <= 0)).nonzero()
    values = pre_acts[pairs[:, 0], pairs[:, 1]]
    here = torch.tensor([len(pre_acts)], device=pre_acts.device)
    tokens = mesh.gather(here, "data", WHAT).view(-1)
    found = nth_largest(values, min(k, d_sae) * int(tokens.sum()), mesh, "all")
    if found is not None:
        least, wanted, ties = found
        kept = (values > least) | values.isnan()
        equal = values == least
        if ties > wanted:
            first_token = int(tokens[: mesh.places["data"]].sum())
            places = (pairs[equal, 0] + first_token) * d_sae + pairs[equal, 1] + first_latent
            lowest = torch.cat(mesh.gather_some(places.sort().values[:wanted], "all", WHAT)).sort().values
            equal[equal.clone()] = places <= lowest[wanted - 1]
        pairs = pairs[kept | equal]
    return _pairs(pre_acts, pairs)


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
