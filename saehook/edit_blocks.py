"""What edits do to the activations of one site: x' from x. Plain torch.

z = encode(x), after the activation function. The edits of a block apply in listed order to z. With the error kept
    x' = x + σ(x) · Σ (z'_i - z_i) W_dec[i]     over the edited latents, in float32;
where `keep_only` sets all others to 0, the sum goes over them, too: one product with W_dec. With the error dropped
x' = decode(z') on the tokens that an edit selects; spliced, on the whole mask of the SAE. σ is 1, or the token's scale where
the SAE normalises each token. A transcoder encodes what it reads at another site, and its edits change y there where it writes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saehook.config import MaskRule
from saehook.errors import ArgumentError, ShapeError, SiteError
from saehook.interventions import AnyEdit, Edit, Program, VectorEdit
from saehook.positions import TokenView
from saehook.readback import solve
from saehook.row_edits import Dose, Prepared, RowEdits, together
from saehook.sae import SAE
from saehook.sparse_acts import Acts, columns_of, decode_with, encode_for, pre_and_acts, sum_others
from saehook.tracks import Conditions, LatentTrack


def norm_of(x: Tensor) -> Tensor:
    """‖x‖ of each token, [rows, n], float32."""
    return torch.linalg.vector_norm(x.float(), dim=-1)


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


class Seen(NamedTuple):
    """The activations that a block sees."""

    x: Tensor
    """[rows, n, d], in the dtype of the site at the first block."""
    x32: Tensor
    """The same in float32."""
    norm: Tensor
    """‖x‖, [rows, n]."""


class Change(NamedTuple):
    """What a block makes of them: x + `delta`, or `new`, on the tokens touched."""

    touched: Tensor
    """[rows, n] bool."""
    delta: Tensor | None = None
    """[rows, n, d] float32, 0 where nothing is touched."""
    new: Tensor | None = None


class Encoder:
    """encode(x) of one SAE, once where two ask for it."""

    def __init__(self, sae: SAE) -> None:
        """`sae`: whose `encode`."""
        self.sae = sae
        self._known: tuple[Tensor, TokenView, Acts] | None = None

    def __call__(self, x: Tensor, view: TokenView) -> Acts:
        """[rows, n, d_sae]."""
        if self._known is None or self._known[0] is not x or self._known[1] is not view:
            self._known = x, view, encode_for(self.sae, x)
        return self._known[2]


def _check_amount(edit: AnyEdit) -> None:
    """Raises ArgumentError for a strength that is a KL."""
    if edit.unit == "kl":
        raise ArgumentError(
            f"the strength of {edit} is a KL, and which amount gives it depends on a text. Turn it into one first: "
            "edits = hooked.calibrate(edits, text)."
        )


class Block:
    """Edits of one site that see the same x."""

    edits: list[Prepared]
    program: Program
    conditions: Conditions

    def may_act(self, view: TokenView) -> bool:
        """False where no token of this pass can be meant; costs nothing."""
        return any(view.may_select(p.edit.where) for p in self.edits)

    def __call__(self, seen: Seen, norm: Tensor, view: TokenView) -> Change:
        """`norm`: ‖x‖ as x reaches the site, before all blocks."""
        raise NotImplementedError

    def selected(self, edit: AnyEdit, keep: Tensor, rule: MaskRule, norm: Tensor, view: TokenView) -> Tensor:
        """Tokens that `where` and `when` of an edit mean, [rows, n] bool; `keep`: the mask."""
        if edit.where.special or edit.where.bos:
            keep = view.mask(rule, norm, edit.where)
        selected = view.select(edit.where, keep)
        if edit.when is not None:
            selected = selected & self.conditions.holds(edit.when, view).to(selected.device)
        return selected

    @staticmethod
    def scheduled(edit: AnyEdit, change: Tensor, view: TokenView) -> Tensor:
        """The part of `change` [rows, n, ...] that the edit's schedule makes."""
        if edit.schedule is None:
            return change
        first = view.past - view.run.length
        factors = [edit.schedule.at(first + i) for i in range(view.ids.shape[1])]
        return change * torch.tensor(factors, device=change.device)[:, None]


class LatentBlock(Block):
    """Edits of latents of one SAE, and its splice."""

    def __init__(
        self,
        sae: SAE,
        edits: list[tuple[int, Edit]],
        program: Program,
        *,
        encoder: Encoder | None = None,
        conditions: Conditions | None = None,
        track: LatentTrack | None = None,
        source: SourceAction | None = None,
    ) -> None:
        """`edits`: (index in the program, edit). `track`: where `resample` finds its values; `source`: what a transcoder reads.

        Raises:
            LatentError: a latent outside 0..d_sae-1. MissingStatError: a unit, `mean` or error='mean' without statistics.
            ArgumentError: unit='norm' for a latent without direction, 'kl', or read back what cannot be.
        """
        self.sae, self.program, self.source, self.track = sae, program, source, track
        self.encode = encoder or Encoder(sae)
        self.conditions = conditions or Conditions({})
        used = sorted({latent for _, edit in edits for latent in edit.latents})
        sae.check_latents(tuple(used))
        column = {latent: i for i, latent in enumerate(used)}
        self.latents = torch.tensor(used, dtype=torch.long, device=sae.device)
        self.rows = sae.decoder_rows(self.latents).float()
        self.edits = []
        for index, edit in edits:
            meant = edit.latents
            if edit.op == "keep_only":
                meant = [latent for latent in used if latent not in edit.latents]
            columns = torch.tensor([column[latent] for latent in meant], dtype=torch.long, device=sae.device)
            prepared = Prepared(index, edit, self._value(edit, columns), columns)
            if edit.mode == "readback":
                self._check_readback()
                prepared.residual = Dose()
            self.edits.append(prepared)
        self.row_edits = together(self.edits)
        self.reads_latents = program.drops_error or any(
            edit.op != "add" or edit.active_only or edit.mode == "readback" for _, edit in edits
        )
        self.mean_error = sae.mean_error().to(sae.device) if program.error == "mean" else None

    def _value(self, edit: Edit, columns: Tensor) -> Tensor:
        _check_amount(edit)
        if edit.op == "mean":
            return self.sae.mean_act(edit.latents).to(self.sae.device)
        if edit.unit == "quantile":
            assert edit.value is not None
            return self.sae.quantile_act(edit.latents, edit.value).to(self.sae.device)
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

    def _check_readback(self) -> None:
        if self.source is not None:
            raise ArgumentError(
                "mode='readback' of a transcoder: it reads another site than it writes. Leave mode out."
            )
        if self.sae.config.normalize != "none":
            raise ArgumentError(
                "mode='readback' of an SAE that normalises each token: its encoder is not linear. Leave mode out."
            )

    def may_act(self, view: TokenView) -> bool:
        return self.program.splice or super().may_act(view)

    def __call__(self, seen: Seen, norm: Tensor, view: TokenView) -> Change:
        sae, program = self.sae, self.program
        active = [p for p in self.row_edits if view.may_select(p.edit.where)]
        read = seen.x if self.source is None else self.source.take()
        mask_norm = norm if self.source is None else norm_of(read)
        keep = view.mask(sae.mask_rule, mask_norm)
        scale = sae.scale(seen.x32)
        acts = self.encode(read, view) if self.reads_latents else None
        current = columns_of(acts, self.latents).float() if acts is not None else None
        unit_norm = seen.norm if scale is None else seen.norm / scale.squeeze(-1)
        delta, touched, emptied, others = None, None, None, None
        read_back: list[tuple[Prepared, Tensor]] = []
        for p in active:
            p.begin(view.run)
            selected = self.selected(p.edit, keep, sae.mask_rule, mask_norm, view)
            change = self.scheduled(p.edit, self._change(p, current, unit_norm), view)
            if p.edit.active_only:
                assert current is not None
                firing = self.sae.fires(current[..., p.columns])
                change = torch.where(firing, change, 0.0)
                selected = selected & firing.any(-1)
            change = torch.where(selected[..., None], change, 0.0)
            before = current
            if current is not None:
                current = current.index_add(-1, p.columns, change)
            p.note(selected, before, current, self.latents)
            touched = selected if touched is None else touched | selected
            if p.edit.mode == "readback":
                read_back.append((p.parts[0], selected))
                continue
            part = change @ self.rows[p.columns]
            if p.edit.op == "keep_only":
                assert acts is not None
                if others is None:
                    others = sum_others(sae, acts, self.latents)
                newly = selected if emptied is None else selected & ~emptied
                emptied = selected if emptied is None else selected | emptied
                part = part - torch.where(newly[..., None], others, 0.0)
            part = part if scale is None else part * scale
            p.count(selected, part.detach(), seen.norm.detach(), view.fresh)
            delta = part if delta is None else delta + part
        if not program.drops_error:
            if read_back:
                assert current is not None
                delta = self._read_back(read_back, current, delta, seen, view)
            assert delta is not None
            assert touched is not None
            return Change(touched, delta=delta)
        assert acts is not None
        assert current is not None
        if program.splice:  # tokens outside the mask that an edit names are edited all the same
            touched = keep if touched is None else keep | touched
        assert touched is not None
        edited = self.latents if active else self.latents[:0]
        values = current[..., : len(edited)]
        new = decode_with(sae, acts, edited, values, emptied, seen.x32 if self.source is None else read).float()
        return Change(touched, new=new if self.mean_error is None else new + self.mean_error)

    def _change(self, p: RowEdits, current: Tensor | None, norm: Tensor) -> Tensor:
        """z' - z of the edit's latents, [rows, n, len(columns)]; a constant for `add`, so that x' = x + c · W_dec exactly."""
        edit = p.edit
        value = p.value if edit.unit != "norm" else norm[..., None] * p.value
        if edit.op == "add":
            return value.expand(*norm.shape, value.shape[-1])
        assert current is not None
        z = current[..., p.columns]
        match edit.op:
            case "set" | "mean":
                return value - z
            case "min":
                return (value - z).clamp_min(0.0)
            case "max":
                return (value - z).clamp_max(0.0)
            case "scale":
                return (value - 1.0) * z
            case "swap":
                return z.flip(-1) - z
            case "resample":
                return self._resampled(edit).to(z.device) - z
            case _:
                return -z

    def _resampled(self, edit: Edit) -> Tensor:
        """z of the edit's latents at its source, [len(latents)].

        Raises:
            ArgumentError: the source lies in a cache that the run began with, or in a later pass.
        """
        assert self.track is not None
        assert self.track.view is not None
        assert edit.source is not None
        view = self.track.view
        row, column = view.run.column(*edit.source)
        values = [self.track.of(i, view, since=column, until=column + 1) for i in edit.latents]
        return torch.stack([z[row, column] for z in values])

    def _read_back(
        self,
        edits: list[tuple[Prepared, Tensor]],
        target: Tensor,
        delta: Tensor | None,
        seen: Seen,
        view: TokenView,
    ) -> Tensor:
        """The whole change of x, such that encoding x' gives z' = `target` [rows, n, len(latents)] for latents read back.

        Where one of them is to be silent or already is as it should be, its pre-activation need only stay below 0, or stay.
        """
        sae = self.sae
        columns = torch.cat([p.columns for p, _ in edits]).unique()
        wanted = torch.zeros_like(target, dtype=torch.bool)
        for p, selected in edits:
            wanted[..., p.columns] |= selected[..., None]
        wanted, target = wanted[..., columns], target[..., columns]
        latents = self.latents[columns]
        encoder, rows = sae.encoder_rows(latents).T.float(), self.rows[columns]
        before = seen.x32 if delta is None else seen.x32 + delta
        pre, acts = pre_and_acts(sae, before, latents)
        goal = torch.where(target != 0, target, pre.clamp_max(0.0))
        goal = torch.where(acts == target, pre, goal)
        amount = solve(rows @ encoder, torch.where(wanted, goal - pre, 0.0), wanted)
        part = amount @ rows
        again = columns_of(encode_for(sae, before + part), latents).float()
        for p, selected in edits:
            mine = torch.isin(columns, p.columns)
            p.dose.add(selected, (amount[..., mine] @ rows[mine]).detach(), seen.norm.detach(), view.fresh)
            assert p.residual is not None
            missed = (again - target)[..., mine].abs().mean(-1, keepdim=True)
            p.residual.add(selected, missed.detach(), torch.ones_like(seen.norm), view.fresh)
        return part if delta is None else delta + part


class VectorBlock(Block):
    """One edit along a direction."""

    def __init__(
        self,
        edit: VectorEdit,
        index: int,
        program: Program,
        *,
        width: int,
        device: torch.device,
        conditions: Conditions | None = None,
    ) -> None:
        """`index`: of the edit in the program; `width` of the site.

        Raises:
            ShapeError: a vector of another width. ArgumentError: a strength that is a KL.
        """
        if len(edit.vector) != width:
            raise ShapeError(f"the vector of {edit} has {len(edit.vector)} numbers, the site a width of {width}.")
        _check_amount(edit)
        self.program, self.conditions = program, conditions or Conditions({})
        self.edit = edit
        vector = torch.tensor(edit.vector, dtype=torch.float64)
        if edit.op != "add" or edit.unit == "norm":
            vector = vector / vector.abs().max()  # else the square of a tiny or huge number is 0 or infinite
            vector = vector / torch.linalg.vector_norm(vector)
        self.vector = vector.to(device, torch.float32)
        self.edits = [Prepared(index, edit, self.vector, torch.empty(0, dtype=torch.long))]

    def __call__(self, seen: Seen, norm: Tensor, view: TokenView) -> Change:
        edit = self.edit
        selected = self.selected(edit, view.mask(MaskRule(), norm), MaskRule(), norm, view)
        limit = torch.as_tensor(edit.value or 0.0, device=norm.device)
        if edit.unit == "norm":
            limit = limit * seen.norm[..., None]
        if edit.op == "add":
            delta = (limit * self.vector).expand_as(seen.x32)
        else:
            along = (seen.x32 @ self.vector)[..., None]
            excess = along if edit.op == "project_out" else (along - limit).clamp_min(0.0)
            delta = -excess * self.vector
        delta = torch.where(selected[..., None], self.scheduled(edit, delta, view), 0.0)
        self.edits[0].dose.add(selected, delta.detach(), seen.norm.detach(), view.fresh)
        return Change(selected, delta=delta)


class WatchAction:
    """Keeps latents for the conditions and values of a run; changes nothing."""

    def __init__(self, encoder: Encoder, track: LatentTrack) -> None:
        encoder.sae.check_latents(tuple(track.latents))
        self.encode, self.track = encoder, track
        self.latents = torch.tensor(track.latents, dtype=torch.long, device=encoder.sae.device)

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        mask = view.mask(self.encode.sae.mask_rule, norm_of(x.detach()))
        self.track.note(columns_of(self.encode(x, view), self.latents), mask, view)
        return x
