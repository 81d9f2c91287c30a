"""A command that runs in several processes: they find each other by the environment that torchrun or accelerate set, end
together, and of all that goes wrong one speaks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from saehook.config import MESH_TIMEOUT_SECONDS
from saehook.devices import ONE_DEVICE, OneDevice
from saehook.distributed.mesh import Mesh, Store, read_mesh  # pyright: ignore[reportPrivateImportUsage]
from saehook.distributed.shards import Shards
from saehook.errors import ArgumentError, SaehookError, TrainingError, TrainingInterrupted

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
GRACE_SECONDS = 3.0
"""How long the main process waits to hear what went wrong with the others."""
_TRANSPORT = re.compile(r"gloo|nccl|connection|timed? ?out|pair closure|broken pipe|store|socket|peer", re.IGNORECASE)


@contextlib.contextmanager
def session(mesh: str | None = None, timeout: float = MESH_TIMEOUT_SECONDS) -> Iterator[OneDevice]:
    """The devices of this run: one, or those of the mesh that `mesh` describes, which torchrun or accelerate started.

    An error on any process ends all; the main one raises what is to be said, the others SystemExit. Where the main one is
    gone, another speaks.

    Raises:
        ArgumentError: processes that make no such mesh, or an environment that does not say which process this is.
        TrainingError: a process that died, hung for `timeout` seconds, or ended with another error.
    """
    world = int(os.environ.get("WORLD_SIZE") or 1)
    rank = int(os.environ.get("RANK") or 0)
    if mesh is None and world == 1:
        yield ONE_DEVICE
        return
    try:
        if not timeout > 0:
            raise ArgumentError(f"a timeout of {timeout:g} seconds cannot be kept; give a number above 0.")
        data, latent = _places(mesh, world)
    except ArgumentError:
        if rank > 0:
            raise SystemExit(2) from None
        raise
    try:
        store, joined = _join(data, latent, timeout, world, rank)
    except ArgumentError:  # all have the same
        if rank > 0:
            raise SystemExit(2) from None
        raise
    try:
        facts = {"saehook": version("saehook"), "torch": torch.__version__, "device": joined.device.type}
        joined.check_same(facts)
        yield Shards(joined)
    except BaseException as error:
        if world > 1:
            _end(error, store, joined, timeout)
        raise
    finally:
        joined.close()


def _places(mesh: str | None, world: int) -> tuple[int, int]:
    if "WORLD_SIZE" not in os.environ:
        wanted = re.findall(r"=\s*(\d+)", mesh or "")
        number = 1
        for size in wanted:
            number *= int(size)
        if number > 1:
            raise ArgumentError(
                f"the mesh {mesh} is of {number} processes, and this one was started alone. Start all: torchrun "
                f"--nproc-per-node {number} -m saehook train --mesh {mesh} ..."
            )
    elif missing := [name for name in ENVIRONMENT if name not in os.environ]:
        raise ArgumentError(
            f"{', '.join(missing)} of the environment {'is' if len(missing) == 1 else 'are'} not set, so this process does not "
            "know its place among the others. Start with torchrun or accelerate launch, which set all of them."
        )
    return read_mesh(mesh, world)


def _join(data: int, latent: int, timeout: float, world: int, rank: int) -> tuple[Store, Mesh]:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        device = torch.device("cuda", torch.cuda.current_device())
    if "WORLD_SIZE" not in os.environ:
        store: Store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    else:
        try:
            found = dist.rendezvous("env://", timeout=timedelta(seconds=timeout))  # pyright: ignore[reportPrivateImportUsage]
            shared = next(iter(found))[0]
            store = _of_this_start(shared, rank, world, timeout)
        except TrainingError:
            raise
        except RuntimeError as error:
            raise TrainingError(
                f"rank {rank} did not reach the others at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within "
                f"{timeout:g} seconds: {error}"
            ) from None
    return store, Mesh(data, latent, device=device, timeout=timeout, store=store, rank=rank)


def _of_this_start(store: Store, rank: int, world: int, timeout: float) -> Store:
    """A part of the store for the processes that run now: torchrun's store outlives a restart, and with it the addresses and
    last words of the processes before. The main one names it, for those whose fresh greetings it has read.

    Raises:
        TrainingError: some do not come.
    """
    mine, known, missing = uuid.uuid4().hex, {}, [str(other) for other in range(1, world)]
    name = mine
    if rank > 0:
        store.set(f"saehook/hello/{rank}", mine)
    end = time.monotonic() + timeout
    while missing:
        if time.monotonic() > end:
            raise TrainingError(
                f"of {world} processes rank {', '.join(missing)} did not come within {timeout:g} seconds. Start all of them."
            )
        if rank == 0:
            found = {other: _get(store, f"saehook/hello/{other}") for other in missing}
            if found != {other: known.get(other) for other in missing}:
                known |= found
                store.set("saehook/start", json.dumps({"name": mine, "known": known}))
            missing = [other for other in missing if not store.check([f"saehook/{mine}/came/{other}"])]
        elif (start := json.loads(_get(store, "saehook/start") or "{}")).get("known", {}).get(str(rank)) == mine:
            name, missing = start["name"], []
            store.set(f"saehook/{name}/came/{rank}", "here")
        else:
            missing = ["0"]
        time.sleep(0.02)
    return dist.PrefixStore(f"saehook/{name}", store)  # pyright: ignore[reportPrivateImportUsage]


def _get(store: Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _end(error: BaseException, store: Store, mesh: Mesh, timeout: float) -> None:
    """Tell the others what went wrong here and hear what went wrong there. Raises what is to be said, or SystemExit."""
    lost = isinstance(error, RuntimeError) and not isinstance(error, SaehookError) and _TRANSPORT.search(str(error))
    code = 130 if isinstance(error, (TrainingInterrupted, KeyboardInterrupt)) else 2
    text = str(error) if isinstance(error, (SaehookError, OSError)) else f"{type(error).__name__}: {error}"
    said: dict[int, dict[str, Any]] = {mesh.rank: {"lost": bool(lost), "text": text}}
    try:
        store.set(f"saehook/ended/{mesh.rank}", json.dumps(said[mesh.rank]))
        if mesh.rank == 0 and not lost:
            store.set("saehook/said", "1")
            return
        if mesh.rank > 0 and _wait(lambda: store.check(["saehook/said"]), 2 * GRACE_SECONDS):
            raise SystemExit(code)
        if mesh.rank > 0 and store.add("saehook/speaker", 1) > 1:
            raise SystemExit(code)
        others = [rank for rank in range(mesh.sizes["all"]) if rank != mesh.rank]
        _wait(lambda: all(store.check([f"saehook/ended/{rank}"]) for rank in others), GRACE_SECONDS)
        said |= {
            rank: json.loads(store.get(f"saehook/ended/{rank}"))
            for rank in others
            if store.check([f"saehook/ended/{rank}"])
        }
        store.set("saehook/said", "1")
    except RuntimeError:  # the store went with the process that kept it
        if mesh.rank > 1:
            raise SystemExit(code) from None
    raise TrainingError(_what_happened(said, mesh.sizes["all"], timeout)) from None


def _wait(done: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (found := bool(done())) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def _what_happened(said: dict[int, dict[str, Any]], world: int, timeout: float) -> str:
    """One message from what the processes said as they ended."""
    causes = [f"rank {rank}: {one['text']}" for rank, one in sorted(said.items()) if not one["lost"]]
    silent = [str(rank) for rank in range(world) if rank not in said]
    if not causes and silent:
        causes = [
            f"rank {', '.join(silent)} of {world} processes does not answer any more: it was killed, has crashed, or hangs (others "
            f"wait at most {timeout:g} seconds)"
        ]
    if not causes:
        causes = [f"the processes lost contact: {min(said.items())[1]['text']}"]
    return (
        f"{'; '.join(causes)}. All {world} processes have ended. The last checkpoint is whole: the same command with --resume "
        "DIR goes on from it, also with another mesh."
    )
