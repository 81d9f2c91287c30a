"""Worlds of several processes for the tests: forked from one server that has imported torch, so that starting them is cheap."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # what the first optimiser would import, in every process anew
import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from saehook.distributed.mesh import Mesh

SECONDS = 600.0


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

    @functools.cache
    def mesh_of(data: int, latent: int) -> Mesh:
        assert data * latent == world
        return Mesh(data, latent, store=FileStore(f"{folder}/store", world), rank=rank, timeout=SECONDS)

    try:
        found = io.BytesIO()
        torch.save(run(mesh_of, *arguments), found)  # tensors in a pipe would stay in the memory of this process
        pipe.send((True, found.getvalue()))
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
        failed = [f"rank {rank} of {world}:\n{value}" for rank, (well, value) in enumerate(found) if not well]
        assert not failed, "\n".join(failed)
        return [torch.load(io.BytesIO(value), weights_only=False) for _, value in found]


def here(run: Callable[..., Any], *arguments: Any) -> Any:
    """The same in a world of one process: this one."""
    with tempfile.TemporaryDirectory() as folder:

        @functools.cache
        def mesh_of(data: int, latent: int) -> Mesh:
            return Mesh(data, latent, store=FileStore(f"{folder}/store", 1), rank=0)

        try:
            return run(mesh_of, *arguments)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
