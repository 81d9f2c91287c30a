"""What edits do to the activations of one site: x' from x. Plain torch; the model calls it while it runs.

z = encode(x), after the activation function. Edits apply in listed order to z. With the error kept
    x' = x + σ(x) · Σ (z'_i - z_i) W_dec[i]     over the edited latents, in float32, cast back to the dtype of x;
where `keep_only` sets all others to 0, the sum goes over them, too: one product with W_dec. With the error dropped
x' = decode(z') on the tokens that an edit selects; spliced, on the whole mask of the SAE. The program's `norm` then bounds x'
or x' - x. A token that nothing selects keeps its bits. σ is 1, or the token's scale where the SAE normalises each token. A
transcoder encodes what it reads at another site, and its edits change y there where it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from saehook.config import MaskRule
from saehook.errors import ArgumentError, SiteError
from saehook.interventions import Cap, Edit, Program
from saehook.positions import TokenView
from saehook.sae import SAE


class Action(Protocol):
    """What happens at one site in one run."""

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        """x' from x [rows, n, d]; `view` says which tokens these are."""
        ...


@dataclass
class Dose:
    """Tokens touched, and the sum of ‖Δ‖/‖x‖ over them; kept on the device, read once at the end."""

    tokens: Tensor | int = 0
    total: Tensor | float = 0.0

    def add(self, selected: Tensor, delta: Tensor, norm: Tensor, fresh: int) -> None:
        """`selected` [rows, n], `delta` [rows, n, d], `norm` = ‖x‖ [rows, n]; tokens before `fresh` were counted before."""
        selected, delta, norm = selected[:, fresh:], delta[:, fresh:], norm[:, fresh:]
        ratio = torch.linalg.vector_norm(delta, dim=-1) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        self.tokens = self.tokens + selected.sum()
        self.total = self.total + torch.where(selected, ratio, 0.0).sum()

    def read(self) -> tuple[int, float]:
        """(tokens, mean ratio); the mean of nothing is 0."""
        n = int(self.tokens)
        return n, float(self.total) / n if n else 0.0


_HALF = (torch.float16, torch.bfloat16)


@dataclass
class _Prepared:
    """One edit, ready to run."""

    index: int
    edit: Edit
    columns: Tensor
    """Of the edited latents, those whose z' it decides."""
    value: Tensor
    dose: Dose = field(default_factory=Dose)


class EditAction:
    """The edits of one program at one site."""

    def __init__(
        self, sae: SAE, edits: list[tuple[int, Edit]], program: Program, source: SourceAction | None = None
    ) -> None:
        """`edits`: (index in the program, edit), those of this site. `source`: what a transcoder reads.

        Raises:
            LatentError: a latent outside 0..d_sae-1. MissingStatError: unit='max' or op 'mean' without statistics.
            ArgumentError: unit='norm' for a latent without direction.
        """
        self.sae, self.program, self.source = sae, program, source
        used = sorted({latent for _, edit in edits for latent in edit.latents})
        sae.check_latents(tuple(used))
        column = {latent: i for i, latent in enumerate(used)}
        self.latents = torch.tensor(used, dtype=torch.long, device=sae.device)
        self.rows = sae.W_dec[self.latents].float()
        self.dose = Dose()
        self.edits = []
        self._too_large: list[tuple[TokenView, Tensor]] = []
        for index, edit in edits:
            meant = edit.latents
            if edit.op == "keep_only":
                meant = [latent for latent in used if latent not in edit.latents]
            columns = torch.tensor([column[latent] for latent in meant], dtype=torch.long, device=sae.device)
            self.edits.append(_Prepared(index, edit, columns, self._value(edit, columns)))
        self.reads_latents = any(edit.op != "add" or edit.active_only for _, edit in edits)

    def _value(self, edit: Edit, columns: Tensor) -> Tensor:
        """The value of each latent, [len(latents)] float32; for unit='norm' still to be multiplied by ‖x‖."""
        if edit.op == "mean":
            return self.sae.mean_act(edit.latents).to(self.sae.device)
        value = torch.full((len(edit.latents),), edit.value or 0.0, device=self.sae.device)
        if edit.unit == "max":
            value = value * self.sae.max_act(edit.latents).to(self.sae.device)
        elif edit.unit == "norm":
            norms = torch.linalg.vector_norm(self.rows[columns], dim=-1)
            for latent, norm in zip(edit.latents, norms.tolist(), strict=True):
                if norm == 0:
                    raise ArgumentError(
                        f"the decoder row of latent {latent} is 0, so unit='norm' has no meaning for it. Use unit='raw'."
                    )
            value = value / norms
        return value

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        program, sae = self.program, self.sae
        active = [p for p in self.edits if view.may_select(p.edit.where)]
        if not active and not program.splice:
            return x
        x32 = x.float()
        norm = torch.linalg.vector_norm(x32, dim=-1)
        read = x if self.source is None else self.source.take()
        read_norm = norm if self.source is None else norm_of(read)
        keep = view.mask(sae.mask_rule, read_norm)
        scale = sae.scale(x32)
        acts = sae.encode(read) if program.drops_error or self.reads_latents else None
        current = acts[..., self.latents].float() if acts is not None else None
        delta, touched, emptied, others = None, None, None, None
        for p in active:
            where = p.edit.where
            selected = view.select(where, view.mask(sae.mask_rule, read_norm, special=True) if where.special else keep)
            change = self._change(p, current, norm if scale is None else norm / scale.squeeze(-1))
            if p.edit.active_only:
                assert current is not None
                firing = current[..., p.columns] > 0
                change = torch.where(firing, change, 0.0)
                selected = selected & firing.any(-1)
            change = torch.where(selected[..., None], change, 0.0)
            if current is not None:
                current = current.index_add(-1, p.columns, change)
            part = change @ self.rows[p.columns]
            if p.edit.op == "keep_only":
                assert acts is not None
                if others is None:
                    others = acts.float().index_fill(-1, self.latents, 0.0) @ sae.W_dec.float()
                newly = selected if emptied is None else selected & ~emptied
                emptied = selected if emptied is None else selected | emptied
                part = part - torch.where(newly[..., None], others, 0.0)
            part = part if scale is None else part * scale
            p.dose.add(selected, part.detach(), norm.detach(), view.fresh)
            delta = part if delta is None else delta + part
            touched = selected if touched is None else touched | selected
        if program.drops_error:
            assert acts is not None
            assert current is not None
            if program.splice:  # tokens outside the mask that an edit names are edited all the same
                touched = keep if touched is None else keep | touched
            if emptied is not None:
                acts = torch.where(emptied[..., None], 0.0, acts)
            if active:
                acts = acts.index_copy(-1, self.latents, current.to(acts.dtype))
            new = sae.decode(acts, x32 if self.source is None else read).float()
        else:
            assert delta is not None
            new = x32 + delta
        assert touched is not None
        if program.norm is not None:
            new = _with_norm(program.norm, x32, new, norm)
        if len(self.edits) != 1 or program.drops_error or program.norm is not None:
            self.dose.add(touched, (new - x32).detach(), norm.detach(), view.fresh)
        else:
            self.dose = self.edits[0].dose
        if x.dtype in _HALF:
            largest = torch.linalg.vector_norm(new.detach(), ord=torch.inf, dim=-1)
            # What was not finite before is no fault of an edit.
            self._too_large.append((view, touched & ~(largest <= torch.finfo(x.dtype).max) & norm.isfinite()))
        return torch.where(touched[..., None], new.to(x.dtype), x)

    def overflow(self) -> tuple[int, int, int] | None:
        """(row of the input, token counted among the row's own, its id) of the first x' that its half-precision dtype
        cannot hold; None if there is none. Reads the device once."""
        if not self._too_large or not torch.cat([large for _, large in self._too_large], 1).any():
            return None
        view, large = next((view, large) for view, large in self._too_large if large.any())
        row, column = large.nonzero()[0].tolist()
        return row // view.run.expansion, int(view.index[row, column]), int(view.ids[row, column])

    def _change(self, p: _Prepared, current: Tensor | None, norm: Tensor) -> Tensor:
        """z' - z of the edit's latents, [rows, n, len(latents)]; a constant for `add`, so that x' = x + c · W_dec exactly."""
        value = p.value if p.edit.unit != "norm" else norm[..., None] * p.value
        if p.edit.op == "add":
            return value.expand(*norm.shape, -1)
        assert current is not None
        z = current[..., p.columns]
        match p.edit.op:
            case "set" | "mean":
                return value - z
            case "min":
                return (value - z).clamp_min(0.0)
            case "max":
                return (value - z).clamp_max(0.0)
            case "scale":
                return (value - 1.0) * z
            case _:
                return -z


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


class ReplaceAction:
    """A fixed vector on every token of the mask: zero and mean ablation."""

    def __init__(self, vector: Tensor, rule: MaskRule, source: SourceAction | None = None) -> None:
        """`vector`: [d]; `rule`: of the SAE whose mask is meant; `source`: what a transcoder reads."""
        self.vector, self.rule, self.source = vector, rule, source

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        keep = view.mask(self.rule, norm_of(x if self.source is None else self.source.take()))
        return torch.where(keep[..., None], self.vector.to(x.device, x.dtype), x)


class SourceAction:
    """Keeps x where a transcoder reads it, for the action where it writes."""

    def __init__(self, site: str) -> None:
        """`site`: where it stands."""
        self.site = site
        self.x: Tensor | None = None

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        self.x = x.clone()  # the model may go on in the same tensor
        return x

    def take(self) -> Tensor:
        """x of this forward pass, [rows, n, d].

        Raises:
            SiteError: the model has not come by here yet.
        """
        if self.x is None:
            raise SiteError(
                f"the model comes to {self.site}, which the transcoder reads, only after the site it writes."
            )
        return self.x


def norm_of(x: Tensor) -> Tensor:
    """‖x‖ of each token, [rows, n], float32."""
    return torch.linalg.vector_norm(x.float(), dim=-1)


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
) -> Tensor:
    """What a user's trace adds where the SAE writes: by how much what is written into pre-activations, latents or
    reconstruction changes the reconstruction.

    The three functions return what they are given, or what the user put there. They have gradients, too:
    d loss / d latents = W_dec · d loss / d x'.
    """
    clean_pre_acts = sae.pre_acts(x)
    clean = sae.activate(clean_pre_acts)
    seen_pre_acts = pre_acts(clean_pre_acts.clone())
    rewritten = not torch.equal(seen_pre_acts, clean_pre_acts)
    # Through the seen pre-activations whenever a gradient may be asked for, so that they have one.
    recompute = rewritten or seen_pre_acts.requires_grad
    seen = latents((sae.activate(seen_pre_acts) if recompute else clean).clone())
    x_hat = sae.decode(seen, x)
    seen_x_hat = reconstruction(x_hat.clone())
    delta = (seen - clean) @ sae.W_dec
    scale = sae.scale(x)
    return (delta if scale is None else delta * scale) + (seen_x_hat - x_hat)


def changed(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta; where nothing was written x goes on bit for bit, and its gradient is the clean model's."""
    if delta.requires_grad:
        return (x.float() + delta.float()).to(x.dtype)
    moved = (delta != 0).any(-1, keepdim=True)
    return torch.where(moved, (x.float() + delta.float()).to(x.dtype), x) if moved.any() else x
