"""An SAE that a visitor of the page brings: what is taken, for whom, and what is left of it."""

from __future__ import annotations

import json
import tempfile
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from app_fixtures import SITES, collect_loops, free_port, tiny
from gradio.context import LocalContext
from gradio_client import Client

from saehook import SAE, SAEConfig, TopK, ablate, save_sae
from saehook.app import Limits, serve
from saehook.app.uploads import Uploads, read_upload
from saehook.errors import ArgumentError, FileError, FormatError, SaehookError, SiteError

pytestmark = [
    # Gradio leaves event loops and sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]
SITE = "layers.2.resid_post"
LIMITS = Limits(upload_bytes=100_000, uploads=2)


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    yield
    collect_loops()


def own_sae(site: str | None = SITE, width: int = 32) -> SAE:
    config = SAEConfig(d_in=width, d_sae=48, activation=TopK(k=4))
    return SAE(config, site=site, generator=torch.Generator().manual_seed(7)).requires_grad_(False)


def files_of(folder: Path, sae: SAE) -> list[str]:
    """Its files as they lie when they have been uploaded: each in a folder of its own."""
    stored = save_sae(sae, folder / "stored")
    paths = []
    for i, path in enumerate(sorted(stored.iterdir())):
        (folder / f"{i}").mkdir()
        paths.append(str(path.rename(folder / f"{i}" / path.name)))
    return paths


@pytest.fixture
def as_visitor() -> Iterator[Any]:
    def become(name: str) -> None:
        LocalContext.request.set(types.SimpleNamespace(session_hash=name))  # pyright: ignore[reportArgumentType]

    yield become
    LocalContext.request.set(None)


def test_an_sae_is_attached_for_its_visitor_only(tmp_path, as_visitor):
    uploads = Uploads(tiny(), LIMITS, tmp_path)
    as_visitor("a")
    temporary = {path.name for path in Path(tempfile.gettempdir()).iterdir() if "saehook-upload" in path.name}
    hooked, name = uploads.attach(files_of(tmp_path, own_sae()), "")
    assert name == SITE
    assert hooked.sites == [*SITES, SITE]
    assert uploads.hooked is hooked
    assert torch.equal(hooked.saes[SITE].W_dec, own_sae().W_dec)
    assert hooked.saes[SITES[0]] is tiny().saes[SITES[0]], "the served ones are shared"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "no file is left"
    after = {path.name for path in Path(tempfile.gettempdir()).iterdir() if "saehook-upload" in path.name}
    assert after <= temporary
    latent = hooked.latents("hello", SITE).top(1)[0].latent
    assert hooked.loss("hello", ablate(latent, site=SITE)) != hooked.loss("hello")
    as_visitor("b")
    assert uploads.hooked is tiny()
    as_visitor("a")
    uploads.detach()
    assert uploads.hooked is tiny()
    with pytest.raises(SaehookError):
        hooked.loss("hello")
    assert tiny().loss("hello") > 0, "the model is as it was"


def test_an_sae_takes_the_place_of_the_one_at_its_site(tmp_path, as_visitor):
    uploads = Uploads(tiny(), LIMITS, tmp_path)
    as_visitor("a")
    hooked, name = uploads.attach(files_of(tmp_path, own_sae(None)), "blocks.0.hook_resid_post")
    assert name == SITES[0]
    assert set(hooked.sites) == set(SITES)
    assert hooked.saes[SITES[0]].d_sae == 48
    assert tiny().saes[SITES[0]].d_sae == 96
    uploads.detach("a")


def test_so_many_visitors_have_one_at_a_time(tmp_path, as_visitor, monkeypatch):
    uploads = Uploads(tiny(), LIMITS, tmp_path)
    for name in "abca":
        (tmp_path / name).mkdir(exist_ok=True)
    for name in "ab":
        as_visitor(name)
        uploads.attach(files_of(tmp_path / name, own_sae()))
    as_visitor("c")
    files = files_of(tmp_path / "c", own_sae())
    kept = [(path, Path(path).read_bytes()) for path in files]
    with pytest.raises(ArgumentError, match="2 visitors have an SAE of their own attached; this page holds 2"):
        uploads.attach(files)
    monkeypatch.setattr("saehook.app.uploads.IDLE_SECONDS", -1)
    for path, content in kept:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content)
    hooked, _ = uploads.attach(files)
    assert uploads.hooked is hooked
    as_visitor("a")
    assert uploads.hooked is tiny(), "it was idle for longest"
    for name in "bc":
        uploads.detach(name)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda files: files[:1], ArgumentError, "1 files were sent: cfg.json; the SAE's cfg.json is expected"),
        (lambda files: [], ArgumentError, "0 files were sent: none"),
        (lambda files: [*files, files[0] + "/../evil.pt"], ArgumentError, "evil.pt"),
        (lambda files: [*files, files[0] + "/../gone.safetensors"], FileError, "not there any more"),
        (lambda files: [*files, files[1]], ArgumentError, "two files have the same name"),
    ],
)
def test_other_files_are_refused(tmp_path, change, error, says):
    files = files_of(tmp_path, own_sae())
    with pytest.raises(error, match=says):
        read_upload(change(files), tmp_path)


def test_a_file_outside_the_uploads_is_left_alone(tmp_path):
    uploaded, outside = tmp_path / "uploads", tmp_path / "outside.safetensors"
    uploaded.mkdir()
    outside.write_text("mine")
    files = files_of(uploaded, own_sae())
    link = uploaded / "link.safetensors"
    link.symlink_to(outside)
    for other in (str(outside), str(uploaded / ".." / outside.name), str(link)):
        with pytest.raises(FileError, match="was not uploaded"):
            read_upload([*files, other], uploaded)
    assert outside.read_text() == "mine"
    assert all(Path(file).is_file() for file in files)


def test_a_damaged_or_foreign_sae_is_refused(tmp_path, as_visitor):
    for name, says in (("a", "W_enc"), ("b", "safetensors")):
        (tmp_path / name).mkdir()
        files = files_of(tmp_path / name, own_sae())
        if name == "a":
            config = json.loads(Path(files[0]).read_text())
            Path(files[0]).write_text(json.dumps(config | {"d_sae": 10**9}))
        else:
            Path(files[1]).write_bytes(b"\x80\x04.pickle")
        with pytest.raises((FormatError, FileError), match=says):
            read_upload(files, tmp_path)
        assert not any(Path(file).exists() for file in files)
    as_visitor("a")
    uploads = Uploads(tiny(), LIMITS, tmp_path)
    for name, sae, says in (
        ("c", own_sae(width=16), "width 16"),
        ("d", own_sae("layers.9.resid_post"), r"layers\.9"),
        ("e", own_sae(None), "names 0 sites|no site|site"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises((SiteError, ValueError), match=says):
            uploads.attach(files_of(tmp_path / name, sae))
    assert uploads.hooked is tiny()
    (tmp_path / "f").mkdir()
    hooked, _ = uploads.attach(files_of(tmp_path / "f", own_sae()))
    (tmp_path / "g").mkdir()
    with pytest.raises(ValueError):
        uploads.attach(files_of(tmp_path / "g", own_sae(width=16)))
    assert uploads.hooked is hooked, "the one before stays"
    assert hooked.loss("hello", splice=True) > 0
    uploads.detach()


# --- the server ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = serve(tiny(), port=free_port(), limits=LIMITS, uploads=True, block=False, quiet=True)
    assert app.local_url
    yield app.local_url
    app.close()


def sent(url: str, name: str, content: bytes) -> tuple[int, str]:
    """A file is sent as a browser sends it: the status of the answer, and what it says."""
    disposition = f'Content-Disposition: form-data; name="files"; filename="{name}"\r\n'.encode()
    body = b"--x\r\n" + disposition + b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}gradio_api/upload", body, headers), timeout=20
        ) as got:
            return got.status, got.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("name", ["a.pt", "../../x.pkl", "a.safetensors.pt", "<img src=x>.html", "", "a.json\x00.py"])
def test_only_files_without_code_are_taken(url, name):
    status, says = sent(url, name, b"secret of a pickle")
    assert status == 415
    assert "this page takes .safetensors and .json only" in json.loads(says)["detail"]


def test_sizes_are_checked_first(url):
    status, says = sent(url, "a.safetensors", b"x" * 200_000)
    assert status == 413
    assert "this page takes 100000" in json.loads(says)["detail"]


def test_files_stay_in_their_folder(url):
    status, says = sent(url, "../../../../tmp/escaped.json", b"{}")
    assert status == 200
    (path,) = json.loads(says)
    assert Path(tempfile.gettempdir()) in Path(path).resolve().parents
    assert Path(path).name == "escaped.json"
    assert not Path("/tmp/escaped.json").exists()
    Path(path).unlink()


def test_the_page_still_serves_its_endpoints(url):
    client = Client(url, verbose=False, analytics_enabled=False)
    assert client.predict("abc", SITES[0], api_name="/read")["tokens"] == list("abc")
