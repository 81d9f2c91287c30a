"""Whether tensors are those that a configuration says: shapes, transposition, numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from saehook.config import BatchTopK, JumpReLU, SAEConfig
from saehook.errors import FormatError

ROWS_AT_ONCE = 2**22
"""Numbers looked at at a time, so that no mask of a whole matrix is made."""


def d_in_of(tensors: dict[str, Tensor]) -> int:
    """Width of the input, for files without configuration: the size of W_enc that is not the number of latents."""
    rows, columns = tensors["W_enc"].shape
    return rows if columns == len(tensors["b_enc"]) else columns


def shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Of the tensors that such an SAE must have; a BatchTopK may lack its threshold."""
    d_in, d_sae, d_out = config.d_in, config.d_sae, config.d_out or config.d_in
    found: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,)
    }  # fmt: skip
    if config.skip:
        found["W_skip"] = (d_out, d_in)
    if isinstance(config.activation, (BatchTopK, JumpReLU)):
        found["threshold"] = (d_sae,)
    return found


def check_shapes(config: SAEConfig, tensors: dict[str, Tensor], path: Path, rows: int | None = None) -> None:
    """Raises FormatError unless each tensor has the shape of the configuration; `rows` of the decoder only, if given."""
    for name, expected in shapes(config).items():
        if name == "threshold" and name not in tensors and isinstance(config.activation, BatchTopK):
            continue
        if name not in tensors:
            raise FormatError(f"{path}: {name} is missing.")
        if name == "W_dec" and rows is not None:
            expected = (rows, *expected[1:])
        found = tuple(tensors[name].shape)
        if found == expected:
            continue
        if found == expected[::-1]:
            raise FormatError(
                f"{path}: {name} is transposed: it has shape {found}, and {expected} is expected. Turn it round and write the "
                "file again."
            )
        raise FormatError(
            f"{path}: {name} has shape {found}, but {_source(path)} says {expected}. The two files do not belong together, or "
            "the matrix is transposed."
        )


def _source(path: Path) -> str:
    here = path.parent / "cfg.json"
    return here.name if here.is_file() else "its configuration"


def check_numbers(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises FormatError for NaN or infinity, and for a square decoder whose columns, not rows, have norm 1."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            continue
        step = max(1, ROWS_AT_ONCE // max(1, tensor[:1].numel())) if tensor.ndim else 1
        parts = tensor.split(step) if tensor.ndim else (tensor,)
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise FormatError(f"{path}: {name} holds NaN or infinity; the file is damaged.")
    W_dec = tensors.get("W_dec")
    if W_dec is not None and not W_dec.is_meta and W_dec.shape[0] == W_dec.shape[1] > 1:
        rows, columns = (torch.linalg.vector_norm(W_dec.float(), dim=dim) for dim in (1, 0))
        if (columns - 1).abs().max() < 1e-3 and (rows - 1).abs().max() > 1e-2:
            raise FormatError(
                f"{path}: W_dec is transposed: it is square, and its columns have norm 1 where the directions of the latents, "
                "its rows, should. Turn it round and write the file again."
            )
