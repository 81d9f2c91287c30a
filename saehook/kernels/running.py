"""Which pairs a step keeps, where the pre-activations of all latents are never there at once: some latents are encoded at a
time, and what can still be among the kept is carried on.

Exact: the largest of all are among the largest so far and those of the next block. Of equal ones the first are kept: of lower
tokens, then of lower latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saehook.kernels.product import in_bfloat16
from saehook.kernels.selection import Selection, topk

DENSE_ENTRIES = 2**27
"""Pre-activations that a training step holds at once, at most: 512 MiB in float32."""
SHARE_OF_DEVICE = 1 / 8
"""The same on a GPU, in bfloat16, as a share of its memory."""


class Largest(NamedTuple):
    """Of each token the largest pre-activations, the largest first, of equal ones the lower latent."""

    values: Tensor
    """[n, c]."""
    latents: Tensor
    """[n, c]."""


class Pairs(NamedTuple):
    """Some pairs of a batch, in no order that is promised."""

    values: Tensor
    """Pre-activations, [m]."""
    tokens: Tensor
    """[m]."""
    latents: Tensor
    """[m]."""


def most_entries(device: torch.device) -> int:
    """Pre-activations that are held at once, at most."""
    if device.type != "cuda":
        return DENSE_ENTRIES
    return max(DENSE_ENTRIES, int(SHARE_OF_DEVICE * torch.cuda.get_device_properties(device).total_memory / 2))


def too_many(n_tokens: int, d_sae: int, device: torch.device) -> bool:
    """Whether the pre-activations of all latents are too many to be held."""
    return n_tokens * d_sae > most_entries(device)


def blocks(n_tokens: int, d_sae: int, device: torch.device) -> Iterator[slice]:
    """Latents that are encoded together."""
    size = max(1, most_entries(device) // max(1, n_tokens))
    return (slice(first, min(first + size, d_sae)) for first in range(0, d_sae, size))


def encode_block(inputs: Tensor, W_enc: Tensor, b_enc: Tensor, block: slice) -> Tensor:
    """Pre-activations of some latents, [n, m], whatever the dtype of the weights; on a GPU in bfloat16."""
    W, b = W_enc[:, block], b_enc[block]
    with in_bfloat16(inputs.device):
        return torch.addmm(b, inputs, W if inputs.is_cuda else W.to(inputs.dtype))


def first_of_equals(pre_acts: Tensor, width: int) -> Largest:
    """The `width` largest of each token of [n, latents], or all."""
    n, here = pre_acts.shape
    asked = min(width + 1, here)
    if asked == 0:
        return Largest(pre_acts, pre_acts.long())
    # In the order of latents first, so that a stable sort keeps that among equals.
    latents = topk(pre_acts, asked, descending=True).latents.view(n, asked).sort(1).values
    values, order = pre_acts.gather(1, latents).sort(dim=1, descending=True, stable=True)
    latents = latents.gather(1, order)
    if asked > width:
        # The one too many is equal to the last: which of all its equals were taken, `topk` leaves open.
        rows = ((values[:, width - 1] == values[:, width]) & (values[:, width] > 0)).nonzero().view(-1)
        if len(rows):
            all_values, all_latents = pre_acts[rows].sort(dim=1, descending=True, stable=True)
            values[rows], latents[rows] = all_values[:, :asked], all_latents[:, :asked]
    return Largest(values[:, :width], latents[:, :width])


def largest_of_each_token(inputs: Tensor, W_enc: Tensor, b_enc: Tensor, width: int) -> Largest:
    """The `width` largest pre-activations of each of the `inputs` [n, d_in], or all."""
    best = Largest(inputs.new_empty(len(inputs), 0), inputs.new_empty(len(inputs), 0, dtype=torch.long))
    for block in blocks(len(inputs), len(b_enc), inputs.device):
        new = first_of_equals(encode_block(inputs, W_enc, b_enc, block), width)
        values = torch.cat([best.values, new.values.to(inputs.dtype)], 1)
        latents = torch.cat([best.latents, new.latents + block.start], 1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        best = Largest(values[:, :width], latents.gather(1, order)[:, :width])
    return best


def largest_of_batch(inputs: Tensor, W_enc: Tensor, b_enc: Tensor, number: int) -> Pairs:
    """The `number` largest positive pre-activations of all `inputs` [n, d_in], or all; NaN counts as the largest."""
    here = len(b_enc)
    values, positions = inputs.new_empty(0), inputs.new_empty(0, dtype=torch.long)
    least = inputs.new_zeros(())
    for block in blocks(len(inputs), here, inputs.device):
        pre = encode_block(inputs, W_enc, b_enc, block).to(inputs.dtype)
        tokens, columns = (~((pre <= 0) | (pre < least))).nonzero(as_tuple=True)
        values = torch.cat([values, pre[tokens, columns]])
        positions = torch.cat([positions, tokens * here + columns + block.start])
        if len(values) > number:
            least = values.nan_to_num(torch.inf).topk(number, sorted=False).values.min()
            kept = ~(values <= least)
            equal = (values == least).nonzero().view(-1)
            first = positions[equal].argsort()[: number - int(kept.sum())]
            kept[equal[first]] = True
            values, positions = values[kept], positions[kept]
    return Pairs(values, positions // here, positions % here)


def above(inputs: Tensor, W_enc: Tensor, b_enc: Tensor, lower: Tensor, most: int) -> tuple[Tensor, Selection] | None:
    """All pre-activations above `lower` [latents], [m], and their pairs, ordered by latent; None if more than `most`."""
    parts: list[Pairs] = []
    for block in blocks(len(inputs), len(b_enc), inputs.device):
        by_latent = encode_block(inputs, W_enc, b_enc, block).T
        latents, tokens = (~(by_latent <= lower[block, None])).nonzero(as_tuple=True)
        parts.append(Pairs(by_latent[latents, tokens].to(inputs.dtype), tokens, latents + block.start))
        most -= len(latents)
        if most < 0:
            return None
    values, tokens, latents = (torch.cat(each) for each in zip(*parts, strict=True))
    return values, Selection(tokens, latents, len(inputs), len(b_enc), order="latent")
