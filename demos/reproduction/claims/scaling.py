"""More latents, more of them active."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from reproduction.bootstrap import Sums
from reproduction.claims.ratios import delta_ce, finding, fvu, kl
from reproduction.data import Site
from reproduction.laboratory import Lab
from reproduction.outcome import Outcome, Plot, Series
from reproduction.registry import claim
from saehook import SAE

SIZES = {"stories": ((64, 128, 256, 512), (4, 8, 16))}
FULL_SIZES = {
    "stories": ((512, 1024, 2048, 4096, 8192), (4, 8, 16, 32)),
}
HELD_OUT_CELL = -2, 1
"""The cell (place of n, place of k) that the fit does not see."""

Grid = dict[tuple[int, int], list[SAE]]


def _grid(lab: Lab, site: Site) -> Grid:
    ns, ks = (FULL_SIZES if lab.form == "full" else SIZES)[site.lm.name]
    cells = {(n, k): lab.runs(site, "topk", d_sae=n, k=k, tokens=lab.size(site).tokens // 2) for n in ns for k in ks}
    return lab.train(cells)


def _site(lab: Lab) -> Site | None:
    """The residual stream of the smallest model that is there."""
    found = lab.residual()
    return next((site for site in found if site.lm.name == "stories"), None)


NO_MODEL = "The grid is trained on stories260K, which was not there; on the bundled model it is too many runs."


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
)
def scaling_laws(lab: Lab) -> Outcome:
    site = _site(lab)
    if site is None:
        return Outcome([], untestable=NO_MODEL)
    grid = _grid(lab, site)
    cells = list(grid)
    ns, ks = sorted({n for n, _ in cells}), sorted({k for _, k in cells})
    left_out = ns[HELD_OUT_CELL[0]], ks[HELD_OUT_CELL[1]]
    fitted = [cell for cell in cells if cell != left_out]
    tables = {f"{n} {k}": lab.tables(saes, site, loss=False) for (n, k), saes in grid.items()}
    design = _design(fitted)
    solve = torch.linalg.pinv(design)

    def logs(s: Sums, which: list[tuple[int, int]]) -> Tensor:
        return torch.stack([fvu(f"{n} {k}")(s).log() for n, k in which], 1)

    def coefficients(s: Sums) -> Tensor:
        return logs(s, fitted) @ solve.T

    middle = math.log(ks[len(ks) // 2])

    def slope(s: Sums) -> Tensor:
        c = coefficients(s)
        return c[:, 2] + c[:, 3] * middle

    def r2(s: Sums) -> Tensor:
        y = logs(s, fitted)
        rest = y - coefficients(s) @ design.T
        return 1 - rest.square().sum(1) / (y - y.mean(1, keepdim=True)).square().sum(1)

    def predicted(s: Sums) -> Tensor:
        return (coefficients(s) @ _design([left_out])[0] - logs(s, [left_out])[:, 0]).exp()

    words = f"left-out cell n = {left_out[0]}, k = {left_out[1]}: FVU predicted / measured"
    rows = [
        finding(site, "R² of the fit of ln FVU", tables, r2, above=0.98),
        finding(site, f"slope in ln n at k = {ks[len(ks) // 2]}", tables, slope, below=0.0),
        finding(site, "γ", tables, lambda s: coefficients(s)[:, 3], below=0.0),
        finding(site, words, tables, predicted, above=0.95, below=1.05),
    ]
    return Outcome(
        rows,
        [_curves(site, tables, ns, ks, fvu, "FVU")],
        [
            f"{len(cells)} cells; each SAE has the same tokens, so wide "
            "ones are further from convergence than the paper's, which are trained until the loss stops falling."
        ],
    )


def _curves(site: Site, tables: dict, ns: list[int], ks: list[int], number: Callable, what: str) -> Plot:
    series = []
    for k in ks:
        points = [finding(site, "", tables, number(f"{n} {k}")) for n in ns]
        ends = [[getattr(p, part) for p in points] for part in ("value", "low", "high")]
        series.append(Series(f"k = {k}", [float(n) for n in ns], *ends))
    return Plot(f"{what} by n and k", "latents n", what, series, log_x=True, log_y=True)


@claim(
    "larger-is-better",
    source="Gao et al. 2024, section 4.1",
    says="More latents, and more of them active, lower the loss of the model with the reconstruction in place.",
    shown="Averaged over the other, from each n to the next and from each k to the next KL and added loss fall.",
)
def larger_is_better(lab: Lab) -> Outcome:
    site = _site(lab)
    if site is None:
        return Outcome([], untestable=NO_MODEL)
    grid = _grid(lab, site)
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
    return Outcome(rows, [_curves(site, tables, ns, ks, kl, "KL, nats per token")])


@claim(
    "compute-equivalent",
    source="Gao et al. 2024, section 4.1",
    says="The loss with the reconstruction in place equals that of a model trained with a share of the compute.",
    shown="The share of the model's own training whose loss is the spliced one, from its checkpoints.",
)
def compute_equivalent(lab: Lab) -> Outcome:
    return Outcome(
        [],
        untestable="Neither model here comes with checkpoints of its training. `saehook.suite.compute_equivalent` measures it "
        "where there are some (Pythia has 154); that needs a download and an accelerator.",
    )
