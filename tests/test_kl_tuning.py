"""The language model as judge of the last training tokens: the divergence, its gradient, and what a run makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import footprint, random_ids
from torch import Tensor

from saehook.config import MaskRule, TopK, TrainConfig
from saehook.corpus import Document
from saehook.errors import ArgumentError, TrainingInterrupted
from saehook.evaluation import evaluate
from saehook.harvest import TextStream
from saehook.kl_tuning import KLBatch, KLBatches
from saehook.trainer import Trainer
from saehook.training_run import train_saes

SITE = "layers.1.resid_post"


def documents(n: int = 40, seed: int = 0) -> list[Document]:
    """Texts of random letters."""
    draw = torch.Generator().manual_seed(seed)
    letters = "abcdefgh etaoin"
    texts = ("".join(letters[i] for i in torch.randint(len(letters), (300,), generator=draw)) for _ in range(n))
    return [Document(f"{i}", text) for i, text in enumerate(texts)]


def test_the_divergence_and_its_gradient_are_those_of_plain_torch(models_by_name, monkeypatch):
    model, lm = models_by_name("llama")
    before = footprint(model.lm)
    ids = torch.tensor([random_ids(12, seed=1), random_ids(12, seed=2), random_ids(12, seed=3)])
    mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) > 0.3
    x = model.activations(ids, SITE)[SITE][mask]
    x_hat = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    kl, gradient = KLBatch(model, ids, mask, {SITE: x}).divergence(SITE, x_hat)

    leaf = x_hat.clone().requires_grad_()
    with torch.no_grad():
        clean = lm(ids).logits[:, :-1].double().log_softmax(-1)

    def put_in(module: Any, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[mask] = leaf
        return output

    handle = lm.model.layers[1].register_forward_hook(put_in)
    spliced = lm(ids).logits[:, :-1].double().log_softmax(-1)
    handle.remove()
    expected = (clean.exp() * (clean - spliced)).sum(-1).mean()
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    assert float(kl) == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None and p.requires_grad for p in model.lm.parameters())
    assert footprint(model.lm) == before

    monkeypatch.setattr("saehook.kl_tuning.MAX_LOGITS", 1)  # a window at a time
    again, gradient = KLBatch(model, ids, mask, {SITE: x}).divergence(SITE, x_hat)
    assert float(again) == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)
    exact, _ = KLBatch(model, ids, mask, {SITE: x}).divergence(SITE, x)
    assert float(exact) == pytest.approx(0, abs=1e-6)


def test_a_batch_holds_exactly_the_tokens_asked_for(models_by_name):
    model, _ = models_by_name("llama")
    text = TextStream(documents(), model.tokenizer, 32, repeat=True)
    batches = KLBatches(model, [SITE], text, {SITE: MaskRule(skip_first_tokens=3)})
    batch = batches.take(100)
    assert batch.activations[SITE].shape == (100, 32)
    assert int(batch.mask.sum()) == 100
    assert not batch.mask[:, :3].any()
    whole = model.activations(batch.ids, SITE)[SITE]
    torch.testing.assert_close(batch.activations[SITE], whole[batch.mask], rtol=1e-5, atol=1e-5)
    state = batches.state()
    following = batches.take(50).ids
    again = TextStream(documents(), model.tokenizer, 32, repeat=True)
    other = KLBatches(model, [SITE], again, {SITE: MaskRule(skip_first_tokens=3)})
    other.load_state(state)
    assert torch.equal(other.take(50).ids, following)


def config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"tokens": 8000, "batch_tokens": 200, "d_sae": 64, "lr": 2e-3, "calibration_tokens": 500}
    return TrainConfig(site=SITE, activation=TopK(k=6), **settings | changes)


def test_it_brings_the_spliced_model_nearer_to_the_clean_one(models_by_name, tmp_path):
    model, _ = models_by_name("llama")
    held_out = torch.stack(list(TextStream(documents(6, seed=9), model.tokenizer, 64)))
    rows = {}
    for kl_tokens in (0, 7000):
        run = train_saes(model, [config(kl_tokens=kl_tokens)], documents(), tmp_path / str(kl_tokens), progress=False)
        hooked = model.attach(run.saes[0].sae)
        rows[kl_tokens] = evaluate(hooked, held_out, progress=False).results[0]
        hooked.detach()
    assert rows[7000].kl < 0.95 * rows[0].kl
    assert rows[7000].fvu < 1.2 * rows[0].fvu
    lines = [json.loads(line) for line in (tmp_path / "7000" / "metrics.jsonl").read_text().splitlines()]
    assert [line["kl"] > 0 for line in lines] == [True, True]
    lines = [json.loads(line) for line in (tmp_path / "0" / "metrics.jsonl").read_text().splitlines()]
    assert not any("kl" in line for line in lines)


def test_a_run_that_was_stopped_goes_on_the_same(models_by_name, tmp_path, monkeypatch):
    model, _ = models_by_name("llama")
    configs = [config(tokens=4000, kl_tokens=2000), config(tokens=4000, seed=1)]

    def train(out: Path, **options: Any) -> list[Tensor]:
        run = train_saes(model, configs, documents(), out, progress=False, **options)
        return [one.sae.W_dec for one in run.saes]

    expected = train(tmp_path / "whole")
    take = KLBatches.take

    def stopping(self: KLBatches, n_tokens: int) -> KLBatch:
        if trainers and trainers[0].steps == 14:
            trainers[0].stop()
        return take(self, n_tokens)

    trainers: list[Trainer] = []
    make = Trainer.__init__

    def noted(self: Trainer, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        trainers.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(KLBatches, "take", stopping)
        patch.setattr(Trainer, "__init__", noted)
        with pytest.raises(TrainingInterrupted, match="3,000 tokens"):
            train(tmp_path / "stopped")
    for one, other in zip(train(tmp_path / "stopped", resume=True), expected, strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "stopped" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_without_a_language_model_it_is_an_error():
    with pytest.raises(ArgumentError, match="needs the language model"):
        Trainer([config(kl_tokens=1000)], iter(()), d_in=32)
