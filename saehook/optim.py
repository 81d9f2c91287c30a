"""Adam on the unit sphere of decoder rows, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saehook import kernels
from saehook.decoder_rows import normalize_rows_, remove_parallel_
from saehook.devices import ONE_DEVICE, OneDevice
from saehook.row_adam import RowAdam


def lr_factor(step: int, steps: int, *, warmup_steps: int, decay_share: float) -> float:
    """Share of the peak learning rate for step `step` of 0..steps-1.

    Rises linearly over `warmup_steps`, stays at 1, and falls linearly over the last `decay_share` of the steps; it
    would be 0 at step `steps`. Where both apply, the smaller counts.
    """
    rise = (step + 1) / (warmup_steps + 1) if step < warmup_steps else 1.0
    decay_steps = decay_share * steps
    fall = (steps - step) / decay_steps if steps - step < decay_steps else 1.0
    return max(0.0, min(rise, fall))


class DecoderConstrainedAdam:
    """Adam for the parameters of one SAE, whose decoder rows keep unit length.

    `step` is: remove the gradient's component along the decoder rows, clip, Adam, renormalise the rows, set the
    learning rate of the next step.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        lr: float,
        steps: int,
        warmup_steps: int = 0,
        decay_share: float = 0.0,
        beta1: float = 0.9,
        eps: float = 6.25e-10,
        clip_norm: float = 0.0,
        unit_rows: bool = True,
        devices: OneDevice = ONE_DEVICE,
        latents: Tensor | None = None,
        eight_bit: bool = False,
        seed: int = 0,
    ) -> None:
        """`parameters` by name; with `unit_rows` the one called `W_dec` is constrained. `clip_norm` 0 does not clip.

        Matrices that are `RowsParameter`s are stepped by a `RowAdam`, all others whole. For the former, `latents` are which of all
        latents are here, `eight_bit` says how their moments are kept, and `seed` is of their rounding.
        """
        self.devices = devices
        rows = {name: p for name, p in parameters.items() if isinstance(p, kernels.RowsParameter)}
        self.rows: RowAdam | None = None
        if rows:
            assert latents is not None
            facts: dict[str, Any] = {"eight_bit": eight_bit, "seed": seed, "unit_rows": unit_rows, "devices": devices}
            self.rows = RowAdam(rows, latents, beta1=beta1, eps=eps, **facts)
        self.parameters = {name: p for name, p in parameters.items() if name not in rows}
        self.W_dec = self.parameters["W_dec"] if unit_rows and not rows else None
        self.peak_lr = lr
        self.clip_norm = clip_norm
        self.steps, self.warmup_steps, self.decay_share = steps, warmup_steps, decay_share
        self.taken = 0
        """Steps taken so far."""
        # Where a matrix is stored the other way round, Adam gets its transpose, a parameter on the same memory: fused
        # Adam copies tensors that are not contiguous.
        self.stepped = {
            name: nn.Parameter(p.detach().T) if p.ndim == 2 and not p.is_contiguous() and p.T.is_contiguous() else p
            for name, p in self.parameters.items()
        }
        self.adam = torch.optim.Adam(list(self.stepped.values()), lr=lr, betas=(beta1, 0.999), eps=eps, fused=True)
        self._set_lr()

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.adam.param_groups[0]["lr"]

    def step(self, allowed: Tensor | None = None) -> Tensor:
        """One step with the gradients that the parameters hold; they are dropped afterwards.

        Nothing changes where the gradient's norm is not finite, or `allowed` (0-dim bool, on the device) is False. Returns
        whether the step was taken, 0-dim bool: no synchronisation.
        """
        self.devices.add_gradients(self.parameters)
        if self.W_dec is not None and self.W_dec.grad is not None:
            remove_parallel_(self.W_dec.grad, self.W_dec)
        norm = self.devices.gradient_norm(self.parameters)
        if self.rows is not None:
            norm = torch.hypot(norm, self.rows.norm_or_bound(norm, self.clip_norm))
        taken = norm.isfinite() if allowed is None else norm.isfinite() & allowed
        # What `clip_grads_with_norm_` multiplies with.
        factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1) if self.clip_norm > 0 else None
        if self.rows is not None:  # first, since gradients may be made from the parameters
            self.rows.step(self.lr, factor, taken)
        for name, stepped in self.stepped.items():
            grad = self.parameters[name].grad
            stepped.grad = grad if grad is None or stepped is self.parameters[name] else grad.T
        on_sphere = kernels.uses_triton(taken.device) and kernels.adam_rows_(self.adam, taken, factor, self.W_dec)
        # On a CPU, where the norm may be read, gradients that are short enough are not multiplied by 1.
        if self.clip_norm > 0 and (kernels.queued(norm.device) or norm + 1e-6 > self.clip_norm):
            nn.utils.clip_grads_with_norm_(self.stepped.values(), self.clip_norm, norm)
        self.adam.found_inf = (~taken).float()  # type: ignore[attr-defined]  # how fused Adam is told to change nothing
        self.adam.step()
        for parameter in (*self.parameters.values(), *self.stepped.values()):
            parameter.grad = None
        if self.W_dec is not None and not on_sphere:
            normalize_rows_(self.W_dec, taken)
        self.taken += 1
        self._set_lr()
        return taken

    def state(self) -> dict[str, Tensor]:
        """Adam's moments and step counts by parameter name; not copies."""
        return {
            f"{name}.{key}": value
            for name, stepped in self.stepped.items()
            for key, value in self.adam.state[stepped].items()
        } | (self.rows.state() if self.rows is not None else {})

    def release(self) -> None:
        """Give the memory of a `RowAdam` back; no step can follow."""
        self.rows = None

    def load_state(self, state: Mapping[str, Tensor], taken: int) -> None:
        """Go on from what `state` gave after `taken` steps."""
        if self.rows is not None:
            self.rows.load_state(state)
        for name, stepped in self.stepped.items():
            found = {key.rpartition(".")[2]: value for key, value in state.items() if key.rpartition(".")[0] == name}
            # Where nothing is found the parameter has had no gradient yet. A `RowAdam` counts its steps in whole numbers.
            self.adam.state[stepped] = {
                key: value.to(stepped.device, torch.float32 if key == "step" else value.dtype, copy=True)
                for key, value in found.items()
            }
            if not found:
                del self.adam.state[stepped]
        self.taken = taken
        self._set_lr()

    def _set_lr(self) -> None:
        factor = lr_factor(self.taken, self.steps, warmup_steps=self.warmup_steps, decay_share=self.decay_share)
        self.adam.param_groups[0]["lr"] = self.peak_lr * factor
