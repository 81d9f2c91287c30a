"""The one mask with what an SAE's file adds: first tokens of a row, and outlier norms."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import reference_hooks as reference
import torch
import torch.nn.functional as F
from builders import BOS, CONTEXT, EOS, PAD, SPECIAL, build_lm, byte_tokenizer, random_ids, tiny_sae
from torch import Tensor

from saehook.config import BatchTopK, MaskRule, TopK, TrainConfig
from saehook.corpus import Document
from saehook.edits import ablate, scale, steer
from saehook.errors import ArgumentError
from saehook.evaluation import evaluate
from saehook.harvest import TOKENS_PER_FORWARD, Shuffled, TextStream, WithoutOutliers, activations_of, mask_rules
from saehook.hooked_model import HookedModel
from saehook.interventions import Program
from saehook.latent_stats import measure_stats
from saehook.sae import SAE
from saehook.tokenization import keep_mask
from saehook.training_run import train_saes
from saehook.where import generation, prompt, tokens

SITE, LATER = "layers.1.resid_post", "layers.2.mlp_out"
IDS = random_ids(9, seed=5, bos=True)
OTHER = random_ids(5, seed=6, bos=True)


def rule_between(norms: Tensor, skip: int = 0, share: float = 0.6) -> MaskRule:
    """A rule whose largest norm lies in the middle of a gap, so that rounding cannot decide; about `share` stay in."""
    ordered = norms.flatten().sort().values
    n = len(ordered)
    near = slice(int(share * n) - n // 8, int(share * n) + n // 8 + 1)
    gap = int(ordered.diff()[near].argmax()) + near.start
    limit = float(ordered[gap] + ordered[gap + 1]) / 2
    return MaskRule(skip_first_tokens=skip, max_norm_ratio=2.0, median_norm=limit / 2)


def norms_at(lm: Any, site: str, ids: list[int]) -> Tensor:
    return reference.read(lm, site, torch.tensor([ids]))[0].norm(dim=-1)


def with_rule(sae: SAE, rule: MaskRule) -> SAE:
    sae.mask_rule = rule
    return sae


def value_behind(model: HookedModel, run: Any) -> Tensor:
    """What `run` leaves at SITE of a single row, [n, d], read with a plain hook on the module behind it."""
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x

    with reference.written(model.lm, "layers.2.resid_pre", look):
        run()
    return seen[-1][0]


# --- what is left alone ----------------------------------------------------------------------------------------------

PROGRAMS: list[dict[str, Any]] = [
    {"edits": [steer(3, 2.0)]},
    {"edits": [ablate(range(48))], "error": "drop"},
    {"edits": [steer(3, 2.0, where=prompt())]},
    {"splice": True},
    {"edits": [steer(3, 2.0)], "splice": True},
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_tokens_outside_the_mask_keep_their_bits(models_by_name, name):
    model, lm = models_by_name(name)
    ids = [*random_ids(5, seed=1), EOS, *random_ids(5, seed=2)]
    x = reference.read(lm, SITE, torch.tensor([ids]))[0]
    rule = rule_between(x.norm(dim=-1)[2:], skip=2)
    inside = [i for i in range(2, 11) if i != 5 and x[i].norm() < 2 * float(rule.median_norm or 0)]
    assert 3 <= len(inside) <= 7
    for recorded, touched in ((rule, inside), (MaskRule(), [i for i in range(11) if i != 5])):
        hooked = model.attach(with_rule(tiny_sae(site=SITE), recorded))
        for program in PROGRAMS:
            after = value_behind(model, lambda hooked=hooked, program=program: hooked(ids, **program))
            assert [i for i in range(11) if not torch.equal(after[i], x[i])] == touched, program
        hooked.detach()


def test_named_tokens_win_over_the_rule(models_by_name):
    model, lm = models_by_name("llama")
    hooked = model.attach(
        with_rule(tiny_sae(site=SITE), MaskRule(skip_first_tokens=99, max_norm_ratio=1.0, median_norm=1e-6))
    )
    with torch.no_grad():
        clean = lm(torch.tensor([IDS])).logits
        with pytest.warns(UserWarning, match="selected no token"):
            assert torch.equal(hooked(IDS, [steer(3, 2.0)]).logits, clean)
        assert torch.equal(hooked(IDS, splice=True).logits, clean)
    report = hooked.generate(IDS, [steer(3, 2.0, where=tokens(0, -1))], max_new_tokens=3).report
    assert report.edits[0].tokens == 2
    other = model.attach(tiny_sae(site=SITE))
    named = [steer(3, 2.0, where=tokens(*range(len(IDS))))]
    assert torch.equal(hooked(IDS, named).logits, other(IDS, named).logits)


# --- generation ------------------------------------------------------------------------------------------------------

PLACES = [None, None, generation(), prompt(), tokens(0, -1)]
ERRORS: list[dict[str, Any]] = [{}, {"error": "drop"}, {"splice": True}]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_cached_uncached_and_padded_generation_equal_the_reference_loop(models_by_name, name):
    model, lm = models_by_name(name)
    sae = tiny_sae(site=SITE, activation="topk", seed=3)
    hooked = model.attach(sae)
    long = norms_at(lm, SITE, lm.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False)[0].tolist())
    for i, where in enumerate(PLACES):
        options = ERRORS[i % 3]
        # OTHER is shorter than 7: there the rule goes on into what is generated.
        sae.mask_rule = rule_between(long, skip=(7, 0)[i % 2])
        edits = [steer(9, 3.0, where=where), scale((1, 2, 3), 0.5, where=where)]
        expected = []
        for row in (OTHER, IDS):
            program = Program(edits=edits, **options)
            ids, margin = reference.generate(lm, row, program, hooked.saes, special=SPECIAL, new=6)
            assert margin > 1e-3, "choose another seed: rounding may decide here"
            expected.append(ids)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            alone = [hooked.generate(row, edits, max_new_tokens=6, **options) for row in (OTHER, IDS)]
            assert [g.new_ids.tolist() for g in alone] == expected
            for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
                got = hooked.generate([OTHER, IDS], edits, max_new_tokens=6, **options, **settings)
                assert [g.new_ids.tolist() for g in got] == expected, settings
                assert sum(g.report.edits[0].tokens for g in alone) == got[0].report.edits[0].tokens
    hooked.detach()


def test_latents_say_which_tokens_count(models_by_name):
    model, lm = models_by_name("llama")
    norms = norms_at(lm, SITE, IDS)
    rule = rule_between(norms[3:], skip=3)
    hooked = model.attach(with_rule(tiny_sae(site=SITE), rule))
    expected = [i >= 3 and bool(norms[i] < 2 * float(rule.median_norm or 0)) for i in range(len(IDS))]
    assert 2 <= sum(expected) <= len(IDS) - 5
    assert hooked.latents(IDS).mask.tolist() == expected
    padded = hooked.latents([OTHER, IDS])
    assert padded[1].mask.tolist() == expected
    assert len(padded[0].mask) == len(OTHER)
    assert not padded[0].mask[:3].any()


# --- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_evaluation_acts_and_counts_on_each_saes_own_mask(models_by_name):
    """Against plain hooks. The SAEs have different rules: each row has positions of its own, the last those of both."""
    model, lm = models_by_name("llama")
    ids = torch.tensor([random_ids(23, seed=s, bos=True) for s in range(4)])
    x = {site: reference.read(lm, site, ids) for site in (SITE, LATER)}
    rules = {SITE: rule_between(x[SITE].norm(dim=-1), 4), LATER: rule_between(x[LATER].norm(dim=-1))}
    masks = {}
    for site, rule in rules.items():
        masks[site] = (ids != BOS) & (x[site].norm(dim=-1) < 2 * float(rule.median_norm or 0))
        masks[site][:, : rule.skip_first_tokens] = False
    saes = {site: with_rule(tiny_sae(seed=i), rules[site]) for i, site in enumerate(rules)}
    hooked = model.attach(saes)
    result = evaluate(hooked, ids, progress=False)
    stats = measure_stats(hooked, ids, progress=False)
    hooked.detach()

    def loss(counted: Tensor, writes: dict[str, Any]) -> float:
        with reference.contextlib.ExitStack() as stack:
            for site, write in writes.items():
                stack.enter_context(reference.written(lm, site, write))
            logits = lm(input_ids=ids, use_cache=False).logits[:, :-1]
        return float(F.cross_entropy(logits[counted[:, :-1]], ids[:, 1:][counted[:, :-1]]))

    def inside(site: str, new: Any) -> Any:
        return lambda x: torch.where(masks[site][..., None], new(x), x)

    for row in result.results[:2]:
        site, sae, mask = row.site, saes[row.site], masks[row.site]
        kept = x[site][mask]
        assert row.tokens == stats[site].tokens == int(mask.sum())
        assert row.ce_clean == pytest.approx(loss(mask, {}), rel=1e-5)
        assert row.ce_spliced == pytest.approx(
            loss(mask, {site: inside(site, lambda x, sae=sae: sae(x).x_hat)}), rel=1e-5
        )
        assert row.ce_zero == pytest.approx(loss(mask, {site: inside(site, torch.zeros_like)}), rel=1e-5)
        mean = kept.mean(0)
        assert row.ce_mean == pytest.approx(
            loss(mask, {site: inside(site, lambda x, m=mean: m.expand_as(x))}), rel=1e-5
        )
        out = sae(kept)
        assert row.l0 == pytest.approx(float((out.acts > 0).sum() / len(kept)))
        assert row.fvu == pytest.approx(
            float((kept - out.x_hat).square().sum() / (kept - mean).square().sum()), rel=1e-4
        )
        torch.testing.assert_close(stats[site].max_act, out.acts.amax(0), rtol=1e-4, atol=1e-4)
    both = masks[SITE] & masks[LATER]
    assert 0 < both.sum() < min(m.sum() for m in masks.values())
    joint = result.results[2]
    assert joint.tokens == int(both.sum())
    assert joint.ce_clean == pytest.approx(loss(both, {}), rel=1e-5)
    zero = loss(both, {site: inside(site, torch.zeros_like) for site in rules})
    assert joint.ce_zero == pytest.approx(zero, rel=1e-5), "the masks are those of the clean run, whatever an edit does"
    for site, rule in rules.items():
        assert result.provenance["saes"][site]["mask_rule"] == str(rule)
        assert f"tokens that count at {site}: {rule}" in result.table()


def test_an_evaluation_without_a_token_that_counts_is_refused(models_by_name):
    model, _ = models_by_name("llama")
    hooked = model.attach(with_rule(tiny_sae(site=SITE), MaskRule(skip_first_tokens=CONTEXT)))
    for measure in (evaluate, measure_stats):
        with pytest.raises(ArgumentError, match=f"mask of .*{SITE}"):
            measure(hooked, torch.tensor([IDS]), progress=False)
    hooked.detach()


# --- training --------------------------------------------------------------------------------------------------------

SINK = ord("~")
"""Each of these characters is an outlier in the residual stream of `model`."""


@pytest.fixture(scope="module")
def model() -> HookedModel:
    lm, tokenizer = build_lm("llama"), byte_tokenizer()
    (sink,) = tokenizer(chr(SINK), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        lm.get_input_embeddings().weight[sink] *= 400
    return HookedModel(lm, tokenizer)


def documents(n: int = 60) -> list[Document]:
    words = "the a red blue cat dog sees runs to from house tree and ~ with under".split()
    draw = torch.Generator().manual_seed(0)
    return [
        Document(f"d{i}", " ".join(words[j] for j in torch.randint(len(words), (60,), generator=draw)))
        for i in range(n)
    ]


def config(site: str = SITE, **changes: Any) -> TrainConfig:
    facts: dict[str, Any] = {
        "activation": BatchTopK(k=4),
        "d_sae": 64,
        "tokens": 4000,
        "batch_tokens": 200,
        "calibration_tokens": 1000,
    }
    return TrainConfig(site=site, **facts | changes)


def harvest(model: HookedModel, sites: list[str], skip: int = 0) -> tuple[Any, dict[str, Tensor], Tensor]:
    """(chunks, {site: all tokens in order}, which of them are sinks)."""
    ids = torch.stack(list(TextStream(documents(), model.tokenizer, CONTEXT)))
    keep = keep_mask(ids, None, SPECIAL, skip)
    chunks = list(activations_of(model, sites, iter(ids), skip))
    (sink,) = model.tokenizer(chr(SINK), add_special_tokens=False)["input_ids"]
    return chunks, {site: torch.cat([c[site] for c in chunks]) for site in sites}, ids[keep] == sink


def test_first_tokens_are_left_out_of_the_harvest(model):
    _, x, _ = harvest(model, [SITE])
    _, fewer, _ = harvest(model, [SITE], skip=8)
    assert len(fewer[SITE]) < len(x[SITE])
    rows = {tuple(row) for row in x[SITE].tolist()}
    assert all(tuple(row) in rows for row in fewer[SITE].tolist())


def test_outliers_of_one_site_are_left_out_at_all(model):
    chunks, x, sinks = harvest(model, [SITE, LATER])
    rules = mask_rules(iter(chunks), 10.0, 3)
    for site in rules:
        median = float(x[site].norm(dim=-1)[:4096].median())
        assert rules[site] == MaskRule(skip_first_tokens=3, max_norm_ratio=10.0, median_norm=median)
    assert 50 < sinks.sum() < 0.1 * len(sinks)
    served = list(WithoutOutliers(iter(chunks), rules))
    for site in rules:
        assert torch.equal(torch.cat([chunk[site] for chunk in served]), x[site][~sinks])
    alone = {site: rules[site] for site in (LATER,)}
    assert torch.equal(next(WithoutOutliers(iter([{LATER: chunks[0][LATER]}]), alone))[LATER], chunks[0][LATER])


@pytest.mark.parametrize("on", ["cpu", "gpu"])
def test_a_stream_with_outliers_goes_on_where_it_was(model, monkeypatch, on):
    """Also where, as on a GPU, the next pass of the model is begun before what is served is known."""
    monkeypatch.setattr("saehook.kernels.device.ALWAYS_QUEUED", on == "gpu")
    monkeypatch.setattr("saehook.harvest.TOKENS_PER_FORWARD_QUEUED", TOKENS_PER_FORWARD)

    def stream() -> Shuffled:
        text = TextStream(documents(), model.tokenizer, CONTEXT)
        chunks = WithoutOutliers(activations_of(model, [SITE], text), rules, text)
        return Shuffled(chunks, buffer_tokens=2000, batch_tokens=300, seed=0, text=chunks)

    rules = mask_rules(iter(harvest(model, [SITE])[0]), 10.0)
    whole = [batch[SITE] for batch in stream()]
    first, again = stream(), stream()
    for _ in range(9):
        next(first)
    state = first.state()
    assert state is not None
    assert isinstance(first.text, WithoutOutliers)
    assert isinstance(first.text.text, TextStream)
    windows_ahead = first.text.text.served - state[1]["text"]["served"]
    assert windows_ahead == (TOKENS_PER_FORWARD // CONTEXT if on == "gpu" else 0)
    again.load_state({name: x.clone() for name, x in state[0].items()}, state[1], "cpu")
    rest = [batch[SITE] for batch in again]
    assert len(rest) == len(whole) - 9
    assert all(torch.equal(x, y) for x, y in zip(rest, whole[9:], strict=True))
    assert max(float(x.norm(dim=-1).max()) for x in whole) <= float(rules[SITE].max_norm or 0)


def test_a_rule_is_only_made_where_there_are_outliers_to_tell(recwarn):
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    for broken in (torch.zeros(1000, 8), x * float("nan"), x[:0]):
        assert mask_rules(iter([{"a": broken}]), 10.0, 2) == {"a": MaskRule(skip_first_tokens=2)}
    rules = mask_rules(iter([{"a": x}]), 10.0)
    x[:3] = torch.tensor([float("nan"), float("inf"), 1e6])[:, None]
    (left,) = WithoutOutliers(iter([{"a": x}]), rules)
    assert len(left["a"]) == 999, "what is not finite must stop the training, not vanish"
    assert not recwarn
    x[:100] = torch.tensor(1e6)
    with pytest.warns(UserWarning, match=r"10\.0% of the tokens at a .*too many"):
        mask_rules(iter([{"a": x}]), 10.0)


def test_training_leaves_outliers_out_and_the_file_says_so(model, tmp_path):
    sites = [SITE, LATER]
    _, x, sinks = harvest(model, sites)
    held_out = torch.stack(list(TextStream(documents(8), model.tokenizer, CONTEXT)))
    (sink,) = model.tokenizer(chr(SINK), add_special_tokens=False)["input_ids"]
    scales = {}
    for ratio in (10.0, 0.0):
        run = train_saes(
            model, [config(site) for site in sites], documents(), tmp_path / str(ratio),
            max_norm_ratio=ratio, progress=False,
        )  # fmt: skip
        saes = {one.sae.site or "": one.sae for one in run.saes}
        scales[ratio] = saes[SITE].metadata["input_scale"]
        hooked = model.attach(saes, check="fingerprint")
        result = evaluate(hooked, held_out, progress=False)
        counted = torch.stack([latents.mask for latents in hooked.latents(held_out, SITE)])
        hooked.detach()
        assert bool(counted[held_out == sink].any()) == (ratio == 0)
        assert (result.results[0].tokens == int(keep_mask(held_out, None, SPECIAL).sum())) == (ratio == 0)
        assert ("norm at most" in (tmp_path / str(ratio) / "report.html").read_text()) == (ratio > 0)
    usual = x[SITE][~sinks].square().sum(-1).mean().item() ** -0.5
    assert scales[10.0] == pytest.approx(usual, rel=0.05)
    assert scales[0.0] < usual / 1.5


def test_the_cache_is_shared_by_runs_with_other_norms_but_not_other_first_tokens(model, tmp_path):
    """What is an outlier at one site is dropped at all, so a cache that left outliers out would depend on the sites."""
    passes: list[int] = []
    handle = model.lm.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    made = []
    options: dict[str, Any] = {"cache": tmp_path / "cache", "progress": False}
    settings: list[dict[str, Any]] = [{}, {"max_norm_ratio": 0}, {"max_norm_ratio": 20}, {"skip_first_tokens": 2}]
    for i, changes in enumerate(settings):
        before = len(passes)
        run = train_saes(model, [config()], documents(), tmp_path / str(i), **options, **changes)
        made.append(len(passes) - before - 1)  # the fingerprint
        rule = run.saes[0].sae.mask_rule
        assert (rule.skip_first_tokens, rule.max_norm_ratio or 0) == (
            changes.get("skip_first_tokens", 0),
            changes.get("max_norm_ratio", 10),
        )
    handle.remove()
    assert made[0] == made[3] > 0
    assert made[1:3] == [0, 0]


def test_the_cached_run_is_the_run_without_a_cache(tmp_path):
    """In bfloat16, which the cache keeps exactly: the same median, the same tokens, the same SAE."""
    model = HookedModel(build_lm("llama", dtype=torch.bfloat16), byte_tokenizer())
    (sink,) = model.tokenizer(chr(SINK), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.lm.get_input_embeddings().weight[sink] *= 400
    runs = [
        train_saes(model, [config(activation=TopK(k=4))], documents(), tmp_path / str(i), progress=False, cache=cache)
        for i, cache in enumerate((None, tmp_path / "cache", tmp_path / "cache"))
    ]
    one, *others = (run.saes[0].sae for run in runs)
    assert one.mask_rule.median_norm
    for other in others:
        assert other.mask_rule == one.mask_rule
        assert all(torch.equal(p, other.get_parameter(name)) for name, p in one.named_parameters())


@pytest.mark.parametrize(
    "wrong",
    [{"skip_first_tokens": -1}, {"max_norm_ratio": 0.5}, {"max_norm_ratio": -3.0}, {"max_norm_ratio": math.nan}],
)
def test_a_mask_that_cannot_be_meant_is_refused_before_anything_runs(model, tmp_path, wrong: dict[str, Any]):
    with pytest.raises(ArgumentError, match=f"{next(iter(wrong))} is"):
        train_saes(model, [config()], documents(), tmp_path / "none", progress=False, **wrong)
    assert not (tmp_path / "none").exists()


def test_the_words_of_a_rule():
    assert str(MaskRule(skip_first_tokens=1)).endswith("pad; not the first 1 of a row")
    rule = MaskRule(max_norm_ratio=10, median_norm=2.5)
    assert str(rule).endswith("pad; norm at most 25 = 10 x the median")
    assert dataclasses.replace(rule, max_norm_ratio=None, median_norm=None) == MaskRule()
    assert keep_mask(torch.tensor([[PAD, PAD, BOS, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1]]), SPECIAL, 2).tolist() == [
        [False, False, False, False, True]
    ]
