"""Splice-in evaluation against the same numbers computed with plain torch hooks."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from builders import tiny_sae

import saehook
from saehook import SAE, ReLU, SAEConfig, TopK
from saehook.corpus import Document
from saehook.errors import ArgumentError
from saehook.eval_result import EvalResult
from saehook.evaluation import evaluate
from saehook.latent_stats import measure_stats
from saehook.sae import QUANTILE_LEVELS
from saehook.tokenization import keep_mask, special_ids, windows

RESID, MLP = "layers.2.resid_post", "layers.3.mlp_out"


@pytest.fixture(scope="module")
def model():
    return saehook.HookedModel.from_pretrained(saehook.bundled("lm"))


@pytest.fixture(scope="module")
def text(model):
    body = "def mean(values):\n    return sum(values) / len(values)\n\n\nclass Stack:\n    pass\n" * 30
    return windows([Document("a", body), Document("b", "She looked out of the window. " * 60)], model.tokenizer, 64)


def random_sae(seed: int) -> SAE:
    config = SAEConfig(d_in=256, d_sae=512, activation=TopK(k=12))
    return SAE(config, generator=torch.Generator().manual_seed(seed))


def identity_sae() -> SAE:
    sae = SAE(SAEConfig(d_in=256, d_sae=512, activation=ReLU()))
    eye = torch.eye(256)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
    return sae


@torch.no_grad()
def by_hand(model, ids, writes):
    """Mean loss and log-probabilities with `writes` {module: function of x} applied on the mask."""
    mask = keep_mask(ids, None, special_ids(model.tokenizer))

    def hook_of(f):
        return lambda module, inputs, x: torch.where(mask[..., None], f(x), x)

    handles = [model.lm.get_submodule(path).register_forward_hook(hook_of(f)) for path, f in writes.items()]
    log_probs = model.lm(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    counted = mask[:, :-1]
    loss = F.nll_loss(log_probs[counted], ids[:, 1:][counted])
    return loss.item(), log_probs[counted]


def activations(model, ids, path):
    seen = []
    handle = model.lm.get_submodule(path).register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        model.lm(input_ids=ids)
    handle.remove()
    return seen[0][keep_mask(ids, None, special_ids(model.tokenizer))]


def test_every_number_equals_plain_torch(model, text):
    saes = {RESID: random_sae(0), MLP: random_sae(1)}
    paths = {RESID: "model.layers.2", MLP: "model.layers.3.mlp"}
    hooked = model.attach(saes)
    result = evaluate(hooked, text, names={RESID: "r"}, progress=False)
    hooked.detach()
    assert [(row.sae, row.site) for row in result.results] == [("r", RESID), (MLP, MLP), ("all", "all")]
    ids = text.ids
    clean, clean_log_probs = by_hand(model, ids, {})
    xs = {site: activations(model, ids, path) for site, path in paths.items()}
    outs = {site: saes[site](xs[site]) for site in saes}

    def splice(site):
        return lambda x: saes[site](x).x_hat

    for row in result.results:
        sites = list(saes) if row.site == "all" else [row.site]
        spliced, log_probs = by_hand(model, ids, {paths[s]: splice(s) for s in sites})
        zero, _ = by_hand(model, ids, {paths[s]: torch.zeros_like for s in sites})
        mean, _ = by_hand(model, ids, {paths[s]: lambda x, s=s: xs[s].mean(0).expand_as(x) for s in sites})
        kl = (clean_log_probs.exp() * (clean_log_probs - log_probs)).sum(-1).mean().item()
        expected = {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "ce_zero": zero,
            "ce_mean": mean,
            "delta_ce": spliced - clean,
            "ce_recovered_zero": (zero - spliced) / (zero - clean),
            "ce_recovered_mean": (mean - spliced) / (mean - clean),
            "kl": kl,
            "l0": sum((outs[s].acts != 0).float().sum(-1).mean().item() for s in sites),
            "fvu": sum((outs[s].x_hat - xs[s]).square().sum().item() for s in sites)
            / sum((xs[s] - xs[s].mean(0)).square().sum().item() for s in sites),
            "dead_share": sum((outs[s].acts == 0).all(0).float().sum().item() for s in sites) / (512 * len(sites)),
            "tokens": len(xs[RESID]),
        }
        for name, value in expected.items():
            assert getattr(row, name) == pytest.approx(value, rel=2e-4, abs=2e-5), (row.site, name)


def test_the_identity_loses_nothing_and_ablation_does(model, text):
    hooked = model.attach({RESID: identity_sae()})
    row = evaluate(hooked, text, progress=False).results[0]
    hooked.detach()
    assert abs(row.delta_ce) < 1e-5
    assert abs(row.kl) < 1e-6
    assert row.fvu == pytest.approx(0, abs=1e-10)
    assert row.ce_recovered_zero == pytest.approx(1, abs=1e-4)
    assert row.ce_zero > row.ce_clean + 0.5
    assert row.ce_mean > row.ce_clean + 0.5


def test_kl_is_from_clean_to_spliced_and_not_back(model, text):
    hooked = model.attach({RESID: random_sae(3)})
    row = evaluate(hooked, text, progress=False).results[0]
    hooked.detach()
    _, clean = by_hand(model, text.ids, {})
    sae = hooked.saes[RESID]
    _, spliced = by_hand(model, text.ids, {"model.layers.2": lambda x: sae(x).x_hat})
    forward = (clean.exp() * (clean - spliced)).sum(-1).mean().item()
    backward = (spliced.exp() * (spliced - clean)).sum(-1).mean().item()
    assert abs(forward - backward) > 0.01
    assert row.kl == pytest.approx(forward, rel=1e-3)


def test_batching_changes_nothing(model, text, monkeypatch):
    hooked = model.attach({RESID: random_sae(0)})
    one = evaluate(hooked, text, progress=False).results[0]
    monkeypatch.setattr("saehook.evaluation.BATCH_TOKENS", 1)
    two = evaluate(hooked, text, progress=False).results[0]
    hooked.detach()
    for name, value in vars(one).items():
        if isinstance(value, float):
            assert value == pytest.approx(getattr(two, name), rel=1e-4, abs=1e-6), name
    assert one.tokens == two.tokens


def test_json_round_trip_and_provenance(model, text):
    hooked = model.attach({RESID: random_sae(0)})
    result = evaluate(hooked, text, progress=False)
    hooked.detach()
    data = json.loads(result.to_json())
    assert set(data) == {"results", "provenance"}
    assert set(data["results"][0]) >= {
        "sae", "site", "tokens", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "delta_ce", "ce_recovered_zero",
        "ce_recovered_mean", "kl", "fvu", "l0", "dead_share",
    }  # fmt: skip
    assert EvalResult.from_json(result.to_json()) == result
    assert data["provenance"]["text"]["sha256"] == text.text_sha256
    assert data["provenance"]["lm"]["id"] == "lm"
    assert data["provenance"]["text"]["ids"] == text.ids.numel()
    assert RESID in result.table()


@pytest.mark.parametrize("ids", [torch.zeros(0, 8), torch.ones(3, 1), torch.zeros(2, 8), torch.ones(8)])
def test_windows_that_cannot_be_measured(model, ids):
    hooked = model.attach({RESID: random_sae(0)})
    with pytest.raises(ArgumentError):
        evaluate(hooked, ids.long(), progress=False)
    hooked.detach()


@torch.no_grad()
def test_stats_are_those_of_all_activations_together(model, text):
    sae = random_sae(0)
    hooked = model.attach({RESID: sae})
    stats = measure_stats(hooked, text, progress=False)[RESID]
    hooked.detach()
    acts = sae.encode(activations(model, text.ids, "model.layers.2"))
    torch.testing.assert_close(stats.max_act, acts.amax(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.mean_act, acts.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stats.density, (acts > 0).float().mean(0), rtol=0, atol=2 / len(acts))
    assert stats.tokens == len(acts)
    assert math.isfinite(stats.max_act.sum().item())
    x = activations(model, text.ids, "model.layers.2")
    error = (x.double() - sae(x).x_hat.double()).mean(0)
    torch.testing.assert_close(stats.mean_error, error.float(), rtol=1e-4, atol=1e-5 * float(error.abs().max()))
    levels = torch.tensor(QUANTILE_LEVELS)
    assert stats.quantiles is not None
    fired = (acts > 0).sum(0) > 50
    assert fired.sum() > 20
    for latent in fired.nonzero().view(-1).tolist():
        column = acts[:, latent]
        torch.testing.assert_close(stats.quantiles[latent], column[column > 0].quantile(levels), rtol=0.08, atol=0)


@torch.no_grad()
def test_stats_of_an_sae_that_normalises_tokens(model, text):
    sae = tiny_sae(256, normalize="layer_norm")
    hooked = model.attach({RESID: sae})
    stats = measure_stats(hooked, text.ids[:3], progress=False)[RESID]
    hooked.detach()
    x = activations(model, text.ids[:3], "model.layers.2")
    error = (x.double() - sae(x).x_hat.double()).mean(0).float()
    torch.testing.assert_close(stats.mean_error, error, rtol=1e-4, atol=1e-5)
