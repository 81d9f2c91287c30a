"""Program files as data: what comes back, what the id is, and that a wrong file is refused with the place named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_hub import fake_hub

from saehook import hub
from saehook.edits import ablate, steer
from saehook.errors import ArgumentError, FileError, FormatError
from saehook.interventions import Program
from saehook.program_file import (
    MAX_BYTES,
    ModelRef,
    ProgramFile,
    ReplayVector,
    SAERef,
    load_edits,
    load_program,
    program_id,
    write_program,
)
from saehook.where import prompt

SITE = "layers.1.resid_post"
SHA = "0123456789abcdef" * 4


def example(**changes: Any) -> ProgramFile:
    file = ProgramFile(
        program=Program(edits=[steer(3, 0.1, unit="max", site=SITE), ablate(5, site=SITE, where=prompt())]),
        model=ModelRef(id="some/model", kind="llama", layers=3, width=32, revision="c" * 40),
        saes=(
            SAERef(site=SITE, sha256={"cfg.json": SHA}, repo="some/saes", path="layer_1/width_4k", revision="d" * 40),
        ),
        replay=ReplayVector(
            prompt="Ein Wört\n",
            ids=(0, 7, 8),
            new_ids=(9,),
            top5=(((9, -0.1), (8, -2.5), (7, -3.0), (6, -4.0), (5, -1e-17)),),
            dtype="float32",
            tolerance=1e-3,
        ),
        saehook="0.1.0",
    )
    return dataclasses.replace(file, **changes)


# --- what comes back -------------------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was_written(tmp_path):
    file = example()
    path = write_program(file, tmp_path / "new" / "program.json")
    assert load_program(path) == file
    assert load_edits(path) == (file.program, file)
    assert path.read_text() == load_program(path).to_json(), "one program has one text"
    assert [p.name for p in path.parent.iterdir()] == ["program.json"]


def test_bare_edits_are_read_as_such(tmp_path):
    (tmp_path / "edits.json").write_text(example().program.to_json())
    assert load_edits(tmp_path / "edits.json") == (example().program, None)
    with pytest.raises(FormatError, match=r"edits.json: the file has unknown fields \['edits'"):
        load_program(tmp_path / "edits.json")


def test_the_id_is_the_hash_of_canonical_json():
    program = Program(edits=[steer(3, 0.1, unit="max", site=SITE)])
    text = (
        '{"edits":[{"latents":[3],"op":"add","site":"layers.1.resid_post","unit":"max","value":0.1}],"error":null,"schema":1,'
        '"splice":false}'
    )
    assert program_id(program) == hashlib.sha256(text.encode()).hexdigest()
    assert program_id(Program.from_json(json.dumps(json.loads(program.to_json()), indent=7))) == program_id(program)
    others = [
        Program(edits=[steer(3, 0.1000000000000001, unit="max", site=SITE)]),
        Program(edits=[steer(3, 0.1, unit="max")]),
        Program(edits=program.edits, error="drop"),
        Program(edits=program.edits, norm="preserve"),
        Program(edits=[*program.edits, *program.edits]),
    ]
    assert len({program_id(other) for other in [program, *others]}) == len(others) + 1


# --- what is refused -------------------------------------------------------------------------------------------------


def changed(change: Any) -> str:
    data = json.loads(example().to_json())
    change(data)
    return json.dumps(data)


def put(*path: Any, value: Any) -> Any:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    return change


WRONG: list[tuple[Any, str]] = [
    (put("schema", value=2), "schema is 2"),
    (put("schema", value=True), "schema is True"),
    (put("schema", value=float("nan")), "schema is nan"),
    (put("replay", "tolerance", value=float("inf")), "replay.tolerance is inf"),
    (put("more", value=1), r"the file has unknown fields \['more'\]"),
    (lambda data: data.pop("replay"), r"the file lacks \['replay'\]"),
    (put("program", value=[]), r"program is \[\]; an object"),
    (put("program", "edits", 0, "op", value="explode"), r"within program: edits\[0\]"),
    (put("program", "edits", 0, "code", value="import os"), r"within program: edits\[0\] has unknown fields"),
    (put("program", "schema", value=7), "within program: the program's schema is 7"),
    (put("program", "edits", 0, "value", value=0.2), "it was changed after it was written"),
    (put("id", value=SHA), "it was changed after it was written"),
    (put("model", "layers", value="3"), "model.layers is '3'; a whole number"),
    (put("model", "width", value=True), "model.width is True"),
    (put("model", "colour", value=1), r"model has unknown fields \['colour'\]"),
    (lambda data: data["model"].pop("id"), r"model lacks \['id'\]"),
    (put("model", "revision", value=5), "model.revision is 5; a string"),
    (put("model", "sha256", value={"../x": SHA}), "model.sha256 is"),
    (put("saes", value={}), "saes is {}; a list"),
    (put("saes", 0, "sha256", value={"cfg.json": "short"}), r"saes\[0\].sha256 is .* a sha256 by file name"),
    (put("saes", 0, "path", value="../../etc"), r"saes\[0\].path is '../../etc'"),
    (put("saes", 0, "path", value="/etc"), r"saes\[0\].path is '/etc'"),
    (put("saes", 0, value=None), r"saes\[0\] is None; an object"),
    (put("replay", "ids", value=[1, -2]), r"replay.ids\[1\] is -2"),
    (put("replay", "ids", value=[1, 2**70]), r"replay.ids\[1\] is 118"),
    (put("replay", "ids", value=[]), "replay has 0 ids"),
    (put("replay", "new_ids", value=[1, 2]), "2 new_ids and 1 top5"),
    (put("replay", "top5", 0, 2, value=[7]), r"replay.top5\[0\]\[2\] is \[7\]; an id and its log-probability"),
    (put("replay", "top5", 0, 2, value=[7, "much"]), r"replay.top5\[0\]\[2\]\[1\] is 'much'"),
    (put("replay", "tolerance", value=None), "replay.tolerance is None; a finite number"),
    (put("replay", "prompt", value=[]), r"replay.prompt is \[\]; a string"),
    (put("saehook", value=1), "saehook is 1; a string"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_field_is_named(change, message):
    with pytest.raises(FormatError, match=message):
        ProgramFile.from_json(changed(change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is not JSON"),
        ("[" * 100_000, "the file is not JSON"),
        ("[]", r"the file is \[\]; an object"),
        ('{"schema": 1, "schema": 1}', "the file has the field 'schema' twice"),
        ('{"schema": NaN}', "the file lacks"),
        ('{"schema": -Infinity}', "the file lacks"),
        ('{"schema": ' + "9" * 5000 + "}", "the file is not JSON"),
    ],
    ids=range(7),
)
def test_a_text_that_is_none(text, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        ProgramFile.from_json(text)
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(FormatError, match="p.json"):
        load_edits(tmp_path / "p.json")


def test_numbers_beyond_float_are_refused():
    text = example().to_json().replace('"tolerance": 0.001', '"tolerance": 1e999')
    with pytest.raises(FormatError, match="replay.tolerance is inf"):
        ProgramFile.from_json(text)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(FileError, match=r"cannot read .*nothing.json"):
        load_program(tmp_path / "nothing.json")
    with pytest.raises(FileError, match="cannot read"):
        load_program(tmp_path)
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: nothing is written, and nothing is read
    with pytest.raises(FormatError, match="has 16,777,217 bytes"):
        load_program(large)
    (tmp_path / "picture.json").write_bytes(b"\x89PNG\xff")
    with pytest.raises(FormatError, match="is no text file"):
        load_edits(tmp_path / "picture.json")


def _places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values within JSON data."""
    steps = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path] * bool(path) + [place for step, value in steps for place in _places(value, (*path, step))]


def _mutations(count: int) -> None:
    draw = random.Random(0)
    values = [None, True, -1, 0, 2**80, 1.5, 1e308, "", "x", "\ud800", [], {}, [[]], {"op": "add"}, SHA, ["a"]]
    accepted = 0
    for _ in range(count):
        data = json.loads(example().to_json())
        for _ in range(draw.randint(1, 2)):
            *head, last = draw.choice(_places(data))
            inner = data
            for step in head:
                inner = inner[step]
            match draw.randrange(3):
                case 0:
                    inner[last] = draw.choice(values)
                case 1:
                    del inner[last]
                case _ if isinstance(inner, dict):
                    inner[draw.choice(["extra", "site", "schema", "__class__"])] = draw.choice(values)
        try:
            file = ProgramFile.from_json(json.dumps(data))
        except FormatError:
            continue
        accepted += 1
        assert ProgramFile.from_json(file.to_json()) == file
        assert file.card().startswith("---\n")
    assert 0 < accepted < count


def test_changed_files_are_understood_or_refused():
    _mutations(200)


@pytest.mark.slow
def test_many_changed_files_are_understood_or_refused():
    _mutations(10_000)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_the_card_says_what_it_does_and_on_what():
    card = example().card()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "saehook", "tags": ["saehook-program"], "base_model": "some/model"}
    for said in (
        "1. `add 3 0.1 max at layers.1.resid_post (every token)`",
        "2. `ablate 5 at layers.1.resid_post (prompt)`",
        "`some/model`, revision `" + "c" * 40,
        "`some/saes`, `layer_1/width_4k`, revision `" + "d" * 40,
        "| 9 | 9 (-0.1000), 8 (-2.5000)",
        example().id,
    ):
        assert said in text
    spliced = dataclasses.replace(example(), program=Program(splice=True, norm={"cap": 0.5}))
    assert "`splice`: every token becomes its reconstruction" in spliced.card()
    assert "No edit of a latent." in spliced.card()


def test_names_on_the_hub():
    assert hub.parse("hf:owner/name") == hub.HubPlace("owner/name")
    assert hub.parse("hf:owner/name,revision=v1").name == "hf:owner/name,revision=v1"
    for wrong in ("hf:", "hf:name", "hf:a/b/c", "hf:a/b,revision=", "hf:a/b,branch=x", "hf:/b"):
        with pytest.raises(ArgumentError, match="no name on the hub"):
            hub.parse(wrong)
    cache = Path("/cache/models--owner--name/snapshots/abc")
    assert hub.place_of(cache / "layer_1" / "16k") == hub.HubPlace("owner/name", "abc", "layer_1/16k")
    assert hub.place_of(cache) == hub.HubPlace("owner/name", "abc", None)
    assert hub.place_of(Path("/home/models/name")) is None
    with pytest.raises(ArgumentError, match="what is uploaded makes a new one"):
        hub.upload("owner/name,revision=main", {}, message="")


IN_A_NEW_PROCESS = """
import sys
from saehook import hub
from saehook.errors import SaehookError
from saehook.program_file import load_program, push_program

file = load_program(sys.argv[1])
first = push_program(file, "me/edits")
assert load_program(first.name) == file == load_program("hf:me/edits")
assert push_program(file, "hf:me/edits").revision != first.revision
for name in ("hf:me/edits,revision=none", "hf:me/others", "hf:you/large"):
    try:
        load_program(name)
    except SaehookError as error:
        print(type(error).__name__, error)
print("torch" in sys.modules)
folder = hub.download(hub.HubPlace("you/saes", path="layer_1"), "cfg.json").parent
print(*hub.place_of(folder))
"""


def test_a_program_goes_to_the_hub_and_comes_back(tmp_path):
    """In a process of its own, because huggingface_hub reads its endpoint when it is imported."""
    path = write_program(example(), tmp_path / "program.json")
    with fake_hub() as served:
        served.repos["you/large"] = [{"program.json": b" " * (MAX_BYTES + 1)}]
        served.repos["you/saes"] = [{"layer_1/cfg.json": b"{}"}]
        done = subprocess.run(
            [sys.executable, "-c", IN_A_NEW_PROCESS, path],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "HF_ENDPOINT": served.url,
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(tmp_path / "home"),
                "HF_TOKEN": "hf_of_nobody",
            },
        )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("FileError cannot read program.json of hf:me/edits,revision=none: RevisionNotFoundError")
    assert said[1].startswith("FileError cannot read program.json of hf:me/others: RepositoryNotFoundError")
    assert said[2].startswith("FormatError program.json of hf:you/large has 16,777,217 bytes")
    assert said[3] == "False"
    assert said[4] == f"you/saes {served.commit_id('you/saes', 0)} layer_1"
    assert not [request for request in served.requests if request.startswith('"GET /you/large')]
    commits = served.repos["me/edits"]
    assert len(commits) == 2
    assert set(commits[0]) == {"program.json", "README.md"}
    assert commits[0]["program.json"] == path.read_bytes()
    assert "saehook replay hf:me/edits" in commits[0]["README.md"].decode()


@pytest.mark.network
def test_a_missing_program_on_the_true_hub():
    with pytest.raises(FileError, match="EntryNotFoundError"):
        load_program("hf:openai-community/gpt2")
