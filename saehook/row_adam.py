"""Adam for both matrices of an SAE, some latents at a time, straight from the pairs that a backward pass leaves behind: rows of the
gradient are made, used and forgotten in the cache, weights may be in bfloat16, and moments in 8 bits.

The arithmetic of a block is that of `optim.DecoderConstrainedAdam`, in float32: take from the decoder's gradient what is along
its rows, clip, Adam, renormalise the rows. Where something is kept in fewer bits, only that is rounded (`rounding`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adam import adam

from saehook import rounding
from saehook.decoder_rows import normalize_rows_
from saehook.devices import OneDevice
from saehook.kernels import queued
from saehook.kernels.row_sums import RowsParameter, gradient_bound, gradient_rows, row_blocks
from saehook.rounding import Codes

BETA2 = 0.999


class RowAdam:
    """One optimiser of several matrices with one row (W_enc: one column) for each latent."""

    def __init__(
        self,
        matrices: Mapping[str, RowsParameter],
        latents: Tensor,
        *,
        beta1: float,
        eps: float,
        eight_bit: bool,
        seed: int,
        unit_rows: bool,
        devices: OneDevice,
    ) -> None:
        """`latents` [n]: what the rows are called among all devices; `eight_bit`: keep the moments in 8 bits a number;
        `unit_rows`: those of W_dec stay of length 1. `seed` of the rounding."""
        self.matrices, self.latents, self.devices = dict(matrices), latents, devices
        self.beta1, self.eps, self.eight_bit = beta1, eps, eight_bit
        self.unit_rows = unit_rows
        self.streamed = any(matrix.streamed for matrix in matrices.values())
        self.seeds = {name: seed * len(self.matrices) + i for i, name in enumerate(sorted(self.matrices))}
        self.taken = torch.zeros((), dtype=torch.int64, device=latents.device)
        """Steps that were taken."""
        self.moments = {name: self._zeros(self._rows(name)) for name in self.matrices}
        """Mean and mean square of each matrix's gradients."""

    def _zeros(self, rows: Tensor) -> tuple[Codes | Tensor, Codes | Tensor]:
        n, width = rows.shape
        if self.eight_bit:
            return tuple(Codes.zeros(n, width, rows.device, signed=signed) for signed in (True, False))  # type: ignore[return-value]
        kept = torch.promote_types(rows.dtype, torch.float32)
        return torch.zeros(n, width, device=rows.device, dtype=kept), torch.zeros(
            n, width, device=rows.device, dtype=kept
        )

    def _rows(self, name: str) -> Tensor:
        """The matrix with a row for each latent, on its own memory."""
        matrix = self.matrices[name].detach()
        return matrix.T if name == "W_enc" else matrix

    @torch.no_grad()
    def norm_or_bound(self, others: Tensor, clip_norm: float) -> Tensor:
        """Norm of all gradients, a scalar; or what is at least as much and cheaper, where it shows that with the norm `others` of
        all other gradients it is finite, and too small to be clipped at `clip_norm` (0: never clipped).

        The norm needs every row of the gradients, which are then made once more for the step.
        """
        first = next(iter(self.matrices.values()))
        if self.devices.alone and not queued(first.device):
            bounds = torch.stack([gradient_bound(matrix) for matrix in self.matrices.values()])
            bound = torch.linalg.vector_norm(bounds).to(others.dtype)
            largest = 0.999 * clip_norm - 1e-6 if clip_norm > 0 else torch.finfo(others.dtype).max
            if torch.hypot(bound, others) < largest:
                return bound
        found = [
            torch.linalg.vector_norm(self._gradient(name, block)).square()
            for block in self._blocks()
            for name in self.matrices
        ]
        return self.devices.sum_latents(torch.stack(found).sum(), "scalars").sqrt()

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor | None, taken: Tensor) -> None:
        """One step with the gradients, times `factor` (0-dim) where it is given, which are dropped; nothing changes where `taken`
        (0-dim bool) is False."""
        self.taken += taken
        if not self.streamed and not queued(taken.device):
            if taken:
                self._step_in_place(lr, factor)
        else:
            self._step_streamed(lr, torch.ones_like(self.taken) if factor is None else factor, taken)
        for matrix in self.matrices.values():
            matrix.pending.clear()
            matrix.grad = None

    def _step_in_place(self, lr: float, factor: Tensor | None) -> None:
        """With torch's own Adam. Matrix by matrix: fewer parts of memory are read together."""
        steps_before = (self.taken - 1).float()
        for name in self.matrices:
            for block in self._blocks():
                grad = self._gradient(name, block)
                if factor is not None and factor < 1:
                    grad.mul_(factor)
                rows, mean, square = self._rows(name)[block], self._read(name, 0, block), self._read(name, 1, block)
                adam(
                    [rows], [grad], [mean], [square], [], [steps_before.clone()], fused=True, amsgrad=False, lr=lr,
                    beta1=self.beta1, beta2=BETA2, eps=self.eps, weight_decay=0.0, maximize=False,
                )  # fmt: skip
                if self.unit_rows and name == "W_dec":
                    normalize_rows_(rows)

    def _step_streamed(self, lr: float, factor: Tensor, taken: Tensor) -> None:
        count = self.taken.clamp(min=1).double()
        size = lr / (1 - self.beta1**count)
        root = (1 - BETA2**count).sqrt()
        for block in self._blocks():
            # All of them before any is updated, since they may be made from the weights.
            gradients = {name: self._gradient(name, block) for name in self.matrices}
            for name, grad in gradients.items():
                self._update(name, block, grad * factor, size, root, taken)

    def _blocks(self) -> list[slice]:
        width = max(self._rows(name).shape[1] for name in self.matrices)
        return list(row_blocks(len(self.latents), width))

    def _gradient(self, name: str, block: slice) -> Tensor:
        """Rows of the gradient of a matrix, from all tokens, orthogonal to its own rows where these are of length 1."""
        grad, along = gradient_rows(self.matrices[name], block, columns=name == "W_enc")
        self.devices.add_rows_(grad)
        if self.unit_rows and name == "W_dec":
            unit = self._rows(name)[block].to(grad.dtype)
            if along is None or not self.devices.alone:
                along = (grad * unit).sum(-1)
            grad.addcmul_(unit, along[:, None], value=-1)
        return grad

    def _update(self, name: str, block: slice, grad: Tensor, size: Tensor, root: Tensor, taken: Tensor) -> None:
        rows = self._rows(name)[block]
        bits = None
        if self.eight_bit or rows.dtype == torch.bfloat16:
            bits = rounding.random_bits(self.seeds[name], self.taken, self.latents[block], rows.shape[1])
        mean, square = (self._read(name, i, block) for i in (0, 1))
        mean = mean.lerp(grad, 1 - self.beta1)
        square = (square * BETA2).addcmul_(grad, grad, value=1 - BETA2)
        new = rows.to(grad.dtype) - size.to(grad.dtype) * mean / (square.sqrt() / root.to(grad.dtype) + self.eps)
        if self.unit_rows and name == "W_dec":
            normalize_rows_(new)
        for i, moment in enumerate((mean, square)):
            self._write(name, i, block, moment, bits, taken)
        kept = new if rows.dtype != torch.bfloat16 or bits is None else rounding.to_bfloat16(new, bits)
        rows.copy_(torch.where(taken, kept, rows))

    def _read(self, name: str, which: int, block: slice) -> Tensor:
        kept = self.moments[name][which]
        if isinstance(kept, Codes):
            return rounding.decode(Codes(kept.codes[block], kept.largest[block]), signed=which == 0)
        return kept[block]

    def _write(self, name: str, which: int, block: slice, new: Tensor, bits: Tensor | None, taken: Tensor) -> None:
        kept = self.moments[name][which]
        if not isinstance(kept, Codes):
            kept[block] = torch.where(taken, new, kept[block])
            return
        assert bits is not None
        coded = rounding.encode(new, bits >> (16 + 23 * which), signed=which == 0)
        kept.codes[block] = torch.where(taken, coded.codes, kept.codes[block])
        kept.largest[block] = torch.where(taken, coded.largest, kept.largest[block])

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Moments by name of the matrix, and the steps that were taken; not copies. Each moment has a row for each latent."""
        found: dict[str, Tensor] = {}
        for name, moments in self.moments.items():
            for key, kept in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                if isinstance(kept, Codes):
                    found |= {f"{name}.{key}": kept.codes, f"{name}.{key}_largest": kept.largest}
                else:
                    found[f"{name}.{key}"] = kept
            found[f"{name}.step"] = self.taken
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for name, value in self.state().items():
            value.copy_(state[name])
