"""Several processes with gloo against one device, in float64 to 1e-12; weights after the first step to 1e-10."""

from __future__ import annotations

import importlib.util
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    CONFIGS,
    CURVES,
    bytes_sent,
    every_saving,
    goes_wrong,
    part_of_a_curve,
    selects,
    steps,
    ties,
    train,
    two_shards,
)
from sharded_cases import edits_alike, works_alike
from simulated_mesh import simulated_step
from worlds import here, in_world

from saehook.config import TopK, TrainConfig
from saehook.distributed.mesh import read_mesh, shares, stripes
from saehook.distributed.selection import BUTTERFLY_FROM
from saehook.distributed.session import _of_this_start
from saehook.distributed.state import latent_axis
from saehook.errors import ArgumentError, TrainingError
from saehook.initial_rows import ROWS_AT_ONCE, SEEDED_FROM, unit_rows
from saehook.plan import DEVICES, STORAGES, Layout, Plan, Training

BENCH = Path(__file__).parent / "bench"
MESHES = [(1, 2), (2, 1), (1, 3), (2, 2), (1, 4)]


def test_one_process_is_the_same_path():
    """A world of one: selection with ties, one step on whole numbers, four steps of every method."""
    assert here(selects, 1, 1) > 0
    here(ties, 1, 1)
    here(steps, 1, 1, tuple(CONFIGS), 4)


def test_two_processes_are_one_device(tmp_path):
    """The methods that the project promises, on two shards: k above a shard, planted ties, latents that never fire; some latents
    at a time, and gradients row by row."""
    in_world(2, two_shards, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("data", "latent"), MESHES)
def test_any_mesh_is_one_device(tmp_path, data, latent):
    world = data * latent
    assert in_world(world, selects, data, latent) == [18] * world
    for nan, other in in_world(world, goes_wrong, data, latent):
        assert "activations were not finite in step 1" in nan
        assert "given different activations" in other
    losses = in_world(world, ties, data, latent)
    assert all(found == losses[0] for found in losses)
    curves = in_world(world, steps, data, latent, tuple(CONFIGS), 4)
    assert all(found == curves[0] for found in curves), "all processes see the same loss"
    in_world(world, every_saving, data, latent, str(tmp_path))


@pytest.mark.slow
def test_curves_go_on_with_another_number_of_processes(tmp_path):
    """60 steps on one device, and the same in pieces: 2 processes, 1 device, 3, 4, a world of 1, 2 x 2. Adam's moments,
    counters and thresholds are in the checkpoints; the losses agree to 12 digits."""
    whole = part_of_a_curve(None, 1, 1, str(tmp_path / "whole"), 0, 60)
    folder, found = str(tmp_path / "parts"), [[] for _ in CURVES]
    for first, (data, latent) in enumerate([(1, 2), (0, 0), (1, 3), (4, 1), (1, 1), (2, 2)]):
        arguments = (max(1, data), max(1, latent), folder, 10 * first, 10 * first + 10)
        if data == 0:
            part = part_of_a_curve(None, *arguments)
        elif data * latent == 1:
            part = here(part_of_a_curve, *arguments)
        else:
            part = in_world(data * latent, part_of_a_curve, *arguments)[0]
        for curve, more in zip(found, part, strict=True):
            curve += more
    for name, ours, theirs in zip(CURVES, found, whole, strict=True):
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a == pytest.approx(b, rel=1e-12), (name, step)


@pytest.mark.slow
def test_the_trainer_stops_and_goes_on_with_another_mesh(tmp_path):
    """Stopped by one of 2 processes, resumed by 3, put together on the main process; against one device."""
    said = in_world(2, train, 1, 2, str(tmp_path / "run"), False, 9000)
    assert said[0] == said[1]
    assert "can be resumed from" in said[0][0]
    resumed = in_world(3, train, 1, 3, str(tmp_path / "run"), True, None)
    assert resumed[1:] == [[], []]
    whole = here(train, 1, 1, str(tmp_path / "whole"), False, None)
    for (ours, says, stats, config), (theirs, said_there, stats_there, config_there) in zip(
        resumed[0], whole, strict=True
    ):
        assert config == config_there
        assert says.keys() == said_there.keys()
        assert says["training"] == said_there["training"]
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
        for name in ("density", "max_act", "mean_act", "mean_error"):
            torch.testing.assert_close(stats[name], stats_there[name], rtol=1e-3, atol=1e-4, msg=name)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())


def test_a_shared_sae_is_the_whole_one(tmp_path):
    """World of one: encoding, decoding, gradients, files of every rule; edits, splice, traces and evaluation in a model."""
    assert here(works_alike, 1, 1, str(tmp_path)) > 0
    here(edits_alike, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "latent"), [(1, 2), (2, 2)])
def test_an_sae_shared_by_processes_is_the_whole_one(tmp_path, data, latent):
    assert len(set(in_world(data * latent, works_alike, data, latent, str(tmp_path)))) == 1
    rows = in_world(data * latent, edits_alike, data, latent)
    assert all(row == rows[0] for row in rows), "all processes say the same"


# --- bytes on the wire -----------------------------------------------------------------------------------------------


D_IN, D_SAE, BATCH, K = 48, 4096, 64, 4
COUNTED = TrainConfig(
    site="s", activation=TopK(k=K), d_sae=D_SAE, tokens=100 * BATCH, batch_tokens=BATCH, auxk_coefficient=0.0
)


@pytest.mark.parametrize("latent", [2, 4, 8, 32, 512])
@pytest.mark.parametrize("data", [1, 2])
def test_bytes_on_the_wire(data, latent):
    """What is sent is what the arithmetic of `saehook plan` says, in float32, less the part that a ring leaves out."""
    sent, held = simulated_step(COUNTED, D_IN, data, latent)
    tokens, ring = BATCH // data, (latent - 1) / latent
    plan = Plan(
        Training(d_in=D_IN, d_sae=D_SAE, k=K, tokens=BATCH, batch_tokens=BATCH),
        Layout(DEVICES["H200"], data * latent, data),
        STORAGES[0],
    )
    assert sent["x_hat"] == 2 * 4 * tokens * D_IN * (latent - 1) // latent
    assert sent["x_hat"] == pytest.approx(2 * plan.activation_bytes * 2 / 3 * ring), "plan: x besides, in bf16"
    if latent < BUTTERFLY_FROM:
        assert sent["top-k"] == 4 * tokens * K * (latent - 1)
        assert sent["top-k"] == pytest.approx(plan.topk_gather_bytes * ring)
    else:
        merged = 4 * tokens * K * math.log2(latent)
        assert merged == plan.topk_butterfly_bytes / 2, "plan: values and latents"
        assert merged < sent["top-k"] <= merged + 8 * tokens + 4 * tokens * latent, "and how many are equal"
        assert sent["top-k"] < 4 * tokens * K * (latent - 1)
    own = 2 * D_IN * D_SAE // latent + D_SAE // latent + D_IN  # both matrices and the biases
    assert sent["gradients"] == 4 * own * 2 * (data - 1) // data
    assert held == pytest.approx(3 * 4 * own + 8 * D_SAE / latent, rel=0.05), "weights, moments, counters"
    assert sum(number for what, number in sent.items() if what not in ("x_hat", "top-k", "gradients")) < 4 * own


def test_the_recorded_table_is_what_the_code_sends():
    """Of tests/bench/RESULTS one number of devices is counted again."""
    spec = importlib.util.spec_from_file_location("bench_distributed", BENCH / "bench_distributed.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    recorded = json.loads((BENCH / "RESULTS" / "distributed_bytes_2026-11.json").read_text())["rows"]
    assert [row["devices"] for row in recorded] == [size for size in bench.SIZES for _ in range(2)]
    assert json.loads(json.dumps(bench.rows([256]))) == [row for row in recorded if row["devices"] == 256]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "latent"), [(1, 2), (2, 2)])
def test_real_processes_send_what_the_simulated_one_does(data, latent):
    simulated, _ = simulated_step(COUNTED, D_IN, data, latent)
    for sent in in_world(data * latent, bytes_sent, data, latent, COUNTED, D_IN):
        assert sent == dict(simulated)


# --- what needs no other process -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_sae", "width"), [(100, 7), (ROWS_AT_ONCE + 1, 3), (3 * ROWS_AT_ONCE, 2), (5, 1)])
def test_any_rows_can_be_drawn_alone(d_sae, width):
    """The rows of shards are those of the whole, and the whole is one draw, as it always was."""
    whole = unit_rows(d_sae, width, torch.Generator().manual_seed(3))
    drawn = torch.randn(d_sae, width, generator=torch.Generator().manual_seed(3))
    assert torch.equal(whole, torch.nn.functional.normalize(drawn, dim=-1))
    for parts in (1, 2, 3):
        generators = [torch.Generator().manual_seed(3) for _ in range(parts)]
        rows = [unit_rows(d_sae, width, g, s) for g, s in zip(generators, shares(d_sae, parts), strict=True)]
        assert torch.equal(torch.cat(rows), whole)
        after = [torch.rand((), generator=generator) for generator in generators]
        assert len({float(x) for x in after}) == 1, "all generators stand at one place"


def test_many_rows_have_seeds_of_their_own():
    d_sae, generators = SEEDED_FROM + 5, [torch.Generator().manual_seed(1) for _ in range(3)]
    few = unit_rows(d_sae, 1, generators[0], slice(d_sae - 10, d_sae))
    other = unit_rows(d_sae, 1, generators[1], slice(ROWS_AT_ONCE - 3, ROWS_AT_ONCE + 3))
    whole = unit_rows(d_sae, 1, generators[2])
    assert torch.equal(whole[-10:], few)
    assert torch.equal(whole[ROWS_AT_ONCE - 3 : ROWS_AT_ONCE + 3], other)
    assert len({generator.initial_seed() for generator in generators}) == 1


@pytest.mark.parametrize(
    ("text", "world", "expected"),
    [
        ("latent=2", 2, (1, 2)),
        ("latent=2", 8, (4, 2)),
        ("data=4,latent=2", 8, (4, 2)),
        (None, 4, (4, 1)),
        ("data=3", 3, (3, 1)),
    ],
)
def test_meshes_are_read(text, world, expected):
    assert read_mesh(text, world) == expected


@pytest.mark.parametrize(
    ("text", "world", "match"),
    [
        ("latent=3", 4, "places, and there are 4 processes"),
        ("data=2,latent=2", 2, "has 4 places, and there are 2"),
        ("data=2,latent=2,data=1", 4, "is no mesh"),
        ("rows=2", 2, "is no mesh"),
        ("latent=0", 1, "is no mesh"),
        ("", 1, "is no mesh"),
    ],
)
def test_meshes_that_cannot_be_are_refused(text, world, match):
    with pytest.raises(ArgumentError, match=match):
        read_mesh(text, world)


def test_every_device_has_a_share_of_each_group():
    for ends, parts in (((12, 25, 38), 3), ((1, 2, 3, 4), 2), ((38,), 4), ((5, 5, 9), 2)):
        found = [stripes(ends, parts, part) for part in range(parts)]
        every = [i for runs in found for run in runs for i in range(run.start, run.stop)]
        assert sorted(every) == list(range(ends[-1]))
        for start, end in zip((0, *ends), ends, strict=False):
            sizes = [sum(start <= i < end for run in runs for i in range(run.start, run.stop)) for runs in found]
            assert max(sizes) - min(sizes) <= 1
        if len(ends) == 1:
            assert [run for runs in found for run in runs] == shares(ends[0], parts)
    sizes = [sum(run.stop - run.start for run in stripes((1, 2, 3, 4), 2, part)) for part in range(2)]
    assert sizes == [2, 2], "what does not divide goes to each in turn"


def test_shares_are_as_equal_as_may_be():
    for n, parts in ((10, 3), (7, 7), (100, 8), (2, 4)):
        found = shares(n, parts)
        assert [i for part in found for i in range(part.start, part.stop)] == list(range(n))
        sizes = {part.stop - part.start for part in found}
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == math.ceil(n / parts)


def test_what_of_a_checkpoint_goes_over_latents():
    names = {
        "runs.0.parameters.W_enc": 1, "runs.12.averages.W_dec": 0, "runs.0.optimizer.W_enc.exp_avg": 0,
        "runs.0.optimizer.W_enc.step": None, "runs.0.optimizer.b_dec.exp_avg": None, "runs.0.parameters.W_skip": None,
        "runs.0.run.tokens_since_fired": 0, "runs.0.run.threshold": None, "runs.0.sums.loss": None,
        "runs.0.method.coefficient": None, "source.buffer.x": None, "facts.center.layers.0": None,
        "runs.0.run.dead": None, "runs.0.parameters.threshold": 0,
    }  # fmt: skip
    assert {name: latent_axis(name) for name in names} == names


def test_processes_of_one_start_meet_in_a_part_of_the_store_of_their_own():
    """Three times in one store: a restart reads no key of the processes before, and a missing process is named."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    for attempt, ranks in enumerate([(0, 1, 2), (2, 1, 0), (0, 1)]):
        found: dict[int, Any] = {}

        def meet(rank: int, seconds: float, found: dict[int, Any] = found, ranks: tuple[int, ...] = ranks) -> None:
            try:
                part = _of_this_start(store, rank, 3, seconds)
                found[rank] = not part.check([f"{rank}"])
                part.set(f"{rank}", "here")
                if len(ranks) == 3:
                    part.wait([f"{other}" for other in ranks])
            except TrainingError as error:
                found[rank] = str(error)

        threads = [threading.Thread(target=meet, args=(rank, 60.0 if attempt < 2 else 1.0)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if attempt < 2:
            assert found == {0: True, 1: True, 2: True}
        else:
            assert "rank 2 did not come" in found[0]
