"""A model with SAEs attached: edits, splicing, latents. How it runs through nnsight is in `hooked_model.py`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from saehook.editing import Action, EditAction, ReadAction, SourceAction, StopForward
from saehook.errors import ArgumentError, SiteError
from saehook.interventions import Edit, Program
from saehook.positions import Positions
from saehook.results import EditReport, Latents, Report, SiteReport
from saehook.runs import Runs
from saehook.sae import SAE
from saehook.sites import resolve, same_site

if TYPE_CHECKING:
    from saehook.hooked_model import HookedModel


class HookedSAEs(Runs):
    """A model with SAEs attached; made by `HookedModel.attach`. Edits are arguments of each call, no state stays."""

    def __init__(self, model: HookedModel, taps: Any, saes: dict[str, SAE], outs: dict[str, str]) -> None:
        """`taps`: the mounted tap points, from `HookedModel.attach`."""
        self.model = model
        """The clean model."""
        self.lm, self.tokenizer = model.lm, model.tokenizer
        self._vocab_size = model._vocab_size
        self._taps = taps
        self.saes = dict(saes)
        """The attached SAEs by the site that they read."""
        self.outs = dict(outs)
        """The site that each writes, by the one that it reads: the same, but for a transcoder."""

    @property
    def sites(self) -> list[str]:
        """Names of the sites where an SAE is attached."""
        return list(self.saes)

    def detach(self) -> None:
        """Take the SAEs off; the handle cannot be used afterwards. A second call does nothing."""
        with self._taps.lock:
            self._taps.unmount()

    def at(self, site: str) -> Any:
        """What stands at a site, for use inside `trace`: `.pre_acts`, `.latents`, `.reconstruction` are nnsight sites,
        `.input` is x before it and `.output` x after it."""
        self._taps.check_open()
        return self._taps.envoys[self.resolve_site(site)]

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's own tracer, with the attached SAEs as sites: `with hooked.trace(text): ...`."""
        self._taps.check_open()
        return self._taps.trace(*args, **kwargs)

    def resolve_site(self, site: str | None) -> str:
        """The attached site that is meant; None where only one is attached.

        Raises:
            SiteError: nothing is attached there, or None and several are; they are listed.
        """
        if site is None:
            if len(self.saes) == 1:
                return self.sites[0]
            raise SiteError(f"several SAEs are attached, at {', '.join(self.sites)}: say which with site=.")
        if site in self.saes:
            return site
        for name in self.sites:
            if same_site(self.lm, site, name):
                return name
        resolve(self.lm, site)  # a name that the model does not have gets its near misses
        raise SiteError(f"no SAE is attached at {site}; attached are {', '.join(self.sites)}.")

    def actions(self, program: Program) -> dict[str, Action]:
        """The program as actions by site; sites where nothing happens have none."""
        by_site: dict[str, list[tuple[int, Edit]]] = {name: [] for name in self.sites} if program.splice else {}
        for i, edit in enumerate(program.edits):
            by_site.setdefault(self.resolve_site(edit.site), []).append((i, edit))
        actions: dict[str, Action] = {}
        for name, edits in by_site.items():
            actions |= self.where_written(name, functools.partial(EditAction, self.saes[name], edits, program))
        return actions

    def where_written(self, site: str, make: Callable[[SourceAction | None], Action]) -> dict[str, Action]:
        """An action where the SAE of `site` writes; `make` gets what a transcoder reads, None for an SAE."""
        if self.outs[site] == site:
            return {site: make(None)}
        source = SourceAction(site)
        return {site: source, self.outs[site]: make(source)}

    def _call(self, call: Callable[[], Any], program: Program, positions: Positions) -> tuple[Any, Report]:
        actions = self.actions(program)
        if not actions and not self._taps.closed:  # nothing to do: what is attached costs nothing
            with self._taps.lock:
                return call(), Report()
        try:
            result = self._taps.run(call, actions, positions)
        except Exception:
            self._check_overflow(actions)  # the cause, where the model failed on what an edit wrote
            raise
        self._check_overflow(actions)
        return result, _report(program, actions)

    def _check_overflow(self, actions: Mapping[str, Action]) -> None:
        """Raises ArgumentError if x' was too large for the dtype of its site."""
        for site, action in actions.items():
            if not isinstance(action, EditAction) or (place := action.overflow()) is None:
                continue
            row, token, token_id = place
            latents = sorted({latent for p in action.edits for latent in p.edit.latents})
            what = f"the edits of latents {', '.join(map(str, latents))}" if latents else "the splice"
            raise ArgumentError(
                f"{what} at {site} gave a value that {self.lm.dtype} cannot hold, first at token {token} "
                f"({self.tokenizer.decode([token_id])!r}) of row {row}. Use smaller amounts, a program with "
                "norm={'cap': 1.0}, or load the model with dtype=torch.float32."
            )

    @torch.no_grad()
    def run(self, x: Any, actions: Mapping[str, Action]) -> Any:
        """One forward pass with any action at each site (`saehook.editing`); None if a reader stopped it.

        `x` as for a call; cheaper than `hooked(x)` for evaluation, since no report is read.
        """
        batch = self._batch(x)
        arguments = self._arguments(batch, masked=False)
        call = lambda: self.lm(**arguments, use_cache=False)  # noqa: E731
        with contextlib.suppress(StopForward):
            return self._taps.run(call, actions, self._positions(batch, Program()))
        return None

    def latents(self, x: Any, site: str | None = None) -> Any:
        """Latent activations of a text: a `Latents`, or a list of them for a batch. The model runs up to the site."""
        name = self.resolve_site(site)
        batch = self._batch(x)
        reader = ReadAction([], stop=True)
        arguments = self._arguments(batch, masked=False)
        with torch.no_grad():
            with contextlib.suppress(StopForward):
                self._taps.run(
                    lambda: self.lm(**arguments, use_cache=False), {name: reader}, self._positions(batch, Program())
                )
            assert reader.value is not None
            sae = self.saes[name]
            rows = []
            kept = reader.mask(sae.mask_rule).cpu()
            for ids, mask, keep, values in zip(batch.ids, batch.attention_mask.bool(), kept, reader.value, strict=True):
                ids = ids[mask]
                rows.append(
                    Latents(
                        site=name,
                        acts=sae.encode(values[mask.to(values.device)]),
                        ids=ids,
                        tokens=[self.tokenizer.decode([i]) for i in ids.tolist()],
                        mask=keep[mask],
                    )
                )
        return rows[0] if batch.single else rows


def _report(program: Program, actions: Mapping[str, Action]) -> Report:
    edits: dict[int, EditReport] = {}
    editing = {site: action for site, action in actions.items() if isinstance(action, EditAction)}
    for action in editing.values():
        for p in action.edits:
            tokens, dose = p.dose.read()
            edits[p.index] = EditReport(p.edit, tokens, dose)
    sites = []
    for name, action in editing.items():
        tokens, dose = action.dose.read()
        sites.append(SiteReport(name, tokens, dose))
    return Report(edits=tuple(edits[i] for i in range(len(program.edits))), sites=tuple(sites))
