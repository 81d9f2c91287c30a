"""The table of an evaluation, and what it says of numbers that cannot be trusted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from saehook.errors import ArgumentError, FormatError
from saehook.eval_result import EvalResult, EvalRow

ROW = EvalRow(
    sae="a",
    site="layers.1.resid_post",
    tokens=10_000,
    ce_clean=2.5,
    ce_spliced=2.75,
    ce_zero=9.0,
    ce_mean=7.0,
    delta_ce=0.25,
    ce_recovered_zero=0.96,
    ce_recovered_mean=0.94,
    kl=0.3,
    fvu=0.1,
    l0=32.0,
    dead_share=0.02,
    top1=0.8,
    windows=40,
    d_sae=512,
    intervals={"delta_ce": (0.24, 0.26), "kl": (0.2, 0.4)},
    extra={"l0": {"mean": 32.0, "quantiles": {"0.5": 30}}},
)


def test_json_and_back():
    result = EvalResult([ROW, dataclasses.replace(ROW, sae="b", cosine=None)], {"versions": {"python": "3"}})
    assert EvalResult.from_json(result.to_json()) == result
    broken = EvalResult([dataclasses.replace(ROW, kl=float("nan"), extra={"x": {"y": float("inf")}})])
    data = json.loads(broken.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["results"][0]["kl"] is None
    assert data["results"][0]["extra"] == {"x": {"y": None}}


def test_the_committed_evaluation_can_be_read():
    text = (Path(__file__).resolve().parents[1] / "checkpoints" / "eval.json").read_text()
    result = EvalResult.from_json(text)
    assert [row.sae for row in result.results] == ["sae", "sae-mlp", "all"]
    assert "layers.2.resid_post" in result.table()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"results": [{"sae": "a"}], "provenance": {}}', '{"results": 3}', "{" * 9999]
)
def test_what_is_no_evaluation(text):
    with pytest.raises(FormatError, match="no evaluation"):
        EvalResult.from_json(text)


def test_a_number_that_is_not_known_is_shown_as_its_interval():
    said = EvalResult([ROW]).table()
    assert "0.250" in said
    assert "[0.200, 0.400]" in said
    assert "0.300" not in said
    # ±0.1 where ±0.03 is allowed: (1/0.3)² times as many tokens
    assert ROW.unclear() == {"kl": 111_112}
    assert "a: too few tokens for kl, shown as an interval; about 111,112 are needed" in said


def test_a_difference_of_almost_nothing_is_clear():
    row = dataclasses.replace(ROW, delta_ce=1e-5, intervals={"delta_ce": (-4e-4, 4e-4)})
    assert not row.unclear()


def test_dead_latents_want_tokens():
    """A latent fires on 32 of 51,200 tokens in the mean: 100 firings want 160,000."""
    row = dataclasses.replace(ROW, d_sae=51_200, intervals={})
    assert row.unclear() == {"dead_share": 160_000}
    said = EvalResult([row]).table()
    assert "≤ 2.0%" in said
    assert "upper bound here; about 160,000 are needed" in said
    assert "≤" not in EvalResult([ROW]).table()


def test_few_windows_and_what_is_not_finite_are_said():
    row = dataclasses.replace(ROW, windows=4, nan_tokens=1234, nan_losses=5, intervals={})
    said = EvalResult([row]).table()
    assert "a: 4 windows are too few" in said
    assert "at least 10 are needed, about 25,000 tokens" in said
    assert "1,234 tokens have activations that are not finite" in said
    assert "5 tokens have a loss that is not finite" in said
    one = EvalResult([dataclasses.replace(ROW, windows=1, intervals={})]).table()
    assert "a: 1 window is too few to say how exact" in one
    assert "≈ 0.2" in one, "one digit"
    assert "0.250" not in one


def test_more_blocks():
    result = EvalResult([ROW, dataclasses.replace(ROW, sae="b")])
    more = result.with_block("refinement", {"b": {"gain": 0.1}})
    assert more.results[1].extra == ROW.extra | {"refinement": {"gain": 0.1}}
    assert more.results[0] == ROW
    assert EvalResult.from_json(more.to_json()) == more
    with pytest.raises(ArgumentError, match="no row is called c"):
        result.with_block("x", {"c": {}})
