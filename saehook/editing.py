"""What happens to the activations of one site in a run: they are edited, replaced or read. Plain torch; the model calls it
while it runs.

Edits come in blocks (`edit_blocks.py`), one after another. The program's `norm` then bounds x' or x' - x. Everything is
computed in float32 and cast back to the dtype of x; a token that nothing selects keeps its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from saehook.config import MaskRule
from saehook.edit_blocks import Block, LatentBlock, Seen, norm_of
from saehook.errors import ArgumentError
from saehook.interventions import Cap, Program
from saehook.positions import TokenView
from saehook.row_edits import Dose
from saehook.sae import SAE


class Action(Protocol):
    """What happens at one site in one run."""

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        """x' from x [rows, n, d]; `view` says which tokens these are."""
        ...


_HALF = (torch.float16, torch.bfloat16)


class EditAction:
    """The edits of one program at one site, block after block."""

    def __init__(self, blocks: Sequence[Block], program: Program) -> None:
        """`blocks` in the order in which they apply.

        Raises:
            ArgumentError: the reconstructions of two SAEs are asked for at this one site.
        """
        self.blocks, self.program = blocks, program
        saes = {id(block.encode) for block in blocks if isinstance(block, LatentBlock)}  # one SAE may stand here twice
        if program.drops_error and len(saes) > 1:
            raise ArgumentError(
                f"{len(saes)} SAEs stand at one site, and x' can be the reconstruction of one of them only. Keep the error, or "
                "attach one."
            )
        self.edits = [prepared for block in blocks for prepared in block.edits]
        self.dose = Dose()
        self.note: Callable[[Tensor, Tensor, Tensor], None] | None = None
        """For a full report: called with x, x' [rows, n, d] and the tokens that were touched [rows, n]."""
        self._too_large: list[tuple[TokenView, Tensor]] = []

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        blocks = [block for block in self.blocks if block.may_act(view)]
        if not blocks:
            return x
        x32 = x.float()
        norm = torch.linalg.vector_norm(x32, dim=-1)
        new, delta, touched = x32, None, None
        for i, block in enumerate(blocks):
            seen = Seen(x, x32, norm) if i == 0 or self.program.parallel else Seen(new, new, norm_of(new))
            change = block(seen, norm, view)
            touched = change.touched if touched is None else touched | change.touched
            if change.new is not None:
                new = torch.where(change.touched[..., None], change.new, new)
            elif self.program.parallel:
                assert change.delta is not None
                delta = change.delta if delta is None else delta + change.delta
                new = x32 + delta
            else:
                assert change.delta is not None
                new = new + change.delta
        assert touched is not None
        if self.program.norm is not None:
            new = _with_norm(self.program.norm, x32, new, norm)
        if len(self.edits) != 1 or self.program.drops_error or self.program.norm is not None:
            self.dose.add(touched, (new - x32).detach(), norm.detach(), view.fresh)
        else:
            self.dose = self.edits[0].dose
        size = norm_of(
            new.detach()
        )  # infinite where the sum of squares is: every normalisation after it would give 0 or NaN
        holds = size.isfinite()
        if x.dtype in _HALF:
            holds &= torch.linalg.vector_norm(new.detach(), ord=torch.inf, dim=-1) <= torch.finfo(x.dtype).max
        # What was not finite before is no fault of an edit.
        self._too_large.append((view, touched & ~holds & norm.isfinite()))
        new = torch.where(touched[..., None], new.to(x.dtype), x)
        if self.note is not None:
            self.note(x, new, touched)
        return new

    def overflow(self) -> tuple[int, int, int] | None:
        """(row of the input, token counted among the row's own, its id) of the first x' that its half-precision dtype
        cannot hold, or whose length is not finite in float32; None if there is none. Reads the device once."""
        if not self._too_large or not torch.cat([large for _, large in self._too_large], 1).any():
            return None
        view, large = next((view, large) for view, large in self._too_large if large.any())
        row, column = large.nonzero()[0].tolist()
        return row // view.run.expansion, int(view.index[row, column]), int(view.ids[row, column])


def _with_norm(rule: Any, x: Tensor, new: Tensor, norm: Tensor) -> Tensor:
    """What `Program.norm` makes of x' = `new` [rows, n, d], `norm` = ‖x‖ [rows, n]; where x' = x, exactly x'."""
    norm = norm[..., None]
    if isinstance(rule, Cap):
        delta = new - x
        length = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
        longest = rule.limit * norm
        return torch.where(length > longest, x + delta * (longest / torch.where(length > 0, length, 1.0)), new)
    length = torch.linalg.vector_norm(new, dim=-1, keepdim=True)
    # Where nothing is left of x', there is no direction to stretch.
    same = (new == x).all(-1, keepdim=True)
    return torch.where(same, new, new * (norm / torch.where(length > 0, length, 1.0)))


class ChainAction:
    """Several actions at one site, one after another."""

    def __init__(self, actions: Sequence[Action]) -> None:
        self.actions = actions

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        for action in self.actions:
            x = action(x, view)
        return x


class ReplaceAction:
    """Other vectors on given tokens; the rest keep their bits."""

    def __init__(self, mask: Tensor, new: Callable[[Tensor], Tensor]) -> None:
        """`mask`: [rows, length] of the input; `new`: x' [n, d] of the n tokens of the mask, from their x [n, d]."""
        self.mask, self.new = mask, new

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        mask = self.mask.to(x.device)
        replaced = x.clone()
        replaced[mask] = self.new(x[mask]).to(x.device, x.dtype)
        return replaced


class StopForward(Exception):
    """Raised by `ReadAction` when nothing behind the last site is needed."""


class ReadAction:
    """Keep x; stop the run once every reader of `group` has its value."""

    def __init__(self, group: list[ReadAction], *, stop: bool) -> None:
        self.value: Tensor | None = None
        self.view: TokenView | None = None
        self.group, self.stop = group, stop
        group.append(self)

    def mask(self, rule: MaskRule) -> Tensor:
        """Which tokens of the value [rows, n, d] count for an SAE with that rule, [rows, n], on the value's device."""
        assert self.value is not None
        assert self.view is not None
        return self.view.mask(rule, norm_of(self.value))

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        self.value, self.view = x, view
        if self.stop and all(reader.value is not None for reader in self.group):
            raise StopForward
        return x


def changes(
    x: Tensor,
    sae: SAE,
    pre_acts: Callable[[Tensor], Tensor],
    latents: Callable[[Tensor], Tensor],
    reconstruction: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """What a user's trace makes of the reconstruction: (x_hat of x, and what is added to it by what the user wrote into
    pre-activations, latents or reconstruction), each [..., d_out].

    The three functions return what they are given, or what the user put there. They have gradients, too:
    d loss / d latents = W_dec · d loss / d x'.
    """
    clean_pre_acts = sae.pre_acts(x)
    clean = sae.activate(clean_pre_acts)
    # Clones, here and below: the user may write in place, and nnsight takes the gradient of one prompt of several from
    # the tensor that owns the memory.
    seen_pre_acts = pre_acts(clean_pre_acts.clone())
    rewritten = not torch.equal(seen_pre_acts, clean_pre_acts)
    # Through the seen pre-activations whenever a gradient may be asked for, so that they have one.
    recompute = rewritten or seen_pre_acts.requires_grad
    seen = latents((sae.activate(seen_pre_acts) if recompute else clean).clone())
    x_hat = sae.decode(seen, x)
    seen_x_hat = reconstruction(x_hat.clone())
    if not seen.requires_grad and torch.equal(seen, clean):
        return x_hat, seen_x_hat - x_hat
    delta = sae.combine(seen - clean)
    scale = sae.scale(x)
    delta = delta if scale is None else delta * scale
    return x_hat - delta, delta + (seen_x_hat - x_hat)


def changed(x: Tensor, x_hat: Tensor, delta: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
    """x + `delta` + what the user made of the error x - x_hat, which `error` shows in float32 or wider: so
    x' = reconstruction + error, as they were left. Where nothing was written x goes on bit for bit, and its gradient is the
    clean model's.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    clean = wide - x_hat
    delta = delta + (error(clean.clone()) - clean)
    if delta.requires_grad:
        return (wide + delta).to(x.dtype)
    moved = (delta != 0).any(-1, keepdim=True)
    return torch.where(moved, (wide + delta).to(x.dtype), x) if moved.any() else x
