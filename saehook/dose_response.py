"""Dose–response of an edit: one prompt at many strengths, all rows in one batch on one cache of the prompt.

One row per strength, and the unedited one. The prompt up to the first token that the edit selects runs once; its cache is
repeated for the rows. A row has the tokens of its single run, `hooked.generate(prompt, edits=[edit])`; sampled, all rows
draw with the same noise, that of the single run with this seed.

Measured over the T new tokens x_t of a row, each after the prompt and the row's own tokens; p is the unedited model, q the
edited one, both without temperature or other changes of sampling:

    target_logprob        log q(target | prompt), at the first new token
    mean_target_logprob   (1/T) Σ log q(target | prompt, x_<t)
    kl                    (1/T) Σ KL(p ‖ q), nats
    loss                  (1/T) Σ -log p(x_t), nats
    repetition            1 - distinct 4-grams / 4-grams of the new ids (seq-rep-4, Welleck et al. 2020); 0 below 4 tokens
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

from saehook.config import MaskRule
from saehook.errors import ArgumentError, NoEffectWarning
from saehook.interventions import AnyEdit, Edit, Program
from saehook.metrics import token_kl
from saehook.results import Generation, Report
from saehook.sampling_noise import RandomState
from saehook.tokenization import Batch

if TYPE_CHECKING:
    from saehook.hooked_model import HookedModel
    from saehook.hooked_saes import HookedSAEs

MAX_LOGITS = 2**24
"""Logits of the unedited model at a time; as many rows as fit, and at least one."""
NGRAM = 4
TEXT_WIDTH = 60
_ONE_TEXT = ("num_beams", "num_return_sequences")
_NOT_FOR_ROWS = ("assistant_model", "prompt_lookup_num_tokens", "streamer", "past_key_values", "custom_generate")


@dataclass(frozen=True)
class DoseRow:
    """One strength."""

    strength: float | None
    """None: the unedited row."""
    generation: Generation
    """The text, and what the edit did in this row."""
    dose: float
    """Mean of ‖Δ‖/‖x‖ over the tokens that the edit selected."""
    target_logprob: float
    """Constant where the edit selects generated tokens only: look at the mean then."""
    mean_target_logprob: float
    kl: float
    loss: float
    repetition: float


@dataclass(frozen=True, repr=False)
class DoseResponse:
    """What `sweep` found; as text by `table()` and `print`, as data by `to_json()`."""

    edit: AnyEdit
    """The edit; its value is that of the first strength."""
    rows: tuple[DoseRow, ...]
    """In the order of the strengths."""
    unedited: DoseRow
    """The same prompt and noise without the edit."""
    prompt_ids: Tensor
    """[L] int64 on the CPU."""
    target: int
    """The id whose log-probability was measured."""
    target_token: str
    """Its text."""
    shared_tokens: int
    """Tokens of the prompt that ran once for all rows."""
    note: str = ""
    """Why the rows shared no cache though the edit would have let them; empty where they did."""

    def table(self) -> str:
        """One line per row, texts cut to their start."""
        head = ("strength", "dose", "target", "(mean)", "kl", "loss", "repeated", "text")
        lines: list[tuple[str, ...]] = [head]
        for row in (self.unedited, *self.rows):
            numbers = (row.dose, row.target_logprob, row.mean_target_logprob, row.kl, row.loss, row.repetition)
            text = repr(row.generation.text)
            lines.append(
                (
                    "unedited" if row.strength is None else f"{row.strength:g}",
                    *(f"{number:.3f}" for number in numbers),
                    text if len(text) <= TEXT_WIDTH else text[: TEXT_WIDTH - 1] + "…",
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
        table = "\n".join(
            "  ".join([*(cell.rjust(w) for cell, w in zip(line, widths, strict=False)), line[-1]]) for line in lines
        )
        notes = [f"first strength: {self.edit}"]
        notes.append(f"target: log-probability of {self.target_token!r}, next token and mean over the new ones")
        notes.append(f"{self.shared_tokens} of {len(self.prompt_ids)} prompt tokens ran once for all rows")
        return "\n".join([table, *notes, *([self.note] if self.note else [])])

    def __repr__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """The rows with their ids, texts and measures, the edit as a program, floats unrounded."""

        def row(given: DoseRow) -> dict[str, Any]:
            data = {f.name: getattr(given, f.name) for f in dataclasses.fields(given) if f.name != "generation"}
            tokens = sum(edit.tokens for edit in given.generation.report.edits)
            return {
                **data,
                "tokens": tokens,
                "new_ids": given.generation.new_ids.tolist(),
                "text": given.generation.text,
            }

        data = {
            "program": json.loads(Program(edits=[self.edit]).to_json()),
            "prompt_ids": self.prompt_ids.tolist(),
            "target": {"id": self.target, "token": self.target_token},
            "shared_tokens": self.shared_tokens,
            "note": self.note,
            "unedited": row(self.unedited),
            "rows": [row(r) for r in self.rows],
        }
        return json.dumps(data, indent=1)


class SameNoise(TorchFunctionMode):
    """While open, `torch.multinomial` draws each row of a batch as if it were alone: all rows with the same noise, and the
    random state goes on as after one row."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.multinomial:
            return func(*args, **(kwargs or {}))
        probs, *rest = args
        cuda = probs.device.type == "cuda"
        before = torch.cuda.get_rng_state(probs.device) if cuda else torch.get_rng_state()
        drawn = []
        for row in probs.split(1):
            if cuda:
                torch.cuda.set_rng_state(before, probs.device)
            else:
                torch.set_rng_state(before)
            drawn.append(func(row, *rest, **(kwargs or {})))
        return torch.cat(drawn)


@torch.no_grad()
def sweep(
    hooked: HookedSAEs,
    prompt: Any,
    edit: AnyEdit,
    strengths: Iterable[float],
    *,
    target: int | str | None = None,
    seed: int | None = None,
    **hf: Any,
) -> DoseResponse:
    """`HookedSAEs.sweep` for any edit that has a value; the strengths take the place of that value."""
    values = _strengths(strengths)
    if edit.value is None:
        raise ArgumentError(f"{edit.op!r} takes no value, so it has no strength. Use 'add', 'set' or 'scale'.")
    if edit.where.rows is not None:
        raise ArgumentError(f"the rows of a sweep are its strengths, but where names rows {edit.where.rows}.")
    edits = [dataclasses.replace(edit, value=value) for value in values]
    batch = hooked._batch(prompt)
    if len(batch.ids) != 1:
        raise ArgumentError(f"a sweep takes one prompt, not {len(batch.ids)}. Call it once for each.")
    for one in edits:
        hooked.plan(Program(edits=[one]))  # what the SAE or site cannot do is an error before anything runs
    wanted = None if target is None else _target_id(hooked, target)
    rows = run_rows(hooked, batch, edits, seed, hf)
    if wanted is None:
        wanted = _promoted(hooked, edit)
    if wanted is None:
        wanted = int(rows.logits[0][-1].argmax())
    measured = _measure(hooked.model, rows, batch.ids.shape[1], wanted)
    made = [
        DoseRow(strength, generation, dose, **measures, repetition=repetition(generation.new_ids))
        for strength, generation, dose, measures in zip(
            [*values, None], rows.generations, [*rows.doses, 0.0], measured, strict=True
        )
    ]
    return DoseResponse(
        edit=edits[0],
        rows=tuple(made[:-1]),
        unedited=made[-1],
        prompt_ids=batch.ids[0],
        target=wanted,
        target_token=hooked.tokenizer.decode([wanted]),
        shared_tokens=rows.shared_tokens,
        note=rows.note,
    )


@dataclass(frozen=True)
class Rows:
    """One generated row per edit, and the unedited one last."""

    sequences: Tensor
    """[rows, length + T] on the CPU, padded behind an EOS."""
    logits: tuple[Tensor, ...]
    """T steps of [rows, vocabulary] float32, before temperature and the like."""
    generations: list[Generation]
    doses: list[float]
    """Of the edited rows."""
    cache: Any
    """The unedited model's cache of the prompt but its last token, one row; None if there is none to be repeated."""
    shared_tokens: int
    note: str


@torch.no_grad()
def run_rows(hooked: HookedSAEs, prompt: Batch, edits: Sequence[AnyEdit], seed: int | None, hf: dict[str, Any]) -> Rows:
    """Continue the prompt, one row, once with each edit; the edits differ in nothing but their values. `hf` is changed."""
    settings = _row_options(hooked, hf)
    ids = prompt.ids[0]
    n_rows, last = len(edits) + 1, len(ids) - 1
    clean_tokens = min(_first_selected(hooked, edits[0], prompt), last)
    prefix, note = None, _why_uncached(hf, settings)
    if clean_tokens and edits[0].when is not None:
        clean_tokens, note = 0, note or "the edit's condition reads the prompt, so each row ran its own"
    if clean_tokens and not note:
        prefix = _cached(hooked.model, ids[:clean_tokens])
        if prefix is None:
            note = "the model's cache is of a kind that cannot be repeated for the rows, so each row ran its own prompt"
    program = Program(
        edits=[
            dataclasses.replace(edit, where=dataclasses.replace(edit.where, rows=(row,)))
            for row, edit in enumerate(edits)
        ]
    )
    roles = prompt.roles and prompt.roles * n_rows
    batch = Batch(prompt.ids.repeat(n_rows, 1), prompt.attention_mask.repeat(n_rows, 1), single=False, roles=roles)
    past = {} if prefix is None else {"past_key_values": _repeated(prefix, n_rows)}
    sampled = hf.get("do_sample", settings.do_sample)
    with SameNoise() if sampled and seed is None else contextlib.nullcontext():
        output, report = hooked._generate(batch, program, RandomState(seed, hooked.device), hf | past, same_noise=True)
    sequences = output.sequences.cpu()
    reports = [_row_report(report, row, edit) for row, edit in enumerate(edits)]
    _warn_if_nothing(reports)
    cache = None
    if last and not note:
        cache = prefix if clean_tokens == last else _cached(hooked.model, ids[clean_tokens:last], prefix)
    return Rows(
        sequences=sequences,
        logits=output.logits,
        generations=hooked._generations(batch, sequences, hf, [*reports, Report()]),
        doses=[report.edits[0].dose for report in reports],
        cache=cache,
        shared_tokens=0 if prefix is None else clean_tokens,
        note=note,
    )


def repetition(ids: Tensor) -> float:
    """Share of 4-grams of `ids` [n] that came before: 1 - distinct / all; 0 below 4 tokens."""
    if len(ids) < NGRAM:
        return 0.0
    grams = ids.unfold(0, NGRAM, 1)
    return 1 - len(grams.unique(dim=0)) / len(grams)


def _strengths(given: Iterable[float]) -> list[float]:
    values = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else []
    if not values:
        raise ArgumentError(f"strengths={given!r}; one or more numbers are expected, for example [1, 2, 4].")
    return [v.item() if isinstance(v, Tensor) and v.ndim == 0 else v for v in values]


def _target_id(hooked: HookedSAEs, target: int | str) -> int:
    if isinstance(target, str):
        found = hooked.tokenizer(target, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            raise ArgumentError(f"the target {target!r} is {len(found)} tokens; one is expected. Give one, or an id.")
        return found[0]
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < hooked._vocab_size:
        raise ArgumentError(f"target={target!r}; a token or an id from 0 to {hooked._vocab_size - 1} is expected.")
    return target


def _row_options(hooked: HookedSAEs, hf: dict[str, Any]) -> Any:
    """The generation config in force; `hf` is made to return logits.

    Raises:
        ArgumentError: an option that makes several texts of a row, or that a batch of rows does not have.
    """
    settings = hf.get("generation_config") or hooked.lm.generation_config
    refused = [name for name in _ONE_TEXT if (hf.get(name, getattr(settings, name)) or 1) != 1]
    refused += [name for name in _NOT_FOR_ROWS if hf.get(name) is not None]
    if refused:
        raise ArgumentError(
            f"{', '.join(refused)} is not for a sweep, which makes one text per strength, all in one batch. Leave it "
            "out, or call generate() for each strength."
        )
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    if "generation_config" in hf:
        hf["generation_config"] = copy.deepcopy(settings)
        hf["generation_config"].update(**wanted)
    else:
        hf |= wanted
    return settings


def _why_uncached(hf: dict[str, Any], settings: Any) -> str:
    if hf.get("use_cache", settings.use_cache) is False:
        return "use_cache=False, so each row ran its own prompt"
    kind = hf.get("cache_implementation", settings.cache_implementation)
    if kind not in (None, "dynamic"):
        return f"cache_implementation={kind!r} cannot be repeated for the rows, so each row ran its own prompt"
    return ""


def _first_selected(hooked: HookedSAEs, edit: AnyEdit, prompt: Batch) -> int:
    """The first token of the prompt that the edit may select, whatever its norm; the prompt's length if none."""
    view = hooked._positions(prompt, Program(edits=[edit])).view(0, prompt.ids)
    if not view.may_select(edit.where):
        return prompt.ids.shape[1]
    rule = hooked.saes[hooked.resolve_site(edit.site)].mask_rule if isinstance(edit, Edit) else MaskRule()
    selected = view.select(edit.where, view.mask(rule, torch.zeros(prompt.ids.shape), edit.where))[0].cpu()
    return int(selected.nonzero()[0]) if selected.any() else prompt.ids.shape[1]


def _cached(model: HookedModel, ids: Tensor, past: Any = None) -> Any:
    """The unedited model's cache after `ids` [n] (behind those in `past`), one row; None if it cannot be repeated."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    keep: dict[str, Any] = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.lm.forward).parameters else {}
    )
    output = model(ids[None], past_key_values=past, use_cache=True, **keep)
    cache = getattr(output, "past_key_values", None)
    plain = type(cache) is DynamicCache and {type(layer) for layer in cache.layers} <= {
        DynamicLayer,
        DynamicSlidingWindowLayer,
    }
    return cache if plain else None


def _repeated(cache: Any, n_rows: int) -> Any:
    """A copy for so many rows: the model goes on writing in what it is given."""
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(n_rows)
    return cache


def _row_report(report: Report, row: int, edit: AnyEdit) -> Report:
    """The report that the row's single run has."""
    own = report.edits[row]
    sites = tuple(site._replace(tokens=own.tokens, dose=own.dose) for site in report.sites)
    return Report(edits=(own._replace(edit=edit),), sites=sites)


def _warn_if_nothing(reports: Sequence[Report]) -> None:
    notes = [note for report in reports for note in report.notes()]
    if len(notes) == len(reports):  # a strength that changes nothing is a good baseline; all of them are a mistake
        warnings.warn(f"no strength did anything: {notes[0]}", NoEffectWarning, stacklevel=7)


def _promoted(hooked: HookedSAEs, edit: AnyEdit) -> int | None:
    """The id that the edit's direction promotes most through the unembedding, the final norm left out; None where it is
    not as wide as the residual stream."""
    unembedding = hooked.lm.get_output_embeddings()
    if isinstance(edit, Edit):
        direction = hooked.saes[hooked.resolve_site(edit.site)].W_dec[list(edit.latents)].float().sum(0)
    else:
        direction = torch.tensor(edit.vector)
    if unembedding is None or unembedding.weight.shape[-1] != len(direction):
        return None
    weight = unembedding.weight
    return int((weight @ direction.to(weight.device, weight.dtype)).argmax())


def _measure(model: HookedModel, rows: Rows, length: int, target: int) -> list[dict[str, float]]:
    """Measures of each row after a prompt of that length."""
    n_new = len(rows.logits)
    size = max(1, MAX_LOGITS // (n_new * rows.logits[0].shape[-1]))
    measured = []
    for start in range(0, len(rows.sequences), size):
        part = rows.sequences[start : start + size]
        edited = torch.stack([step[start : start + size] for step in rows.logits], 1)
        if rows.cache is None:
            clean = model(part[:, :-1], use_cache=False).logits[:, length - 1 :]
        else:
            past = _repeated(rows.cache, len(part))
            clean = model(part[:, length - 1 : -1], past_key_values=past, use_cache=True).logits
        clean = clean.float().flatten(0, 1)
        losses = cross_entropy(clean, part[:, length:].flatten().to(clean.device), reduction="none").view(-1, n_new)
        kls = token_kl(clean, edited.flatten(0, 1)).view(-1, n_new)
        logprobs = edited[..., target] - edited.logsumexp(-1)
        for row, (kl, loss, logprob) in enumerate(zip(kls, losses, logprobs, strict=True), start):
            real = len(rows.generations[row].new_ids)  # behind an EOS there is padding
            measured.append(
                {
                    "target_logprob": float(logprob[0]),
                    "mean_target_logprob": float(logprob[:real].double().mean()),
                    "kl": float(kl[:real].mean()),
                    "loss": float(loss[:real].double().mean()),
                }
            )
    return measured
