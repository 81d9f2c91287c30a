"""Many strengths in one batch: each row against its single run, the shared prompt, and the measures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builders import BOS, PAD, byte_tokenizer, random_ids, tiny_sae
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM

from saehook.conditions import latent
from saehook.dose_response import DoseRow, repetition, run_rows
from saehook.errors import ArgumentError, LatentError, NoEffectWarning, SiteError
from saehook.hooked_model import HookedModel
from saehook.interventions import Edit, Program, VectorEdit
from saehook.sampling_noise import RandomState
from saehook.schedules import Schedule
from saehook.where import EVERYWHERE, Where, generation, matching, prompt, span, token_ids, tokens

SITE = "layers.1.resid_post"
LATENT = 5
STRENGTHS = [-6.0, 0.5, 3.0, 12.0]
IDS = random_ids(20, bos=True)  # longer than the sliding windows of the tiny models
ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "gemma2", "qwen2", "mistral", "gpt_neo"]
WHERES = [None, generation(), tokens(7, -1)]


def attach(models_by_name: Any, name: str = "llama", **sae: Any) -> Any:
    return models_by_name(name)[0].attach({SITE: tiny_sae(**sae)})


def edit_of(strength: float, op: str = "add", unit: str = "raw", where: Where | None = None) -> Edit:
    return Edit(op=op, latents=(LATENT,), value=strength, unit=unit, where=where or EVERYWHERE)


def single(hooked: Any, strength: float, edit: dict[str, Any], **hf: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        return hooked.generate(IDS, edits=edit_of(strength, **edit), **hf)


def assert_rows_are_single_runs(hooked: Any, found: Any, edit: dict[str, Any], **hf: Any) -> None:
    assert [row.strength for row in found.rows] == STRENGTHS
    for row in found.rows:
        alone = single(hooked, row.strength, edit, **hf)
        assert torch.equal(row.generation.ids, alone.ids)
        assert row.generation.text == alone.text
        for ours, theirs in zip(
            [*row.generation.report.edits, *row.generation.report.sites],
            [*alone.report.edits, *alone.report.sites],
            strict=True,
        ):
            assert ours._replace(dose=0) == theirs._replace(dose=0)
            assert ours.dose == pytest.approx(theirs.dose, rel=1e-4, abs=1e-7)
        assert row.dose == row.generation.report.edits[0].dose
    plain = hooked.model.generate(IDS, **hf)
    assert torch.equal(found.unedited.generation.ids, plain.ids)


# --- rows against single runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("llama", None),
        ("gpt2", generation()),
        ("gemma2", tokens(7, -1)),
        *(pytest.param(name, where, marks=pytest.mark.slow) for name in ARCHITECTURES for where in WHERES),
    ],
    ids=str,
)
def test_each_row_has_the_tokens_of_its_single_run(models_by_name, name, where):
    hooked = attach(models_by_name, name)
    found = hooked.sweep(IDS, LATENT, STRENGTHS, where=where, max_new_tokens=8)
    assert found.note == ""
    assert_rows_are_single_runs(hooked, found, {"where": where}, max_new_tokens=8)
    assert len({tuple(row.generation.ids.tolist()) for row in found.rows}) > 1


@pytest.mark.parametrize(("op", "unit"), [("set", "max"), ("scale", "raw"), ("min", "norm")])
def test_every_op_that_has_a_value(models_by_name, op, unit):
    hooked = attach(models_by_name, activation="topk")
    found = hooked.sweep(IDS, LATENT, STRENGTHS, op=op, unit=unit, max_new_tokens=6)
    assert_rows_are_single_runs(hooked, found, {"op": op, "unit": unit}, max_new_tokens=6)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logits_are_those_of_single_runs(models_by_name, name):
    hooked = attach(models_by_name, name)
    ids = torch.tensor(IDS)
    options: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    edits = [edit_of(value, where=generation()) for value in STRENGTHS]
    rows = run_rows(hooked, hooked._batch(ids), edits, None, dict(options))
    for row, edit in enumerate([*edits, None]):
        program = Program(edits=[edit] if edit else [])
        alone, _ = hooked._generate(hooked._batch(ids), program, RandomState(None, hooked.device), dict(options))
        ours, theirs = (torch.stack(steps)[:, i] for steps, i in ((rows.logits, row), (alone.logits, 0)))
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(("seed", "where"), [(4, None), (None, generation())], ids=str)
def test_sampled_rows_share_the_noise_of_the_single_run(models_by_name, seed, where):
    hooked = attach(models_by_name)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.3, "top_k": 40, "seed": seed}
    start = torch.get_rng_state()
    found = hooked.sweep(IDS, LATENT, STRENGTHS, where=where, **options)
    after = torch.get_rng_state()
    for row in found.rows:
        torch.set_rng_state(start)
        assert torch.equal(row.generation.ids, single(hooked, row.strength, {"where": where}, **options).ids)
    assert torch.equal(after, torch.get_rng_state()), "the random state goes on as after one run"
    assert torch.equal(start, after) == (seed is not None)
    torch.set_rng_state(start)
    assert torch.equal(found.unedited.generation.ids, hooked.model.generate(IDS, **options).ids)


def test_a_row_that_ends_early_ends_as_alone(models_by_name):
    hooked = attach(models_by_name)
    texts = [single(hooked, value, {}, max_new_tokens=8).new_ids.tolist() for value in STRENGTHS]
    eos = next(i for i in texts[0][1:6] if sum(i in text[:6] for text in texts) < len(texts))
    options = {"max_new_tokens": 8, "eos_token_id": eos, "pad_token_id": PAD}
    found = hooked.sweep(IDS, LATENT, STRENGTHS, target=9, **options)
    assert len({len(row.generation.new_ids) for row in found.rows}) > 1
    for row in found.rows:
        assert torch.equal(row.generation.ids, single(hooked, row.strength, {}, **options).ids)
        assert_measures(hooked, row, 9)


# --- the shared prompt -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def passes(lm: Any) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the ids of every pass through the model."""
    shapes: list[tuple[int, ...]] = []
    handle = lm.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("where", "shared"),
    [
        (generation(), 20),
        (None, 1),  # the BOS is outside the mask
        (tokens(0), 0),
        (tokens(-3), 18),
        (span(6), 6),
        (span(22), 20),
        (token_ids(IDS[9]), IDS.index(IDS[9])),
        (Where(token_ids=(BOS,), special=True), 0),
        (Where(generation=False, special=True), 0),
    ],
    ids=str,
)
def test_the_prompt_before_the_first_selected_token_runs_once(models_by_name, where, shared):
    hooked = attach(models_by_name)
    with passes(hooked.lm) as shapes:
        found = hooked.sweep(IDS, LATENT, STRENGTHS, where=where, max_new_tokens=3, target=9)
    rows = len(STRENGTHS) + 1
    expected = [(1, shared)] if shared else []
    expected += [(rows, len(IDS) - shared), (rows, 1), (rows, 1)]
    expected += [(1, len(IDS) - 1 - shared)] if shared < len(IDS) - 1 else []
    assert shapes == [*expected, (rows, 3)]
    assert found.shared_tokens == shared


def test_skipped_first_tokens_are_shared(models_by_name):
    hooked = attach(models_by_name)
    hooked.saes[SITE].mask_rule = type(hooked.saes[SITE].mask_rule)(skip_first_tokens=4)
    assert hooked.sweep(IDS, LATENT, STRENGTHS, max_new_tokens=2).shared_tokens == 4


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_without_a_cache_that_can_be_repeated_each_row_runs_its_prompt(models_by_name, options):
    hooked = attach(models_by_name)
    found = hooked.sweep(IDS, LATENT, STRENGTHS, where=generation(), max_new_tokens=4, disable_compile=True, **options)
    assert found.shared_tokens == 0
    assert next(iter(options)) in found.note
    assert found.note in found.table()
    assert_rows_are_single_runs(hooked, found, {"where": generation()}, max_new_tokens=4)
    for row in found.rows:
        assert_measures(hooked, row, found.target, generation())


def test_a_model_with_a_cache_of_another_kind():
    config = Lfm2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        max_position_embeddings=64,
    )
    lm = Lfm2ForCausalLM(config).eval()
    lm.generation_config.eos_token_id = None
    hooked = HookedModel(lm, byte_tokenizer()).attach({"model.layers.0:output": tiny_sae()})
    found = hooked.sweep(IDS, LATENT, [1.0, 500.0], where=generation(), max_new_tokens=4)
    assert found.shared_tokens == 0
    assert "cannot be repeated" in found.note
    for row in found.rows:
        alone = hooked.generate(IDS, edits=edit_of(row.strength or 0.0, where=generation()), max_new_tokens=4)
        assert torch.equal(row.generation.ids, alone.ids)


def test_a_prompt_of_one_token(models_by_name):
    hooked = attach(models_by_name)
    found = hooked.sweep([BOS], LATENT, [2.0], max_new_tokens=3)
    alone = hooked.generate([BOS], edits=edit_of(2.0), max_new_tokens=3)
    assert torch.equal(found.rows[0].generation.ids, alone.ids)


# --- measures --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def assert_measures(hooked: Any, row: DoseRow, target: int, where: Where | None = None) -> None:
    """The measures of a row, from two uncached passes over its text."""
    ids, n = row.generation.ids, len(row.generation.new_ids)
    if where is None:
        edits = [edit_of(row.strength or 0.0)]
    else:  # generated tokens of the row are ordinary tokens of this input
        edits = [edit_of(row.strength or 0.0, where=span(len(IDS)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        edited = hooked(ids, edits).logits[0, -n - 1 : -1].double().log_softmax(-1)
    clean = hooked.model(ids).logits[0, -n - 1 : -1].double().log_softmax(-1)
    assert row.target_logprob == pytest.approx(float(edited[0, target]), abs=1e-4)
    assert row.mean_target_logprob == pytest.approx(float(edited[:, target].mean()), abs=1e-4)
    assert row.loss == pytest.approx(-float(clean[range(n), ids[-n:]].mean()), abs=1e-4)
    kl = float(torch.nn.functional.kl_div(edited, clean, log_target=True, reduction="sum")) / n
    assert row.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert row.repetition == repetition(row.generation.new_ids)


@pytest.mark.parametrize("where", [None, generation()], ids=["every", "generated"])
def test_measures_are_those_of_uncached_passes(models_by_name, where):
    hooked = attach(models_by_name)
    found = hooked.sweep(IDS, LATENT, STRENGTHS, where=where, target=9, max_new_tokens=7)
    for row in found.rows:
        assert_measures(hooked, row, 9, where)
        assert row.kl > 0
    assert_measures(hooked, found.unedited, 9)
    assert found.unedited.kl == pytest.approx(0, abs=1e-9)
    assert found.unedited.dose == 0


def test_rows_are_measured_in_parts_that_fit(models_by_name, monkeypatch):
    hooked = attach(models_by_name)
    whole = hooked.sweep(IDS, LATENT, STRENGTHS, max_new_tokens=4)
    monkeypatch.setattr("saehook.dose_response.MAX_LOGITS", 2 * 4 * 300)
    parts = hooked.sweep(IDS, LATENT, STRENGTHS, max_new_tokens=4)
    assert [row.kl for row in parts.rows] == pytest.approx([row.kl for row in whole.rows], rel=1e-4)


def test_the_target_by_default_is_what_the_direction_promotes(models_by_name):
    hooked = attach(models_by_name)
    found = hooked.sweep(IDS, LATENT, [2.0], max_new_tokens=2)
    direction = hooked.saes[SITE].W_dec[LATENT]
    assert found.target == int((hooked.lm.lm_head.weight @ direction).argmax())
    assert found.target_token == hooked.tokenizer.decode([found.target])
    narrow = models_by_name("llama")[0].attach({"layers.1.attn_z": tiny_sae(48)})
    found = narrow.sweep(IDS, LATENT, [2.0], max_new_tokens=2)
    assert found.target == int(found.unedited.generation.new_ids[0])


def test_a_target_as_text(models_by_name):
    hooked = attach(models_by_name)
    found = hooked.sweep("some text", LATENT, [2.0], target="q", max_new_tokens=2)
    assert found.target_token == "q"
    assert found.prompt_ids.tolist() == hooked.tokenizer("some text")["input_ids"]


@pytest.mark.parametrize(
    ("ids", "share"), [([1, 2, 3], 0), ([1, 2, 3, 4], 0), ([1, 2, 3, 4] * 3, 1 - 4 / 9), ([7] * 10, 6 / 7), ([], 0)]
)
def test_repetition(ids, share):
    assert repetition(torch.tensor(ids, dtype=torch.long)) == pytest.approx(share)


# --- what comes out --------------------------------------------------------------------------------------------------


def test_table_and_json(models_by_name):
    hooked = attach(models_by_name)
    found = hooked.sweep(IDS, LATENT, STRENGTHS, unit="max", where=prompt(), target=9, max_new_tokens=5)
    lines = found.table().splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["strength", "unedited", "-6", "0.5", "3", "12"]
    assert repr(found) == found.table()
    data = json.loads(found.to_json())
    assert [row["strength"] for row in data["rows"]] == STRENGTHS
    assert data["rows"][2]["new_ids"] == found.rows[2].generation.new_ids.tolist()
    assert data["rows"][2]["kl"] == found.rows[2].kl
    assert data["rows"][2]["tokens"] == 20
    assert data["unedited"]["text"] == found.unedited.generation.text
    assert Program.from_json(json.dumps(data["program"])).edits == (edit_of(-6.0, unit="max", where=prompt()),)


def test_a_sweep_that_does_nothing_is_named(models_by_name):
    hooked = attach(models_by_name)
    with pytest.warns(NoEffectWarning, match="no strength did anything"):
        hooked.sweep(IDS, LATENT, STRENGTHS, where=span(60), max_new_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hooked.sweep(IDS, LATENT, [0.0, 1.0], max_new_tokens=2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strengths": []}, "one or more numbers"),
        ({"strengths": 3.0}, "one or more numbers"),
        ({"strengths": [1.0, float("nan")]}, "finite"),
        ({"strengths": [1.0, "2"]}, "finite"),
        ({"op": "ablate"}, "no value"),
        ({"where": Where(rows=(0,))}, "its strengths"),
        ({"prompt": [IDS, IDS]}, "one prompt"),
        ({"target": "two words"}, "tokens"),
        ({"target": 300}, "from 0 to 299"),
        ({"num_beams": 2}, "num_beams"),
        ({"num_return_sequences": 3}, "num_return_sequences"),
        ({"streamer": "x"}, "streamer"),
        ({"where": tokens(40)}, "outside the 21 tokens"),
        ({"seed": 1.5}, "seed"),
    ],
    ids=str,
)
def test_what_is_refused(models_by_name, wrong, message):
    hooked = attach(models_by_name)
    arguments: dict[str, Any] = {"prompt": IDS, "latent": LATENT, "strengths": STRENGTHS} | wrong
    with pytest.raises(ArgumentError, match=message):
        hooked.sweep(**arguments)


def test_an_unknown_latent_or_site(models_by_name):
    hooked = attach(models_by_name)
    with pytest.raises(LatentError):
        hooked.sweep(IDS, 48, STRENGTHS)
    with pytest.raises(SiteError):
        hooked.sweep(IDS, LATENT, STRENGTHS, site="layers.0.resid_post")


def test_a_generation_config_is_used_and_left_alone(models_by_name):
    hooked = attach(models_by_name)
    config = type(hooked.lm.generation_config)(max_new_tokens=5, pad_token_id=PAD)
    found = hooked.sweep(IDS, LATENT, STRENGTHS, generation_config=config)
    assert_rows_are_single_runs(hooked, found, {}, max_new_tokens=5)
    assert config.output_logits is not True


def test_several_latents_and_active_only(models_by_name):
    hooked = attach(models_by_name)
    found = hooked.sweep(IDS, [4, LATENT], [2.0, 4.0], active_only=True, max_new_tokens=5)
    for row in found.rows:
        edit = Edit(op="add", latents=(4, LATENT), value=row.strength, active_only=True)
        alone: Tensor = hooked.generate(IDS, edits=edit, max_new_tokens=5).ids
        assert torch.equal(row.generation.ids, alone)


def test_a_whole_edit_with_a_schedule_or_read_back(models_by_name):
    hooked = attach(models_by_name)
    edit = Edit(op="set", latents=(LATENT,), value=0.0, schedule=Schedule.linear(1, 0, 4), mode="readback")
    found = hooked.sweep(IDS, edit, [2.0, 9.0], max_new_tokens=5)
    for row in found.rows:
        alone = hooked.generate(IDS, edits=dataclasses.replace(edit, value=row.strength), max_new_tokens=5)
        assert torch.equal(row.generation.ids, alone.ids)
        assert row.generation.report.edits[0].residual == pytest.approx(alone.report.edits[0].residual, abs=1e-4)


def test_a_condition_keeps_its_prompt(models_by_name):
    hooked = attach(models_by_name)
    edit = edit_of(3.0, where=generation())
    edit = dataclasses.replace(edit, when=latent(7, over="prompt_max") > 0.0)
    found = hooked.sweep(IDS, edit, [2.0, 9.0], max_new_tokens=5)
    assert found.shared_tokens == 0
    assert "condition" in found.note
    for row in found.rows:
        alone = hooked.generate(IDS, edits=dataclasses.replace(edit, value=row.strength), max_new_tokens=5)
        assert torch.equal(row.generation.ids, alone.ids)


def test_a_vector_and_a_pattern(models_by_name):
    hooked = attach(models_by_name)
    vector = tuple(hooked.saes[SITE].W_dec[LATENT].tolist())
    edit = VectorEdit(op="add", vector=vector, value=1.0, site="layers.0.mlp_out", where=matching("b"))
    found = hooked.sweep("aaab", edit, [3.0, 30.0], max_new_tokens=5)
    assert found.shared_tokens == 4
    assert found.target == hooked.sweep("aaab", LATENT, [1.0], max_new_tokens=1).target
    for row in found.rows:
        alone = hooked.generate("aaab", edits=dataclasses.replace(edit, value=row.strength), max_new_tokens=5)
        assert torch.equal(row.generation.ids, alone.ids)
