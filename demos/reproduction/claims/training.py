"""What training does: dead latents, unit rows, a code for every k."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reproduction.bootstrap import Sums
from reproduction.claims.ratios import bars, exact, finding, fvu, over, seeds_finding
from reproduction.data import SEQUENCE, SEQUENCES, Data, HeldOut, Planted
from reproduction.laboratory import Lab
from reproduction.measure import fidelity
from reproduction.outcome import Outcome, Plot, Series
from reproduction.registry import arms, claim, methods, nothing
from reproduction.runner import Run
from saehook import SAE
from saehook.batches import InputFacts
from saehook.sae_run import SAERun
from saehook.suite.progressive_code import with_topk

WIDTHS = {"planted": 512, "stories": 2048, "bundled": 4096}
"""Latents of the dead-latent runs: 16 to 32 times the width of x."""
CELLS = {
    "tied, AuxK": (False, None),
    "tied, no AuxK": (False, 0.0),
    "untied, AuxK": (True, None),
    "untied, no AuxK": (True, 0.0),
}


def _dead_places(lab: Lab) -> list[Data]:
    """Planted data with a large offset, where little error is left and where much is: few directions and many."""
    planted = [Planted(offset=3.0), Planted(offset=3.0, features=1024, mean=12)]
    return [*(planted if lab.planted else []), *lab.residual()]


def _dead_cells(lab: Lab, data: Data) -> dict[str, list[Run]]:
    size = {"d_sae": WIDTHS["planted" if isinstance(data, Planted) else data.lm.name], "tokens": _half(lab, data)}
    return {
        name: lab.runs(
            data, "topk", untied=apart, **size, **({} if coefficient is None else {"auxk_coefficient": coefficient})
        )
        for name, (apart, coefficient) in CELLS.items()
    }


def _half(lab: Lab, data: Data) -> int:
    """Tokens of the runs of a table."""
    return lab.size(data).tokens // 2


def _code_places(lab: Lab) -> list[Data]:
    return [*lab.planted, *filter(lab.trained_here, lab.residual())]


@claim(
    "dead-latents",
    source="Gao et al. 2024, section 2.4 and appendix A.2",
    says="An encoder that starts as the decoder's transpose, and AuxK, leave few latents dead; without them most die.",
    shown="The share of latents that fire on none of the held-out tokens is lower with either than without both, and with both no "
    "higher than with any one of them (to 1 point).",
    trains=arms(_dead_cells, _dead_places),
    remark="where little error is left AuxK leaves more latents dead, not fewer. A likely reason: it trains dead latents to add up "
    "to that error, which is little beside what the others give, so their pre-activations fall and they come less near to firing "
    "(the last rows). Planted data with many directions, where much error is left, were added to see whether that is so, and there "
    "the claim holds. On stories260K hardly a latent dies without AuxK; on the bundled model AuxK changes little.",
)
def dead_latents(lab: Lab) -> Outcome:
    rows = []
    for data in _dead_places(lab):
        saes = lab.train(_dead_cells(lab, data))
        held = data.held_out()
        dead = {name: [fidelity(sae, held)[0].dead_share for sae in ones] for name, ones in saes.items()}
        reaches = {name: [_reach(sae, held) for sae in ones] for name, ones in saes.items()}
        for name, shares in dead.items():
            rows.append(seeds_finding(data, f"dead, {name}", shares))
        both, neither = dead["tied, AuxK"], dead["untied, no AuxK"]
        for name in list(CELLS)[:3]:
            gaps = [a - b for a, b in zip(dead[name], neither, strict=True)]
            rows.append(seeds_finding(data, f"dead: {name}, less neither", gaps, below=0.0))
        for name in list(CELLS)[1:3]:
            gaps = [a - b for a, b in zip(both, dead[name], strict=True)]
            rows.append(seeds_finding(data, f"dead: both, less {name}", gaps, below=0.01))
        for name, values in reaches.items():
            rows.append(
                seeds_finding(data, f"largest pre-activation of a dead latent / smallest activation, {name}", values)
            )
    shares = [row for row in rows if row.quantity in {f"dead, {name}" for name in CELLS}]
    plot = bars("Latents that never fire on held-out tokens", "share", shares)
    notes = [
        f"Dead: fires on none of the {SEQUENCES['planted'] * SEQUENCE:,} held-out tokens ({SEQUENCES['bundled'] * SEQUENCE:,} of "
        "the bundled model). Dead in training, for AuxK: silent for 4 % of the training tokens. The planted data here have a large "
        "offset.",
        "Untied: both matrices are drawn apart, with unit rows; b_dec begins at the mean.",
    ]
    return Outcome(rows, [plot], notes)


@torch.no_grad()
def _reach(sae: SAE, held: HeldOut) -> float:
    """The largest pre-activation that a latent has which fires on no token, over the mean of the smallest activation of each
    token: the median of those latents, NaN where there is none."""
    x = held.x[held.mask]
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    largest, smallest = torch.full((sae.d_sae,), -math.inf), []
    for part in x.split(2048):
        acts = sae.encode(part)
        fired |= (acts > 0).any(0)
        largest = torch.maximum(largest, sae.pre_acts(part).amax(0))
        smallest.append(torch.where(acts > 0, acts, math.inf).amin(1))
    least = torch.cat(smallest)
    return float(largest[~fired].median() / least[least.isfinite()].mean())


@claim(
    "unit-rows",
    source="Gao et al. 2024, appendix A.3; Bricken et al. 2023",
    says="Decoder rows are held at unit length through training.",
    shown="After each of 100 steps every row of a TopK has length 1 to 1e-5.",
    trains=nothing,
)
def unit_rows(lab: Lab) -> Outcome:
    data = Planted()
    worst = []
    for seed in lab.seeds:
        config = lab.config(data, "topk", seed)
        x = data.draw(8192, 5)
        run = SAERun(config, "unit-rows", InputFacts.measure(x, data.site))
        apart = 0.0
        for step in range(100):
            run.step({data.site: x[(step * 64) % 8192 :][:64]})
            apart = max(apart, float((torch.linalg.vector_norm(run.sae.W_dec.detach(), dim=-1) - 1).abs().max()))
        worst.append(apart)
    return Outcome([exact(data, "largest distance of a row's length from 1", max(worst), below=1e-5)])


@claim(
    "multi-topk",
    source="Gao et al. 2024, section 5.3 and appendix A.6",
    says="TopK overfits to its k: beyond it reconstruction gets worse. With a second loss at 4k (Multi-TopK) it goes on "
    "getting better.",
    shown="From k to 4k FVU of TopK rises; that of Multi-TopK falls, and it is below that of TopK at 4k.",
    trains=methods("topk", "multitopk", on=_code_places),
)
def multi_topk(lab: Lab) -> Outcome:
    rows, plots = [], []
    for data in _code_places(lab):
        k = lab.size(data).k
        ks = [k // 2, k, 2 * k, 4 * k, 8 * k]
        saes = lab.arms(data, "topk", "multitopk")
        tables = {
            f"{arm} {j}": lab.tables([with_topk(sae, j) for sae in ones], data, loss=False)
            for arm, ones in saes.items()
            for j in ks
        }

        def ratio(arm: str, j: int, other: str, i: int):
            def statistic(s: Sums) -> Tensor:
                return over(fvu(f"{arm} {j}"), fvu(f"{other} {i}"))(s)

            return statistic

        rows.append(finding(data, "FVU at 4k / at k, topk", tables, ratio("topk", 4 * k, "topk", k), above=1.0))
        rows.append(
            finding(data, "FVU at 4k / at k, multitopk", tables, ratio("multitopk", 4 * k, "multitopk", k), below=1.0)
        )
        rows.append(
            finding(data, "FVU at 4k, multitopk / topk", tables, ratio("multitopk", 4 * k, "topk", 4 * k), below=1.0)
        )
        rows.append(finding(data, "FVU at k, multitopk / topk", tables, ratio("multitopk", k, "topk", k)))
        series = []
        for arm in saes:
            points = [finding(data, arm, tables, fvu(f"{arm} {j}")) for j in ks]
            ends = [[getattr(p, part) for p in points] for part in ("value", "low", "high")]
            series.append(Series(arm, [j / k for j in ks], *ends))
        plots.append(
            Plot(
                f"k' at test time, {data.words.split(' (')[0].replace('`', '')}",
                "k' / k",
                "FVU",
                series,
                log_x=True,
                log_y=True,
            )
        )
    return Outcome(rows, plots)
