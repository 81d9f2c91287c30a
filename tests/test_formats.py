"""The formats of published SAEs: small files of each layout compute what the layout means; what a path is; safe reading."""

from __future__ import annotations

import io
import json
import logging
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import format_files
import numpy as np
import pytest
import torch
from builders import tiny_sae
from fake_hub import fake_hub
from format_files import CASES, D_IN, D_SAE, K, Written, numbers
from safetensors.torch import load_file, save_file

import saehook
from saehook.checkpoint import load_sae, save_sae
from saehook.config import AbsTopK, BatchTopK, GroupMax, JumpReLU, TopK
from saehook.errors import ArgumentError, FileError, FormatError, MissingStatError, SaehookError
from saehook.formats import identify, our_site


def x() -> torch.Tensor:
    return torch.randn(8, D_IN, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


# --- what each layout means ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_published_layout_computes_what_it_means(tmp_path, name):
    written = CASES[name](tmp_path)
    sae = load_sae(written.path)
    acts, x_hat = written.rule(x())
    found = sae(x())
    torch.testing.assert_close(found.acts, acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.x_hat, x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode(x()), acts, rtol=1e-5, atol=1e-5)
    assert 0 < (acts != 0).float().mean() < 1
    assert (sae.site, sae.site_out) == (written.site, written.site_out)
    assert sae.metadata["lm"]["id"] == written.lm
    assert sae.metadata["source"]["format"] == written.format


@pytest.mark.parametrize("name", CASES)
def test_identify_says_the_same_without_reading(tmp_path, name):
    written = CASES[name](tmp_path)
    found, sae = identify(written.path), load_sae(written.path)
    assert found.format == written.format
    assert found.config == sae.config
    assert (found.site, found.site_out, found.lm) == (written.site, written.site_out, written.lm)


@pytest.mark.parametrize("name", ["gemma_scope_2 transcoder_affine", "openai TopK", "llama_scope", "qwen_scope"])
def test_what_is_written_again_is_the_same_sae(tmp_path, name):
    sae = load_sae(CASES[name](tmp_path).path)
    again = load_sae(save_sae(sae, tmp_path / "ours"))
    assert again.config == sae.config
    assert (again.site, again.site_out) == (sae.site, sae.site_out)
    assert again.metadata == sae.metadata
    torch.testing.assert_close(again(x()).x_hat, sae(x()).x_hat)
    assert identify(tmp_path / "ours").format == "saelens"


def test_some_rows_of_the_decoder(tmp_path):
    for i, (name, make) in enumerate(CASES.items()):
        written = make(tmp_path / str(i))
        rows = load_sae(written.path, rows=[3, 0, 3])
        assert torch.equal(rows, load_sae(written.path).W_dec[[3, 0, 3]]), name
    written = format_files.goodfire(tmp_path)
    with pytest.raises(FormatError, match="row 24 .* outside 0..23"):
        load_sae(written.path, rows=[D_SAE])
    with pytest.raises(ArgumentError, match="rows has -1"):
        load_sae(written.path, rows=[-1])


def test_a_batchtopk_without_threshold_says_so(tmp_path, caplog):
    written = format_files.batchtopk_repository(tmp_path, "batchtopk")
    with caplog.at_level(logging.WARNING, "saehook"):
        sae = load_sae(written.path)
    assert "holds no threshold" in caplog.text
    assert sae.config.activation == BatchTopK(k=K)
    with pytest.raises(MissingStatError, match="without threshold"):
        sae.encode(x())
    sae.set_threshold(0.3)
    torch.testing.assert_close(sae(x()).x_hat, written.rule(x())[1], rtol=1e-5, atol=1e-5)


def test_an_sae_that_normalises_each_token_decodes_only_with_it(tmp_path):
    sae = load_sae(format_files.openai(tmp_path).path)
    acts = sae.encode(x())
    with pytest.raises(ArgumentError, match="normalises each token"):
        sae.decode(acts)
    torch.testing.assert_close(sae.decode(acts, x()), sae(x()).x_hat)


def test_the_new_activation_functions():
    pre = torch.tensor([[3.0, -4.0, 1.0, 0.5, -0.1, -2.0]])
    from saehook.activation_fns import activate

    assert activate(pre, AbsTopK(k=2), None).tolist() == [[3.0, -4.0, 0, 0, 0, 0]]
    assert activate(pre, GroupMax(k=2), None).tolist() == [[3.0, 0, 0, 0.5, 0, 0]]
    assert activate(pre[:, 3:], GroupMax(k=3), None).tolist() == [[0.5, 0, 0]]
    with pytest.raises(ArgumentError, match="no 5 groups"):
        saehook.SAEConfig(d_in=4, d_sae=24, activation=GroupMax(k=5))


@pytest.mark.parametrize("activation", [AbsTopK(k=4), GroupMax(k=4)])
@pytest.mark.parametrize("normalize", ["none", "constant_norm"])
def test_ours_with_them_come_back(tmp_path, activation, normalize):
    sae = tiny_sae(activation=activation, normalize=normalize)
    again = load_sae(save_sae(sae, tmp_path))
    assert again.config == sae.config
    inputs = torch.randn(5, 32)
    assert torch.equal(again(inputs).x_hat, sae(inputs).x_hat)


@pytest.mark.parametrize(
    ("name", "lm", "site"),
    [
        ("blocks.8.hook_resid_pre", None, "layers.8.resid_pre"),
        ("blocks.3.attn.hook_z", None, "layers.3.attn_z"),
        ("blocks.3.hook_mlp_out", "google/gemma-2-2b", "layers.3.mlp_out"),
        ("model.layers.8", None, "layers.8.resid_post"),
        ("model.layers.3.self_attn.o_proj.input", None, "layers.3.attn_z"),
        ("model.layers.3.post_feedforward_layernorm.output", None, "layers.3.mlp_out"),
        ("h.8.mlp", "gpt2", "layers.8.mlp_out"),
        ("layers.8.mlp", "google/gemma-2-2b", "model.layers.8.mlp:output"),
        ("layers.8.mlp.input", "google/gemma-2-2b", "layers.8.mlp_in"),
        ("gpt_neox.layers.2.attention", None, "layers.2.attn_out"),
        ("resid_post_layer_8", None, "layers.8.resid_post"),
        ("layers.2.mlp_out", None, "layers.2.mlp_out"),
        ("embed_tokens", None, "embed_tokens"),
        ("blocks.1.ln2.hook_normalized", None, None),
        (None, None, None),
    ],
)
def test_sites_by_the_names_of_others(name, lm, site):
    assert our_site(name, lm) == site


def test_a_value_inside_a_norm_is_no_site_and_said(tmp_path):
    found = identify(format_files.gemma_scope(tmp_path, "transcoders").path)
    assert found.site is None
    assert any("layers.12.mlp_in is that value times the gain" in note for note in found.notes)


def test_unknown_keys_are_named_and_kept(tmp_path, caplog):
    written = format_files.batchtopk_repository(tmp_path)
    path = written.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"phase_of_the_moon": 0.5}))
    assert any("phase_of_the_moon" in note for note in identify(written.path).notes)
    with caplog.at_level(logging.WARNING, "saehook"):
        sae = load_sae(written.path)
    assert "phase_of_the_moon" in caplog.text
    assert sae.metadata["source"]["config"]["phase_of_the_moon"] == 0.5


# --- which file it is ------------------------------------------------------------------------------------------------


def test_the_format_is_found_by_what_is_in_the_files(tmp_path):
    """Other names, and other files beside: notes, a picture, an optimizer, damaged files that nobody needs."""
    written = format_files.batchtopk_repository(tmp_path)
    (written.path / "sae.pt").rename(written.path / "weights.bin")
    (written.path / "config.json").rename(written.path / "settings.json")
    (written.path / "README.md").write_text("# An SAE")
    (written.path / "broken.json").write_text("{")
    (written.path / "plot.png").write_bytes(b"\x89PNG")
    torch.save({"state": {0: torch.ones(3)}, "param_groups": []}, written.path / "optimizer.pt")
    (written.path / "half.safetensors").write_bytes(b"\x00\x01")
    torch.testing.assert_close(load_sae(written.path)(x()).x_hat, written.rule(x())[1], rtol=1e-5, atol=1e-5)


def test_several_saes_in_a_folder_are_named(tmp_path):
    written = format_files.qwen_scope(tmp_path)
    folder = written.path.parent
    with pytest.raises(FileError, match=r"2 SAEs: layer0.sae.pt, layer5.sae.pt. Name one with sub="):
        load_sae(folder)
    assert load_sae(folder, "layer5.sae.pt").site == "layers.5.resid_post"
    with pytest.raises(FileError, match=r"is not there; .* holds layer0.sae.pt, layer5.sae.pt"):
        load_sae(folder, "layer6.sae.pt")
    with pytest.raises(ArgumentError, match="sub="):
        load_sae(folder, "../secret")
    gemma = format_files.gemma_scope(tmp_path)
    with pytest.raises(FileError, match="Below it are .*average_l0_82: name one"):
        load_sae(gemma.path.parents[1])


def test_a_k_that_no_file_says(tmp_path):
    written = format_files.qwen_scope(tmp_path)
    bare = tmp_path / "elsewhere" / "layer5.pt"
    bare.parent.mkdir()
    bare.write_bytes(written.path.read_bytes())
    with pytest.raises(FormatError, match="Give k="):
        load_sae(bare)
    torch.testing.assert_close(load_sae(bare, k=K)(x()).x_hat, written.rule(x())[1], rtol=1e-5, atol=1e-5)


def test_an_input_scale_that_no_file_says(tmp_path, caplog):
    written = format_files.llama_scope_r1(tmp_path)
    with caplog.at_level(logging.WARNING, "saehook"):
        load_sae(written.path)
    assert "no file says which number" in caplog.text
    sae = load_sae(written.path, input_scale=1.5)
    acts, x_hat = written.rule(x() * 1.5)
    torch.testing.assert_close(sae.encode(x()), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x()).x_hat, x_hat / 1.5, rtol=1e-5, atol=1e-5)


def test_a_folder_without_network_says_which_files_would_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileError, match=r"would do: layer_12/.*_82 of that repository.*as .*snapshots/COMMIT/layer_12"):
        load_sae("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")
    written = format_files.gemma_scope(tmp_path)
    snapshot = tmp_path / "hub" / "models--google--gemma-scope-2b-pt-res" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (written.path.parents[1]).rename(snapshot / "layer_12")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    sae = load_sae("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")
    assert (sae.site, sae.metadata["lm"]["id"]) == ("layers.12.resid_post", "google/gemma-2-2b")
    with pytest.raises(FileError, match="no weights at 'layer_13'"):
        load_sae("google/gemma-scope-2b-pt-res", "layer_13")


def test_from_the_hub_only_what_the_sae_needs(tmp_path, monkeypatch):
    names = ("layers.3.mlp", "layers.10")
    run = {
        "config.json": json.dumps({"sae": {}, "batch_size": 32, "model": "tiny"}).encode(),
        "layers.3.mlp/big.bin": b"x",
    }
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        tensors = {
            "encoder.weight": numbers(D_SAE, D_IN), "encoder.bias": numbers(D_SAE), "W_dec": numbers(D_SAE, D_IN),
            "b_dec": numbers(D_IN),
        }  # fmt: skip
        save_file(tensors, folder / "sae.safetensors")
        (folder / "cfg.json").write_text(json.dumps({"k": K, "num_latents": D_SAE, "d_in": D_IN}))
        run |= {f"{name}/{file.name}": file.read_bytes() for file in folder.iterdir()}
    with fake_hub() as served:
        served.repos["someone/saes"] = [run]
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        sae = load_sae("someone/saes", "layers.3.mlp")
        asked = [request.split()[1] for request in served.requests]
        with pytest.raises(FileError, match=r"2 SAEs: there are layers.10, layers.3.mlp. Name one with sub="):
            load_sae("someone/saes")
    assert sae.site == "layers.3.mlp_out"
    assert sae.metadata["lm"]["id"] == "tiny"
    got = {path.split("/main/")[1] for path in asked if "/resolve/" in path}
    assert got == {"config.json", "layers.3.mlp/cfg.json", "layers.3.mlp/sae.safetensors"}
    assert torch.equal(load_sae(tmp_path / "layers.3.mlp").W_dec, sae.W_dec)


# --- memory ----------------------------------------------------------------------------------------------------------


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


def test_weights_stay_maps_of_the_file(tmp_path):
    made = {
        "safetensors": save_sae(tiny_sae(), tmp_path / "ours") / "sae_weights.safetensors",
        "torch": format_files.qwen_scope(tmp_path).path,
    }
    for kind, path in made.items():
        sae = load_sae(path)
        regions = [line.split()[0] for line in mapped_files().splitlines() if line.endswith(str(path))]
        spans = [tuple(int(end, 16) for end in region.split("-")) for region in regions]
        at = sae.W_enc.data_ptr()
        assert any(low <= at < high for low, high in spans), kind
        with torch.no_grad():
            sae.W_enc.mul_(2)
        assert torch.equal(load_sae(path).W_enc * 2, sae.W_enc), "a write does not reach the file"


# --- files that are not what they should be --------------------------------------------------------------------------


class Bomb:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return (Path.touch, (self.witness,))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_never_run(tmp_path, legacy):
    witness = tmp_path / "witness"
    path = tmp_path / "ae.pt"
    if legacy:
        path.write_bytes(pickle.dumps({"W_enc": Bomb(witness)}, protocol=2))
    else:
        torch.save({"encoder.weight": torch.ones(3, 2), "run": Bomb(witness)}, path)
    for what in (path, tmp_path):
        with pytest.raises(FormatError, match="carries code or objects.*never read"):
            load_sae(what)
    assert not witness.exists()


def test_a_pickle_that_is_no_state_dict(tmp_path):
    torch.save([torch.ones(3)], tmp_path / "ae.pt")
    with pytest.raises(FormatError, match="holds list; a state dict"):
        load_sae(tmp_path)
    torch.save({"weight": torch.ones(3)}, tmp_path / "ae.pt")
    with pytest.raises(FormatError, match="of no format that saehook reads: it holds weight"):
        load_sae(tmp_path)


def cuda_tagged(path: Path) -> None:
    """Make a torch file say that its tensors were on a GPU, as files do that were saved there."""
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            data = (
                data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0") if name.endswith("data.pkl") else data
            )
            archive.writestr(name, data)
    assert b"cuda:0" in path.read_bytes()


def test_tensors_that_were_saved_on_a_gpu(tmp_path):
    written = format_files.goodfire(tmp_path)
    cuda_tagged(written.path)
    torch.testing.assert_close(load_sae(written.path)(x()).x_hat, written.rule(x())[1], rtol=1e-5, atol=1e-5)


def test_a_compressed_torch_file_is_not_unpacked(tmp_path):
    written = format_files.goodfire(tmp_path)
    with zipfile.ZipFile(written.path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(written.path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(FormatError, match="is compressed"):
        load_sae(written.path)


def test_a_torch_file_larger_than_its_shapes(tmp_path):
    written = format_files.goodfire(tmp_path)
    state = torch.load(written.path)
    part = torch.zeros(2**20)[: D_IN * D_SAE].view(D_IN, D_SAE)
    torch.save(state | {"decoder_linear.weight": part}, written.path)
    with pytest.raises(FormatError, match="for tensors whose shapes need"):
        load_sae(written.path)


def npz(path: Path, arrays: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return path


def npy(array: np.ndarray[Any, Any], shape: tuple[int, ...] | None = None) -> bytes:
    """The bytes of an array, its header maybe of another shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": array.dtype.str, "fortran_order": False, "shape": shape or array.shape}
    )
    return buffer.getvalue() + array.tobytes()


def test_zip_bombs_and_wrong_sizes_in_npz(tmp_path):
    zeros = np.zeros(30 * 2**20, "f4")
    bomb = npz(tmp_path / "bomb.npz", {"W_enc": npy(zeros)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**20
    with pytest.raises(FormatError, match="would unpack from"):
        load_sae(bomb)
    small = np.ones(6, "f4")
    with pytest.raises(FormatError, match=r"shape \(2, 2\), which is .* bytes, and the file holds"):
        load_sae(npz(tmp_path / "longer.npz", {"W_enc": npy(small, (2, 2))}))
    with pytest.raises(FormatError, match="shape"):
        load_sae(npz(tmp_path / "huge.npz", {"W_enc": npy(small, (10**6, 10**6))}))
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError, match="pickled objects are never read"):
        load_sae(npz(tmp_path / "objects.npz", {"W_enc": objects.getvalue()}))
    with pytest.raises(FormatError, match="header"):
        load_sae(npz(tmp_path / "none.npz", {"W_enc": b"nothing"}))
    whole = format_files.gemma_scope(tmp_path).path / "params.npz"
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(FormatError, match="no whole file of weights"):
        load_sae(whole)


def test_safetensors_with_more_or_less_than_its_header_says(tmp_path):
    path = format_files.gemma_scope_2(tmp_path).path / "params.safetensors"
    data = path.read_bytes()
    for changed in (data + b"more", data[:-4], data[:20], b""):
        path.write_bytes(changed)
        with pytest.raises(FormatError, match="no whole file of weights"):
            load_sae(path)


def saelens(path: Path, **changes: Any) -> Path:
    """A folder of SAELens with tensors replaced, or taken out where None."""
    save_sae(tiny_sae(d_in=D_IN, d_sae=D_SAE, activation="jumprelu"), path)
    file = path / "sae_weights.safetensors"
    tensors = load_file(file) | changes
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, file)
    return path


def test_nan_a_missing_threshold_and_unknown_tensors(tmp_path):
    nan = numbers(D_SAE, D_IN)
    nan[3, 4] = float("nan")
    with pytest.raises(FormatError, match="W_dec holds NaN"):
        load_sae(saelens(tmp_path / "nan", W_dec=nan))
    with pytest.raises(FormatError, match="threshold is missing"):
        load_sae(saelens(tmp_path / "threshold", threshold=None))
    with pytest.raises(FormatError, match="phase is unknown"):
        load_sae(saelens(tmp_path / "unknown", phase=torch.ones(3)))
    with pytest.raises(FormatError, match="a float dtype is expected"):
        load_sae(saelens(tmp_path / "whole", W_dec=torch.ones(D_SAE, D_IN, dtype=torch.int32)))


def test_transposed_matrices_by_their_shape(tmp_path):
    for name, shape in (("W_dec", (D_IN, D_SAE)), ("W_enc", (D_SAE, D_IN))):
        with pytest.raises(FormatError, match=f"{name} is transposed: it has shape"):
            load_sae(saelens(tmp_path / name, **{name: numbers(*shape)}))
    gemma = format_files.gemma_scope_2(tmp_path).path
    tensors = load_file(gemma / "params.safetensors")
    save_file(tensors | {"w_enc": tensors["w_enc"].T.contiguous()}, gemma / "params.safetensors")
    with pytest.raises(FormatError, match="W_enc is transposed"):
        load_sae(gemma)
    written = format_files.openai(tmp_path)
    state = torch.load(written.path)
    torch.save(state | {"decoder.weight": state["decoder.weight"].T.contiguous()}, written.path)
    with pytest.raises(FormatError, match="W_dec is transposed"):
        load_sae(written.path)


def test_a_square_matrix_that_is_transposed_shows_by_its_norms(tmp_path):
    rows = torch.nn.functional.normalize(numbers(12, 12), dim=1)
    save_sae(tiny_sae(d_in=12, d_sae=12, activation="relu"), tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"W_dec": rows}, file)
    assert torch.equal(load_sae(tmp_path).W_dec, rows)
    save_file(tensors | {"W_dec": rows.T.contiguous()}, file)
    with pytest.raises(FormatError, match="W_dec is transposed: it is square, and its columns have norm 1"):
        load_sae(tmp_path)


def test_a_damaged_file_loads_or_is_refused(tmp_path):
    """Some bytes of each kind of file changed: an error of ours, or numbers; never anything else."""
    draw = random.Random(3)
    refused = 0
    for name in ("gemma_scope res", "gemma_scope compressed", "gemma_scope_2 transcoder", "openai TopK", "goodfire"):
        written = CASES[name](tmp_path / name)
        path = next(p for p in sorted(written.path.rglob("params.*"))) if written.path.is_dir() else written.path
        whole = path.read_bytes()
        for _ in range(12):
            data = bytearray(whole)
            for _ in range(draw.choice((1, 3, 20))):
                data[draw.randrange(len(data))] = draw.randrange(256)
            path.unlink()
            path.write_bytes(data if draw.random() < 0.8 else data[: draw.randrange(len(data))])
            try:
                assert torch.isfinite(load_sae(path).W_dec).all()
            except SaehookError:
                refused += 1
    assert refused > 10


def test_the_density_of_saelens_comes_back(tmp_path):
    path = saelens(tmp_path)
    density = torch.rand(D_SAE) * 0.1
    density[3] = 0.0
    save_file({"sparsity": (density + 1e-10).log10()}, path / "sparsity.safetensors")
    sae = load_sae(path)
    assert sae.density is not None
    torch.testing.assert_close(sae.density, density, rtol=1e-4, atol=1e-9)
    again = load_sae(save_sae(sae, tmp_path / "again"))
    assert again.density is not None
    torch.testing.assert_close(again.density, density, rtol=1e-4, atol=1e-9)
    save_file({"sparsity": torch.zeros(3)}, path / "sparsity.safetensors")
    with pytest.raises(FormatError, match="sparsity has shape"):
        load_sae(path)


def change(written: Written, name: str, **changes: Any) -> Path:
    path = written.path / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return written.path


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dict_size": 23}, r"W_enc has shape \(10, 24\), but its configuration says \(10, 23\)"),
        ({"act_size": "ten"}, "act_size is 'ten'"),
        ({"sae_type": "quantum"}, "sae_type 'quantum' is unknown"),
        ({"top_k": 25}, "k = 25"),
        ({"top_k": None}, "top_k is None"),
        ({"sae_type": "jumprelu"}, "log_threshold is missing"),
        ({"activation": "gelu"}, "'gelu' is not supported"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors(tmp_path, changes, match):
    with pytest.raises(FormatError, match=match):
        load_sae(change(format_files.batchtopk_repository(tmp_path), "config.json", **changes))


def test_dictionaries_that_do_not_say_what_they_are(tmp_path):
    state = {
        "encoder.weight": numbers(D_SAE, D_IN), "encoder.bias": numbers(D_SAE), "decoder.weight": numbers(D_IN, D_SAE),
        "b_dec": numbers(D_IN), "k": torch.tensor(4, dtype=torch.int), "threshold": torch.tensor(-1.0),
    }  # fmt: skip
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(FormatError, match="AutoEncoderTopK or BatchTopKSAE.*config.json.*is missing"):
        load_sae(tmp_path)
    config = {
        "trainer": {"dict_class": "BatchTopKSAE", "activation_dim": D_IN, "dict_size": D_SAE, "k": 4},
        "buffer": {},
    }

    def written(**changes: Any) -> Path:
        data = config | {"trainer": {**config["trainer"], **changes}}
        (tmp_path / "config.json").write_text(json.dumps(data))
        return tmp_path

    sae = load_sae(written())
    assert any("had set none yet" in note for note in sae.metadata["source"]["notes"])
    torch.testing.assert_close(sae.encode(x()), sae.pre_acts(x()).relu())
    for changes, match in (
        ({"k": 5}, "says k = 5, and ae.pt holds k = 4"),
        ({"dict_size": 25}, "dict_size = 25, and the tensors have 24"),
        ({"dict_class": "GatedAutoEncoder"}, "gate_bias.*missing"),
        ({"dict_class": "CrossCoder"}, "'CrossCoder' is unknown"),
    ):
        with pytest.raises(FormatError, match=match):
            load_sae(written(**changes))


def test_jumprelu_of_other_names_keeps_float32_thresholds(tmp_path):
    sae = load_sae(format_files.llama_scope(tmp_path).path, dtype=torch.bfloat16)
    assert sae.config.activation == JumpReLU()
    assert sae.dtype == torch.bfloat16
    assert sae.threshold is not None
    assert sae.threshold.dtype == torch.float32


# --- what may be otherwise ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_other_files_beside_that_speak_of_the_same_things(tmp_path, name):
    """A recording, notes that say sizes and k, a licence: none of them is the SAE or its configuration."""
    written = CASES[name](tmp_path)
    folder = written.path if written.path.is_dir() else written.path.parent
    acts, x_hat = written.rule(x())
    save_file({"x": x(), "acts": acts, "x_hat": x_hat}, folder / "recorded.safetensors")
    torch.save({"x": x(), "acts": acts}, folder / "io.pt")
    np.savez(folder / "io.npz", x=x().numpy())
    (folder / "meta.json").write_text(json.dumps({"d_in": D_IN, "d_sae": D_SAE, "k": 3, "format": written.format}))
    (folder / "LICENSE").write_text("...")
    sae = load_sae(written.path)
    torch.testing.assert_close(sae(x()).acts, acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x()).x_hat, x_hat, rtol=1e-5, atol=1e-5)
    assert (sae.site, sae.metadata["lm"]["id"]) == (written.site, written.lm)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_dtype(tmp_path, name, dtype):
    """What the file holds is what is computed with, in float32."""
    written = CASES[name](tmp_path)
    folder = written.path if written.path.is_dir() else written.path.parent
    file = (
        written.path
        if written.path.is_file()
        else next(p for p in folder.rglob("*") if p.suffix in (".npz", ".pt", ".safetensors"))
    )
    before = load_sae(written.path)
    config, pre_acts, rows = before.config, before.pre_acts(x()), before.W_dec.clone()  # of a file that is overwritten

    def cast(tensors: dict[str, Any]) -> dict[str, Any]:
        floats = {n: t for n, t in tensors.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
        return tensors | {n: t.to(dtype).contiguous() for n, t in floats.items()}

    if file.suffix == ".npz":
        kind = "f8" if dtype == torch.float64 else "f2"
        arrays = {n: array.astype(kind) for n, array in np.load(file).items()}
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    elif file.suffix == ".safetensors":
        save_file(cast(load_file(file)), file)
    else:
        torch.save(cast(torch.load(file)), file)
    sae = load_sae(written.path)
    assert sae.dtype == torch.float32
    assert sae.config == config
    torch.testing.assert_close(sae.pre_acts(x()), pre_acts, rtol=0.05, atol=0.1)
    torch.testing.assert_close(sae.W_dec, rows, rtol=0.02, atol=1e-3)


def sparsify(folder: Path, hookpoint: str = "layers.3.mlp", lm: str | None = "gpt2", **changes: Any) -> Path:
    """A run's folder of one hookpoint; keys of its cfg.json replaced, or taken out where None."""
    path = folder / hookpoint
    path.mkdir(parents=True)
    tensors = {
        "encoder.weight": numbers(2 * D_IN, D_IN), "encoder.bias": numbers(2 * D_IN), "W_dec": numbers(2 * D_IN, D_IN),
        "b_dec": numbers(D_IN),
    }  # fmt: skip
    save_file(tensors, path / "sae.safetensors")
    config = {
        "activation": "topk", "expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": K, "multi_topk": False,
        "skip_connection": False, "transcode": False, "d_in": D_IN,
    }  # fmt: skip
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (path / "cfg.json").write_text(json.dumps(config))
    if lm is not None:
        (folder / "config.json").write_text(json.dumps({"model": lm, "batch_size": 32, "sae": {"k": 7}}))
    torch.save({"global_step": 3}, folder / "state.pt")
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_latents": 2 * D_IN, "expansion_factor": 32},
        {"num_latents": None, "expansion_factor": 2.0},
        {"k": float(K)},
        {"d_in": None, "num_latents": 2 * D_IN},
        {"activation": None, "multi_topk": None, "skip_connection": None, "transcode": None, "signed": False},
    ],
)
def test_configurations_of_sparsify(tmp_path, changes):
    sae = load_sae(sparsify(tmp_path, **changes))
    assert (sae.d_in, sae.d_sae, sae.config.activation) == (D_IN, 2 * D_IN, TopK(k=K))
    assert sae.config.subtract_b_dec
    assert sae.site == "layers.3.mlp_out"


def test_configurations_of_sparsify_that_say_too_little(tmp_path):
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("k", {"k": None}, "no configuration .* says k"),
        ("half", {"k": 2.5}, "k is 2.5; a whole number"),
        ("more", {"num_latents": 2 * D_IN + 1}, r"W_enc has shape \(10, 20\), but cfg.json says \(10, 21\)"),
    ]
    for name, changes, match in cases:
        with pytest.raises(FormatError, match=match):
            load_sae(sparsify(tmp_path / name, **changes))
    with pytest.raises(FileError, match="Below it are layers.3.mlp: name one with sub="):
        load_sae(sparsify(tmp_path / "run").parent)


def test_a_modules_output_of_an_unknown_model_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "saehook"):
        assert load_sae(sparsify(tmp_path / "a", lm=None)).site == "layers.3.mlp_out"
    assert "layers.3.mlp is taken to be layers.3.mlp_out" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "saehook"):
        assert load_sae(sparsify(tmp_path / "b", "layers.3", lm=None)).site == "layers.3.resid_post"
        assert load_sae(sparsify(tmp_path / "c", lm="google/gemma-2-2b")).site == "model.layers.3.mlp:output"
    assert "is taken to be" not in caplog.text


@pytest.mark.parametrize("site", ["model.layers.0.mlp:output", "model.layers.0:output", "layers.1.mlp_out"])
@pytest.mark.parametrize("lm", [None, "google/gemma-2-2b"])
def test_the_site_in_our_own_file_stays_as_it_is(tmp_path, site, lm):
    sae = tiny_sae(D_IN, site=site)
    if lm:
        sae.metadata["lm"] = {"id": lm, "revision": None}
    path = save_sae(sae, tmp_path)
    assert load_sae(path).site == site
    assert (identify(path).site, identify(path).notes) == (site, ())


def old_saelens(folder: Path, **changes: Any) -> Path:
    """As SAELens 3 to 5 wrote them: everything beside everything, the density in a file of its own."""
    folder.mkdir(parents=True)
    tensors = {
        "W_enc": numbers(D_IN, D_SAE),
        "W_dec": numbers(D_SAE, D_IN),
        "b_enc": numbers(D_SAE),
        "b_dec": numbers(D_IN),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "activation_fn_str": "relu", "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "context_size": 128, "model_name": "gpt2-small", "hook_layer": 8,
        "hook_name": "blocks.8.hook_resid_pre", "hook_head_index": None, "prepend_bos": True, "dataset_path": "some/text",
        "dataset_trust_remote_code": False, "normalize_activations": "none", "dtype": "torch.float32", "device": "cuda",
        "sae_lens_training_version": "3.0.0", "neuronpedia_id": None, "activation_fn_kwargs": {},
        "model_from_pretrained_kwargs": {}, "seqpos_slice": [None],
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    save_file({"sparsity": torch.full((D_SAE,), -3.0)}, folder / "sparsity.safetensors")
    return folder


def test_old_configurations_of_saelens(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "saehook"):
        sae = load_sae(old_saelens(tmp_path / "a"))
    assert not caplog.text
    assert (sae.site, sae.metadata["lm"]["id"]) == ("layers.8.resid_pre", "gpt2-small")
    assert sae.density is not None
    torch.testing.assert_close(sae.density, torch.full((D_SAE,), 1e-3), rtol=1e-4, atol=0)
    topk = load_sae(old_saelens(tmp_path / "b", activation_fn_str="topk", activation_fn_kwargs={"k": 4.0}))
    assert topk.config.activation == TopK(k=4)
    with pytest.raises(FormatError, match=r"TopK.k is 4.5; a whole number"):
        load_sae(old_saelens(tmp_path / "c", activation_fn_str="topk", activation_fn_kwargs={"k": 4.5}))
    with pytest.raises(FormatError, match="threshold is missing"):
        load_sae(old_saelens(tmp_path / "d", architecture="jumprelu"))


def test_a_topk_of_dictionary_learning_whose_k_stands_elsewhere(tmp_path):
    """Versions of 2024 kept k in the configuration alone."""
    state = {
        "encoder.weight": numbers(D_SAE, D_IN), "encoder.bias": numbers(D_SAE), "decoder.weight": numbers(D_IN, D_SAE),
        "b_dec": numbers(D_IN),
    }  # fmt: skip
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(FormatError, match="k is None; .* Give k="):
        load_sae(tmp_path)
    assert load_sae(tmp_path, k=3).config.activation == TopK(k=3)
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": D_IN, "dict_size": D_SAE, "k": 4, "layer": 8}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    assert load_sae(tmp_path).config.activation == TopK(k=4)


def test_a_transposed_matrix_and_more_in_a_file_of_qwen_scope(tmp_path):
    written = format_files.qwen_scope(tmp_path)
    state = torch.load(written.path)
    torch.save(state | {"W_enc": state["W_enc"].T.contiguous()}, written.path)
    with pytest.raises(FormatError, match="W_enc is transposed"):
        load_sae(written.path)
    torch.save(state | {"step": 3}, written.path)
    with pytest.raises(FormatError, match="step is unknown"):
        load_sae(written.path)
