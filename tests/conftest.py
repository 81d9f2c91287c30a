"""Fixtures that every test file may use."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from builders import build_lm, byte_tokenizer

if sys.platform != "linux":  # there is no Triton
    collect_ignore = ["test_triton.py", "test_gpu_bench.py"]
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def models_by_name() -> Callable[[str], Any]:
    """name -> (HookedModel, an untouched torch model with the same weights), made once for each name."""
    from saehook.hooked_model import HookedModel

    @functools.cache
    def pair(name: str) -> tuple[Any, Any]:
        return HookedModel(build_lm(name), byte_tokenizer()), build_lm(name)

    return pair


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    """Each test starts from the same random state and leaves the others alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
