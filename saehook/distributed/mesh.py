"""The processes of a run as a mesh of data x latent, and the collectives between them, each counted in bytes sent.

Process r stands at data r // latent, latent r % latent: those that share an SAE are neighbours, so that on a node they are
joined by its fast links.
"""

from __future__ import annotations

import datetime
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh

from saehook.config import MESH_TIMEOUT_SECONDS
from saehook.errors import ArgumentError, TrainingError

AXES = ("data", "latent")


def read_mesh(text: str | None, world: int) -> tuple[int, int]:
    """(data, latent) from `data=2,latent=4`; an axis that is left out has what remains of the `world` processes.

    None: all of them split the batch.

    Raises:
        ArgumentError: another form, or a mesh that does not have `world` places.
    """
    sizes: dict[str, int] = {}
    for part in (f"data={world}" if text is None else text).split(","):
        match = re.fullmatch(r"\s*(data|latent)\s*=\s*(\d+)\s*", part)
        if match is None or match[1] in sizes or int(match[2]) < 1:
            raise ArgumentError(f"{text!r} is no mesh; expected is e.g. latent=8 or data=4,latent=8.")
        sizes[match[1]] = int(match[2])
    for axis, other in (AXES, AXES[::-1]):
        if axis not in sizes:
            sizes[axis] = max(1, world // sizes[other])
    if sizes["data"] * sizes["latent"] != world:
        raise ArgumentError(
            f"the mesh data={sizes['data']},latent={sizes['latent']} has {sizes['data'] * sizes['latent']} places, and there are "
            f"{world} processes. Start as many (torchrun --nproc-per-node N --nnodes M), or give a mesh of {world}."
        )
    return sizes["data"], sizes["latent"]


class Mesh:
    """This process's place among data x latent processes, its groups, and what it has sent."""

    def __init__(
        self,
        data: int,
        latent: int,
        *,
        device: torch.device | str = "cpu",
        timeout: float = MESH_TIMEOUT_SECONDS,
        store: Store | None = None,
        rank: int | None = None,
    ) -> None:
        """Joins the others; without `store` and `rank` as the environment of torchrun says.

        Raises:
            TrainingError: they do not come within `timeout` seconds.
        """
        self.device = torch.device(device)
        self.sizes = {"data": data, "latent": latent, "all": data * latent}
        self.timeout = datetime.timedelta(seconds=timeout)
        backend = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        where: dict[str, Any] = {} if store is None else {"store": store, "rank": rank, "world_size": data * latent}
        ranks = torch.arange(data * latent).view(data, latent)
        groups: dict[str, dist.ProcessGroup] = {}
        try:
            dist.init_process_group(backend, timeout=self.timeout, **where)
            self.rank = dist.get_rank()
            self.places = {"data": self.rank // latent, "latent": self.rank % latent, "all": self.rank}
            self.check_same({"mesh": f"data={data},latent={latent}"})  # else the groups below would wait for each other
            for axis, rows in (("data", ranks.T), ("latent", ranks)):
                # A DeviceMesh of its own making would give its groups another timeout than ours.
                own, _ = dist.new_subgroups_by_enumeration(rows.tolist(), timeout=self.timeout)
                assert isinstance(own, dist.ProcessGroup)
                groups[axis] = own
        except ArgumentError:
            self.close()
            raise
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"the {data * latent} processes of this run did not find each other within {timeout:g} seconds: {error}"
            ) from None
        self.device_mesh = DeviceMesh.from_group(
            [groups[axis] for axis in AXES], self.device.type, mesh=ranks, mesh_dim_names=AXES
        )
        self.groups: dict[str, dist.ProcessGroup | None] = {**groups, "all": None}
        self.sent: Counter[str] = Counter()
        """Bytes that this process has sent, by what for: as rings, which send every part once, or for a sum twice."""

    def close(self) -> None:
        """Leave the others. Nothing is waited for."""
        if dist.is_initialized():
            dist.destroy_process_group()

    # --- collectives -------------------------------------------------------------------------------------------------

    def reduce_(self, x: Tensor, axis: str, what: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """The sum (or another `op`) over the axis `data`, `latent` or `all`, in place."""
        n = self.sizes[axis]
        if n > 1:
            self._all_reduce(x, op, axis)
            self.sent[what] += 2 * (n - 1) * x.nbytes // n
        return x

    def gather(self, x: Tensor, axis: str, what: str) -> Tensor:
        """[n, *shape]: the tensors of all n processes of the axis, which have one shape."""
        n = self.sizes[axis]
        found = x.new_empty(n, *x.shape)
        if n > 1:
            self._all_gather(found, x.contiguous(), axis)
            self.sent[what] += (n - 1) * x.nbytes
        else:
            found[0] = x
        return found

    def gather_some(self, x: Tensor, axis: str, what: str) -> list[Tensor]:
        """The tensors of all processes of the axis, which may differ in the length of their first dimension."""
        sizes = self.gather(torch.tensor([len(x)], device=x.device), axis, what).view(-1).tolist()
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        return [part[:size] for part, size in zip(self.gather(padded, axis, what), sizes, strict=True)]

    def swap(self, x: Tensor, partner: int, what: str) -> Tensor:
        """The tensor of that place of the axis `latent`, which gets this one."""
        found = torch.empty_like(x)
        self._swap(found, x.contiguous(), self.rank - self.places["latent"] + partner)
        self.sent[what] += x.nbytes
        return found

    def _all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType, axis: str) -> None:
        dist.all_reduce(x, op, group=self.groups[axis])

    def _all_gather(self, found: Tensor, x: Tensor, axis: str) -> None:
        dist.all_gather(list(found.unbind(0)), x, group=self.groups[axis])

    def _swap(self, found: Tensor, x: Tensor, rank: int) -> None:
        group = self.groups["latent"]
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x, rank, group), dist.P2POp(dist.irecv, found, rank, group)]
        ):
            work.wait()

    def to_main(self, x: Tensor, axis: int) -> Tensor | None:
        """On the main process, and on the CPU, the parts of all latents one after another along `axis`; None elsewhere."""
        if self.places["data"] > 0:
            return None
        if self.rank > 0:
            dist.send(torch.tensor(x.shape, dtype=torch.int64), 0)
            dist.send(x.detach().cpu().contiguous(), 0)
            return None
        parts = [x.detach().cpu()]
        for peer in range(1, self.sizes["latent"]):
            shape = torch.empty(x.ndim, dtype=torch.int64)
            dist.recv(shape, peer)
            part = torch.empty(shape.tolist(), dtype=x.dtype)
            dist.recv(part, peer)
            parts.append(part)
        return torch.cat(parts, axis)

    def from_main(self, value: Any) -> Any:
        """What the main process gives: any data that can be pickled."""
        box = [value]
        if self.sizes["all"] > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]

    def of_all(self, value: Any) -> list[Any]:
        """What every process gives, by rank."""
        found = [value] * self.sizes["all"]
        if self.sizes["all"] > 1:
            dist.all_gather_object(found, value)
        return found

    # --- agreement ---------------------------------------------------------------------------------------------------

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raises ArgumentError, on all processes, where theirs are not those of the main one; it names what and which."""
        every = self.of_all(dict(facts))
        for name, main in every[0].items():
            others = [rank for rank, theirs in enumerate(every) if theirs.get(name) != main]
            if others:
                raise ArgumentError(
                    f"the processes of this run differ in {name}: rank 0 has {_short(main)}, rank {others[0]} has "
                    f"{_short(every[others[0]].get(name))}"
                    + (f" ({len(others)} of {len(every)} differ)" if len(others) > 1 else "")
                    + ". Start all with the same command, files and versions."
                )

    def main_does(self, do: Callable[[], Any]) -> Any:
        """What `do` gives on the main process; if it raises an OSError or ValueError there, that is raised on all."""
        found: Any = None
        if self.rank == 0:
            try:
                found = (True, do())
            except (OSError, ValueError) as error:
                found = (False, error)
        well, value = self.from_main(found)
        if not well:
            raise value
        return value

    def all_do(self, do: Callable[[], None]) -> None:
        """Does something on every process; if it raises an OSError on any, that is raised on all."""
        error: OSError | None = None
        try:
            do()
        except OSError as raised:
            error = raised
        failed = [raised for raised in self.of_all(error) if raised is not None]
        if failed:
            raise failed[0]


def shares(n: int, parts: int) -> list[slice]:
    """0..n-1 in that many parts of neighbours, as equal as may be."""
    return [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)]


def stripes(ends: Sequence[int], parts: int, part: int) -> tuple[slice, ...]:
    """One of so many parts of the latents 0..ends[-1]-1: an equal share of each group that ends at one of the `ends`, so that all
    parts have as much to do in each."""
    starts = (0, *ends[:-1])
    runs = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        share = shares(end - start, parts)[
            (part + number) % parts
        ]  # what does not divide goes to another one each time
        if share.start < share.stop:
            runs.append(slice(start + share.start, start + share.stop))
    return tuple(runs)


def nearest_sizes(n: int, parts: int) -> tuple[int, int]:
    """Multiples of `parts` below and above n."""
    return n // parts * parts, math.ceil(n / parts) * parts


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."
