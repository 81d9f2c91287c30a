"""The page about an evaluation, read back."""

from __future__ import annotations

import dataclasses
import json
import re
from xml.etree import ElementTree

import pytest
import torch
from builders import build_lm, byte_tokenizer, random_ids, tiny_sae
from test_eval_result import ROW
from test_reports import HOSTILE, Page

from saehook.errors import FileError, FormatError
from saehook.eval_report import write_eval_report
from saehook.eval_result import EvalResult
from saehook.evaluation import evaluate
from saehook.hooked_model import HookedModel


@pytest.fixture(scope="module")
def result() -> EvalResult:
    """Two SAEs of one site and one of another on a tiny model."""
    model = HookedModel(build_lm("llama"), byte_tokenizer(), model_id="tiny <llama>")
    saes = {"layers.1.resid_post": [tiny_sae(seed=1), tiny_sae(seed=2)], "layers.2.mlp_out": tiny_sae(seed=3)}
    ids = torch.tensor([random_ids(24, seed=seed, bos=True) for seed in range(12)])
    found = evaluate(model.attach(saes), ids, names={"layers.1.resid_post#0": "first"}, progress=False)
    return found.with_block("refinement", {"first": {"gain": 0.25, "deep": {"er": 7}}})


def page_of(result: EvalResult, folder) -> Page:
    (folder / "eval.json").write_text(result.to_json())
    return Page(write_eval_report(folder / "eval.json", folder / "report.html"))


def bars_of(figure: ElementTree.Element) -> list[str]:
    return [rect.findtext("title") or "" for rect in figure.iter("rect") if rect.get("class") == "bar"]


def test_numbers_intervals_and_blocks(result, tmp_path):
    page = page_of(result, tmp_path)
    assert "3 SAEs on tiny &lt;llama&gt;" in page.source
    numbers = page.tables()[0]
    assert [row[0] for row in numbers[1:]] == [
        "first|layers.1.resid_post",
        "layers.1.resid_post#1|layers.1.resid_post",
        "layers.2.mlp_out",
    ]
    said = dict(zip(numbers[0], numbers[1], strict=True))
    row = result.results[0]
    low, high = row.intervals["ce_clean"]
    assert said["ce clean"] == f"{row.ce_clean:.3f} [{low:.3f}, {high:.3f}]"
    assert said["tokens"] == f"{row.tokens:,}"
    assert said["dead share"].endswith("\xa0%")
    assert ["first", "0.25", "7"] in next(table for table in page.tables() if table[0] == ["sae", "gain", "deep.er"])
    special = next(table for table in page.tables() if "error over square" in table[0])
    assert [row[:2] for row in special[1:]] == [[row.sae, "12"] for row in result.results]
    settings = dict(page.tables()[-1])
    assert settings["identity.bit_equal"] == "True"
    assert settings["versions.torch"] == torch.__version__


def test_plots_show_the_blocks(result, tmp_path):
    page = page_of(result, tmp_path)
    assert {"Loss added against L0", "Loss added, by position", "KL, by position", "first"} <= set(page.figures)
    by_title = re.findall("<figure>.*?</figure>", page.source, re.DOTALL)
    histograms = [ElementTree.fromstring(each) for each in by_title if "<b>first</b>" in each]
    l0, density = (bars_of(figure) for figure in histograms)
    row = result.results[0]
    counted = [int(title.split()[0].replace(",", "")) for title in l0]
    assert sum(counted) == sum(row.extra["l0"]["counts"]) == row.tokens
    assert sum(int(title.split()[0]) for title in density) == sum(row.extra["density"]["counts"])
    paths = [path for path in page.figures["KL, by position"].iter("path") if "line" in (path.get("class") or "")]
    assert len(paths) == 3
    assert all(path.get("d", "").count("L") == len(row.extra["positions"]["position"]) - 1 for path in paths)
    dots = [path.get("class", "") for path in page.figures["Loss added against L0"].iter("path")]
    assert sum("dot" in each.split() for each in dots) == 3, "points that can be seen"
    assert page.source.count('class="key"') == 3, "and whose they are"


def test_it_opens_offline_and_runs_nothing(result, tmp_path):
    page = page_of(result, tmp_path)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not any(name in {"src", "href"} or name.startswith("on") for _, name, _ in page.attributes)
    assert "default-src 'none'" in page.source


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_only_text(result, tmp_path, name):
    rows = [
        dataclasses.replace(row, sae=name, site=name, extra=row.extra | {name: {name: name}}) for row in result.results
    ]
    hostile = page_of(EvalResult(rows, {"lm": {"id": name}, name: [name]}), tmp_path)
    plain = [dataclasses.replace(row, sae="a", site="a", extra=row.extra | {"a": {"a": "a"}}) for row in result.results]
    (tmp_path / "plain").mkdir()
    assert (
        hostile.tags.keys()
        == page_of(EvalResult(plain, {"lm": {"id": "a"}, "a": ["a"]}), tmp_path / "plain").tags.keys()
    )


def test_an_old_evaluation_has_a_page(tmp_path):
    page = page_of(EvalResult([dataclasses.replace(ROW, intervals={}, extra={}, windows=None, d_sae=None)]), tmp_path)
    assert not page.figures
    assert page.tables()[0][1][0] == "a|layers.1.resid_post"


def test_what_is_no_evaluation(tmp_path):
    with pytest.raises(FileError, match="cannot read"):
        write_eval_report(tmp_path / "none.json", tmp_path / "out.html")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(FormatError, match="no evaluation"):
        write_eval_report(tmp_path / "x.json", tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def slow_metrics() -> dict:
    """As `SuiteResult.to_dict` gives them, of the fixture's SAEs."""

    def row(sae: str, site: str, metric: str, name: str, value: float | None, **more) -> dict:
        measure = {"name": name, "value": value, "unit": "FVU", "low": 0.1, "high": 0.9, "n": 16, "of": "windows"}
        return {
            "sae": sae,
            "site": site,
            "metric": metric,
            **measure,
            "tokens": 99,
            "needed": 8,
            "note": "",
            "few": "",
        } | more

    first, second = ("first", "layers.1.resid_post#0"), ("layers.2.mlp_out", "layers.2.mlp_out")
    rows = [row(*first, "progressive_code", f"fvu_topk.{k}", 1 / k) for k in (8, 16, 32)]
    rows += [row(*second, "progressive_code", f"fvu_topk.{k}", 2 / k) for k in (8, 16, 32)]
    rows += [
        row(*first, "probe_loss", "probe_loss", 0.25),
        row(*first, "probe_loss", "probe_loss.in_<b>", 0.5),
        row(*second, "shrinkage", "refined_up", 0.5, few="3 windows, 8 are needed (about 99 tokens)"),
        row(*second, "shrinkage", "refinement_gain", None, low=None, high=None),
        row(*first, "steering", "steerable", 0.75),
    ]
    response = {"strengths": [0.25, 0.5, 1.0], "kl": [0.1, 0.2, 0.4], "loss_rise": [0.0, 0.1, 0.2]}
    responses = [response | {"gain": [1.0, 2.0, 3.0]}, response | {"gain": [3.0, 4.0, 5.0]}]
    gone = [{"site": "layers.2.mlp_out", "metric": "absorption", "why": "no <task> is left"}]
    return {"rows": rows, "left_out": gone, "steering": {first[1]: responses, second[1]: []}, "provenance": {"seed": 7}}


def test_slow_metrics_are_on_the_page(result, tmp_path):
    data = json.loads(result.to_json()) | {"suite": slow_metrics()}
    (tmp_path / "eval.json").write_text(json.dumps(data))
    page = Page(write_eval_report(tmp_path / "eval.json", tmp_path / "report.html"))
    whole, single = [
        table for table in page.tables() if table[0] == ["measure", "first", "layers.2.mlp_out", "measured on"]
    ]
    assert whole[1:] == [
        ["probe loss|FVU", "0.1 … 0.9", "–", "16 windows"],
        ["refined up|FVU", "–", "0.1 … 0.9 (3 windows, 8 are needed (about 99 tokens))", "16 windows"],
        ["refinement gain|FVU", "–", "–", "16 windows"],
        ["steerable|FVU", "0.75 [0.1 … 0.9]", "–", "16 windows"],
    ]
    assert ["probe loss.in <b>|FVU", "0.5 [0.1 … 0.9]", "–", "16 windows"] in single
    assert "layers.2.mlp_out: no absorption: no &lt;task&gt; is left" in page.notes
    curves = [p for p in page.figures["FVU at another k"].iter("path") if "line" in (p.get("class") or "")]
    assert [path.get("d", "").count("L") for path in curves] == [2, 2]
    told = [rect.findtext("title") or "" for rect in page.figures["FVU at another k"].iter("rect")]
    assert any("first: 0.125" in title and "layers.2.mlp_out: 0.250" in title for title in told)
    gain = [rect.findtext("title") or "" for rect in page.figures["Steering: what the latent promotes"].iter("rect")]
    assert any(title.endswith("first: 4.000") for title in gain)
    assert ["seed", "7"] in page.tables()[-2] or any(["seed", "7"] in table for table in page.tables())
    assert not {"script", "link", "img", "iframe"} & set(page.tags)


@pytest.mark.parametrize(
    "suite", [3, {}, {"rows": [{}]}, {"rows": 3}, {"rows": [], "steering": {"a": [{}]}, "left_out": [3]}]
)
def test_slow_metrics_that_are_none(result, tmp_path, suite):
    (tmp_path / "eval.json").write_text(json.dumps(json.loads(result.to_json()) | {"suite": suite}))
    with pytest.raises(FormatError, match="slow metrics are none"):
        write_eval_report(tmp_path / "eval.json", tmp_path / "report.html")
