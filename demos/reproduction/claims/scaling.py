"""More latents, more of them active."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from reproduction.bootstrap import Sums, Table
from reproduction.claims.latents import NO_MODEL
from reproduction.claims.ratios import delta_ce, finding, fvu, kl, measured, seeds_finding
from reproduction.data import LanguageModel, Site
from reproduction.laboratory import Lab
from reproduction.measure import sample, spliced
from reproduction.outcome import Finding, Outcome, Plot, Series
from reproduction.registry import arms, claim, methods
from reproduction.runner import Run
from saehook import HookedModel
from saehook.suite.compute_equivalent import checkpoint_losses, compute_equivalent_loss

SIZES = {"stories": ((64, 128, 256, 512), (4, 8, 16)), "bundled": ((128, 256, 512, 1024), (8, 16, 32))}
FULL_SIZES = {
    "stories": ((256, 512, 1024, 2048, 4096), (4, 8, 16, 32)),
    "bundled": ((1024, 2048, 4096, 8192, 16384), (8, 16, 32, 64)),
}
HELD_OUT_CELL = -2, 1
"""The cell (place of n, place of k) that the fit does not see."""


def _grid(lab: Lab, site: Site, times: int = 1) -> dict[tuple[int, int], list[Run]]:
    ns, ks = (FULL_SIZES if lab.full else SIZES)[site.lm.name]
    tokens = times * lab.size(site).tokens // (1 if lab.full else 2)
    return {(n, k): lab.runs(site, "topk", d_sae=n, k=k, tokens=tokens) for n in ns for k in ks}


def _grids(lab: Lab, site: Site) -> dict[tuple[int, int, int], list[Run]]:
    """The same with twice the tokens besides, to see what more training does to the law; of the smallest model only."""
    twice = (1, 2) if site.lm.name == "stories" else (1,)
    return {(*cell, times): runs for times in twice for cell, runs in _grid(lab, site, times).items()}


def _grid_places(lab: Lab) -> list[Site]:
    return [site for site in lab.residual() if lab.trained_here(site)]


def _design(cells: list[tuple[int, int]]) -> Tensor:
    """1, ln k, ln n, ln k · ln n of each cell, [cells, 4]; logarithms less their means."""
    n, k = (torch.tensor([float(cell[i]) for cell in cells]).double().log() for i in (0, 1))
    return torch.stack([torch.ones_like(n), k, n, k * n], 1)


@claim(
    "scaling-laws",
    source="Gao et al. 2024, section 3 (L(n) and L(n, k))",
    says="The error falls as a power of the number of latents n at fixed k, and faster where k is larger.",
    shown="ln FVU = α + β_k ln k + β_n ln n + γ ln k ln n, fitted without one cell, explains more than 98 % of its variance; "
    "the slope in ln n at the middle k is negative; γ is negative; the left-out cell is predicted to 5 %.",
    trains=arms(_grids, _grid_places),
    remark="the error is a power of n, nearly, and the left-out cells are predicted; but it falls more slowly where k is larger, "
    "in both models, and twice the tokens (tried on stories260K) do not turn that round.",
)
def scaling_laws(lab: Lab) -> Outcome:
    rows, plots = [], []
    for site in _grid_places(lab):
        found, plot = _laws(lab, site)
        rows += found
        plots.append(plot)
    note = (
        "Each SAE has the same tokens, so wide ones are further from convergence than the paper's, which are trained until the "
        "loss stops falling; its fit has a second, irreducible term besides."
    )
    return Outcome(rows, plots, [note]) if rows else Outcome([], untestable=NO_MODEL)


def _laws(lab: Lab, site: Site) -> tuple[list[Finding], Plot]:
    grids = lab.train(_grids(lab, site))
    cells = [cell[:2] for cell in grids if cell[2] == 1]
    ns, ks = sorted({n for n, _ in cells}), sorted({k for _, k in cells})
    left_out = ns[HELD_OUT_CELL[0]], ks[HELD_OUT_CELL[1]]
    fitted = [cell for cell in cells if cell != left_out]
    by_tokens: dict[int, dict[str, list[Table]]] = {}
    for (n, k, times), saes in grids.items():
        by_tokens.setdefault(times, {})[f"{n} {k}"] = lab.tables(saes, site, loss=False)
    tables = by_tokens[1]
    design = _design(fitted)
    solve = torch.linalg.pinv(design)

    def logs(s: Sums, which: list[tuple[int, int]]) -> Tensor:
        return torch.stack([fvu(f"{n} {k}")(s).log() for n, k in which], 1)

    def coefficients(s: Sums) -> Tensor:
        return logs(s, fitted) @ solve.T

    def r2(s: Sums) -> Tensor:
        y = logs(s, fitted)
        rest = y - coefficients(s) @ design.T
        return 1 - rest.square().sum(1) / (y - y.mean(1, keepdim=True)).square().sum(1)

    def predicted(s: Sums) -> Tensor:
        return (coefficients(s) @ _design([left_out])[0] - logs(s, [left_out])[:, 0]).exp()

    middle = ks[len(ks) // 2]
    words = f"left-out cell n = {left_out[0]}, k = {left_out[1]}: FVU predicted / measured"
    rows = [
        finding(site, "R² of the fit of ln FVU", tables, r2, above=0.98),
        finding(site, f"slope in ln n at k = {middle}", tables, _exponent(coefficients, middle), below=0.0),
        finding(site, "γ", tables, lambda s: coefficients(s)[:, 3], below=0.0),
        finding(site, words, tables, predicted, above=0.95, below=1.05),
    ]
    rows += [finding(site, f"exponent of n at k = {k}", tables, _exponent(coefficients, k)) for k in ks]
    for times, others in by_tokens.items():
        if times > 1:
            rows.append(finding(site, f"R² with {times} times the tokens", others, r2))
            rows.append(finding(site, f"γ with {times} times the tokens", others, lambda s: coefficients(s)[:, 3]))
            rows.append(finding(site, f"{words}, {times} times the tokens", others, predicted))
    return rows, _curves(site, tables, ns, ks, fvu, "FVU")


def _exponent(coefficients: Callable[[Sums], Tensor], k: int) -> Callable[[Sums], Tensor]:
    return lambda s: coefficients(s)[:, 2] + coefficients(s)[:, 3] * math.log(k)


def _curves(site: Site, tables: dict, ns: list[int], ks: list[int], number: Callable, what: str) -> Plot:
    series = []
    for k in ks:
        points = [finding(site, "", tables, number(f"{n} {k}")) for n in ns]
        ends = [[getattr(p, part) for p in points] for part in ("value", "low", "high")]
        series.append(Series(f"k = {k}", [float(n) for n in ns], *ends))
    return Plot(f"{what} by n and k, {site.words.replace('`', '')}", "latents n", what, series, log_x=True, log_y=True)


@claim(
    "larger-is-better",
    source="Gao et al. 2024, section 4.1",
    says="More latents, and more of them active, lower the loss of the model with the reconstruction in place.",
    shown="Averaged over the other, from each n to the next and from each k to the next KL and added loss fall.",
    trains=arms(_grid, _grid_places),
)
def larger_is_better(lab: Lab) -> Outcome:
    rows, plots = [], []
    for site in _grid_places(lab):
        found, plot = _larger(lab, site)
        rows += found
        plots.append(plot)
    return Outcome(rows, plots) if rows else Outcome([], untestable=NO_MODEL)


def _larger(lab: Lab, site: Site) -> tuple[list[Finding], Plot]:
    grid = lab.train(_grid(lab, site))
    ns, ks = sorted({n for n, _ in grid}), sorted({k for _, k in grid})
    tables = {f"{n} {k}": lab.tables(saes, site) for (n, k), saes in grid.items()}

    def worst(number: Callable[[str], Callable[[Sums], Tensor]], by_n: bool) -> Callable[[Sums], Tensor]:
        def statistic(s: Sums) -> Tensor:
            steps, others = (ns, ks) if by_n else (ks, ns)
            cell = (lambda a, b: f"{a} {b}") if by_n else (lambda a, b: f"{b} {a}")
            means = torch.stack([sum(number(cell(a, b))(s) for b in others) / len(others) for a in steps])  # type: ignore[arg-type]
            return (means[1:] / means[:-1]).amax(0)

        return statistic

    rows = []
    for name, number in (("KL", kl), ("added loss", delta_ce)):
        for by_n in (True, False):
            quantity = f"{name}, largest ratio from one {'n' if by_n else 'k'} to the next"
            rows.append(finding(site, quantity, tables, worst(number, by_n), below=1.0))
    return rows, _curves(site, tables, ns, ks, kl, "KL, nats per token")


def _with_checkpoints(lab: Lab) -> list[Site]:
    """Where checkpoints of the model's training are there."""
    return [
        site for site in lab.residual() if site.lm.name == "bundled" and (lab.planning or site.lm.places.checkpoints)
    ]


@claim(
    "compute-equivalent",
    source="Gao et al. 2024, section 4.1",
    says="The loss with the reconstruction in place equals that of a model trained with a share of the compute, which is far less "
    "than the share of loss that is recovered against zero ablation.",
    shown="The share of the model's own training whose loss is the spliced one, from its checkpoints, is below the share of loss "
    "recovered against zero ablation, in every seed.",
    trains=methods("topk", on=_with_checkpoints),
)
def compute_equivalent(lab: Lab) -> Outcome:
    rows = []
    notes = []
    for site in _with_checkpoints(lab):
        saes = lab.arms(site, "topk")["topk"]
        longer = site.longer()
        held = longer.held_out()
        assert held.ids is not None
        zero = spliced(longer.lm, site.site, held, torch.zeros_like(held.x[held.mask]))
        found, recovered, losses = [], [], None
        for sae, table in zip(saes, lab.tables(saes, longer), strict=True):
            hooked = site.lm.model.attach({site.site: sae})
            try:
                losses = losses or checkpoint_losses(hooked, _checkpoints(site.lm), held.ids)
                found += compute_equivalent_loss(hooked, sample(sae, longer), held.ids, losses)
            finally:
                hooked.detach()
            recovered.append(1 - float(table["delta_ce"].sum() / zero["delta_ce"].sum()))
        rows.append(measured(site, found, "share of the training whose loss is the spliced one"))
        rows.append(seeds_finding(site, "share of loss recovered against zero", recovered))
        gaps = [share.value - other for share, other in zip(found, recovered, strict=True)]
        rows.append(seeds_finding(site, "share of the training, less recovered", gaps, below=0.0))
        steps = ", ".join(f"{step / 1e6:.1f} M" for step in losses or {})
        notes = [
            f"The model's own checkpoints at {steps} tokens, each at the end of a decay of the learning rate; linear in the "
            "logarithm of the tokens between them. The bound was set when it was known that the loss of another SAE, spliced in, "
            "lies between those of the last two."
        ]
    return Outcome(rows, notes=notes) if rows else Outcome([], untestable=NO_CHECKPOINTS)


NO_CHECKPOINTS = (
    "There were no checkpoints of the bundled model's training (`--lm-checkpoints`); stories260K comes without. "
    "`saehook.suite.compute_equivalent` measures it where there are some (Pythia has 154)."
)


def _checkpoints(lm: LanguageModel) -> Iterator[tuple[float, HookedModel]]:
    for tokens, folder in lm.places.checkpoints:
        yield tokens, HookedModel.from_pretrained(folder)
