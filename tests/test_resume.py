"""Checkpoints: a run that was stopped and resumed has the bits of one that was not."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_lm, byte_tokenizer
from planted import D_IN, SITE, planted
from torch import Tensor

from saehook import run_state
from saehook.config import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK, TrainConfig
from saehook.corpus import Document
from saehook.errors import ArgumentError, FileError, FormatError, TrainingError, TrainingInterrupted
from saehook.harvest import Shuffled, TextStream, activations_of
from saehook.hooked_model import HookedModel
from saehook.sae import SAE
from saehook.trainer import Trainer

LM_SITES = ("layers.1.resid_post", "layers.2.mlp_out")


def config(activation: Any = None, site: str = SITE, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"d_sae": 64, "tokens": 12_800, "batch_tokens": 128, "calibration_tokens": 500}
    return TrainConfig(site=site, activation=activation or BatchTopK(k=3), **settings | changes)


CONFIGS = [
    config(dead_after_tokens=400, lr=1e-2),
    config(TopK(k=3), ema_decay=0.9, k_anneal_steps=30),
    config(JumpReLU(), target_l0=3.0),
    config(ReLU(), target_l0=3.0, seed=4),
    config(ReLU(), sparsity_coefficient=0.01, decoder_norm_penalty=True),
    config(Gated(), target_l0=3.0),
    config(Matryoshka(k=3, fractions=(0.5, 0.5))),
]


class Interrupting(Iterator[Tensor]):
    """Rows of made-up activations; stops a trainer when so many rows have been given out."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.rows = iter(planted(14_000)[0].split(100))
        self.stop_at = stop_at
        self.given = 0
        self.trainer: Trainer | None = None

    def __next__(self) -> Tensor:
        self.given += 100
        if self.stop_at is not None and self.given >= self.stop_at:
            assert self.trainer is not None
            self.trainer.stop()
        return next(self.rows)


def trainer_on(
    folder: Path, stop_at: int | None = None, configs: list[TrainConfig] = CONFIGS, **options: Any
) -> Trainer:
    rows = Interrupting(stop_at)
    rows.trainer = Trainer(
        configs, rows, d_in=D_IN, log_dir=folder, checkpoint_dir=folder / "c", progress=False, **options
    )
    return rows.trainer


def assert_same(ours: list[SAE], theirs: list[SAE]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.metadata == other.metadata
        for name, tensor in one.named_parameters():
            assert torch.equal(tensor, other.get_parameter(name)), name
        assert one.stats is not None
        assert other.stats is not None
        for name, fact in vars(one.stats).items():
            assert name == "tokens" or torch.equal(fact, getattr(other.stats, name)), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[list[SAE], str]:
    folder = tmp_path_factory.mktemp("whole")
    saes = trainer_on(folder, checkpoint_seconds=0.0).fit()
    return saes, (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("stop_at", [[8400], [9000, 11_000, 11_100], [12_700, 13_000]])
def test_any_iterator_goes_on_where_it_was(uninterrupted, tmp_path, stop_at):
    """All methods at once, on plain tensors: they are read again up to the place where training stopped."""
    for i, where in enumerate(stop_at):
        match = "can be resumed from" if where <= 12_800 else "all steps were taken.*resume it"
        with pytest.raises(TrainingInterrupted, match=match):
            trainer_on(tmp_path, where).fit(resume=i > 0)
    saes = trainer_on(tmp_path).fit(resume=True)
    assert_same(saes, uninterrupted[0])
    assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted[1]


def test_an_older_checkpoint_is_used_where_the_newest_is_damaged(uninterrupted, tmp_path):
    with pytest.raises(TrainingInterrupted):
        trainer_on(tmp_path, 11_000, checkpoint_seconds=0.0).fit()
    found = run_state.checkpoints(tmp_path / "c")
    assert len(found) == run_state.KEPT
    file = found[-1] / run_state.TENSORS
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged and is passed over"):
        saes = trainer_on(tmp_path).fit(resume=True)
    assert_same(saes, uninterrupted[0])
    assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted[1]


@pytest.mark.parametrize("damage", ["cut", "no data", "no json", "other schema", "empty"])
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    run_state.save_state(tmp_path, 7, {"a": torch.arange(5)}, {"x": 1})
    tensors, data, path = run_state.load_state(tmp_path)
    assert torch.equal(tensors["a"], torch.arange(5))
    assert data["x"] == 1
    if damage == "cut":
        (path / run_state.TENSORS).write_bytes((path / run_state.TENSORS).read_bytes()[:-3])
    elif damage == "no data":
        (path / run_state.DATA).unlink()
    elif damage == "no json":
        (path / run_state.DATA).write_text("{")
    elif damage == "other schema":
        (path / run_state.DATA).write_text(json.dumps({**data, "schema": 99}))
    else:
        (path / run_state.DATA).write_text("[]")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(FormatError, match="every checkpoint"):
        run_state.load_state(tmp_path)


def test_half_written_checkpoints_are_not_seen(tmp_path):
    (tmp_path / "partial-123").mkdir()
    with pytest.raises(FileError, match="no checkpoint"):
        run_state.load_state(tmp_path)


def test_other_settings_are_refused(tmp_path):
    with pytest.raises(TrainingInterrupted):
        trainer_on(tmp_path, 9000, [config()]).fit()
    for other in ([config(lr=1e-3)], [config(TopK(k=3))], [config(), config(seed=1)], [config(d_sae=32)]):
        with pytest.raises(ArgumentError, match="configured otherwise"):
            trainer_on(tmp_path, configs=other).fit(resume=True)
    with pytest.raises(ArgumentError, match="checkpoint_dir"):
        Trainer([config()], Interrupting(), d_in=D_IN).fit(resume=True)


def test_a_stream_that_has_become_shorter_is_said(tmp_path):
    with pytest.raises(TrainingInterrupted):
        trainer_on(tmp_path, 11_000, [config()]).fit()
    short = Trainer([config()], planted(5000)[0].split(100), d_in=D_IN, checkpoint_dir=tmp_path / "c", progress=False)
    with pytest.raises(TrainingError, match="end before the place"):
        short.fit(resume=True)


def test_stop_without_a_place_for_checkpoints(tmp_path):
    rows = Interrupting(9000)
    rows.trainer = Trainer([config()], rows, d_in=D_IN, progress=False)
    with pytest.raises(TrainingInterrupted, match="nothing is saved"):
        rows.trainer.fit()


@pytest.mark.parametrize("what", ["activation", "loss", "gradient"])
def test_bad_numbers_change_nothing_and_leave_the_last_checkpoint(tmp_path, what):
    """The first bad step is named; weights, counters and averages stay those before it, whatever came after."""
    x = planted(14_000)[0]
    at = 9100  # step 72
    if what == "activation":
        x[at, 3] = float("inf")
    trainer = Trainer(
        [config(ema_decay=0.9)],
        iter(x.split(100)),
        d_in=D_IN,
        log_dir=tmp_path,
        checkpoint_dir=tmp_path / "c",
        checkpoint_seconds=0.0,
        progress=False,
    )
    poisoned: list[Any] = []

    def poison(grad: Tensor) -> Tensor:
        return grad * (float("nan") if trainer.steps == 71 else 1)

    original = Trainer._make_runs

    def with_poison(self: Trainer, facts: Any) -> Any:
        runs = original(self, facts)
        if what == "gradient":
            poisoned.append(runs[0].sae.b_enc.register_hook(poison))
        if what == "loss":
            runs[0].facts.variance.mul_(1)
            terms = runs[0].method.terms
            runs[0].method.terms = lambda x, y, step, scratch=None: (  # type: ignore[method-assign]
                (t := terms(x, y, step, scratch))._replace(loss=t.loss * (float("inf") if step == 71 else 1))
            )
        return runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_make_runs", with_poison)
        with pytest.raises(TrainingError, match=f"{what}.* not finite in step 72 of .*{SITE}"):
            trainer.fit()
    tensors, data, folder = run_state.load_state(tmp_path / "c")
    assert data["steps"] == 71, "the last checkpoint is that before the bad step"
    run = trainer.runs[0]
    for name, tensor in run.state()[0].items():
        if name.startswith(("parameters", "optimizer", "averages", "run.tokens", "run.threshold")):
            assert torch.equal(tensor, tensors[f"runs.0.{name}"]), name


# --- with a language model --------------------------------------------------------------------------------------------


def documents(n: int) -> list[Document]:
    words = "the a red blue cat dog sees runs to from house tree and or with under".split()
    draw = torch.Generator().manual_seed(0)
    return [
        Document(f"d{i}", " ".join(words[j] for j in torch.randint(len(words), (60,), generator=draw)) + ".")
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def model():
    return HookedModel(build_lm("llama"), byte_tokenizer())


@pytest.mark.parametrize("repeat", [False, True])
def test_text_and_buffer_go_on_where_they_were(model, repeat):
    """The state of a stream at any place gives the batches that would have come."""

    def stream() -> Shuffled:
        text = TextStream(documents(20 if repeat else 60), model.tokenizer, 32, repeat=repeat, seed=5)
        chunks = activations_of(model, LM_SITES, text)
        return Shuffled(chunks, buffer_tokens=2000, batch_tokens=150, seed=5, text=text)

    whole = stream()
    batches = []
    for _ in range(70):
        if (batch := next(whole, None)) is None:
            break
        batches.append(batch)
    assert len(batches) > 60
    if not repeat:
        assert next(whole, None) is None or len(batches) == 70
    for stop in (0, 1, 6, 7, 30, len(batches) - 1):
        before, after = stream(), stream()
        for _ in range(stop):
            next(before)
        state = before.state()
        assert state is not None
        tensors, data = state
        after.load_state({k: x.clone() for k, x in tensors.items()}, json.loads(json.dumps(data)), "cpu")
        for expected in batches[stop:]:
            got = next(after)
            for site in LM_SITES:
                assert torch.equal(got[site], expected[site])
        if not repeat and len(batches) < 70:
            assert next(after, None) is None
        assert isinstance(after.text, TextStream)
        assert isinstance(whole.text, TextStream)
        assert after.text.served == whole.text.served


def test_other_text_is_refused(model):
    text = TextStream(documents(5), model.tokenizer, 32)
    next(text)
    with pytest.raises(ArgumentError, match="the text has changed"):
        TextStream(documents(6), model.tokenizer, 32).load_state(text.state())


# --- real processes ---------------------------------------------------------------------------------------------------

COMMAND = (
    "train --site layers.1.resid_post layers.2.mlp_out --activation topk --k 4 --d-sae 96 --tokens 60k --batch-tokens 128 "
    "--calibration-tokens 1000 --buffer-tokens 4000 --eval-tokens 2k --checkpoint-seconds {seconds}"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A saved tiny model and text for the command line."""
    folder = tmp_path_factory.mktemp("corpus")
    build_lm("llama").save_pretrained(folder / "lm")
    byte_tokenizer().save_pretrained(folder / "lm")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents(400)))
    return folder


class Process:
    """A `saehook` command in a process of its own, what it says in a file."""

    def __init__(self, log: Path, *arguments: str, before: Any = None) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "saehook", *arguments],
                env=environment,
                stdout=file,
                stderr=file,
                preexec_fn=before,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition: Any, seconds: float = 200) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.02)

    def end(self, code: int = 0) -> None:
        assert self.process.wait(timeout=400) == code, self.said


def started(corpus: Path, out: Path, seconds: float, before: Any = None) -> Process:
    arguments = COMMAND.format(seconds=seconds).split()
    text = str(corpus / "text.jsonl")
    arguments += ["--lm", str(corpus / "lm"), "--text", text, "--eval-text", text, "--out", str(out)]
    return Process(out.parent / "log", *arguments, before=before)


def files_of(out: Path) -> dict[str, Any]:
    """What a run leaves that must not depend on interruptions: bytes, and the data of the configs."""
    kept: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".safetensors" or path.name == "metrics.jsonl":
            kept[name] = path.read_bytes()
        elif path.name == "cfg.json":
            kept[name] = json.loads(path.read_text())
    return kept


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("finished") / "run"
    started(corpus, out, 600).end()
    assert not (out / "checkpoints").exists()
    return files_of(out)


@pytest.mark.slow
def test_killed_again_and_again(corpus, finished, tmp_path):
    """kill -9 at random moments; every resumed run goes on from the last checkpoint. The files are the same bytes."""
    out = tmp_path / "run"
    draw = torch.Generator().manual_seed(int(time.time()))
    process = started(corpus, out, 0.2)
    for _ in range(3):
        process.wait_for(lambda: run_state.checkpoints(out / "checkpoints"))
        time.sleep(float(torch.rand((), generator=draw)) * 1.5)
        process.process.kill()
        process.process.wait()
        process = Process(tmp_path / "log", "train", "--resume", str(out))
    process.end()
    got = files_of(out)
    assert got.keys() == finished.keys()
    for name in finished:
        assert got[name] == finished[name], name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_say_where(corpus, finished, tmp_path, number):
    out = tmp_path / "run"
    process = started(corpus, out, 600)
    process.wait_for((out / "metrics.jsonl").exists)
    process.process.send_signal(number)
    process.end(130)
    assert f"can be resumed from {out / 'checkpoints'}" in process.said
    again = started(corpus, out, 600)
    again.end(2)
    assert "--resume" in again.said
    Process(tmp_path / "log", "train", "--resume", str(out)).end()
    assert files_of(out) == finished


@pytest.mark.slow
def test_a_full_disk_pauses_the_run(corpus, finished, tmp_path):
    """A file size limit stands for the full disk: the kernel refuses the write. It is lifted while the run waits."""
    out = tmp_path / "run"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    process = started(corpus, out, 0.3, before=limit)
    process.wait_for(lambda: "Training pauses" in process.said)
    assert not run_state.checkpoints(out / "checkpoints")
    assert not list((out / "checkpoints").iterdir()), "nothing of the checkpoint is left"
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    process.end()
    assert files_of(out) == finished


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    """/dev/full refuses every write; a checkpoint that cannot be written leaves no part of itself."""
    from saehook.metrics_log import append

    full = tmp_path / "metrics.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(FileError) as error, warnings.catch_warnings():
        append(full, "line\n")
    assert error.value.errno == errno.ENOSPC
