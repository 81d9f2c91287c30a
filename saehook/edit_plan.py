"""What a program does in one run: an action for each site that it reads or writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch

from saehook.edit_blocks import Block, Encoder, LatentBlock, SourceAction, VectorBlock, WatchAction
from saehook.editing import Action, ChainAction, EditAction
from saehook.errors import ArgumentError
from saehook.interventions import AnyEdit, Edit, Program, VectorEdit
from saehook.positions import Positions
from saehook.results import EditReport, Report, SiteReport
from saehook.sae import SAE
from saehook.tracks import Conditions, LatentTrack


class Attached(NamedTuple):
    """An SAE at its place in the model."""

    sae: SAE
    reads: str
    """The site that it reads."""
    writes: str
    """The site that it writes: another one for a transcoder."""


class Place(NamedTuple):
    """A site that a vector is written to."""

    site: str
    width: int
    device: torch.device


@dataclass
class EditPlan:
    """The actions of one run."""

    actions: dict[str, Action] = field(default_factory=dict)
    """By site; sites where nothing happens have none."""
    edits: dict[str, EditAction] = field(default_factory=dict)
    """Those that edit, by site."""
    attached: Mapping[str, Attached] = field(default_factory=dict)
    """The SAEs by name."""


def plan_edits(
    program: Program,
    attached: Mapping[str, Attached],
    name_of: Callable[[str | None], str],
    place_of: Callable[[str | None], Place],
) -> EditPlan:
    """The actions by which a program runs.

    Args:
        program: the edits.
        attached: the SAEs by the name under which an edit finds them.
        name_of: that name, from what an edit or a condition says.
        place_of: the site of a vector, from what its edit says.

    Raises:
        SiteError: a name that means nothing. LatentError, MissingStatError, ShapeError, ArgumentError: an edit that this SAE
            or site cannot have.
    """
    encoders = {name: Encoder(one.sae) for name, one in attached.items()}
    tracks, conditions = _tracks(program, name_of)
    sources: dict[str, SourceAction] = {}
    for name, one in attached.items():
        if one.reads != one.writes:
            sources[name] = SourceAction(one.reads)

    def latent_block(name: str, edits: list[tuple[int, Edit]]) -> LatentBlock:
        return LatentBlock(
            attached[name].sae,
            edits,
            program,
            encoder=encoders[name],
            conditions=conditions,
            track=tracks.get(name),
            source=sources.get(name),
        )

    def vector_block(index: int, edit: VectorEdit, place: Place) -> VectorBlock:
        return VectorBlock(edit, index, program, width=place.width, device=place.device, conditions=conditions)

    by_site: dict[str, list[tuple[str | None, int, AnyEdit]]] = {}
    places: dict[int, Place] = {}
    for i, edit in enumerate(program.edits):
        if isinstance(edit, Edit):
            name = name_of(edit.site)
            by_site.setdefault(attached[name].writes, []).append((name, i, edit))
        else:
            places[i] = place_of(edit.site)
            by_site.setdefault(places[i].site, []).append((None, i, edit))
    blocks: dict[str, list[Block]] = {}
    for site, entries in by_site.items():
        blocks[site] = []
        for name, group in groupby(entries, key=lambda entry: entry[0]):
            if name is None:
                blocks[site] += [
                    vector_block(i, edit, places[i]) for _, i, edit in group if isinstance(edit, VectorEdit)
                ]
            else:
                blocks[site].append(latent_block(name, [(i, edit) for _, i, edit in group if isinstance(edit, Edit)]))
    used = {name for entries in by_site.values() for name, _, _ in entries if name is not None}
    if program.splice:
        for name, one in attached.items():
            if name not in used:
                blocks.setdefault(one.writes, []).insert(0, latent_block(name, []))
                used.add(name)
    plan = EditPlan(edits={site: EditAction(each, program) for site, each in blocks.items()}, attached=attached)
    chains: dict[str, list[Action]] = {}
    for name, track in tracks.items():
        chains.setdefault(attached[name].reads, []).append(WatchAction(encoders[name], track))
    for name in used:
        if name in sources:
            chains.setdefault(attached[name].reads, []).append(sources[name])
    for site, action in plan.edits.items():
        chains.setdefault(site, []).append(action)
    plan.actions = {site: each[0] if len(each) == 1 else ChainAction(each) for site, each in chains.items()}
    return plan


def _tracks(program: Program, name_of: Callable[[str | None], str]) -> tuple[dict[str, LatentTrack], Conditions]:
    """The latents whose activations a run must remember: by the SAE's name, and as the conditions find them."""
    latents: dict[str, set[int]] = {}
    asked: dict[str | None, str] = {}
    for edit in program.edits:
        if isinstance(edit, Edit) and edit.op == "resample":
            latents.setdefault(name_of(edit.site), set()).update(edit.latents)
        for comparison in edit.when.comparisons() if edit.when is not None else ():
            site = comparison.left.site
            asked[site] = name_of(site)
            latents.setdefault(asked[site], set()).add(comparison.left.latent)
    tracks = {name: LatentTrack(name, each) for name, each in latents.items()}
    return tracks, Conditions({site: tracks[name] for site, name in asked.items()})


class Taps(Protocol):
    """What runs a model with actions at its sites."""

    def run(self, call: Callable[[], Any], actions: Mapping[str, Action], positions: Positions) -> Any:
        """`call()` with an action at some of the sites."""
        ...


def run_plan(
    taps: Taps, call: Callable[[], Any], plan: EditPlan, program: Program, positions: Positions, lm: Any, tokenizer: Any
) -> tuple[Any, Report]:
    """`call()` with the plan in force, and the report of what it did. Warns once where dropout acts.

    Raises:
        ArgumentError: an edit gave a value that the half-precision dtype of its site cannot hold, or a vector whose length
            float32 cannot hold.
    """
    if lm.training:
        message = "the language model is in train mode, so dropout acts in edited runs, too. Call lm.eval() if it is not meant."
        warnings.warn(message, UserWarning, stacklevel=2)
    try:
        result = taps.run(call, plan.actions, positions)
    except Exception:
        _check_overflow(plan, lm, tokenizer)  # the cause, where the model failed on what an edit wrote
        raise
    _check_overflow(plan, lm, tokenizer)
    return result, _report(program, plan)


def _check_overflow(plan: EditPlan, lm: Any, tokenizer: Any) -> None:
    for site, action in plan.edits.items():
        if (place := action.overflow()) is None:
            continue
        row, token, token_id = place
        what = "; ".join(str(p.edit) for p in action.edits) or "the splice"
        piece = "" if tokenizer is None else f" ({tokenizer.decode([token_id])!r})"
        half = lm.dtype in (torch.float16, torch.bfloat16)
        more = ", or load the model with dtype=torch.float32" if half else ""
        raise ArgumentError(
            f"{what} at {site} gave a {'value that' if half else 'vector whose length'} {lm.dtype} cannot hold, first at token "
            f"{token}{piece} of row {row}. Use smaller amounts, or a program with "
            f"norm={{'cap': 1.0}}{more}."
        )


def _report(program: Program, plan: EditPlan) -> Report:
    edits: dict[int, EditReport] = {}
    sites = []
    for name, action in plan.edits.items():
        for p in action.edits:
            tokens, dose = p.dose.read()
            residual = None if p.residual is None else p.residual.read()[1]
            edits[p.index] = EditReport(p.edit, tokens, dose, residual)
        tokens, dose = action.dose.read()
        sites.append(SiteReport(name, tokens, dose))
    return Report(edits=tuple(edits[i] for i in range(len(program.edits))), sites=tuple(sites))
