"""Draw how the cost of a step grows, and where its time goes, from what `bench_train_step.py` recorded: SVG beside the numbers.

python tests/bench/plots.py        (needs matplotlib: pip install -e '.[plots]')
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("RESULTS")
sys.path.append(str(Path(__file__).resolve().parents[2] / "demos"))

from reproduction.outcome import Outcome, Plot, Series  # noqa: E402
from reproduction.plots import draw  # noqa: E402

NAMES = {"d_sae": "latents", "k": "k", "batch": "tokens a step", "saes": "SAEs, trained together"}


def newest(pattern: str) -> Path:
    return sorted(RESULTS.glob(pattern))[-1]


def growth(entries: list[dict[str, Any]]) -> list[Plot]:
    """Milliseconds of a step and of its encoder products, for each thing that was varied."""
    plots = []
    for varied, name in NAMES.items():
        some = [e for e in entries if e["varied"] == varied]
        x = [float(e[varied]) for e in some]
        curves = [
            Series("a step", x, [1000 * e["seconds"] for e in some]),
            Series("the encoder's product alone", x, [1000 * e["seconds_encoder_product"] for e in some]),
        ]
        rest = {key: some[0][key] for key in NAMES if key != varied and (key != "saes" or some[0][key] > 1)}
        at = ", ".join(f"{NAMES[key].partition(',')[0]} {value:,}" for key, value in rest.items())
        plots.append(Plot(f"TopK, {at}", name, "ms", curves, log_x=True, log_y=True))
    return plots


def profile(entries: list[dict[str, Any]], part: str, batch: int) -> Plot:
    """Where the seconds of a step go, by method, in encoder products of the same run."""
    some = [e for e in entries if e["batch"] == batch and "many" not in e["what"] and "profile" in e]
    names = list(some[0]["profile"][part])
    series = [
        Series(
            name,
            [float(i) for i in range(len(some))],
            [e["profile"][part][name] / e["seconds_encoder_product"] for e in some],
        )
        for name in names
    ]
    title = f"{batch:,} tokens a step, by {part.removesuffix('s')}"
    return Plot(title, "", "encoder products", series, ticks=[e["what"] for e in some])


def main() -> None:
    file = newest("train_growth_cpu*.json")
    draw(Outcome([], growth(json.loads(file.read_text()))), file.with_suffix(".svg"))
    file = newest("train_step_cpu*.json")
    entries = json.loads(file.read_text())
    draw(Outcome([], [profile(entries, part, 4096) for part in ("stages", "operations")]), file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
