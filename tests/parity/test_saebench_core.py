"""SAEBench's core evaluation of our SAE behind our adapter against our own evaluation: recorded numbers (record_saebench.py), and,
where an environment with the package is named (SAEHOOK_PYTHON_SAEBENCH), the package itself.

Not compared: its KL also counts the last token of a window, which predicts nothing, and its explained variance takes the mean of
squares for the square of the mean.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import byte_tokenizer
from saelens_eval_case import D_SAE, LAYER, WIDTH, ids, language_model, sae_weights

from saehook.config import ReLU, SAEConfig
from saehook.evaluation import evaluate
from saehook.hooked_model import HookedModel
from saehook.sae import SAE
from saehook.suite.latent_quality import alignment, max_cosine

HERE = Path(__file__).parent


def check(peer: dict[str, Any]) -> None:
    sae = SAE(SAEConfig(d_in=WIDTH, d_sae=D_SAE, activation=ReLU()))
    sae.load_state_dict(sae_weights())
    hooked = HookedModel(language_model(), byte_tokenizer()).attach({f"layers.{LAYER}.resid_post": sae})
    (row,) = evaluate(hooked, ids(), progress=False).results
    ours = {
        "ce_loss_without_sae": row.ce_clean,
        "ce_loss_with_sae": row.ce_spliced,
        "ce_loss_with_ablation": row.ce_zero,
        "ce_loss_score": row.ce_recovered_zero,
        "cossim": row.cosine,
        "l2_ratio": row.norm_ratio,
        "l0": row.l0,
    }
    assert ours == {name: pytest.approx(peer[name], rel=1e-5, abs=1e-6) for name in ours}
    latents = peer["latents"]
    assert row.dead_share == sum(density == 0 for density in latents["feature_density"]) / D_SAE
    torch.testing.assert_close(
        alignment(sae), torch.tensor(latents["encoder_decoder_cosine_sim"]), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        max_cosine(sae.W_dec)[0], torch.tensor(latents["max_decoder_cosine_sim"]), rtol=1e-5, atol=1e-5
    )
    assert peer["checked"] == {"relu": "standard", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}


def test_the_package_measured_what_we_measure():
    peer = json.loads((HERE / "saebench.json").read_text())
    assert peer["version"] == "0.6.0"
    check(peer)
    assert peer["kl_div_with_sae"] > 0.5, "the splice changes something"
    assert abs(peer["ce_loss_with_ablation"] - peer["ce_loss_without_sae"]) > 1


@pytest.mark.peers
def test_the_installed_package_measures_what_we_measure(tmp_path):
    python = os.environ.get("SAEHOOK_PYTHON_SAEBENCH")
    assert python, "name the Python of an environment with sae-bench in SAEHOOK_PYTHON_SAEBENCH"
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    file = tmp_path / "saebench.json"
    subprocess.run([python, HERE / "record_saebench.py", file], check=True, env=os.environ | {"PYTHONPATH": path})
    check(json.loads(file.read_text()))
