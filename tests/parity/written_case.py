"""SAEs as we write them for other tools, and inputs to try them on.

`PYTHONPATH=tests:tests/parity python tests/parity/written_case.py DIR` writes them; `record_written.py` reads them with the
tools' own packages, which need environments of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from builders import tiny_sae
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from saehook.config import AbsTopK, Activation, BatchTopK, GroupMax, JumpReLU, ReLU, SAEConfig, TopK
from saehook.sae import SAE
from saehook.writers import write_sae

D_IN, D_SAE, D_OUT, TOKENS = 16, 48, 12, 24
LAYOUT_OF = {"saelens": "saehook", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}
"""The tool that reads → the layout that we write."""


def transcoder(activation: Activation, *, d_out: int, skip: bool, seed: int) -> SAE:
    """Random in every parameter."""
    draw = torch.Generator().manual_seed(seed)
    config = SAEConfig(d_in=D_IN, d_sae=D_SAE, d_out=d_out, skip=skip, activation=activation, subtract_b_dec=False)
    sae = SAE(config, site="layers.2.mlp_in", site_out="layers.2.mlp_out")
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=draw))
    if isinstance(activation, JumpReLU):
        sae.set_threshold(0.05 + 0.4 * torch.rand(D_SAE, generator=draw))
    return sae


def cases(tool: str) -> dict[str, SAE]:
    """The SAEs that a tool is to read, by the name of their folder."""
    site = "layers.2.resid_post"
    relu = tiny_sae(D_IN, activation="relu", site=site, seed=1)
    bare = tiny_sae(D_IN, activation="relu", subtract_b_dec=False, site=site, seed=2)
    topk = tiny_sae(D_IN, activation=TopK(k=6), site=site, seed=3)
    topk_bare = tiny_sae(D_IN, activation=TopK(k=6), subtract_b_dec=False, site=site, seed=4)
    batchtopk = tiny_sae(D_IN, activation=BatchTopK(k=6), site=site, seed=5)
    batchtopk.set_threshold(0.6)
    jumprelu = tiny_sae(D_IN, activation=JumpReLU(), site=site, seed=6)
    both = {"topk": topk, "topk_bare": topk_bare}
    if tool == "sparsify":
        groupmax = tiny_sae(D_IN, activation=GroupMax(k=6), site=site, seed=7)
        skip = transcoder(TopK(k=6), d_out=D_IN, skip=True, seed=8)
        return both | {
            "groupmax": groupmax,
            "transcoder": transcoder(TopK(k=6), d_out=D_IN, skip=False, seed=9),
            "skip": skip,
        }
    plain = both | {"relu": relu, "relu_bare": bare, "batchtopk": batchtopk, "jumprelu": jumprelu}
    if tool == "dictionary_learning":
        with torch.no_grad():  # it scales latents by the norms of decoder rows that are not 1
            relu.W_dec.copy_(normalize(relu.W_dec, dim=1))
        many = tiny_sae(D_IN, activation=BatchTopK(k=6), site=site, seed=10)
        return plain | {"batchtopk_many": many}
    assert tool == "saelens"
    del plain["topk_bare"]
    return plain | {
        "abstopk": tiny_sae(D_IN, activation=AbsTopK(k=6), site=site, seed=11),
        "layer_norm": tiny_sae(D_IN, activation=TopK(k=6), normalize="layer_norm", site=site, seed=12),
        "bfloat16": tiny_sae(D_IN, activation="relu", site=site, seed=13, dtype=torch.bfloat16),
        "transcoder": transcoder(ReLU(), d_out=D_OUT, skip=False, seed=14),
        "skip_transcoder": transcoder(ReLU(), d_out=D_OUT, skip=True, seed=15),
        "jumprelu_transcoder": transcoder(JumpReLU(), d_out=D_OUT, skip=False, seed=16),
        "jumprelu_skip_transcoder": transcoder(JumpReLU(), d_out=D_OUT, skip=True, seed=17),
    }


def inputs() -> Tensor:
    """[TOKENS, D_IN], float32."""
    return torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(99))


def write(tool: str, folder: Path) -> None:
    """The files that `record_written.py` reads for a tool."""
    for name, sae in cases(tool).items():
        write_sae(sae, folder / name, LAYOUT_OF[tool])
    save_file({"x": inputs()}, folder / "x.safetensors")


if __name__ == "__main__":
    for tool in LAYOUT_OF:
        write(tool, Path(sys.argv[1]) / tool)
