"""What a training step asks of the devices that it runs on. Here there is one; `distributed.shards` answers for several.

Several devices form a mesh: each has some of the latents (their rows of all parameters but b_dec and W_skip, which all
have) and sees some tokens of each batch. With one device every question has the answer "all of it", at no cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saehook import kernels, losses, run_state
from saehook.config import Activation, TrainConfig

if TYPE_CHECKING:
    from saehook.sae import SAE

WHOLE_PARAMETERS = frozenset({"b_dec", "W_skip"})
"""Parameters that every device has whole; of the others each has the rows of its latents."""


class OneDevice:
    """All latents and all tokens are here."""

    alone = True
    """Whether there are no other devices."""
    is_main = True
    """Whether this process writes files and speaks."""

    def check(self, configs: Sequence[TrainConfig]) -> None:
        """Raises ArgumentError for an SAE that cannot be trained on these devices."""

    # --- what is where -----------------------------------------------------------------------------------------------

    def latents(self, ends: Sequence[int]) -> tuple[slice, ...]:
        """Those of this device: a part of each group of latents that ends at one of the `ends`."""
        return (slice(0, ends[-1]),)

    def tokens(self, batch: Tensor) -> Tensor:
        """Those of this device among the tokens [n, width] of a batch."""
        return batch

    def number(self, here: int) -> int:
        """Tokens of the batch on all devices, where `here` are on this one."""
        return here

    def part_of(self, sae: SAE, ends: Sequence[int]) -> SAE:
        """A whole SAE with the latents of this device only."""
        return sae

    def finished(self, sae: SAE, activation: Activation, ends: Sequence[int]) -> SAE:
        """The SAE of all latents, where `sae` has those here: itself, or one that works together with the others."""
        return sae

    # --- one step, forward -------------------------------------------------------------------------------------------

    def topk(
        self, pre_acts: Tensor, k: int, d_sae: int, widest: int | None = None, *, descending: bool = False
    ) -> kernels.Selection:
        """The pairs here that are among the k largest of their token, of all `d_sae` latents, of which a device has `widest` at
        most (None: an equal share); on request such that `first_of_each_token` works."""
        return kernels.topk(pre_acts, k, descending=descending)

    def encode_topk(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        center: Tensor,
        k: int,
        d_sae: int,
        scratch: kernels.Scratch | None,
        *,
        descending: bool = False,
    ) -> tuple[Tensor, kernels.Selection]:
        """The pairs that `topk` keeps, and their pre-activations [m]."""
        if not kernels.some_at_a_time(len(x), W_enc):
            pick = functools.partial(self.topk, k=k, d_sae=d_sae, descending=descending)
            screen = functools.partial(kernels.screened.largest_of_each_token, descending=descending)
            return kernels.encode(x, W_enc, b_enc, center, pick, k=k, scratch=scratch, screen=screen)
        with torch.no_grad():
            centred = x - center
            largest = kernels.largest_of_each_token(centred, W_enc, b_enc, k)
            tokens = torch.arange(len(x), device=x.device)[:, None].expand_as(largest.latents).reshape(-1)
            pairs = kernels.Selection(tokens, largest.latents.reshape(-1), len(x), len(b_enc), order="token")
        return kernels.selected(largest.values.reshape(-1), centred, W_enc, b_enc, center, pairs, scratch), pairs

    def first_of_each_token(
        self, selected: kernels.Selection, values: Tensor, k: int, of: int
    ) -> tuple[kernels.Selection, Tensor]:
        """The pairs, with their activations, that are among the k largest of their token, from those among the `of` largest."""
        return selected.first_of_each_token(k), values.view(-1, of)[:, :k].reshape(-1)

    def batch_topk(self, pre_acts: Tensor, k: int, ends: Sequence[int]) -> kernels.Selection:
        """The pairs here that are among the tokens x k largest of the batch, of all latents."""
        return kernels.batch_topk(pre_acts, k)

    def encode_batch_topk(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        center: Tensor,
        k: int,
        ends: Sequence[int],
        scratch: kernels.Scratch | None,
    ) -> tuple[Tensor, kernels.Selection]:
        """The pairs that `batch_topk` keeps, and their pre-activations [m]."""
        if not kernels.some_at_a_time(len(x), W_enc):
            pick = functools.partial(self.batch_topk, k=k, ends=ends)
            screen = kernels.screened.largest_of_batch if self.alone else None
            return kernels.encode(x, W_enc, b_enc, center, pick, k=k, scratch=scratch, screen=screen)
        with torch.no_grad():
            centred = x - center
            found = kernels.largest_of_batch(centred, W_enc, b_enc, min(k, ends[-1]) * self.number(len(x)))
            kept = self.kept_of_batch(found, k, ends, len(x))
            pairs = kernels.Selection(found.tokens[kept], found.latents[kept], len(x), len(b_enc))
        return kernels.selected(found.values[kept], centred, W_enc, b_enc, center, pairs, scratch), pairs

    def kept_of_batch(self, found: kernels.Pairs, k: int, ends: Sequence[int], n_tokens: int) -> Tensor | slice:
        """Which pairs, of the largest here, `batch_topk` keeps; of `n_tokens` here."""
        return slice(None)

    def read_by_all(self, parameter: Tensor) -> Tensor:
        """The same; its gradient is the sum of those that the latents of all devices have for it."""
        return parameter

    def add_latents(self, part: Tensor) -> Tensor:
        """Sum over the devices that have the other latents; every part gets the gradient of the sum."""
        return part

    def add_up(self, found: kernels.Autoencoded) -> kernels.Autoencoded:
        """What was decoded, of all latents, and the cost, of all latents and tokens. `fired` stays what it is here."""
        return found

    def mean(self, values: Tensor) -> Tensor:
        """Mean of [n, ...] over the tokens of all devices and the other dimensions, a scalar; its gradient is that of the part
        here."""
        return values.mean()

    def squared_error(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Mean squared error of a token, summed over its components."""
        return losses.squared_error(x, x_hat)

    # --- one step, without gradients ---------------------------------------------------------------------------------

    def total_variance(self, x: Tensor) -> Tensor:
        """Mean squared distance of all tokens to their mean, a scalar."""
        return losses.total_variance(x)

    def add_tokens(self, x: Tensor) -> Tensor:
        """Sum over the devices that have the other tokens."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """Sum over all devices, whose tokens and latents differ."""
        return x

    def latent_mean(self, x: Tensor) -> float:
        """Mean of a number per latent over all latents."""
        return float(x.double().mean())

    def least(self, x: Tensor) -> Tensor:
        """The smallest of all devices, element by element."""
        return x

    def all(self, x: Tensor) -> Tensor:
        """Whether it is true on all devices, element by element."""
        return x

    def largest(self, by_latent: Tensor, k: int, d_sae: int, widest: int) -> Tensor:
        """The pre-activations `by_latent` [latents here, n] where they are positive and `topk` keeps them, else 0."""
        values, rows = by_latent.T.contiguous().topk(k, dim=-1, sorted=False)
        return torch.zeros_like(by_latent).scatter_(0, rows.T, values.T.relu_())

    def shared_number(self, here: int) -> tuple[int, int]:
        """Sum and maximum of a number of latents over the devices that have the other latents."""
        return here, here

    def sum_latents(self, part: Tensor, what: str) -> Tensor:
        """As `add_latents`, in place and without gradients; `what` it is for."""
        return part

    def add_rows_(self, grad: Tensor) -> None:
        """As `add_gradients`, for some rows of a gradient."""

    def add_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Bring the gradients of the other tokens in."""

    def gradient_norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Norm of all gradients together, a scalar."""
        return nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])

    # --- inference ---------------------------------------------------------------------------------------------------

    def activate(self, sae: SAE, pre_acts: Tensor, activation: Activation) -> Tensor:
        """Activations of the latents here, [n, d_sae], by the inference rule of all latents."""
        return sae.activate(pre_acts)

    def decode(self, sae: SAE, acts: Tensor, x: Tensor) -> Tensor:
        """The reconstruction from the activations of all latents, of which those here are given."""
        return sae.decode(acts, x)

    # --- the run -----------------------------------------------------------------------------------------------------

    def nth_largest(self, values: Tensor, n: int) -> float:
        """The n-th largest of the positive numbers [m] of the devices that have the other latents; 0 where there are fewer."""
        return float(values.topk(n, sorted=False).values.min()) if values.numel() >= n else 0.0

    def any(self, here: bool) -> bool:
        """Whether it is true on some device."""
        return here

    def main_says(self, here: bool) -> bool:
        """What the main process says."""
        return here

    def main_does(self, do: Callable[[], Any]) -> Any:
        """What `do` gives on the main process, to all; an error there is raised on all."""
        return do()

    def save_state(self, folder: Path, step: int, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> Path:
        """See `run_state.save_state`."""
        return run_state.save_state(folder, step, tensors, data)

    def load_state(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
        """See `run_state.load_state`; of the latents those of this device."""
        return run_state.load_state(folder)


ONE_DEVICE = OneDevice()
