"""Splice-in evaluation: what the language model loses when SAE reconstructions take the place of its activations.

Every variant runs on the same windows: clean, spliced, zero-ablated and mean-ablated (the mean over the whole set), per
site and at all sites together. Reconstruction, zero and mean act on the tokens of the SAE's mask (`config.MaskRule`), as the
clean run shows them; other tokens keep their activation in all variants. Losses are means over the positions whose own token
is in the mask, in nats; sums are float64.

    delta_ce           = ce_spliced - ce_clean
    ce_recovered_zero  = (ce_zero - ce_spliced) / (ce_zero - ce_clean), and likewise for the mean
    kl                 = KL(clean ‖ spliced) per position
    top1               = share of positions with the clean run's likeliest next token
    dead_share         = share of latents that fired on none of the tokens

What is said of reconstruction and sparsity is defined in `reconstruction.py`. The joint row pools: one FVU over all sites, L0
summed over sites, the share of all latents; its losses are those of the tokens that are in all masks.

Layers below a site run once for all variants (`prefix.py`), logits are made for some tokens and a part of the vocabulary at a
time (`lm_head.py`). Before anything is measured, x in place of x must give the clean loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from saehook.config import MaskRule
from saehook.edit_blocks import SourceAction
from saehook.editing import Action, ChainAction, ReadAction, ReplaceAction
from saehook.errors import ArgumentError
from saehook.eval_result import EvalResult, EvalRow
from saehook.hooked_saes import HookedSAEs
from saehook.intervals import DRAWS, LEVEL
from saehook.lm_head import Head, Scores
from saehook.metrics import Moments
from saehook.prefix import Prefix
from saehook.provenance import lm_facts, sae_facts, text_facts, versions
from saehook.reconstruction import RATIOS, Fidelity, reconstruct
from saehook.sae import SAE
from saehook.sites import layers_before, resolve
from saehook.splice_losses import LOSSES, RowLosses, values_of
from saehook.tokenization import Windows

ALL = "all"
BATCH_TOKENS = 4096
MAX_STATES = 2**26
"""Numbers in the states of the runs that are scored together."""
GATE_NATS = 1e-6
"""How far the loss may be off with x in place of x."""


class _Place(NamedTuple):
    """Where an SAE stands, and on which tokens it acts. SAEs at one place share their ablations."""

    reads: str
    writes: str
    rule: MaskRule


class _Run(NamedTuple):
    """One way to run the model on a batch."""

    depth: int
    """Layers that it shares with the clean run."""
    actions: Mapping[str, Action]


@torch.no_grad()
def evaluate(
    hooked: HookedSAEs,
    tokens: Windows | Tensor,
    *,
    names: Mapping[str, str] | None = None,
    joint: bool = True,
    check: str = "fingerprint",
    seed: int = 0,
    progress: bool = True,
) -> EvalResult:
    """Evaluate every attached SAE, and all together where several are attached and no two write the same site.

    Args:
        tokens: windows of ids [n, length], each run as one sequence; see `tokenization.windows`.
        names: what to call the SAEs, by their names in `hooked.saes`; default: those.
        joint: add the row with all SAEs spliced at once.
        check: `fingerprint`: refuse an SAE that does on its recorded tokens something else than its file says: it belongs to
            another model. `off`: measure it all the same.
        seed: of the draws for the intervals.
        progress: show a progress bar.

    Raises:
        ArgumentError: no window, windows of a single token, or no token that counts; a model without a language-model head,
            or whose loss changes when x takes the place of x; a loss that is nowhere finite.
        SiteError: a fingerprint that does not fit.
    """
    hooked.check_causal("loss to evaluate SAEs by")
    ids = tokens.ids if isinstance(tokens, Windows) else tokens
    if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] < 2:
        raise ArgumentError(
            f"the windows have shape {tuple(ids.shape)}; at least one of at least two tokens is expected."
        )
    checked = fingerprints_checked(hooked, check)
    run = _Evaluation(hooked, ids, joint=joint)
    batches = ids.split(run.rows_at_once)
    with tqdm(total=len(batches) * run.passes, desc="evaluating", unit="pass", disable=not progress) as bar:
        run.bar = bar
        for batch in batches:
            run.prepare(batch)
        run.check_tokens()
        for i, batch in enumerate(batches):
            run.score(batch, i)
    results = [run.row(name, (names or {}).get(name, name), seed) for name in hooked.sites]
    if run.together:
        results.append(run.joint_row(seed))
    return EvalResult(results, _provenance(run, tokens, checked=checked, seed=seed))


def fingerprints_checked(hooked: HookedSAEs, check: str) -> bool:
    """Whether the SAEs' fingerprints were compared: with `check` = `fingerprint`, not with `off`.

    Raises:
        ArgumentError: another `check`. SiteError: a fingerprint that does not fit.
    """
    if check not in ("fingerprint", "off"):
        raise ArgumentError(f"check={check!r} is unknown; expected 'fingerprint' or 'off'.")
    if check == "fingerprint":
        hooked.check_fingerprints()
    return check == "fingerprint"


class _Evaluation:
    """What `evaluate` knows while it runs."""

    def __init__(self, hooked: HookedSAEs, ids: Tensor, *, joint: bool) -> None:
        self.hooked, self.head = hooked, Head(hooked, ids)
        length, vocabulary = ids.shape[1], hooked.lm.get_input_embeddings().num_embeddings
        self.rows_at_once = max(1, BATCH_TOKENS // length)
        if self.head.site is None:  # all logits of a batch are there together
            self.rows_at_once = max(1, min(self.rows_at_once, MAX_STATES // (4 * length * vocabulary)))
        attached = hooked.attached
        self.together = joint and len({one.writes for one in attached.values()}) == len(attached) > 1
        self.places = {name: _Place(one.reads, one.writes, one.sae.mask_rule) for name, one in attached.items()}
        self.depths = {
            place: min(layers_before(hooked.lm, resolve(hooked.lm, site)[0]) for site in place[:2])
            for place in dict.fromkeys(self.places.values())
        }
        self.sites = list(dict.fromkeys(site for place in self.depths for site in place[:2]))
        self.means = {place: Moments() for place in self.depths}
        self.masks: dict[_Place, list[Tensor]] = {place: [] for place in self.depths}
        self.nan_tokens: dict[Any, int] = dict.fromkeys([*self.depths, ALL], 0)
        self.fidelity: dict[str, Fidelity] = {}
        self.losses = {name: RowLosses(length) for name in [*hooked.sites, *([ALL] if self.together else [])]}
        self.gate: dict[str, Any] = {}
        self.passes = 2 + len(attached) + 2 * len(self.depths) + 3 * self.together
        self.bar: Any = None

    def prepare(self, ids: Tensor) -> None:
        """First pass over a batch: masks, and the sums for the means."""
        group: list[ReadAction] = []
        readers = {site: ReadAction(group, stop=True) for site in self.sites}
        self.hooked.run(ids, readers)
        self.bar.update()
        anywhere = torch.zeros(ids.shape, dtype=torch.bool)
        for place in self.depths:
            x, y = readers[place.reads], readers[place.writes]
            assert x.value is not None
            assert y.value is not None
            mask = x.mask(place.rule)
            finite = x.value.isfinite().all(-1) & y.value.isfinite().all(-1).to(mask.device)
            broken = (mask & ~finite).cpu()
            self.nan_tokens[place] += int(broken.sum())
            anywhere |= broken
            mask = mask & finite  # not in place: it may be the view's own
            self.means[place].update(y.value[mask.to(y.value.device)])
            self.masks[place].append(mask.cpu())
        self.nan_tokens[ALL] += int(anywhere.sum())

    def check_tokens(self) -> None:
        """Raises ArgumentError where a row has nothing to measure; then what is left is made ready."""
        for name in self.losses:
            if not any(self.mask(name, i)[:, :-1].any() for i in range(len(next(iter(self.masks.values()))))):
                broken = self.nan_tokens[ALL]
                raise ArgumentError(
                    f"no token of the windows that predicts another is in the mask of {name}, so there is nothing to "
                    + (
                        f"measure: the activations of {broken:,} tokens are not finite."
                        if broken
                        else "measure. Give real text."
                    )
                )
        for name, place in self.places.items():
            self.fidelity[name] = Fidelity(self.hooked.saes[name], self.means[place].mean)

    def mask(self, name: str, batch: int) -> Tensor:
        """[rows, length] of a row of the result."""
        if name == ALL:
            return torch.stack([masks[batch] for masks in self.masks.values()]).all(0)
        return self.masks[self.places[name]][batch]

    def score(self, ids: Tensor, batch: int) -> None:
        """Second pass: every variant on a batch."""
        prefix = Prefix(self.depths.values())
        sources = {site: SourceAction(site) for site in self.sites}
        clean = self.head.run(ids, sources, prefix)
        self.bar.update()
        rows = {name: self.mask(name, batch) for name in self.losses}
        counted = torch.stack(list(rows.values())).any(0)[:, :-1]

        def states(run: _Run) -> Tensor:
            return select(self.head.run(ids, run.actions, prefix.skipping(run.depth)))

        def select(found: Tensor) -> Tensor:
            return found[:, :-1][counted.to(found.device)]

        clean = select(clean)
        targets = ids[:, 1:][counted].to(clean.device)
        if batch == 0:
            self.check_identity(clean, targets, states)
        runs = self.runs(sources, batch)
        scores: dict[Any, Scores] = {}
        at_once = max(1, MAX_STATES // max(1, clean.numel()))
        keys = list(runs)
        for first in range(0, len(keys), at_once):
            group = keys[first : first + at_once]
            found = []
            for key in group:
                found.append(states(runs[key]))
                self.bar.update()
            ablations = [i for i, (_, kind) in enumerate(group) if kind != "spliced"]
            scored = self.head.scores(clean, found, targets, losses_only=ablations)
            scores |= dict(zip(["clean", *group], scored, strict=True))
        self.add(scores, rows, counted)

    def check_identity(self, clean: Tensor, targets: Tensor, states: Callable[[_Run], Tensor]) -> None:
        """Raises ArgumentError where x in place of x, the reconstruction of a perfect SAE, changes the loss on the first batch."""
        put = {place: {place.writes: ReplaceAction(self.masks[place][0], _same)} for place in self.depths}
        runs = [_Run(depth, put[place]) for place, depth in self.depths.items()]
        if len(put) > 1:
            everywhere = {site: action for actions in put.values() for site, action in actions.items()}
            runs.append(_Run(min(self.depths.values()), everywhere))
        largest, equal = 0.0, True
        for run in runs:
            found = states(run)
            before, after = (each.ce.double() for each in self.head.scores(clean, [found], targets))
            change = (after - before)[before.isfinite()].mean().abs().item() if before.isfinite().any() else 0.0
            if not change <= GATE_NATS:
                raise ArgumentError(
                    f"with x in place of x at {', '.join(run.actions)} the loss changes by {change:.3g} nats, so the losses would "
                    f"not be the SAEs' own; at most {GATE_NATS:g} is expected. Does the model give other logits each time it runs "
                    "(dropout in train mode, sampling)? Call lm.eval()."
                )
            largest, equal = max(largest, change), equal and torch.equal(found.nan_to_num(), clean.nan_to_num())
        self.gate = {"nats": largest, "bit_equal": equal}

    def add(self, scores: Mapping[Any, Scores], rows: Mapping[str, Tensor], counted: Tensor) -> None:
        """The scores of a batch to the sums; `counted` [rows, length - 1]."""
        row, column = counted.nonzero(as_tuple=True)
        for name, losses in self.losses.items():
            inside = rows[name][:, :-1][counted]
            spliced = scores[name, "spliced"]
            ablated = ALL if name == ALL else self.places[name]
            values = {
                "ce_clean": scores["clean"].ce,
                "ce_spliced": spliced.ce,
                "ce_zero": scores[ablated, "zero"].ce,
                "ce_mean": scores[ablated, "mean"].ce,
                "kl": spliced.kl,
                "top1": spliced.agrees,
            }
            kept = {each: value[inside.to(value.device)] for each, value in values.items()}
            losses.add(row[inside], column[inside], len(counted), kept)

    def runs(self, sources: Mapping[str, SourceAction], batch: int) -> dict[Any, _Run]:
        """All variants of a batch by (row or place, kind). Of one SAE alone the reconstructions of the clean activations are
        what it splices in; they are measured on the way."""
        runs: dict[Any, _Run] = {}
        for name, place in self.places.items():
            mask = self.mask(name, batch)
            x_hat = self.fidelity[name].update(sources[place.reads].take(), sources[place.writes].take(), mask)
            runs[name, "spliced"] = _Run(self.depths[place], {place.writes: ReplaceAction(mask, _always(x_hat))})
        for place, depth in self.depths.items():
            mask, mean = self.masks[place][batch], self.means[place].mean
            runs[place, "zero"] = _Run(depth, {place.writes: ReplaceAction(mask, torch.zeros_like)})
            runs[place, "mean"] = _Run(depth, {place.writes: ReplaceAction(mask, _always(mean))})
        if self.together:
            depth = min(self.depths.values())
            for kind in ("zero", "mean"):
                everywhere = {place.writes: runs[place, kind].actions[place.writes] for place in self.depths}
                runs[ALL, kind] = _Run(depth, everywhere)
            runs[ALL, "spliced"] = _Run(depth, self.splice_all(batch))
        return runs

    def splice_all(self, batch: int) -> dict[str, Action]:
        """Every reconstruction at once; what an SAE reads comes out of those before it."""
        chains: dict[str, list[Action]] = {}
        for name, place in self.places.items():
            sae, mask = self.hooked.saes[name], self.mask(name, batch)
            new: Callable[[Tensor], Tensor] = partial(reconstruct, sae)
            if place.reads != place.writes:
                source = SourceAction(place.reads)
                chains.setdefault(place.reads, []).insert(0, source)
                new = partial(_of_source, sae, source, mask)
            chains.setdefault(place.writes, []).append(ReplaceAction(mask, new))
        return {site: chain[0] if len(chain) == 1 else ChainAction(chain) for site, chain in chains.items()}

    def row(self, name: str, label: str, seed: int) -> EvalRow:
        """The row of one SAE."""
        fidelity, place = self.fidelity[name], self.places[name]
        values, found = values_of(self.losses[name].sums, LOSSES, name, seed)
        more, others = values_of(fidelity.sums, RATIOS, name, seed)
        return EvalRow(
            sae=label,
            site=place.reads,
            tokens=sum(int(mask.sum()) for mask in self.masks[place]),
            dead_share=fidelity.dead_share,
            d_sae=fidelity.sae.d_sae,
            nan_tokens=self.nan_tokens[place],
            intervals=found | others,
            extra={"positions": self.losses[name].positions(), **fidelity.blocks()},
            **self._counts(name),
            **values,
            **more,
        )

    def joint_row(self, seed: int) -> EvalRow:
        """The row of all SAEs at once."""
        values, found = values_of(self.losses[ALL].sums, LOSSES, ALL, seed)
        parts = list(self.fidelity.values())
        d_sae = sum(part.sae.d_sae for part in parts)
        error, variance = (sum(float(part.sums.totals()[each]) for part in parts) for each in ("error", "variance"))
        masks = [self.mask(ALL, i) for i in range(len(next(iter(self.masks.values()))))]
        return EvalRow(
            sae=ALL,
            site=ALL,
            tokens=sum(int(mask.sum()) for mask in masks),
            fvu=error / variance if variance else None,
            l0=sum(float(RATIOS["l0"](part.sums.totals())) for part in parts),
            dead_share=sum(part.dead_share * part.sae.d_sae for part in parts) / d_sae,
            d_sae=d_sae,
            nan_tokens=self.nan_tokens[ALL],
            intervals=found,
            extra={"positions": self.losses[ALL].positions()},
            **self._counts(ALL),
            **values,
        )

    def _counts(self, name: str) -> dict[str, Any]:
        losses = self.losses[name]
        return {"nan_losses": losses.not_finite, "windows": int((losses.sums.by_sequence()["n"] > 0).sum())}


def _same(x: Tensor) -> Tensor:
    return x


def _always(value: Tensor) -> Callable[[Tensor], Tensor]:
    """Whatever x is: `value` [n, d] or [d]."""
    return lambda x: value.to(x.device, x.dtype).expand_as(x)


def _of_source(sae: SAE, source: SourceAction, mask: Tensor, _: Tensor) -> Tensor:
    x = source.take()
    return reconstruct(sae, x[mask.to(x.device)])


def _provenance(run: _Evaluation, tokens: Windows | Tensor, *, checked: bool, seed: int) -> dict[str, Any]:
    return {
        "versions": versions(),
        "lm": lm_facts(run.hooked),
        "saes": sae_facts(run.hooked, checked=checked),
        "text": text_facts(tokens),
        "position_rule": "losses at positions whose own token is in the mask; other tokens keep their activation",
        "inference_rule": "each token alone: TopK by its k, BatchTopK and JumpReLU by their thresholds",
        "identity": run.gate,
        "logits": "in chunks" if run.head.site else "the model's own forward: its head is unknown",
        "batch_windows": run.rows_at_once,
        "shared_layers": {place.writes: depth for place, depth in run.depths.items()},
        "intervals": {"level": LEVEL, "draws": DRAWS, "over": "windows", "seed": seed},
    }
