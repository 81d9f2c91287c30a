"""Our evaluation against recorded numbers of SAELens, where it computes the same thing (record_saelens_eval.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import byte_tokenizer
from saelens_eval_case import D_SAE, LAYER, WIDTH, ids, language_model, sae_weights

from saehook.config import ReLU, SAEConfig
from saehook.evaluation import evaluate
from saehook.hooked_model import HookedModel
from saehook.sae import SAE

PEER = json.loads(Path(__file__).with_name("saelens_eval.json").read_text())


def test_losses_and_reconstruction_are_those_of_saelens():
    sae = SAE(SAEConfig(d_in=WIDTH, d_sae=D_SAE, activation=ReLU()))
    sae.load_state_dict(sae_weights())
    hooked = HookedModel(language_model(), byte_tokenizer()).attach({f"layers.{LAYER}.resid_post": sae})
    (row,) = evaluate(hooked, ids(), progress=False).results
    ours = {
        "ce_loss_without_sae": row.ce_clean,
        "ce_loss_with_sae": row.ce_spliced,
        "ce_loss_with_ablation": row.ce_zero,
        "kl_div_with_sae": row.kl,
        "explained_variance": 1 - (row.fvu or 0),
        "cossim": row.cosine,
        "l2_ratio": row.norm_ratio,
        "l0": row.l0,
    }
    assert ours == {name: pytest.approx(PEER[name], rel=1e-5, abs=1e-6) for name in ours}
    # It averages this ratio over batches; ours is one ratio of sums.
    assert row.gamma == pytest.approx(PEER["relative_reconstruction_bias"], rel=0.02)
    dead = sum(density == 0 for density in PEER["feature_density"]) / D_SAE
    assert row.dead_share == dead
    density = row.extra["density"]
    assert sum(density["counts"]) == D_SAE - round(dead * D_SAE)
    assert density["tokens"] == ids().numel()


def test_the_case_is_not_trivial():
    assert PEER["ce_loss_with_sae"] > PEER["ce_loss_without_sae"] + 0.01
    assert 0.01 < PEER["explained_variance"] < 0.99 or PEER["explained_variance"] < -0.01
    assert torch.is_tensor(ids())
