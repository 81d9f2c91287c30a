"""The adapter for SAEBench. The package's own checks and numbers are in parity/test_saebench_core.py; here it is needed only for
the test marked `network`, which wants its language model and data set, too."""

import importlib
import sys

import pytest
import torch
from builders import ACTIVATIONS, identity_sae, tiny_sae

from saehook.adapters.saebench import as_saebench, hook_of, unit_decoder
from saehook.config import SAEConfig, TopK
from saehook.errors import ArgumentError
from saehook.sae import SAE

D = 16


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "topk"])
def test_rows_of_length_one_decode_the_same(activation):
    sae = tiny_sae(D, activation=activation)
    with torch.no_grad():
        sae.W_dec[7] = 0
    other = unit_decoder(sae)
    x = torch.randn(50, D)
    torch.testing.assert_close(other(x).x_hat, sae(x).x_hat, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.linalg.vector_norm(other.W_dec, dim=-1), torch.ones(48))
    fires = sae.encode(x) > 0
    fires[:, 7] = False
    assert torch.equal(other.encode(x) > 0, fires)
    assert (sae.W_dec[7] == 0).all(), "the given SAE is left as it is"


def test_a_topk_keeps_its_choice():
    sae = SAE(SAEConfig(d_in=D, d_sae=64, activation=TopK(k=4)))
    x = torch.randn(50, D)
    torch.testing.assert_close(unit_decoder(sae)(x).x_hat, sae(x).x_hat)
    with pytest.raises(ArgumentError, match="another k latents"):
        unit_decoder(tiny_sae(D, activation="topk"))


def test_what_does_not_decode_from_activations_alone():
    with pytest.raises(ArgumentError, match="normalises each token"):
        unit_decoder(tiny_sae(D, normalize="layer_norm"))
    with pytest.raises(ArgumentError, match="a transcoder"):
        unit_decoder(SAE(SAEConfig(d_in=D, d_sae=64, d_out=8, activation=TopK(k=4))))


def test_names_of_hooks():
    assert hook_of("layers.3.resid_post") == ("blocks.3.hook_resid_post", 3)
    assert hook_of("layers.11.attn_z") == ("blocks.11.attn.hook_z", 11)
    for site in ("model.layers.3.mlp:output", "layers.0.mlp_in"):
        with pytest.raises(ArgumentError, match="has no hook in TransformerLens"):
            hook_of(site)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_bench", None)
    with pytest.raises(ArgumentError, match="pip install sae-bench"):
        as_saebench(tiny_sae(D, site="layers.0.resid_post"), model_name="gpt2")


@pytest.mark.peers
@pytest.mark.network
def test_core_evaluation_of_the_package(tmp_path):
    """An SAE that gives back what it reads recovers the whole loss by SAEBench's own evaluation, too."""
    core = importlib.import_module("sae_bench.evals.core.main")
    theirs = as_saebench(identity_sae(512, site="layers.3.resid_post"), model_name="pythia-70m-deduped")
    results = core.multiple_evals(
        selected_saes=[("ours", theirs)],
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        eval_batch_size_prompts=4,
        exclude_special_tokens_from_reconstruction=True,
        context_size=64,
        output_folder=str(tmp_path),
        device="cpu",
    )
    assert results[0]["metrics"]["model_performance_preservation"]["ce_loss_score"] == pytest.approx(1.0, abs=1e-4)
    assert results[0]["metrics"]["sparsity"]["l0"] == pytest.approx(512, abs=1)
