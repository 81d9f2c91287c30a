"""Records formats/sparsify/*: small sparse coders as the package `eai-sparsify` (1.3.3) writes them, and what it computes.

In an environment of its own: `pip install torch==2.13.0 eai-sparsify`, without triton, then
`python tests/parity/record_sparsify.py`. Each folder is a run with one hookpoint: the peer's own files, and
`recorded.safetensors` (x, acts, x_hat). Nothing of that package is in this repository.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from sparsify.config import SparseCoderConfig  # pyright: ignore[reportMissingImports]
from sparsify.sparse_coder import SparseCoder  # pyright: ignore[reportMissingImports]

FOLDER = Path(__file__).with_name("formats") / "sparsify"
D_IN, N = 10, 8
CASES = {
    "topk": ("layers.10", SparseCoderConfig(num_latents=24, k=4)),
    "expansion": ("h.3", SparseCoderConfig(expansion_factor=3, k=4, normalize_decoder=False)),
    "groupmax": ("layers.2.mlp", SparseCoderConfig(activation="groupmax", num_latents=24, k=4)),
    "transcoder": ("layers.2.mlp", SparseCoderConfig(num_latents=24, k=4, transcode=True)),
    "skip_transcoder": ("layers.2.mlp", SparseCoderConfig(num_latents=24, k=4, transcode=True, skip_connection=True)),
    "skip": ("layers.2", SparseCoderConfig(num_latents=24, k=4, skip_connection=True)),
}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(0)
    for name, (hookpoint, config) in CASES.items():
        coder = SparseCoder(D_IN, config)
        with torch.no_grad():
            for parameter in coder.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4)
        coder.save_to_disk(FOLDER / name / hookpoint)
        (FOLDER / name / "config.json").write_text(
            json.dumps({"sae": config.to_dict(), "batch_size": 32, "model": "gpt2"})
        )
        coder = SparseCoder.load_from_disk(FOLDER / name / hookpoint)
        x = torch.randn(N, D_IN) * 2 + 0.5
        with torch.no_grad():
            top_acts, top_indices, _ = coder.encode(x)
            x_hat = coder.decode(top_acts, top_indices)
            if coder.W_skip is not None:
                x_hat = x_hat + x @ coder.W_skip.mT
            acts = torch.zeros(N, coder.num_latents).scatter_(-1, top_indices, top_acts)
        said = {"package": f"eai-sparsify {version('eai-sparsify')}"}
        save_file({"x": x, "acts": acts, "x_hat": x_hat}, FOLDER / name / "recorded.safetensors", metadata=said)


if __name__ == "__main__":
    main()
