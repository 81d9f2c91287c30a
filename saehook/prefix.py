"""The layers below a site, run once for many runs of one batch.

What a run writes at a site changes no layer before it. So a clean run records what such a layer gives, and later runs of the
same tokens put that in place of all layers up to it: the rest of the model computes on the same bits in the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor


class Follower(Protocol):
    """What goes along with a run of the model, layer by layer."""

    def follow(self, layers: Sequence[Any]) -> None:
        """Called in the body of an edit with nnsight's envoys of all layers."""
        ...


class Prefix:
    """Records what layers give in a clean run."""

    def __init__(self, depths: Iterable[int]) -> None:
        """`depths`: how many layers the later runs will leave out; see `sites.layers_before`."""
        self.depths = sorted(set(depths) - {0})
        self._kept: dict[int, tuple[Any, int]] = {}

    def follow(self, layers: Sequence[Any]) -> None:
        """Record while the model runs."""
        for depth in self.depths:
            value = layers[depth - 1].output
            self._kept[depth] = value, _version(value)

    def skipping(self, depth: int) -> Skip | None:
        """For a run that leaves out so many layers; None, a whole run, for 0."""
        if depth == 0:
            return None
        value, version = self._kept[depth]
        assert _version(value) == version, "a run wrote into what the clean run gave"
        return Skip(depth, value)


class Skip:
    """Leaves out the first layers: each gives what the last of them gave in the clean run."""

    def __init__(self, depth: int, value: Any) -> None:
        self.depth, self.value = depth, value

    def follow(self, layers: Sequence[Any]) -> None:
        """Leave out the layers while the model runs."""
        for layer in layers[: self.depth]:
            layer.skip(self.value)


def _version(value: Any) -> int:
    """How often an activation was written in place."""
    return (value if isinstance(value, Tensor) else value[0])._version
