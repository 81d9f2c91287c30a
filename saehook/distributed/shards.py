"""A training step on a mesh: what `devices.OneDevice` answers for one device, answered by collectives.

Each process has the latents of its place on the axis `latent`, neighbours and as many as the others or one more, and of each
batch the tokens of its place on the axis `data`. All are given the whole batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from saehook import kernels
from saehook.config import Activation, TopK, TrainConfig
from saehook.devices import WHOLE_PARAMETERS, OneDevice
from saehook.distributed import selection, state
from saehook.distributed.collectives import add, read
from saehook.distributed.mesh import Mesh, nearest_sizes, shares, stripes
from saehook.distributed.sharded_sae import ShardedSAE
from saehook.errors import ArgumentError, TrainingError
from saehook.initial_rows import indices
from saehook.kernels import running
from saehook.methods import of_size
from saehook.sae import SAE

CHECKED_STEPS = 20
"""So often it is checked that all processes have been given the same batch."""
LATENT_AXES = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "threshold": 0}
"""The dimension of an SAE's parameters that goes over latents."""


class Shards(OneDevice):
    """One of the devices of a mesh."""

    alone = False

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.is_main = mesh.rank == 0
        self._n_tokens = 0
        self._batches = 0
        self._known_indices: dict[tuple[int, ...], Tensor] = {}

    def check(self, configs: Sequence[TrainConfig]) -> None:
        latent, data = self.mesh.sizes["latent"], self.mesh.sizes["data"]
        for config in configs:
            if config.d_sae < 2 * latent:
                raise ArgumentError(
                    f"d_sae = {config.d_sae} latents cannot be shared by {latent} devices; each needs two at least. Use a mesh "
                    f"with latent={max(1, config.d_sae // 2)} or less, or d_sae = {nearest_sizes(2 * latent, latent)[1]}."
                )
            if config.resolved_batch_tokens < data:
                raise ArgumentError(
                    f"a batch of {config.resolved_batch_tokens} tokens cannot be split over data={data} devices. Give "
                    "--batch-tokens a larger number."
                )
            if config.kl_tokens:
                raise ArgumentError("kl_tokens trains through the language model on one device only. Leave it out.")

    # --- what is where -----------------------------------------------------------------------------------------------

    def latents(self, ends: Sequence[int]) -> tuple[slice, ...]:
        return stripes(ends, self.mesh.sizes["latent"], self.mesh.places["latent"])

    def widest(self, d_sae: int) -> int:
        """The most latents that a device has."""
        return -(-d_sae // self.mesh.sizes["latent"])

    def tokens(self, batch: Tensor) -> Tensor:
        if self._batches % CHECKED_STEPS == 0:
            self._check_same(batch)
        self._batches += 1
        self._n_tokens = len(batch)
        return batch[shares(len(batch), self.mesh.sizes["data"])[self.mesh.places["data"]]]

    def _check_same(self, batch: Tensor) -> None:
        """Raises TrainingError where a process was given another batch: what it would learn is of no SAE."""
        rows = batch.contiguous().view(selection.INTEGERS[batch.element_size()]).sum(1, dtype=torch.int64)
        place = torch.arange(1, len(rows) + 1, device=rows.device)
        mark = torch.stack([(rows * place).sum(), torch.tensor(len(rows), device=rows.device)])
        both = self.mesh.reduce_(torch.stack([mark, -mark]), "all", "check", dist.ReduceOp.MAX)
        if not torch.equal(both[0], -both[1]):
            raise TrainingError(
                "the processes of this run were given different activations, so they would train different SAEs. Give all the "
                "same text, language model and seed, on the same kind of device."
            )

    def number(self, here: int) -> int:
        return self._n_tokens

    def part_of(self, sae: SAE, ends: Sequence[int]) -> SAE:
        rows = self.latents(ends)
        d_sae = sum(some.stop - some.start for some in rows)
        part = SAE(of_size(sae.config, d_sae), site=sae.site, site_out=sae.site_out, device="meta")
        part.register_parameter("threshold", None)
        for name, parameter in sae.named_parameters():
            axis = LATENT_AXES.get(name)
            value = parameter.detach()
            if axis is not None and value.ndim > axis:
                value = torch.cat([value.narrow(axis, some.start, some.stop - some.start) for some in rows], axis)
            setattr(part, name, nn.Parameter(value))
        return part

    def finished(self, sae: SAE, activation: Activation, ends: Sequence[int]) -> SAE:
        config = dataclasses.replace(sae.config, d_sae=ends[-1], activation=activation)
        if self.mesh.sizes["latent"] == 1:
            return sae
        return ShardedSAE.of_parts(sae, self.mesh, config, ends)

    # --- one step, forward -------------------------------------------------------------------------------------------

    def topk(
        self, pre_acts: Tensor, k: int, d_sae: int, widest: int | None = None, *, descending: bool = False
    ) -> kernels.Selection:
        return selection.topk(pre_acts, k, self.mesh, d_sae, self.widest(d_sae) if widest is None else widest)

    def encode_topk(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        center: Tensor,
        k: int,
        d_sae: int,
        scratch: kernels.Scratch | None,
        *,
        descending: bool = False,
    ) -> tuple[Tensor, kernels.Selection]:
        # All take the same way: the shards differ by a latent.
        widest = self.widest(d_sae)
        if not (kernels.is_streamed(W_enc) or running.too_many(len(x), widest, x.device)):
            pick = functools.partial(self.topk, k=k, d_sae=d_sae)
            return kernels.encode(x, W_enc, b_enc, center, pick, k=k, scratch=scratch)
        with torch.no_grad():
            centred = x - center
            largest = kernels.largest_of_each_token(centred, W_enc, b_enc, min(k, widest))
            tokens, places = selection.kept_of(largest, k, self.mesh, d_sae, widest)
            pairs = kernels.Selection(tokens, largest.latents[tokens, places], len(x), len(b_enc), order="token")
        return kernels.selected(largest.values[tokens, places], centred, W_enc, b_enc, center, pairs, scratch), pairs

    def first_of_each_token(
        self, selected: kernels.Selection, values: Tensor, k: int, of: int
    ) -> tuple[kernels.Selection, Tensor]:
        some = selection.largest_pairs(selected, values.detach(), k, of, self.mesh)
        return selected.subset(some), values[some]

    def batch_topk(self, pre_acts: Tensor, k: int, ends: Sequence[int]) -> kernels.Selection:
        return selection.batch_topk(pre_acts, k, self.mesh, self._indices(ends), ends[-1])

    def kept_of_batch(self, found: kernels.Pairs, k: int, ends: Sequence[int], n_tokens: int) -> Tensor:
        return selection.kept_of_batch(found, k, self.mesh, self._indices(ends), ends[-1], n_tokens)

    def _indices(self, ends: Sequence[int]) -> Tensor:
        """Which of all latents are here."""
        known = tuple(ends)
        if known not in self._known_indices:
            self._known_indices[known] = indices(self.latents(ends)).to(self.mesh.device)
        return self._known_indices[known]

    def read_by_all(self, parameter: Tensor) -> Tensor:
        return read(parameter, self.mesh, "latent", "b_dec")

    def add_latents(self, part: Tensor) -> Tensor:
        return add(part, self.mesh, "latent", "x_hat" if part.ndim > 1 else "scalars")

    def add_up(self, found: kernels.Autoencoded) -> kernels.Autoencoded:
        frozen = None if found.frozen is None else self.add_latents(found.frozen)
        cost = add(found.cost, self.mesh, "all", "scalars")
        return found._replace(decoded=self.add_latents(found.decoded), cost=cost, frozen=frozen)

    def mean(self, values: Tensor) -> Tensor:
        others = math.prod(values.shape[1:])
        return add(values.sum(), self.mesh, "data", "scalars") / (self._n_tokens * others)

    def squared_error(self, x: Tensor, x_hat: Tensor) -> Tensor:
        return self.mean((x_hat - x).square().sum(-1))

    # --- one step, without gradients ---------------------------------------------------------------------------------

    def total_variance(self, x: Tensor) -> Tensor:
        mean = self.mesh.reduce_(x.sum(0), "data", "scalars") / self._n_tokens
        return self.mean((x - mean).square().sum(-1))

    def add_tokens(self, x: Tensor) -> Tensor:
        return self.mesh.reduce_(x.clone(), "data", "counters")

    def total(self, x: Tensor) -> Tensor:
        return self.mesh.reduce_(x.clone(), "all", "scalars")

    def latent_mean(self, x: Tensor) -> float:
        both = torch.stack([x.double().sum(), torch.tensor(float(x.numel()), dtype=torch.float64, device=x.device)])
        total, number = self.mesh.reduce_(both, "latent", "scalars").tolist()
        return total / number

    def least(self, x: Tensor) -> Tensor:
        return self.mesh.reduce_(x.clone(), "all", "scalars", dist.ReduceOp.MIN)

    def all(self, x: Tensor) -> Tensor:
        return self.mesh.reduce_(x.to(torch.int32), "all", "scalars", dist.ReduceOp.MIN).bool()

    def largest(self, by_latent: Tensor, k: int, d_sae: int, widest: int) -> Tensor:
        kept = self.topk(by_latent.T.contiguous(), k, d_sae, widest)
        acts = torch.zeros_like(by_latent)
        acts[kept.latents, kept.tokens] = by_latent[kept.latents, kept.tokens].relu()
        return acts

    def shared_number(self, here: int) -> tuple[int, int]:
        found = self.mesh.gather(torch.tensor([here], device=self.mesh.device), "latent", "scalars").view(-1).tolist()
        return sum(found), max(found)

    def sum_latents(self, part: Tensor, what: str) -> Tensor:
        return self.mesh.reduce_(part, "latent", what)

    def add_rows_(self, grad: Tensor) -> None:
        self.mesh.reduce_(grad, "data", "gradients")

    def add_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for parameter in parameters.values():
            if parameter.grad is not None and self.mesh.sizes["data"] > 1:
                if not (parameter.grad.is_contiguous() or parameter.grad.T.is_contiguous()):
                    parameter.grad = parameter.grad.contiguous()
                memory = parameter.grad if parameter.grad.is_contiguous() else parameter.grad.T
                self.mesh.reduce_(memory, "data", "gradients")

    def gradient_norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        squares = {True: [], False: []}
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                squares[name in WHOLE_PARAMETERS].append(torch.linalg.vector_norm(parameter.grad).square())
        here = torch.stack(squares[False]).sum()
        whole = torch.stack(squares[True]).sum() if squares[True] else torch.zeros_like(here)
        return (self.mesh.reduce_(here, "latent", "scalars") + whole).sqrt()

    # --- inference ---------------------------------------------------------------------------------------------------

    def activate(self, sae: SAE, pre_acts: Tensor, activation: Activation) -> Tensor:
        if not isinstance(activation, TopK):
            return sae.activate(pre_acts)
        here = torch.tensor([pre_acts.shape[1]], device=pre_acts.device)
        d_sae = int(self.mesh.gather(here, "latent", selection.WHAT).sum())
        kept = self.topk(pre_acts, activation.k, d_sae)
        acts = torch.zeros_like(pre_acts)
        acts[kept.tokens, kept.latents] = pre_acts[kept.tokens, kept.latents]
        return acts

    def decode(self, sae: SAE, acts: Tensor, x: Tensor) -> Tensor:
        acts, x = acts.to(sae.dtype), x.to(sae.dtype)
        return self.mesh.reduce_(acts @ sae.W_dec.detach(), "latent", "x_hat") + sae.decode(torch.zeros_like(acts), x)

    def nth_largest(self, values: Tensor, n: int) -> float:
        found = selection.nth_largest(values, n, self.mesh, "latent")
        return 0.0 if found is None else float(found[0])

    # --- the run -----------------------------------------------------------------------------------------------------

    def any(self, here: bool) -> bool:
        return bool(self.mesh.reduce_(torch.tensor(int(here)), "all", "control", dist.ReduceOp.MAX))

    def main_says(self, here: bool) -> bool:
        return self.any(here and self.is_main)

    def main_does(self, do: Callable[[], Any]) -> Any:
        return self.mesh.main_does(do)

    def save_state(self, folder: Path, step: int, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> Path:
        return state.save(self.mesh, folder, step, tensors, data)

    def load_state(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
        return state.load(self.mesh, folder)
