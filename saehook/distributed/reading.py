"""Activations for all devices from one pass of the language model, each forward pass made by one of them."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from saehook.distributed.mesh import Mesh
from saehook.harvest import TextStream, activations_of, tokens_per_forward
from saehook.hooked_model import HookedModel


class SharedPass(Iterator[dict[str, Tensor]]):
    """What `harvest.activations_of` gives, in its order: of every n forward passes each of n processes makes one.

    All read the same text; each of its windows goes through the language model once, on one process, and what comes out
    to all. So a run goes on with another number of processes where it was.
    """

    def __init__(
        self, model: HookedModel, sites: Sequence[str], text: TextStream, mesh: Mesh, skip_first_tokens: int = 0
    ) -> None:
        self.model, self.sites, self.text, self.mesh = model, list(sites), text, mesh
        self.skip_first_tokens = skip_first_tokens
        self._place = copy.deepcopy(text.state())
        """In the text, behind what has been given out."""
        self._ready: deque[tuple[dict[str, Any], dict[str, Tensor]]] = deque()
        self._dtype: torch.dtype | None = None

    def __next__(self) -> dict[str, Tensor]:
        if not self._ready:
            self._read()
        if not self._ready:
            raise StopIteration
        self._place, chunk = self._ready.popleft()
        return chunk

    def _read(self) -> None:
        """One forward pass on each process that finds text left, and an exchange."""
        rows = max(1, tokens_per_forward(self.model.device) // self.text.window)
        places, mine = [], []
        for rank in range(self.mesh.sizes["all"]):
            windows = list(islice(self.text, rows))
            if not windows:
                break
            places.append(copy.deepcopy(self.text.state()))
            if rank == self.mesh.rank:
                mine = windows
        if not places:
            return
        found = next(activations_of(self.model, self.sites, iter(mine), self.skip_first_tokens), None)
        if self._dtype is None:
            self._dtype = self.mesh.from_main(None if found is None else found[self.sites[0]].dtype)
        chunks: list[dict[str, Tensor]] = [{} for _ in places]
        for site in self.sites:
            x = found[site].to(self._dtype) if found is not None else self._nothing(site)
            for chunk, part in zip(chunks, self.mesh.gather_some(x, "all", "x"), strict=False):
                chunk[site] = part
        self._ready.extend(zip(places, chunks, strict=True))

    def _nothing(self, site: str) -> Tensor:
        width = self.model.width(self.model.sites(site)[0])
        return torch.empty(0, width, dtype=self._dtype, device=self.model.device)

    def state(self) -> dict[str, Any]:
        """The place in the text, as `TextStream.state`."""
        return self._place

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        self.text.load_state(state)
        self._place = copy.deepcopy(self.text.state())
        self._ready.clear()
