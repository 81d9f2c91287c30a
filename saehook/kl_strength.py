"""How strong an edit must be for the model's next tokens to move by a given KL divergence.

    mean over tokens of KL(p ‖ q_v) = target,   p unedited, q_v with the edit's value v, in nats

over the tokens of a text that are in the mask of the SAE (`config.MaskRule`, read off the unedited run). |v| is looked for
on a line that keeps the sign: first out or in until two values enclose the target, with the slope of log KL over log |v|
seen so far (2 where edits are small), then between them, by the secant of the two or, where that does not shrink them, by
halving. The unedited logits of the mask are computed once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehook.editing import ReadAction
from saehook.errors import ArgumentError
from saehook.fields import MAX_VALUE
from saehook.interventions import AnyEdit, Edit, Program
from saehook.metrics import token_kl
from saehook.tokenization import Batch

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs

MAX_LOGITS = 2**24
"""Logits of one pass through the model; it takes as many rows of the text as fit, and at least one."""
MAX_PASSES = 20
MAX_STEP = 8.0
"""|v| grows or shrinks at most by this factor in one pass."""
STILL = 1e-3
"""KL that changes by less than this share over a factor of `MAX_STEP` will not change any more."""


@dataclass(frozen=True)
class KLStrength:
    """An edit, and what it does to the next tokens."""

    edit: AnyEdit
    """The edit that was given, with the value that was found, in its own unit."""
    kl: float
    """Mean KL(unedited ‖ edited) in nats per token with it, as measured."""
    tokens: int
    """Tokens that the mean is over."""
    passes: int
    """Edited passes over the text that it took."""


@torch.no_grad()
def strength_for_kl(
    hooked: HookedSAEs,
    edit: AnyEdit,
    target_kl: float,
    text: Any,
    *,
    error: str | None = None,
    norm: Any = None,
    tolerance: float = 0.01,
    max_passes: int = MAX_PASSES,
) -> KLStrength:
    """The edit with the value that gives a mean KL of `target_kl` nats per token on `text`.

    The sign of the value is kept; its size is where the search begins. `scale` is looked for from 1 on towards the value:
    factors above 1 grow, those from 0 to 1 fall at most to 0, negative ones move away from 0.

    Args:
        edit: one that has a value, in a unit other than `kl`. An edit of `generation()` is measured on all tokens, as if
            the text were generated, and one of some `rows` on all rows.
        text: text, ids, a list of either, or windows [n, length].
        error, norm: as in the `Program` that the edit is for.
        tolerance: how far the KL may be from the target, as a share of it.
        max_passes: edited passes over the text at most.

    Raises:
        ArgumentError: an edit without value, a target that is no finite number above 0, a text without a token of the
            mask, or a target that no value reaches; the largest KL that was reached is named.
    """
    if edit.value is None:
        raise ArgumentError(f"{edit.op!r} takes no value, so none can be found for it. Use 'add', 'set' or 'scale'.")
    if edit.unit == "kl":
        raise ArgumentError(
            f"the unit of {edit} is the KL itself. Say in which unit to look for it, such as unit='raw'."
        )
    if isinstance(target_kl, bool) or not isinstance(target_kl, (int, float)) or not 0 < target_kl < math.inf:
        raise ArgumentError(f"target_kl={target_kl!r}; a finite number of nats above 0 is expected.")
    divergence = Divergence(hooked, edit, text)
    where = dataclasses.replace(edit.where, rows=None)
    if not where.prompt:
        where = dataclasses.replace(where, prompt=True)
    line = _line(edit)
    seen: list[tuple[float, float]] = []

    def measure(size: float) -> float:
        try:
            trial = dataclasses.replace(edit, value=line.value(size), where=where)
            kl = divergence.of(Program(edits=[trial], error=error, norm=norm))
        except ArgumentError:  # a value that the unit or the model's dtype does not have
            if not seen:
                raise
            kl = math.nan
        seen.append((size, kl))
        return kl

    size = line.first
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    while len(seen) < max_passes:
        kl = measure(size)
        if abs(kl - target_kl) <= tolerance * target_kl:
            found = dataclasses.replace(edit, value=line.value(size))
            return KLStrength(found, kl, divergence.tokens, len(seen))
        if not math.isfinite(kl):
            break
        low, high = ((size, kl), high) if kl < target_kl else (low, (size, kl))
        if low is not None and high is not None:
            size = _between(low, high, target_kl, bisect=len(seen) % 3 == 0)
        else:
            if _still(seen):
                break
            size = min(_beyond(seen, target_kl), line.limit)
            if size == seen[-1][0]:
                break
    reached = [(kl, line.value(size)) for size, kl in seen if math.isfinite(kl)]
    if not reached:
        raise ArgumentError(f"the model's logits are not finite with {edit}: the KL cannot be measured. Begin smaller.")
    (most, at_most), (least, at_least) = max(reached), min(reached)
    raise ArgumentError(
        f"no value of {edit.op!r} with the sign of {edit.value:g} gave a mean KL of {target_kl:g} nats in {len(seen)} "
        f"passes over {divergence.tokens} tokens: the largest reached was {most:.4g}, with value {at_most:.4g}, the "
        f"smallest {least:.4g}, with value {at_least:.4g}. Ask for a KL between them, or edit more tokens or latents."
    )


class Divergence:
    """KL(unedited ‖ edited) on one text; the unedited logits are kept, [tokens of the mask, vocabulary] in their dtype."""

    def __init__(self, hooked: HookedSAEs, edit: AnyEdit, text: Any) -> None:
        """`edit`: at whose SAE the mask counts. Raises ArgumentError if no token of the text is in it."""
        self.hooked = hooked
        batch = hooked._batch(text)
        size = max(1, MAX_LOGITS // (batch.ids.shape[1] * hooked._vocab_size))
        self.parts: list[tuple[Batch, Tensor, Tensor]] = []
        """Rows; which of their tokens count, [rows, length]; unedited logits of those."""
        for start in range(0, len(batch.ids), size):
            rows = slice(start, start + size)
            part = Batch(
                batch.ids[rows], batch.attention_mask[rows], single=False, roles=batch.roles and batch.roles[rows]
            )
            logits, keep = self._clean(part, edit)
            self.parts.append((part, keep.to(logits.device), logits[keep.to(logits.device)]))
        self.tokens = sum(int(keep.sum()) for _, keep, _ in self.parts)
        """How many tokens count."""
        if not self.tokens:
            raise ArgumentError(
                "no token of the text is in the mask of the SAE, so there is nothing to measure. Give real text."
            )

    def _clean(self, part: Batch, edit: AnyEdit) -> tuple[Tensor, Tensor]:
        """Unedited logits [rows, length, vocabulary], and the mask [rows, length]."""
        positions = self.hooked._positions(part, Program())
        if not isinstance(edit, Edit):
            output, _ = self.hooked._call(self._pass(part), Program(), positions)
            return output.logits, positions.keep
        name = self.hooked.resolve_site(edit.site)
        reader = ReadAction([], stop=False)
        output = self.hooked._taps.run(self._pass(part), {self.hooked.attached[name].reads: reader}, positions)
        return output.logits, reader.mask(self.hooked.saes[name].mask_rule)

    def _pass(self, part: Batch) -> Callable[[], Any]:
        arguments = self.hooked._arguments(part, masked=False)
        return lambda: self.hooked.lm(**arguments, use_cache=False)

    @torch.no_grad()
    def of(self, program: Program) -> float:
        """Mean over the tokens, nats."""
        total = 0.0
        for part, keep, clean in self.parts:
            output, _ = self.hooked._call(self._pass(part), program, self.hooked._positions(part, program))
            total += float(token_kl(clean, output.logits[keep]).sum())
        return total / self.tokens


@dataclass(frozen=True)
class _Line:
    """Values with the sign of an edit's, by a size above 0 with which the edit's effect grows."""

    value: Callable[[float], float]
    first: float
    limit: float = MAX_VALUE


def _line(edit: AnyEdit) -> _Line:
    value = edit.value
    assert value is not None
    sign = math.copysign(1.0, value)
    if edit.op == "scale" and value >= 0:
        if value > 1:
            return _Line(lambda size: 1 + size, value - 1)
        return _Line(lambda size: 1 - size, 1 - value or 0.5, limit=1.0)
    if edit.op in ("max", "cap") and value > 0:  # the smaller the bound, the larger its effect
        return _Line(lambda size: 1 / size, 1 / value)
    return _Line(lambda size: sign * size, abs(value) or 1.0)


def _between(low: tuple[float, float], high: tuple[float, float], target: float, *, bisect: bool) -> float:
    """A size between two whose KL encloses the target, on logarithmic scales."""
    a, b = math.log(low[0]), math.log(high[0])
    share = 0.5
    if not bisect and low[1] > 0:
        share = min(0.95, max(0.05, math.log(target / low[1]) / math.log(high[1] / low[1])))
    return math.exp(a + share * (b - a))


def _beyond(seen: list[tuple[float, float]], target: float) -> float:
    """The next size outside, where the KL of all sizes so far is on one side of the target."""
    size, kl = seen[-1]
    if kl <= 0:  # too small to be seen in the model's dtype, or nothing is touched
        return size * MAX_STEP**3
    slope = 2.0
    if len(seen) > 1 and seen[-2][1] > 0:
        slope = math.log(kl / seen[-2][1]) / math.log(size / seen[-2][0])
    step = abs(math.log(target / kl)) / min(2.0, max(0.25, slope))
    step = min(math.log(MAX_STEP), max(0.05, step))
    return size * math.exp(step if kl < target else -step)


def _still(seen: list[tuple[float, float]]) -> bool:
    """Whether the last two sizes are far from each other and their KL is the same, or the last four did nothing."""
    if len(seen) < 2:
        return False
    (a, before), (b, now) = seen[-2:]
    if now <= 0:
        return len(seen) >= 4 and all(kl <= 0 for _, kl in seen[-4:])
    return abs(math.log(b / a)) > 0.99 * math.log(MAX_STEP) and abs(now - before) <= STILL * max(now, before)


def calibrated(hooked: HookedSAEs, program: Program, text: Any, *, tolerance: float = 0.01) -> Program:
    """The program with an amount in place of each strength that is a KL; see `HookedSAEs.calibrate`."""
    edits = []
    for edit in program.edits:
        if edit.unit == "kl":
            assert edit.value is not None
            # `scale` goes up from 1 for a positive KL, down for a negative one; the others keep the sign.
            start = 2.0 ** math.copysign(1.0, edit.value) if edit.op == "scale" else math.copysign(1.0, edit.value)
            trial = dataclasses.replace(edit, value=start, unit="raw")
            edit = strength_for_kl(
                hooked, trial, abs(edit.value), text, error=program.error, norm=program.norm, tolerance=tolerance
            ).edit
        edits.append(edit)
    return dataclasses.replace(program, edits=tuple(edits))
