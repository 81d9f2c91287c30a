"""Language models with SAEs attached at named sites, through nnsight. The only file that imports nnsight.

At each site stands a `TapPoint` (`tap_point.py`), a module of its own that nnsight calls from an edit of the model, so the
latents are nnsight sites themselves. The Hugging Face model is not changed: no hook, parameter or buffer is added to it, and a
`HookedModel` stays clean whatever is attached to it. What a run shall do travels in an object of that run, put on the tap
points under the lock of the torch model and taken off in `finally`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def _load_anyio_backend() -> None:
    """Load anyio's backend without nnsight's `.save` on `object`, which its annotations check refuses.

    anyio (Gradio's event loop) loads this module lazily; after `import nnsight` that raises TypeError.
    """
    if importlib.util.find_spec("anyio") is None or "anyio._backends._asyncio" in sys.modules:
        return
    if "nnsight" not in sys.modules:
        importlib.import_module("anyio._backends._asyncio")
        return
    import nnsight
    from nnsight._c import mount, unmount

    mounted = hasattr(object, "save")
    if mounted:
        unmount("save")
    try:
        importlib.import_module("anyio._backends._asyncio")
    finally:
        if mounted:
            mount(nnsight.save, "save")


_load_anyio_backend()

from nnsight import NNsight, TransformersModel  # noqa: E402
from nnsight.intervention.batching import Batcher  # noqa: E402
from nnsight.intervention.envoy import Envoy  # noqa: E402
from nnsight.intervention.interleaver import OutOfOrderError  # noqa: E402
from nnsight.intervention.tracer import InterleavingTracer  # noqa: E402
from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402

from saehook.attachment import check_fingerprint, fingerprint, place_saes  # noqa: E402
from saehook.edit_plan import Attached, EditPlan, Place, plan_edits, run_plan  # noqa: E402
from saehook.editing import Action, ReadAction, StopForward  # noqa: E402
from saehook.errors import (  # noqa: E402
    ArgumentError,
    ShapeError,
    SiteError,
    SiteNotExecutedError,
)
from saehook.hooked_saes import HookedSAEs  # noqa: E402
from saehook.interventions import Edit, Program  # noqa: E402
from saehook.lm_loading import load_lm  # noqa: E402
from saehook.model_input import predicts_next_tokens, takes_text  # noqa: E402
from saehook.positions import Positions, TokenView  # noqa: E402
from saehook.prefix import Follower  # noqa: E402
from saehook.results import Report  # noqa: E402
from saehook.runs import Runs  # noqa: E402
from saehook.sae import SAE  # noqa: E402
from saehook.sites import Site, layer_paths, named_sites, resolve  # noqa: E402
from saehook.tap_point import TapPoint, write_input, write_output  # noqa: E402

_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def lock_of(lm: nn.Module):
    """The one lock of a torch model, whoever wraps it: two runs of one model at a time break nnsight."""
    with _locks_guard:
        return _locks.setdefault(lm, threading.RLock())


class _Batcher(Batcher):
    """Gives each prompt of a trace its rows, also where a generation runs several for it: beams, return sequences."""

    def __init__(self, envoy: Any, kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(envoy, kwargs)
        config = self.kwargs.get("generation_config") or getattr(envoy._module, "generation_config", None)
        names = ("num_beams", "num_return_sequences")
        self.factors = {self.kwargs.get(name) or getattr(config, name, None) or 1 for name in names} - {1}
        """How many rows a value may have for each row of input."""

    def _group(self, tensor: Tensor, group: list) -> list | None:
        """(start, size) of a prompt's rows in a value with several for each row of input; None: nnsight's own rule."""
        factor, rest = divmod(tensor.shape[0], self.total) if tensor.ndim else (0, 0)
        return [factor * place for place in group] if not rest and factor in self.factors else None

    def _narrow_tensor(self, tensor: Tensor, group: list) -> Tensor:
        rows = self._group(tensor, group)
        return super()._narrow_tensor(tensor, group) if rows is None else tensor.narrow(0, *rows)

    def _widen_tensor(self, full: Tensor, group: list, edited: Tensor) -> Tensor:
        rows = self._group(full, group)
        if rows is None:
            return super()._widen_tensor(full, group, edited)
        start, size = rows
        return torch.cat([full[:start], edited, full[start + size :]])


class _LockedTracer(InterleavingTracer):
    def execute(self, code: Any) -> None:
        assert self.envoy is not None  # nnsight drops it after the run
        with lock_of(self.envoy._module):
            super().execute(code)


class _Model(TransformersModel):
    """nnsight's model, whose traces have their torch model to themselves."""

    _batcher_class = _Batcher

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        return super().trace(*inputs, **{"tracer_cls": _LockedTracer, **kwargs})


class _TextlessModel(NNsight):
    """The same for a model that takes no text."""

    def trace(self, *inputs: Any, **kwargs: Any) -> Any:
        return super().trace(*inputs, **{"tracer_cls": _LockedTracer, **kwargs})


def _wrapped(lm: Any, tokenizer: Any, device: Callable[[], Any]) -> Any:
    """nnsight's view of a model."""
    with warnings.catch_warnings():
        # A module named `output`, as in BERT, is `E_output` on nnsight's envoys; sites name it by its path.
        warnings.filterwarnings("ignore", message=".*which nnsight already serves on every module")
        if tokenizer is None:
            return _TextlessModel(lm)
        task = "text-generation" if predicts_next_tokens(lm) else "feature-extraction"
        # nnsight sets the padding side and token of the tokenizer it gets.
        tokenizer = copy.deepcopy(tokenizer)
        places = getattr(lm, "hf_device_map", None)
        if not places:
            # Without a device nnsight would move the model to the first accelerator.
            return _Model(lm, task=task, tokenizer=tokenizer, device=device())
        try:
            # The pipeline that nnsight makes takes the first of these for a torch device, which "disk" is not.
            lm.hf_device_map = {"": device()}
            return _Model(lm, task=task, tokenizer=tokenizer)
        finally:
            lm.hf_device_map = places


def _no_sae(site: str | None) -> str:
    raise SiteError(f"a condition asks for a latent{f' at {site}' if site else ''}, and no SAE is attached.")


def _asked(interleaver: Any, path: str) -> Callable[[], bool]:
    """Whether a block of the trace waits for a value inside the module at `path`, or a cache keeps one.

    A block waits for the next value that it reads or writes, so at the module's forward nothing else can be wanted of it.
    """
    inside, own = f"{path}.", {f"{path}.{side}" for side in ("input", "output", "skip")}

    def wanted(location: str) -> bool:
        return location.startswith(inside) and location not in own

    return lambda: any(map(wanted, interleaver.parked)) or any(map(wanted, interleaver.observers))


class _Taps:
    """Tap points mounted at sites of one nnsight model, and the edited copy of the model that calls them."""

    def __init__(
        self,
        model: Any,
        sites: Sequence[Site],
        attached: Mapping[str, Attached],
        lock: Any,
    ) -> None:
        """`sites`: all that may be read or written; `attached`: SAEs by name, each at one of them."""
        self.lock = lock
        self.closed = False
        self.view: TokenView | None = None
        self.positions: Positions | None = None
        self.sites = {site.name: site for site in sites}
        self.shape: torch.Size | None = None
        """(rows, tokens) of the forward pass that a trace runs."""
        self.prefix: Follower | None = None
        """What records layers of this run, or leaves them out."""
        self.points: dict[str, TapPoint] = {}
        """By site, and by name of the SAE."""
        self.envoys: dict[str, Envoy] = {}
        envoys = dict(model.named_modules())
        prefix = model.path
        self.layers = [envoys[f"{prefix}.{path}"] for path in layer_paths(model._module)]
        _check_no_trace(model)
        edited = self._with_positions(model)
        for site in sites:
            parent = envoys[f"{prefix}.{site.path}"]
            here = [name for name, one in attached.items() if one.reads == site.name]
            for name in here or [site.name]:
                # What a run does at the site happens at its first point; in a trace each SAE has its own.
                point = TapPoint(attached[name].sae if name in attached else None)
                envoy = self._mount(parent, point)
                point.shape = lambda: self.shape
                self.points.setdefault(site.name, point)
                self.points[name], self.envoys[name] = point, envoy
                edited = self._with_tap(edited, parent, envoy, site)
        for name, one in attached.items():
            if one.reads != one.writes:
                self.points[name].elsewhere = True
                self.points[one.writes].transcoders.append(self.points[name])
        self.edited = edited

    @staticmethod
    def _mount(parent: Envoy, point: TapPoint) -> Envoy:
        """Hang an envoy of its own below the site's, as nnsight does with its `generator`: the torch model is untouched."""
        names = {name for name in parent.__dict__ if name.startswith("sae")}
        name = next(name for i in range(len(names) + 1) if (name := f"sae{i or ''}") not in names)
        envoy = Envoy(point, path=f"{parent.path}.{name}", interleaver=parent.interleaver, parent=parent)
        point.asked = _asked(envoy.interleaver, envoy.path)
        object.__setattr__(parent, name, envoy)
        parent._children.append(envoy)
        return envoy

    def unmount(self) -> None:
        """Remove the envoys again; nothing runs through these tap points afterwards."""
        self.closed = True
        for envoy in self.envoys.values():
            parent = envoy.parent
            if parent is None:
                continue
            parent._children[:] = [child for child in parent._children if child is not envoy]
            for name in [name for name, value in parent.__dict__.items() if value is envoy]:
                object.__delattr__(parent, name)

    def check_open(self) -> None:
        """Raises SiteError after `unmount`."""
        if self.closed:
            raise SiteError("these SAEs were detached. Attach them again: model.attach(...).")

    def _check_recomputed(self, names: Iterable[str]) -> None:
        """Raises ArgumentError where the backward pass would run a site again, when no action stands there any more."""
        for name in names if torch.is_grad_enabled() else ():
            parts = self.sites[name].path.split(".")
            around = [self.edited._module.get_submodule(".".join(parts[:i])) for i in range(1, len(parts))]
            layers = [module for module in around if isinstance(module, GradientCheckpointingLayer)]
            if any(layer.gradient_checkpointing and layer.training for layer in layers):
                raise ArgumentError(
                    f"gradient checkpointing computes {name} again in the backward pass, without what is done there. Switch "
                    "it off, use torch.no_grad() if no gradient is wanted, or choose the input or output of a layer."
                )

    def _begin_pass(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note which tokens the model is about to process; called at every forward pass of the model."""
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        if self.positions is None:  # a user's trace
            self.shape = getattr(ids, "shape", None)
            for point in self.points.values():
                point.changes = None  # of a pass that was stopped
            return
        if ids is None:  # images, or embeddings: what stands for the ids is known already
            ids = self.positions.ids
        past = kwargs.get("past_key_values")
        # int() at once: a static cache returns a tensor that it goes on changing.
        self.view = self.positions.view(0 if past is None else int(past.get_seq_length()), ids)

    def _with_positions(self, model: Any) -> Any:
        begin = self._begin_pass
        with model.edit() as (tracer, edited):
            steps = tracer.iter[:]
            with contextlib.suppress(OutOfOrderError):  # how an open loop ends
                for _ in steps:
                    args, kwargs = edited.inputs
                    begin(args, kwargs)
                    if self.prefix is not None:
                        self.prefix.follow(self.layers)
        return edited

    @staticmethod
    def _with_tap(model: Any, parent: Envoy, envoy: Envoy, site: Site) -> Any:
        visit = write_input if site.side == "input" else write_output
        with model.edit() as (tracer, edited):
            steps = tracer.iter[:]
            with contextlib.suppress(OutOfOrderError):
                for _ in steps:
                    visit(parent, envoy, site)
        return edited

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's tracer on the edited copy. It must be returned as it is: nnsight reads the caller's source."""
        return self.edited.trace(*args, **kwargs)

    def run(
        self,
        call: Callable[[], Any],
        actions: Mapping[str, Action],
        positions: Positions,
        prefix: Follower | None = None,
    ) -> Any:
        """`call()` with an action at some of the sites; the other sites pass on what they get. `prefix`: what
        records layers of the run, or leaves them out.

        Raises:
            SiteNotExecutedError: a site with an action did not run.
            SiteError: such a site ran twice in one forward pass.
            ArgumentError: such a site would be computed again, unedited, for the gradient.
        """
        visited: dict[str, TokenView] = {}

        def at(name: str) -> Callable[[Tensor], Tensor]:
            action = actions.get(name)
            if action is None:
                return _unchanged

            def act(x: Tensor) -> Tensor:
                assert self.view is not None
                if visited.get(name) is self.view:
                    raise SiteError(
                        f"the model runs {name} twice in one forward pass (a layer that stands at two places?), so it is unclear "
                        "which of them is meant. Choose a site that runs once."
                    )
                visited[name] = self.view
                shape = self.view.ids.shape
                if x.shape[:-1] == (shape.numel(),):  # a module that gets all rows as one list of tokens
                    return action(x.reshape(*shape, -1), self.view).reshape(x.shape)
                if x.shape[:-1] == shape or isinstance(action, ReadAction):
                    return action(x, self.view)
                raise ShapeError(
                    f"the value at {name} has shape {tuple(x.shape)} for {shape[0]} rows of {shape[1]} tokens: not one "
                    "vector per token, so it is unclear which of them an edit means. Choose another site."
                )

            return act

        with self.lock:
            self.check_open()
            _check_no_trace(self.edited)
            self._check_recomputed(actions)
            self.positions, self.prefix = positions, prefix
            for point in self.points.values():
                point.action = _unchanged
            for name in self.sites:
                self.points[name].action = at(name)
            try:
                # nnsight wants an input to assemble; what runs is `call`, with inputs of its own.
                result = self.edited.trace(_NO_INPUT, fn=lambda *_, **__: call(), trace=False)
            except StopForward:
                _check_visited(actions, visited)
                raise
            finally:
                self.positions, self.view, self.prefix = None, None, None
                for point in self.points.values():
                    point.action = None
        _check_visited(actions, visited)
        return result


def _check_visited(actions: Iterable[str], visited: Mapping[str, Any]) -> None:
    """Raises SiteNotExecutedError where a site with an action did not run."""
    missing = [name for name in actions if name not in visited]
    if missing:
        raise SiteNotExecutedError(
            f"the model did not run {', '.join(missing)} (a skipped layer or an unused expert?), so what was asked for "
            "there did not happen. Attach at a site that every forward pass reaches."
        )


def _unchanged(x: Tensor) -> Tensor:
    return x


_NO_INPUT = torch.zeros(1, 1, dtype=torch.long)


def _check_no_trace(model: Any) -> None:
    """Raises ArgumentError where the model is running already: in the block of a trace, or in what a run calls. To be called
    with the lock held."""
    if model.interleaver.interleaving:
        raise ArgumentError(
            "the model was called in the block of a trace, or in what a run itself calls such as a streamer, where it is "
            "running already. Call it before or after, or write what you want to change in the block."
        )


class HookedModel(Runs):
    """A Hugging Face language model whose sites can be read and written. It stays clean: SAEs go on a copy."""

    def __init__(self, lm: Any, tokenizer: Any, *, model_id: str | None = None) -> None:
        """`lm` and `tokenizer`: loaded Hugging Face objects; neither is changed. A model that takes images has no tokenizer.
        See `from_pretrained`."""
        if tokenizer is None and takes_text(lm):
            raise ArgumentError("a loaded model needs its tokenizer, too: HookedModel.from_pretrained(lm, tokenizer).")
        self.lm = lm.eval()
        self.tokenizer = tokenizer
        self.model_id = model_id or getattr(lm.config, "name_or_path", None) or type(lm).__name__
        self._vocab_size = lm.get_input_embeddings().num_embeddings if takes_text(lm) else 0
        self._lock = lock_of(lm)
        with self._lock:
            self._nnsight = _wrapped(lm, tokenizer, lambda: self.device)
        self._taps: dict[tuple[str, ...], _Taps] = {}

    @classmethod
    def from_pretrained(
        cls,
        lm: Any,
        tokenizer: Any = None,
        *,
        device: str | torch.device | None = None,
        dtype: Any = None,
        **hf_arguments: Any,
    ) -> HookedModel:
        """Load a language model.

        Args:
            lm: a hub id, a path, or a loaded Hugging Face model (then with its tokenizer). Encoders such as BERT and vision
                models such as ViT are loaded as what their config says that they are.
            tokenizer: a hub id, a path or a tokenizer; None: the model's own.
            device: None: an accelerator if there is one. Not together with `device_map=`.
            dtype: a torch.dtype, or `auto`; None: float32 on the CPU, where half precision is slow, else the file's.
            hf_arguments: handed to the model's `from_pretrained`; no remote code is trusted unless asked for.

        Raises:
            FormatError: a folder that holds no model.
        """
        from transformers import AutoTokenizer

        if isinstance(tokenizer, (str, Path)):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if isinstance(lm, nn.Module):
            if device is not None or dtype is not None:
                lm = lm.to(device=device, dtype=dtype)
            return cls(lm, tokenizer)
        name = str(lm)
        loaded, tokenizer = load_lm(name, tokenizer, device, dtype, hf_arguments)
        return cls(loaded, tokenizer, model_id=name)

    @property
    def name(self) -> str:
        """The hub id, or the folder's name: nothing of the machine's paths."""
        return Path(self.model_id).resolve().name if Path(self.model_id).exists() else self.model_id

    def sites(self, pattern: str | None = None) -> list[Site]:
        """All named sites with their widths, or those that `pattern` matches. Does not run the model."""
        return named_sites(self.lm) if pattern is None else resolve(self.lm, pattern)

    def _call(
        self,
        call: Callable[[], Any],
        program: Program,
        positions: Positions,
        watch: Callable[[EditPlan], None] | None = None,
    ) -> tuple[Any, Report]:
        if program.splice or any(isinstance(edit, Edit) for edit in program.edits):
            raise SiteError("no SAE is attached, so there is nothing to edit or splice. Call model.attach(sae) first.")
        if program.edits:
            plan = plan_edits(program, {}, _no_sae, self.place)
            if watch is not None:
                watch(plan)
            taps = self._readers(tuple(plan.actions), [resolve(self.lm, name)[0] for name in plan.actions])
            return run_plan(taps, call, plan, program, positions, self.lm, self.tokenizer)
        with self._lock:
            _check_no_trace(self._nnsight)
            return call(), Report()

    @property
    def nnsight(self) -> Any:
        """The nnsight model itself, to be used inside `trace`: `model.nnsight.output.logits`, `model.nnsight.lm_head`, ..."""
        return self._nnsight

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's own tracer on the clean model: `with model.trace(text): ...`."""
        self._check_trace(kwargs)
        return self._nnsight.trace(*args, **kwargs)

    def generating(self, *args: Any, **kwargs: Any) -> Any:
        """nnsight's own tracer of a generation: `with model.generating(text, max_new_tokens=8) as tracer: ...`.

        `tracer.iter[:8]` walks through the forward passes, `tracer.result` are the ids [rows, length]. `kwargs` go to the
        model's `generate`.
        """
        return self.trace(*args, fn=self._nnsight.generate, **self._generation_settings(kwargs))

    def envoy(self, site: str) -> Any:
        """The nnsight envoy of the module at a site, to be used inside `trace`."""
        return dict(self._nnsight.named_modules())[f"{self._nnsight.path}.{resolve(self.lm, site)[0].path}"]

    @torch.no_grad()
    def activations(
        self, x: Any, sites: str | Sequence[str], attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Activations at the sites by name, [rows, length, width] in the model's dtype and on its device.

        One forward pass that stops after the deepest of the sites. Nothing is masked.
        """
        batch = self._batch(x, attention_mask)
        found = resolve(self.lm, sites)
        taps = self._readers(tuple(site.name for site in found), found)
        group: list[ReadAction] = []
        actions = {site.name: ReadAction(group, stop=True) for site in found}
        arguments = self._arguments(batch, masked=attention_mask is not None)
        with contextlib.suppress(StopForward):
            taps.run(lambda: self.lm(**arguments, use_cache=False), actions, self._positions(batch, Program()))
        return {name: action.value for name, action in actions.items() if action.value is not None}

    def run(self, x: Any, actions: Mapping[str, Action]) -> Any:
        """One forward pass with any action at each site, by its name; the model's own output, in the caller's grad mode."""
        batch = self._batch(x)
        found = [resolve(self.lm, name)[0] for name in actions]
        arguments = self._arguments(batch, masked=False)
        taps = self._readers(tuple(site.name for site in found), found)
        by_name = dict(zip((site.name for site in found), actions.values(), strict=True))
        return taps.run(lambda: self.lm(**arguments, use_cache=False), by_name, self._positions(batch, Program()))

    def _readers(self, names: tuple[str, ...], sites: Sequence[Site]) -> _Taps:
        with self._lock:
            if names not in self._taps:
                self._taps[names] = _Taps(self._nnsight, sites, {}, self._lock)
            return self._taps[names]

    def place(self, site: str | None) -> Place:
        """Where the vector of an edit is written.

        Raises:
            SiteError: no site is named, or not exactly one.
        """
        if site is None:
            raise SiteError("a vector does not say at which site it is written. Name it: site='layers.2.resid_post'.")
        found = resolve(self.lm, site)
        if len(found) != 1:
            raise SiteError(f"{site!r} names {len(found)} sites; a vector is written at exactly one.")
        return Place(found[0].name, self.width(found[0]), self.device_at(found[0].path))

    def width(self, site: Site) -> int:
        """Width of a site; runs one token through the model where the config does not say."""
        if site.width is not None:
            return site.width
        return self.activations([0], site.name)[site.name].shape[-1]

    def attach(self, saes: SAE | Mapping[Any, SAE | Sequence[SAE]], check: str = "site") -> HookedSAEs:
        """A handle on this model with SAEs at sites; the model itself stays clean.

        Args:
            saes: an SAE whose file says its site, or `{site: sae}`; a transcoder stands at the site that it reads, and
                `{(site, site_out): sae}` says where it writes. `{site: [sae, other]}` attaches several, named `site#0`,
                `site#1`, ... SAEs are moved to where their site computes.
            check: `site`: a recorded site or width that differs is an error; `fingerprint`: also measure FVU, L0 and
                norm on the recorded tokens and refuse a factor above 2; `off`: only widths.

        Raises:
            SiteError: unknown site, no site recorded and none named, an SAE of another site.
            ShapeError: an SAE of another width. Nothing is attached then.
        """
        if check not in {"site", "fingerprint", "off"}:
            raise ArgumentError(f"check={check!r} is unknown; expected 'site', 'fingerprint' or 'off'.")
        attached, sites = place_saes(self, saes, checked=check != "off")
        for name, (sae, reads, writes) in attached.items():
            sae.to(self.device_at(sites[reads].path))
            if check == "fingerprint":
                self.check_fingerprint(name, writes, sae)
        with self._lock:
            taps = _Taps(self._nnsight, list(sites.values()), attached, self._lock)
        return HookedSAEs(self, taps, attached)

    def more_taps(self, attached: Mapping[str, Attached], names: Sequence[str]) -> Any:
        """Tap points for the same SAEs and these sites."""
        wanted = dict.fromkeys([*(site for one in attached.values() for site in one[1:]), *names])
        with self._lock:
            return _Taps(self._nnsight, [resolve(self.lm, name)[0] for name in wanted], attached, self._lock)

    def fingerprint(self, site: str, sae: SAE, ids: Tensor, *, site_out: str | None = None) -> dict[str, Any]:
        """What the SAE does on one window of ids: FVU, L0 and mean norm over the mask, and the ids.

        `site_out`: where a transcoder writes.
        """
        return fingerprint(self, site, sae, ids, site_out)

    def check_fingerprint(self, site: str, site_out: str, sae: SAE) -> None:
        """Measure an SAE that reads `site` and writes `site_out` on the tokens of the fingerprint in its file.

        Raises:
            MissingStatError: its file holds none.
            SiteError: FVU, L0 or norm differ by more than a factor of 2.
        """
        check_fingerprint(self, site, site_out, sae)
