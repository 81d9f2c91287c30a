"""Probe loss: how well does the best single latent tell the two classes of a task? (Gao et al. 2024, section 4.1)

For each latent a logistic probe with two parameters, y ~ σ(w z + b), on the PRE-activation z of the last token of each
example, all latents at once by Newton's method. The latent is chosen on one half of the examples and its cross-entropy
measured on the other; the probe loss is the mean over tasks. Beside it the same over the coordinates of x, and the
cross-entropy of knowing only how frequent the classes are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saehook.errors import ArgumentError
from saehook.latent_stats import read_rows
from saehook.suite.measure import Measure, ratio
from saehook.suite.probe_tasks import ProbeTask

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs

MIN_EXAMPLES = 40
"""Examples of each class that a task must have."""
CONTEXT = 64
"""Tokens of an example that are run: the last ones."""
RIDGE = 1e-6
STEPS = 30
MAX_NUMBERS = 2**22
"""Examples × latents that are fitted together, in float64."""


class Probes(NamedTuple):
    """One probe for each latent, both [m] float64, in units of z."""

    weight: Tensor
    bias: Tensor

    def losses(self, z: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of each example [n] with each probe, [n, m] float64 in nats, from z [n, m]."""
        margin = self.weight * z.double() + self.bias
        return F.binary_cross_entropy_with_logits(margin, y.double()[:, None].expand_as(margin), reduction="none")


def fit_probes(z: Tensor, y: Tensor) -> Probes:
    """The probe of each latent from z [n, m] and classes y [n] of 0 and 1, by Newton's method on standardised z.

    A step that would raise a latent's loss is halved. A latent that separates the classes gets as far as `STEPS` steps and a
    ridge of 1e-6 let it; one that is constant gets the frequency of the classes.
    """
    size = max(1, MAX_NUMBERS // max(1, len(z)))
    parts = [_fit(part.double(), y.double()) for part in z.split(size, dim=1)]
    return Probes(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))


def _fit(z: Tensor, y: Tensor) -> Probes:
    mean, std = z.mean(0), z.std(0, correction=0)
    z = (z - mean) / torch.where(std > 0, std, 1.0)
    target = y[:, None].expand_as(z)
    w, b = torch.zeros_like(mean), torch.zeros_like(mean)
    loss = torch.full_like(mean, float("inf"))
    step_w, step_b = torch.zeros_like(mean), torch.zeros_like(mean)
    for _ in range(STEPS):
        margin = (w + step_w) * z + (b + step_b)
        new = F.binary_cross_entropy_with_logits(margin, target, reduction="none").mean(0)
        new = new + RIDGE / 2 * ((w + step_w).square() + (b + step_b).square())
        better = new <= loss
        w, b = torch.where(better, w + step_w, w), torch.where(better, b + step_b, b)
        loss = torch.where(better, new, loss)
        p = margin.sigmoid_()
        curve = p * (1 - p)
        p -= target
        g_w, g_b = (p * z).mean(0) + RIDGE * w, p.mean(0) + RIDGE * b
        h_bb, h_bw = curve.mean(0) + RIDGE, (curve * z).mean(0)
        h_ww = (curve * z.square()).mean(0) + RIDGE
        det = h_ww * h_bb - h_bw.square()
        # Where the step was refused, this gradient is of the refused place: half of the same step is tried instead.
        step_w = torch.where(better, (h_bw * g_b - h_bb * g_w) / det, step_w / 2)
        step_b = torch.where(better, (h_bw * g_w - h_ww * g_b) / det, step_b / 2)
        if float(torch.maximum(step_w.abs(), step_b.abs()).max()) < 1e-9:
            break
    weight = w / torch.where(std > 0, std, 1.0)
    return Probes(weight, b - weight * mean)


class Examples(NamedTuple):
    """The last token of each example text, at one site."""

    x: Tensor
    """[texts, d_in]"""
    row: Mapping[str, int]
    """Row of `x` by text."""

    def of(self, task: ProbeTask) -> tuple[Tensor, Tensor]:
        """x [n, d_in] and the classes [n] of the examples of a task."""
        rows = torch.tensor([self.row[text] for text in task.texts], device=self.x.device)
        return self.x[rows], torch.tensor(task.labels, device=self.x.device)


@torch.no_grad()
def read_examples(hooked: HookedSAEs, tasks: Sequence[ProbeTask]) -> dict[str, Examples]:
    """Activations at the last token of every text of the tasks, for each attached SAE, by its name.

    Texts are tokenised without special tokens, cut to their last tokens, and get a BOS in front where the tokenizer has one.

    Raises:
        ArgumentError: a text is empty after tokenisation.
    """
    tokenizer = hooked.tokenizer
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    texts = list(dict.fromkeys(text for task in tasks for text in task.texts))
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][-CONTEXT + len(bos) :]
        if not ids:
            raise ArgumentError(
                f"the example {text[-40:]!r} of a probe task is empty after tokenisation. Leave it out."
            )
        rows.append(torch.tensor([*bos, *ids]))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # rows of one batch are about as long
    found: dict[str, list[Tensor]] = {name: [] for name in hooked.sites}
    for start in range(0, len(order), 64):
        batch = [rows[i] for i in order[start : start + 64]]
        for name, (x, _, _) in read_rows(hooked, batch).items():
            found[name].append(x[:, -1])
    back = torch.tensor(order).argsort()
    row = {text: i for i, text in enumerate(texts)}
    return {name: Examples(torch.cat(parts)[back], row) for name, parts in found.items()}


class Score(NamedTuple):
    """The best single latent of one task."""

    latent: int
    losses: Tensor
    """Cross-entropies of the test examples, [n] float64."""


def best_latent(z: Tensor, y: Tensor, test: Tensor) -> Score:
    """The latent whose probe is best on the examples that are not in `test` [n] bool, and its losses on those that are."""
    probes = fit_probes(z[~test], y[~test])
    size = max(1, MAX_NUMBERS // len(z))
    parts = zip(z[~test].split(size, 1), *(p.split(size) for p in probes), strict=True)
    loss = torch.cat([Probes(w, b).losses(part, y[~test]).mean(0) for part, w, b in parts])
    best = int(loss.argmin())
    chosen = Probes(probes.weight[best, None], probes.bias[best, None])
    return Score(best, chosen.losses(z[test][:, best, None], y[test])[:, 0])


def halves(y: Tensor, seed: int = 0) -> Tensor:
    """Which examples are for testing, [n] bool: a random half of each class."""
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(y), dtype=torch.bool)
    for label in (False, True):
        members = (y.cpu().bool() == label).nonzero()[:, 0]
        test[members[torch.randperm(len(members), generator=generator)[: len(members) // 2]]] = True
    return test.to(y.device)


def check_tasks(tasks: Sequence[ProbeTask]) -> None:
    """Raises ArgumentError where there is no task, or one that has too few examples of a class."""
    if not tasks:
        raise ArgumentError("there is no probe task. Give a JSON-lines file of them, or text to make them from.")
    for task in tasks:
        positive = sum(task.labels)
        if min(positive, len(task.labels) - positive) < MIN_EXAMPLES:
            raise ArgumentError(
                f"the probe task {task.name!r} has {positive} examples with and {len(task.labels) - positive} without; "
                f"{MIN_EXAMPLES} of each are needed."
            )


@torch.no_grad()
def probe_loss(hooked: HookedSAEs, name: str, tasks: Sequence[ProbeTask], examples: Examples) -> list[Measure]:
    """The mean over tasks for the latents of one SAE and for the coordinates of x, then each task's own with its latent.

    Args:
        examples: `read_examples(hooked, tasks)[name]`.

    Raises:
        ArgumentError: those of `check_tasks`.
    """
    check_tasks(tasks)
    sae = hooked.saes[name]
    rows: dict[str, list[Tensor]] = {"probe_loss": [], "probe_loss_coordinates": [], "probe_loss_frequency": []}
    single = []
    for task in tasks:
        x, y = examples.of(task)
        finite = x.isfinite().all(-1)
        x, y = x[finite], y[finite]
        test = halves(y)
        latents = best_latent(sae.pre_acts(x), y, test)
        share = y[~test].double().mean()
        frequency = Probes(torch.zeros(1).double(), share.logit()[None]).losses(
            torch.zeros(int(test.sum()), 1), y[test]
        )
        for key, losses in zip(rows, (latents.losses, best_latent(x, y, test).losses, frequency), strict=True):
            rows[key].append(losses.cpu())
        note = f"latent {latents.latent}; by frequency {float(frequency.mean()):.3g}"
        single.append(_mean(f"probe_loss.{task.name}", [latents.losses.cpu()], note=note))
    note = f"{len(tasks)} tasks, last token"
    return [*(_mean(key, losses, note=note) for key, losses in rows.items()), *single]


def _mean(name: str, tasks: Sequence[Tensor], note: str) -> Measure:
    """The mean over tasks of the mean over examples; resampled are examples."""
    weights = torch.cat([torch.full_like(losses, 1 / len(losses)) for losses in tasks])
    top = torch.cat(list(tasks)) * weights
    return ratio(name, "nats", top, weights, of="examples", tokens=len(top), needed=MIN_EXAMPLES, note=note)
