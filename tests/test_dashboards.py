"""Facts about latents, compared with what the weights and single runs say."""

from __future__ import annotations

import json

import pytest
import torch
from app_fixtures import SITES, SPECIAL, tiny

from saehook import ablate
from saehook.dashboards import CONTEXT_TOKENS, ablate_contexts, bars, latent_card, scan_latent
from saehook.errors import ArgumentError, LatentError, SiteError

TEXTS = ["hello, world", "abc", f"the quick brown fox{SPECIAL}jumps", "zzzz", "lazy dogs, and so on and on and on"]


def test_a_card_says_what_the_weights_say():
    card, sae = latent_card(tiny(), 5, SITES[0], n=4), tiny().saes[SITES[0]]
    rows = torch.nn.functional.normalize(sae.W_dec, dim=-1)
    cosines = rows @ rows[5]
    order = [i for i in cosines.argsort(descending=True).tolist() if i != 5][:4]
    assert [n.latent for n in card.neighbours] == order
    assert [n.cosine for n in card.neighbours] == pytest.approx(cosines[order].tolist(), abs=1e-6)
    logits = tiny().lm.lm_head.weight @ sae.W_dec[5]
    assert [t.id for t in card.raises] == logits.topk(4).indices.tolist()
    assert [t.logit for t in card.lowers] == pytest.approx(logits.topk(4, largest=False).values.tolist(), abs=1e-5)
    assert (card.density, card.max_act, card.measured_tokens, card.status) == (0.125, 2.0, 1000, "dense")
    assert card.encoder_decoder_cosine == pytest.approx(1.0), "a new SAE's encoder is its decoder"
    data = json.loads(json.dumps(card.to_data(), allow_nan=False))
    assert data["neighbours"][0] == {"latent": order[0], "cosine": card.neighbours[0].cosine}


def test_a_card_without_statistics():
    card = latent_card(tiny(), 5, SITES[1])
    assert (card.density, card.max_act, card.status, card.quantiles) == (None, None, "unknown", {})


def test_a_scan_finds_where_a_latent_fires():
    rows = tiny().latents(TEXTS, SITES[0])
    acts = torch.cat([row.acts[row.mask] for row in rows])
    latent = int((acts > 0).sum(0).argmax())
    *_, scan = scan_latent(tiny(), latent, TEXTS, SITES[0], n_top=2, n_parts=2, n_sampled=1, windows_at_once=2)
    assert (scan.tokens, scan.fired) == (len(acts), int((acts[:, latent] > 0).sum()))
    assert scan.max_act == float(acts[:, latent].max())
    assert scan.done == 1
    assert sum(bar.tokens for bar in scan.histogram) == scan.fired
    peaks = [(float((row.acts[:, latent] * row.mask).max()), i) for i, row in enumerate(rows)]
    best = sorted((peak for peak in peaks if peak[0] > 0), key=lambda peak: (-peak[0], peak[1]))
    assert [(context.activations[context.peak], context.window) for context in scan.top] == best[:2]
    for context in scan.top:
        row = rows[context.window]
        start = context.position - context.peak
        assert context.ids == row.ids[start : start + len(context.ids)].tolist()
        assert len(context.ids) <= 2 * CONTEXT_TOKENS + 1
    for low, high, contexts in scan.sampled:
        assert all(low < context.activations[context.peak] <= high for context in contexts)
    json.dumps(scan.to_data(), allow_nan=False)


def test_a_scan_tells_how_far_it_is_and_can_be_left():
    scans = scan_latent(tiny(), 3, TEXTS, SITES[0], windows_at_once=2)
    assert next(scans).done == pytest.approx(0.4)
    scans.close()
    with pytest.raises(ArgumentError, match="no text to read"):
        next(scan_latent(tiny(), 3, [], SITES[0]))
    with pytest.raises(LatentError, match="96 is outside"):
        next(scan_latent(tiny(), 96, TEXTS, SITES[0]))
    with pytest.raises(SiteError, match="several SAEs"):
        latent_card(tiny(), 3)


def test_ablating_a_latent_on_its_contexts_is_what_the_loss_says():
    texts = [f"{text} and then" for text in TEXTS]
    row = tiny().latents(texts[0], SITES[0])
    latent = row.top(1)[0].latent
    *_, scan = scan_latent(tiny(), latent, texts, SITES[0], n_top=2, n_parts=1, n_sampled=1)
    steps = list(ablate_contexts(tiny(), scan))
    windows = {one.window for one in [*scan.top, *scan.sampled[0][2]]}
    assert len(steps) == len(windows)
    assert len(scan.top) > 1
    assert steps[0].top[0].mean_change is not None
    assert steps[0].top[1].mean_change is None
    assert all(one.mean_change is not None for one in steps[-1].sampled[0][2])
    for context in steps[-1].top:
        ids = [*context.before, *context.ids]
        losses = [tiny().loss(ids, edits) for edits in (ablate(latent, site=SITES[0]), ())]
        known = [one for one in context.loss_change or () if one is not None]
        if not context.before:
            assert context.mean_change == pytest.approx(losses[0] - losses[1], abs=1e-5)
        assert len(known) == len(context.ids) - (not context.before), "nothing predicts the first token of a window"
    json.dumps(steps[-1].to_data(), allow_nan=False)


def test_bars_are_as_wide_as_each_other_in_the_logarithm():
    assert bars(torch.zeros(0)) == []
    found = bars(torch.tensor([1.0, 1.1, 1.5, 8.0]))
    assert [bar.tokens for bar in found] == [2, 1, 0, 0, 0, 0, 1]
    assert found[0].low == 1
    assert all(bar.high / bar.low == pytest.approx(2**0.5) for bar in found)
