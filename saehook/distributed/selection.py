"""The largest pre-activations over all devices, exactly. Of equal ones the first are kept: of lower tokens, then of lower latents.

Every device has some latents, in the order of the devices, and every row of devices some tokens. Nothing of the size of the
pre-activations is sent. What is not positive is left out: its activation is 0, and nothing flows through it.
"""

from __future__ import annotations

from typing import NamedTuple

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

    `d_sae` are the latents of all devices, `widest` the most that one has.
    """
    largest = first_of_equals(pre_acts, min(k, widest))
    tokens, places = kept_of(largest, k, mesh, d_sae, widest, butterfly=butterfly)
    return Selection(tokens, largest.latents[tokens, places], *pre_acts.shape, order="token")


class Largest(NamedTuple):
    """Of each token the largest pre-activations here, the largest first, of equal ones the lower latent."""

    values: Tensor
    """[n, c]."""
    latents: Tensor
    """[n, c]."""


def first_of_equals(pre_acts: Tensor, width: int) -> Largest:
    """The `width` largest of each token, or all."""
    n, here = pre_acts.shape
    asked = min(width + 1, here)
    if asked == 0:
        return Largest(pre_acts, pre_acts.long())
    # In the order of latents first, so that a stable sort keeps that among equals.
    latents = kernels.topk(pre_acts, asked, descending=True).latents.view(n, asked).sort(1).values
    values, order = pre_acts.gather(1, latents).sort(dim=1, descending=True, stable=True)
    latents = latents.gather(1, order)
    if asked > width:
        # The one too many is equal to the last: which of all its equals were taken, `topk` leaves open.
        rows = ((values[:, width - 1] == values[:, width]) & (values[:, width] > 0)).nonzero().view(-1)
        if len(rows):
            all_values, all_latents = pre_acts[rows].sort(dim=1, descending=True, stable=True)
            values[rows], latents[rows] = all_values[:, :asked], all_latents[:, :asked]
    return Largest(values[:, :width], latents[:, :width])


def block_by_block(inputs: Tensor, W_enc: Tensor, b_enc: Tensor, width: int, latents_at_once: int) -> Largest:
    """The same of `inputs` W_enc + b_enc, of which only some latents are there at a time."""
    best = Largest(
        inputs.new_empty(len(inputs), 0), torch.empty(len(inputs), 0, dtype=torch.long, device=inputs.device)
    )
    for first in range(0, len(b_enc), latents_at_once):
        block = slice(first, first + latents_at_once)
        new = first_of_equals(torch.addmm(b_enc[block], inputs, W_enc[:, block]), width)
        values = torch.cat([best.values, new.values], 1)
        latents = torch.cat([best.latents, new.latents + first], 1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        best = Largest(values[:, :width], latents.gather(1, order)[:, :width])
    return best


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
