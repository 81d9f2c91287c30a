"""What attribution is of: one number that is read off the logits of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from saehook.errors import ArgumentError

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs


@dataclass(frozen=True)
class Logit:
    """The logit of a next token, or how far it is above that of another."""

    token: int | str
    """An id, or a text that is a single token."""
    minus: int | str | None = None
    """The other token."""
    position: int = -1
    """The token behind which it is predicted, counted among the row's own; -1 is the last."""


@dataclass(frozen=True)
class LogProb:
    """The log-probability of a next token, in nats."""

    token: int | str
    """An id, or a text that is a single token."""
    position: int = -1
    """As in `Logit`."""


@dataclass(frozen=True)
class Loss:
    """Mean cross-entropy of the row's next tokens in nats, as `hooked.loss` gives it. A latent that helps has an effect
    below 0."""


Function = Callable[[Tensor], Tensor]
Metric = Logit | LogProb | Loss | Function
"""A callable gets the logits of one row, [S, vocab] without padding, at least float32, and returns one number."""


def function_of(metric: Metric, hooked: HookedSAEs, ids: Tensor) -> Function:
    """The metric of one row as a function of its logits."""
    match metric:
        case Logit(token=token, minus=None, position=position):
            i, at = _token_id(token, hooked), _position(position, ids)
            return lambda logits: logits[at, i]
        case Logit(token=token, minus=minus, position=position):
            assert minus is not None
            i, j, at = _token_id(token, hooked), _token_id(minus, hooked), _position(position, ids)
            return lambda logits: logits[at, i] - logits[at, j]
        case LogProb(token=token, position=position):
            i, at = _token_id(token, hooked), _position(position, ids)
            return lambda logits: logits[at].log_softmax(-1)[i]
        case Loss():
            if len(ids) < 2:
                raise ArgumentError(
                    "a single token predicts nothing, so there is no loss. Give at least two tokens, or a Logit."
                )
            return lambda logits: F.cross_entropy(logits[:-1], ids[1:].to(logits.device))
        case _ if callable(metric) and not isinstance(metric, type):
            return metric
    raise ArgumentError(
        f"{metric!r} is no metric; expected Logit(' token'), LogProb(' token'), Loss(), or a function of a row's logits "
        "[S, vocab]."
    )


def _token_id(token: int | str, hooked: HookedSAEs) -> int:
    vocab = hooked.lm.get_input_embeddings().num_embeddings
    if isinstance(token, str):
        ids = hooked.tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(repr(hooked.tokenizer.decode([i])) for i in ids)
            raise ArgumentError(
                f"{token!r} is {len(ids)} tokens ({pieces}); a metric names one. Give a single one, or its id."
            )
        token = ids[0]
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
        raise ArgumentError(f"{token!r} is no token of the metric; a text, or an id in 0..{vocab - 1} is expected.")
    return token


def _position(position: int, ids: Tensor) -> int:
    n = len(ids)
    if isinstance(position, bool) or not isinstance(position, int) or not -n <= position < n:
        raise ArgumentError(
            f"position {position!r} of the metric is outside the {n} tokens of the row: expected {-n}..{n - 1}."
        )
    return position % n


def values_of(functions: Sequence[Function], logits: Sequence[Tensor]) -> Tensor:
    """The metric of each row, [rows].

    Raises:
        ArgumentError: it is no number, or not finite.
    """
    values = []
    for function, row in zip(functions, logits, strict=True):
        value = function(row.to(torch.promote_types(row.dtype, torch.float32)))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            what = f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise ArgumentError(f"the metric gave {what}; a tensor with one floating-point number is expected.")
        values.append(value.reshape(()))
    result = torch.stack(values)
    if not result.isfinite().all():
        raise ArgumentError(f"the metric gave {result[~result.isfinite()][0].item()}; a finite number is expected.")
    return result
