"""Probe tasks, probe loss and absorption on planted data."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

from saehook import SAE, HookedModel, ReLU, SAEConfig
from saehook.cli import main
from saehook.corpus import Document
from saehook.errors import ArgumentError, FileError
from saehook.suite.absorption import absorbed_share, absorption, main_latents, probe_direction
from saehook.suite.probe_loss import (
    Examples,
    best_latent,
    check_tasks,
    fit_probes,
    halves,
    probe_loss,
    read_examples,
)
from saehook.suite.probe_tasks import (
    ProbeTask,
    make_tasks,
    read_tasks,
    tasks_to_json_lines,
)
from saehook.suite.text_labels import prose_labels, python_labels

SOURCE = '''"""Reads files line by line, one list for each of them; what this module is for (a docstring)."""
import os  # for paths


class Reader:
    def read(self, path, size=4):
        for line in open(os.path.join(path, "name of a file")):
            if line.strip():
                return [line[size], {"a": 1}]
        raise ValueError(f"nothing in {path}")
'''


def labels_behind(text: str, source: str = SOURCE, labels=python_labels) -> dict[str, bool]:
    """The answers behind the first occurrence of `text`."""
    return dict(labels(source))[source.index(text) + len(text)]


def test_what_the_parser_knows_about_python():
    docstring = labels_behind("module is for")
    assert docstring["in_docstring"]
    assert docstring["in_string"]
    assert "in_class" not in docstring
    assert labels_behind("# for")["in_comment"]
    name = labels_behind("name of")
    assert name["in_string"]
    assert not name["in_docstring"]
    assert labels_behind("def read")["line_defines_function"]
    assert labels_behind("self, path")["line_defines_function"]
    assert not labels_behind("for line")["line_defines_function"]
    assert labels_behind("return")["line_returns"]
    assert labels_behind("return")["deeply_indented"]
    assert not labels_behind("def read")["deeply_indented"]
    assert labels_behind("line.strip")["in_loop"]
    assert not labels_behind("raise")["in_loop"]
    assert labels_behind("def read")["in_class"]
    assert labels_behind("line[size")["next_closes_bracket"]
    assert not labels_behind("line[")["next_closes_bracket"]
    assert labels_behind("line[size], {")["in_loop"]
    assert labels_behind('{"a": 1}]')["next_ends_line"]
    assert labels_behind("os.path.join(path")["in_call"]
    assert not labels_behind("return [line")["in_call"]
    assert labels_behind("nothing in")["in_string"]


def test_what_quotation_marks_and_stops_know_about_prose():
    text = (
        "It was late, and the wind had risen over the hills since noon. "
        "He came in from the rain and shook his coat by the door. “Where is Mary now?” asked the old man, and sat down.\n\n"
        "“This one is never closed, he said.\n\n"
        "Nobody spoke. Was it late? It was."
    )

    def behind(words):
        return labels_behind(words, text, prose_labels)

    assert behind("Where is")["in_dialogue"]
    assert not behind("asked the old")["in_dialogue"]
    assert behind("Where is Mary")["is_name"]
    assert behind("Where is Mary")["in_question"]
    assert behind("it late")["in_question"]
    assert not behind("Nobody spoke")["in_question"]
    assert behind("old man")["next_is_comma"]
    assert behind("the door")["next_ends_sentence"]
    assert text.index("never") + 5 not in dict(prose_labels(text))


def test_tasks_are_balanced_and_repeatable():
    documents = [Document(f"{i}.py", re.sub("Reads|line|path|size", rf"\g<0>_{i}", SOURCE)) for i in range(40)]
    tasks = make_tasks(documents, examples=80)
    assert {"in_string", "in_docstring", "line_returns", "in_call", "next_closes_bracket"} <= {t.name for t in tasks}
    for task in tasks:
        assert sum(task.labels) * 2 == len(task.labels) == len(set(task.texts)) <= 80
    assert make_tasks(documents, examples=80) == tasks
    assert make_tasks([Document("bad.py", "def f(:\n")]) == []
    assert make_tasks([Document(f"{i}.py", SOURCE) for i in range(40)], examples=400) == [], (
        "the same text again and again"
    )


def test_the_held_out_modules_give_ten_tasks():
    from saehook import corpus

    files = [f for f in corpus.held_out_files() if f.name in ("argparse.py", "csv.py", "textwrap.py")]
    tasks = make_tasks(corpus.read_documents(files), examples=100)
    assert len(tasks) >= 10


def test_files_of_tasks(tmp_path):
    file = tmp_path / "tasks.jsonl"
    tasks = [ProbeTask("a", ["x(", "y"], [True, False]), ProbeTask("b", ["x(", "z"], [False, True])]
    file.write_text(tasks_to_json_lines(tasks))
    assert json.loads(file.read_text().splitlines()[0]) == {"text": "x(", "labels": {"a": True, "b": False}}
    assert read_tasks(file) == tasks
    file.write_text('{"text": "x", "labels": {"a": true}}\n\n{"text": "x", "labels": {"a": 1}}\n')
    with pytest.raises(FileError, match="line 3"):
        read_tasks(file)
    with pytest.raises(FileError, match="cannot read"):
        read_tasks(tmp_path / "none")


def test_the_command_writes_what_it_makes(tmp_path, capsys):
    for i in range(40):
        (tmp_path / f"{i}.py").write_text(SOURCE.replace("size", f"size_{i}"))
    out = tmp_path / "tasks.jsonl"
    assert main(["probes", "--text", str(tmp_path), "--examples", "80", "--seed", "3", "-o", str(out)]) == 0
    made = read_tasks(out)
    assert {"in_string", "line_returns", "in_call", "next_closes_bracket"} <= {task.name for task in made}
    said = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    assert said == {task.name: str(len(task.texts)) for task in made}
    check_tasks(made)
    documents = [Document(str(i), (tmp_path / f"{i}.py").read_text()) for i in range(40)]
    texts = {text for task in made for text in task.texts}
    assert all(any(text in document.text for document in documents) for text in texts)
    (tmp_path / "short.txt").write_text("Nothing to ask about.")
    assert main(["probes", "--text", str(tmp_path / "short.txt"), "-o", str(tmp_path / "none.jsonl")]) == 2
    assert "not enough places" in capsys.readouterr().err
    assert not (tmp_path / "none.jsonl").exists()


# --- probes -----------------------------------------------------------------------------------------------------------


def test_newton_finds_the_logistic_fit():
    """Against gradient descent of torch on the same two parameters, and the loss that the planted probe has."""
    z = torch.randn(2000, 3, dtype=torch.float64) * torch.tensor([1.0, 50.0, 0.01]) + torch.tensor([0.0, 300.0, 5.0])
    true_w, true_b = torch.tensor([1.5, 0.03, -80.0]).double(), torch.tensor([0.3, -9.0, 400.0]).double()
    y = (torch.rand(2000, dtype=torch.float64) < (true_w[0] * z[:, 0] + true_b[0]).sigmoid()).double()
    found = fit_probes(z, y)
    margin = found.weight * z + found.bias
    slack = margin.sigmoid() - y[:, None]
    scaled = (z - z.mean(0)) / z.std(0)
    torch.testing.assert_close(
        slack.mean(0), torch.zeros(3).double(), atol=2e-6, rtol=0
    )  # the optimum, up to the ridge
    torch.testing.assert_close((slack * scaled).mean(0), torch.zeros(3).double(), atol=5e-6, rtol=0)
    assert found.weight[0] == pytest.approx(1.5, abs=0.2)
    assert found.losses(z, y)[:, 0].mean() < found.losses(z, y)[:, 1].mean()


def test_hard_cases_of_the_fit():
    y = torch.tensor([0.0, 1.0] * 50)
    z = torch.stack([y, torch.ones(100), torch.where(torch.arange(100) == 7, 1e6, y), torch.zeros(100)], 1)
    found = fit_probes(z, y)
    losses = found.losses(z, y).mean(0)
    assert losses[0] < 1e-3  # the classes are separated
    assert losses[[1, 3]].tolist() == pytest.approx([math.log(2)] * 2)
    assert torch.isfinite(found.weight).all()
    assert losses.max() <= math.log(2) + 1e-9


def test_the_best_latent_is_chosen_on_one_half_and_measured_on_the_other():
    y = torch.arange(400) % 4 == 0
    z = torch.randn(400, 50)
    z[:, 33] += 4 * y
    test = halves(y)
    assert test.sum() == 200
    assert y[test].sum() == 50
    found = best_latent(z, y, test)
    assert found.latent == 33
    assert found.losses.shape == (200,)
    assert 0 < found.losses.mean() < 0.2
    noise = best_latent(torch.randn(400, 500), y, test).losses.mean()
    assert noise > 0.5  # by frequency it would be 0.56: what 500 latents fit by chance does not help on the other half


def test_probe_loss_of_a_model(models_by_name):
    """The last byte of the text is what is asked for: the embedding knows it."""
    model: HookedModel = models_by_name("llama")[0]
    sae = SAE(SAEConfig(d_in=32, d_sae=64, activation=ReLU()), site="layers.0.resid_post")
    hooked = model.attach(sae)
    texts = [f"{i} {'a' if i % 2 else 'b'}" for i in range(200)]
    tasks = [ProbeTask("ends_with_a", texts, [bool(i % 2) for i in range(200)])]
    examples = read_examples(hooked, tasks)[hooked.sites[0]]
    alone = hooked.latents(texts[5]).acts[-1]
    torch.testing.assert_close(sae.encode(examples.x[5]), alone, atol=1e-4, rtol=1e-4)
    found = {m.name: m for m in probe_loss(hooked, hooked.sites[0], tasks, examples)}
    assert found["probe_loss"].value < 0.3 < found["probe_loss_frequency"].value == pytest.approx(math.log(2))
    assert found["probe_loss"].n == 100
    assert found["probe_loss.ends_with_a"].value == found["probe_loss"].value
    with pytest.raises(ArgumentError, match="empty after tokenisation"):
        read_examples(hooked, [ProbeTask("t", [""], [True])])
    hooked.detach()


def test_tasks_with_too_few_examples():
    with pytest.raises(ArgumentError, match="2 examples with and 1 without; 40 of each"):
        check_tasks([ProbeTask("t", ["a", "b", "c"], [True, True, False])])
    with pytest.raises(ArgumentError, match="no probe task"):
        check_tasks([])


# --- absorption -------------------------------------------------------------------------------------------------------

PARENT, CHILDREN = 0, 50


def absorbing(absorbed: int) -> tuple[SAE, torch.Tensor, torch.Tensor]:
    """Tokens with one of fifty children, half of them also with a parent direction, and an SAE in which the parent's latent
    is silent at the first `absorbed` children, whose latents write its direction instead."""
    d = CHILDREN + 1
    eye = torch.eye(d)
    sae = SAE(SAEConfig(d_in=d, d_sae=d, activation=ReLU()))
    with torch.no_grad():
        sae.W_enc.copy_(eye)
        sae.W_dec.copy_(eye)
        sae.W_enc[1 : absorbed + 1, PARENT] = -1.0
        sae.W_dec[1 : absorbed + 1, PARENT] = 1.0
    y = torch.arange(800) % 2 == 0
    child = torch.arange(800) // 2 % CHILDREN + 1
    return sae, eye[PARENT] * y[:, None] + eye[child], y


@pytest.mark.parametrize("absorbed", [0, 10, 20])
def test_absorption_is_the_planted_share(absorbed):
    sae, x, y = absorbing(absorbed)
    assert main_latents(sae.encode(x) > 0, y) == [PARENT]
    share = absorbed_share(sae, x[y], [PARENT], torch.eye(CHILDREN + 1)[PARENT].double())
    assert float(share.mean()) == pytest.approx(absorbed / CHILDREN)
    texts = [str(i) for i in range(800)]
    task = ProbeTask("parent", texts, y.tolist())
    whole, single = absorption(sae, [task], Examples(x, {text: i for i, text in enumerate(texts)}))
    assert (whole.name, single.name) == ("absorption", "absorption.parent")
    assert whole.value == pytest.approx(absorbed / CHILDREN, abs=0.06)  # a random half of the tokens is measured
    assert single.note == f"main latents {PARENT}"


def test_a_probe_finds_the_planted_direction():
    x = torch.randn(4000, 8) * torch.linspace(0.5, 3, 8)
    w = F.normalize(torch.arange(8).double() - 3, dim=0)
    y = torch.rand(4000) < (3 * (x.double() @ w) - 1).sigmoid()
    direction, bias = probe_direction(x, y)
    assert float(direction @ w) > 0.98
    assert bias == pytest.approx(-1 / 3, abs=0.15)


def test_a_direction_that_no_latent_stands_for():
    sae, x, y = absorbing(0)
    with torch.no_grad():
        sae.b_enc[PARENT] = -5.0
    texts = [str(i) for i in range(800)]
    examples = Examples(x, {text: i for i, text in enumerate(texts)})
    with pytest.raises(ArgumentError, match="of the 1 tasks there is none"):
        absorption(sae, [ProbeTask("parent", texts, y.tolist())], examples)


def test_tasks_that_no_probe_solves():
    y = [bool(i % 2) for i in range(400)]
    examples = Examples(torch.zeros(400, CHILDREN + 1), {str(i): i for i in range(400)})
    with pytest.raises(ArgumentError, match="of the 1 tasks there is none"):
        absorption(absorbing(0)[0], [ProbeTask("noise", [str(i) for i in range(400)], y)], examples)
