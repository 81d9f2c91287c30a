"""The page about a training run, read back: what it draws is what the files say."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from builders import build_lm, byte_tokenizer, tiny_sae

from saehook.checkpoint import load_sae, save_sae
from saehook.config import BatchTopK, TopK, TrainConfig
from saehook.corpus import Document
from saehook.errors import FileError
from saehook.eval_result import EvalResult
from saehook.hooked_model import HookedModel
from saehook.reports import CHARTS, write_report
from saehook.sae import LatentStats
from saehook.tokenization import windows
from saehook.training_run import train_saes

SITES = ("layers.1.resid_post", "layers.2.mlp_out")
TITLES = {metric.key: metric.title for metric in CHARTS}
HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "&amp; </title></style>{body}",
    "a\u202eb\x00\x1b\ud800",
)


class Page(HTMLParser):
    """A parsed report; refuses tags that do not close."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.strings: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open
        self.figures = {
            figure.findtext("figcaption/b"): figure
            for figure in map(ElementTree.fromstring, re.findall("<figure>.*?</figure>", self.source, re.DOTALL))
        }

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.strings.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.strings)

    @property
    def notes(self) -> list[str]:
        return re.findall('<p class="note">(.*?)</p>', self.source)

    def tables(self) -> list[list[list[str]]]:
        """Cells of the rows of each table."""
        tables = map(ElementTree.fromstring, re.findall("<table>.*?</table>", self.source, re.DOTALL))
        return [[["|".join(cell.itertext()) for cell in row] for row in table.iter("tr")] for table in tables]


def number(label: str) -> float:
    """What the label of an axis says."""
    scale = {"K": 1e3, "M": 1e6, "%": 0.01}.get(label[-1], 1)
    return float(label.replace(",", "").rstrip("KM%\xa0")) * scale


def scale(figure: ElementTree.Element, kind: str) -> tuple[Callable[[float], float], float]:
    """Pixel -> value along the axis `x` or `y`, from its first and last label; and how much half a pixel's tenth is."""
    labels = [t for t in figure.iter("text") if t.get("class") == kind]
    (p, v), (q, w) = [(float(t.get(kind, "")), number(t.text or "")) for t in (labels[0], labels[-1])]
    log = kind == "y" and "log scale" in "".join(figure.itertext())
    f, g = (math.log10, lambda v: 10**v) if log else (lambda v: v, lambda v: v)
    slope = (f(w) - f(v)) / (q - p)
    # coordinates and labels are rounded to a tenth of a pixel
    return lambda pixel: g(f(v) + slope * (pixel - p)), abs(slope) * 0.25 * (math.log(10) if log else 1)


def strokes(figure: ElementTree.Element, series: int) -> list[list[tuple[float, float]]]:
    """(tokens, value) of the points of one curve, a list for each piece without gap."""
    (path,) = [p for p in figure.iter("path") if f"n{series}" in p.get("class", "").split()]
    (x, _), (y, _) = scale(figure, "x"), scale(figure, "y")
    assert re.fullmatch(r"(M\S+ \S+h0(L\S+ [\d.]+)*)*", data := path.get("d", "")), data
    pieces = [re.split("h0L|h0|L", piece.strip("L")) for piece in data.split("M")[1:]]
    return [[(x(float(a)), y(float(b))) for a, b in (p.split() for p in piece if p)] for piece in pieces]


def agree(figure: ElementTree.Element, series: int, expected: list[list[tuple[float, float]]]) -> None:
    drawn = strokes(figure, series)
    assert [len(piece) for piece in drawn] == [len(piece) for piece in expected]
    (_, dx), (_, dy) = scale(figure, "x"), scale(figure, "y")
    log = "log scale" in "".join(figure.itertext())
    for (x, y), (tokens, value) in zip(sum(drawn, []), sum(expected, []), strict=True):
        assert x == pytest.approx(tokens, abs=dx)
        assert y == pytest.approx(value, abs=dy * value if log else dy)


def write_log(run: Path, lines: Iterable[Any]) -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def report(run: Path) -> Page:
    return Page(write_report(run))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What train_saes leaves: two SAEs on a tiny language model, evaluated."""
    words = "the a red blue cat dog sees runs to from house tree and or with under".split()
    draw = torch.Generator().manual_seed(0)
    text = [Document(f"d{i}", " ".join(words[j] for j in torch.randint(16, (60,), generator=draw))) for i in range(50)]
    model = HookedModel(build_lm("llama"), byte_tokenizer(), model_id="tiny <llama>")
    shared: dict[str, Any] = {"d_sae": 96, "tokens": 6000, "batch_tokens": 200, "calibration_tokens": 1000}
    configs = [
        TrainConfig(site=SITES[0], activation=BatchTopK(k=4), **shared),
        TrainConfig(site=SITES[1], activation=TopK(k=3), **shared),
    ]
    run = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saehook.trainer.LOG_STEPS", 1)
        train_saes(model, configs, text[:40], run, held_out=windows(text[40:], model.tokenizer, 64), progress=False)
    return run


def log_of(run: Path) -> dict[str, list[dict[str, Any]]]:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in (run / "metrics.jsonl").read_text().splitlines():
        by_name.setdefault(json.loads(row)["sae"], []).append(json.loads(row))
    return by_name


def test_curves_are_those_of_the_log(trained):
    page, log = report(trained), log_of(trained)
    assert not page.notes
    keys = {key for lines in log.values() for line in lines for key in line}
    assert {"fvu", "l0", "dead_share", "lr"} <= keys
    assert {title for key, title in TITLES.items() if title in page.figures} == {TITLES[k] for k in TITLES if k in keys}
    for key in TITLES.keys() & keys:
        for series, lines in enumerate(log.values()):
            curve = [(line["tokens"], line[key]) for line in lines if key in line]
            assert len(curve) in (0, 30)
            agree(page.figures[TITLES[key]], series, [curve] if curve else [])
    legend = page.tables()[0]
    assert [row[0] for row in legend[1:]] == list(log)
    assert [row[1] for row in legend[1:]] == ["6,000", "6,000"]
    fvu = legend[0].index("FVU")
    assert [row[fvu] for row in legend[1:]] == [f"{lines[-1]['fvu']:.3f}" for lines in log.values()]


def test_tooltips_tell_the_values(trained):
    page, log = report(trained), log_of(trained)
    bands = [rect for rect in page.figures["FVU"].iter("rect") if rect.get("class") == "band"]
    assert len(bands) == 30
    edges = [(float(b.get("x", "")), float(b.get("x", "")) + float(b.get("width", ""))) for b in bands]
    assert all(abs(a[1] - b[0]) < 0.11 for a, b in zip(edges, edges[1:], strict=False)), "no hole between the bands"
    x, dx = scale(page.figures["FVU"], "x")
    assert [x(right) for _, right in edges[:-1]] == pytest.approx([200 * i + 100 for i in range(1, 30)], abs=2 * dx)
    for i, band in enumerate(bands):
        first, *rest = (band.findtext("title") or "").splitlines()
        assert first == f"{200 * (i + 1):,} tokens"
        assert rest == [f"{name}: {lines[i]['fvu']:.3f}" for name, lines in log.items()]


def test_heading_evaluation_and_settings(trained):
    page = report(trained)
    heading = re.findall("<(?:h1|dt|dd)>(.*?)</", page.source)
    assert heading[0] == "2 SAEs on tiny &lt;llama&gt;"
    assert dict(zip(heading[1::2], heading[2::2], strict=True)) == {
        "Sites": "layers.1.resid_post, layers.2.mlp_out",
        "Activation": "BatchTopK(k=4), TopK(k=3)",
        "Latents (d_sae)": "96",
        "Tokens": "6,000",
        "Documents": "40",
    }
    result = EvalResult.from_json((trained / "eval.json").read_text())
    _, table, *settings = page.tables()
    names = list(result.results[0].numbers())[2:]
    assert table[0] == ["sae, site", *(name.replace("_", " ") for name in names)]
    for row, cells in zip(result.results, table[1:], strict=True):
        assert set(cells[0].split("|")) == {row.sae, row.site}
        said = dict(zip(names, cells[1:], strict=True))
        assert said["tokens"] == f"{row.tokens:,}"
        assert said["ce_clean"] == f"{row.ce_clean:.3f}"
        assert said["dead_share"].endswith("\xa0%")
        assert number(said["dead_share"]) == pytest.approx(row.dead_share, abs=6e-4)
        assert float(said["delta_ce"]) == pytest.approx(row.delta_ce, rel=0.1, abs=6e-4)
    assert page.tags["details"] == len(settings) == 2
    for folder, rows in zip(SITES, settings, strict=True):
        said = dict(rows[1:])
        metadata = load_sae(trained / folder).metadata
        assert said["training.lr"] == str(metadata["training"]["lr"])
        assert said["training.tokens"] == "6,000"
        assert said["text.sha256"] == metadata["text"]["sha256"]
        assert said["fingerprint.token_ids"].endswith(" values")


def test_histograms_count_every_latent(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    sae = load_sae(run / SITES[0])
    density = torch.cat([torch.zeros(21), torch.full((40,), 1e-3), torch.full((30,), 0.05), torch.ones(5)])
    sae.stats = LatentStats(density.clone(), density, density.clone(), 123_456)
    save_sae(sae, run / SITES[0])
    page = report(run)
    figure = page.figures[SITES[0]]
    assert "21 of 96 latents (21.9\xa0%) never fired on 123.5K tokens" in "".join(figure.itertext())
    x, dx = scale(figure, "x")
    y, dy = scale(figure, "y")
    found = []
    for bar in (rect for rect in figure.iter("rect") if rect.get("class") == "bar"):
        left, top, width, height = (float(bar.get(name, "")) for name in ("x", "y", "width", "height"))
        n = int((bar.findtext("title") or "").split()[0])
        assert y(top) == pytest.approx(n, abs=2 * dy)
        assert y(top + height) == pytest.approx(0, abs=2 * dy)
        found.append((n, x(left - 0.5), x(left + width + 0.5)))
    assert [n for n, _, _ in found] == [40, 30, 5]
    for (_, left, right), log in zip(found, (-3, math.log10(0.05), 0), strict=True):
        assert left - 2 * dx <= log <= right + 2 * dx
        assert right - left == pytest.approx(0.2, abs=3 * dx)
    other = load_sae(run / SITES[1]).stats
    assert other is not None
    silent = int((other.density == 0).sum())
    assert f"{silent} of 96 latents" in "".join(page.figures[SITES[1]].itertext())
    counts = [int((r.findtext("title") or "").split()[0]) for r in page.figures[SITES[1]].iter("rect")]
    assert sum(counts) == 96 - silent


def test_sae_without_statistics_and_order_of_folders(tmp_path):
    run = write_log(tmp_path / "run", [{"sae": "a", "tokens": 1, "fvu": 0.5}])
    for name in ("layers.10.x", "layers.2.x"):
        save_sae(tiny_sae(stats=name == "layers.2.x"), run / name)
    page = report(run)
    assert list(page.figures)[-2:] == ["layers.2.x", "layers.10.x"]
    assert "no statistics were stored" in "".join(page.figures["layers.10.x"].itertext())
    assert page.figures["layers.10.x"].find("svg") is None


def test_nothing_is_loaded_and_nothing_runs(trained):
    page = report(trained)
    assert not re.search(r"https?:|//|url\(|@import|javascript:|data:", page.source)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base", "image", "use", "form"}
    names = {name for _, name, _ in page.attributes}
    assert not [name for name in names if name.startswith("on") or name in ("href", "src", "srcset", "xlink:href")]
    assert "default-src 'none'" in page.source


def test_the_same_run_gives_the_same_page_and_leaves_nothing_else(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("*.html"))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    first = write_report(run).read_bytes()
    assert write_report(run) == run / "report.html"
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert after == before | {"report.html": first}


def test_spikes_survive_thinning(tmp_path):
    values = [0.1 + 0.01 * math.sin(i) for i in range(6000)]
    values[3333], values[4444] = 0.9, 0.05
    run = write_log(tmp_path / "run", ({"sae": "a", "tokens": 10 * i, "fvu": v} for i, v in enumerate(values)))
    page = report(run)
    (curve,) = strokes(page.figures["FVU"], 0)
    assert len(curve) <= 405
    points = [(round(x / 10), y) for x, y in curve]
    assert points[0][0] == 0
    assert points[-1][0] == pytest.approx(5999, abs=10)
    assert max(points, key=lambda p: p[1]) == (pytest.approx(3333, abs=10), pytest.approx(0.9, rel=0.01))
    assert min(points, key=lambda p: p[1]) == (pytest.approx(4444, abs=10), pytest.approx(0.05, rel=0.01))
    assert len((tmp_path / "run" / "report.html").read_bytes()) < 60_000


def test_gaps(tmp_path):
    """NaN, infinity and what is no number interrupt a curve; a missing key does not."""
    fvu = [0.5, 0.4, math.nan, 0.3, math.inf, 0.2, 0.25, None, "0.3", 10**400, 0.1, 0.12, 0.1]
    lines: list[dict[str, Any]] = [
        {"sae": "a", "tokens": 100 * i, "fvu": v, "lr": -math.inf} for i, v in enumerate(fvu)
    ]
    del lines[11]["fvu"]
    page = report(write_log(tmp_path / "run", lines))
    agree(
        page.figures["FVU"],
        0,
        [[(0, 0.5), (100, 0.4)], [(300, 0.3)], [(500, 0.2), (600, 0.25)], [(1000, 0.1), (1200, 0.1)]],
    )
    assert "Learning rate" not in page.figures, "there is nothing to draw"
    assert page.tables()[0][1][-1] == "-inf", "but it is not hidden"
    titles = [rect.findtext("title") for rect in page.figures["FVU"].iter("rect")]
    assert "200 tokens\na: nan" in titles


@pytest.mark.parametrize(
    "end",
    [
        '{"sae": "a", "tok',
        '{"sae": "é'.encode()[:-1].decode("latin1"),
        "\0\0\0\0",
        "3",
        '["a"]',
        '{"sae": "a"}',
        '{"sae": "a", "tokens": NaN}',
    ],
)
def test_a_last_line_cut_short_is_left_out_and_said(tmp_path, end):
    run = write_log(tmp_path / "run", [{"sae": "a", "tokens": i, "fvu": 0.5 - i / 10} for i in range(3)])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(end.encode("latin1"))
    page = report(run)
    (note,) = [note for note in page.notes if "metrics.jsonl" in note]
    assert note.startswith("Left out of metrics.jsonl: 1 damaged line (number 4). The last one was probably cut short")
    agree(page.figures["FVU"], 0, [[(0, 0.5), (1, 0.4), (2, 0.3)]])


def test_damaged_lines_in_the_middle_are_counted(tmp_path):
    run = write_log(tmp_path / "run", [{"sae": "a", "tokens": 1, "fvu": 0.5}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n" + "x\n" * 6 + json.dumps({"sae": "a", "tokens": 2, "fvu": 0.4}) + "\n")
    page = report(run)
    assert "Left out of metrics.jsonl: 7 damaged lines (number 2, 3, 4, 5, 6, …)." in page.notes
    assert not re.search("cut short", page.source)
    assert len(strokes(page.figures["FVU"], 0)[0]) == 2


def test_a_log_that_goes_back_shows_the_later_run(tmp_path):
    lines = [{"sae": s, "tokens": t, "fvu": 0.9 - t / 100} for t in (10, 20, 30, 40) for s in "ab"]
    lines += [{"sae": s, "tokens": t, "fvu": 0.4} for t in (25, 35) for s in "ab"]
    page = report(write_log(tmp_path / "run", lines))
    assert any("left out 4 lines that a later run replaced" in note for note in page.notes)
    for series in (0, 1):
        agree(page.figures["FVU"], series, [[(10, 0.8), (20, 0.7), (25, 0.4), (35, 0.4)]])


@pytest.mark.parametrize(
    "lines", [[], [{"sae": "a", "tokens": 0, "fvu": 0.0, "l0": 3}], [{"tokens": 5}], [{"tokens": 7, "loss": -2.0}]]
)
def test_a_run_that_has_hardly_begun(tmp_path, lines):
    page = report(write_log(tmp_path / "run", lines))
    assert "No SAE has been written to this folder yet, so the page shows the log only." in page.notes
    assert any("no line that can be shown" in note for note in page.notes) == (not lines)
    assert ("FVU" in page.figures) == any("fvu" in line for line in lines)
    assert ("Loss" in page.figures) == any("loss" in line for line in lines)
    assert "There is none in this folder (eval.json)" in page.source.replace("\n", " ")
    for figure in page.figures.values():
        ((_, value),) = strokes(figure, 0)[0]
        assert value == pytest.approx(
            next(v for key, v in lines[0].items() if TITLES.get(key) == figure.findtext("figcaption/b")), abs=0.05
        )


def test_a_log_axis_only_where_it_fits(tmp_path):
    for name, values, log in [("a", (1.0, 0.1), True), ("b", (1.0, 0.2), False), ("c", (1.0, 0.0), False)]:
        run = write_log(tmp_path / name, [{"sae": "a", "tokens": i, "fvu": v, "l0": v} for i, v in enumerate(values)])
        page = report(run)
        assert ("log scale" in "".join(page.figures["FVU"].itertext())) == log
        assert "log scale" not in "".join(page.figures["L0"].itertext())
        agree(page.figures["FVU"], 0, [list(enumerate(values))])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_only_text(tmp_path, name):
    shown = re.sub("[\x00\x1b\ud800]", "\ufffd", name)
    folder = re.sub("[/\x00\ud800]", "", name)
    run = write_log(tmp_path / folder, [{"sae": name, "tokens": i, "fvu": 0.5} for i in range(2)])
    sae = tiny_sae(site=name)
    sae.metadata = {"lm": {"id": name}, name: name, "tokens_seen": name, "text": {"documents": [name]}}
    save_sae(sae, run / folder)
    (run / folder / "extra").mkdir()
    save_sae(tiny_sae(), run / f"x{folder}")
    (run / f"x{folder}" / "cfg.json").write_text("{}")
    (run / "eval.json").write_text(json.dumps({"results": [{"sae": name, name: name, "l0": 1.5}]}))
    page = report(run)
    plain = write_log(tmp_path / "plain", [{"sae": "a", "tokens": i, "fvu": 0.5} for i in range(2)])
    save_sae(tiny_sae(site="a"), plain / "a")
    (plain / "eval.json").write_text('{"results": [{"sae": "a", "l0": 1.5}]}')
    assert page.tags.keys() == report(plain).tags.keys()
    assert {value for tag, _, value in page.attributes if tag == "svg"} >= {
        re.sub("[\x00\x1b\ud800]", "\ufffd", folder)
    }
    tables = page.tables()
    assert tables[0][1][0] == shown
    assert tables[1][1][0] == shown
    assert [shown, shown] in tables[2]
    assert page.text.count(shown) >= 8


def test_what_cannot_be_read_is_said_and_the_rest_is_shown(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    weights = run / SITES[0] / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for damaged in ('{"results": [{"sae', "[]", '{"results": 3}', '{"results": ["abc"]}', '{"provenance": {}}'):
        (run / "eval.json").write_text(damaged)
        page = report(run)
        assert len(page.notes) == 2
        assert page.notes[0].startswith(f"Left out {SITES[0]}:")
        assert page.notes[1].startswith("Left out eval.json, which is damaged")
        assert "Write it again with `saehook eval --json`" in page.notes[1]
        assert SITES[0] not in page.figures
        assert SITES[1] in page.figures
        assert "FVU" in page.figures


def test_a_folder_without_log_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "not there"):
        with pytest.raises(FileError, match=r"holds no metrics.jsonl.*Name the folder that `saehook train --out`"):
            write_report(folder)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(FileError, match="cannot read"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
