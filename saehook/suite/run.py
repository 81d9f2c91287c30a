"""All slow metrics of the attached SAEs on one text, as plain data: what `saehook eval --suite full` adds."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm.auto import tqdm

from saehook import corpus
from saehook.errors import ArgumentError
from saehook.evaluation import fingerprints_checked
from saehook.provenance import lm_facts, sae_facts, text_facts, versions
from saehook.suite import METRICS
from saehook.suite.ablation_sparsity import ablation_sparsity
from saehook.suite.absorption import absorption
from saehook.suite.attribution_accuracy import attribution_accuracy
from saehook.suite.compute_equivalent import checkpoint_losses, compute_equivalent_loss
from saehook.suite.duplicates import stability
from saehook.suite.explanations import explanations
from saehook.suite.latent_quality import latent_quality
from saehook.suite.measure import Measure
from saehook.suite.probe_loss import Examples, check_tasks, probe_loss, read_examples
from saehook.suite.probe_tasks import ProbeTask, make_tasks
from saehook.suite.progressive_code import default_ks, loss_by_k, progressive_code
from saehook.suite.sample import Sample, ids_of, read_samples, spread
from saehook.suite.shrinkage import shrinkage
from saehook.suite.steering import steering
from saehook.tokenization import Windows

if TYPE_CHECKING:
    from saehook.hooked_model import HookedModel
    from saehook.hooked_saes import HookedSAEs

TOKENS = 16_384
"""Tokens of the sample, in windows spread over the text."""
FEWER = 4096
"""Tokens for what costs a product of tokens × latents for every k'."""


@dataclass(frozen=True)
class SuiteRow:
    """One number of one SAE."""

    sae: str
    """What the SAE is called."""
    site: str
    """Its site."""
    metric: str
    """One of `suite.METRICS`."""
    measure: Measure


@dataclass(frozen=True)
class SuiteResult:
    """All numbers, and what is needed to repeat them."""

    rows: list[SuiteRow]
    left_out: list[dict[str, str]]
    """Metrics that an SAE does not have: `{"site", "metric", "why"}`."""
    steering: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """The dose–response of each steered latent, by site (`suite.steering.Response`)."""
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: numbers that are not finite are None."""
        return {
            "rows": [{"sae": r.sae, "site": r.site, "metric": r.metric, **r.measure.to_dict()} for r in self.rows],
            "left_out": self.left_out,
            "steering": self.steering,
            "provenance": self.provenance,
        }

    def to_json(self) -> str:
        """`to_dict()` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def table(self) -> str:
        """One line per number: value with its 95 % interval, unit, what it was measured on."""
        lines = [("sae", "metric", "value [95 %]", "unit", "measured on", "")]
        for row in self.rows:
            m = row.measure
            lines.append((row.sae, m.name, m.text(), m.unit, f"{m.n:,} {m.of}", m.note))
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        table = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]]).rstrip()
            for line in lines
        ]
        table += [f"{gone['site']}: no {gone['metric']}: {gone['why']}" for gone in self.left_out]
        for site, n in self.provenance["not_finite"].items():
            if n:
                table.append(f"{site}: {n:,} tokens with NaN or infinite activations are left out")
        return "\n".join(table)


def run_suite(
    hooked: HookedSAEs,
    tokens: Windows | Tensor,
    *,
    names: Mapping[str, str] | None = None,
    tasks: Sequence[ProbeTask] | None = None,
    lm_checkpoints: Iterable[tuple[float, HookedModel]] = (),
    only: Sequence[str] | None = None,
    check: str = "fingerprint",
    seed: int = 0,
    progress: bool = True,
) -> SuiteResult:
    """The slow metrics of every attached SAE; a few minutes for a small model on a CPU.

    Args:
        tokens: windows of ids [n, length]; of them `TOKENS` tokens are used, spread over the text.
        names: what to call the SAE at each site; default: the site.
        tasks: probe tasks; default: those that are made from the held-out modules of the standard library.
        lm_checkpoints: (step, model) of the language model's own training, for `compute_equivalent`.
        only: some of `suite.METRICS`; default: all, `stability` and `compute_equivalent` where there is what they compare.
        check: `fingerprint` or `off`, as for `evaluate`.
        seed: of everything drawn at random: tokens, latents, examples.

    Raises:
        SiteError: an SAE of another model.
        ArgumentError: no window or no token that counts; an unknown metric; a task with too few examples; `stability` is
            asked for and no site has two SAEs, or `compute_equivalent` without checkpoints.
    """
    checked = fingerprints_checked(hooked, check)
    check_suite(hooked, only, tasks, lm_checkpoints=bool(lm_checkpoints))
    wanted = tuple(METRICS if only is None else only)
    several = _several(hooked)
    ids = spread(ids_of(tokens), TOKENS)
    probed = bool({"probe_loss", "absorption"} & set(wanted))
    if probed:
        tasks = make_tasks(corpus.read_documents(corpus.held_out_files()), seed=seed) if tasks is None else tasks
    samples = read_samples(hooked, ids)
    examples = read_examples(hooked, tasks) if probed and tasks is not None else {}
    rows: list[SuiteRow] = []
    left_out: list[dict[str, str]] = []
    responses: dict[str, list[dict[str, Any]]] = {}
    curve = checkpoint_losses(hooked, lm_checkpoints, ids) if "compute_equivalent" in wanted else {}
    alone = [metric for metric in wanted if metric != "stability" and (metric != "compute_equivalent" or curve)]

    def measured(sae: str, site: str, metric: str, measure: Callable[[], list[Measure]]) -> None:
        bar.set_postfix_str(f"{metric} at {site}")
        try:
            rows.extend(SuiteRow(sae, site, metric, each) for each in measure())
        except ArgumentError as error:
            left_out.append({"site": site, "metric": metric, "why": str(error)})
        bar.update()

    with tqdm(total=len(samples) * len(alone), desc="suite", unit="metric", disable=not progress) as bar:
        attributed = functools.cache(lambda: attribution_accuracy(hooked, ids))  # of all SAEs together
        for name, sample in samples.items():
            how = _metrics(hooked, sample, ids, tasks or (), examples.get(name), attributed, responses, curve, seed)
            for metric in alone:
                measured((names or {}).get(name, name), name, metric, how[metric])
        for group in several if "stability" in wanted else ():
            parts = [samples[name] for name in group]
            both = ", ".join((names or {}).get(name, name) for name in group)
            measured(both, hooked.attached[group[0]].reads, "stability", functools.partial(_stability, parts))
    provenance = _provenance(hooked, tokens, samples, wanted, tasks, seed, checked=checked) | {
        "lm_checkpoints": list(curve)
    }
    return SuiteResult(rows, left_out, responses, provenance)


def _several(hooked: HookedSAEs) -> list[list[str]]:
    """Names of the SAEs that stand at one place, where several do."""
    places: dict[tuple[str, str], list[str]] = {}
    for name, one in hooked.attached.items():
        places.setdefault((one.reads, one.writes), []).append(name)
    return [names for names in places.values() if len(names) > 1]


def check_suite(
    hooked: HookedSAEs, only: Sequence[str] | None, tasks: Sequence[ProbeTask] | None, *, lm_checkpoints: bool
) -> None:
    """What `run_suite` asks of its arguments, before anything is measured; `lm_checkpoints`: whether there are any.

    Raises:
        ArgumentError: an unknown metric, a task with too few examples, a metric that is asked for and has nothing to compare.
    """
    wanted = METRICS if only is None else only
    if unknown := [metric for metric in wanted if metric not in METRICS]:
        raise ArgumentError(f"there is no metric {', '.join(map(repr, unknown))}; there are {', '.join(METRICS)}.")
    if tasks is not None and {"probe_loss", "absorption"} & set(wanted):
        check_tasks(tasks)
    if only is not None and "stability" in only and not _several(hooked):
        raise ArgumentError(
            "stability compares SAEs of one site, such as those of several seeds, and every site has one. Attach more."
        )
    if only is not None and "compute_equivalent" in only and not lm_checkpoints:
        raise ArgumentError(
            "compute_equivalent compares with checkpoints of the language model's training, and none are given "
            "(--lm-checkpoints STEP=LM, at least two)."
        )


def _stability(samples: Sequence[Sample]) -> list[Measure]:
    alive = [(sample.counts() > 0).nonzero()[:, 0] for sample in samples]
    return stability([sample.sae for sample in samples], alive)


def _metrics(
    hooked: HookedSAEs,
    sample: Sample,
    ids: Tensor,
    tasks: Sequence[ProbeTask],
    examples: Examples | None,
    attributed: Callable[[], Mapping[str, list[Measure]]],
    responses: dict[str, list[dict[str, Any]]],
    curve: Mapping[float, Tensor],
    seed: int,
) -> dict[str, Callable[[], list[Measure]]]:
    """How each metric of one SAE is measured."""
    fewer = sample.some_windows(FEWER)

    def code() -> list[Measure]:
        ks = [k for k in default_ks(sample.sae.d_sae) if k >= 8]
        return progressive_code(fewer) + loss_by_k(hooked, fewer, ids, ks)

    def steer() -> list[Measure]:
        measures, found = steering(hooked, sample, ids, seed=seed)
        responses[sample.site] = [dataclasses.asdict(response) for response in found]
        return measures

    def probes() -> Examples:
        assert examples is not None
        return examples

    return {
        "latent_quality": lambda: latent_quality(sample),
        "shrinkage": lambda: shrinkage(sample.thinned(FEWER // 2)),
        "progressive_code": code,
        "ablation_sparsity": lambda: ablation_sparsity(hooked, sample, ids, seed=seed),
        "probe_loss": lambda: probe_loss(hooked, sample.site, tasks, probes()),
        "absorption": lambda: absorption(sample.sae, tasks, probes()),
        "explanations": lambda: explanations(hooked, sample, ids, seed=seed).measures,
        "steering": steer,
        "attribution": lambda: attributed()[sample.site],
        "compute_equivalent": lambda: compute_equivalent_loss(hooked, sample, ids, curve),
    }


def _provenance(
    hooked: HookedSAEs,
    tokens: Windows | Tensor,
    samples: Mapping[str, Sample],
    wanted: Sequence[str],
    tasks: Sequence[ProbeTask] | None,
    seed: int,
    *,
    checked: bool,
) -> dict[str, Any]:
    return {
        "versions": versions(),
        "lm": lm_facts(hooked),
        "saes": sae_facts(hooked, checked=checked),
        "text": text_facts(tokens),
        "metrics": list(wanted),
        "seed": seed,
        "tokens": {name: len(sample) for name, sample in samples.items()},
        "not_finite": {name: sample.not_finite for name, sample in samples.items()},
        "probe_tasks": {task.name: len(task.texts) for task in tasks or ()},
    }
