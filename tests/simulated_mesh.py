"""One process of a mesh of any size whose others do not exist: what it sends is counted by `Mesh`, and nothing arrives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from saehook.batches import InputFacts
from saehook.config import TrainConfig
from saehook.distributed.mesh import Mesh
from saehook.distributed.shards import Shards
from saehook.sae_run import SAERun


class SimulatedMesh(Mesh):
    """The first process; the others are taken to have what it has."""

    def __init__(self, data: int, latent: int) -> None:
        self.device = torch.device("cpu")
        self.sizes = {"data": data, "latent": latent, "all": data * latent}
        self.places = {"data": 0, "latent": 0, "all": 0}
        self.rank, self.sent = 0, Counter()

    def _all_reduce(self, x: Tensor, op: Any, axis: str) -> None:
        pass

    def _all_gather(self, found: Tensor, x: Tensor, axis: str) -> None:
        found.copy_(x.expand_as(found))

    def _swap(self, found: Tensor, x: Tensor, rank: int) -> None:
        found.copy_(x)


def simulated_step(config: TrainConfig, d_in: int, data: int, latent: int) -> tuple[Counter[str], int]:
    """Two steps of the training code on such a mesh: what the second one sends, and the bytes of parameters, moments and
    counters of one device."""
    shards = Shards(SimulatedMesh(data, latent))
    x = torch.randn(config.resolved_batch_tokens, d_in, generator=torch.Generator().manual_seed(0))
    run = SAERun(config, "run", InputFacts.measure(x, config.site), devices=shards)
    run.step({config.site: x})
    shards.mesh.sent.clear()
    run.step({config.site: x})
    held = sum(tensor.nbytes for tensor in run.state()[0].values())
    return Counter(shards.mesh.sent), held
