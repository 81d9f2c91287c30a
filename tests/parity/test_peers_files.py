"""Files that the peers' own packages wrote compute what those packages computed with them, to 1e-5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import saehook
from saehook.config import AbsTopK, BatchTopK, GroupMax, JumpReLU, ReLU, TopK
from saehook.formats import identify

FOLDER = Path(__file__).with_name("formats")
CASES = sorted(str(path.parent.relative_to(FOLDER)) for path in FOLDER.rglob("recorded.safetensors"))
PACKAGES = {
    "saelens": "sae-lens 6.54.12",
    "sparsify": "eai-sparsify 1.3.3",
    "dictionary_learning": "dictionary_learning 0.1.0",
}
RULES = {
    "saelens/standard": ReLU(),
    "saelens/topk": TopK(k=4),
    "saelens/abstopk": AbsTopK(k=4),
    "saelens/gated": JumpReLU(),
    "saelens/batchtopk_checkpoint": BatchTopK(k=4),
    "saelens/version_5_topk": TopK(k=4),
    "sparsify/groupmax": GroupMax(k=4),
    "dictionary_learning/AutoEncoderTopK": TopK(k=4),
    "dictionary_learning/MatryoshkaBatchTopKSAE": BatchTopK(k=4),
}
SITES = {
    "saelens/standard": ("layers.3.resid_pre", None, "gpt2"),
    "saelens/skip_transcoder": ("layers.3.mlp_in", "layers.3.mlp_out", "gpt2"),
    "saelens/version_4_jumprelu": ("layers.8.mlp_out", None, "gpt2-small"),
    "sparsify/topk": ("layers.10.resid_post", None, "gpt2"),
    "sparsify/groupmax": ("layers.2.mlp_out", None, "gpt2"),
    "sparsify/skip_transcoder": ("layers.2.mlp_in", "layers.2.mlp_out", "gpt2"),
    "dictionary_learning/AutoEncoder": ("layers.8.resid_post", None, "EleutherAI/pythia-70m-deduped"),
}


def path_of(case: str) -> Path:
    """Of a run of sparsify its one hookpoint."""
    folder = FOLDER / case
    return next(path for path in folder.iterdir() if path.is_dir()) if case.startswith("sparsify") else folder


def test_all_that_we_claim_is_recorded():
    saelens = {
        "standard",
        "topk",
        "jumprelu",
        "gated",
        "batchtopk",
        "matryoshka_batchtopk",
        "abstopk",
        "skip_transcoder",
    }
    classes = {
        "AutoEncoder",
        "AutoEncoderNew",
        "GatedAutoEncoder",
        "JumpReluAutoEncoder",
        "AutoEncoderTopK",
        "BatchTopKSAE",
    }
    claimed = {f"saelens/{name}" for name in saelens} | {
        f"sparsify/{n}" for n in ("topk", "groupmax", "skip_transcoder")
    }
    claimed |= {f"dictionary_learning/{name}" for name in classes | {"MatryoshkaBatchTopKSAE"}}
    assert claimed <= set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_encode_and_decode_are_the_peers(case):
    with safe_open(FOLDER / case / "recorded.safetensors", framework="pt") as file:
        assert file.metadata()["package"] == PACKAGES[case.split("/")[0]]
        x, acts, x_hat = (file.get_tensor(name) for name in ("x", "acts", "x_hat"))
    sae = saehook.load_sae(path_of(case))
    torch.testing.assert_close(sae.encode(x), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(acts, x), x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x).x_hat, x_hat, rtol=1e-5, atol=1e-5)
    assert 0 < (acts != 0).float().mean() < 1
    if case in RULES:
        assert sae.config.activation == RULES[case]
    assert torch.equal(saehook.load_sae(path_of(case), rows=[5, 0]), sae.W_dec[[5, 0]])
    found = identify(path_of(case))
    assert found.config == sae.config
    if case in SITES:
        assert (sae.site, sae.site_out, found.lm) == SITES[case]
