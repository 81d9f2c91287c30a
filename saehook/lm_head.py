"""Losses from what a language model gives its head, without ever holding tokens × vocabulary.

The model runs up to the input of its head. The head is then applied to some tokens and a stretch of the vocabulary at a time,
for all runs that are scored together, and what losses need of it is summed on the way: a CPU reads each stretch of the matrix
from memory once, and logits never leave its cache. What follows the matrix is one of a few forms (`_forms`); on the first
text it is compared with the model's own logits, and a head that gives others is left alone: then the model's own forward makes
all logits of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saehook.editing import Action, ChainAction, ReadAction
from saehook.errors import ArgumentError, SaehookError
from saehook.hooked_saes import HookedSAEs
from saehook.prefix import Follower

PROBE_TOKENS = 32
CHUNK_TOKENS = 1024
"""Tokens that are scored together, at most; the product of more is no faster."""
BLOCK_LOGITS = {"cpu": 2**21}
"""Logits of one run that are held at a time; a few tensors of this size, in float32, are there together. On a CPU they stay in
its cache, other devices want more at once."""
LARGE_BLOCK_LOGITS = 2**24
"""The same on other devices, and where the head cannot be taken apart and makes logits of the whole vocabulary."""


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
        self.matrix: tuple[Tensor, Tensor | None] | None = None
        """Weight [vocabulary, width] and bias, of which stretches can be multiplied; None: the head is called whole."""
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
        self.vocabulary = logits.shape[-1]
        if reader.value is None or reader.value.shape[:-1] != ids.shape:
            return
        states = reader.value.flatten(0, 1)
        product = self._module(states)
        for form in _forms(hooked.lm):
            if _same(form(product), logits.flatten(0, 1)):
                self._form, self.site = form, f"{paths[0]}:input"
                self.matrix = self._parts_of(states, product)
                return

    def _parts_of(self, states: Tensor, product: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias where they alone make the product: a quantised, offloaded or wrapped head is left whole."""
        if not isinstance(self._module, nn.Linear):
            return None
        weight, bias = self._module.weight, self._module.bias
        if weight.shape != (product.shape[-1], states.shape[-1]) or weight.dtype != states.dtype:
            return None
        if weight.device != states.device or not _same(F.linear(states, weight, bias), product):
            return None
        return weight, bias

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

    def logits(self, states: Tensor, columns: slice = slice(None)) -> Tensor:
        """[n, vocabulary], or the columns of it, in the model's dtype, of what `run` gave for n tokens."""
        if self.site is None:
            return states[:, columns]
        if self.matrix is None:
            return self._form(self._module(states))[:, columns]
        weight, bias = self.matrix
        return self._form(F.linear(states, weight[columns], None if bias is None else bias[columns]))

    def scores(
        self, clean: Tensor, others: Sequence[Tensor], targets: Tensor, losses_only: Collection[int] = ()
    ) -> list[Scores]:
        """Of the clean run, then of each of `others`, against it: [n, width] each, for the next tokens `targets` [n]. Of the
        others numbered in `losses_only` nothing but `ce` is computed; the rest is NaN."""
        whole = self.site is not None and self.matrix is None
        held = LARGE_BLOCK_LOGITS if whole else BLOCK_LOGITS.get(clean.device.type, LARGE_BLOCK_LOGITS)
        most = max(1, min(CHUNK_TOKENS, held // self.vocabulary if whole else held))
        size = max(1, -(-len(targets) // max(1, -(-len(targets) // most))))  # parts of one size
        width = self.vocabulary if whole else max(1, held // size)
        # Made beforehand: small results made between large temporaries would leave holes in the heap, gigabytes in all.
        found = [Scores(*clean.new_full((3, len(targets)), torch.nan, dtype=torch.float32)) for _ in (clean, *others)]
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            reference = _Clean(targets[rows])
            runs = [_Run(targets[rows]) if i in losses_only else _Compared(reference) for i in range(len(others))]
            for first in range(0, self.vocabulary, width):
                columns = slice(first, first + width)
                for run, states in zip([reference, *runs], [clean, *others], strict=True):
                    run.add(self.logits(states[rows], columns).float(), first)
            for run, scores in zip([reference, *runs], found, strict=True):
                for into, value in zip(scores, run.scores(), strict=False):
                    into[rows] = value
        return found


class _Run:
    """Sums over the vocabulary, stretch by stretch, of how a run predicts n tokens; float32, the results float64."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets
        self.top = torch.full(targets.shape, torch.finfo(torch.float32).min, device=targets.device)
        """The largest logit so far, [n]."""
        self.sum = torch.zeros_like(self.top)
        """Σ exp(z - top), [n]."""
        self.target = torch.zeros_like(self.top)
        """The logit of the next token, [n]."""

    def add(self, z: Tensor, first: int) -> Tensor:
        """Add the logits z [n, width] of the tokens from `first` on; exp(z - top) of them."""
        top = torch.maximum(self.top, z.amax(-1))
        exp = (z - top[:, None]).exp_()
        self.sum = self.sum * (self.top - top).exp() + exp.sum(-1)
        self.top = top
        place = self.targets - first
        inside = (place >= 0) & (place < z.shape[1])
        self.target = torch.where(inside, _at(z, place.clamp(0, z.shape[1] - 1)), self.target)
        return exp

    def log_sum(self) -> Tensor:
        """log Σ exp z, [n] float64."""
        return self.top.double() + self.sum.double().log()

    def scores(self) -> tuple[Tensor, ...]:
        """What is known of `Scores`, in its order."""
        return (self.log_sum() - self.target,)


class _Clean(_Run):
    """The run that others are compared with: what they need of its last stretch is kept."""

    z: Tensor
    exp: Tensor
    best: Tensor
    """Its likeliest token in the stretch, [n]."""
    is_best: Tensor
    """Whether none before was likelier, [n]."""
    shrinks: Tensor
    """What sums over exp(z - top) were multiplied with, [n]."""

    def add(self, z: Tensor, first: int) -> Tensor:
        before = self.top
        self.z, self.exp, self.best = z, super().add(z, first), z.argmax(-1)
        self.is_best, self.shrinks = self.top > before, (before - self.top).exp()
        return self.exp

    def scores(self) -> tuple[Tensor, ...]:
        return *super().scores(), torch.zeros_like(self.top), torch.ones_like(self.top)


class _Compared(_Run):
    """A run against the clean one, which is always one stretch ahead.

    KL = Σ p (log p - log q) = Σ p (z_p - z_q) + log Σ exp z_q - log Σ exp z_p, from logits z.
    """

    def __init__(self, clean: _Clean) -> None:
        super().__init__(clean.targets)
        self.clean = clean
        self.change = torch.zeros_like(self.top)
        """Σ exp(z_p - top_p) (z_p - z_q), [n]."""
        self.at_best = torch.zeros_like(self.top)
        """The logit of the clean run's likeliest token, [n]."""

    def add(self, z: Tensor, first: int) -> Tensor:
        clean = self.clean
        change = clean.z - z
        part = torch.linalg.vecdot(clean.exp, change)
        if not part.isfinite().all():  # 0 · log 0 = 0
            part = torch.linalg.vecdot(clean.exp, change.masked_fill_(clean.exp == 0, 0.0))
        self.change = self.change * clean.shrinks + part
        self.at_best = torch.where(clean.is_best, _at(z, clean.best), self.at_best)
        return super().add(z, first)

    def scores(self) -> tuple[Tensor, ...]:
        kl = self.change.double() / self.clean.sum.double() + (self.log_sum() - self.clean.log_sum())
        return *super().scores(), kl, (self.at_best == self.top).float()


def _at(z: Tensor, columns: Tensor) -> Tensor:
    """z [n, width] at one column of each row, [n]."""
    return z.gather(1, columns[:, None])[:, 0]


def _same(found: Tensor, own: Tensor) -> bool:
    """Equal but for what another order of sums makes in float32; of half-precision logits, equal."""
    if found.shape != own.shape:
        return False
    found, own = found.float(), own.float()
    largest = own.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    return torch.allclose(found, own, rtol=0, atol=4 * torch.finfo(torch.float32).eps * largest, equal_nan=True)
