"""Losses from chunks of logits against Hugging Face's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import ARCHITECTURES, CONFIGS, SPECIAL, VOCAB, build_lm, byte_tokenizer, random_ids, tiny_sae
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from saehook.errors import ArgumentError
from saehook.evaluation import evaluate
from saehook.hooked_model import HookedModel
from saehook.lm_head import BLOCK_LOGITS, Head

IDS = torch.tensor([random_ids(30, seed=seed, bos=True) for seed in range(3)])
SITE = "layers.1.resid_post"
_LLAMA = CONFIGS["llama"][1]
SCALED = {"granite": {**_LLAMA, "logits_scaling": 3.0}, "cohere": {**_LLAMA, "logit_scale": 0.3}}


def scaled_lm(name: str) -> Any:
    """An architecture without a row whose head scales its logits."""
    bos, eos, pad = SPECIAL
    options = {**SCALED[name], "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options, tie_word_embeddings=False)).eval()


def head_on(lm: Any, site: str) -> Head:
    return Head(HookedModel(lm, byte_tokenizer()).attach({site: tiny_sae()}), IDS)


def mean_loss(head: Head) -> float:
    states = head.run(IDS, {})[:, :-1].flatten(0, 1)
    return head.scores(states, [states], IDS[:, 1:].flatten())[0].ce.double().mean().item()


@pytest.mark.parametrize("name", [*ARCHITECTURES, *SCALED])
@torch.no_grad()
def test_the_loss_in_chunks_is_hugging_faces_own(name, monkeypatch):
    monkeypatch.setitem(BLOCK_LOGITS, "cpu", 7 * VOCAB)
    lm = build_lm(name) if name in CONFIGS else scaled_lm(name)
    lm.get_output_embeddings().weight.mul_(5)  # logits that a soft cap bends
    own = lm(IDS, labels=IDS).loss.item()
    head = head_on(lm, SITE if name in CONFIGS else "model.layers.1:output")
    assert head.site is not None
    assert head.matrix is not None
    assert own > 1
    assert mean_loss(head) == pytest.approx(own, abs=1e-5)


class Wrapped(torch.nn.Linear):
    """An adapter on the head."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 0.1 * input.sum(-1, keepdim=True) * self.weight[:, 0]


@torch.no_grad()
def test_a_head_that_is_no_plain_matrix_stays_whole(monkeypatch):
    monkeypatch.setattr("saehook.lm_head.LARGE_BLOCK_LOGITS", 7 * VOCAB)
    lm = build_lm("llama")
    lm.lm_head.__class__ = Wrapped
    own = lm(IDS, labels=IDS).loss.item()
    head = head_on(lm, SITE)
    assert head.site == "lm_head:input"
    assert head.matrix is None
    assert mean_loss(head) == pytest.approx(own, abs=1e-5)


@torch.no_grad()
def test_an_unknown_head_is_left_to_the_models_own_forward():
    lm = build_lm("llama")
    forward = lm.forward

    def odd(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.01 + 0.1 * output.logits.sin()
        return output

    lm.forward = odd
    logits = lm(input_ids=IDS).logits
    own = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()
    head = head_on(lm, SITE)
    assert head.site is None
    assert mean_loss(head) == pytest.approx(own, abs=1e-6)
    result = evaluate(head.hooked, IDS, progress=False)
    assert "own forward" in result.provenance["logits"]


@pytest.mark.parametrize("held", [4 * VOCAB, 2**20])
@torch.no_grad()
def test_scores_are_those_of_the_whole_logits(held, monkeypatch):
    monkeypatch.setitem(BLOCK_LOGITS, "cpu", held)
    lm = build_lm("gemma2")
    head = head_on(lm, SITE)
    clean = head.run(IDS, {})[:, :-1].flatten(0, 1)
    other = clean + 0.3 * torch.randn_like(clean)
    targets = IDS[:, 1:].flatten()
    own, same, scores, ablated = head.scores(clean, [clean, other, other], targets, losses_only=[2])
    assert torch.equal(own.ce, same.ce)
    assert torch.equal(ablated.ce, scores.ce)
    assert ablated.kl.isnan().all()
    assert not own.kl.any()
    assert own.agrees.all()
    log_p, log_q = (head.logits(states).double().log_softmax(-1) for states in (clean, other))
    torch.testing.assert_close(scores.ce.double(), F.nll_loss(log_q, targets, reduction="none"), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.kl.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5, atol=1e-6)
    assert torch.equal(scores.agrees.bool(), log_p.argmax(-1) == log_q.argmax(-1))
    assert 0 < scores.agrees.mean() < 1
    assert not same.kl.any()
    assert same.agrees.all()
    assert [len(each) for each in head.scores(clean[:0], [clean[:0]], targets[:0])[1]] == [0, 0, 0]


@torch.no_grad()
def test_tokens_that_cannot_come_count_nothing(monkeypatch):
    """Logits of -inf, as of a padded vocabulary: 0 · log 0 = 0, and no KL where the other run excludes them, too."""
    monkeypatch.setitem(BLOCK_LOGITS, "cpu", 4 * VOCAB)
    head = head_on(build_lm("llama"), SITE)
    head.site = None  # states are the logits
    generator = torch.Generator().manual_seed(0)
    clean, other, never = (torch.randn(50, VOCAB, generator=generator) for _ in range(3))
    clean[:, 100:] = other[:, 100:] = -torch.inf
    never[:, 7] = -torch.inf  # what the clean run may say
    targets = torch.arange(50)
    _, scores, impossible = head.scores(clean, [other, never], targets)
    log_p, log_q = (each[:, :100].double().log_softmax(-1) for each in (clean, other))
    torch.testing.assert_close(scores.kl.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores.ce.double(), F.nll_loss(log_q, targets, reduction="none"), rtol=0, atol=1e-5)
    assert torch.equal(scores.agrees.bool(), log_p.argmax(-1) == log_q.argmax(-1))
    assert not impossible.kl.isfinite().any()
    assert impossible.ce.isfinite().tolist() == (targets != 7).tolist()


class Largest(TorchFunctionMode):
    """The largest float32 tensor that any function returns."""

    numel = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_tokens_times_vocabulary_is_never_held(name, monkeypatch):
    """Only the parameters are larger than a few blocks of logits."""
    monkeypatch.setitem(BLOCK_LOGITS, "cpu", 4 * VOCAB)
    monkeypatch.setattr("saehook.lm_head.PROBE_TOKENS", 4)
    hooked = HookedModel(build_lm(name), byte_tokenizer()).attach({SITE: tiny_sae()})
    ids = torch.tensor([random_ids(15, seed=seed, bos=True) for seed in range(16)])
    with Largest() as largest:
        evaluate(hooked, ids, progress=False)
    assert 4 * VOCAB <= largest.numel < ids.numel() * VOCAB / 4


def test_a_model_without_a_language_model_head():
    kind, options = CONFIGS["gpt2"]
    lm = AutoModel.from_config(AutoConfig.for_model(kind, **options, bos_token_id=0, eos_token_id=1))
    hooked = HookedModel(lm, byte_tokenizer()).attach({SITE: tiny_sae()})
    with pytest.raises(ArgumentError, match=r"GPT2Model predicts no next tokens.*AutoModelForCausalLM"):
        evaluate(hooked, IDS, progress=False)


def test_a_model_that_gives_no_logits():
    lm = build_lm("llama")
    hooked = HookedModel(lm, byte_tokenizer()).attach({SITE: tiny_sae()})
    lm.forward = lambda input_ids, **_: lm.model(input_ids)
    with pytest.raises(ArgumentError, match="no logits for each token"):
        evaluate(hooked, IDS, progress=False)
