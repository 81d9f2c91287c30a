"""The full report: what a program does to latents and to the next tokens, on the tokens of the run itself.

The rows of a run are given to the model twice more, with the program and without it, each in one pass without cache. Which
tokens an edit means, and what it does there, depends on positions alone, so this is what the run did. The logits of a pass
are in memory once; nothing else has tokens × vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saehook.edit_blocks import Block, LatentBlock
from saehook.edit_plan import EditPlan
from saehook.errors import ArgumentError
from saehook.interventions import Edit, Program
from saehook.metrics import token_kl
from saehook.results import MOST_MOVED, Generation, LatentChange, Report, RowReport, SideEffects
from saehook.sae import SAE
from saehook.tokenization import Batch

if TYPE_CHECKING:
    from saehook.runs import Runs

ENTRIES_AT_ONCE = 2**24
"""Activations of latents that are held in memory together."""


def check_kind(report: object) -> None:
    """Raises ArgumentError unless it is a kind of report: None or `full`."""
    if report is not None and report != "full":
        raise ArgumentError(f"report={report!r} is unknown; expected None, for the counts of each run, or 'full'.")


@torch.no_grad()
def full_report(
    hooked: Runs, program: Program, prompt: Batch, ids: Tensor, new: Sequence[int], report: Report | None = None
) -> Report:
    """Measure a program on rows of ids.

    Args:
        prompt: the input of the run.
        ids: [rows, n] int64, the input with what was generated behind it, and given to the model again; one row or more for
            each of the input, next to each other.
        new: how many generated tokens of each row count; those behind them belong to longer rows.
        report: of the run, to be completed; None: of the measurement.
    """
    length, expansion = prompt.ids.shape[1], len(ids) // len(prompt.ids)
    mask = prompt.attention_mask.repeat_interleave(expansion, 0)
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - length), value=1)
    own = mask.bool() & (torch.arange(ids.shape[1]) < length + torch.tensor(new)[:, None])
    arguments = hooked._arguments(Batch(ids, mask, single=False), masked=False)
    watch = _Watch(own)

    def run(program: Program, watch: _Watch | None = None) -> tuple[Tensor, Report]:
        positions = hooked._positions(prompt, program, expansion)
        output, found = hooked._call(lambda: hooked.lm(**arguments, use_cache=False), program, positions, watch)
        return output.logits.flatten(0, 1), found

    (edited, found), (clean, _) = run(program, watch), run(Program())
    kl = token_kl(clean, edited).view(own.shape).cpu()
    report = found if report is None else report
    edits = [e._replace(latents=watch.latents[i]) for i, e in enumerate(report.edits)]
    rows = [
        RowReport(tuple(row[mine].tolist()), tuple(values[mine].tolist()))
        for row, values, mine in zip(ids, kl, own, strict=True)
    ]
    return replace(report, edits=tuple(edits), side_effects=tuple(watch.side_effects), rows=tuple(rows))


def beside(report: Report, edited: Sequence[Generation], unedited: Sequence[Generation]) -> Report:
    """The report with the same rows without the program."""
    rows = []
    for row, one, other in zip(report.rows, edited, unedited, strict=True):
        unedited_ids = tuple(other.new_ids.tolist())
        # Not `strict`: one of them may have been stopped before the other.
        pairs = enumerate(zip(one.new_ids.tolist(), unedited_ids, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), None)
        rows.append(row._replace(unedited_ids=unedited_ids, unedited_text=other.text, first_divergent=first))
    return replace(report, rows=tuple(rows))


class _Watch:
    """Takes down what the edits of one pass do to latents."""

    def __init__(self, own: Tensor) -> None:
        """`own`: tokens that count, [rows, n] bool."""
        self.own = own
        self.latents: dict[int, tuple[LatentChange, ...]] = {}
        """By the number of the edit in the program."""
        self.side_effects: list[SideEffects] = []

    def __call__(self, plan: EditPlan) -> None:
        """Stand beside every edit and every edited site of the plan."""
        for site, action in plan.edits.items():
            for block in action.blocks:
                for p in block.edits:
                    latents = p.edit.latents if isinstance(p.edit, Edit) else ()
                    self.latents[p.index] = tuple(LatentChange(latent, *[0.0] * 5) for latent in latents)
                if isinstance(block, LatentBlock):
                    block.reads_latents = True
                    for p in block.edits:
                        p.note = functools.partial(self._note_edit, p.index)
            readers = {name: one.sae for name, one in plan.attached.items() if one.reads == site}
            action.note = functools.partial(self._note_site, readers, action.blocks)

    def _note_edit(self, index: int, selected: Tensor, before: Tensor, after: Tensor) -> None:
        counted = selected & self.own.to(selected.device)
        latents = [change.latent for change in self.latents[index]]
        sums = _Sums(len(latents))
        sums.add(before[counted], after[counted])
        if sums.tokens:
            self.latents[index] = sums.changes(latents, range(len(latents)))

    def _note_site(
        self, readers: Mapping[str, SAE], blocks: Sequence[Block], x: Tensor, new: Tensor, touched: Tensor
    ) -> None:
        counted = touched & self.own.to(touched.device)
        x, new = x[counted], new[counted]
        for name, sae in readers.items():
            sums = _Sums(sae.d_sae)
            size = max(1, ENTRIES_AT_ONCE // sae.d_sae)
            for before, after in zip(x.split(size), new.split(size), strict=True):
                sums.add(sae.encode(before), sae.encode(after))
            if sums.tokens:
                moved = sums.moved(_named(sae, blocks))
                self.side_effects.append(SideEffects(name, sums.changes(moved, moved)))


def _named(sae: SAE, blocks: Sequence[Block]) -> list[int]:
    """Latents of an SAE whose z' the edits where it reads decide."""
    edits = [p.edit for b in blocks if isinstance(b, LatentBlock) and b.sae is sae for p in b.edits]
    if any(edit.op == "keep_only" for edit in edits):
        return list(range(sae.d_sae))
    return sorted({latent for edit in edits if isinstance(edit, Edit) for latent in edit.latents})


class _Sums:
    """Over tokens: sums and maxima of activations before and after, and of the size of their change."""

    def __init__(self, n: int) -> None:
        """`n`: latents."""
        self.tokens = 0
        self.before, self.after, self.change = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
        self.before_max, self.after_max = (torch.full((n,), -torch.inf) for _ in range(2))

    def add(self, before: Tensor, after: Tensor) -> None:
        """Activations [tokens, n]."""
        if not len(before):
            return
        before, after = before.float(), after.float()
        self.tokens += len(before)
        self.before += before.double().sum(0).cpu()
        self.after += after.double().sum(0).cpu()
        self.change += (after - before).abs().double().sum(0).cpu()
        self.before_max = self.before_max.maximum(before.amax(0).cpu())
        self.after_max = self.after_max.maximum(after.amax(0).cpu())

    def moved(self, but: Sequence[int]) -> list[int]:
        """Columns that changed, the most first, without those of `but`; at most `MOST_MOVED`."""
        change = self.change.clone()
        change[list(but)] = 0.0
        values, columns = change.topk(min(MOST_MOVED, len(change)))
        return columns[values > 0].tolist()

    def changes(self, latents: Sequence[int], columns: Sequence[int]) -> tuple[LatentChange, ...]:
        """Of these columns, which are these latents."""
        means = [(total / self.tokens)[list(columns)] for total in (self.before, self.after, self.change)]
        before, after, change = (mean.tolist() for mean in means)
        most = (self.before_max[list(columns)].tolist(), self.after_max[list(columns)].tolist())
        rows = zip(latents, before, after, *most, change, strict=True)
        return tuple(LatentChange(*row) for row in rows)
