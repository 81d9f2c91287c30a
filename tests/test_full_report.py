"""The full report against plain hooks and by hand, reports as JSON, and the noise that seeded rows are drawn with."""

from __future__ import annotations

import json
from typing import Any

import pytest
import reference_hooks as reference
import torch
import torch.nn.functional as F
from builders import PAD, SPECIAL, WIDTH, build_lm, byte_tokenizer, random_ids, tiny_sae
from torch import Tensor
from transformers import GenerationConfig, WatermarkingConfig

from saehook.config import SAEConfig, TopK
from saehook.edits import ablate, add_vector, clamp, keep_only, project_out, scale, steer, swap
from saehook.errors import ArgumentError, NoEffectWarning
from saehook.hooked_model import HookedModel
from saehook.interventions import Program
from saehook.results import MOST_MOVED, EditReport, LatentChange, Report, SiteReport
from saehook.sae import SAE
from saehook.sampling_noise import RowNoise
from saehook.streaming import stream
from saehook.where import generation, prompt, tokens

SITE = "layers.1.resid_post"
IDS = random_ids(9, seed=5, bos=True)
OTHER = random_ids(5, seed=6, bos=True)
SAMPLED: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "seed": 3}
STRONG = (steer(9, 8.0),)


def attach(models_by_name: Any, name: str = "llama", **sae: Any) -> tuple[Any, Any, SAE]:
    """(handle, plain torch model with the same weights, its SAE)."""
    model, lm = models_by_name(name)
    made = tiny_sae(site=SITE, **sae)
    return model.attach(made), lm, made


def ids_of(rows: Any) -> list[list[int]]:
    return [row.new_ids.tolist() for row in (rows if isinstance(rows, list) else [rows])]


@torch.no_grad()
def values_at(lm: Any, ids: list[int]) -> Tensor:
    """x at the site in the unedited model, [n, d]."""
    seen: list[Tensor] = []
    with reference.written(lm, SITE, lambda x: seen.append(x[0].clone()) or x):
        lm(input_ids=torch.tensor([ids]), use_cache=False)
    return seen[0]


def facts(latent: int, before: Tensor, after: Tensor) -> tuple[float, ...]:
    before, after = before.detach(), after.detach()
    numbers = (before.mean(), after.mean(), before.max(), after.max(), (after - before).abs().mean())
    return (latent, *map(float, numbers))


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_full_report_is_what_plain_hooks_measure(models_by_name, name):
    hooked, lm, sae = attach(models_by_name, name)
    program = Program(edits=[scale(4, 2.0, where=prompt()), clamp([5, 4], 1.5), steer(7, 3.0, where=generation())])
    runs = hooked.generate([IDS, OTHER], program, report="full", num_return_sequences=2, **SAMPLED)
    report = runs[0].report
    assert all(run.report is report for run in runs)
    x, z, touched_prompt = [], [], []
    for number, (run, row) in enumerate(zip(runs, report.rows, strict=True)):
        given = run.ids[:-1].tolist()
        assert list(row.ids) == given
        length = len(IDS) if number < 2 else len(OTHER)
        with torch.no_grad():
            clean = lm(input_ids=torch.tensor([given]), use_cache=False).logits[0].log_softmax(-1)
        edited = reference.logits(lm, given, program, hooked.saes, special=SPECIAL, prompt=length).log_softmax(-1)
        kl = F.kl_div(edited, clean, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(torch.tensor(row.kl), kl, rtol=1e-3, atol=1e-4)
        assert row.kl[0] == 0.0, "nothing is edited at BOS"
        assert max(row.kl) > 1e-3
        keep = torch.tensor([token not in SPECIAL for token in given])
        x.append(values_at(lm, given)[keep])
        z.append(sae.encode(x[-1]).detach())
        touched_prompt.append((torch.arange(len(given)) < length)[keep])
    x, z, in_prompt = torch.cat(x), torch.cat(z), torch.cat(touched_prompt)
    new = z.clone()
    new[in_prompt, 4] *= 2
    expected = [[facts(4, z[in_prompt, 4], new[in_prompt, 4])]]
    before = new.clone()
    new[:, [5, 4]] = 1.5
    expected.append([facts(5, before[:, 5], new[:, 5]), facts(4, before[:, 4], new[:, 4])])
    new[~in_prompt, 7] += 3.0
    expected.append([facts(7, z[~in_prompt, 7], new[~in_prompt, 7])])
    for edit, latents in zip(report.edits, expected, strict=True):
        for found, numbers in zip(edit.latents, latents, strict=True):
            assert tuple(found) == pytest.approx(numbers, abs=1e-4)
    assert [edit.tokens for edit in report.edits] == [int(in_prompt.sum()), len(z), int((~in_prompt).sum())]
    again = sae.encode(x + (new - z) @ sae.W_dec).detach()
    change = (again - z).abs().mean(0)
    change[[4, 5, 7]] = 0
    (effects,) = report.side_effects
    assert effects.sae == SITE
    assert [c.latent for c in effects.latents] == change.topk(MOST_MOVED).indices.tolist()
    for found in effects.latents:
        assert tuple(found) == pytest.approx(facts(found.latent, z[:, found.latent], again[:, found.latent]), abs=1e-3)
    hooked.detach()


def test_the_report_of_a_text_is_that_of_its_rows(models_by_name):
    hooked, lm, sae = attach(models_by_name)
    edits = [ablate([3, 5])]
    both = hooked.report([IDS, OTHER], edits)
    alone = [hooked.report(ids, edits) for ids in (IDS, OTHER)]
    assert both.edits[0].tokens == sum(one.edits[0].tokens for one in alone) == len(IDS) + len(OTHER) - 2
    for row, one in zip(both.rows, alone, strict=True):
        assert row.ids == one.rows[0].ids
        assert row.kl == pytest.approx(one.rows[0].kl, abs=1e-4)
        assert row.unedited_ids is None
        assert row.mean_kl == pytest.approx(sum(row.kl) / len(row.kl))
    latents = torch.cat([sae.encode(values_at(lm, ids)[1:])[:, [3, 5]] for ids in (IDS, OTHER)])
    for change, column in zip(both.edits[0].latents, latents.T, strict=True):
        assert tuple(change) == pytest.approx(facts(change.latent, column, torch.zeros(len(column))), abs=1e-4)
    with pytest.warns(NoEffectWarning, match="selected no token"):
        hooked.report(IDS, [steer(3, 1.0, where=generation())])
    hooked.detach()


def test_rows_of_different_lengths_are_measured_to_their_own_end(models_by_name):
    hooked, _, _ = attach(models_by_name)
    long = ids_of(hooked.generate([IDS, OTHER], STRONG, **SAMPLED))
    ends = long[0][2]
    assert ends not in long[0][:2]
    rows = hooked.generate([IDS, OTHER], STRONG, report="full", eos_token_id=ends, **SAMPLED)
    assert len(rows[0].new_ids) == 3
    assert len(rows[1].new_ids) > 3
    for row, run in zip(rows[0].report.rows, rows, strict=True):
        assert list(row.ids) == run.ids[:-1].tolist()
        assert len(row.kl) == len(row.ids)
    hooked.detach()


@pytest.mark.parametrize(
    "program",
    [
        Program(),
        Program(edits=[steer(9, 0.0), scale([3, 4], 1.0)]),
        Program(edits=[steer(9, 5.0, where=tokens(0))], norm={"cap": 1e-30}),
    ],
    ids=["empty", "nothing", "capped away"],
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": True, "seed": 1}, {"do_sample": True}, {"num_beams": 2}],
    ids=["greedy", "seeded", "unseeded", "beams"],
)
@pytest.mark.filterwarnings("ignore::saehook.errors.NoEffectWarning")
def test_a_program_that_does_nothing_changes_exactly_nothing(models_by_name, program, settings):
    hooked, _, _ = attach(models_by_name)
    runs = hooked.generate([IDS, OTHER], program, report="full", max_new_tokens=6, **settings)
    report = runs[0].report
    for row, run in zip(report.rows, runs, strict=True):
        assert set(row.kl) == {0.0}
        assert row.first_divergent is None
        assert list(row.unedited_ids) == run.new_ids.tolist()
        assert row.unedited_text == run.text
    for edit in report.edits:
        if edit.dose == 0:
            assert all(c.change == 0 and c.before == c.after for c in edit.latents)
    assert not any(effects.latents for effects in report.side_effects)
    hooked.detach()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "seed": 1},
        {"do_sample": True},
        {"do_sample": True, "seed": 2, "num_return_sequences": 2, "temperature": 0.7, "top_k": 20},
        {"num_beams": 2},
        {"do_sample": True, "seed": 2, "use_cache": False},
    ],
    ids=["greedy", "seeded", "unseeded", "return sequences", "beams", "uncached"],
)
def test_the_first_divergent_token_is_where_two_runs_part(models_by_name, settings):
    hooked, _, _ = attach(models_by_name)
    settings = {"max_new_tokens": 10, **settings}
    state = torch.get_rng_state()
    runs = hooked.generate([IDS, OTHER], STRONG, report="full", **settings)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    plain = hooked.generate([IDS, OTHER], STRONG, **settings)
    assert torch.equal(torch.get_rng_state(), after), "a full report draws no more from the caller's state"
    torch.set_rng_state(state)
    unedited = hooked.generate([IDS, OTHER], **settings)
    assert ids_of(runs) == ids_of(plain)
    for row, one, other in zip(runs[0].report.rows, ids_of(plain), ids_of(unedited), strict=True):
        assert list(row.unedited_ids) == other
        assert row.first_divergent == next((i for i in range(10) if one[i] != other[i]), None)
    assert any(row.first_divergent is not None for row in runs[0].report.rows)
    assert "first_divergent" in runs[0].report.to_json()
    hooked.detach()


def test_what_counts_as_a_side_effect(models_by_name):
    hooked, lm, sae = attach(models_by_name)
    (effects,) = hooked.report(IDS, [steer(3, 4.0), swap(8, 9)]).side_effects
    assert len(effects.latents) == MOST_MOVED
    assert not {3, 8, 9} & {c.latent for c in effects.latents}
    assert [c.change for c in effects.latents] == sorted((c.change for c in effects.latents), reverse=True)
    (effects,) = hooked.report(IDS, [keep_only([3, 4])]).side_effects
    assert effects.latents == (), "keep_only decides all latents"
    (effects,) = hooked.report(IDS, splice=True).side_effects
    x = values_at(lm, IDS)[1:]
    change = (sae.encode(sae(x).x_hat) - sae.encode(x)).abs().mean(0)
    assert [c.latent for c in effects.latents] == change.topk(MOST_MOVED).indices.tolist()
    direction = torch.randn(WIDTH).tolist()
    report = hooked.report(IDS, [add_vector(direction, 2.0, site=SITE)])
    assert report.edits[0].latents == ()
    change = (sae.encode(x + 2 * torch.tensor(direction)) - sae.encode(x)).abs().mean(0)
    assert [c.latent for c in report.side_effects[0].latents] == change.topk(MOST_MOVED).indices.tolist()
    hooked.detach()


def test_keep_only_reports_the_latents_that_it_names(models_by_name):
    hooked, lm, sae = attach(models_by_name)
    report = hooked.report(IDS, [keep_only([6, 3]), scale(3, 2.0)])
    z = sae.encode(values_at(lm, IDS)[1:])
    for change, latent in zip(report.edits[0].latents, (6, 3), strict=True):
        assert tuple(change) == pytest.approx(facts(latent, z[:, latent], z[:, latent]), abs=1e-4)
    assert tuple(report.edits[1].latents[0]) == pytest.approx(facts(3, z[:, 3], 2 * z[:, 3]), abs=1e-4)
    hooked.detach()


def test_an_edit_that_runs_nowhere_has_zeros(models_by_name):
    hooked, _, _ = attach(models_by_name)
    with pytest.warns(NoEffectWarning):
        report = hooked.report(IDS, [steer([3, 4], 1.0, where=generation())])
    assert report.edits[0].latents == (LatentChange(3, *[0.0] * 5), LatentChange(4, *[0.0] * 5))
    assert report.side_effects == ()
    hooked.detach()


def test_a_transcoder_is_read_where_it_reads(models_by_name):
    model, lm = models_by_name("llama")
    draw = torch.Generator().manual_seed(4)
    config = SAEConfig(d_in=WIDTH, d_out=WIDTH, d_sae=24, activation=TopK(k=5), subtract_b_dec=False)
    coder = SAE(config, generator=draw)
    hooked = model.attach({("layers.1.mlp_in", "layers.1.mlp_out"): coder})
    report = hooked.report(IDS, [scale(3, 2.0), steer(5, 1.0)])
    seen: list[Tensor] = []
    with torch.no_grad(), reference.written(lm, "layers.1.mlp_in", lambda x: seen.append(x[0].clone()) or x):
        lm(input_ids=torch.tensor([IDS]))
    z = coder.encode(seen[0][1:]).detach()
    assert tuple(report.edits[0].latents[0]) == pytest.approx(facts(3, z[:, 3], 2 * z[:, 3]), abs=1e-4)
    assert tuple(report.edits[1].latents[0]) == pytest.approx(facts(5, z[:, 5], 1 + z[:, 5]), abs=1e-4)
    assert report.side_effects == (), "it reads nothing of what it writes"
    hooked.detach()


def test_a_model_without_saes_reports_its_vectors(models_by_name):
    model, _ = models_by_name("gpt2")
    edits = [project_out(torch.randn(WIDTH).tolist(), site=SITE)]
    run = model.generate(IDS, edits, report="full", max_new_tokens=4)
    (row,) = run.report.rows
    assert row.mean_kl > 0
    assert run.report.side_effects == ()
    assert model.report(IDS).rows[0].mean_kl == 0


def test_a_stream_ends_with_the_full_report(models_by_name):
    hooked, _, _ = attach(models_by_name)
    *parts, last = stream(hooked, IDS, edits=STRONG, report="full", **SAMPLED)
    expected = hooked.generate(IDS, STRONG, report="full", **SAMPLED)
    assert last.generation is not None
    assert last.generation.report == expected.report
    assert last.new_ids == tuple(ids_of(expected)[0])
    assert all(last.new_ids[: len(part.new_ids)] == part.new_ids for part in parts), "the unedited row is not streamed"
    hooked.detach()


def test_mistakes_are_named(models_by_name):
    hooked, _, _ = attach(models_by_name)
    for wrong in ("more", True, 1):
        with pytest.raises(ArgumentError, match="expected None"):
            hooked.generate(IDS, report=wrong)
    cache = hooked(IDS[:4], use_cache=True).past_key_values
    with pytest.raises(ArgumentError, match="begins with past_key_values"):
        hooked.generate(IDS, report="full", past_key_values=cache)
    hooked.detach()


# --- JSON ---------------------------------------------------------------------------------------------------------------


def test_reports_as_json_hold_every_number_and_programs_edits(models_by_name):
    hooked, _, _ = attach(models_by_name)
    edits = [steer(9, 0.1, unit="max", where=prompt()), add_vector(torch.randn(WIDTH).tolist(), 0.3, site=SITE)]
    for kind in (None, "full"):
        report = hooked.generate(IDS, edits, report=kind, **SAMPLED).report
        data = json.loads(report.to_json())
        assert data == report.to_data()
        program = json.loads(Program(edits=edits).to_json())
        assert [edit["edit"] for edit in data["edits"]] == program["edits"]
        assert [edit["dose"] for edit in data["edits"]] == [edit.dose for edit in report.edits]
        assert data["sites"] == [site._asdict() for site in report.sites]
        assert [tuple(row["kl"]) for row in data["rows"]] == [row.kl for row in report.rows]
        assert len(data["rows"]) == len(data["side_effects"]) == (0 if kind is None else 1)
    assert data["edits"][0]["latents"] == [change._asdict() for change in report.edits[0].latents]
    assert len(str(report).splitlines()) == 2 + 1 + 1 + MOST_MOVED + 1, "edits, a latent, a site, what moved, a row"
    hooked.detach()


def test_numbers_that_are_none_become_null():
    report = Report((EditReport(steer(3, 1.0), 2, float("nan")),), (SiteReport(SITE, 2, float("inf")),))
    data = json.loads(report.to_json())
    assert data["edits"][0]["dose"] is None
    assert data["sites"][0] == {"site": SITE, "tokens": 2, "dose": None}
    assert data["notes"] == []
    idle = Report((EditReport(steer(3, 1.0), 0, 0.0),))
    assert "selected no token" in json.loads(idle.to_json())["notes"][0]


# --- noise ---------------------------------------------------------------------------------------------------------------


def test_a_row_has_noise_of_its_own(models_by_name):
    hooked, _, _ = attach(models_by_name)
    alone = ids_of(hooked.generate(IDS, STRONG, **SAMPLED))[0]
    assert ids_of(hooked.generate([IDS, OTHER, OTHER], STRONG, **SAMPLED))[0] == alone
    first, second = ids_of(hooked.generate([OTHER, IDS], STRONG, **SAMPLED))
    assert second != alone, "another row, other noise"
    assert ids_of(hooked.generate([IDS, IDS], STRONG, **SAMPLED))[1] == second
    several = ids_of(hooked.generate([IDS, OTHER], STRONG, num_return_sequences=3, **SAMPLED))
    assert several[0] == alone
    assert len({tuple(row) for row in several[:3]}) == 3
    pairs = ids_of(hooked.generate([IDS, IDS], STRONG, num_return_sequences=2, **SAMPLED))
    assert pairs[2] == second
    for way in ({"use_cache": False}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": build_lm("llama", seed=1)}):
        assert ids_of(hooked.generate(IDS, STRONG, **way, **SAMPLED))[0] == alone, way
    hooked.detach()


def test_noise_draws_from_the_distribution():
    """Frequencies over 4000 tokens and two rows against the probabilities, by chi-square with 6 degrees of freedom."""
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0, -torch.inf, 0.5, -0.5, 1.5]])
    probs = scores.softmax(-1)[0]
    noise = RowNoise(seed=2, length=0)
    draws = torch.cat([(scores + noise.of(scores.expand(2, -1), t)).argmax(-1) for t in range(2000)])
    counts = torch.bincount(draws, minlength=8)
    assert counts[4] == 0
    expected = probs * len(draws)
    chi = ((counts - expected)[probs > 0].square() / expected[probs > 0]).sum()
    assert chi < 22.5, "p = 0.001"
    pairs = draws.view(-1, 2)
    same = (pairs[:, 0] == pairs[:, 1]).float().mean()
    assert same == pytest.approx(float(probs.square().sum()), abs=0.04), "rows are independent"


def test_the_shape_of_the_distribution_comes_first(models_by_name):
    """top_k=1 leaves nothing to draw; a seed that draws before it would."""
    hooked, _, _ = attach(models_by_name)
    greedy = ids_of(hooked.generate(IDS, STRONG, max_new_tokens=8))
    assert ids_of(hooked.generate(IDS, STRONG, top_k=1, **SAMPLED)) == greedy
    assert ids_of(hooked.generate(IDS, STRONG, temperature=1e-4, **SAMPLED)) == greedy
    assert ids_of(hooked.generate(IDS, STRONG, **SAMPLED)) != greedy
    config = GenerationConfig(do_sample=True, max_new_tokens=8, pad_token_id=PAD, top_k=20)
    before = config.to_dict()
    given = ids_of(hooked.generate(IDS, STRONG, generation_config=config, seed=3))
    assert given == ids_of(hooked.generate(IDS, STRONG, top_k=20, **SAMPLED))
    assert config.to_dict() == before
    hooked.detach()


@pytest.mark.parametrize(
    ("seed", "settings"),
    [
        (None, {"do_sample": True}),
        (3, {"do_sample": True, "num_beams": 2}),
        (3, {"do_sample": True, "watermarking_config": WatermarkingConfig(bias=2.0)}),
        (3, {"do_sample": False}),
    ],
    ids=["unseeded", "beams", "a watermark", "greedy"],
)
def test_what_draws_no_noise_of_ours_is_hugging_faces_own(models_by_name, seed, settings):
    model, lm = models_by_name("llama")
    torch.manual_seed(3)
    ours = model.generate(IDS, seed=seed, max_new_tokens=8, **settings)
    torch.manual_seed(3)
    theirs = lm.generate(torch.tensor([IDS]), max_new_tokens=8, pad_token_id=PAD, **settings)
    assert ours.ids.tolist() == theirs[0].tolist()


def test_scores_that_are_not_finite_are_still_an_error(models_by_name):
    lm = build_lm("llama")
    with torch.no_grad():
        lm.lm_head.weight[7] = torch.nan
    with pytest.raises(RuntimeError, match="probability"):
        HookedModel(lm, byte_tokenizer()).generate(IDS, **SAMPLED)
