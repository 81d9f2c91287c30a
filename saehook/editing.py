"""What edits do to the activations of one site: x' from x. Plain torch; the model calls it while it runs.

z = encode(x), after the activation function. Edits apply in listed order to z. With the error kept
    x' = x + σ(x) · Σ (z'_i - z_i) W_dec[i]     over the edited latents, in float32, cast back to the dtype of x;
with the error dropped x' = decode(z') on the tokens that an edit selects; spliced, on the whole mask of the SAE. A token that
nothing selects keeps its bits. σ is 1, or the token's scale where the SAE normalises each token. A transcoder encodes what it
reads at another site, and its edits change y there where it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from saehook.config import MaskRule
from saehook.errors import ArgumentError, SiteError
from saehook.interventions import Edit, Program
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


@dataclass
class _Prepared:
    """One edit, ready to run."""

    index: int
    edit: Edit
    columns: Tensor
    value: Tensor
    dose: Dose = field(default_factory=Dose)


class EditAction:
    """The edits of one program at one site."""

    def __init__(
        self, sae: SAE, edits: list[tuple[int, Edit]], program: Program, source: SourceAction | None = None
    ) -> None:
        """`edits`: (index in the program, edit), those of this site. `source`: what a transcoder reads.

        Raises:
            LatentError: a latent outside 0..d_sae-1. MissingStatError: unit='max' without statistics.
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
        for index, edit in edits:
            columns = torch.tensor([column[latent] for latent in edit.latents], device=sae.device)
            self.edits.append(_Prepared(index, edit, columns, self._value(edit, columns)))
        self.reads_latents = any(edit.op != "add" for _, edit in edits)

    def _value(self, edit: Edit, columns: Tensor) -> Tensor:
        """The value of each latent, [len(latents)] float32; for unit='norm' still to be multiplied by ‖x‖."""
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
        keep = view.mask(sae.mask_rule, norm if self.source is None else norm_of(read))
        scale = sae.scale(x32)
        acts = sae.encode(read) if program.drops_error or self.reads_latents else None
        current = acts[..., self.latents].float() if acts is not None else None
        delta, touched = None, None
        for p in active:
            selected = view.select(p.edit.where, keep)
            change = self._change(p, current, norm if scale is None else norm / scale.squeeze(-1))
            change = torch.where(selected[..., None], change, 0.0)
            if current is not None:
                current = current.index_add(-1, p.columns, change)
            part = change @ self.rows[p.columns]
            part = part if scale is None else part * scale
            p.dose.add(selected, part.detach(), norm.detach(), view.fresh)
            delta = part if delta is None else delta + part
            touched = selected if touched is None else touched | selected
        if program.drops_error:
            assert acts is not None
            assert current is not None
            if program.splice:  # tokens outside the mask that an edit names are edited all the same
                touched = keep if touched is None else keep | touched
            if active:
                acts = acts.index_copy(-1, self.latents, current.to(acts.dtype))
            new = sae.decode(acts, x32 if self.source is None else read).float()
        else:
            assert delta is not None
            new = x32 + delta
        assert touched is not None
        if len(self.edits) != 1 or program.drops_error:
            self.dose.add(touched, (new - x32).detach(), norm.detach(), view.fresh)
        else:
            self.dose = self.edits[0].dose
        return torch.where(touched[..., None], new.to(x.dtype), x)

    def _change(self, p: _Prepared, current: Tensor | None, norm: Tensor) -> Tensor:
        """z' - z of the edit's latents, [rows, n, len(latents)]; a constant for `add`, so that x' = x + c · W_dec exactly."""
        value = p.value if p.edit.unit != "norm" else norm[..., None] * p.value
        if p.edit.op == "add":
            return value.expand(*norm.shape, -1)
        assert current is not None
        z = current[..., p.columns]
        match p.edit.op:
            case "set":
                return value - z
            case "scale":
                return (value - 1.0) * z
            case _:
                return -z


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
