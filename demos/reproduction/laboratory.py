"""What a claim is measured with: the data that are there, sizes, and SAEs by method."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from reproduction.bootstrap import Table
from reproduction.data import Data, LanguageModel, Places, Planted, Site
from reproduction.measure import table
from reproduction.runner import Run, Runner
from saehook import SAE, BatchTopK, JumpReLU, ReLU, TopK, TrainConfig
from saehook.config import Method, MultiTopK
from saehook.errors import ArgumentError

Arm = TypeVar("Arm", bound=Hashable)

RESID, MLP = "layers.2.resid_post", "layers.3.mlp_out"
METHODS: dict[str, Any] = {
    "topk": TopK,
    "batchtopk": BatchTopK,
    "multitopk": MultiTopK,
    "relu": ReLU,
    "jumprelu": JumpReLU,
}


@dataclass(frozen=True)
class Size:
    """Of the SAEs on one kind of data."""

    d_sae: int
    k: int
    tokens: int
    batch_tokens: int


SMALL = {
    "planted": Size(128, 4, 200_000, 256),
    "stories": Size(512, 16, 300_000, 512),
    "bundled": Size(1024, 32, 300_000, 512),
}
"""Minutes on a CPU."""
FULL = {
    "planted": Size(128, 4, 3_000_000, 1024),
    "bundled": Size(8192, 32, 50_000_000, 4096),
    "stories": Size(4096, 16, 20_000_000, 4096),
}
"""For an accelerator; give it the whole of TinyStories, of which the second model saw more than the 1,000 stories."""
GIVEN = Size(4096, 32, 5_000_000, 4096)
"""Of demos/compare_methods.py."""
CALIBRATION_TOKENS = 20_000


class Lab:
    """Data, sizes and a runner."""

    def __init__(
        self,
        folder: Path,
        places: Places,
        *,
        full: bool = False,
        seeds: int = 3,
        progress: bool = True,
        only: Sequence[str] = (),
        methods: Path | None = None,
        tokens: int | None = None,
        device: str = "cpu",
        planning: bool = False,
    ) -> None:
        """`only`: some of the data, `planted`, a model or MODEL/SITE; none: all that are there. `methods`: a run of
        demos/compare_methods.py, whose SAEs stand for those of the bundled model's residual stream. `tokens`: at most so many
        for each SAE. `planning`: to say what runs take, without reading any data."""
        self.folder = folder
        self.full = full
        self.planning = planning
        self.sizes = {
            name: size if tokens is None else dataclasses.replace(size, tokens=min(size.tokens, tokens))
            for name, size in (FULL if full else SMALL).items()
        }
        self.seeds = list(range(seeds))
        self.runner = Runner(folder, progress=progress, device=device)
        self.declared: set[str] = set()
        """Keys of the runs that the claim says it takes."""
        names = ["bundled"] + (["stories"] if places.stories_lm is not None else [])
        lms = {n: LanguageModel(n, (RESID, MLP), folder / "activations", places, device=device) for n in names}
        self.only = tuple(only)
        self.lms = {name: lm for name, lm in lms.items() if not only or name in {part.split("/")[0] for part in only}}
        self.given = (
            {} if methods is None else {folder.name: folder for folder in sorted(methods.glob(f"{RESID}-*-seed*"))}
        )
        self.used: dict[str, dict[str, Any]] = {}
        """What was trained on since `begin`, by data."""
        self._tables: dict[tuple[int, str, int, bool], Table] = {}
        self.at_l0: dict[tuple[int, str, float], Table] = {}
        """Tables of SAEs at another L0 than their own, by SAE, data and L0 (`claims.ratios.table_at`)."""

    def begin(self, runs: Sequence[Run]) -> None:
        """A new claim, with the SAEs that it takes."""
        self.used.clear()
        self.declared = {run.key for run in runs}
        self.runner.saes(runs)

    @property
    def planted(self) -> list[Planted]:
        """The default planted data; none where other data were asked for."""
        return [Planted()] if not self.only or "planted" in self.only else []

    @functools.cached_property
    def sites(self) -> list[Site]:
        """The bundled model's two sites, then those of the second model where it is there."""
        return [
            Site(lm, site)
            for lm in self.lms.values()
            for site in lm.sites
            if not self.only or {lm.name, f"{lm.name}/{site}"} & set(self.only)
        ]

    def residual(self) -> list[Site]:
        """One site of each model."""
        return [site for site in self.sites if site.site == RESID]

    @property
    def everywhere(self) -> list[Data]:
        """Planted data and all sites."""
        return [*self.planted, *self.sites]

    def size(self, data: Data) -> Size:
        """Of SAEs on these data."""
        if not self.trained_here(data):
            return GIVEN
        return self.sizes["planted" if isinstance(data, Planted) else data.lm.name]

    def trained_here(self, data: Data) -> bool:
        """Whether there are other SAEs on these data than those that were given."""
        return isinstance(data, Planted) or data.lm.name != "bundled" or data.site != RESID or not self.given

    def config(self, data: Data, method: str, seed: int, *, k: int | None = None, **settings: Any) -> TrainConfig:
        """The default SAE of a method on these data; ReLU and JumpReLU aim at the L0 of the others, unless they get a
        `sparsity_coefficient`."""
        size = self.size(data)
        kind = METHODS[method]
        keeps = method in ("topk", "batchtopk", "multitopk")
        activation: Method = kind(k=k or size.k) if keeps else kind()
        if not keeps and "sparsity_coefficient" not in settings:
            settings.setdefault("target_l0", float(k or size.k))
        defaults: dict[str, Any] = {"d_sae": size.d_sae, "tokens": size.tokens, "batch_tokens": size.batch_tokens}
        defaults["calibration_tokens"] = CALIBRATION_TOKENS
        return TrainConfig(site=data.site, activation=activation, seed=seed, **(defaults | settings))

    def runs(self, data: Data, method: str, *, untied: bool = False, **settings: Any) -> list[Run]:
        """One run for each seed."""
        if not self.trained_here(data):
            return [self._given(data, method, seed) for seed in self.seeds]
        return [Run(data, self.config(data, method, seed, **settings), untied) for seed in self.seeds]

    def _given(self, data: Data, method: str, seed: int) -> Run:
        folder = self.given[f"{RESID}-{method}{GIVEN.k}-{GIVEN.d_sae}-seed{seed}"]
        return Run(data, self.config(data, method, seed), given=folder)

    def train(self, wanted: Mapping[Arm, list[Run]]) -> dict[Arm, list[SAE]]:
        """SAEs of each arm, a list of one for each seed, that the claim has declared."""
        runs = [run for arm in wanted.values() for run in arm]
        if foreign := [run.config for run in runs if run.key not in self.declared]:
            raise ArgumentError(f"{foreign[0]} is none of the runs that the claim declares. Name it in `trains`.")
        saes = iter(self.runner.saes(runs))
        for run in runs:
            facts = {"tokens": run.config.tokens, "d_sae": run.config.d_sae, "seeds": len(self.seeds)}
            self.used.setdefault(run.data.words, {}).setdefault("runs", set()).add(run.key)
            used = self.used[run.data.words]
            for name in ("tokens", "d_sae"):
                used.setdefault(name, set()).add(facts[name])
        return {arm: [next(saes) for _ in runs] for arm, runs in wanted.items()}

    def arms(self, data: Data, *methods: str, **settings: Any) -> dict[str, list[SAE]]:
        """Default SAEs of some methods by their names."""
        return self.train({method: self.runs(data, method, **settings) for method in methods})

    def tables(self, saes: Sequence[SAE], data: Data, *, loss: bool = True) -> list[Table]:
        """Sums on the measured sequences, one table for each SAE."""
        return [self._table(sae, data, loss) for sae in saes]

    def _table(self, sae: SAE, data: Data, loss: bool) -> Table:
        """Kept for SAEs as they were trained."""
        if not any(sae is one for one in self.runner.loaded.values()):
            return table(sae, data, loss=loss)
        key = id(sae), data.words, data.times, loss or not isinstance(data, Site)
        if key not in self._tables:
            self._tables[key] = table(sae, data, loss=loss)
        return self._tables[key]

    def facts(self) -> dict[str, Any]:
        """What was trained on, for the page."""
        return {
            name: {key: sorted(values) if key != "runs" else len(values) for key, values in used.items()}
            for name, used in self.used.items()
        }
