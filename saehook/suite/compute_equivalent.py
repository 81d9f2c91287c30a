"""Compute-equivalent loss: how much less training would have given a language model as bad as the one with the SAE spliced
in (Gao et al. 2024, section 4.1; the way from loss to compute is ours, since the paper gives none)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saehook.errors import ArgumentError
from saehook.suite.sample import ids_of, loss_sums, rows_at_once
from saehook.tokenization import Windows, keep_mask, special_ids

if TYPE_CHECKING:
    from saehook.hooked_model import HookedModel


@torch.no_grad()
def checkpoint_losses(models: Iterable[HookedModel], tokens: Windows | Tensor) -> list[float]:
    """The clean loss of each checkpoint of a language model, nats per token that counts (no special token) and predicts
    another. `models` may load each when it is asked for.

    Raises:
        ArgumentError: no window, or no token of it counts.
    """
    ids = ids_of(tokens)
    losses = []
    for model in models:
        counted = keep_mask(ids, None, special_ids(model.tokenizer))
        n = int(counted[:, :-1].sum())
        if n == 0:
            raise ArgumentError("no token of the windows that predicts another counts. Give real text.")
        size = rows_at_once(model, ids.shape[1])
        batches = zip(ids.split(size), counted.split(size), strict=True)
        losses.append(sum(float(loss_sums(model(batch).logits, batch, mask).sum()) for batch, mask in batches) / n)
    return losses


def compute_equivalent(steps: Sequence[float], losses: Sequence[float], spliced: float) -> float:
    """The share of the training that reaches the loss `spliced`.

    Linear in the logarithm of the step between the model's own checkpoints, whose losses are first made never to rise (the
    best so far). 1 is the last checkpoint; a loss below its own gives more than 1 only in so far as the last two checkpoints
    say how fast it fell.

    Args:
        steps: training steps, tokens or FLOPs of the checkpoints, rising and above 0.
        losses: of the clean checkpoints on the same tokens and mask as `spliced`, nats.

    Raises:
        ArgumentError: fewer than two checkpoints, steps that do not rise, a loss that is no number, or `spliced` above the
            loss of the first checkpoint, where nothing is known.
    """
    if len(steps) < 2 or len(steps) != len(losses):
        raise ArgumentError(f"{len(steps)} steps and {len(losses)} losses; as many of both, at least 2, are expected.")
    if steps[0] <= 0 or any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        raise ArgumentError(f"the steps of the checkpoints are {list(steps)}; rising numbers above 0 are expected.")
    if not all(map(math.isfinite, [*losses, spliced])):
        raise ArgumentError("a loss is NaN or infinite, so nothing can be read off the curve.")
    best, curve = math.inf, []
    for step, loss in zip(steps, losses, strict=True):
        if loss < best:  # a checkpoint that is no better than one before it says nothing new
            best = loss
            curve.append((math.log(step), loss))
    if spliced > curve[0][1]:
        raise ArgumentError(
            f"the spliced loss {spliced:.4g} is above {curve[0][1]:.4g}, that of the first checkpoint (step {steps[0]:g}). "
            "Give an earlier checkpoint."
        )
    if len(curve) < 2:
        raise ArgumentError("the loss falls at no checkpoint, so there is no curve. Give more of the training.")
    i = next((i for i, (_, loss) in enumerate(curve[1:], 1) if loss <= spliced), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    return math.exp(x0 + (x1 - x0) * (spliced - y0) / (y1 - y0)) / steps[-1]
