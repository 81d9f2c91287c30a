"""What the slow metrics solve, against scikit-learn, SciPy and SAEBench on the same data (`record_solvers.py`)."""

import json
from pathlib import Path

import pytest
import torch
from solvers_case import MAIN, absorbing, codes, effects, probes

from saehook import SAE, ReLU, SAEConfig
from saehook.suite.absorption import absorbed_share, probe_direction
from saehook.suite.attribution_accuracy import pearson, spearman
from saehook.suite.probe_loss import fit_probes
from saehook.suite.shrinkage import refine

PEERS = json.loads(Path(__file__).with_name("solvers.json").read_text())


def test_probes_are_scikit_learns():
    z, y = probes()
    found = fit_probes(z, y)
    for name, ours in (("weight", found.weight), ("bias", found.bias), ("loss", found.losses(z, y).mean(0))):
        assert ours.tolist() == pytest.approx([probe[name] for probe in PEERS["probes"]], rel=1e-4, abs=1e-5), name


def test_a_probe_of_all_coordinates_is_scikit_learns():
    direction, bias = probe_direction(*probes())
    weight = torch.tensor(PEERS["probe_of_all"]["weight"], dtype=torch.float64)
    torch.testing.assert_close(direction, weight / weight.norm(), rtol=0, atol=1e-6)
    assert bias == pytest.approx(PEERS["probe_of_all"]["bias"] / float(weight.norm()), abs=1e-5)


def test_refined_values_are_scipys_non_negative_least_squares():
    acts, target, decoder = codes()
    refined = torch.tensor(PEERS["refined"], dtype=torch.float64)
    assert (refined[acts > 0] == 0).any(), "some end at the bound"
    torch.testing.assert_close(refine(acts, target, decoder).double(), refined, rtol=0, atol=1e-3)


def test_correlations_are_scipys():
    assert pearson(*effects()) == pytest.approx(PEERS["pearson"], rel=1e-12)
    assert spearman(*effects()) == pytest.approx(PEERS["spearman"], rel=1e-12)


def test_the_absorbed_share_is_saebenchs():
    x, encoder, decoder, direction = absorbing()
    sae = SAE(SAEConfig(d_in=x.shape[1], d_sae=len(decoder), activation=ReLU()))
    with torch.no_grad():
        sae.W_enc.copy_(encoder)
        sae.W_dec.copy_(decoder)
    peer = torch.tensor(PEERS["absorbed"], dtype=torch.float64)
    assert 20 < int(((peer > 0) & (peer < 1)).sum()) < len(x) - 40
    assert (peer == 1).any()
    torch.testing.assert_close(absorbed_share(sae, x, MAIN, direction.double()), peer, rtol=0, atol=1e-5)
