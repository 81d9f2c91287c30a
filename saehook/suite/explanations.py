"""N2G explanations: token patterns that predict where a latent fires (Foote et al. 2023; Gao et al. 2024, section 4.4).

From each of a latent's examples, cut behind the token where it fires:

1. the shortest suffix that still has half of the activation;
2. of its tokens those stay that matter: with another token in its place the activation falls to less than half of the
   suffix's; the others become wildcards;
3. the start of the text belongs to the pattern where a token put before the suffix halves the activation;
4. the tokens go backwards into a trie, with the suffix's activation at the end.

A prediction walks backwards from each token, along a token's own edge where there is one, else along a wildcard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saehook.latent_stats import read_rows
from saehook.suite.measure import Measure, median, ratio
from saehook.suite.sample import AddAction, Sample, ids_of, rows_at_once, window_losses

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs
    from saehook.tokenization import Windows

Activation = Callable[[Sequence[Sequence[int]]], Tensor]
"""A latent's activation on the last token of each row of ids, [rows]."""

ANY, START = -1, -2
"""Edges of the trie that are no token: a wildcard, and the start of the text."""
LONGEST = 32
"""Tokens of the longest suffix; where none has half of the activation, this one is taken."""
AT_ONCE = 8
"""Lengths of suffixes that are tried together."""
MOST_ROWS = 256


@dataclass
class Explanation:
    """A trie of patterns, read from the last token backwards."""

    edges: dict[int, Explanation] = field(default_factory=dict)
    """By id, `ANY` or `START`."""
    value: float | None = None
    """The activation that a pattern which ends here predicts."""

    def predict(self, ids: Sequence[int]) -> Tensor:
        """The predicted activation at each token of a text, [n] float32; 0 where no pattern fits."""
        return torch.tensor([self._at(ids, i) for i in range(len(ids))], dtype=torch.float32)

    def _at(self, ids: Sequence[int], i: int) -> float:
        node = self
        for j in range(i, -1, -1):
            following = node.edges.get(ids[j]) or node.edges.get(ANY)
            if following is None:
                return 0.0
            node = following
            if node.value is not None:
                return node.value
        start = node.edges.get(START)
        return 0.0 if start is None or start.value is None else start.value


def explain(activation: Activation, examples: Sequence[Sequence[int]], filler: int) -> Explanation:
    """The explanation of a latent from texts that end where it fires.

    Args:
        activation: of that latent; see `of_latent`.
        examples: ids of each text up to its firing token.
        filler: the id that takes the place of tokens: one that means little.
    """
    root = Explanation()
    whole = activation(examples).tolist() if examples else []
    firing = [(list(example), act) for example, act in zip(examples, whole, strict=True) if act > 0]
    if not firing:
        return root
    suffixes = _shortest(activation, firing)
    rows = [row for suffix, _ in suffixes for row in [*_with_filler(suffix, filler), [filler, *suffix]]]
    values = iter(activation(rows).tolist())
    for (suffix, value), (_, act) in zip(suffixes, firing, strict=True):
        pattern = [token if 1 - next(values) / value >= 0.5 else ANY for token in suffix]
        if next(values) / act < 0.5:
            pattern.insert(0, START)
        node = root
        for token in reversed(pattern):
            node = node.edges.setdefault(token, Explanation())
        node.value = value
    return root


def _with_filler(suffix: list[int], filler: int) -> list[list[int]]:
    """The suffix once with each of its tokens replaced."""
    return [[*suffix[:i], filler, *suffix[i + 1 :]] for i in range(len(suffix))]


def _shortest(activation: Activation, firing: Sequence[tuple[list[int], float]]) -> list[tuple[list[int], float]]:
    """For each example and its activation the shortest suffix that has half of it, and the suffix's activation."""
    found = [(example[-LONGEST:], act) for example, act in firing]
    left = list(range(len(firing)))
    for first in range(1, LONGEST + 1, AT_ONCE):
        tried = [
            (i, firing[i][0][-n:]) for i in left for n in range(first, min(first + AT_ONCE, len(firing[i][0]) + 1))
        ]
        if not tried:
            break
        open_now = set(left)
        for (i, suffix), value in zip(tried, activation([suffix for _, suffix in tried]).tolist(), strict=True):
            if i in open_now and value / firing[i][1] >= 0.5:
                found[i] = (suffix, value)
                open_now.remove(i)
        left = sorted(open_now)
    return found


def of_latent(hooked: HookedSAEs, name: str, latent: int) -> Activation:
    """The activation of a latent of an attached SAE, each row behind a BOS where the tokenizer has one."""
    bos = [] if hooked.tokenizer.bos_token_id is None else [hooked.tokenizer.bos_token_id]
    sae = hooked.saes[name]

    @torch.no_grad()
    def activation(rows: Sequence[Sequence[int]]) -> Tensor:
        found = []
        for start in range(0, len(rows), MOST_ROWS):
            part = [torch.tensor([*bos, *row]) for row in rows[start : start + MOST_ROWS]]
            found.append(sae.encode(read_rows(hooked, part)[name][0][:, -1])[:, latent].float().cpu())
        return torch.cat(found)

    return activation


@dataclass(frozen=True)
class Explained:
    """Explanations of some latents of one SAE and how well they predict on windows that they were not made from."""

    latents: list[int]
    explanations: list[Explanation]
    measures: list[Measure]


@torch.no_grad()
def explanations(
    hooked: HookedSAEs,
    sample: Sample,
    tokens: Windows | Tensor,
    *,
    n_latents: int = 16,
    examples: int = 16,
    seed: int = 0,
) -> Explained:
    """Explain random latents that fire in both halves of the windows from the first half, and test on the second.

    `n2g_recall` = share of the tokens where a latent fires that are predicted; `n2g_precision` = share of the predicted tokens
    where it fires (NaN, left out, without a prediction); medians over latents. `n2g_loss_recovered` = of the loss that
    ablating all these latents costs, the share that the predicted activations give back.

    Args:
        sample: from the same windows.
        examples: of each latent, half of them its largest activations and half random ones.
    """
    ids = ids_of(tokens)[: sample.windows].cpu()
    first = sample.row.cpu() < sample.windows // 2
    latents = _latents_of_both(sample, first, n_latents, seed)
    acts = sample.acts_of(latents.to(sample.x.device)).cpu()
    bos = int(hooked.tokenizer.bos_token_id is not None)
    filler = _filler(hooked)
    made, recalls, precisions = [], [], []
    predicted = torch.zeros_like(acts)
    test_rows = range(sample.windows // 2, sample.windows)
    for i, latent in enumerate(latents.tolist()):
        places = _examples(acts[:, i] * first, examples, seed)
        texts = [ids[sample.row[p], bos : sample.column[p] + 1].tolist() for p in places.tolist()]
        explanation = explain(of_latent(hooked, sample.site, latent), texts, filler)
        made.append(explanation)
        by_place = {row: explanation.predict(ids[row, bos:].tolist()) for row in test_rows}
        for p in (~first).nonzero()[:, 0].tolist():
            predicted[p, i] = by_place[int(sample.row[p])][int(sample.column[p]) - bos]
        fires, said = acts[~first, i] > 0, predicted[~first, i] > 0
        recalls.append(float((fires & said).sum()) / int(fires.sum()))
        precisions.append(float((fires & said).sum()) / int(said.sum()) if said.any() else float("nan"))
    tested = int((~first).sum())
    measures = [
        median("n2g_recall", "of the firings", torch.tensor(recalls), of="latents", tokens=tested),
        median("n2g_precision", "of the predictions", torch.tensor(precisions), of="latents", tokens=tested),
        _recovered(hooked, sample, ids, ~first, latents, acts, predicted),
    ]
    return Explained(latents.tolist(), made, measures)


def _latents_of_both(sample: Sample, first: Tensor, n: int, seed: int) -> Tensor:
    fires = torch.zeros(2, sample.sae.d_sae, dtype=torch.bool)
    for part in sample.parts():
        acts = (sample.sae.encode(sample.x[part]) > 0).cpu()
        fires[0] |= acts[first[part]].any(0)
        fires[1] |= acts[~first[part]].any(0)
    both = fires.all(0).nonzero()[:, 0]
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))[:n]].sort().values


def _examples(acts: Tensor, n: int, seed: int) -> Tensor:
    """Tokens with the n/2 largest activations [tokens] and as many random ones that are above 0."""
    top = acts.topk(min(n // 2, len(acts))).indices
    active = (acts > 0).nonzero()[:, 0]
    drawn = active[torch.randperm(len(active), generator=torch.Generator().manual_seed(seed))[: n - n // 2]]
    chosen = torch.cat([top, drawn]).unique()
    return chosen[acts[chosen] > 0]


def _filler(hooked: HookedSAEs) -> int:
    """The id of " _", or of its last token."""
    return hooked.tokenizer(" _", add_special_tokens=False)["input_ids"][-1]


def _recovered(
    hooked: HookedSAEs, sample: Sample, ids: Tensor, tested: Tensor, latents: Tensor, acts: Tensor, predicted: Tensor
) -> Measure:
    """Explanation reconstruction: the loss with the explained latents at 0, and at what was predicted, error kept."""
    writes = hooked.attached[sample.site].writes
    W_dec = sample.sae.W_dec.detach()[latents.to(sample.sae.device)].float().cpu()
    scale = sample.sae.scale(sample.x)
    factor = torch.ones(len(acts), 1) if scale is None else scale.float().cpu()
    counted = torch.zeros(ids.shape, dtype=torch.bool)
    counted[sample.row[tested].cpu(), sample.column[tested].cpu()] = True
    row, column = sample.row.cpu(), sample.column.cpu()
    size = rows_at_once(hooked, ids.shape[1])
    lost, back = [], []
    for start in range(sample.windows // 2, sample.windows, size):
        stop = min(start + size, sample.windows)
        here = (row >= start) & (row < stop)

        def loss(new: Tensor | None, start: int = start, stop: int = stop, here: Tensor = here) -> Tensor:
            delta = None if new is None else ((new - acts)[here] * factor[here]) @ W_dec
            actions = {} if delta is None else {writes: AddAction(row[here] - start, column[here], delta)}
            return window_losses(hooked, ids[start:stop], counted[start:stop], actions)

        ablated = loss(torch.zeros_like(acts))
        lost.append(ablated - loss(None))
        back.append(ablated - loss(predicted))
    n = max(1, int(counted[:, :-1].sum()))
    whole, part = torch.cat(lost), torch.cat(back)
    note = f"ablating {len(latents)} latents costs {float(whole.sum()) / n:.3g} nats per token"
    return ratio("n2g_loss_recovered", "of the loss", part, whole, of="windows", tokens=n, note=note)
