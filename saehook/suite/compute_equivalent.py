"""Compute-equivalent loss: how much less training would have given a language model as bad as the one with the SAE spliced
in (Gao et al. 2024, section 4.1; the way from loss to compute is ours, since the paper gives none)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saehook.errors import ArgumentError
from saehook.suite.measure import Measure, between
from saehook.suite.sample import Sample, counted_tokens, ids_of, rows_at_once, spliced_losses, token_losses
from saehook.tokenization import Windows, tokenizer_sha256

if TYPE_CHECKING:
    from saehook.hooked_model import HookedModel
    from saehook.hooked_saes import HookedSAEs

RESAMPLES = 200


@torch.no_grad()
def checkpoint_losses(
    hooked: HookedSAEs, checkpoints: Iterable[tuple[float, HookedModel]], tokens: Windows | Tensor
) -> dict[float, Tensor]:
    """The clean losses of checkpoints of the language model by their step, each [rows, length - 1] float64 in nats per token.

    Args:
        checkpoints: (training steps, tokens or FLOPs; model), in any order. A generator may load each when it is asked for.

    Raises:
        ArgumentError: a checkpoint has another tokenizer than `hooked`, or a step occurs twice.
    """
    ids = ids_of(tokens)
    found: dict[float, Tensor] = {}
    for step, model in checkpoints:
        if step in found:
            raise ArgumentError(f"two checkpoints have the step {step:g}. Give each its own.")
        if tokenizer_sha256(model.tokenizer) != tokenizer_sha256(hooked.tokenizer):
            raise ArgumentError(
                f"{model.name} has another tokenizer than {hooked.model.name}, so it is no checkpoint of its training."
            )
        rows = rows_at_once(model, ids.shape[1])
        found[step] = torch.cat([token_losses(model(batch).logits, batch) for batch in ids.split(rows)])
    return dict(sorted(found.items()))


@torch.no_grad()
def compute_equivalent_loss(
    hooked: HookedSAEs, sample: Sample, tokens: Windows | Tensor, checkpoints: Mapping[float, Tensor]
) -> list[Measure]:
    """`compute_equivalent` of the SAE spliced in, on the sample's tokens; its interval is over windows, resampled for the
    spliced and the clean losses alike.

    Args:
        tokens: the windows that the sample is of, and that `checkpoints` are of.
        checkpoints: `checkpoint_losses(hooked, ..., tokens)`.

    Raises:
        ArgumentError: those of `compute_equivalent`.
    """
    _, counted = counted_tokens(sample, tokens)
    used = torch.zeros(len(ids_of(tokens)), dtype=torch.bool)
    used[sample.row.cpu()] = True
    steps, n = list(checkpoints), counted[:, :-1].double().sum(1)
    clean = torch.stack([(losses[used] * counted[:, :-1]).sum(1) for losses in checkpoints.values()])
    sums = torch.cat([clean, spliced_losses(hooked, sample, tokens, sample.sae)[None]])

    def share(rows: Tensor) -> float:
        *losses, spliced = (sums[:, rows].sum(1) / n[rows].sum()).tolist()
        return compute_equivalent(steps, losses, spliced)

    value, drawn = share(torch.arange(len(n))), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(RESAMPLES if len(n) > 1 else 0):
        with contextlib.suppress(ArgumentError):  # a draw whose curve says nothing
            drawn.append(share(torch.randint(len(n), (len(n),), generator=generator)))
    low, high = between(torch.tensor(drawn))
    note = f"{len(steps)} checkpoints, the last at {steps[-1]:g}"
    unit = "of the training"
    return [Measure("compute_equivalent", value, unit, low, high, len(n), "windows", int(n.sum()), note=note)]


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
