"""Losses from what a language model gives its head, without ever holding tokens × vocabulary.

The model runs up to the input of its head; the head is then applied to a few tokens at a time. What follows the matrix is
one of a few forms (`_forms`); on the first text it is compared with the model's own logits, and a head that gives others is
left alone: then the model's own forward makes all logits of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehook.editing import Action, ChainAction, ReadAction
from saehook.errors import ArgumentError, SaehookError
from saehook.hooked_saes import HookedSAEs
from saehook.prefix import Follower

PROBE_TOKENS = 32
CHUNK_LOGITS = 2**24
"""Logits that are held at a time; a few tensors of this size, in float32, are there together."""
CHUNK_TOKENS = 1024
"""No more tokens than these; their product is as fast as a larger one, and its memory is used again and again."""
BLOCK_LOGITS = 2**18
"""Of these, as many as a CPU compares at a time: they stay in its cache."""


class Scores(NamedTuple):
    """Of each token, how a run predicts the next one; [n] float32, nats."""

    ce: Tensor
    """Cross-entropy."""
    kl: Tensor
    """KL(clean ‖ this run)."""
    agrees: Tensor
    """1 where no token is likelier than the clean run's likeliest, else 0."""


def _forms(lm: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """What architectures do with the product of states and unembedding; those first for which this model has a number."""
    config = lm.config.get_text_config()
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2, 3, 3n
        yield lambda logits: torch.tanh(logits / cap) * cap
    if scale := getattr(lm, "logit_scale", None):  # Cohere
        yield lambda logits: logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite; others multiply by a number of the same name
        yield lambda logits: logits / scaling
        yield lambda logits: logits * scaling
    yield lambda logits: logits


class Head:
    """The unembedding of one model."""

    def __init__(self, hooked: HookedSAEs, ids: Tensor) -> None:
        """`ids` [rows, length]: a text to compare on; its first window's first tokens are enough.

        Raises:
            ArgumentError: the model gives no logits for each token: it has no language-model head.
        """
        self.hooked = hooked
        self.site: str | None = None
        """Where its input is read; None: the head is unknown, and the model's own forward makes all logits."""
        self._module = hooked.lm.get_output_embeddings()
        self._form: Callable[[Tensor], Tensor] = lambda logits: logits
        ids = ids[:1, :PROBE_TOKENS]
        paths = [path for path, module in hooked.lm.named_modules() if module is self._module and path]
        reader = ReadAction([], stop=False)
        try:
            output = hooked.run(ids, {f"{path}:input": reader for path in paths[:1]})
        except SaehookError:  # the head runs in a way of its own
            output, reader.value = hooked.run(ids, {}), None
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
            raise ArgumentError(
                "this model gives no logits for each token, so there is no loss to measure: it has no language-model head. Load "
                "it with AutoModelForCausalLM, or HookedModel.from_pretrained(path)."
            )
        if reader.value is None or reader.value.shape[:-1] != ids.shape:
            return
        product = self._module(reader.value)
        for form in _forms(hooked.lm):
            if _same(form(product), logits):
                self._form, self.site = form, f"{paths[0]}:input"
                return

    def run(self, ids: Tensor, actions: Mapping[str, Action], prefix: Follower | None = None) -> Tensor:
        """What the head gets for ids [rows, length], [rows, length, width] in the model's dtype; of an unknown head the
        logits, [rows, length, vocabulary]."""
        if self.site is None:
            return self.hooked.run(ids, actions, prefix=prefix).logits
        reader = ReadAction([], stop=True)
        last = ChainAction([actions[self.site], reader]) if self.site in actions else reader
        self.hooked.run(ids, {**actions, self.site: last}, prefix=prefix)
        assert reader.value is not None
        return reader.value

    def logits(self, states: Tensor) -> Tensor:
        """[n, vocabulary] in the model's dtype, of what `run` gave for n tokens."""
        return states if self.site is None else self._form(self._module(states))

    def scores(
        self, clean: Tensor, others: Sequence[Tensor], targets: Tensor, losses_only: Collection[int] = ()
    ) -> list[Scores]:
        """Of each run in `others`, [n, width] each, against the clean one; `targets` [n] are the next tokens. The clean run
        itself may be among them. Of those numbered in `losses_only` nothing but `ce` is computed; the rest is NaN."""
        vocabulary = self.hooked.lm.get_input_embeddings().num_embeddings
        step = max(1, min(CHUNK_TOKENS, CHUNK_LOGITS // vocabulary))
        # Made beforehand: small results made between large temporaries would leave holes in the heap, gigabytes in all.
        found = [Scores(*clean.new_full((3, len(targets)), torch.nan, dtype=torch.float32)) for _ in others]
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            reference = _Clean(self.logits(clean[rows]))
            for i, (scores, states) in enumerate(zip(found, others, strict=True)):
                logits = reference.logits if states is clean else self.logits(states[rows])
                part = Scores(*(each[rows] for each in scores))
                reference.score(logits, targets[rows], part, compare=i not in losses_only)
        return found


class _Clean:
    """The logits [n, vocabulary] that others are compared with."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.p = logits.float().softmax(-1)
        self.log_sum = logits.float().logsumexp(-1)
        self.best = logits.argmax(-1, keepdim=True)
        absent = self.p == 0
        self.absent = absent if absent.any() else None

    def score(self, logits: Tensor, targets: Tensor, into: Scores, *, compare: bool) -> None:
        """A run with `logits`, in parts so small that a CPU reads each from memory once.

        KL = Σ p (log p - log q) = Σ p (z_p - z_q) + log Σ exp z_q - log Σ exp z_p, from logits z.
        """
        step = max(1, BLOCK_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        for start in range(0, len(logits), step):
            rows = slice(start, start + step)
            z = logits[rows].float()
            top = z.amax(-1, keepdim=True)
            log_sum = (top + (z - top).exp_().sum(-1, keepdim=True).log_())[:, 0]
            into.ce[rows] = log_sum - z.gather(1, targets[rows, None])[:, 0]
            if not compare:
                continue
            into.agrees[rows] = (z.gather(1, self.best[rows]) == top)[:, 0].float()
            change = self.logits[rows].float() - z
            if self.absent is not None:  # 0 · log 0 = 0
                change.masked_fill_(self.absent[rows], 0.0)
            into.kl[rows] = torch.linalg.vecdot(self.p[rows], change) + (log_sum - self.log_sum[rows])


def _same(found: Tensor, own: Tensor) -> bool:
    """Equal but for what another order of sums makes in float32; of half-precision logits, equal."""
    if found.shape != own.shape:
        return False
    found, own = found.float(), own.float()
    largest = own.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    return torch.allclose(found, own, rtol=0, atol=4 * torch.finfo(torch.float32).eps * largest, equal_nan=True)
