"""The commands, run as a user runs them: on the bundled files, and on a model and SAE of one's own."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from builders import build_lm, byte_tokenizer

import saehook
from saehook import Program, steer
from saehook.cli import main
from saehook.commands import demo
from saehook.commands.eval import labels
from saehook.eval_result import EvalResult

WORDS = "the cat sees a red house and the dog runs under the tree . " * 200


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> dict[str, Path]:
    """A model of one's own, text, and an SAE trained on them by the command."""
    folder = tmp_path_factory.mktemp("own")
    lm = folder / "lm"
    build_lm("gpt2").save_pretrained(lm)
    byte_tokenizer().save_pretrained(lm)
    text = folder / "text.txt"
    text.write_text(WORDS)
    command = (
        f"train --lm {lm} --site layers.1.resid_post --activation topk --k 4 --d-sae 64 --tokens 6k --text {text} "
        f"--out {folder / 'out'} --eval-text {text} --eval-tokens 1k --calibration-tokens 1k --seed 3 "
        "--skip-first-tokens 1 --max-norm-ratio 7.5"
    )
    assert main(command.split()) == 0
    empty = folder / "empty.txt"
    empty.write_text("")
    others = {"headless": build_lm("gpt2").transformer, "other": build_lm("gpt2", seed=9), "broken": build_lm("gpt2")}
    with torch.no_grad():
        others["other"].transformer.wte.weight.mul_(20)
        others["broken"].transformer.wte.weight.fill_(torch.nan)
    for name, other in others.items():
        other.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return {
        **{name: folder / name for name in others},
        "lm": lm,
        "text": text,
        "empty": empty,
        "sae": folder / "out" / "layers.1.resid_post",
        "out": folder / "out",
    }


def test_train_writes_one_folder_per_site(own):
    assert (own["out"] / "eval.json").exists()
    sae = saehook.load_sae(own["sae"])
    assert (sae.d_in, sae.d_sae, sae.site) == (32, 64, "layers.1.resid_post")
    assert sae.metadata["training"]["tokens"] == 6000
    assert sae.metadata["training"]["seed"] == 3
    assert (sae.mask_rule.skip_first_tokens, sae.mask_rule.max_norm_ratio) == (1, 7.5)


def test_eval_prints_a_table_and_writes_json(own, tmp_path, capsys):
    command = f"eval --lm {own['lm']} --sae {own['sae']} --text {own['text']} --tokens 2k --json {tmp_path / 'e.json'}"
    assert main(command.split()) == 0
    data = json.loads((tmp_path / "e.json").read_text())
    (row,) = data["results"]
    assert row["site"] == "layers.1.resid_post"
    assert row["tokens"] >= 2000
    assert row["delta_ce"] == row["ce_spliced"] - row["ce_clean"]
    said = capsys.readouterr().out
    assert f"{row['ce_spliced']:.3f}" in said
    assert f"tokens that count: {saehook.load_sae(own['sae']).mask_rule}" in said


def test_eval_of_all_saes_of_a_run_and_its_page(own, tmp_path, capsys):
    """What a shell makes of `run/*`: SAEs of one site, and files beside them."""
    run = shutil.copytree(own["out"], tmp_path / "run")
    shutil.copytree(own["sae"], run / "other")
    found = " ".join(map(str, sorted(run.iterdir())))
    out = tmp_path / "e.json"
    assert main(f"eval --lm {own['lm']} --sae {found} --text {own['text']} --tokens 2k --json {out}".split()) == 0
    said = capsys.readouterr()
    assert "left out" in said.err
    assert "metrics.jsonl" in said.err
    first, second = json.loads(out.read_text())["results"]
    assert (first["sae"], second["sae"]) == ("layers.1.resid_post", "other")
    assert first["ce_spliced"] == second["ce_spliced"]
    assert main(f"report {out}".split()) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "e.html")
    assert "<svg" in (tmp_path / "e.html").read_text()
    assert main(f"report {out} -o {tmp_path / 'page.html'}".split()) == 0
    assert (tmp_path / "page.html").read_text() == (tmp_path / "e.html").read_text()


def test_generate_equals_python_and_takes_a_program(own, tmp_path, capsys):
    program = tmp_path / "program.json"
    edits = [steer(5, 30.0), saehook.clamp(7, 10.0, where=saehook.prompt())]
    program.write_text(Program(edits=edits, norm={"cap": 0.5}).to_json())
    base = f"generate --lm {own['lm']} --sae {own['sae']} --max-new-tokens 12"
    assert main([*base.split(), "the cat", "--edits", str(program), "--json", str(tmp_path / "g.json")]) == 0
    from_file = json.loads((tmp_path / "g.json").read_text())
    model = saehook.HookedModel.from_pretrained(own["lm"])
    hooked = model.attach(saehook.load_sae(own["sae"]))
    expected = hooked.generate("the cat", edits=Program(edits=edits, norm={"cap": 0.5}), max_new_tokens=12)
    assert from_file["new_ids"] == expected.new_ids.tolist()
    assert from_file["edits"][0]["tokens"] == expected.report.edits[0].tokens
    assert from_file["edits"][0]["dose"] > 0.5 >= from_file["sites"][0]["dose"] - 1e-5
    capsys.readouterr()
    options = ["the cat", "--steer", "5=30", "--json", str(tmp_path / "o.json")]
    assert main([*base.split(), *options]) == 0
    alone = hooked.generate("the cat", edits=[steer(5, 30.0)], max_new_tokens=12)
    assert json.loads((tmp_path / "o.json").read_text())["new_ids"] == alone.new_ids.tolist()
    assert "‖Δ‖/‖x‖" in capsys.readouterr().err
    more = ["--at-least", "5=2max", "--at-most", "7=0.1", "--to-mean", "9", "--json", str(tmp_path / "m.json")]
    assert main([*base.split(), "the cat", *more]) == 0
    assert [row["edit"] for row in json.loads((tmp_path / "m.json").read_text())["edits"]] == [
        {"op": "min", "latents": [5], "value": 2.0, "unit": "max"},
        {"op": "max", "latents": [7], "value": 0.1, "unit": "raw"},
        {"op": "mean", "latents": [9]},
    ]
    capsys.readouterr()
    assert main([*base.split(), *options, "--report", "full"]) == 0
    full = json.loads((tmp_path / "o.json").read_text())
    assert full["new_ids"] == alone.new_ids.tolist()
    assert full["rows"][0]["first_divergent"] is not None
    assert "nats a token, other text from new token" in capsys.readouterr().err


def test_an_edit_without_effect_is_noted(own, capsys):
    command = f"generate --lm {own['lm']} --sae {own['sae']} --max-new-tokens 1 --where generation --steer 5=3 abc"
    assert main(command.split()) == 0
    assert "selected no token" in capsys.readouterr().err


def test_stats_renews_the_maxima(own, capsys):
    before = saehook.load_sae(own["sae"])
    assert main(f"stats {own['sae']} --lm {own['lm']} --text {own['text']} --tokens 3k".split()) == 0
    after = saehook.load_sae(own["sae"])
    assert before.stats is not None
    assert after.stats is not None
    assert after.stats.tokens >= 3000
    assert after.stats.tokens != before.stats.tokens
    assert torch.equal(before.W_enc, after.W_enc)
    assert after.metadata == before.metadata
    assert "latents fired" in capsys.readouterr().out


def test_sites_lists_names_widths_and_paths(own, tmp_path, capsys):
    assert main(f"sites --lm {own['lm']} layers.1.* --json {tmp_path / 's.json'}".split()) == 0
    out = capsys.readouterr().out
    assert "layers.1.resid_mid" in out
    assert "transformer.h.1.mlp:output" in out
    assert {site["width"] for site in json.loads((tmp_path / "s.json").read_text())} == {32, 48}


def test_demo_without_arguments_prints_the_table_of_the_bundled_files(capsys, tmp_path):
    assert main(["demo", "--no-serve", "--tokens", "1k", "--json", str(tmp_path / "d.json")]) == 0
    rows = json.loads((tmp_path / "d.json").read_text())["results"]
    assert [row["sae"] for row in rows] == ["sae", "sae-mlp", "all"]
    assert "recovered" in capsys.readouterr().out


def test_demo_has_a_table_before_anything_is_measured(own):
    hooked = saehook.HookedModel.from_pretrained(own["lm"]).attach(saehook.load_sae(own["sae"]))
    bundled = {"layers.2.resid_post": saehook.bundled("sae"), "layers.3.mlp_out": saehook.bundled("sae-mlp")}
    stored = json.loads((saehook.bundled("sae").parent / "eval.json").read_text())
    found = demo.recorded(hooked, bundled)
    assert found is not None
    assert json.loads(found.to_json()) == stored
    measured = EvalResult.from_json((own["out"] / "eval.json").read_text()).results[0].numbers()
    (site,) = hooked.sites
    found = demo.recorded(hooked, {site: own["sae"]})
    assert found is not None
    assert found.results[0].numbers() == measured | {"sae": own["sae"].name, "site": site}
    del hooked.saes[site].metadata["evaluation"]
    assert demo.recorded(hooked, {site: own["sae"]}) is None


@pytest.mark.slow
def test_demo_serves_first_and_measures_then():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "saehook", "demo", "--port", str(port), "--tokens", "1k", "--allow-uploads"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # A shell that runs the tests in its background has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("measured again"):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60) as page:
                    assert page.status == 200
                disposition = b'Content-Disposition: form-data; name="files"; filename="a.pt"'
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/gradio_api/upload", b"--x\r\n" + disposition + b"\r\n\r\n0\r\n--x--\r\n",
                    {"Content-Type": "multipart/form-data; boundary=x"},
                )  # fmt: skip
                with pytest.raises(urllib.error.HTTPError, match="415"):  # uploads are on, and take no such file
                    urllib.request.urlopen(request, timeout=60)
            if "tokens; losses" in line and len([x for x in lines if "tokens; losses" in x]) == 2:
                break
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    said = "".join(lines)
    assert said.startswith("recorded when the SAEs were made")
    assert said.index("100,206 tokens") < said.index("serving on") < said.index("measured again")
    assert process.returncode in (0, 130)


def test_generate_and_sites_work_without_arguments(capsys):
    assert main(["generate", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("def load(path):\n")
    assert main(["sites"]) == 0
    assert "layers.5.resid_post" in capsys.readouterr().out


MISTAKES = [
    ("eval --lm {lm} --sae {lm}", "of no format that saehook reads"),
    ("eval --lm {lm} --sae {text}", "no whole file of weights"),
    ("eval --lm {lm} --sae /nowhere", "not there"),
    ("eval --lm {lm}", "--sae DIR"),
    ("eval --lm {out} --sae {sae}", "no config.json"),
    ("eval --lm {lm} --sae {sae} --text /nowhere.txt", "nowhere.txt"),
    ("eval --lm {lm} --sae {sae} --text {empty}", "one window needs"),
    ("eval --sae {sae}", "width 32"),
    ("eval --lm {other} --sae {sae} --text {text} --tokens 1k", "another model"),
    ("eval --lm {headless} --sae {sae} --text {text} --tokens 1k", "predicts no next tokens, so it has no loss"),
    ("eval --lm {broken} --sae {sae} --text {text} --tokens 1k --check off", "are not finite"),
    ("report {lm}", "cannot read"),
    ("report {text}", "no evaluation"),
    ("train --lm {lm} --site layers.7.resid_post --text {text}", "Did you mean"),
    ("train --lm {lm} --text {text} --k 99999 --tokens 1k", "more latents than d_sae"),
    ("generate --lm {lm} --sae {sae} --max-new-tokens 4 --steer 9999=1 abc", "0..63"),
    ("generate --lm {lm} --sae {sae} --steer 3=much abc", "not understood"),
    ("generate --lm {lm} --sae {sae} --steer 3=nan abc", "finite"),
    ("generate --lm {lm} --sae {sae} --edits /nowhere.json abc", "nowhere.json"),
    ("generate --lm {lm} --sae {sae} --max-new-tokens 900 abc", "64 tokens the model takes"),
    ("sites --lm {lm} layers.9.x", "matches no site"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_said_and_is_exit_code_two(own, command, message, capsys):
    assert main(command.format(**own).split()) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_an_evaluation_of_few_tokens_says_how_many_it_takes(own, capsys):
    assert main(f"eval --lm {own['lm']} --sae {own['sae']} --text {own['text']} --tokens 200".split()) == 0
    said = capsys.readouterr().out
    assert "windows are too few for a bootstrap, so intervals are by Student's t; at least 10 are needed" in said
    assert "too few tokens for the share of dead latents" in said


@pytest.mark.parametrize("text", ["many", "-5", "1.5", "2**-1", "nan", "inf"])
def test_counts_that_are_none(text):
    done = subprocess.run([sys.executable, "-m", "saehook", "eval", f"--tokens={text}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not a count" in done.stderr


@pytest.mark.parametrize(
    "command", ["demo", "eval", "probes", "report", "train", "generate", "replay", "export", "stats", "sites", "plan"]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"saehook {command}" in capsys.readouterr().out


def test_a_sweep_from_a_file(own, tmp_path, capsys):
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"lm: {own['lm']}\ntext: {own['text']}\neval_tokens: 0\nsite: layers.1.resid_post\nactivation: [topk, jumprelu]\n"
        "k: 4\nd_sae: 64\ntokens: 4k\ncalibration_tokens: 500\nbuffer_tokens: 2k\n"
    )
    assert main(["train", "--config", str(sweep), "--seed", "3", "--out", str(tmp_path / "out")]) == 0
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert folders == ["layers.1.resid_post-jumprelu4-64-seed3", "layers.1.resid_post-topk4-64-seed3"]
    assert "report in" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()
    for wrong, said in (
        (["--config", str(sweep), "--activation", "relu", "--bandwidth", "1"], "no meaning for relu"),
        (["--resume", str(tmp_path / "out"), "--k", "4"], "--k cannot be given with --resume"),
        (["--resume", str(tmp_path)], "holds no run to resume"),
        (["--resume", str(tmp_path / "out")], "no checkpoint to resume from"),
    ):
        assert main(["train", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_names_of_saes_tell_them_apart():
    """As many folders as it takes; one that is given twice is numbered."""
    folders = ["runs/a/x", "runs/b/x", "y", "other/b/x", "y"]
    found = labels({str(i): Path(folder) for i, folder in enumerate(folders)})
    assert list(found.values()) == ["a/x", "runs/b/x", "y#0", "other/b/x", "y#1"]


def test_an_evaluation_of_nothing(capsys, tmp_path):
    assert main(["eval", "--tokens", "0"]) == 2
    assert "nothing can be measured on no text" in capsys.readouterr().err
    assert main(["eval", "--lm", str(tmp_path / "gone"), "--sae", str(saehook.bundled("sae"))]) == 2
    assert "there is no language model at" in capsys.readouterr().err
