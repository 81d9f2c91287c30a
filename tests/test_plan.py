"""The arithmetic of a run, against figures that were worked out by hand, and by formulas of another shape."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from decimal import Decimal
from typing import Any

import pytest
from builders import build_lm

from saehook.cli import main
from saehook.config import TopK, TrainConfig
from saehook.errors import ArgumentError, FileError, FormatError
from saehook.plan import DEVICES, STORAGES, Layout, Plan, Storage, Training, best_plan, devices_of, plans, width_of
from saehook.rounding import BLOCK

HEADLINE = Training(d_in=12288, d_sae=2**24, k=32, tokens=40_000_000_000)
H200 = DEVICES["H200"]
# devices: latents each, GB of 14 / 10 / 4 bytes a parameter, dense gradient, whole pre-activations, product s,
# Adam ms of 28 / 10 bytes, top-k GB gathered / merged, gradients with two replicas GB, days, cached GB/s
TABLE = {
    8: "2.1e6 722 515 206 103 550 11.3 361 129 0.13 0.10 206 40 0.3",
    16: "1.05e6 361 258 103 52 275 5.6 180 64 0.27 0.13 103 20 0.6",
    64: "262e3 90 64 26 13 69 1.41 45 16 1.07 0.20 26 5.0 2.3",
    512: "32.8e3 11 8 3.2 1.6 8.6 0.176 6 2 8.6 0.30 3.2 0.62 18",
}


@pytest.mark.parametrize("devices", TABLE)
def test_the_table_of_a_run_with_16_million_latents(devices):
    """To half a unit of the last place that is written. 14 bytes a parameter are of trainers with a master copy of bf16 weights;
    ours keeps float32 itself."""
    _, rounded, _, small = plans(HEADLINE, Layout(H200, devices))
    full = Plan(HEADLINE, Layout(H200, devices), Storage("bf16, float32 master and moments", 14, 28))
    replicated = Plan(HEADLINE, Layout(H200, devices, 2), full.storage)
    found = (
        full.latents, full.state / 1e9, rounded.state / 1e9, small.state / 1e9, full.dense_gradient / 1e9,
        full.whole_pre_acts / 1e9, full.product_seconds, 1e3 * full.optimiser_seconds, 1e3 * small.optimiser_seconds,
        full.topk_gather_bytes / 1e9, full.topk_butterfly_bytes / 1e9, replicated.gradient_bytes / 1e9, full.days,
        full.read_rate / 1e9,
    )  # fmt: skip
    for got, expected in zip(found, map(Decimal, TABLE[devices].split()), strict=True):
        place = expected.as_tuple().exponent
        assert isinstance(place, int)
        assert got == pytest.approx(float(expected), abs=0.5 * 10.0**place, rel=0)
    assert full.activation_bytes == pytest.approx(9.7e9, rel=0.01)
    assert 1e3 * full.activation_bytes / H200.link == pytest.approx(21, abs=0.6)
    assert 1e3 * full.activation_bytes / H200.network == pytest.approx(24, abs=0.6)
    assert full.binds == "encoder product"
    assert full.days < full.days_in_turn < 1.6 * full.days


def test_totals_of_that_run():
    assert HEADLINE.parameters == pytest.approx(412e9, rel=0.001)
    assert HEADLINE.steps == 305_176
    assert HEADLINE.product_flops == pytest.approx(5.4e16, rel=0.001)
    assert HEADLINE.sparse_flops == pytest.approx(5e11, rel=0.04)
    assert HEADLINE.flops == pytest.approx(1.65e22, rel=0.001)
    assert HEADLINE.cached_bytes == pytest.approx(983e12, rel=0.001)
    with_auxk = Training(d_in=12288, d_sae=2**24, k=32, k_aux=512, tokens=40_000_000_000)
    assert with_auxk.sparse_flops - HEADLINE.sparse_flops == pytest.approx(8e12, rel=0.04)
    # 3 · flops / bandwidth of the network: below that many latents a device, the wire binds.
    assert Plan(HEADLINE, Layout(H200, 64), STORAGES[1]).least_latents == pytest.approx(4500)


def test_what_fits_and_what_would():
    fits = {n: [p.storage.bytes for p in plans(HEADLINE, Layout(H200, n)) if p.fits] for n in (8, 16, 64, 512)}
    assert fits == {8: [], 16: [4], 64: [16, 10, 6, 4], 512: [16, 10, 6, 4]}
    with pytest.raises(
        ArgumentError, match=r"do not fit 8 x H200: .*217 GB, and 128 GB.*fit: 16 devices, or d_sae"
    ) as no:
        best_plan(HEADLINE, Layout(H200, 8))
    largest = int(str(no.value).rsplit("at most ", 1)[1].rstrip(".").replace(",", ""))
    for d_sae, fitting in ((largest, True), (largest + 100, False)):
        smaller = Training(d_in=12288, d_sae=d_sae, k=32, tokens=1)
        assert plans(smaller, Layout(H200, 8))[-1].fits == fitting
    assert best_plan(HEADLINE, Layout(H200, 16)).storage.bytes == 4
    wide = Training(d_in=12288, d_sae=2**16, k=32, tokens=10**9, batch_tokens=10**8)
    with pytest.raises(ArgumentError, match="a batch of [0-9,]+ tokens") as no:
        best_plan(wide, Layout(H200, 8))
    batch = int(str(no.value).rsplit("a batch of ", 1)[1].split()[0].replace(",", ""))
    assert best_plan(Training(d_in=12288, d_sae=2**16, k=32, tokens=10**9, batch_tokens=batch), Layout(H200, 8)).fits


@pytest.mark.parametrize(
    ("d_sae", "batch", "devices", "best"), [(2**24, 2**17, 512, 1.7), (2**16, 2**13, 8, 0.9), (2**14, 2**16, 8, 5)]
)
def test_the_best_number_of_replicas_sends_least(d_sae, batch, devices, best):
    t = Training(d_in=768, d_sae=d_sae, k=32, tokens=10**9, batch_tokens=batch)
    plan = Plan(t, Layout(H200, devices), STORAGES[0])
    assert plan.best_data == pytest.approx(best, rel=0.05)
    sent = {}
    for data in (1, 2, 4, 8):
        other = Plan(t, Layout(H200, devices, data), STORAGES[0])
        # Of the replicas' gradients a device sends its shard's, twice around the ring.
        assert other.gradient_bytes == pytest.approx(2 * other.dense_gradient * (data - 1) / data)
        sent[data] = other.activation_bytes + other.gradient_bytes
    if devices == 8:
        del sent[8]  # nothing is sharded any more, so no activations are sent
    assert min(sent, key=lambda data: sent[data]) == min(sent, key=lambda data: abs(math.log(data / best)))


def test_small_saes_are_bound_by_the_wire():
    t = Training(d_in=768, d_sae=2**15, k=32, tokens=10**9)
    assert Plan(t, Layout(H200, 64), STORAGES[0]).binds == "network"
    assert Plan(t, Layout(H200, 1), STORAGES[0]).wire_bytes == 0


def test_storages_are_what_training_keeps():
    """The options are those of TrainConfig, and blocks those of the 8-bit codes."""
    for storage in STORAGES:
        options = dict(zip(storage.options.split()[::2], storage.options.split()[1::2], strict=True))
        given: dict[str, Any] = {name.removeprefix("--"): value for name, value in options.items()}
        config = TrainConfig(site="s", activation=TopK(k=1), d_sae=8, tokens=100, **given)
        kept = (4 if config.weights == "float32" else 2) + (8 if config.moments == "float32" else 2)
        assert storage.bytes == kept + 4 * (not config.by_rows), "and the gradient, where it is held"
        assert storage.blocks == (BLOCK if config.moments == "8-bit" else 0)


def test_devices_and_their_ceilings():
    ceilings, number = devices_of("64xH200", flops=7e14, per_node=4, memory=None)
    assert (number, ceilings.flops, ceilings.per_node, ceilings.memory) == (64, 7e14, 4, 128e9)
    assert devices_of("h100")[1] == 1
    own, _ = devices_of("2xMine", flops=1e12, memory=1e9, memory_bandwidth=1e9, link=1e9, network=1e9)
    assert own.name == "Mine"
    for wrong, said in (
        ("many", "what a many reaches is not known"),
        ("0xH200", "names no devices"),
        ("8 H200", "no devices"),
    ):
        with pytest.raises(ArgumentError, match=said):
            devices_of(wrong)
    with pytest.raises(ArgumentError, match="above 0"):
        devices_of("H200", flops=0)
    with pytest.raises(ArgumentError, match="divisor"):
        Layout(H200, 8, 3)


@pytest.mark.parametrize(("name", "value"), [("d_in", 0), ("k", 65), ("tokens", 1.5), ("k_aux", -1)])
def test_a_training_that_is_none(name, value):
    settings = {"d_in": 8, "d_sae": 64, "k": 4, "tokens": 100} | {name: value}
    with pytest.raises(ArgumentError, match=name.replace("_", ".")):
        Training(**settings)
    with pytest.raises(ArgumentError, match="fewer devices"):
        plans(Training(d_in=8, d_sae=4, k=1, tokens=1), Layout(H200, 8))


def test_the_command(tmp_path, capsys):
    build_lm("gpt2").save_pretrained(tmp_path)
    assert width_of(tmp_path) == 32
    command = "plan --d-in 12288 --d-sae 2**24 --k 32 --tokens 40B --devices 64xH200"
    assert main([*command.split(), "--json", str(tmp_path / "p.json")]) == 0
    said = capsys.readouterr().out
    for part in ("305,176 steps", "1.65e+22", "262,144 latents on each", "encoder product", "5.0 days", "983.04 TB"):
        assert part in said
    numbers = json.loads((tmp_path / "p.json").read_text())
    assert (numbers["steps"], numbers["binds"], numbers["storage"]["bytes"]) == (305_176, "encoder product", 16)
    assert main(f"plan --lm {tmp_path} --d-sae 1M --devices 8xH200 --data 2".split()) == 0
    assert "32 -> 1,000,000 latents" in capsys.readouterr().out
    assert main(["plan"]) == 0
    for wrong, status in (("--devices 8xH200 --d-in 12288 --d-sae 16M", "do not fit"), ("--lm nowhere", "give --d-in")):
        assert main(["plan", *wrong.split()]) == 2
        assert status in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="d_model"):
        width_of(tmp_path)
    with pytest.raises(FileError):
        width_of(tmp_path / "none")


def test_it_needs_nothing_but_the_standard_library():
    code = "import saehook.plan, saehook.commands.plan, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "transformers"} & set(loaded)
