"""Which version of the kernels is taken: what SAEHOOK_KERNELS says, and whether Triton can run."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

from saehook.errors import ArgumentError

NAMES = ("reference", "screened", "sparse", "dense", "triton")


def forced() -> str:
    """What the environment variable SAEHOOK_KERNELS names, or ''.

    Raises:
        ArgumentError: no version has that name.
    """
    name = os.environ.get("SAEHOOK_KERNELS", "")
    if name and name not in NAMES:
        raise ArgumentError(f"SAEHOOK_KERNELS={name} names no version of the kernels; there are {', '.join(NAMES)}.")
    return name


def uses_triton(device: torch.device) -> bool:
    """Whether kernels in Triton are taken for tensors on `device`, where the sizes are fit for them: on a CUDA device where
    Triton is installed, or where they are asked for.

    Raises:
        ArgumentError: they are asked for and cannot run.
    """
    if name := forced():
        if name == "triton" and (missing := _missing(device.type)):
            raise ArgumentError(f"SAEHOOK_KERNELS=triton cannot be had: {missing}. Leave it out, or name another.")
        return name == "triton"
    return device.type == "cuda" and not _missing(device.type)


def _missing(device_type: str) -> str:
    """What Triton lacks to run on such a device, or ''."""
    if not _installed():
        return "the package triton is not installed"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device_type}, where only Triton's interpreter runs (TRITON_INTERPRET=1, set at the start)"
    return ""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def log_once(name: str, reason: str) -> str:
    """Say in the log which version was taken and why; each is said once. Returns `name`."""
    logging.getLogger("saehook").info("%s kernels, because %s", name, reason)
    return name
