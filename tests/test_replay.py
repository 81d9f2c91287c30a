"""Replays: same where nothing changed, drifted and why where something did."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_lm, byte_tokenizer, random_ids, tiny_sae

from saehook.checkpoint import load_sae, save_sae
from saehook.cli import main
from saehook.conditions import latent
from saehook.config import SAEConfig, TopK
from saehook.edits import ablate, clamp, keep_only, scale, steer
from saehook.errors import ArgumentError, FileError, NoEffectWarning, SiteError
from saehook.hooked_model import HookedModel
from saehook.interventions import Program, VectorEdit
from saehook.program_file import load_program
from saehook.replay import NEW_TOKENS, compare_files, program_file, replay, save_program
from saehook.sae import SAE
from saehook.where import EVERYWHERE, generation, prompt, span

SITES = ("layers.1.resid_post", "layers.2.mlp_out")
TEXT = "the cat sees a red house"


@pytest.fixture
def parts(tmp_path) -> dict[str, Path]:
    """Folders of a model and two SAEs for it."""
    build_lm("gpt2").save_pretrained(tmp_path / "lm")
    byte_tokenizer().save_pretrained(tmp_path / "lm")
    for i, site in enumerate(SITES):
        save_sae(tiny_sae(site=site, seed=i), tmp_path / f"sae{i}")
    return {"lm": tmp_path / "lm", "sae0": tmp_path / "sae0", "sae1": tmp_path / "sae1"}


def attached(parts: dict[str, Path], saes: str = "sae0 sae1", **options: Any) -> Any:
    loaded = [load_sae(parts[name]) for name in saes.split()]
    return HookedModel.from_pretrained(parts["lm"], **options).attach({str(sae.site): sae for sae in loaded})


PROGRAMS = [
    Program(edits=[steer([3, 5], 2.0, unit="max", site=SITES[0])]),
    Program(
        edits=[clamp(3, 4.0, site=SITES[0]), scale(7, -2.0, site=SITES[1]), ablate(9, site=SITES[0])], norm="preserve"
    ),
    Program(edits=[steer(3, 1.0, unit="norm", site=SITES[1], where=prompt())], error="drop"),
    Program(edits=[keep_only([1, 2, 3], site=SITES[0])], norm={"cap": 0.5}),
    Program(splice=True),
    Program(),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_a_program_replayed_where_it_was_made_is_the_same(parts, tmp_path, program):
    hooked = attached(parts)
    file = save_program(hooked, program, tmp_path / "p.json", prompt=TEXT)
    result = replay(attached(parts), load_program(tmp_path / "p.json"))
    assert result.same, result
    assert result.max_delta < 1e-5
    assert str(result).startswith("same: program ")
    ids = list(file.replay.ids)
    assert ids == byte_tokenizer()(TEXT)["input_ids"]
    assert len(file.replay.new_ids) == NEW_TOKENS
    if any(edit.where != EVERYWHERE for edit in program.edits):
        return
    for new, top in zip(file.replay.new_ids, file.replay.top5, strict=True):  # against single forward passes
        with torch.no_grad():
            log_probs = hooked(ids, edits=program).logits[0, -1].log_softmax(-1)
        assert top[0][0] == new == int(log_probs.argmax())
        for token, value in top:
            assert value == pytest.approx(float(log_probs[token]), abs=1e-4)
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
        ids.append(new)


def test_edits_of_generated_tokens_are_part_of_it(parts):
    hooked = attached(parts)
    clean = program_file(hooked, Program(), prompt=TEXT)
    file = program_file(hooked, steer(3, 30.0, site=SITES[0], where=generation()), prompt=TEXT)
    assert file.replay.top5[0] == clean.replay.top5[0]
    assert file.replay.top5[1] != clean.replay.top5[1]
    assert replay(hooked, file).same


def test_only_the_saes_in_use_are_named_and_every_edit_gets_its_site(parts):
    alone = attached(parts, "sae1")
    file = program_file(alone, [steer(3, 2.0)], prompt=TEXT)
    assert file.program.edits[0].site == SITES[1]
    assert [sae.site for sae in file.saes] == [SITES[1]]
    assert replay(attached(parts), file).same, "where two are attached, the site says which is meant"
    vector = VectorEdit(op="add", vector=(1.0,) * 32, value=0.1, when=latent(3) > -1.0)
    file = program_file(alone, vector, prompt=TEXT)
    assert file.program.edits[0] == dataclasses.replace(vector, site=SITES[1], when=latent(3, site=SITES[1]) > -1.0)
    assert [sae.site for sae in file.saes] == [SITES[1]], "the condition reads it"
    both = program_file(attached(parts), Program(splice=True), prompt=TEXT)
    assert [sae.site for sae in both.saes] == list(SITES)
    with pytest.raises(SiteError, match="no SAE is attached"):
        replay(attached(parts, "sae0"), file)


def test_no_path_of_this_machine_is_written_down(parts, tmp_path):
    text = program_file(attached(parts), PROGRAMS[0], prompt=TEXT).to_json()
    assert str(tmp_path) not in text
    assert '"path": "sae0"' in text


def test_parts_from_the_hubs_cache_are_known_by_their_commit(parts, tmp_path):
    snapshot = tmp_path / "models--some--saes" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    parts["sae0"].rename(snapshot / "layer_1")
    model = HookedModel.from_pretrained(parts["lm"])
    file = program_file(model.attach(load_sae(snapshot / "layer_1")), steer(3, 2.0), prompt=TEXT)
    assert (file.saes[0].repo, file.saes[0].path, file.saes[0].revision) == ("some/saes", "layer_1", "c" * 40)


# --- drifted ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(parts) -> Any:
    return program_file(attached(parts), steer([3, 5], 2.0, unit="max", site=SITES[0]), prompt=TEXT)


def flip(path: Path, place: int) -> None:
    """The lowest bit of one byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_one_bit_of_an_sae_is_noticed_and_its_file_named(parts, made):
    flip(parts["sae0"] / "sae_weights.safetensors", -4)
    result = replay(attached(parts), made)
    assert not result.same
    assert [text for text in result.differences if "sae_weights.safetensors of the SAE sae0 at" in text]
    assert len(result.differences) == 1, "so little does not move the numbers"
    assert result.max_delta < 1e-4
    data = json.loads(result.to_json())
    assert (data["same"], data["differences"]) == (False, list(result.differences))
    assert str(result).startswith("drifted: program ")


def test_another_sae_moves_the_numbers_too(parts, made):
    save_sae(tiny_sae(site=SITES[0], seed=9), parts["sae0"])
    result = replay(attached(parts), made)
    assert result.max_delta > made.replay.tolerance
    assert any(f"log-probabilities differ by up to {result.max_delta:.3g}" in text for text in result.differences)


def test_other_statistics_are_noticed(parts, made):
    sae = load_sae(parts["sae0"])
    assert sae.stats is not None
    sae.stats.max_act *= 1.5
    save_sae(sae, parts["sae0"])
    result = replay(attached(parts), made)
    assert "stats.safetensors of the SAE sae0 at layers.1.resid_post differs" in result.differences[0]
    assert result.max_delta > made.replay.tolerance, "the amount is in units of the maximum"
    (parts["sae0"] / "stats.safetensors").unlink()
    assert compare_files(attached(parts), made)[0][0].split("differs: ")[1].startswith("is missing here")


def test_an_sae_that_is_not_in_the_program_does_not_matter(parts, made):
    flip(parts["sae1"] / "sae_weights.safetensors", -4)
    assert replay(attached(parts), made).same


def test_another_language_model(parts, made):
    flip(parts["lm"] / "model.safetensors", -4)
    assert replay(attached(parts), made).differences[0].startswith("model.safetensors of the language model lm differs")
    build_lm("llama").save_pretrained(parts["lm"])
    result = replay(attached(parts), made)
    assert "the language model lm has kind llama, in the file gpt2." in result.differences
    assert result.max_delta > 0.1


def test_another_revision(parts):
    def at(commit: str) -> Any:
        lm = build_lm("gpt2")
        lm.config._commit_hash = commit
        return HookedModel(lm, byte_tokenizer(), model_id="some/model").attach(load_sae(parts["sae0"]))

    file = program_file(at("a" * 40), steer(3, 2.0), prompt=TEXT)
    assert (file.model.id, file.model.revision) == ("some/model", "a" * 40)
    assert replay(at("a" * 40), file).same
    result = replay(at("b" * 40), file)
    assert result.differences == (
        f"the language model some/model has revision {'b' * 40}, the file names some/model, {'a' * 40}.",
    )
    unknown = HookedModel(build_lm("gpt2"), byte_tokenizer()).attach(load_sae(parts["sae0"]))
    result = replay(unknown, file)
    assert result.same
    assert "no hash or revision is known on both sides" in result.unchecked[0]


def test_another_dtype(parts, made):
    result = replay(attached(parts, dtype=torch.bfloat16), made)
    assert "the model runs in bfloat16, the file was made in float32." in result.differences
    assert result.max_delta > made.replay.tolerance
    half = program_file(attached(parts, dtype=torch.bfloat16), made.program, prompt=TEXT)
    assert (half.replay.dtype, half.replay.tolerance) == ("bfloat16", 0.05)
    assert replay(attached(parts, dtype=torch.bfloat16), half).same


def test_another_tokenizer(parts, made):
    byte_tokenizer(adds_bos=False).save_pretrained(parts["lm"])
    result = replay(attached(parts), made)
    (said,) = result.differences
    assert said.startswith("the tokenizer makes 24 tokens [")
    assert "in the file 25 tokens [0, " in said


def test_an_sae_of_no_file_cannot_be_checked(parts, made):
    hooked = HookedModel.from_pretrained(parts["lm"]).attach(tiny_sae(site=SITES[0]))
    result = replay(hooked, made)
    assert result.same
    assert result.unchecked == (f"the SAE at {SITES[0]}, which was loaded from no file.",)
    with pytest.raises(ArgumentError, match="Write it with save_sae"):
        program_file(hooked, steer(3, 2.0), prompt=TEXT)
    hooked = attached(parts)
    (parts["sae0"] / "sae_weights.safetensors").unlink()
    with pytest.raises(FileError, match="holds no sae_weights.safetensors any more"):
        program_file(hooked, steer(3, 2.0, site=SITES[0]), prompt=TEXT)


# --- what cannot be meant -----------------------------------------------------------------------------------------------


def test_mistakes(parts, made, tmp_path):
    hooked = attached(parts)
    for wrong in ("", None, random_ids(4)):
        with pytest.raises(ArgumentError, match="a text is expected"):
            program_file(hooked, PROGRAMS[0], prompt=wrong)  # type: ignore[arg-type]
    for wrong in (0.0, -1.0, float("nan"), float("inf"), True, "much"):
        with pytest.raises(ArgumentError, match="tolerance="):
            program_file(hooked, PROGRAMS[0], prompt=TEXT, tolerance=wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="float32 cannot hold"):
        save_program(hooked, steer(3, 3e38, site=SITES[0]), tmp_path / "p.json", prompt=TEXT)
    broken = attached(parts)
    with torch.no_grad():
        broken.lm.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ArgumentError, match="NaN or infinity"):
        save_program(broken, steer(3, 3.0, site=SITES[0]), tmp_path / "p.json", prompt=TEXT)
    assert not (tmp_path / "p.json").exists()
    with pytest.warns(NoEffectWarning, match="selected no token"):
        program_file(hooked, steer(3, 1.0, site=SITES[0], where=span(60)), prompt=TEXT)
    unknown = dataclasses.replace(made, replay=dataclasses.replace(made.replay, new_ids=(7, 7, 7, 300)))
    with pytest.raises(
        ArgumentError, match="holds token 300, and the model has 300: it was made for another model, lm"
    ):
        replay(hooked, unknown)


def test_a_transcoder_says_where_it_writes(parts):
    sae = SAE(
        SAEConfig(d_in=32, d_sae=48, activation=TopK(k=4), d_out=32, subtract_b_dec=False),
        site="layers.1.mlp_in",
        site_out="layers.1.mlp_out",
    )
    hooked = HookedModel.from_pretrained(parts["lm"]).attach(load_sae(save_sae(sae, parts["lm"].parent / "transcoder")))
    file = program_file(hooked, steer(3, 2.0), prompt=TEXT)
    assert (file.saes[0].site, file.saes[0].site_out) == ("layers.1.mlp_in", "layers.1.mlp_out")
    assert replay(hooked, file).same


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_command_says_same_or_drifted(parts, tmp_path, capsys):
    options = f"--lm {parts['lm']} --sae {parts['sae0']} {parts['sae1']}".split()
    program, numbers = tmp_path / "p.json", tmp_path / "r.json"
    steering = ["--steer", f"{SITES[0]}/3=2max", "--max-new-tokens", "3"]
    assert main(["generate", TEXT, *options, *steering, "--save-program", str(program)]) == 0
    assert load_program(program).program == Program(edits=[steer(3, 2.0, unit="max", site=SITES[0])])
    first = capsys.readouterr().out
    assert main(["replay", str(program), *options, "--json", str(numbers)]) == 0
    assert capsys.readouterr().out.startswith("same: program ")
    assert json.loads(numbers.read_text())["same"] is True
    assert main(["generate", TEXT, *options, "--edits", str(program), "--max-new-tokens", "3"]) == 0
    said = capsys.readouterr()
    assert said.out == first
    assert "differs" not in said.err
    flip(parts["sae0"] / "sae_weights.safetensors", -4)
    assert main(["replay", str(program), *options, "--json", str(numbers)]) == 1
    assert "- sae_weights.safetensors of the SAE sae0" in capsys.readouterr().out
    assert json.loads(numbers.read_text())["same"] is False
    assert main(["generate", TEXT, *options, "--edits", str(program), "--max-new-tokens", "1"]) == 0
    assert "note: sae_weights.safetensors of the SAE sae0" in capsys.readouterr().err
    assert main(["replay", str(program), *options[:2]]) == 2
    assert "--sae DIR" in capsys.readouterr().err
    assert main(["replay", str(parts["lm"] / "config.json"), *options]) == 2
    assert "config.json: the file has unknown fields" in capsys.readouterr().err


def test_a_program_for_the_bundled_files_is_replayed_without_arguments(tmp_path, capsys):
    program = str(tmp_path / "p.json")
    command = [
        "generate",
        "--steer",
        "layers.2.resid_post/3=0.5max",
        "--max-new-tokens",
        "1",
        "--save-program",
        program,
    ]
    assert main(command) == 0
    assert main(["replay", program]) == 0
    assert "same: program" in capsys.readouterr().out
