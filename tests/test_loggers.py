"""Curves for TensorBoard and Weights & Biases, by the real packages."""

import json
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted import D_IN, SITE, planted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from saehook import BatchTopK, TopK, TrainConfig, Trainer
from saehook.errors import ArgumentError, TrainingInterrupted
from saehook.loggers import LOGGERS, WANDB_IDS, Loggers, TensorBoard, check_loggers

CONFIGS = [
    TrainConfig(site=SITE, activation=activation, d_sae=48, tokens=9600, batch_tokens=96, calibration_tokens=200)
    for activation in (TopK(k=3), BatchTopK(k=3))
]


def fit(folder: Path, log: tuple[str, ...], *, stop: bool = False, resume: bool = False) -> None:
    """Train on made-up activations for 100 steps; `stop`: interrupt between the lines of steps 80 and 100."""

    def rows():
        for i, part in enumerate(planted(9900)[0].split(100)):
            if stop and i == 90:
                trainer.stop()
            yield part

    trainer = Trainer(CONFIGS, rows(), d_in=D_IN, log_dir=folder, checkpoint_dir=folder / "c", log=log, progress=False)
    trainer.fit(resume=resume)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_curves(folder: Path) -> None:
    """TensorBoard shows what metrics.jsonl holds: each number once, in float32."""
    lines = lines_of(folder)
    names = {line["sae"] for line in lines}
    assert {path.name for path in (folder / "tensorboard").iterdir()} == names
    for name in names:
        events = EventAccumulator(str(folder / "tensorboard" / name), size_guidance={"scalars": 0}).Reload()
        mine = [line for line in lines if line["sae"] == name]
        assert set(events.Tags()["scalars"]) == set().union(*mine) - {"sae", "step"}
        for key in ("loss", "fvu", "l0", "dead_share", "tokens"):
            shown = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(key)]
            assert [(line["step"], line[key]) for line in mine] == shown


def test_tensorboard_shows_the_log(tmp_path):
    fit(tmp_path / "plain", ())
    fit(tmp_path / "shown", ("tensorboard",))
    assert_curves(tmp_path / "shown")
    assert (tmp_path / "plain" / "metrics.jsonl").read_bytes() == (tmp_path / "shown" / "metrics.jsonl").read_bytes()
    assert not (tmp_path / "plain" / "tensorboard").exists()


def test_a_resumed_run_goes_on_with_its_curves(tmp_path):
    """Steps that were taken after the checkpoint, and are taken again, are shown once."""
    with pytest.raises(TrainingInterrupted):
        fit(tmp_path, ("tensorboard",), stop=True)
    late = TensorBoard(tmp_path, {line["sae"]: {} for line in lines_of(tmp_path)}, 80)
    for name in late.writers:
        late.write(name, 99, {"loss": 9.0, "fvu": 9.0})  # as of a run that was killed after its checkpoint
    late.close()
    fit(tmp_path, ("tensorboard",), resume=True)
    assert_curves(tmp_path)


def test_unknown_and_missing_loggers_are_refused_before_training(tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="'tensorbord' is no logger; expected tensorboard or wandb"):
        fit(tmp_path / "run", ("tensorbord",))
    monkeypatch.setitem(LOGGERS, "not_installed", TensorBoard)
    with pytest.raises(ArgumentError, match=r"pip install 'saehook\[not_installed\]'"):
        fit(tmp_path / "run", ("not_installed",))
    (tmp_path / "not_installed").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ArgumentError, match="needs a package"):
        check_loggers(["not_installed"])
    with pytest.raises(ArgumentError, match="needs a folder"):
        Trainer(CONFIGS, [], d_in=D_IN, log=["tensorboard"])
    assert not (tmp_path / "run").exists()


def test_a_logger_that_fails_is_said_once_and_left_out(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="tensorboard failed, and training goes on without it") as said:
        fit(tmp_path, ("tensorboard",))
    assert len(said) == 1
    assert len(lines_of(tmp_path)) > 4


def wandb_history(file: Path) -> Iterator[dict[str, Any]]:
    """What a run logged, from its file: after 7 bytes a log as LevelDB writes it, of messages."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(message)
            yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            message = b""


@pytest.mark.slow
def test_wandb_gets_the_log_and_keeps_its_ids(tmp_path, monkeypatch):
    """The real package, offline: what it recorded is read back from its file."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(TrainingInterrupted):
        fit(tmp_path, ("wandb",), stop=True)
    ids = json.loads((tmp_path / WANDB_IDS).read_text())
    fit(tmp_path, ("wandb",), resume=True)
    assert json.loads((tmp_path / WANDB_IDS).read_text()) == ids
    assert len(set(ids.values())) == len(CONFIGS)
    shown: dict[str, dict[int, float]] = {}
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for values in wandb_history(file):
            if "fvu" in values:
                shown.setdefault(file.stem.removeprefix("run-"), {})[values["_step"]] = values["fvu"]
    for name, run_id in ids.items():
        assert shown[run_id] == {line["step"]: line["fvu"] for line in lines_of(tmp_path) if line["sae"] == name}


@pytest.mark.slow
def test_wandb_that_cannot_start_does_not_stop_training(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "no/such:name")
    with pytest.warns(UserWarning, match="wandb failed, and training goes on without it") as said:
        fit(tmp_path, ("wandb",))
    assert len(said) == 1
    assert len(lines_of(tmp_path)) > 4


def test_no_logger_costs_nothing():
    with warnings.catch_warnings():
        loggers = Loggers((), None, {}, 0)
        loggers.write([{"sae": "a", "step": 1, "fvu": 0.5}])
        loggers.close()
    assert not loggers.open
