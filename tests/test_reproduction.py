"""The runner of the papers' claims, its verdicts, and the page that is made of stored numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import reproduce
import torch
from bundle import CHECKPOINTS, card
from reproduction import page
from reproduction.bootstrap import estimate
from reproduction.data import CHUNK, WIDTH, LanguageModel, Places, Planted
from reproduction.laboratory import MLP, RESID, Lab
from reproduction.measure import at_l0, mean_l0
from reproduction.outcome import (
    NOT_REPRODUCED,
    REPRODUCED,
    UNTESTED,
    Finding,
    Outcome,
    Plot,
    Series,
    counted_findings,
    joined,
    verdict,
    why,
)
from reproduction.registry import claims
from reproduction.runner import Run, Runner
from torch import Tensor

from saehook import BatchTopK, TopK, TrainConfig, load_sae
from saehook.errors import ArgumentError, TrainingInterrupted
from saehook.eval_result import EvalResult

NAMES = """
topk-sets-l0 variable-l0 no-sweep threshold batch-independence topk-vs-relu downstream-gain batchtopk-vs-topk
batchtopk-vs-jumprelu shrinkage ste lambda-controls-l0 bandwidth unit-norm dead-latents unit-rows multi-topk scaling-laws
larger-is-better compute-equivalent ablation-sparsity probe-loss n2g attribution steering-window clamp-or-add zero-ablation
surgical bf16 special-tokens
""".split()
NEED_A_MODEL = """
downstream-gain scaling-laws larger-is-better compute-equivalent ablation-sparsity probe-loss n2g attribution steering-window
clamp-or-add zero-ablation surgical bf16 special-tokens
""".split()
DATA = Planted(d_in=8, features=12, mean=2)
CONFIG = TrainConfig(
    site="planted", activation=TopK(k=2), d_sae=16, tokens=4096, batch_tokens=512, calibration_tokens=512
)


def test_every_claim_is_listed_with_its_name_first(capsys):
    assert reproduce.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(claim.says in line for claim, line in zip(claims().values(), lines, strict=True))


def test_an_unknown_claim_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(["topk-vs-rleu"])
    assert stopped.value.code == 2
    assert "there is no claim topk-vs-rleu" in capsys.readouterr().err


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_key_depends_on_all_that_decides_the_weights():
    runs = [
        Run(DATA, CONFIG),
        Run(DATA, CONFIG, untied=True),
        Run(dataclasses.replace(DATA, noise=0.03), CONFIG),
        *(
            Run(DATA, dataclasses.replace(CONFIG, **change))
            for change in (
                {"seed": 1},
                {"lr": 1e-3},
                {"tokens": 8192},
                {"activation": BatchTopK(k=2)},
                {"auxk_coefficient": 0.0},
                {"k_aux": 3},
            )
        ),
    ]
    assert len({run.key for run in runs}) == len(runs)
    assert Run(Planted(d_in=8, features=12, mean=2), dataclasses.replace(CONFIG)).key == runs[0].key


def test_a_finished_run_is_not_trained_again(tmp_path):
    runs = [Run(DATA, dataclasses.replace(CONFIG, seed=seed)) for seed in (0, 1)]
    first = Runner(tmp_path, progress=False)
    one = first.saes(runs[:1])
    assert (first.trained, first.finished(runs[1])) == (1, None)
    again = Runner(tmp_path, progress=False)
    both = again.saes(runs)
    assert again.trained == 1
    assert torch.equal(one[0].W_dec, both[0].W_dec)
    assert not torch.equal(both[0].W_dec, both[1].W_dec)
    assert not list((tmp_path / "unfinished").iterdir())


def test_an_sae_does_not_depend_on_what_it_was_trained_beside(tmp_path):
    runs = [Run(DATA, dataclasses.replace(CONFIG, seed=seed)) for seed in (0, 1)]
    alone = Runner(tmp_path / "alone", progress=False).saes(runs[1:])
    beside = Runner(tmp_path / "beside", progress=False).saes(runs)
    assert torch.equal(alone[0].W_enc, beside[1].W_enc)


@dataclass(frozen=True)
class Interrupted(Planted):
    """The same activations; the process gets a signal when the sixth chunk is made, a third through."""

    @property
    def facts(self):
        return DATA.facts

    def chunks(self) -> Iterator[dict[str, Tensor]]:
        for i, chunk in enumerate(super().chunks()):
            if i == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield chunk


def test_a_stopped_run_goes_on(tmp_path):
    config = dataclasses.replace(CONFIG, tokens=6 * CHUNK, batch_tokens=1024)
    stopped = Run(Interrupted(d_in=8, features=12, mean=2), config)
    with pytest.raises(TrainingInterrupted):
        Runner(tmp_path / "stopped", progress=False).saes([stopped])
    (checkpoint,) = (tmp_path / "stopped" / "unfinished").glob("*/step-*")
    assert 20 < int(checkpoint.name.removeprefix("step-")) < 80  # of 96
    (resumed,) = Runner(tmp_path / "stopped", progress=False).saes([Run(DATA, config)])
    (whole,) = Runner(tmp_path / "whole", progress=False).saes([Run(DATA, config)])
    assert torch.equal(resumed.W_enc, whole.W_enc)
    assert torch.equal(resumed.W_dec, whole.W_dec)


def test_an_untied_run_begins_with_another_encoder(tmp_path):
    config = dataclasses.replace(CONFIG, tokens=512, lr=1e-12)
    tied, untied = Runner(tmp_path, progress=False).saes([Run(DATA, config), Run(DATA, config, untied=True)])
    cosines = [torch.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=-1).detach() for sae in (tied, untied)]
    assert float(cosines[0].min()) > 0.999
    assert float(cosines[1].mean()) < 0.7


# --- measuring --------------------------------------------------------------------------------------------------------


def test_a_threshold_is_set_to_the_l0_that_is_asked_for(tmp_path):
    config = dataclasses.replace(CONFIG, activation=BatchTopK(k=2))
    (sae,) = Runner(tmp_path, progress=False).saes([Run(DATA, config)])
    for wanted in (1.0, 3.0):
        assert mean_l0(at_l0(sae, DATA, wanted), DATA) == pytest.approx(wanted, rel=0.01)


def test_intervals_are_paired():
    generator = torch.Generator().manual_seed(0)
    noisy = [{"error": torch.rand(20, generator=generator).double() + 1} for _ in range(3)]
    half = [{"error": t["error"] / 2} for t in noisy]
    ratio = estimate({"a": half, "b": noisy}, lambda s: s["a"]["error"] / s["b"]["error"])
    assert ratio == pytest.approx((0.5, 0.5, 0.5))
    value, low, high = estimate({"a": noisy}, lambda s: s["a"]["error"])
    assert low < value < high
    apart = [{"error": torch.full((20,), float(i)).double()} for i in (1, 2, 3)]
    _, low, high = estimate({"a": apart}, lambda s: s["a"]["error"] / 60)
    assert (low, high) == pytest.approx((1.0, 3.0), abs=0.35)  # seeds are drawn, too


# --- verdicts ---------------------------------------------------------------------------------------------------------


def found(low: float, high: float, data: str = "x", **bounds) -> Finding:
    return Finding(data, "ratio", (low + high) / 2, low, high, **bounds)


@pytest.mark.parametrize(
    ("low", "high", "bounds", "state"),
    [
        (0.8, 0.9, {"below": 1.0}, "holds"),
        (0.9, 1.1, {"below": 1.0}, "open"),
        (1.0, 1.1, {"below": 1.0}, "fails"),
        (1.1, 1.2, {"above": 1.0}, "holds"),
        (0.8, 1.0, {"above": 1.0}, "fails"),
        (0.99, 1.01, {"above": 0.98, "below": 1.02}, "holds"),
        (0.97, 1.01, {"above": 0.98, "below": 1.02}, "open"),
        (1.03, 1.05, {"above": 0.98, "below": 1.02}, "fails"),
        (0.5, 0.6, {}, ""),
        (float("nan"), float("nan"), {"below": 1.0}, "open"),
    ],
)
def test_the_state_of_a_finding(low, high, bounds, state):
    assert found(low, high, **bounds).state == state


def test_the_verdict_of_findings():
    holds, fails, open_ = (found(*ends, below=1.0) for ends in ((0.8, 0.9), (1.1, 1.2), (0.9, 1.1)))
    assert verdict([holds, found(5, 6)]) == REPRODUCED
    assert verdict([holds, fails, open_]) == NOT_REPRODUCED
    assert verdict([holds, open_]) == UNTESTED
    assert verdict([found(5, 6)]) == UNTESTED
    assert verdict([holds], untestable="no model") == UNTESTED


def test_data_whose_condition_does_not_hold_are_not_counted():
    fails = found(1.1, 1.2, "x", below=1.0)
    unmatched = Finding("x", "L0 ratio", 1.1, 1.1, 1.1, 0.98, 1.02, condition=True)
    matched = dataclasses.replace(unmatched, value=1.0, low=1.0, high=1.0)
    holds = found(0.8, 0.9, "y", below=1.0)
    assert verdict([fails, matched, holds]) == NOT_REPRODUCED
    assert counted_findings([fails, unmatched, holds]) == [holds]
    assert verdict([fails, unmatched, holds]) == REPRODUCED
    assert "condition does not hold: x" in why(Outcome([fails, unmatched, holds]))
    assert verdict([fails, unmatched]) == UNTESTED


def test_the_reason_of_a_verdict_names_each_quantity_once():
    planted = "planted directions (96 in 32 dimensions, poisson counts, mean 4 per token)"
    fails = [found(2, 3, data, below=1.0) for data in (planted, "`layers.2.resid_post` of the bundled model")]
    reason = why(Outcome([*fails, found(0, 2, "x", below=1.0)]))
    assert "Fails: ratio (planted, 96 in 32 dim., poisson | layers.2.resid_post, bundled). Open: ratio (x)." in reason


# --- the page ---------------------------------------------------------------------------------------------------------


def test_an_outcome_is_the_same_after_json():
    plot = Plot("t", "x", "y", [Series("a", [1.0], [2.0], [1.5], [2.5])], quantities=["ratio"])
    outcome = Outcome([found(0.25, 0.75, above=0.0)], [plot], ["a note"], runs=[{"seeds": [0, 1]}])
    assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == outcome
    lost = Outcome([found(float("nan"), float("nan"), below=1.0)]).to_dict()
    assert json.loads(json.dumps(lost, allow_nan=False))["findings"][0]["low"] is None
    assert Outcome.from_dict(lost).findings[0].state == "open"


def outcome_on(data: str, value: float, seconds: int) -> Outcome:
    plot = Plot("t", "", "y", [], quantities=["ratio"])
    run = {"seconds": seconds, "trained": {data: {"runs": 3}}}
    return Outcome([found(value, value, data, below=1.0)], [plot], [f"note {seconds}"], runs=[run])


def test_numbers_on_other_data_stay_and_those_on_the_same_are_replaced():
    planted, site = "planted", "`layers.2.resid_post` of stories260K"
    both = joined(outcome_on(site, 1.5, 1), outcome_on(planted, 0.5, 2))
    assert [(f.data, f.value) for f in both.findings] == [(planted, 0.5), (site, 1.5)]
    assert both.verdict == NOT_REPRODUCED
    assert both.plots == [Plot("t", "", "y", [], quantities=["ratio"])]
    assert [run["seconds"] for run in both.runs] == [1, 2]
    again = joined(both, outcome_on(site, 0.75, 3))
    assert [(f.data, f.value) for f in again.findings] == [(planted, 0.5), (site, 0.75)]
    assert again.verdict == REPRODUCED
    assert [run["seconds"] for run in again.runs] == [2, 3]
    assert again.notes == ["note 3"]
    nothing = Outcome([], untestable="no model")
    assert joined(both, nothing) == both
    assert joined(nothing, both).verdict == NOT_REPRODUCED


def test_curves_of_the_same_name_are_replaced():
    def curves(*labels: str, y: float) -> Outcome:
        return Outcome([found(0, 0, labels[0])], [Plot("t", "x", "y", [Series(name, [1.0], [y]) for name in labels])])

    (plot,) = joined(curves("a", "b", y=1.0), curves("b", "c", y=2.0)).plots
    assert [(series.label, series.y) for series in plot.series] == [("a", [1.0]), ("b", [2.0]), ("c", [2.0])]


def test_the_committed_page_is_made_of_the_stored_numbers():
    made = page.page(claims(), page.stored(), page.stored(page.RESULTS / "full"))
    assert page.PAGE.read_text(encoding="utf-8") == made, "run: python demos/reproduce.py --page"


def test_every_stored_number_belongs_to_a_claim_and_every_plot_is_there():
    outcomes = page.stored()
    assert set(outcomes) <= set(NAMES)
    drawn = {name for name, outcome in outcomes.items() if outcome.plots}
    assert {file.stem for file in page.PLOTS.glob("*.svg")} == drawn
    files = [*page.RESULTS.iterdir(), *page.PLOTS.iterdir()]
    assert sum(file.stat().st_size for file in files) < 2_000_000


def test_a_claim_without_numbers_says_so():
    text = page.page(claims(), {}, {})
    assert text.count("**not run yet**") == len(NAMES)
    assert text.count("Full form: not run.") == len(NAMES) - 1  # one trains nothing


def test_data_that_were_not_asked_for_are_not_used(tmp_path):
    assert Lab(tmp_path, Places(), only=["planted"]).everywhere == [Planted()]
    words = [data.words for data in Lab(tmp_path, Places()).everywhere]
    assert [w.split("`")[1] for w in words[1:]] == ["layers.2.resid_post", "layers.3.mlp_out"]


# --- the full form ----------------------------------------------------------------------------------------------------


def test_the_full_form_says_what_it_takes_where_there_is_no_accelerator(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(["topk-vs-relu", "--full", "--only", "planted", "--folder", str(tmp_path / "runs")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "the full form of topk-vs-relu trains 6 SAEs of up to 128 latents on 18 M tokens in all" in said
    assert "takes an accelerator" in said
    assert not (tmp_path / "runs").exists()


def test_fewer_tokens_are_refused_for_the_page(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["topk-vs-relu", "--tokens", "4k"])
    assert "give --results another folder" in capsys.readouterr().err


def test_a_claim_trains_only_what_it_declares(tmp_path):
    lab = Lab(tmp_path, Places(), only=["planted"], seeds=1, progress=False)
    lab.begin([])
    with pytest.raises(ArgumentError, match="none of the runs that the claim declares"):
        lab.arms(DATA, "topk")


def test_what_is_measured_on_longer_holds_what_is_measured_on():
    lm = LanguageModel("bundled", (RESID, MLP), Path())
    short, long = (model.held_out_ids.tolist() for model in (lm, lm.longer(4)))
    assert (len(short), len(long)) == (32, 128)
    assert all(row in long for row in short)
    assert {site.width for name in (RESID, MLP) for site in lm.model.sites(name)} == {WIDTH["bundled"]}
    assert Run(DATA.longer(), CONFIG).key == Run(DATA, CONFIG).key
    assert DATA.longer().held_out().x.shape[0] == 4 * DATA.held_out().x.shape[0]


def test_the_cards_of_the_bundled_saes_name_their_run():
    rows = {row.sae: row for row in EvalResult.from_json((CHECKPOINTS / "eval.json").read_text("utf-8")).results}
    runs = {"sae": "layers.2.resid_post-topk32-4096-seed1", "sae-mlp": "layers.3.mlp_out"}
    for name, run in runs.items():
        text = (CHECKPOINTS / name / "README.md").read_text("utf-8")
        assert text == card(name, load_sae(CHECKPOINTS / name), rows[name]), "run: python demos/bundle.py"
        assert f"Run `{run}` of" in text


@pytest.mark.slow
def test_the_full_form_runs_whole_at_a_tiny_scale(tmp_path, capsys):
    command = ["topk-vs-relu", "multi-topk", "--full", "--device", "cpu", "--tokens", "10k", "--only", "planted"]
    command += ["--seeds", "1", "--quiet", "--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert reproduce.main(command) == 0
    assert not page.stored(tmp_path / "results")
    outcomes = page.stored(tmp_path / "results" / "full")
    assert set(outcomes) == {"topk-vs-relu", "multi-topk"}
    text = page.page(claims(), {}, outcomes)
    assert f"Full form: **{outcomes['multi-topk'].verdict}**" in text
    assert "2 SAEs on planted directions (96 in 32 dimensions, poisson counts, mean 4 per token), 10,000 tokens" in text


@pytest.mark.slow
def test_every_claim_runs_on_planted_data_in_a_tiny_form(tmp_path):
    small = [name for name in NAMES if name != "shrinkage"]  # which solves for every token's activations, a minute
    command = [*small, "--only", "planted", "--tokens", "8k", "--seeds", "1", "--quiet"]
    command += ["--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert reproduce.main(command) == 0
    outcomes = page.stored(tmp_path / "results")
    assert list(outcomes) == sorted(small)
    for name, outcome in outcomes.items():
        assert bool(outcome.untestable) == (name in NEED_A_MODEL), name
        assert bool(outcome.findings) == (name not in NEED_A_MODEL), name
        assert all(math.isfinite(f.value) for f in outcome.findings if f.counts and name != "bandwidth"), name
    assert page.page(claims(), outcomes, {}).count("**not run yet**") == 1


@pytest.mark.slow
def test_claims_run_on_the_bundled_model_in_a_tiny_form(tmp_path):
    names = "downstream-gain special-tokens ste surgical topk-vs-relu zero-ablation".split()
    command = [
        *names,
        "--only",
        "bundled/layers.3.mlp_out",
        "bundled/layers.2.resid_post",
        "--tokens",
        "8k",
        "--seeds",
        "1",
    ]
    command += ["--quiet", "--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert reproduce.main(command) == 0
    outcomes = page.stored(tmp_path / "results")
    assert list(outcomes) == names
    for name, outcome in outcomes.items():
        assert "layers.2.resid_post" in outcome.findings[-1].data or "layers.3.mlp_out" in outcome.findings[-1].data
        assert all(math.isfinite(f.value) for f in outcome.findings), name
    assert outcomes["surgical"].verdict == REPRODUCED  # holds for any SAE


@pytest.mark.slow
def test_two_claims_run_whole_on_planted_data(tmp_path, capsys):
    command = ["multi-topk", "topk-vs-relu", "--only", "planted", "--seeds", "2", "--quiet"]
    command += ["--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert reproduce.main(command) == 0
    assert capsys.readouterr().out.count(": reproduced (") == 2
    outcomes = page.stored(tmp_path / "results")
    assert [run["seeds"] for run in outcomes["topk-vs-relu"].runs] == [[0, 1]]
    assert [f.state for f in outcomes["topk-vs-relu"].findings] == ["holds", "holds"]
    saes = sorted((tmp_path / "runs" / "saes").iterdir())
    assert len(saes) == 6  # topk, multitopk and relu, two seeds each; topk is shared
    made = {sae: (sae / "run.json").stat().st_mtime_ns for sae in saes}
    reproduce.main(command)
    assert {sae: (sae / "run.json").stat().st_mtime_ns for sae in made} == made
