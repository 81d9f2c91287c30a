"""Metrics of activations and weights alone, on data where the answer is known."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from builders import tiny_sae

from saehook import SAE, ReLU, SAEConfig, TopK
from saehook.errors import ArgumentError, ShapeError
from saehook.suite.compute_equivalent import compute_equivalent
from saehook.suite.duplicates import match_latents, stability
from saehook.suite.latent_quality import alignment, effective_latents, latent_quality, max_cosine
from saehook.suite.measure import median, ratio
from saehook.suite.progressive_code import progressive_code, progressive_up_to, thresholds_for, with_topk
from saehook.suite.sample import Sample
from saehook.suite.shrinkage import refine, shrinkage

D, N, WINDOWS = 16, 400, 20


def sample_of(sae: SAE, x: torch.Tensor) -> Sample:
    row = torch.arange(len(x)) * WINDOWS // len(x)
    return Sample("s", sae, x, x, row, torch.arange(len(x)) % (len(x) // WINDOWS), WINDOWS, 0)


def orthonormal_sae(activation, *, bias: float = 0.0) -> SAE:
    """Latent i reads coordinate i, less what `bias` takes off."""
    sae = SAE(SAEConfig(d_in=D, d_sae=D, activation=activation))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D))
        sae.W_dec.copy_(torch.eye(D))
        sae.b_enc.fill_(-bias)
    return sae


def by_name(measures):
    return {measure.name: measure for measure in measures}


# --- numbers with intervals -------------------------------------------------------------------------------------------


def test_a_ratio_is_of_sums_and_its_interval_covers():
    top, bottom = torch.tensor([1.0, 9.0, 2.0, 8.0] * 10), torch.tensor([1.0, 3.0, 1.0, 3.0] * 10)
    found = ratio("r", "u", top, bottom, of="windows", tokens=400)
    assert found.value == pytest.approx(2.5)
    assert 1.0 < found.low < 2.5 < found.high < 3.0
    assert found.few == ""
    assert ratio("r", "u", torch.full((10,), 3.0), of="w", tokens=9).text() == "3 [3 … 3]"


def test_the_interval_of_a_mean_has_the_width_of_theory():
    values = torch.randn(400)
    found = ratio("r", "u", values, of="windows", tokens=400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.1)
    middle = median("m", "u", values, of="windows", tokens=400)
    assert middle.high - middle.low == pytest.approx(2 * 1.96 * 1.2533 / 20, rel=0.35)


def test_too_little_is_an_interval_and_how_much_is_needed():
    few = ratio("r", "u", torch.tensor([1.0, 2.0]), of="windows", tokens=512)
    assert few.text() == "1 … 2 (2 windows, 8 are needed (about 2,048 tokens))"
    one = ratio("r", "u", torch.tensor([1.0]), of="windows", tokens=256)
    assert one.text().startswith("unknown (1 windows, 8 are needed")
    assert one.to_dict()["low"] is None
    assert math.isnan(median("m", "u", torch.tensor([math.nan]), of="latents", tokens=1).value)


# --- shrinkage --------------------------------------------------------------------------------------------------------


def test_an_l1_penalty_is_undone_exactly():
    x = 1 + torch.rand(N, D)
    found = by_name(shrinkage(sample_of(orthonormal_sae(ReLU(), bias=0.25), x)))
    assert found["refinement_shift"].value == pytest.approx(0.25 / float((x - 0.25).mean()), rel=1e-5)
    assert found["refinement_gain"].value == pytest.approx(1.0)
    assert found["refined_up"].value == 1.0


def test_topk_of_an_orthonormal_dictionary_has_nothing_to_refine():
    found = by_name(shrinkage(sample_of(orthonormal_sae(TopK(k=3)), torch.randn(N, D))))
    assert found["refinement_shift"].value == pytest.approx(0.0, abs=1e-6)
    assert found["refinement_gain"].value == pytest.approx(0.0, abs=1e-6)


def test_refined_values_are_the_best_of_all_supports():
    """Against least squares on every subset of the active latents: the best that is not negative."""
    W_dec = F.normalize(torch.randn(12, 6, dtype=torch.float64), dim=-1)
    acts = torch.zeros(20, 12, dtype=torch.float64)
    for token in range(20):
        acts[token, torch.randperm(12)[:4]] = torch.rand(4, dtype=torch.float64)
    target = torch.randn(20, 6, dtype=torch.float64)
    refined = refine(acts, target, W_dec)
    assert not refined[acts == 0].any()
    for token in range(20):
        active = acts[token].nonzero()[:, 0].tolist()
        best = float(target[token].square().sum())
        for n in range(1, 5):
            for chosen in itertools.combinations(active, n):
                D_S = W_dec[list(chosen)]
                a = torch.linalg.lstsq(D_S.T, target[token]).solution
                if (a >= 0).all():
                    best = min(best, float((target[token] - a @ D_S).square().sum()))
        assert float((target[token] - refined[token] @ W_dec).square().sum()) == pytest.approx(best, rel=1e-6)


def test_refining_in_the_units_of_a_normalising_sae():
    """With the reconstruction of the token's own units as target nothing is left of the error."""
    sae = tiny_sae(D, d_sae=4 * D, activation="relu", normalize="layer_norm")
    found = by_name(shrinkage(sample_of(sae, torch.randn(WINDOWS, D) * 5)))
    assert found["refinement_gain"].value > 0.9  # about half of 64 latents fire: more than enough for 16 numbers


# --- progressive codes ------------------------------------------------------------------------------------------------


def test_the_error_at_k_is_what_the_smaller_coordinates_hold():
    x = torch.randn(N, D).abs() + 0.1
    found = by_name(progressive_code(sample_of(orthonormal_sae(TopK(k=2)), x), [1, 2, 8, 16]))
    whole = (x - x.mean(0)).square().sum()
    for k in (1, 2, 8, 16):
        left = x.sort(descending=True).values[:, k:].square().sum()
        assert found[f"fvu_topk.{k}"].value == pytest.approx(float(left / whole), abs=1e-6)
        kept = x.flatten().sort(descending=True).values[k * N :].square().sum()
        assert found[f"fvu_threshold.{k}"].value == pytest.approx(float(kept / whole), abs=1e-6)
        assert f"L0 {k}" in found[f"fvu_threshold.{k}"].note
    assert found["progressive_up_to"].value == 16


def test_where_a_code_stops_being_progressive():
    assert progressive_up_to([1, 2, 4, 8], [4.0, 3.0, 3.0, 3.5]) == 4
    assert progressive_up_to([1, 2, 4, 8], [4.0, 5.0, 1.0, 0.5]) == 1
    sae = orthonormal_sae(TopK(k=2))
    with torch.no_grad():
        sae.W_dec[8:] *= -1  # what the later half of the latents adds is wrong
    x = torch.cat([1 + torch.rand(N, 8), torch.rand(N, 8) / 2], 1)
    assert by_name(progressive_code(sample_of(sae, x), [2, 4, 8, 16]))["progressive_up_to"].value == 8


def test_other_ks_of_the_same_weights():
    sae = tiny_sae(D, activation="jumprelu")
    x = torch.randn(10, D)
    other = with_topk(sae, 3)
    assert other.W_dec is sae.W_dec
    torch.testing.assert_close(other.pre_acts(x), sae.pre_acts(x))
    assert ((other.encode(x) > 0).sum(-1) <= 3).all()
    threshold = thresholds_for(sample_of(sae, torch.randn(N, D)), [5])[0]
    assert threshold > 0


def test_what_no_code_can_be_measured_on():
    constant = sample_of(orthonormal_sae(ReLU()), torch.ones(N, D))
    with pytest.raises(ArgumentError, match="all 400 activations at s are the same"):
        progressive_code(constant)
    with pytest.raises(ArgumentError, match="from 1 to d_sae = 16"):
        progressive_code(constant, [0, 4])


# --- latents ----------------------------------------------------------------------------------------------------------


def test_effective_latents():
    assert effective_latents(torch.tensor([7, 7, 7, 7, 0])) == pytest.approx(4)
    assert effective_latents(torch.tensor([0, 0, 9])) == pytest.approx(1)


def test_cosines_of_planted_directions():
    W = torch.eye(5)
    W = torch.cat([W, torch.tensor([[3.0, 4.0, 0, 0, 0], [-1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])])
    values, nearest = max_cosine(W)
    torch.testing.assert_close(values[:3], torch.tensor([0.6, 0.8, 0.0]))
    assert nearest[:2].tolist() == [5, 5]
    assert values[6:].tolist() == [0, 0]


def test_quality_of_a_dictionary_with_duplicates():
    sae = orthonormal_sae(ReLU())
    with torch.no_grad():
        sae.W_dec[1] = sae.W_dec[0] + 0.01 * sae.W_dec[2]
        sae.W_enc[:, 3] *= -1
        sae.b_enc[4] = -100
    found = by_name(latent_quality(sample_of(sae, torch.eye(D).repeat(25, 1) - 0.5 * torch.eye(D)[3])))
    assert "15 of 16" in found["near_duplicates"].note  # latent 4 is switched off
    assert found["near_duplicates"].value == pytest.approx(2 / 15)
    counts = [25] * 14 + [375]  # latent 3 fires on all tokens but its own
    entropy = -sum(n / 725 * math.log(n / 725) for n in counts)
    assert found["uniformity"].value == pytest.approx(math.exp(entropy) / 15)
    aligned = alignment(sae)
    assert aligned is not None
    assert aligned[3] == pytest.approx(-1)
    assert found["encoder_decoder_cosine"].value == pytest.approx(1)


def test_the_interval_of_uniformity_holds_it():
    """Most latents are rare: a bootstrap over windows would miss them and lie wholly above."""
    x = torch.zeros(N, D)
    x[:, 0] = 1
    rare = torch.arange(N) % (N // WINDOWS) == 0
    x[rare, (torch.arange(N) * WINDOWS // N % (D - 1) + 1)[rare]] = 1
    found = by_name(latent_quality(sample_of(orthonormal_sae(ReLU()), x)))["uniformity"]
    assert found.low < found.value < found.high
    assert found.high - found.low < found.value


def test_latents_that_two_saes_share():
    a, b = orthonormal_sae(ReLU()), orthonormal_sae(ReLU())
    order = torch.randperm(D)
    with torch.no_grad():
        b.W_dec.copy_(3 * a.W_dec[order])
    matches = match_latents(a, b)
    assert order[matches.latent].tolist() == list(range(D))
    assert matches.shared.all()
    found = by_name(stability([a, b, a]))
    assert found["max_cosine"].value == pytest.approx(1)
    assert found["shared_latents"].value == 1.0
    with torch.no_grad():
        b.W_dec[:8] = a.W_dec[0] + 0.1 * a.W_dec[:8]  # eight copies: one partner only
    assert match_latents(b, a).shared[:8].sum() == 1


def test_saes_that_cannot_be_compared():
    with pytest.raises(ShapeError, match="width 16, the other of 8"):
        match_latents(tiny_sae(16), tiny_sae(8))
    with pytest.raises(ArgumentError, match="1 SAEs were given"):
        stability([tiny_sae(8)])
    with pytest.raises(ArgumentError, match="no alive latent"):
        match_latents(tiny_sae(8), tiny_sae(8), torch.tensor([], dtype=torch.long))


# --- compute ----------------------------------------------------------------------------------------------------------


def test_compute_equivalent_on_a_power_law():
    steps = [2**i for i in range(10)]
    losses = [2 + 3 * math.exp(-math.log(s) / 4) for s in steps]
    assert compute_equivalent(steps, losses, losses[-1]) == pytest.approx(1)
    assert compute_equivalent(steps, losses, losses[6]) == pytest.approx(2**6 / 2**9)
    between = compute_equivalent(steps, losses, (losses[6] + losses[7]) / 2)
    assert between == pytest.approx(2**-2.5)
    assert compute_equivalent(steps, losses, losses[-1] - 1e-3) > 1
    bumpy = [*losses[:5], 9.0, *losses[6:]]
    assert compute_equivalent(steps, bumpy, losses[6]) == pytest.approx(2**-3)


@pytest.mark.parametrize(
    ("steps", "losses", "spliced", "match"),
    [
        ([1], [3.0], 3.0, "at least 2"),
        ([2, 1], [3.0, 2.0], 2.5, "rising"),
        ([1, 2], [3.0, 2.0], 3.5, "earlier checkpoint"),
        ([1, 2], [3.0, math.nan], 2.5, "NaN"),
        ([1, 2], [3.0, 3.0], 2.5, "falls at no checkpoint"),
    ],
)
def test_curves_that_say_nothing(steps, losses, spliced, match):
    with pytest.raises(ArgumentError, match=match):
        compute_equivalent(steps, losses, spliced)


def test_parts_of_a_sample():
    sample = sample_of(tiny_sae(D), torch.randn(N, D))
    thin, whole = sample.thinned(N // 4), sample.some_windows(N // 4)
    assert len(thin) == len(whole) == N // 4
    assert whole.row.unique().tolist() == [0, 4, 8, 12, 16]
    assert thin.row.unique().tolist() == list(range(WINDOWS))
    assert torch.equal(thin.x, sample.x[::4])
    assert len(sample.by_window(torch.ones(N))) == WINDOWS
    assert whole.by_window(torch.ones(len(whole))).tolist() == [20.0] * 5
    assert dataclasses.replace(sample, windows=30).by_window(torch.ones(N)).sum() == N
