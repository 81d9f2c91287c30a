"""Training on made-up activations: scale folding, dead counters, thresholds, what goes wrong and how it is said."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from planted import D_IN, SITE, planted
from torch import Tensor

from saehook.activation_fns import batch_topk
from saehook.batches import InputFacts, Stream, geometric_median
from saehook.calibration import Calibrator
from saehook.config import BatchTopK, SAEConfig, TopK, TrainConfig
from saehook.errors import ArgumentError, ShapeError, TrainingError
from saehook.metrics import Firing, Reconstruction
from saehook.sae import QUANTILE_LEVELS, SAE
from saehook.sae_run import SAERun
from saehook.trainer import Trainer

D_SAE = 96
LONG, FRESH = 120_000, 20_000
"""Tokens of the long run, and of its calibration."""


def config(activation: Any = None, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"d_sae": D_SAE, "tokens": 4096, "batch_tokens": 256, "calibration_tokens": 2048}
    return TrainConfig(site=SITE, activation=activation or BatchTopK(k=3), **settings | changes)


def chunks(x: Tensor, size: int = 700) -> Iterator[Tensor]:
    return iter(x.split(size))


def fit(*configs: TrainConfig, n: int = 8192, **options: Any) -> list[SAE]:
    return Trainer(configs, chunks(planted(n)[0]), d_in=D_IN, progress=False, **options).fit()


@pytest.fixture(scope="module")
def long_run() -> list[SAE]:
    """BatchTopK and TopK on the same planted tokens."""
    settings: dict[str, Any] = {"tokens": LONG, "lr": 1e-2, "batch_tokens": 300, "calibration_tokens": FRESH}
    return fit(config(BatchTopK(k=4), **settings), config(TopK(k=4), **settings), n=LONG + FRESH + 999)


@pytest.mark.parametrize("index", [0, 1])
def test_planted_directions_are_recovered(long_run, index):
    sae = long_run[index]
    x, directions = planted(20_000, seed=5)
    reconstruction, firing = Reconstruction(), Firing()
    with torch.no_grad():
        out = sae(x)
    reconstruction.update(x, out.x_hat)
    firing.update(out.acts)
    cosine = (directions @ sae.W_dec.detach().T).amax(-1)
    assert reconstruction.fvu < 0.11
    assert float((cosine > 0.95).double().mean()) > (0.5, 0.95)[index]
    assert firing.l0 == pytest.approx(4, rel=0.03)  # for BatchTopK: the calibrated threshold, on fresh data
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=-1), torch.ones(D_SAE))


@pytest.mark.parametrize("index", [0, 1])
def test_metadata_and_statistics(long_run, index):
    sae = long_run[index]
    assert sae.stats is not None
    metadata = json.loads(json.dumps(sae.metadata))
    assert sae.site == SITE
    assert metadata["tokens_seen"] == LONG
    assert metadata["training"]["steps"] == LONG // 300
    assert metadata["training"]["lr"] == 1e-2
    assert metadata["training"]["k_aux"] == D_IN // 2
    assert 0 <= metadata["training_metrics"]["dead_share"] < 0.7
    assert metadata["calibration"]["tokens"] == sae.stats.tokens == FRESH
    x = planted(LONG + FRESH + 999)[0][LONG : LONG + FRESH]
    with torch.no_grad():
        x_hat, acts, _ = sae(x)
    firing = Firing()
    firing.update(acts)
    assert firing.count is not None
    assert firing.maximum is not None
    assert firing.total is not None
    assert metadata["calibration"]["l0"] == pytest.approx(firing.l0, rel=1e-4)
    torch.testing.assert_close(sae.stats.density, (firing.count / FRESH).float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sae.stats.max_act, firing.maximum, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.stats.mean_act, (firing.total / FRESH).float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sae.mean_error(), (x.double() - x_hat).mean(0).float(), rtol=1e-3, atol=1e-4)
    fired = (firing.count > 100).nonzero().view(-1).tolist()
    assert len(fired) > D_IN / 2
    levels = torch.tensor(QUANTILE_LEVELS)
    expected = torch.stack([acts[:, latent][acts[:, latent] > 0].quantile(levels) for latent in fired])
    assert sae.stats.quantiles is not None
    torch.testing.assert_close(sae.stats.quantiles[fired], expected, rtol=0.08, atol=0)
    if index == 0:
        threshold = metadata["threshold"]
        assert threshold["source"] == "calibrated"
        assert threshold["calibrated_l0"] == pytest.approx(4, rel=0.005)
        assert threshold["running_mean_l0"] == pytest.approx(4, rel=0.1)
        torch.testing.assert_close(sae.threshold.detach(), torch.full((D_SAE,), threshold["calibrated"]))


def test_calibrator_is_exact_in_any_chunks(monkeypatch):
    monkeypatch.setattr("saehook.calibration.ENTRIES_AT_ONCE", 40 * 50)
    sae = SAE(SAEConfig(d_in=8, d_sae=40, activation=BatchTopK(k=4)), generator=torch.Generator().manual_seed(0))
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1))
    for limit in (1000, 600, 2000):  # enough tokens, more than enough, too few
        calibrator = Calibrator(sae, limit)
        for chunk in x.split(170):
            calibrator.update(chunk)
        result = calibrator.finish()
        assert result.tokens == min(limit, 1000)
        with torch.no_grad():
            fired = sae.encode(x[: result.tokens]) > 0
        assert int(fired.sum()) == pytest.approx(4 * result.tokens, abs=3)
        assert result.l0 == pytest.approx(4, abs=1e-3)


def test_calibrator_where_too_few_are_positive():
    sae = SAE(SAEConfig(d_in=8, d_sae=10, activation=BatchTopK(k=10)))
    calibrator = Calibrator(sae, 100)
    calibrator.update(torch.randn(100, 8))
    result = calibrator.finish()
    assert result.l0 is not None
    assert result.l0 < 10
    assert not sae.threshold.any()


def test_scale_is_folded():
    """The SAE on x does what the SAE in training did on c·x."""
    x = planted(2048)[0]
    facts = InputFacts.measure(x, SITE)
    assert float((x * facts.scale).square().sum(-1).mean()) == pytest.approx(1, rel=1e-5)
    run = SAERun(config(), "name", facts)
    for batch in x.split(256):
        run.step({SITE: batch})
    with torch.no_grad():
        acts = batch_topk((x * facts.scale - run.sae.b_dec) @ run.sae.W_enc + run.sae.b_enc, 3)
        x_hat = acts @ run.sae.W_dec + run.sae.b_dec
        sae = run.finish()
        raw_acts = batch_topk(sae.pre_acts(x), 3)
        torch.testing.assert_close(raw_acts * facts.scale, acts, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sae.decode(raw_acts) * facts.scale, x_hat, rtol=1e-4, atol=1e-5)
    assert sae.W_enc.is_contiguous()
    assert float(sae.threshold.detach()[0]) > 0
    assert sae.metadata["input_scale"] == facts.scale


def test_start():
    x = planted(2048)[0]
    run = SAERun(config(seed=3), "name", InputFacts.measure(x, SITE))
    expected = SAE(run.sae.config, generator=torch.Generator().manual_seed(3))
    assert torch.equal(run.sae.W_dec, expected.W_dec)
    assert torch.equal(run.sae.W_enc, expected.W_dec.T)
    assert torch.equal(run.sae.b_dec, geometric_median(x * run.facts.scale))
    assert not run.sae.b_enc.any()


def test_geometric_median():
    square = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0], [1.0, 1.0]])
    torch.testing.assert_close(geometric_median(square), torch.tensor([1.0, 1.0]))
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])  # all sides seen under 120 degrees
    torch.testing.assert_close(geometric_median(triangle), torch.tensor([0.5, 3**0.5 / 6]))
    outlier = torch.cat([torch.randn(99, 2) * 0.01, torch.tensor([[1e3, 0.0]])])
    assert float(geometric_median(outlier).norm()) < 0.05


def test_dead_latents_are_counted_in_tokens():
    x = planted(2048)[0]
    run = SAERun(config(TopK(k=3), dead_after_tokens=600), "name", InputFacts.measure(x, SITE))
    run.sae.b_enc.data[:5] = -100  # these never fire
    run.sae.b_enc.data[5] = 100  # this one always does
    for i, batch in enumerate(x.split(256)[:4]):
        run.step({SITE: batch})
        assert run.tokens_since_fired[:5].tolist() == [256 * (i + 1)] * 5
        assert run.tokens_since_fired[5] == 0
        assert (run.tokens_since_fired % 256 == 0).all()
        assert set(range(5)) <= set(run.dead.tolist()) if i >= 2 else run.dead.numel() == 0
    assert 5 not in run.dead


def test_the_file_says_which_latents_were_silent_in_the_end(monkeypatch):
    """On at least so many tokens, in whole steps; on all where there were fewer."""
    for wanted, tokens, silent in ((1_000_000, 1024, 5), (1024, 1024, 5), (600, 768, 8), (256, 256, 8)):
        monkeypatch.setattr("saehook.sae_run.DEAD_TOKENS", wanted)
        run = SAERun(config(TopK(k=3)), "name", InputFacts.measure(planted(2048)[0], SITE))
        run.steps = 4
        run.tokens_since_fired[:8] = torch.tensor([1024] * 5 + [768] * 3)
        assert run.finish().metadata["dead_at_the_end"] == {"tokens": tokens, "share": silent / D_SAE}


def test_dead_latents_come_back():
    x = planted(20_000)[0]
    facts = InputFacts.measure(x, SITE)
    runs = [
        SAERun(config(TopK(k=3), lr=1e-2, dead_after_tokens=1000, tokens=20_000, auxk_coefficient=c), "n", facts)
        for c in (0.0, 1 / 32)
    ]
    for run in runs:
        run.sae.W_enc.data[:, :40] *= 0.02  # never among the largest of a token
        for batch in x.split(250):
            run.step({SITE: batch})
    dead = [int(run.is_dead[:40].sum()) for run in runs]
    assert dead[1] < dead[0] / 2, dead


def test_running_mean_of_the_threshold():
    x = planted(1024)[0]
    run = SAERun(config(threshold_beta=0.5), "name", InputFacts.measure(x, SITE))
    expected = None
    for i, batch in enumerate(x.split(256)):
        with torch.no_grad():
            acts = batch_topk((batch * run.facts.scale - run.sae.b_dec) @ run.sae.W_enc + run.sae.b_enc, 3)
        smallest = float(acts[acts > 0].min())
        beta = min(0.5, i / (i + 10))
        expected = smallest if expected is None else beta * expected + (1 - beta) * smallest
        run.step({SITE: batch})
        assert float(run.threshold) == pytest.approx(expected, rel=1e-4)
    assert run.threshold.dtype == torch.float32


@pytest.mark.parametrize("activation", [TopK(k=3), BatchTopK(k=3)])
def test_sparse_and_dense_training_agree(monkeypatch, activation):
    results = []
    for kernel in ("reference", "sparse"):
        monkeypatch.setenv("SAEHOOK_KERNELS", kernel)
        (sae,) = fit(config(activation, dead_after_tokens=500))
        results.append(sae)
    for name, tensor in results[0].named_parameters():
        torch.testing.assert_close(tensor, dict(results[1].named_parameters())[name], rtol=1e-3, atol=2e-3, msg=name)


def test_seed_decides_everything():
    first, again, other = fit(config()), fit(config()), fit(config(seed=1))
    for name, tensor in first[0].named_parameters():
        assert torch.equal(tensor, again[0].get_parameter(name)), name
    assert first[0].metadata == again[0].metadata
    assert not torch.equal(first[0].W_dec, other[0].W_dec)


def test_several_saes_and_sites_do_not_disturb_each_other(tmp_path):
    x = planted(8192)[0]
    sites = {SITE: x, "layers.1.mlp_out": x[:, :10].double() * 3}
    parts = [{s: t[i : i + 999] for s, t in sites.items()} for i in range(0, 8192, 999)]
    configs = [config(), config(TopK(k=2), tokens=2048), TrainConfig(**{**vars(config()), "site": "layers.1.mlp_out"})]
    trainer = Trainer(configs, parts, d_in={SITE: D_IN, "layers.1.mlp_out": 10}, log_dir=tmp_path, progress=False)
    together = trainer.fit()
    assert [sae.d_in for sae in together] == [D_IN, D_IN, 10]
    assert [sae.metadata["tokens_seen"] for sae in together] == [4096, 2048, 4096]
    (alone,) = fit(config())
    for name, tensor in alone.named_parameters():
        if name != "threshold":
            assert torch.equal(tensor, together[0].get_parameter(name)), name
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["sae"] for line in lines} == {
        f"{SITE}-batchtopk3-96",
        f"{SITE}-topk2-96",
        "layers.1.mlp_out-batchtopk3-96",
    }
    last = [line for line in lines if line["sae"] == f"{SITE}-batchtopk3-96"][-1]
    assert last["tokens"] == 4096
    assert 0 < last["fvu"] < 1
    assert last["l0"] == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("where", [0, 3000])
def test_nan_is_an_error_with_site_and_step(where, monkeypatch):
    monkeypatch.setattr("saehook.trainer.SAMPLE_TOKENS", 1024)
    x = planted(4096)[0]
    x[where] = float("nan")
    trainer = Trainer([config(TopK(k=3))], chunks(x), d_in=D_IN, progress=False)
    with pytest.raises(TrainingError, match=SITE) as error:
        trainer.fit()
    assert f"step {where // 256 + 1}" in str(error.value)


def test_stream_that_ends_early():
    with pytest.warns(UserWarning, match="trained on 1,024 of 4,096 tokens"):
        (sae,) = fit(config(), n=1100)
    assert sae.metadata["tokens_seen"] == 1024
    assert sae.stats is not None
    assert sae.metadata["calibration"]["tokens"] == sae.stats.tokens == 1100 - 1024
    with pytest.raises(TrainingError, match="ended after 200 tokens"):
        fit(config(), n=200)


def test_no_fresh_tokens():
    with pytest.warns(UserWarning, match="no fresh tokens"):
        (sae,) = fit(config(), n=4096)
    assert sae.metadata["threshold"]["source"] == "running_mean"
    assert sae.stats is None
    assert float(sae.threshold.detach()[0]) == pytest.approx(sae.metadata["threshold"]["running_mean"])
    (sae,) = fit(config(TopK(k=3)), n=4096)  # has no threshold, so nothing is missing
    assert sae.metadata["calibration"]["tokens"] == 0


def test_arguments():
    with pytest.raises(ArgumentError, match="same batch_tokens"):
        Trainer([config(), config(batch_tokens=128)], [], d_in=D_IN)
    with pytest.raises(ArgumentError, match="same batch_tokens"):
        Trainer([], [], d_in=D_IN)
    with pytest.raises(ArgumentError, match="no width for layers.0"):
        Trainer([config()], [], d_in={"elsewhere": 3})
    for part, error in [
        (torch.randn(9, D_IN + 1), ShapeError),
        (torch.randn(D_IN), ShapeError),
        (torch.ones(9, D_IN, dtype=torch.int64), ShapeError),
        ({"elsewhere": torch.randn(9, D_IN)}, ArgumentError),
    ]:
        with pytest.raises(error):
            Trainer([config()], [part], d_in=D_IN, progress=False).fit()


def test_stream_keeps_order_and_loses_nothing():
    x = torch.randn(1000, 3)
    stream = Stream([x[:10], {"s": x[10:300].half()}, x[300:300], x[300:]], {"s": 3}, "cpu")
    assert torch.equal(stream.peek(5)["s"], x[:5])
    parts = []
    while n := stream.available(64):
        parts.append(stream.take(64)["s"])
        assert parts[-1].shape == (n, 3)
        assert parts[-1].dtype == torch.float32
    got = torch.cat(parts)
    torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-3)
    assert torch.equal(got[:10], x[:10])
    assert torch.equal(got[320:], x[320:])
    with pytest.raises(ShapeError, match="same tokens"):
        Stream([{"a": x, "b": x[:5]}], {"a": 3, "b": 3}, "cpu").peek(1)
    with pytest.raises(ArgumentError, match="2 sites"):
        Stream([x], {"a": 3, "b": 3}, "cpu").peek(1)


def test_config_is_untouched_and_float16_is_read():
    settings = config()
    before = vars(settings).copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (sae,) = Trainer([settings], [planted(8192)[0].half()], d_in=D_IN, progress=False).fit()
    assert vars(settings) == before
    assert sae.dtype == torch.float32
    assert not any(p.grad is not None for p in sae.parameters())
