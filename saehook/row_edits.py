"""Edits that run as one: those of a sweep, or of a batch, that differ in nothing but their rows and their amounts.

Sixteen strengths in sixteen rows then cost what one edit costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from saehook.interventions import AnyEdit, Edit
from saehook.positions import Positions


@dataclass
class Dose:
    """Tokens touched, and the sum of ‖Δ‖/‖x‖ over them; kept on the device, read once at the end."""

    tokens: Tensor | int = 0
    total: Tensor | float = 0.0

    def add(self, selected: Tensor, delta: Tensor, norm: Tensor, fresh: int) -> None:
        """`selected` [rows, n], `delta` [rows, n, d], `norm` = ‖x‖ [rows, n]; tokens before `fresh` were counted before."""
        tokens, total = row_doses(selected, delta, norm, fresh)
        self.tokens = self.tokens + tokens.sum()
        self.total = self.total + total.sum()

    def read(self) -> tuple[int, float]:
        """(tokens, mean ratio); the mean of nothing is 0."""
        n = int(self.tokens)
        return n, float(self.total) / n if n else 0.0


def row_doses(selected: Tensor, delta: Tensor, norm: Tensor, fresh: int) -> tuple[Tensor, Tensor]:
    """Tokens touched and the sum of ‖Δ‖/‖x‖ over them, each [rows]; arguments as of `Dose.add`."""
    selected, delta, norm = selected[:, fresh:], delta[:, fresh:], norm[:, fresh:]
    ratio = torch.linalg.vector_norm(delta, dim=-1) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return selected.sum(1), torch.where(selected, ratio, 0.0).sum(1)


@dataclass
class Prepared:
    """One edit, ready to run."""

    index: int
    """In the program."""
    edit: AnyEdit
    value: Tensor
    """Of each latent, [len(latents)] float32, in unit `norm` still to be multiplied by ‖x‖; of a vector v, as a direction."""
    columns: Tensor
    """Among the latents of the block, those whose z' the edit decides."""
    dose: Dose = field(default_factory=Dose)
    residual: Dose | None = None
    """Of `mode='readback'`: |z of x' - z'|, mean over its latents."""
    note: Callable[[Tensor, Tensor, Tensor], None] | None = None
    """For a full report: called with the tokens selected [rows, n] and z of the edit's own latents, as the edit sees it and
    as it leaves it, [rows, n, len(latents)]. The block must read latents then."""


class RowEdits:
    """One edit, or several that run as one."""

    def __init__(self, parts: Sequence[Prepared]) -> None:
        """`parts`: one, or several of which each has rows of its own (`together`)."""
        self.parts = parts
        first = parts[0].edit
        assert isinstance(first, Edit)
        self.edit = first
        self.columns = parts[0].columns
        self.value = parts[0].value
        self._part: Tensor | None = None
        if len(parts) > 1:
            rows = tuple(sorted(row for p in parts for row in p.edit.where.rows or ()))
            self.edit = replace(first, where=replace(first.where, rows=rows))

    def begin(self, run: Positions) -> None:
        """Before the first pass of a run: find each row's part."""
        if len(self.parts) == 1 or self._part is not None:
            return
        n_rows = len(run.attended) // run.expansion
        part = torch.zeros(n_rows, dtype=torch.long)  # of rows without one, any: nothing is selected there
        for i, p in enumerate(self.parts):
            part[list(p.edit.where.rows or ())] = i
        self._part = part.repeat_interleave(run.expansion).to(self.value.device)
        self.value = torch.stack([p.value for p in self.parts])[self._part][:, None]

    def count(self, selected: Tensor, delta: Tensor, norm: Tensor, fresh: int) -> None:
        """Add to the dose of each part; arguments as of `Dose.add`."""
        if self._part is None:
            return self.parts[0].dose.add(selected, delta, norm, fresh)
        tokens, total = row_doses(selected, delta, norm, fresh)
        n = len(self.parts)
        sums = tokens.new_zeros(n).index_add(0, self._part, tokens), total.new_zeros(n).index_add(0, self._part, total)
        for p, part_tokens, part_total in zip(self.parts, *sums, strict=True):
            p.dose.tokens, p.dose.total = p.dose.tokens + part_tokens, p.dose.total + part_total
        return None

    def note(self, selected: Tensor, before: Tensor | None, after: Tensor | None, latents: Tensor) -> None:
        """What a full report wants to know: `before` and `after`, z of the block's `latents`, [rows, n, len(latents)]."""
        for i, p in enumerate(self.parts):
            if p.note is None:
                continue
            assert isinstance(p.edit, Edit)
            assert before is not None
            assert after is not None
            own = torch.searchsorted(latents, torch.tensor(p.edit.latents, device=latents.device))
            mine = selected if self._part is None else selected & (self._part == i)[:, None]
            p.note(mine, before[..., own], after[..., own])


def together(edits: Iterable[Prepared]) -> list[RowEdits]:
    """Edits in their order, those that follow each other and can run as one taken together."""
    groups: list[list[Prepared]] = []
    for p in edits:
        if groups and _fits(groups[-1], p):
            groups[-1].append(p)
        else:
            groups.append([p])
    return [RowEdits(group) for group in groups]


def _fits(group: Sequence[Prepared], p: Prepared) -> bool:
    """Whether the edit differs from those of the group in rows and amount only, and has rows of its own."""
    first, edit = group[0].edit, p.edit
    assert isinstance(first, Edit)
    assert isinstance(edit, Edit)
    if first.where.rows is None or edit.where.rows is None or first.value is None or edit.value is None:
        return False
    if first.mode == "readback" or not _same_but_rows(first, edit):
        return False
    taken = {row for other in group for row in other.edit.where.rows or ()}
    return taken.isdisjoint(edit.where.rows)


def _same_but_rows(a: Edit, b: Edit) -> bool:
    return replace(a, value=b.value, where=replace(a.where, rows=b.where.rows)) == b
