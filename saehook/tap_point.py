"""What stands at a site: a module that is called with the activation and gives back what shall go on.

nnsight calls it from an edit of the model (`hooked_model.py`); nothing here knows of nnsight but that an envoy has the value of
its module's `input` and `output`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from saehook.editing import changed, changes
from saehook.errors import SiteError
from saehook.sae import SAE
from saehook.sites import Site


class _Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class TapPoint(nn.Module):
    """What nnsight calls at a site. With an SAE, its children `pre_acts`, `latents`, `reconstruction` and `error` are
    sites."""

    def __init__(self, sae: SAE | None) -> None:
        super().__init__()
        self.sae = sae
        self.pre_acts, self.latents, self.reconstruction, self.error = (_Identity() for _ in range(4))
        self.action: Callable[[Tensor], Tensor] | None = None
        self.asked: Callable[[], bool] = lambda: True
        """Whether a trace wants anything of the children in this forward pass."""
        self.shape: Callable[[], torch.Size | None] = lambda: None
        """(rows, tokens) of this forward pass."""
        self.elsewhere = False
        """Whether the SAE is a transcoder that writes at another site."""
        self.changes: tuple[Tensor, Tensor] | None = None
        """Then, what a trace makes of its reconstruction in this forward pass (`editing.changes`)."""
        self.transcoders: list[TapPoint] = []
        """Those that write here. In a list, so that they are no children of this module."""

    def forward(self, x: Tensor) -> Tensor:
        if self.action is not None:
            return self.action(x)
        shape = self.shape()
        if shape is not None and x.shape[:-1] == (shape.numel(),):  # all rows as one list of tokens
            return self._traced(x.reshape(*shape, -1)).reshape(x.shape)
        return self._traced(x)

    def _traced(self, x: Tensor) -> Tensor:
        """x' as a trace leaves it; x itself where nobody wrote."""
        for transcoder in self.transcoders:
            if transcoder.changes is None:
                raise SiteError(
                    "the model is to write what a transcoder gives, and has not come to the site that it reads."
                )
            found, transcoder.changes = transcoder.changes, None
            x = changed(x, *found, transcoder.error)
        if self.sae is None:
            return x
        if not self.elsewhere and not self.asked():
            # Nothing is computed, but nnsight tells generation steps apart by counting visits.
            for child in (self.pre_acts, self.latents, self.reconstruction, self.error):
                child(x)
            return x
        found = changes(x, self.sae, self.pre_acts, self.latents, self.reconstruction)
        if self.elsewhere:
            self.changes = found
            return x
        return changed(x, *found, self.error)


def write_output(parent: Any, envoy: Any, site: Site) -> None:
    value = parent.output
    x = _activation(value, site)
    new = envoy(x, hook=True)
    if new is not x:
        parent.output = _with_activation(value, new)


def _activation(value: Any, site: Site) -> Tensor:
    """The tensor that a site means: the value itself, or its first element."""
    first = value
    if isinstance(value, ModelOutput) or (isinstance(value, (tuple, list)) and value):
        first = value[0]
    if not isinstance(first, Tensor):
        raise SiteError(f"the value at {site.name} is a {type(value).__name__} and no activation. Choose another site.")
    return first


def _with_activation(value: Any, new: Tensor) -> Any:
    """`value` with another tensor in the place that `_activation` reads."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, ModelOutput):
        changed = copy.copy(value)
        changed[next(iter(changed))] = new
        return changed
    return (new, *value[1:])


def write_input(parent: Any, envoy: Any, site: Site) -> None:
    x = _activation(parent.input, site)
    if not site.in_place:
        new = envoy(x, hook=True)
        if new is not x:
            parent.input = new
        return
    # The residual stream goes on in the same tensor, so it is changed in place; autograd and a trace's block, which may
    # have saved it, need the old one.
    keep = torch.is_grad_enabled() or envoy._module.action is None
    new = envoy(x.clone() if keep else x, hook=True)
    if new is not x:
        x.copy_(new)
