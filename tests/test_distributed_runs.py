"""Whole runs in several processes, as a user starts them: the same files as one process, and how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_lm, byte_tokenizer
from safetensors.torch import load_file
from test_training_run import documents

from saehook import run_state

COMMAND = (
    "train --site layers.1.resid_post --activation topk --k 4 --d-sae 97 --batch-tokens 130 --calibration-tokens 1000 "
    "--buffer-tokens 4000"
).split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build_lm("llama").save_pretrained(folder / "lm")
    byte_tokenizer().save_pretrained(folder / "lm")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents(400)))
    return folder


def arguments(corpus: Path, out: Path, *more: str) -> list[str]:
    text = str(corpus / "text.jsonl")
    return [*COMMAND, "--lm", str(corpus / "lm"), "--text", text, "--eval-text", text, "--out", str(out), *more]


def environment(**more: str) -> dict[str, str]:
    known = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | known | more


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


class World:
    """So many `saehook` processes that a script of one's own has started; what each says in a file."""

    def __init__(self, folder: Path, n: int, command: Callable[[int], list[str]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"said-{rank}" for rank in range(n)]
        shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self.processes = []
        for rank, log in enumerate(self.logs):
            own = environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank))
            with log.open("w") as file:
                line = [sys.executable, "-m", "saehook", *command(rank)]
                self.processes.append(subprocess.Popen(line, env=own, stdout=file, stderr=file))

    @property
    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def wait_for(self, condition: Callable[[], Any], seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.02)

    def codes(self, seconds: float = 600) -> list[int]:
        try:
            return [process.wait(timeout=seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()


def run(*command: str, code: int = 0) -> str:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def assert_same_sae(ours: Path, theirs: Path) -> None:
    a, b = (load_file(folder / "layers.1.resid_post" / "sae_weights.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-3, atol=1e-4, msg=name)
    configs = [json.loads((folder / "layers.1.resid_post" / "cfg.json").read_text()) for folder in (ours, theirs)]
    for config in configs:
        assert config["metadata"]["saehook"]["text"]["windows_read"] > 0
    first, second = (config["metadata"]["saehook"] for config in configs)
    for key in ("training", "text", "mask_rule", "tokens_seen", "lm"):
        assert first[key] == second[key], key
    results = [json.loads((folder / "eval.json").read_text())["results"][0] for folder in (ours, theirs)]
    assert results[0]["fvu"] == pytest.approx(results[1]["fvu"], rel=1e-3)


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed_and_accelerate_is_data_parallel(corpus, tmp_path):
    """kill -9 of one of two processes: torchrun starts both again, and they go on from the checkpoint. The SAE is that of
    one process, as is that of accelerate's processes."""
    one, latent, data = (tmp_path / name for name in ("one", "latent", "data"))
    budget = ["--tokens", "26k", "--eval-tokens", "2k"]
    run(sys.executable, "-m", "saehook", *arguments(corpus, one, *budget))
    launch = "torch.distributed.run --nproc-per-node 2 --max-restarts 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0".split()
    more = [*budget, "--mesh", "latent=2", "--checkpoint-seconds", "0.2", "--mesh-timeout", "60"]
    log = tmp_path / "said"
    with log.open("w") as file:
        line = [sys.executable, "-m", *launch, "-m", "saehook", *arguments(corpus, latent, *more)]
        agent = subprocess.Popen(line, env=environment(), stdout=file, stderr=file)
    end = time.monotonic() + 600
    while not run_state.checkpoints(latent / "checkpoints"):
        assert agent.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert agent.wait(timeout=600) == 0, log.read_text()
    assert len(re.findall("does not answer any more|lost contact", log.read_text())) <= 1
    assert_same_sae(latent, one)
    # --multi_gpu is how it starts processes; with --cpu it would want MPI.
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch += f" --main_process_port {free_port()}"
    command = [*arguments(corpus, data, *budget), "--mesh", "data=2"]  # refused, were there but one
    run(sys.executable, "-m", *launch.split(), "-m", "saehook", *command)
    assert_same_sae(data, one)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_process_that_is_gone_ends_all(corpus, tmp_path, number):
    """Killed, or hanging: the others end with one message, and the last checkpoint is whole."""
    out = tmp_path / "run"
    more = ["--tokens", "2M", "--repeat", "--eval-tokens", "0", "--checkpoint-seconds", "0.2"]
    command = arguments(corpus, out, *more, "--mesh", "latent=2", "--mesh-timeout", "15")
    world = World(tmp_path, 2, lambda rank: command)
    world.wait_for(lambda: run_state.checkpoints(out / "checkpoints"))
    gone = 1 if number == signal.SIGSTOP else 0  # the first keeps the store, and is missed most
    world.processes[gone].send_signal(number)
    began = time.monotonic()
    assert world.processes[1 - gone].wait(timeout=300) == 2, world.said
    took = time.monotonic() - began
    world.processes[gone].kill()
    world.processes[gone].wait()
    assert took < 200, took
    said = world.said[1 - gone]
    assert said.count("saehook train:") == 1, said
    assert re.search(f"rank {gone} of 2 processes does not answer|lost contact", said), said
    assert "Traceback" not in said, said
    _, data, _ = run_state.load_state(out / "checkpoints")
    assert data["steps"] > 0


@pytest.mark.slow
def test_bad_input_is_one_message(corpus, tmp_path):
    """Of the main process, with an exit code of its own, before anything is trained."""
    other = tmp_path / "other.jsonl"
    other.write_text((corpus / "text.jsonl").read_text().replace("cat", "cow"))
    budget = ["--tokens", "26k", "--eval-tokens", "0", "--mesh-timeout", "60"]
    plain = arguments(corpus, tmp_path / "run", *budget)
    texts = [[str(other) if part.endswith("text.jsonl") else part for part in plain], plain]
    cases: list[tuple[Callable[[int], list[str]], str]] = [
        (lambda rank: [*plain, "--mesh", "latent=3"], "there are 2 processes"),
        (lambda rank: [*plain, "--mesh", "latent=2", "--d-sae", "3", "--k", "2"], "cannot be shared by 2 devices"),
        (lambda rank: [*plain, "--mesh", ("latent=2", "data=2")[rank]], "differ in mesh"),
        (lambda rank: [*plain, "--mesh", "latent=2", "--k", str(4 + rank)], "differ in settings"),
        (lambda rank: [*texts[rank], "--mesh", "latent=2"], "differ in text"),
    ]
    for command, expected in cases:
        world = World(tmp_path / "said", 2, command)
        assert world.codes() == [2, 2], world.said
        assert expected in world.said[0], world.said
        assert world.said[0].count("saehook train:") == 1
        assert "Traceback" not in "".join(world.said)
        assert "saehook train:" not in world.said[1], world.said
    alone = run(sys.executable, "-m", "saehook", *plain, "--mesh", "latent=2", code=2)
    assert "was started alone" in alone
    assert "torchrun --nproc-per-node 2" in alone
    unplaced = environment(WORLD_SIZE="2")
    line = [sys.executable, "-m", "saehook", *plain, "--mesh", "latent=2"]
    done = subprocess.run(line, env=unplaced, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert re.search("RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT of the environment are not set", done.stderr), (
        done.stderr
    )
