"""What some latents were at every position of a run so far, and whether conditions on them hold.

A track is cut back to the length of the KV cache at every pass, so tokens that the model takes back (rejected candidates of
assisted decoding) are forgotten, and a run without cache finds the same as one with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from saehook.conditions import And, Comparison, Condition, Hold, LatentValue, Not, Or
from saehook.errors import ArgumentError, SiteError
from saehook.positions import TokenView


class LatentTrack:
    """z of some latents of one SAE as x reaches it, 0 for tokens outside the mask."""

    def __init__(self, name: str, latents: Iterable[int]) -> None:
        """`name`: of the attached SAE."""
        self.name = name
        self.latents = sorted(set(latents))
        self.z: Tensor | None = None
        """[rows, positions, len(latents)] float32."""
        self.first = 0
        """Positions before this one were in a cache that the run began with."""
        self.view: TokenView | None = None

    def note(self, z: Tensor, mask: Tensor, view: TokenView) -> None:
        """Keep the latents of one pass: `z` [rows, n, len(latents)], `mask` [rows, n]."""
        z = torch.where(mask[..., None], z.detach().float(), 0.0)
        if self.z is None:
            self.first = view.past
            self.z = z.new_zeros(len(z), view.past, len(self.latents))
        self.z = torch.cat([self.z[:, : view.past], z], 1)
        self.view = view

    def of(self, latent: int, view: TokenView, *, since: int | None = None, until: int = 0) -> Tensor:
        """z of one latent at all positions up to the end of this pass, [rows, positions].

        Raises:
            SiteError: the model has not come by the SAE in this pass. ArgumentError: positions from `since` on or before
                `until` are asked for, and lie in a cache that the run began with, or in a later pass.
        """
        if self.z is None or self.view is not view:
            raise SiteError(
                f"a condition asks for latent {latent} at {self.name}, where the model comes by only after the edit's site. "
                "Use a latent of the same or an earlier site."
            )
        if since is not None and since < self.first:
            raise ArgumentError(
                f"the run began with a KV cache of {self.first} tokens, so what latent {latent} at {self.name} was there is "
                "not known. Give the whole input without the cache, or use a condition on the token itself."
            )
        if self.z.shape[1] < until:
            raise ArgumentError(
                f"the input comes in pieces, so what latent {latent} at {self.name} is in those behind is not known yet. "
                "Generate without prefill_chunk_size."
            )
        return self.z[..., self.latents.index(latent)]


class Conditions:
    """Conditions of one run, by what its tracks have seen."""

    def __init__(self, tracks: Mapping[str | None, LatentTrack]) -> None:
        """`tracks`: by the site as the comparisons write it."""
        self.tracks = tracks

    def holds(self, condition: Condition, view: TokenView) -> Tensor:
        """[rows, n] bool: at which tokens of this pass the condition is true."""
        return self._from(condition, view, view.past)

    def _from(self, condition: Condition, view: TokenView, start: int) -> Tensor:
        """[rows, stop - start] bool, of the positions from `start` to the end of this pass."""
        match condition:
            case Comparison(op, left, right):
                value = self._value(left, view, start)
                return {"gt": value > right, "ge": value >= right, "lt": value < right, "le": value <= right}[op]
            case Not(of):
                return ~self._from(of, view, start)
            case And(of):
                return torch.stack([self._from(part, view, start).cpu() for part in of]).all(0)
            case Or(of):
                return torch.stack([self._from(part, view, start).cpu() for part in of]).any(0)
            case Hold(of, tokens):
                tokens = min(tokens, view.past + view.ids.shape[1])  # of a larger number only the memory would be more
                begin = max(0, start - tokens)
                true = self._from(of, view, begin)
                true = true & view.attended_since(begin).to(true.device)  # whatever it says of the 0 of padding
                padded = torch.nn.functional.pad(true.float(), (tokens - (start - begin), 0))
                return torch.nn.functional.max_pool1d(padded, tokens + 1, 1) > 0
        raise AssertionError(condition)

    def _value(self, left: LatentValue, view: TokenView, start: int) -> Tensor:
        """What is compared, [rows, stop - start] float32."""
        track = self.tracks[left.site]
        if left.over == "here":
            return track.of(left.latent, view, since=start)[:, start:]
        whole = left.over == "prompt_max"
        z = track.of(left.latent, view, since=0, until=view.run.length if whole else 0)
        match left.over:
            case "last":
                return torch.nn.functional.pad(z, (1, 0))[:, start:-1]
            case "so_far_max":
                return z.cummax(1).values[:, start:]
            case "prompt_max":
                return z[:, : view.run.length].amax(1, keepdim=True).expand(-1, z.shape[1] - start)
        assert left.decay is not None
        places = torch.arange(z.shape[1], device=z.device)
        distance = places[start:, None] - places
        weight = torch.where(distance >= 0, left.decay ** distance.clamp_min(0).float(), 0.0)
        return (z[:, None] * weight).amax(-1)
