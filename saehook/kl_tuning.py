"""Batches for the end of a training in which the language model itself judges: KL(clean ‖ spliced) and its gradient.

Over the last `TrainConfig.kl_tokens` an SAE minimises, besides its own loss, the divergence of the model's next tokens when
its reconstruction takes the place of the activations (Karvonen 2025). The batches are whole windows then, since the
model needs the context; everything else of a step stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saehook.config import MaskRule
from saehook.harvest import TextStream
from saehook.hooked_model import HookedModel
from saehook.positions import TokenView
from saehook.runs import frozen
from saehook.tokenization import is_outlier, keep_mask, special_ids

MAX_LOGITS = 2**24
"""Logits of one pass through the model; it takes as many windows as fit, and at least one."""


class KLBatches:
    """Windows of a text as batches of activations that know what happens downstream of them."""

    def __init__(
        self, model: HookedModel, sites: Sequence[str], text: TextStream, rules: Mapping[str, MaskRule]
    ) -> None:
        """`text` is endless (`repeat=True`) and of its own: its place is part of a checkpoint. `rules` by site."""
        self.model, self.sites, self.text, self.rules = model, list(sites), text, rules

    def take(self, n_tokens: int) -> KLBatch:
        """As many windows as hold `n_tokens` tokens of the mask; those beyond stay as the model has them."""
        special = special_ids(self.model.tokenizer)
        ids: list[Tensor] = []
        parts: list[dict[str, Tensor]] = []
        masks: list[Tensor] = []
        held = 0
        while held < n_tokens:
            windows = torch.stack([next(self.text) for _ in range(-(-(n_tokens - held) // self.text.window))])
            found = self.model.activations(windows, self.sites)
            mask = torch.stack([self._mask(windows, x, self.rules[site], special) for site, x in found.items()]).all(0)
            mask &= mask.flatten().cumsum(0).view_as(mask) <= n_tokens - held
            held += int(mask.sum())
            ids.append(windows)
            masks.append(mask)
            parts.append({site: x[mask.to(x.device)].float() for site, x in found.items()})
        activations = {site: torch.cat([part[site] for part in parts]) for site in self.sites}
        return KLBatch(self.model, torch.cat(ids), torch.cat(masks), activations)

    @staticmethod
    def _mask(ids: Tensor, x: Tensor, rule: MaskRule, special: tuple[int, ...]) -> Tensor:
        outlier = is_outlier(torch.linalg.vector_norm(x.float(), dim=-1), rule)
        return keep_mask(ids, None, special, rule.skip_first_tokens) & ~outlier.cpu()

    def state(self) -> dict[str, Any]:
        """The place in the text, as JSON-able data."""
        return self.text.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.text.load_state(state)


class KLBatch:
    """Activations of n tokens by site, [n, width] float32, in the order of `mask` over the windows."""

    def __init__(self, model: HookedModel, ids: Tensor, mask: Tensor, activations: Mapping[str, Tensor]) -> None:
        """`ids` and `mask`: [windows, length], on the CPU."""
        self.model, self.ids, self.mask = model, ids, mask
        self.activations = activations

    def divergence(self, site: str, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        """KL(clean ‖ spliced) in nats per token, a scalar, with `x_hat` [n, width] in place of the activations at `site`,
        and its gradient, [n, width]. The mean is over all tokens of the windows that predict one."""
        rows = max(1, MAX_LOGITS // (self.ids.shape[1] * self.model.lm.get_input_embeddings().num_embeddings))
        total = torch.zeros((), device=x_hat.device)
        gradients, done = [], 0
        for ids, mask in zip(self.ids.split(rows), self.mask.split(rows), strict=True):
            n = int(mask.sum())
            leaf = x_hat[done : done + n].detach().requires_grad_()
            done += n
            with torch.no_grad():
                clean = self._log_probs(ids, {})
            with torch.enable_grad(), frozen(self.model.lm):
                spliced = self._log_probs(ids, {site: PutIn(leaf, mask)})
                kl = (clean.exp() * (clean - spliced)).sum() / (self.ids.shape[0] * (self.ids.shape[1] - 1))
            gradients += torch.autograd.grad(kl, [leaf])
            total = total + kl.detach().to(total.device)
        return total, torch.cat(gradients)

    def _log_probs(self, ids: Tensor, actions: Mapping[str, Any]) -> Tensor:
        return self.model.run(ids, actions).logits[:, :-1].float().log_softmax(-1)


class PutIn:
    """Given vectors on the tokens of a mask; gradients go to them."""

    def __init__(self, vectors: Tensor, mask: Tensor) -> None:
        """`vectors`: [n, width] for the n tokens of `mask` [rows, length]."""
        self.vectors, self.mask = vectors, mask

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        return x.masked_scatter(self.mask.to(x.device)[..., None], self.vectors.to(x.device, x.dtype))
