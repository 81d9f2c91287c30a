"""Splice-in evaluation on tiny models: what is exact, what is refused, and what is said of bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import reference_hooks as reference
import torch
import torch.nn.functional as F
from builders import BOS, VOCAB, WIDTH, build_lm, byte_tokenizer, identity_sae, random_ids, tiny_sae

from saehook.config import MaskRule, ReLU, SAEConfig
from saehook.errors import ArgumentError, SiteError
from saehook.eval_result import EvalResult
from saehook.evaluation import evaluate
from saehook.hooked_model import HookedModel
from saehook.sae import SAE

SITE, LATER = "layers.1.resid_post", "layers.2.mlp_out"
IDS = torch.tensor([random_ids(20, seed=seed, bos=True) for seed in range(14)])
COUNTED = (IDS != BOS)[:, :-1]


def numbers(row: Any) -> dict[str, Any]:
    return {name: value for name, value in row.numbers().items() if name not in ("sae", "site")}


def close(a: Any, b: Any, tolerance: float = 1e-6) -> None:
    """All numbers of two rows."""
    assert numbers(a) == {name: pytest.approx(value, abs=tolerance) for name, value in numbers(b).items()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in ("llama", "gpt2", "gpt_neo", "opt")] + [("gemma2", torch.bfloat16)],
)
def test_an_identity_sae_gives_the_clean_loss_bit_for_bit(name, dtype):
    model = HookedModel(build_lm(name, dtype=dtype), byte_tokenizer())
    site = SITE if name != "opt" else "model.decoder.layers.1:output"
    result = evaluate(model.attach({site: identity_sae()}), IDS, progress=False)
    (row,) = result.results
    assert row.ce_spliced == row.ce_clean
    assert row.kl == 0
    assert row.top1 == row.ce_recovered_zero == 1
    assert row.intervals["delta_ce"] == (0, 0)
    assert result.provenance["identity"] == {"nats": 0, "bit_equal": True}
    assert result.provenance["shared_layers"] == {site: 0 if name == "opt" else 2}
    assert result.provenance["logits"] == "in chunks"


def test_a_model_that_is_not_the_same_twice_is_refused():
    model = HookedModel(build_lm("gpt2"), byte_tokenizer())
    hooked = model.attach({SITE: tiny_sae()})
    model.lm.train()  # dropout
    with pytest.raises(ArgumentError, match=r"with x in place of x .* Call lm\.eval"):
        evaluate(hooked, IDS, progress=False)
    model.lm.eval()
    assert evaluate(hooked, IDS, progress=False).results


def test_layers_that_are_shared_change_no_number(models_by_name, monkeypatch):
    model, _ = models_by_name("llama")
    hooked = model.attach({SITE: tiny_sae(seed=1), LATER: tiny_sae(seed=2)})
    shared = evaluate(hooked, IDS, progress=False)
    monkeypatch.setattr("saehook.evaluation.layers_before", lambda lm, site: 0)
    whole = evaluate(hooked, IDS, progress=False)
    hooked.detach()
    assert shared.results == whole.results
    assert (shared.provenance["shared_layers"], whole.provenance["shared_layers"]) == (
        {SITE: 2, LATER: 2},
        {SITE: 0, LATER: 0},
    )


def test_runs_scored_one_by_one_and_small_batches_change_no_number(models_by_name, monkeypatch):
    model, _ = models_by_name("llama")
    hooked = model.attach({SITE: tiny_sae(seed=1), LATER: tiny_sae(seed=2)})
    rows = evaluate(hooked, IDS, progress=False).results
    monkeypatch.setattr("saehook.evaluation.MAX_STATES", 1)
    monkeypatch.setattr("saehook.evaluation.BATCH_TOKENS", 70)
    for row, other in zip(rows, evaluate(hooked, IDS, progress=False).results, strict=True):
        close(row, other, 1e-5)
    hooked.detach()


def test_several_saes_of_one_site(models_by_name):
    """A row each, the ablations shared, no joint row; the same numbers as alone."""
    model, _ = models_by_name("llama")
    saes = [tiny_sae(seed=1), tiny_sae(seed=2, d_sae=64), identity_sae()]
    saes[1].mask_rule = MaskRule(skip_first_tokens=3)
    together = model.attach({SITE: saes})
    rows = evaluate(together, IDS, names={f"{SITE}#1": "second"}, progress=False).results
    together.detach()
    assert [(row.sae, row.site) for row in rows] == [
        (f"{SITE}#0", SITE), ("second", SITE), (f"{SITE}#2", SITE)
    ]  # fmt: skip
    assert rows[0].ce_zero == rows[2].ce_zero != rows[1].ce_zero
    assert rows[1].tokens == rows[0].tokens - 2 * len(IDS), "BOS is one of the first three"
    for sae, row in zip(saes, rows, strict=True):
        alone = model.attach({SITE: sae})
        close(row, evaluate(alone, IDS, progress=False).results[0])
        alone.detach()


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    """[rows, length - 1]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), IDS[:, 1:].flatten(), reduction="none").view(
        COUNTED.shape
    )


@torch.no_grad()
def test_the_joint_row_is_the_spliced_model_and_agreement_and_positions_are_by_hand(models_by_name):
    """One SAE reads where another writes, one is a transcoder that reads there, too."""
    model, lm = models_by_name("llama")
    transcoder = SAE(
        SAEConfig(d_in=WIDTH, d_out=WIDTH, d_sae=40, activation=ReLU(), subtract_b_dec=False),
        generator=torch.Generator().manual_seed(5),
    )
    transcoder.site_out = LATER
    hooked = model.attach({SITE: tiny_sae(seed=1), "layers.2.mlp_in": [tiny_sae(seed=2), transcoder]})
    result = evaluate(hooked, IDS, progress=False)
    joint = result.results[-1]
    clean, spliced = lm(IDS, use_cache=False).logits, hooked(IDS, splice=True).logits
    hooked.detach()
    ce = {"ce_clean": loss_of(clean), "ce_spliced": loss_of(spliced)}
    for name, losses in ce.items():
        assert getattr(joint, name) == pytest.approx(losses[COUNTED].mean().item(), abs=1e-5)
    agrees = (clean.argmax(-1) == spliced.argmax(-1))[:, :-1][COUNTED]
    assert joint.top1 == pytest.approx(agrees.float().mean().item(), abs=1e-6)
    assert joint.top1 is not None
    assert 0 < joint.top1 < 1
    block = joint.extra["positions"]
    assert block["position"] == list(range(1, 20))
    assert block["tokens"] == [14] * 19
    assert block["ce_spliced"] == pytest.approx(ce["ce_spliced"].mean(0)[1:].tolist(), abs=1e-5)
    low, high = joint.intervals["ce_clean"]
    assert low < joint.ce_clean < high
    assert joint.windows == 14


def test_few_windows_have_wide_intervals_and_one_has_none(models_by_name):
    model, _ = models_by_name("llama")
    hooked = model.attach({SITE: tiny_sae()})
    one, few, more = (evaluate(hooked, IDS[:n], progress=False) for n in (1, 3, 14))
    hooked.detach()
    assert not one.results[0].intervals
    assert "1 window is too few" in one.table()
    assert "3 windows are too few for a bootstrap" in few.table()
    (low, high), (lower, upper) = (found.results[0].intervals["kl"] for found in (few, more))
    assert high - low > upper - lower


def test_a_seed_decides_the_intervals_and_nothing_else(models_by_name):
    model, _ = models_by_name("llama")
    hooked = model.attach({SITE: tiny_sae()})
    one, same, other = (evaluate(hooked, IDS, seed=seed, progress=False) for seed in (1, 1, 2))
    hooked.detach()
    assert one == same
    assert one.results[0].intervals != other.results[0].intervals
    assert one.results[0].numbers() == other.results[0].numbers()
    assert one.provenance["intervals"]["seed"] == 1


def test_an_sae_of_another_language_model(models_by_name):
    model, _ = models_by_name("llama")
    sae = tiny_sae(site=SITE)
    sae.metadata["fingerprint"] = model.fingerprint(SITE, sae, IDS[0])
    hooked = model.attach(sae)
    assert evaluate(hooked, IDS, progress=False).provenance["saes"][SITE]["fingerprint"] == "fits"
    hooked.detach()
    other_lm = build_lm("llama", seed=7)
    with torch.no_grad():
        other_lm.model.embed_tokens.weight.mul_(30)
        other_lm.model.layers[1].mlp.down_proj.weight.mul_(30)
    other = HookedModel(other_lm, byte_tokenizer()).attach(sae)
    with pytest.raises(SiteError, match="another model"):
        evaluate(other, IDS, progress=False)
    assert evaluate(other, IDS, check="off", progress=False).provenance["saes"][SITE]["fingerprint"] == "not checked"
    with pytest.raises(ArgumentError, match="check='maybe'"):
        evaluate(other, IDS, check="maybe", progress=False)


def test_activations_that_are_not_finite_are_counted_and_not_averaged():
    """A token whose embedding is NaN; what comes after it in its window has no loss."""
    lm = build_lm("llama")
    bad = 77
    with torch.no_grad():
        lm.model.embed_tokens.weight[bad] = math.nan
    ids = IDS.clone()
    ids[ids == bad] = bad + 1
    hooked = HookedModel(lm, byte_tokenizer()).attach({"layers.0.resid_pre": tiny_sae(), SITE: tiny_sae()})
    assert not any(row.nan_tokens or row.nan_losses for row in evaluate(hooked, ids, progress=False).results)
    ids[1, 12] = ids[3, 5] = bad
    rows = evaluate(hooked, ids, progress=False).results
    ordinary = ids != BOS
    with torch.no_grad():
        broken = {
            site: ~reference.read(lm, site, ids).isfinite().all(-1) & ordinary for site in ("layers.0.resid_pre", SITE)
        }
        lost = ~lm(ids, use_cache=False).logits.isfinite().all(-1)
    assert broken["layers.0.resid_pre"].sum() == 2 < broken[SITE].sum()
    broken["both"] = broken["layers.0.resid_pre"] | broken[SITE]
    for row, site in zip(rows, broken, strict=True):
        assert row.nan_tokens == broken[site].sum()
        assert row.tokens == (ordinary & ~broken[site]).sum()
        assert row.nan_losses == (ordinary & ~broken[site] & lost)[:, :-1].sum()
        assert all(math.isfinite(value) for value in numbers(row).values() if isinstance(value, float))
        assert f"{row.nan_tokens} tokens have activations that are not finite" in EvalResult([row]).table()
    assert rows[0].nan_losses > 0
    with torch.no_grad():
        lm.model.embed_tokens.weight.fill_(math.nan)
    with pytest.raises(ArgumentError, match="activations of .* tokens are not finite"):
        evaluate(hooked, IDS, progress=False)


def test_a_loss_that_is_nowhere_finite():
    lm = build_lm("llama")
    with torch.no_grad():
        lm.lm_head.weight[:] = math.nan
    hooked = HookedModel(lm, byte_tokenizer()).attach({SITE: tiny_sae()})
    with pytest.raises(ArgumentError, match="nowhere finite"):
        evaluate(hooked, IDS, progress=False)


def test_ids_that_the_model_does_not_have(models_by_name):
    model, _ = models_by_name("llama")
    hooked = model.attach({SITE: tiny_sae()})
    with pytest.raises(ArgumentError, match=f"vocabulary has {VOCAB}"):
        evaluate(hooked, IDS + VOCAB, progress=False)
    hooked.detach()
