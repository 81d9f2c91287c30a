"""Worlds of several processes for the tests: forked from one server that has imported torch, so that starting them is cheap."""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what the first optimiser would import, in every process anew
import torch.distributed as dist

from saehook.distributed.mesh import Mesh

SECONDS = 120.0


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worlds", "distributed_cases"])
    return context


def _process(
    rank: int, world: int, folder: str, pipe: Any, run: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)

    def mesh_of(data: int, latent: int, timeout: float = 60.0, name: str = "") -> Mesh:
        assert data * latent == world
        store = dist.FileStore(f"{folder}/store-{data}-{latent}-{name}", world)
        return Mesh(data, latent, store=store, rank=rank, timeout=timeout)

    try:
        pipe.send((True, run(mesh_of, *arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # a process group in disorder may not hold up the end


def in_world(world: int, run: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `run(mesh_of, *arguments)` gives in each of so many processes; `mesh_of(data, latent)` joins them to a mesh."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(world):
            ours, theirs = _context().Pipe(duplex=False)
            process = _context().Process(
                target=_process, args=(rank, world, folder, theirs, run, arguments), daemon=True
            )
            process.start()
            theirs.close()
            started.append((process, ours))
        found = []
        for rank, (process, pipe) in enumerate(started):
            assert pipe.poll(SECONDS), f"rank {rank} of {world} gave nothing"
            found.append(pipe.recv())
            process.join(10)
        for rank, (well, value) in enumerate(found):
            assert well, f"rank {rank} of {world}:\n{value}"
        return [value for _, value in found]


def here(run: Callable[..., Any], *arguments: Any) -> Any:
    """The same in a world of one process: this one."""
    with tempfile.TemporaryDirectory() as folder:
        count = iter(range(100))

        def mesh_of(data: int, latent: int, timeout: float = 60.0, name: str = "") -> Mesh:
            store = dist.FileStore(str(Path(folder) / f"{next(count)}"), 1)
            return Mesh(data, latent, store=store, rank=0, timeout=timeout)

        try:
            return run(mesh_of, *arguments)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
