"""What a model makes of a text, compared with its single runs."""

from __future__ import annotations

import math

import pytest
import torch
from app_fixtures import SITES, SPECIAL, tiny
from torch.nn.functional import cross_entropy

from saehook import ablate, steer
from saehook.errors import ArgumentError
from saehook.inspection import ablation_effects, inspect_text

TEXT = f"hello, {SPECIAL}world"


def test_latents_are_those_of_the_library():
    facts, latents = inspect_text(tiny(), TEXT, SITES[0]), tiny().latents(TEXT, SITES[0])
    assert facts.ids == latents.ids.tolist()
    assert facts.mask == latents.mask.tolist()
    assert facts.l0.tolist() == latents.l0().tolist()
    hits, n_active = facts.strongest(20)
    assert hits == latents.top(20)
    assert n_active == len(latents.top(96))
    assert facts.strongest(5, 7, 8)[0] == latents.at(7, 5), "also outside the mask, where it is asked for alone"
    assert torch.equal(facts.activations_of(hits[0].latent), latents.acts[:, hits[0].latent])
    some, n = facts.strongest(96, 5, 9)
    assert {hit.position for hit in some} <= {5, 6, 8}
    assert n == len(some)
    with pytest.raises(ArgumentError, match="the text has 13"):
        facts.strongest(1, 3, 14)


def test_losses_and_divergences_are_those_of_single_runs():
    edit = steer(3, 2.0, site=SITES[0])
    facts = inspect_text(tiny(), TEXT, SITES[0], edit)
    ids = torch.tensor(facts.ids)
    runs = {"": tiny()(TEXT), "_spliced": tiny()(TEXT, splice=True), "_edited": tiny()(TEXT, edit)}
    with torch.no_grad():
        logits = {name: output.logits[0].detach() for name, output in runs.items()}
        for name, values in logits.items():
            losses = getattr(facts, f"loss{name}")
            assert math.isnan(losses[0])
            torch.testing.assert_close(losses[1:], cross_entropy(values[:-1], ids[1:], reduction="none"))
        for name in ("_spliced", "_edited"):
            p, q = logits[""].double().log_softmax(-1), logits[name].double().log_softmax(-1)
            torch.testing.assert_close(
                getattr(facts, f"kl{name}"), (p.exp() * (p - q)).sum(-1).float(), atol=1e-6, rtol=1e-4
            )
    assert facts.report.edits[0].tokens == 12
    after = facts.next_tokens[4]
    p, q = (logits[name][4].softmax(-1) for name in ("", "_edited"))
    assert {token.id for token in after} == {*p.topk(10).indices.tolist(), *q.topk(10).indices.tolist()}
    assert [token.clean for token in after] == pytest.approx([float(p[token.id]) for token in after])
    assert [token.edited for token in after] == pytest.approx([float(q[token.id]) for token in after])


def test_an_effect_is_what_ablation_changes_to_first_order():
    facts = inspect_text(tiny(), TEXT, SITES[0])
    clean = tiny().loss(TEXT)
    exact = {latent: tiny().loss(TEXT, ablate(latent, site=SITES[0])) - clean for latent in facts.effects}
    largest = sorted(exact, key=lambda latent: -abs(exact[latent]))[:5]
    assert [math.copysign(1, facts.effects[i]) for i in largest] == [math.copysign(1, exact[i]) for i in largest]


def test_a_measured_effect_is_what_ablation_changes(monkeypatch):
    latents = sorted(inspect_text(tiny(), TEXT, SITES[0]).effects)[:7]
    clean = tiny().loss(TEXT)
    expected = {latent: tiny().loss(TEXT, ablate(latent, site=SITES[0])) - clean for latent in latents}
    assert clean < 8, "so that float32 has it to 5e-7, and differences of two of them, in two ways, to 2e-6"
    assert max(map(abs, expected.values())) > 1e-3
    assert ablation_effects(tiny(), TEXT, SITES[0], latents) == pytest.approx(expected, abs=2e-6)
    monkeypatch.setattr("saehook.inspection.MAX_NUMBERS", 3 * 257 * len(TEXT))  # a batch of two, beside the clean row
    assert ablation_effects(tiny(), TEXT, SITES[0], latents) == pytest.approx(expected, abs=2e-6)
    assert ablation_effects(tiny(), "a", SITES[0], latents) == {}
    with pytest.raises(ArgumentError, match="takes one row"):
        ablation_effects(tiny(), ["a", "b"], SITES[0], latents)


def test_the_error_is_a_share_of_the_activation():
    facts, sae = inspect_text(tiny(), TEXT, SITES[0]), tiny().saes[SITES[0]]
    with tiny().trace(TEXT):
        x = tiny().at(SITES[0]).input.save()
    x = x[0].detach()
    with torch.no_grad():
        error = (x - sae(x).x_hat).square().sum(-1) / x.square().sum(-1)
    error[~torch.tensor(facts.mask)] = torch.nan
    torch.testing.assert_close(facts.error, error, equal_nan=True)


def test_one_row_only():
    with pytest.raises(ArgumentError, match="takes one row"):
        inspect_text(tiny(), [TEXT, TEXT], SITES[0])
    assert inspect_text(tiny(), "x", SITES[0]).effects == {}
