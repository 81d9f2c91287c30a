"""What a model takes as input, and whether it predicts next tokens. Images are a batch of one position for each token of the
first layer, most of them patches."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from saehook.errors import ArgumentError
from saehook.tokenization import Batch

_tokens: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], int]] = weakref.WeakKeyDictionary()
"""Tokens of an image by its shape, of each model."""


def takes_text(lm: Any) -> bool:
    """Whether a model's input is token ids; `pixel_values` of a vision model are none."""
    return getattr(lm, "main_input_name", "input_ids") == "input_ids"


def predicts_next_tokens(lm: Any) -> bool:
    """Whether a model has a causal head; one that does not come from transformers is taken to."""
    return getattr(lm, "can_generate", lambda: True)()


def image_batch(lm: Any, x: Any, device: torch.device) -> Batch:
    """Images as a batch: `pixel_values`, and an id of 0 for each token, none of which is special.

    Args:
        x: [channels, height, width], or [n, channels, height, width], float, as the model's image processor gives them.

    Raises:
        ArgumentError: another shape or dtype.
    """
    if not isinstance(x, Tensor) or x.ndim not in (3, 4) or not x.is_floating_point() or not len(x):
        what = f"a tensor {tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ArgumentError(
            f"{type(lm).__name__} takes images, and got {what}. Give [channels, height, width] or [n, channels, height, "
            "width], float, as its image processor makes them (`pixel_values`)."
        )
    pixels = (x[None] if x.ndim == 3 else x).to(device, lm.dtype)
    known = _tokens.setdefault(lm, {})
    shape = tuple(pixels.shape[1:])
    if shape not in known:
        with torch.no_grad():
            known[shape] = lm(pixel_values=pixels[:1], output_hidden_states=True).hidden_states[0].shape[1]
    ids = torch.zeros(len(pixels), known[shape], dtype=torch.int64)
    return Batch(ids, torch.ones_like(ids), x.ndim == 3, inputs={"pixel_values": pixels})
