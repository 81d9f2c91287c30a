"""What other tools make of SAEs that we wrote: records written_TOOL.safetensors.

Each tool in an environment of its own, with torch and safetensors; nothing of saehook is needed there:
`pip install torch==2.13.0 sae-lens` (6.54.12), `dictionary-learning` (0.1.0), `eai-sparsify` (1.3.3). The last two bring a
torchvision of another build, beside which transformers cannot be imported: `pip uninstall torchvision`. Then
`python tests/parity/record_written.py TOOL DIR/TOOL tests/parity/written_TOOL.safetensors`, DIR from `written_case.py`. Nothing
of these packages is in this repository but numbers that they computed.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PACKAGES = {"saelens": "sae-lens", "dictionary_learning": "dictionary-learning", "sparsify": "eai-sparsify"}


def saelens(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction."""
    from sae_lens import SAE

    sae: Any = SAE.load_from_disk(folder)
    x = x.to(sae.dtype)
    return sae.encode(x), sae(x)


def dictionary_learning(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction."""
    from dictionary_learning.utils import load_dictionary

    sae, _ = load_dictionary(str(folder), device="cpu")
    return sae.encode(x), sae(x)


def sparsify(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction."""
    from sparsify import SparseCoder

    sae: Any = SparseCoder.load_from_disk(folder, device="cpu")
    found = sae.encode(x)
    acts = torch.zeros(len(x), sae.num_latents).scatter_(1, found.top_indices.long(), found.top_acts)
    return acts, sae(x).sae_out


@torch.no_grad()
def main(tool: str, folder: Path, file: Path) -> None:
    """Record one tool."""
    x = load_file(folder / "x.safetensors")["x"]
    recorded = {}
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        acts, x_hat = globals()[tool](case, x)
        recorded |= {f"{case.name}.acts": acts.float().contiguous(), f"{case.name}.x_hat": x_hat.float().contiguous()}
    save_file(recorded, file, metadata={"version": f"{PACKAGES[tool]} {importlib.metadata.version(PACKAGES[tool])}"})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
