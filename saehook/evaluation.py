"""Splice-in evaluation: what the language model loses when SAE reconstructions take the place of its activations.

Every variant runs on the same windows: clean, spliced, zero-ablated and mean-ablated (the mean over the whole set), per
site and at all sites together. Reconstruction, zero and mean act on the mask of the SAE (`config.MaskRule`); other tokens
keep their activation. Losses are means over the positions whose own token is in the mask, in nats; sums are float64.
Which tokens are outliers is read off the clean run, so all variants of a row have the same positions.

    delta_ce           = ce_spliced - ce_clean
    ce_recovered_zero  = (ce_zero - ce_spliced) / (ce_zero - ce_clean), and likewise for the mean
    kl                 = KL(clean ‖ spliced) per position
    fvu                = Σ‖x - x_hat‖² / Σ‖x - mean‖²   with the mean over all tokens
    dead_share         = share of latents that fired on none of the tokens

The joint row pools: one FVU over all sites, L0 summed over sites, the share of all latents; its losses are those of the
tokens that are in all masks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from saehook.calibration import stats_of
from saehook.config import activation_to_dict
from saehook.edit_blocks import LatentBlock, SourceAction
from saehook.editing import Action, EditAction, ReadAction, ReplaceAction
from saehook.errors import ArgumentError
from saehook.hooked_saes import HookedSAEs
from saehook.interventions import Program
from saehook.metrics import Firing, Histogram, Mean, Moments, Reconstruction
from saehook.sae import SAE, LatentStats
from saehook.tokenization import Windows, tokenizer_sha256

ALL = "all"
MAX_LOGITS = 2**24
"""Logits of one batch; a batch has as many windows as fit, and at least one."""


@dataclass(frozen=True)
class EvalRow:
    """One SAE, or all together."""

    sae: str
    """Name of the SAE."""
    site: str
    """Its site, or `all`."""
    tokens: int
    """Tokens of the mask."""
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    delta_ce: float
    ce_recovered_zero: float
    ce_recovered_mean: float
    kl: float
    fvu: float
    l0: float
    dead_share: float


@dataclass(frozen=True)
class EvalResult:
    """The rows, and what is needed to repeat them."""

    results: list[EvalRow]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """`{"results": [...], "provenance": {...}}`, floats unrounded."""
        return json.dumps(
            {"results": [dataclasses.asdict(row) for row in self.results], "provenance": self.provenance}, indent=1
        )

    @staticmethod
    def from_json(text: str) -> EvalResult:
        """The inverse of `to_json`."""
        data = json.loads(text)
        return EvalResult([EvalRow(**row) for row in data["results"]], data["provenance"])

    def table(self) -> str:
        """The rows as text."""
        head = (
            "sae",
            "site",
            "ce clean",
            "spliced",
            "zero",
            "mean",
            "delta ce",
            "kl",
            "recovered",
            "(mean)",
            "fvu",
            "L0",
            "dead",
        )
        lines: list[tuple[str, ...]] = [head]
        for r in self.results:
            losses = (
                r.ce_clean,
                r.ce_spliced,
                r.ce_zero,
                r.ce_mean,
                r.delta_ce,
                r.kl,
                r.ce_recovered_zero,
                r.ce_recovered_mean,
            )
            lines.append(
                (
                    r.sae,
                    r.site,
                    *(f"{v:.3f}" for v in losses),
                    f"{r.fvu:.3f}",
                    f"{r.l0:.1f}",
                    f"{100 * r.dead_share:.1f}%",
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = "\n".join(
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )
        tokens = dict.fromkeys(f"{row.tokens:,}" for row in self.results)
        notes = [f"{' / '.join(tokens)} tokens; losses in nats per token; dead: fired on none of them"]
        rules = {site: sae["mask_rule"] for site, sae in self.provenance.get("saes", {}).items() if "mask_rule" in sae}
        for rule in dict.fromkeys(rules.values()):
            sites = ", ".join(site for site in rules if rules[site] == rule)
            notes.append(f"tokens that count{f' at {sites}' if len(set(rules.values())) > 1 else ''}: {rule}")
        return "\n".join([text, *notes])


@dataclass
class _Variant:
    """Loss and KL of one way to run the model."""

    actions: dict[str, Action]
    ce: Mean = field(default_factory=Mean)
    kl: Mean = field(default_factory=Mean)


@torch.no_grad()
def evaluate(
    hooked: HookedSAEs,
    tokens: Windows | Tensor,
    *,
    names: Mapping[str, str] | None = None,
    joint: bool = True,
    progress: bool = True,
) -> EvalResult:
    """Evaluate every attached SAE, and all together where several are attached.

    Args:
        tokens: windows of ids [n, length], each run as one sequence; see `tokenization.windows`.
        names: what to call the SAE at each site; default: the site.
        joint: add the row with all SAEs spliced at once, unless two of them write the same site.
        progress: show a progress bar.

    Raises:
        ArgumentError: no window, windows of a single token, or no token that counts.
    """
    ids = tokens.ids if isinstance(tokens, Windows) else tokens
    if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] < 2:
        raise ArgumentError(
            f"the windows have shape {tuple(ids.shape)}; at least one of at least two tokens is expected."
        )
    rows = max(1, MAX_LOGITS // (ids.shape[1] * hooked.lm.get_input_embeddings().num_embeddings))
    batches = ids.split(rows)
    sites = hooked.sites
    together = joint and len({one.writes for one in hooked.attached.values()}) == len(sites) > 1
    n_variants = 3 * (len(sites) + together) + 2
    with tqdm(total=n_variants * len(batches), desc="evaluating", unit="pass", disable=not progress) as bar:
        measured = {site: (Reconstruction(), Firing()) for site in sites}
        masks: dict[str, list[Tensor]] = {site: [] for site in sites}
        for batch in batches:
            _measure(hooked, batch, measured, masks)
            bar.update()
        if together:
            masks[ALL] = [torch.stack(parts).all(0) for parts in zip(*masks.values(), strict=True)]
        for name, parts in masks.items():
            if not any(mask[:, :-1].any() for mask in parts):
                raise ArgumentError(
                    f"no token of the windows that predicts another is in the mask of {name}, so there is nothing to "
                    "measure. Give real text."
                )
        variants = _variants(hooked, {site: m[0].x.mean.float() for site, m in measured.items()}, together)
        clean_ce = {name: Mean() for name in masks}
        for i, batch in enumerate(batches):
            _score(hooked, batch, {name: parts[i] for name, parts in masks.items()}, clean_ce, variants, bar)

    def row(name: str, site: str, fvu: float, l0: float, dead: float) -> EvalRow:
        ce = {kind: variants[site, kind].ce.value for kind in ("spliced", "zero", "mean")}
        clean = clean_ce[site].value
        return EvalRow(
            sae=name,
            site=site,
            tokens=sum(int(mask.sum()) for mask in masks[site]),
            ce_clean=clean,
            ce_spliced=ce["spliced"],
            ce_zero=ce["zero"],
            ce_mean=ce["mean"],
            delta_ce=ce["spliced"] - clean,
            ce_recovered_zero=_ratio(ce["zero"] - ce["spliced"], ce["zero"] - clean),
            ce_recovered_mean=_ratio(ce["mean"] - ce["spliced"], ce["mean"] - clean),
            kl=variants[site, "spliced"].kl.value,
            fvu=fvu,
            l0=l0,
            dead_share=dead,
        )

    results = [
        row((names or {}).get(site, site), site, m[0].fvu, m[1].l0, m[1].dead_share) for site, m in measured.items()
    ]
    if together:
        pooled = list(measured.values())
        n_latents = [hooked.saes[site].d_sae for site in sites]
        dead = sum(m[1].dead_share * n for m, n in zip(pooled, n_latents, strict=True)) / sum(n_latents)
        fvu = _ratio(sum(m[0].error for m in pooled), sum(m[0].x.variance for m in pooled))
        results.append(row(ALL, ALL, fvu, sum(m[1].l0 for m in pooled), dead))
    return EvalResult(results, _provenance(hooked, tokens))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")


def _measure(
    hooked: HookedSAEs,
    ids: Tensor,
    measured: dict[str, tuple[Reconstruction, Firing]],
    masks: dict[str, list[Tensor]],
) -> None:
    """Reconstruction and firing at every site, on clean activations; and the mask of every SAE, [rows, length]."""
    for site, (x, y, mask) in read_sites(hooked, ids).items():
        masks[site].append(mask)
        sae = hooked.saes[site]
        for some, target in zip(sae.pieces(x), sae.pieces(y), strict=True) if len(x) else ():
            out = sae(some)
            measured[site][0].update(target, out.x_hat)
            measured[site][1].update(out.acts)


class Clean(NamedTuple):
    """Clean activations of the tokens in an SAE's mask."""

    x: Tensor
    """What it reads, [n, d_in]."""
    y: Tensor
    """What it reconstructs, [n, d_out]: x, but for a transcoder."""
    mask: Tensor
    """[rows, length] bool on the CPU."""


def read_sites(hooked: HookedSAEs, ids: Tensor) -> dict[str, Clean]:
    """Clean activations for every attached SAE, by its site."""
    group: list[ReadAction] = []
    sites = dict.fromkeys(site for one in hooked.attached.values() for site in (one.reads, one.writes))
    readers = {site: ReadAction(group, stop=True) for site in sites}
    hooked.run(ids, readers)
    found = {}
    for name, (sae, reads, writes) in hooked.attached.items():
        read, written = readers[reads], readers[writes]
        assert read.value is not None
        assert written.value is not None
        mask = read.mask(sae.mask_rule)
        found[name] = Clean(read.value[mask], written.value[mask.to(written.value.device)], mask.cpu())
    return found


def _variants(hooked: HookedSAEs, means: Mapping[str, Tensor], together: bool) -> dict[tuple[str, str], _Variant]:
    splice = Program(splice=True)
    by_kind: dict[str, Callable[[str, SAE, SourceAction | None], Action]] = {
        "spliced": lambda site, sae, source: EditAction([LatentBlock(sae, [], splice, source=source)], splice),
        "zero": lambda site, sae, source: ReplaceAction(torch.zeros(sae.d_out), sae.mask_rule, source),
        "mean": lambda site, sae, source: ReplaceAction(means[site], sae.mask_rule, source),
    }
    variants: dict[tuple[str, str], _Variant] = {}
    for kind, make in by_kind.items():
        everywhere: dict[str, Action] = {}
        for site, sae in hooked.saes.items():
            actions = hooked.where_written(site, functools.partial(make, site, sae))
            variants[site, kind] = _Variant(actions)
            everywhere |= actions
        if together:
            variants[ALL, kind] = _Variant(everywhere)
    return variants


def _score(
    hooked: HookedSAEs,
    ids: Tensor,
    masks: Mapping[str, Tensor],
    clean_ce: Mapping[str, Mean],
    variants: Mapping[tuple[str, str], _Variant],
    bar: Any,
) -> None:
    """Losses of one batch in all variants; `masks` by site, [rows, length]."""
    counted = torch.stack(list(masks.values())).any(0)[:, :-1]
    inside = {name: mask[:, :-1][counted] for name, mask in masks.items()}
    targets = ids[:, 1:][counted.to(ids.device)][:, None]

    def log_probs(actions: Mapping[str, Action]) -> Tensor:
        logits = hooked.run(ids, actions).logits[:, :-1]
        bar.update()
        return logits[counted.to(logits.device)].float().log_softmax(-1)

    clean = log_probs({})
    targets = targets.to(clean.device)
    inside = {name: mask.to(clean.device) for name, mask in inside.items()}
    clean_losses = -clean.gather(1, targets)
    for name, mean in clean_ce.items():
        mean.update(clean_losses[inside[name]])
    probs = clean.exp()
    for (name, kind), variant in variants.items():
        new = log_probs(variant.actions)
        variant.ce.update(-new.gather(1, targets)[inside[name]])
        if kind == "spliced":
            variant.kl.update((probs * (clean - new)).sum(-1)[inside[name]])


def measure_stats(hooked: HookedSAEs, tokens: Windows | Tensor, *, progress: bool = True) -> dict[str, LatentStats]:
    """Statistics of every attached SAE on text, by site; what the units `max` and `quantile` and `error="mean"` need.

    Raises:
        ArgumentError: no token of the text is in the mask of one of the SAEs.
    """
    ids = tokens.ids if isinstance(tokens, Windows) else tokens
    measured = {site: (Firing(), Histogram(sae.d_sae, sae.device), Moments()) for site, sae in hooked.saes.items()}
    with torch.no_grad():
        for batch in tqdm(
            ids.split(max(1, 4096 // ids.shape[1])), desc="measuring", unit="batch", disable=not progress
        ):
            for site, clean in read_sites(hooked, batch).items():
                firing, histogram, error = measured[site]
                sae = hooked.saes[site]
                for x, y in zip(sae.pieces(clean.x), sae.pieces(clean.y), strict=True) if len(clean.x) else ():
                    out = sae(x)
                    firing.update(out.acts)
                    histogram.update(out.acts)
                    error.update(y - out.x_hat)
    stats = {}
    for site, (firing, histogram, error) in measured.items():
        if firing.count is None:
            raise ArgumentError(
                f"no token of the text is in the mask of the SAE at {site}, so there is nothing to measure. Give real text."
            )
        stats[site] = stats_of(firing, histogram, error.mean)
    return stats


def _provenance(hooked: HookedSAEs, tokens: Windows | Tensor) -> dict[str, Any]:
    text = (
        {
            "sha256": tokens.text_sha256,
            "documents": tokens.documents,
            "dropped_tail": tokens.dropped_tail,
            **tokens.rule,
            **({"dataset": tokens.dataset} if tokens.dataset else {}),
        }
        if isinstance(tokens, Windows)
        else {"window": tokens.shape[1]}
    )
    return {
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("saehook", "torch", "transformers", "nnsight")},
        "lm": {
            "id": hooked.model.name,
            "revision": getattr(hooked.lm.config, "_commit_hash", None),
            "dtype": str(hooked.lm.dtype).removeprefix("torch."),
            "tokenizer_sha256": tokenizer_sha256(hooked.tokenizer),
        },
        "saes": {
            site: {
                "activation": activation_to_dict(sae.config.activation),
                "dtype": str(sae.dtype).removeprefix("torch."),
                "mask_rule": str(sae.mask_rule),
            }
            for site, sae in hooked.saes.items()
        },
        "text": text,
        "position_rule": "losses at positions whose own token is in the mask; other tokens keep their activation",
        "inference_rule": "each token alone: TopK by its k, BatchTopK and JumpReLU by their thresholds",
    }
