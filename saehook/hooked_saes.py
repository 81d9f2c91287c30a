"""A model with SAEs attached: edits, splicing, latents. How it runs through nnsight is in `hooked_model.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from saehook.attribution import Metric, attribute_rows
from saehook.dose_response import DoseResponse, sweep
from saehook.edit_blocks import SourceAction
from saehook.edit_plan import Attached, EditPlan, Place, plan_edits, run_plan
from saehook.editing import Action, ReadAction, StopForward
from saehook.errors import SiteError
from saehook.interventions import NO_VALUE, AnyEdit, Edit, Program, VectorEdit
from saehook.kl_strength import calibrated
from saehook.positions import Positions
from saehook.prefix import Follower
from saehook.results import Latents, Report
from saehook.runs import Runs, frozen
from saehook.sites import resolve, same_site
from saehook.sparse_acts import encode_for
from saehook.where import EVERYWHERE, Where

if TYPE_CHECKING:
    from saehook.hooked_model import HookedModel


class HookedSAEs(Runs):
    """A model with SAEs attached; made by `HookedModel.attach`. Edits are arguments of each call, no state stays."""

    def __init__(self, model: HookedModel, taps: Any, attached: Mapping[str, Attached]) -> None:
        """`taps`: the mounted tap points, from `HookedModel.attach`."""
        self.model = model
        """The clean model."""
        self.lm, self.tokenizer = model.lm, model.tokenizer
        self._vocab_size = model._vocab_size
        self._taps = taps
        self._more_taps: dict[tuple[str, ...], Any] = {}
        self.attached = dict(attached)
        """The attached SAEs at their places, by name: the site that each reads, with `#0`, `#1`, ... where several do."""
        self.saes = {name: one.sae for name, one in attached.items()}
        """The attached SAEs by name."""

    @property
    def sites(self) -> list[str]:
        """Names of the attached SAEs: the sites that they read, with `#0`, `#1`, ... where several read the same."""
        return list(self.saes)

    def detach(self) -> None:
        """Take the SAEs off; the handle cannot be used afterwards. A second call does nothing."""
        with self._taps.lock:
            for taps in (self._taps, *self._more_taps.values()):
                taps.unmount()

    def at(self, site: str) -> Any:
        """What stands at a site, for use inside `trace` and `generating`.

        Its `.pre_acts`, `.latents`, `.reconstruction` and `.error` are nnsight sites in this order, `.input` is x before
        them and `.output` x after them: x' = reconstruction + error, as they were left. Of a transcoder, `.error` is
        y - y_hat where it writes, and x' is there.
        """
        self._taps.check_open()
        return self._taps.envoys[self.resolve_site(site)]

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's own tracer, with the attached SAEs as sites: `with hooked.trace(text): ...`."""
        self._taps.check_open()
        self._check_trace(kwargs)
        return self._taps.trace(*args, **kwargs)

    def generating(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's own tracer of a generation, with the attached SAEs as sites at every step:
        `with hooked.generating(text, max_new_tokens=8) as tracer: ...`; as `HookedModel.generating`."""
        return self.trace(*args, fn=self.nnsight.generate, **self._generation_settings(kwargs))

    @property
    def nnsight(self) -> Any:
        """The nnsight model with the SAEs, to be used inside `trace`: `hooked.nnsight.output.logits`, ..."""
        self._taps.check_open()
        return self._taps.edited

    def check_fingerprints(self) -> None:
        """Measure each SAE whose file records a fingerprint on the tokens recorded there.

        Raises:
            SiteError: one does something else than its file says: it belongs to another model, revision or site.
        """
        for name, one in self.attached.items():
            if one.sae.metadata.get("fingerprint"):
                self.model.check_fingerprint(name, one.writes, one.sae)

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
        place, number, which = site.partition("#")
        for name, one in self.attached.items():
            if name.endswith(number + which) and same_site(self.lm, place, one.reads) and ("#" in name) == bool(number):
                return name
        resolve(self.lm, place)  # a name that the model does not have gets its near misses
        several = [name for name in self.sites if name.startswith(f"{site}#")]
        if several:
            raise SiteError(f"several SAEs are attached at {site}: say which, {' or '.join(several)}.")
        raise SiteError(f"no SAE is attached at {site}; attached are {', '.join(self.sites)}.")

    def plan(self, program: Program) -> EditPlan:
        """What the program does in a run, as actions by site. Raises what its edits may raise before anything runs."""
        return plan_edits(program, self.attached, self.resolve_site, self._place)

    def _place(self, site: str | None) -> Place:
        """Where a vector is written."""
        if site is None or site in self.attached:
            site = self.attached[self.resolve_site(site)].writes
        return self.model.place(site)

    def where_written(self, name: str, make: Callable[[SourceAction | None], Action]) -> dict[str, Action]:
        """An action where the SAE of that name writes; `make` gets what a transcoder reads, None for an SAE."""
        _, reads, writes = self.attached[name]
        if reads == writes:
            return {reads: make(None)}
        source = SourceAction(reads)
        return {reads: source, writes: make(source)}

    def _call(
        self,
        call: Callable[[], Any],
        program: Program,
        positions: Positions,
        watch: Callable[[EditPlan], None] | None = None,
    ) -> tuple[Any, Report]:
        plan = self.plan(program)
        if watch is not None:
            watch(plan)
        if not plan.actions and not self._taps.closed:  # nothing to do: what is attached costs nothing
            return self.model._call(call, Program(), positions)
        return run_plan(self._taps_for(plan.actions), call, plan, program, positions, self.lm, self.tokenizer)

    def _taps_for(self, sites: Iterable[str]) -> Any:
        """The tap points, with others beside them where a vector is written at a site without SAE."""
        names = tuple(name for name in sites if name not in self._taps.sites)
        if not names:
            return self._taps
        with self._taps.lock:
            self._taps.check_open()
            if names not in self._more_taps:
                self._more_taps[names] = self.model.more_taps(self.attached, names)
            return self._more_taps[names]

    def run(
        self,
        x: Any,
        actions: Mapping[str, Action],
        *,
        gradients: bool = False,
        prefix: Follower | None = None,
    ) -> Any:
        """One forward pass with any action at each site (`saehook.editing`); None if a reader stopped it.

        `x` as for a call; cheaper than `hooked(x)` for evaluation, since no report is read. The sites need no SAE. With
        `gradients` it is recorded for those of what the actions put in, in the caller's grad mode; the model's parameters get
        none. `prefix`: what records layers of the pass, or leaves them out (`saehook.prefix`).
        """
        batch = self._batch(x)
        arguments = self._arguments(batch, masked=False)
        call = lambda: self.lm(**arguments, use_cache=False)  # noqa: E731
        with self._taps.lock, frozen(self.lm) if gradients else torch.no_grad(), contextlib.suppress(StopForward):
            return self._taps_for(actions).run(call, actions, self._positions(batch, Program()), prefix)
        return None

    def sweep(
        self,
        prompt: Any,
        latent: int | Sequence[int] | AnyEdit,
        strengths: Iterable[float],
        op: str = "add",
        unit: str = "raw",
        site: str | None = None,
        where: Where | None = None,
        active_only: bool = False,
        target: int | str | None = None,
        seed: int | None = None,
        **hf: Any,
    ) -> DoseResponse:
        """Continue one prompt at many strengths of one edit, all in one batch; see `saehook.dose_response`.

        Row r has the tokens of `generate(prompt, edits=[edit with strengths[r]], seed=seed, **hf)`.

        Args:
            prompt: text, or ids.
            latent: one or several; or a whole `Edit` or `VectorEdit`, of which the strengths are the value. What follows is
                its own then.
            op, unit, site, where, active_only: as for an `Edit`; `op` is one that has a value.
            target: the token, or its id, whose log-probability is measured; None: the one that the latent's direction
                promotes most through the unembedding, or, at sites of another width, the unedited next token.
            hf: as for `generate`; one text per row, so no beams and return sequences.

        Raises:
            ArgumentError: no strength, one that is no finite number, several prompts, a target that is no single token,
                an option of `generate` that is not for rows.
        """
        if isinstance(latent, (Edit, VectorEdit)):
            edit = latent
        else:
            edit = Edit(
                op=op,
                latents=tuple(latent) if isinstance(latent, Iterable) else (latent,),
                value=None if op in NO_VALUE else 1.0,
                unit=unit,
                site=site,
                where=EVERYWHERE if where is None else where,
                active_only=active_only,
            )
        return sweep(self, prompt, edit, strengths, target=target, seed=seed, **hf)

    def calibrate(self, edits: Program | AnyEdit | Iterable[AnyEdit], text: Any, *, tolerance: float = 0.01) -> Program:
        """Turn strengths that are a KL (`unit="kl"`) into amounts.

        Each such edit alone, with the error and norm of the program, changes the model's next tokens on `text` by a mean
        KL(unedited ‖ edited) of |value| nats per token; a negative value goes the other way: it subtracts, or scales down.

        Args:
            edits: edits or a program; those with another unit stay as they are.
            text: text, ids, a list of either, or windows [n, length].
            tolerance: how far the KL may be from the one asked for, as a share of it.

        Raises:
            ArgumentError: no amount reaches the KL; the largest that was reached is named.
        """
        return calibrated(self, Program.of(edits), text, tolerance=tolerance)

    def latents(self, x: Any, site: str | None = None) -> Any:
        """Latent activations of a text: a `Latents`, or a list of them for a batch. The model runs up to the site."""
        name = self.resolve_site(site)
        batch = self._batch(x)
        reader = ReadAction([], stop=True)
        arguments = self._arguments(batch, masked=False)
        with torch.no_grad():
            with contextlib.suppress(StopForward):
                self._taps.run(
                    lambda: self.lm(**arguments, use_cache=False),
                    {self.attached[name].reads: reader},
                    self._positions(batch, Program()),
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
                        held=encode_for(sae, values[mask.to(values.device)]),
                        ids=ids,
                        tokens=[self.tokenizer.decode([i]) if self.tokenizer else "" for i in ids.tolist()],
                        mask=keep[mask],
                    )
                )
        return rows[0] if batch.single else rows

    def attribute(
        self, x: Any, metric: Metric, *, steps: int | None = None, exact: bool = False, by_token: bool = True
    ) -> Any:
        """What each active latent of each attached SAE contributes to a metric: an `Attribution`, or a list of them for a
        batch. Its definitions, and what an effect means at several sites, are in `saehook.attribution`.

        Args:
            x: as for a call.
            metric: `Logit(" token")`, `Logit(" one", minus=" other")`, `LogProb(" token")`, `Loss()`, or a function of
                one row's logits, [S, vocab] without padding, that returns one number as a tensor.
            steps: None: first order, one forward and one backward pass. A number: integrated gradients with as many points,
                as many passes for each SAE.
            exact: ablate each latent on each token where it fires, many in a batch; the metric needs no gradient.
            by_token: False: one effect for each latent. Exact effects are then those of ablating it on all its tokens at
                once, the others sums.

        Raises:
            ArgumentError: a metric that is none, names no single token, gives no finite number or has no gradient.
        """
        batch = self._batch(x)
        rows = [ids[mask] for ids, mask in zip(batch.ids, batch.attention_mask.bool(), strict=True)]
        results = attribute_rows(self, rows, metric, steps=steps, exact=exact, by_token=by_token)
        return results[0] if batch.single else results
