"""What single latents do and mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from reproduction.bootstrap import Sums, Table
from reproduction.claims.ratios import exact, finding, measured, over, seeds_finding
from reproduction.data import Site
from reproduction.laboratory import Lab
from reproduction.measure import sample
from reproduction.outcome import Outcome, Plot, Series
from reproduction.registry import arms, claim, methods
from reproduction.runner import Run
from saehook import SAE, corpus
from saehook.suite.ablation_sparsity import HORIZON, _ablations, _scores, effect_sparsity
from saehook.suite.attribution_accuracy import attribution_accuracy
from saehook.suite.explanations import explanations
from saehook.suite.probe_loss import probe_loss, read_examples
from saehook.suite.probe_tasks import make_tasks

NO_MODEL = "There is no language model among the data."
ROWS = {"stories": 64, "bundled": 16}
"""Sequences whose latents are ablated one by one; fewer of the largest model."""
TOKENS = {"stories": 96, "bundled": 24}
"""Tokens at which latents are ablated, for each seed; fewer of the largest model."""
KINDS = ("latents", "coordinates", "random directions")
N2G_LATENTS = 96
EXAMPLES = 800
"""Of a probe task, at most."""


def _python(lab: Lab) -> list[Site]:
    """Where the model knows what the tasks are about."""
    return [site for site in lab.residual() if site.lm.name == "bundled"]


def _n2g_ks(lab: Lab, site: Site) -> dict[int, list[Run]]:
    k = lab.size(site).k
    return {k: lab.runs(site, "topk", k=k) for k in (k // 2, k, 2 * k)}


@claim(
    "ablation-sparsity",
    source="Gao et al. 2024, section 4.5",
    says="Ablating a latent moves few logits; ablating a coordinate of the activation moves many a little, as noise does.",
    shown="(‖v‖₁ / ‖v‖₂)² / (V·T) of latents is below that of coordinates and of random directions of the same length; "
    "of Gaussian noise it is 2/π.",
    trains=methods("topk", on=Lab.residual),
    remark="in both models whatever is taken off has far sparser effects than noise, and which tokens are looked at matters more "
    "than what is taken off. On stories260K latents are a little sparser than both others, on the bundled model they are not; nor "
    "are those of its own SAEs, wider and trained longer (checkpoints/suite.md).",
)
def sparse_effects(lab: Lab) -> Outcome:
    noise = float(effect_sparsity(torch.randn(HORIZON, 4096, generator=torch.Generator().manual_seed(0))))
    rows = [exact("Gaussian noise", "sparsity", noise, above=2 / math.pi - 0.01, below=2 / math.pi + 0.01)]
    for site in lab.residual():
        saes = lab.arms(site, "topk")["topk"]
        tables = {"all": [_effects(site, sae, seed) for seed, sae in zip(lab.seeds, saes, strict=True)]}

        def mean(kind: str) -> Callable[[Sums], Tensor]:
            return lambda s: s["all"][kind] / s["all"][f"n {kind}"]

        rows += [finding(site, f"sparsity, {kind}", tables, mean(kind)) for kind in KINDS]
        for kind in KINDS[1:]:
            rows.append(finding(site, f"latents / {kind}", tables, over(mean("latents"), mean(kind)), below=1.0))
    if len(rows) == 1:
        return Outcome([], untestable=NO_MODEL)
    notes = [
        f"At {TOKENS['stories']} random tokens for each seed ({TOKENS['bundled']} of the bundled model); T = {HORIZON}. Latents, "
        "coordinates and random directions as long as the latents' contributions are taken off at the same tokens, and drawn again "
        "are tokens and seeds. At first random directions were taken off at 8 tokens of their own, and their interval was over "
        "directions: another 8 tokens turned the result round, so that was mended."
    ]
    return Outcome(rows, notes=notes)


@torch.no_grad()
def _effects(site: Site, sae: SAE, seed: int) -> Table:
    """By kind, sums of the sparsity of what is taken off at a token, and how much of it has an effect; [tokens] each."""
    held = site.held_out()
    assert held.ids is not None
    taken = sample(sae, site)
    generator = torch.Generator().manual_seed(seed)
    fits = (taken.column + HORIZON <= held.ids.shape[1]).nonzero()[:, 0]
    hooked = site.lm.model.attach({site.site: sae})
    found: dict[str, list[float]] = {f"{n}{kind}": [] for n in ("", "n ") for kind in KINDS}
    try:
        for i in fits[torch.randperm(len(fits), generator=generator)[: TOKENS[site.lm.name]]].tolist():
            vectors = _ablations(taken, i, generator)
            anywhere = F.normalize(torch.randn(vectors["latents"].shape, generator=generator), dim=-1)
            vectors["random directions"] = anywhere * torch.linalg.vector_norm(vectors["latents"], dim=-1, keepdim=True)
            for kind in KINDS:
                scores = _scores(hooked, taken, held.ids[taken.row[i]], int(taken.column[i]), vectors[kind])
                found[kind].append(float(scores.nansum()))
                found[f"n {kind}"].append(float((~scores.isnan()).sum()))
    finally:
        hooked.detach()
    return {name: torch.tensor(values).double() for name, values in found.items()}


@claim(
    "probe-loss",
    source="Gao et al. 2024, section 4.2",
    says="For many properties of text there is one latent that tells them better than any coordinate of the activation.",
    shown="The cross-entropy of the best one-latent probe, mean over tasks, is below that of the best coordinate.",
    trains=methods("topk", on=_python),
    remark="these SAEs have few latents and saw few tokens. In checkpoints/suite.md, which has the same metric for the bundled "
    "ones, wider and trained longer, it is the latents that tell more.",
)
def probes(lab: Lab) -> Outcome:
    if not (sites := _python(lab)):
        return Outcome([], untestable="The tasks are about Python source, which only the bundled model knows.")
    (site,) = sites
    tasks = make_tasks(corpus.read_documents(corpus.held_out_files()), examples=EXAMPLES)
    saes = lab.arms(site, "topk")["topk"]
    found: dict[str, list] = {}
    examples = None
    for sae in saes:
        hooked = site.lm.model.attach({site.site: sae})
        try:
            examples = examples or read_examples(hooked, tasks)[site.site]
            for measure in probe_loss(hooked, site.site, tasks, examples)[:3]:
                found.setdefault(measure.name, []).append(measure)
        finally:
            hooked.detach()
    rows = [measured(site, measures, f"{name}, nats") for name, measures in found.items()]
    ratios = [a.value / b.value for a, b in zip(found["probe_loss"], found["probe_loss_coordinates"], strict=True)]
    rows.append(seeds_finding(site, "probe loss, latents / coordinates", ratios, below=1.0))
    note = (
        f"{len(tasks)} tasks whose answers are certain, of up to {EXAMPLES} examples; 160 at first, of which probes learnt too "
        f"little to tell more than the frequency: {', '.join(task.name for task in tasks)}."
    )
    return Outcome(rows, notes=[note])


@claim(
    "n2g",
    source="Gao et al. 2024, section 4.3",
    says="Token patterns (N2G) explain latents; with larger k recall rises and precision falls.",
    shown="From the smallest k to the largest, recall rises and precision falls in every seed.",
    trains=arms(_n2g_ks, Lab.residual),
    remark="both are medians over latents, and precision is at or near its ceiling, where little can fall.",
)
def n2g(lab: Lab) -> Outcome:
    rows, plots = [], []
    for site in lab.residual():
        held = site.held_out()
        assert held.ids is not None
        saes = lab.train(_n2g_ks(lab, site))
        ks = list(saes)
        found: dict[tuple[str, int], list] = {}
        for k, ones in saes.items():
            for seed, sae in zip(lab.seeds, ones, strict=True):
                hooked = site.lm.model.attach({site.site: sae})
                try:
                    measures = explanations(
                        hooked, sample(sae, site), held.ids, n_latents=N2G_LATENTS, examples=8, seed=seed
                    ).measures
                finally:
                    hooked.detach()
                for measure in measures:
                    found.setdefault((measure.name, k), []).append(measure)
        names = list(dict.fromkeys(name for name, _ in found))
        for name in names:
            rows += [measured(site, found[name, k], f"{name}, k = {k}") for k in ks]
        for name, bound in (("recall", {"above": 0.0}), ("precision", {"below": 0.0})):
            full = next(n for n in names if name in n)
            gaps = [a.value - b.value for a, b in zip(found[full, ks[-1]], found[full, ks[0]], strict=True)]
            rows.append(seeds_finding(site, f"{full}, k = {ks[-1]} less k = {ks[0]}", gaps, **bound))
        series = []
        for name in [n for n in names if "recall" in n or "precision" in n]:
            points = [measured(site, found[name, k]) for k in ks]
            ends = [[getattr(p, part) for p in points] for part in ("value", "low", "high")]
            series.append(Series(name, [float(k) for k in ks], *ends))
        plots.append(Plot(f"N2G by k, {site.words.replace('`', '')}", "k", "", series, log_x=True))
    note = (
        f"{N2G_LATENTS} random latents and 8 examples of each, for each k and seed; tested on other sequences. 12 latents at "
        "first, which decided nothing."
    )
    return Outcome(rows, plots, [note]) if rows else Outcome([], untestable=NO_MODEL)


@claim(
    "attribution",
    source="Marks et al. 2024, section 3; Syed et al. 2023",
    says="First-order attribution approximates what ablating a latent does.",
    shown="Over all active latents on every token, the Pearson correlation of predicted and measured effects is above 0.9, "
    "the rank correlation above 0.8, for each seed.",
    trains=methods("topk", on=lambda lab: lab.sites),
    remark="in the residual stream the Pearson correlation lies near its bound, where a few large effects decide.",
)
def attribution(lab: Lab) -> Outcome:
    rows = []
    for site in lab.sites:
        found: dict[str, list] = {}
        held = site.held_out()
        assert held.ids is not None
        for sae in lab.arms(site, "topk")["topk"]:
            hooked = site.lm.model.attach({site.site: sae})
            try:
                for measure in attribution_accuracy(hooked, held.ids, n_rows=ROWS[site.lm.name])[site.site]:
                    found.setdefault(measure.name, []).append(measure)
            finally:
                hooked.detach()
        for name, measures in found.items():
            rows.append(measured(site, measures, name, above=0.9 if "pearson" in name else 0.8))
    note = (
        f"Effects on the log-probability of the true next token, on {ROWS['stories']} sequences ({ROWS['bundled']} of the bundled "
        "model); 4 at first, which decided nothing."
    )
    return Outcome(rows, notes=[note]) if rows else Outcome([], untestable=NO_MODEL)
