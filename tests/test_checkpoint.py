"""SAE files: what comes back, and that no file whatsoever does anything but load or be refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ACTIVATIONS, tiny_sae
from safetensors.torch import load_file, save_file

from saehook.checkpoint import CONFIG, MAX_CONFIG_BYTES, STATS, WEIGHTS, load_sae, save_sae
from saehook.config import BatchTopK, JumpReLU, MaskRule, SAEConfig
from saehook.errors import ArgumentError, FileError, FormatError, MissingStatError, SaehookError
from saehook.files import atomic_write
from saehook.sae import QUANTILE_LEVELS, SAE

SITE = "layers.1.resid_post"
WEIGHT_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


def x(n: int = 20) -> torch.Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(7))


def written(path: Path, **options: Any) -> Path:
    return save_sae(tiny_sae(site=SITE, **options), path / "sae")


def edit_config(path: Path, **changes: Any) -> None:
    """Fields of cfg.json; a value of None takes the field out."""
    data = json.loads((path / CONFIG).read_text())
    for name, value in changes.items():
        data[name] = value
        if value is None:
            del data[name]
    (path / CONFIG).write_text(json.dumps(data))


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("subtract_b_dec", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_an_sae_comes_back_as_it_was_stored(tmp_path, activation, subtract_b_dec, normalize, dtype):
    sae = tiny_sae(site=SITE, activation=activation, subtract_b_dec=subtract_b_dec, normalize=normalize)
    sae.metadata = {"lm": {"id": "tiny", "revision": None}, "tokens_seen": 12}
    sae.mask_rule = MaskRule(skip_first_tokens=1, max_norm_ratio=10, median_norm=0.1)
    path = save_sae(sae, tmp_path / "new" / "folder", dtype=dtype)
    again = load_sae(path)
    assert again.config == sae.config
    assert again.site == SITE
    assert again.metadata == sae.metadata
    assert again.mask_rule == sae.mask_rule
    assert again.dtype == torch.float32
    for name in WEIGHT_NAMES:
        assert torch.equal(getattr(again, name), getattr(sae, name).to(dtype).float()), name
        assert getattr(again, name).requires_grad
    if sae.threshold is None:
        assert again.threshold is None
    else:
        assert again.threshold is not None
        assert again.threshold.dtype == torch.float32
        assert torch.equal(again.threshold, sae.threshold), "the threshold is float32 in every file"
    stored = tiny_sae(site=SITE, activation=activation, subtract_b_dec=subtract_b_dec, normalize=normalize)
    stored = stored.to(dtype).float()
    assert torch.equal(again.encode(x()), stored.encode(x()))
    assert torch.equal(again(x()).x_hat, stored(x()).x_hat)


def test_a_bf16_sae_is_stored_as_bf16_and_read_in_any_dtype(tmp_path):
    sae = tiny_sae(activation="jumprelu", dtype=torch.bfloat16)
    path = save_sae(sae, tmp_path)
    assert load_file(path / WEIGHTS)["W_enc"].dtype == torch.bfloat16
    assert load_file(path / WEIGHTS)["threshold"].dtype == torch.float32
    again = load_sae(path, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.encode(x()), sae.encode(x()))
    assert json.loads((path / CONFIG).read_text())["dtype"] == "bfloat16"


def test_a_batchtopk_is_a_jumprelu_for_others_and_itself_for_us(tmp_path):
    path = written(tmp_path, activation="batchtopk")
    config = json.loads((path / CONFIG).read_text())
    assert config["architecture"] == "jumprelu"
    assert "k" not in config
    assert config["metadata"]["training_architecture"] == "batchtopk"
    assert sorted(load_file(path / WEIGHTS)) == ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"]
    ours = load_sae(path)
    assert ours.config.activation == BatchTopK(k=6)
    edit_config(path, metadata={})
    foreign = load_sae(path)
    assert foreign.config.activation == JumpReLU()
    assert torch.equal(foreign.encode(x()), ours.encode(x()))
    assert foreign.site is None


def test_a_scalar_threshold_is_written_for_every_latent(tmp_path):
    sae = tiny_sae(activation="batchtopk")
    sae.register_parameter("threshold", torch.nn.Parameter(torch.tensor(0.3)))
    again = load_sae(save_sae(sae, tmp_path))
    assert again.threshold is not None
    assert again.threshold.shape == (48,)
    assert torch.equal(again.encode(x()), sae.encode(x()))


def test_the_config_is_that_of_saelens(tmp_path):
    config = json.loads((written(tmp_path, activation="topk") / CONFIG).read_text())
    assert config["architecture"] == "topk"
    assert config["k"] == 6
    assert (config["d_in"], config["d_sae"]) == (32, 48)
    assert config["apply_b_dec_to_input"] is True
    assert config["metadata"]["hf_hook_name"] == SITE


def test_statistics_come_back(tmp_path):
    sae = tiny_sae(site=SITE)
    assert sae.stats is not None
    sae.stats.tokens = 123_456_789_012
    path = save_sae(sae, tmp_path)
    stats = load_sae(path).stats
    assert stats is not None
    assert stats.tokens == 123_456_789_012
    for name in ("max_act", "density", "mean_act", "quantiles", "mean_error"):
        assert torch.equal(getattr(stats, name), getattr(sae.stats, name))
    sae.stats = None
    save_sae(sae, path)
    assert load_sae(path).stats is None, "old statistics do not stay beside new weights"


def test_statistics_of_an_older_file(tmp_path):
    """They had neither quantiles nor the mean error; each may be there alone."""
    sae = tiny_sae(site=SITE)
    assert sae.stats is not None
    later = {"quantiles": sae.stats.quantiles, "mean_error": sae.stats.mean_error}
    for kept in ((), ("quantiles",), ("mean_error",)):
        sae.stats.quantiles, sae.stats.mean_error = [x if name in kept else None for name, x in later.items()]
        path = save_sae(sae, tmp_path)
        levels = ["quantile_levels"] if "quantiles" in kept else []
        assert set(load_file(path / STATS)) == {"max_act", "density", "mean_act", *kept, *levels}
        stats = load_sae(path).stats
        assert stats is not None
        assert torch.equal(stats.max_act, sae.stats.max_act)
        assert {name for name in later if getattr(stats, name) is not None} == set(kept)


def test_a_foreign_file_keeps_its_metadata(tmp_path):
    path = written(tmp_path)
    edit_config(path, metadata={"sae_lens_version": "6.0.0", "model_name": "gpt2", "hf_hook_name": "transformer.h.1"})
    sae = load_sae(path)
    assert sae.metadata["saelens"]["model_name"] == "gpt2"
    again = load_sae(save_sae(sae, tmp_path / "again"))
    assert again.metadata == sae.metadata
    assert again.site == sae.site == "layers.1.resid_post"


def test_reading_leaves_the_random_state_alone(tmp_path):
    path = written(tmp_path)
    state = torch.get_rng_state()
    load_sae(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_is_replaced(tmp_path):
    path = written(tmp_path, activation="topk")
    save_sae(tiny_sae(activation="relu", d_sae=40, site="layers.0.mlp_out"), path)
    again = load_sae(path)
    assert (again.d_sae, again.site) == (40, "layers.0.mlp_out")
    assert sorted(p.name for p in path.iterdir()) == sorted([CONFIG, WEIGHTS, STATS])


# --- what is not written ---------------------------------------------------------------------------------------------


def test_an_sae_that_cannot_be_used_is_not_written(tmp_path):
    sae = tiny_sae(activation="batchtopk")
    sae.register_parameter("threshold", None)
    with pytest.raises(MissingStatError, match="BatchTopK has no threshold"):
        save_sae(sae, tmp_path / "a")
    sae = tiny_sae()
    with torch.no_grad():
        sae.W_enc[0, 0] = float("nan")
    with pytest.raises(ArgumentError, match="W_enc holds NaN"):
        save_sae(sae, tmp_path / "b")
    sae = tiny_sae()
    with torch.no_grad():
        sae.b_dec[0] = 1e6
    with pytest.raises(ArgumentError, match="b_dec holds NaN or infinity in torch.float16"):
        save_sae(sae, tmp_path / "c", dtype=torch.float16)
    with pytest.raises(ArgumentError, match="int8"):
        save_sae(sae, tmp_path / "d", dtype=torch.int8)
    for metadata in ({"a": {1, 2}}, {"a": float("nan")}, {"a": torch.zeros(1)}):
        sae.metadata = metadata
        with pytest.raises(ArgumentError, match="metadata is no JSON"):
            save_sae(sae, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("I am a file")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FileError, match="cannot write"):
            save_sae(tiny_sae(), path)
        with pytest.raises(FileError, match="cannot write"):
            atomic_write(path / "text.json", "{}")
    assert (tmp_path / "file").read_text() == "I am a file"


def test_a_file_name_taken_by_a_folder(tmp_path):
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(FileError, match=WEIGHTS):
        save_sae(tiny_sae(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [WEIGHTS], "no partial file stays"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = written(tmp_path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    sae = tiny_sae()
    with torch.no_grad():
        sae.W_dec[0] = float("inf")
    with pytest.raises(ArgumentError):
        save_sae(sae, path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


WRITER = """
import sys, torch
from saehook.checkpoint import save_sae
from saehook.config import ReLU, SAEConfig
from saehook.files import atomic_write
from saehook.sae import SAE

saes = [SAE(SAEConfig(d_in=256, d_sae=4096, activation=ReLU())) for _ in range(2)]
for i, sae in enumerate(saes):
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.fill_(float(i + 1))
save_sae(saes[0], sys.argv[1])
print("ready", flush=True)
while True:
    for sae in saes:
        save_sae(sae, sys.argv[1])
"""


@pytest.mark.slow
def test_kill_in_the_middle_of_writing_leaves_old_or_new(tmp_path):
    path = tmp_path / "sae"
    rng = random.Random(0)
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        sae = load_sae(path)
        weights = [getattr(sae, name).detach() for name in WEIGHT_NAMES]
        values = {float(v) for weight in weights for v in (weight.min(), weight.max())}
        assert values in ({1.0}, {2.0})


# --- files that are not what they should be --------------------------------------------------------------------------


def test_folders_that_hold_no_sae(tmp_path):
    with pytest.raises(FileError, match="not there"):
        load_sae(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="no whole file of weights"):
        load_sae(tmp_path / "file")
    with pytest.raises(FileError, match=f"no {CONFIG}"):
        load_sae(tmp_path)
    path = written(tmp_path)
    (path / WEIGHTS).unlink()
    with pytest.raises(FileError, match=f"no {WEIGHTS}"):
        load_sae(path)
    (path / WEIGHTS).mkdir()
    with pytest.raises(SaehookError, match=WEIGHTS):
        load_sae(path)
    (path / WEIGHTS).rmdir()
    path = written(tmp_path)
    (path / CONFIG).unlink()
    (path / CONFIG).mkdir()
    with pytest.raises(FileError, match=CONFIG):
        load_sae(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("name", [WEIGHTS, STATS])
def test_a_truncated_file(tmp_path, share, name):
    path = written(tmp_path)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(FormatError, match=name):
        load_sae(path)


@pytest.mark.parametrize("name", [WEIGHTS, STATS])
def test_a_pickle_in_disguise_is_not_run(tmp_path, name):
    path = written(tmp_path)
    witness = tmp_path / "witness"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (witness,))

    torch.save({"W_enc": Bomb()}, path / name)
    with pytest.raises(FormatError, match="pickles are never read"):
        load_sae(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    "text", ["", "{", "not json", "[]", "3", "null", "[" * 200_000, '{"d_in": 1' + "0" * 5000 + "}"]
)
def test_a_config_that_is_no_json_object(tmp_path, text):
    path = written(tmp_path)
    (path / CONFIG).write_text(text)
    with pytest.raises(FormatError, match=CONFIG):
        load_sae(path)


def test_a_config_that_is_no_text(tmp_path):
    path = written(tmp_path)
    (path / CONFIG).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="no text file"):
        load_sae(path)


def test_a_huge_config_is_not_read(tmp_path):
    path = written(tmp_path)
    with (path / CONFIG).open("r+b") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    with pytest.raises(FormatError, match="16,777,217 bytes"):
        load_sae(path)


NO_RULE = {"skip_first_tokens": 0, "max_norm_ratio": None, "median_norm": None}
JUNK: list[Any] = [True, 0, -1, 1.5, "32", "", "none", [], [32], {}, {"name": "topk"}, 10**12, 10**30, float("nan")]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architecture": None}, "'architecture' is missing"),
        ({"d_in": None}, "'d_in' is missing"),
        ({"d_sae": None}, "'d_sae' is missing"),
        ({"architecture": "temporal"}, "'temporal' is unknown"),
        ({"architecture": "transcoder"}, "b_dec of a transcoder"),
        ({"architecture": "transcoder", "apply_b_dec_to_input": False, "d_out": 7}, "W_dec has shape"),
        ({"architecture": "skip_transcoder", "apply_b_dec_to_input": False}, "W_skip is missing"),
        ({"architecture": ["standard"]}, "standard"),
        ({"architecture": "jumprelu"}, "recorded for an architecture 'jumprelu'"),
        ({"architecture": "jumprelu", "metadata": {}}, "threshold is missing"),
        ({"architecture": "topk"}, "k is 0"),
        ({"architecture": "topk", "k": "6"}, "k is '6'"),
        ({"architecture": "topk", "k": 49}, "k = 49"),
        ({"d_in": 0}, "d_in is 0"),
        ({"d_in": "32"}, "d_in is '32'"),
        ({"d_in": 32.0}, "d_in is 32.0"),
        ({"d_in": True}, "d_in is True"),
        ({"d_in": 31}, r"W_enc has shape \(32, 48\), but cfg.json says \(31, 48\)"),
        ({"d_sae": 47}, r"\(32, 48\), but cfg.json says \(32, 47\)"),
        ({"d_in": 48, "d_sae": 32}, "transposed"),
        ({"d_in": 10**9, "d_sae": 10**9}, r"\(32, 48\), but cfg.json says \(1000000000, 1000000000\)"),
        ({"d_in": 10**40}, r"\(32, 48\), but cfg.json says"),
        ({"normalize_activations": "by the moon"}, "normalize_activations = 'by the moon'"),
        ({"normalize_activations": []}, "normalize_activations"),
        ({"normalize_activations": {}}, "normalize_activations"),
        ({"reshape_activations": "heads"}, "reshape_activations = 'heads'"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input"),
        ({"metadata": {"saehook": {"schema": 99}}}, "schema 99"),
        ({"metadata": {"saehook": {"site": 3}}}, "site"),
        ({"metadata": {"hf_hook_name": ["a"]}}, "hf_hook_name|site"),
        *(
            ({"metadata": {"saehook": {"mask_rule": rule}}}, f"cfg.json.*{match}")
            for rule, match in [
                ("every second token", "'every second token'.*skip_first_tokens, max_norm_ratio, median_norm"),
                ({"skip_first_tokens": 1}, "exactly the fields"),
                ({**NO_RULE, "skip_last_tokens": 1}, "exactly the fields"),
                ({**NO_RULE, "skip_first_tokens": -1}, "skip_first_tokens is -1"),
                ({**NO_RULE, "skip_first_tokens": 1.5}, "skip_first_tokens is 1.5"),
                ({**NO_RULE, "skip_first_tokens": None}, "skip_first_tokens is None"),
                ({**NO_RULE, "max_norm_ratio": 10}, "both or neither"),
                ({**NO_RULE, "median_norm": 1.0}, "both or neither"),
                ({**NO_RULE, "max_norm_ratio": 0.5, "median_norm": 1.0}, "max_norm_ratio is 0.5"),
                ({**NO_RULE, "max_norm_ratio": 10, "median_norm": 0}, "median_norm is 0"),
                ({**NO_RULE, "max_norm_ratio": 10, "median_norm": float("nan")}, "median_norm is nan"),
                ({**NO_RULE, "max_norm_ratio": float("inf"), "median_norm": 1}, "max_norm_ratio is inf"),
                ({**NO_RULE, "max_norm_ratio": "10", "median_norm": 1}, "max_norm_ratio is '10'"),
            ]
        ),
    ],
)
def test_a_config_that_contradicts_the_weights_or_itself(tmp_path, changes, match):
    path = written(tmp_path)
    edit_config(path, **changes)
    with pytest.raises(FormatError, match=match):
        load_sae(path)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(
    "field",
    [
        "architecture",
        "d_in",
        "d_sae",
        "k",
        "normalize_activations",
        "reshape_activations",
        "apply_b_dec_to_input",
        "metadata",
    ],
)
def test_a_field_of_the_wrong_type_is_read_or_refused(tmp_path, field, activation):
    path = written(tmp_path, activation=activation)
    messages = []
    for junk in JUNK:
        edit_config(path, **{field: junk})
        try:
            load_sae(path)
        except FormatError as error:
            messages.append(str(error))
    assert all(len(message) > 20 for message in messages)


def test_what_a_file_says_of_the_mask(tmp_path):
    """Nothing, as foreign files and those made in Python by earlier versions; or the words that earlier training wrote."""
    path = written(tmp_path)
    assert load_sae(path).mask_rule == MaskRule()
    original = json.loads((path / CONFIG).read_text())["metadata"]
    assert original["saehook"].pop("mask_rule") == NO_RULE
    for ours in (original["saehook"], {"mask_rule": "attended, and the id is not the tokenizer's bos, eos or pad"}):
        edit_config(path, metadata={**original, "saehook": ours})
        sae = load_sae(path)
        assert sae.mask_rule == MaskRule()
        assert "mask_rule" not in sae.metadata


def test_junk_in_our_own_metadata_is_read_or_refused(tmp_path):
    path = written(tmp_path, activation="batchtopk")
    original = json.loads((path / CONFIG).read_text())["metadata"]
    for field in ("schema", "activation", "site", "mask_rule"):
        for junk in [
            *JUNK,
            None,
            {"name": []},
            {"name": "batchtopk", "k": []},
            {"name": "batchtopk"},
            {"name": "relu"},
        ]:
            edit_config(path, metadata={**original, "saehook": {**original["saehook"], field: junk}})
            try:
                sae = load_sae(path)
            except FormatError:
                continue
            assert sae.site is None or isinstance(sae.site, str)


@pytest.mark.parametrize("name", WEIGHT_NAMES)
@pytest.mark.parametrize("damage", ["nan", "inf", "missing", "transposed", "short", "int", "scalar"])
def test_damaged_weights(tmp_path, name, damage):
    path = written(tmp_path)
    tensors = load_file(path / WEIGHTS)
    tensor = tensors[name]
    match damage:
        case "nan":
            tensor.view(-1)[3] = float("nan")
        case "inf":
            tensor.view(-1)[3] = float("-inf")
        case "missing":
            del tensors[name]
        case "transposed":
            tensors[name] = tensor.T.contiguous() if tensor.ndim == 2 else tensor[None]
        case "short":
            tensors[name] = tensor[:-1].contiguous()
        case "int":
            tensors[name] = tensor.to(torch.int32)
        case _:
            tensors[name] = torch.tensor(1.0)
    save_file(tensors, path / WEIGHTS)
    with pytest.raises(FormatError, match=name):
        load_sae(path)


def test_unknown_tensors_are_refused(tmp_path):
    path = written(tmp_path)
    save_file({**load_file(path / WEIGHTS), "W_gate": torch.zeros(2)}, path / WEIGHTS)
    with pytest.raises(FormatError, match="W_gate is unknown"):
        load_sae(path)
    path = written(tmp_path)
    save_file({**load_file(path / WEIGHTS), "threshold": torch.zeros(48)}, path / WEIGHTS)
    with pytest.raises(FormatError, match="threshold is unknown"):
        load_sae(path)


def test_damaged_statistics(tmp_path):
    path = written(tmp_path)
    stats = load_file(path / STATS)
    header = {"tokens": "3"}
    for metadata in (None, {"tokens": "many"}, {"tokens": "-3"}, {"tokens": ""}, {"tokens": "9" * 500}):
        save_file(stats, path / STATS, metadata=metadata)
        with pytest.raises(FormatError, match="number of tokens"):
            load_sae(path)
    save_file({**stats, "max_act": stats["max_act"][:-1].contiguous()}, path / STATS, metadata={"tokens": "3"})
    with pytest.raises(FormatError, match="max_act has shape"):
        load_sae(path)
    save_file({**stats, "max_act": stats["max_act"] * float("nan")}, path / STATS, metadata={"tokens": "3"})
    with pytest.raises(FormatError, match="max_act holds NaN"):
        load_sae(path)
    for name, damage, match in [
        ("quantiles", lambda x: x[:, :-1], "quantiles has shape"),
        ("quantiles", lambda x: x / 0, "quantiles holds NaN or inf"),
        ("quantiles", lambda x: x - 0.5, "do not rise from 0 to max_act"),
        ("quantiles", lambda x: x + 2, "do not rise from 0 to max_act"),
        ("quantiles", lambda x: x.flip(1), "do not rise from 0 to max_act"),
        ("quantiles", lambda x: x.long(), "a float dtype"),
        ("mean_error", lambda x: x[:-1], "mean_error has shape"),
        ("mean_error", lambda x: x * float("nan"), "mean_error holds NaN"),
    ]:
        save_file({**stats, name: damage(stats[name]).contiguous()}, path / STATS, metadata=header)
        with pytest.raises(FormatError, match=match):
            load_sae(path)
    others = {name: tensor for name, tensor in stats.items() if name != "quantile_levels"}
    for damaged in (others, {**others, "quantile_levels": torch.tensor(QUANTILE_LEVELS) / 2}):
        save_file(damaged, path / STATS, metadata=header)
        with pytest.raises(FormatError, match="levels"):
            load_sae(path)
    save_file(stats, path / STATS, metadata=header)
    assert load_sae(path).stats is not None


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, STATS])
def test_flipped_bytes_load_or_are_refused(tmp_path, name):
    path = written(tmp_path, activation="batchtopk")
    data = (path / name).read_bytes()
    # Half of the flips in the header, where they do most.
    head = min(len(data), 400)
    rng = random.Random(0)
    loaded = refused = 0
    for i in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            damaged[rng.randrange(head if i % 2 else len(data))] = rng.randrange(256)
        (path / name).write_bytes(damaged)
        try:
            sae = load_sae(path)
        except SaehookError:
            refused += 1
        else:
            assert isinstance(sae, SAE)
            assert torch.isfinite(sae.encode(x(2))).all() or name != WEIGHTS or sae.W_enc.abs().max() > 1e30
            loaded += 1
    assert loaded > 5
    assert refused > 5


def test_a_meta_sae_costs_nothing():
    """What reading a config costs does not depend on the sizes in it."""
    sae = SAE(SAEConfig(d_in=10**6, d_sae=10**6, activation=JumpReLU()), device="meta")
    assert sae.W_enc.is_meta
    assert sae.W_enc.shape == (10**6, 10**6)


def test_the_same_sae_gives_the_same_bytes(tmp_path):
    sae = tiny_sae(site=SITE)
    files = [save_sae(sae, tmp_path / str(i)) for i in range(8)]
    for name in (CONFIG, WEIGHTS, STATS):
        assert len({(file / name).read_bytes() for file in files}) == 1, name
