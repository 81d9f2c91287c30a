"""Activations on disk: what is served is what is stored, and what is damaged or missing is made again."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CONTEXT, VOCAB, build_lm, byte_tokenizer
from safetensors.torch import load_file
from torch import Tensor

from saehook.activation_cache import NEARBY, STALE_SECONDS, ActivationCache, cache_key, lm_pass, weights_fingerprint
from saehook.config import BatchTopK, TopK, TrainConfig
from saehook.errors import ArgumentError, FileError, FormatError
from saehook.harvest import Shuffled, activations_of
from saehook.hooked_model import HookedModel
from saehook.trainer import Trainer

KEYS = {"a": "0a" * 32, "model.b:output": "0b" * 32}
WIDTHS = {"a": 6, "model.b:output": 3}
SITES = ["layers.1.resid_post", "layers.2.mlp_out"]


class Text:
    """Made-up activations of a text in float32, and a record of the passes over it."""

    def __init__(self, tokens: int = 300, *, piece: int = 70, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = {site: torch.randn(tokens, width, generator=draw) for site, width in WIDTHS.items()}
        self.piece = piece
        self.skips: list[int] = []
        """Where each pass began."""
        self.made = 0
        """Tokens that the passes gave."""

    def make(self, skip: int) -> Iterator[dict[str, Tensor]]:
        self.skips.append(skip)
        tokens = len(self.x["a"])
        for start in range(skip, tokens, self.piece):
            self.made += min(self.piece, tokens - start)
            yield {site: x[start : start + self.piece] for site, x in self.x.items()}


def cache_in(folder: Path, shard_tokens: int = 64, keys: dict[str, str] = KEYS) -> ActivationCache:
    return ActivationCache(folder, keys, shard_tokens=shard_tokens)


def collected(chunks: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    parts = list(chunks)
    assert all(len({len(x) for x in part.values()}) == 1 for part in parts), "sites stay aligned"
    return {site: torch.cat([part[site] for part in parts]) for site in (parts[0] if parts else {})}


def assert_is(got: dict[str, Tensor], text: Text, tokens: int | None = None) -> None:
    """Bit for bit the text's activations, rounded."""
    assert set(got) == set(text.x)
    for site, x in text.x.items():
        assert got[site].dtype == torch.bfloat16
        assert torch.equal(got[site], x[:tokens].bfloat16())


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each file was written, in ns, and its contents."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def contents_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (_, content) in files_of(folder).items()}


def shard(folder: Path, number: int, site: str = "a") -> Path:
    (found,) = folder.glob(f"{site.replace(':', '.')}-*/shard-{number:05d}.safetensors")
    return found


# --- what is served --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "piece", "shard_tokens"),
    [(300, 70, 64), (300, 7, 64), (300, 300, 7), (256, 64, 64), (300, 70, 300), (300, 70, 4096), (1, 1, 1), (0, 1, 8)],
)
def test_the_first_run_and_the_second_see_the_same_rounded_numbers(tmp_path, tokens, piece, shard_tokens):
    text = Text(tokens, piece=piece)
    first = collected(cache_in(tmp_path, shard_tokens).chunks(text.make))
    second = collected(cache_in(tmp_path, shard_tokens).chunks(text.make))
    assert text.skips == [0], "the second run needs no pass"
    if tokens:
        assert_is(first, text)
        assert_is(second, text)
    else:
        assert first == second == {}
    assert not list(tmp_path.rglob(".*"))


def test_a_run_of_the_same_length_needs_no_pass_and_a_longer_one_goes_on(tmp_path):
    text = Text()

    def first_tokens(n: int) -> dict[str, Tensor]:
        return collected(itertools.islice(cache_in(tmp_path).chunks(text.make), -(-n // 64)))

    assert_is(first_tokens(100), text, 128)
    made = text.made
    assert_is(first_tokens(100), text, 128)
    assert text.skips == [0]
    assert text.made == made
    assert_is(first_tokens(300), text)
    assert text.skips == [0, 128]
    assert_is(first_tokens(300), text)
    assert text.skips == [0, 128]


def test_the_language_model_is_asked_only_as_far_as_the_run_goes(tmp_path):
    text = Text(piece=10)
    chunks = cache_in(tmp_path).chunks(text.make)
    assert text.skips == []
    next(chunks)
    assert text.made == 70, "one shard, to the end of the piece"


def test_a_shard_is_a_plain_safetensors_file(tmp_path):
    text = Text()
    collected(cache_in(tmp_path).chunks(text.make))
    for site, x in text.x.items():
        assert torch.equal(load_file(shard(tmp_path, 1, site))["activations"], x[64:128].bfloat16())


def test_a_stored_shard_is_mapped_and_changes_of_the_tensor_stay_out_of_the_file(tmp_path):
    text = Text()
    collected(cache_in(tmp_path).chunks(text.make))
    before = files_of(tmp_path)
    chunk = next(cache_in(tmp_path).chunks(text.make))
    chunk["model.b:output"].zero_()
    assert files_of(tmp_path) == before
    flip(shard(tmp_path, 0), -1)
    assert not torch.equal(chunk["a"], text.x["a"][:64].bfloat16()), "the tensor is the file, not a copy"


def test_shards_that_were_served_are_let_go(tmp_path):
    text = Text()
    for _ in ("made", "read"):
        served, held = [], []
        for chunk in cache_in(tmp_path).chunks(text.make):
            served.append(weakref.ref(chunk["a"]))
            del chunk
            held.append(sum(x() is not None for x in served))
        assert held == [1] * 5, "the one that the generator still has"


# --- several sites ---------------------------------------------------------------------------------------------------


def test_a_site_that_is_missing_is_made_and_the_other_kept(tmp_path):
    text = Text()
    only_a = Text()
    del only_a.x["model.b:output"]
    collected(cache_in(tmp_path, keys={"a": KEYS["a"]}).chunks(only_a.make))
    before = files_of(tmp_path)
    assert_is(collected(cache_in(tmp_path).chunks(text.make)), text)
    assert text.skips == [0]
    after = files_of(tmp_path)
    assert len(after) == 2 * len(before)
    assert before.items() <= after.items()


def test_where_the_language_model_is_not_exact_the_stored_numbers_win(tmp_path):
    """Run 2 makes another site, on another machine say; run 3 reads both and must see what run 2 saw."""
    text, other = Text(), Text(seed=1)
    collected(cache_in(tmp_path).chunks(text.make))
    shutil.rmtree(shard(tmp_path, 0, "model.b:output").parent)
    second = collected(cache_in(tmp_path).chunks(other.make))
    third = collected(cache_in(tmp_path).chunks(other.make))
    assert torch.equal(second["a"], text.x["a"].bfloat16())
    assert torch.equal(second["model.b:output"], other.x["model.b:output"].bfloat16())
    assert other.skips == [0]
    assert all(torch.equal(second[site], third[site]) for site in KEYS)


def test_sites_of_different_texts_are_refused(tmp_path):
    collected(cache_in(tmp_path).chunks(Text(300).make))
    shutil.rmtree(shard(tmp_path, 0, "model.b:output").parent)
    with pytest.raises(FormatError, match="44 tokens.* 36 tokens"):
        collected(cache_in(tmp_path).chunks(Text(292).make))


def test_other_keys_are_other_activations(tmp_path):
    text, other = Text(), Text(seed=1)
    collected(cache_in(tmp_path).chunks(text.make))
    assert_is(collected(cache_in(tmp_path, keys={site: "ff" * 32 for site in KEYS}).chunks(other.make)), other)
    assert_is(collected(cache_in(tmp_path).chunks(text.make)), text)
    assert text.skips == other.skips == [0]


def test_a_cache_of_nothing_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="0 sites"):
        ActivationCache(tmp_path, {})
    with pytest.raises(ArgumentError, match="shards of 0 tokens"):
        cache_in(tmp_path, 0)


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Change one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << bit]))


def small_cache(folder: Path) -> tuple[Text, dict[str, tuple[int, bytes]]]:
    text = Text(40)
    collected(cache_in(folder, 16).chunks(text.make))
    text.skips.clear()
    return text, files_of(folder)


def check_rebuilt(folder: Path, path: Path, text: Text, before: dict[str, tuple[int, bytes]]) -> None:
    """Only that shard is said to be damaged, made and written again; all numbers are right."""
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert_is(collected(cache_in(folder, 16).chunks(text.make)), text)
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert str(path) in str(caught[0].message)
    assert text.skips == [16 * int(path.stem.removeprefix("shard-"))]
    text.skips.clear()
    after = files_of(folder)
    assert {name for name in before if before[name] != after[name]} <= {str(path.relative_to(folder))}
    assert contents_of(folder) == {name: content for name, (_, content) in before.items()}


def test_a_flipped_bit_in_any_byte_is_found_and_the_shard_rebuilt(tmp_path):
    text, before = small_cache(tmp_path)
    path = shard(tmp_path, 1, "model.b:output")
    bits = random.Random(0)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + 16 * 3 * 2, "header and data are both among the bytes"
    for position in range(path.stat().st_size):
        flip(path, position, bits.randrange(8))
        check_rebuilt(tmp_path, path, text, before)
        before = files_of(tmp_path)


def test_a_shard_of_another_length_is_found_and_rebuilt(tmp_path):
    text, before = small_cache(tmp_path)
    path = shard(tmp_path, 1)
    whole = path.read_bytes()
    for content in [*(whole[:n] for n in range(0, len(whole), 7)), whole[:-1], whole + b"\0", whole + whole]:
        path.write_bytes(content)
        check_rebuilt(tmp_path, path, text, before)
        before = files_of(tmp_path)


def test_files_that_are_no_shard_of_this_place_are_found_and_rebuilt(tmp_path):
    text, before = small_cache(tmp_path)
    path, marker = shard(tmp_path, 1), tmp_path.parent / "unpickled"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    collected(cache_in(elsewhere, 16, dict(zip(KEYS, reversed(KEYS.values()), strict=True))).chunks(text.make))
    text.skips.clear()
    contents = [
        shard(tmp_path, 0).read_bytes(),
        shard(tmp_path, 2).read_bytes(),
        shard(tmp_path, 1, "model.b:output").read_bytes(),
        shard(elsewhere, 1).read_bytes(),
        pickle.dumps(Bomb()),
        b"\xff" * 4096,
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        b"{}",
    ]
    for content in contents:
        path.write_bytes(content)
        check_rebuilt(tmp_path, path, text, before)
        before = files_of(tmp_path)
    assert not marker.exists()


def test_a_cache_with_other_shards_is_made_again_and_never_taken_for_a_short_text(tmp_path):
    text = Text(40)
    collected(cache_in(tmp_path, 8).chunks(text.make))
    with pytest.warns(UserWarning, match="not that of this shard"):
        assert_is(collected(cache_in(tmp_path, 16).chunks(text.make)), text)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_shard_that_is_gone_is_made_again_alone(tmp_path, number):
    text, before = small_cache(tmp_path)
    path = shard(tmp_path, number)
    path.unlink()
    assert_is(collected(cache_in(tmp_path, 16).chunks(text.make)), text)
    after = files_of(tmp_path)
    assert text.skips == [16 * number]
    assert contents_of(tmp_path) == {name: content for name, (_, content) in before.items()}
    assert {name for name in before if before[name] != after[name]} == {str(path.relative_to(tmp_path))}


def test_far_holes_are_passes_apart_and_near_ones_share_a_pass(tmp_path):
    text = Text(300)
    collected(cache_in(tmp_path, 20).chunks(text.make))
    for number in (0, 2, 3, 4 + NEARBY + 1):
        shard(tmp_path, number).unlink()
    text.skips.clear()
    text.made = 0
    assert_is(collected(cache_in(tmp_path, 20).chunks(text.make)), text)
    assert text.skips == [0, 20 * (4 + NEARBY + 1)]
    assert text.made <= 4 * 20 + 20 + 2 * text.piece
    for number in (1, 2 + NEARBY):
        shard(tmp_path, number).unlink()
    text.skips.clear()
    assert_is(collected(cache_in(tmp_path, 20).chunks(text.make)), text)
    assert text.skips == [20]


def test_a_text_that_ends_before_stored_shards_is_refused(tmp_path):
    collected(cache_in(tmp_path, 20).chunks(Text(300).make))
    for number in (2, 5):
        shard(tmp_path, number).unlink()
    with pytest.raises(FormatError, match=r"shard 5 .* 0 tokens"):
        collected(cache_in(tmp_path, 20).chunks(Text(75).make))


def test_the_end_of_a_text_that_fills_its_shards_is_found_again(tmp_path):
    text = Text(128)
    collected(cache_in(tmp_path).chunks(text.make))
    for site in KEYS:
        shard(tmp_path, 2, site).unlink()
    for _ in range(2):
        assert_is(collected(cache_in(tmp_path).chunks(text.make)), text)
    assert text.skips == [0, 128]


def test_a_pass_that_fails_leaves_whole_shards_and_no_end_of_the_text(tmp_path):
    text = Text()

    def failing(skip: int) -> Iterator[dict[str, Tensor]]:
        yield from itertools.islice(text.make(skip), 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected(cache_in(tmp_path).chunks(failing))
    assert len(files_of(tmp_path)) == 2 * 3
    assert_is(collected(cache_in(tmp_path).chunks(text.make)), text)
    assert text.skips == [0, 192]


# --- the disk, other processes ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 900])
def test_a_full_disk_is_said_and_leaves_no_part(tmp_path, size):
    text = Text()
    collected(itertools.islice(cache_in(tmp_path).chunks(text.make), 2))
    before = files_of(tmp_path)
    assert min(len(content) for _, content in before.values()) < 900 < max(len(c) for _, c in before.values())
    with largest_file(size), pytest.raises(FileError, match=r"shard-00002.*") as caught:
        collected(cache_in(tmp_path).chunks(text.make))
    assert caught.value.errno
    assert files_of(tmp_path) == before
    assert_is(collected(cache_in(tmp_path).chunks(text.make)), text)


def test_what_cannot_be_read_or_written_is_said(tmp_path):
    text = Text()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file"):
        collected(cache_in(tmp_path / "file").chunks(text.make))
    collected(cache_in(tmp_path / "cache").chunks(text.make))
    path = shard(tmp_path / "cache", 1)
    path.unlink()
    path.mkdir()
    with pytest.raises(FileError, match="shard-00001"):
        collected(cache_in(tmp_path / "cache").chunks(text.make))


def test_parts_that_a_killed_writer_left_go_away_and_those_of_a_living_one_stay(tmp_path):
    text = Text()
    collected(cache_in(tmp_path).chunks(text.make))
    dead, alive = (shard(tmp_path, 0).parent / f".shard-00009.safetensors.{name}" for name in ("dead", "alive"))
    for path in (dead, alive):
        path.write_bytes(b"part")
    old = time.time() - STALE_SECONDS - 60
    os.utime(dead, (old, old))
    assert_is(collected(cache_in(tmp_path).chunks(text.make)), text)
    assert not dead.exists()
    assert alive.exists()


def test_two_writers_at_once_write_the_same(tmp_path):
    texts = [Text(2000), Text(2000)]
    got: dict[int, dict[str, Tensor]] = {}
    start = threading.Barrier(2)

    def write(i: int) -> None:
        start.wait()
        got[i] = collected(cache_in(tmp_path, 16).chunks(texts[i].make))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader = Text(2000)
    got[2] = collected(cache_in(tmp_path, 16).chunks(reader.make))
    assert reader.skips == []
    for x in got.values():
        assert_is(x, reader)
    assert not list(tmp_path.rglob(".*"))


ENDLESS = 4096
"""Tokens in a shard of the endless text: 512 KiB at its wider site, so that many kills hit a write."""


def endless(skip: int) -> Iterator[dict[str, Tensor]]:
    """Activations that never end and that begin anywhere."""
    for number in itertools.count(skip // 1000):
        draw = torch.Generator().manual_seed(number)
        x = torch.randn(1000, 64, generator=draw)[max(0, skip - 1000 * number) :]
        yield {"a": x, "model.b:output": x[:, :16]}


def write_endless(folder: str) -> None:
    for _ in cache_in(Path(folder), ENDLESS).chunks(endless):
        pass


def write_and_tell(folder: str, tokens: int) -> None:
    chunks = cache_in(Path(folder), ENDLESS).chunks(endless)
    total = sum(float(chunk["a"].double().sum()) for chunk in itertools.islice(chunks, tokens // ENDLESS))
    sys.stdout.write(str(total))


def start(call: str) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {tests!r}); import test_activation_cache as t; t.{call}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_writer_is_continued_from_its_last_whole_shard(tmp_path):
    delays = random.Random(0)
    whole = 0
    for _ in range(3):
        child = start(f"write_endless({str(tmp_path)!r})")
        waited = time.monotonic() + 120
        while not list(tmp_path.glob(f"*/shard-{whole + 1:05d}.safetensors")):
            assert child.poll() is None
            assert time.monotonic() < waited
            time.sleep(0.005)
        time.sleep(delays.uniform(0, 0.2))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        left = {site: len(list(shard(tmp_path, 0, site).parent.glob("shard-*"))) for site in KEYS}
        whole = min(left.values())
        assert max(left.values()) <= whole + 1
    before = files_of(tmp_path)
    skips = []

    def make(skip: int) -> Iterator[dict[str, Tensor]]:
        skips.append(skip)
        return endless(skip)

    tokens = (whole + 2) * ENDLESS
    got = collected(itertools.islice(cache_in(tmp_path, ENDLESS).chunks(make), whole + 2))
    assert skips == [whole * ENDLESS]
    assert before.items() <= files_of(tmp_path).items()
    expected = torch.cat([x["a"] for x in itertools.islice(endless(0), -(-tokens // 1000))])[:tokens].bfloat16()
    assert torch.equal(got["a"], expected)
    assert torch.equal(got["model.b:output"], expected[:, :16])


@pytest.mark.slow
def test_two_processes_at_once_write_the_same(tmp_path):
    tokens = 60 * ENDLESS
    children = [start(f"write_and_tell({str(tmp_path)!r}, {tokens})") for _ in range(2)]
    told = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]

    def never(skip: int) -> Iterator[dict[str, Tensor]]:
        raise AssertionError(f"a pass from {skip}")

    got = collected(itertools.islice(cache_in(tmp_path, ENDLESS).chunks(never), tokens // ENDLESS))
    expected = torch.cat([x["a"] for x in itertools.islice(endless(0), -(-tokens // 1000))])[:tokens].bfloat16()
    assert torch.equal(got["a"], expected)
    assert told[0] == told[1]
    assert float(told[0]) == pytest.approx(float(expected.double().sum()))


# --- names -----------------------------------------------------------------------------------------------------------

FACTS: dict[str, Any] = {
    "lm": "tiny",
    "revision": None,
    "weights": "w",
    "site": "layers.1.resid_post",
    "text_sha256": "t",
    "order": "seed 0",
    "tokenizer_sha256": "k",
    "window": 64,
    "mask_rule": "m",
}


def key(**changes: Any) -> str:
    facts: dict[str, Any] = FACTS | changes
    return cache_key(**facts)


def test_every_fact_is_in_the_key():
    assert key() == key()
    assert len(key()) == 64
    others = {key(**{name: 65 if name == "window" else "other"}) for name in FACTS}
    assert len(others | {key()}) == len(FACTS) + 1
    assert key(revision="None") != key()


def test_every_weight_is_in_the_fingerprint(model):
    lm = build_lm("llama")
    fingerprint = weights_fingerprint(lm)
    assert fingerprint == weights_fingerprint(model.lm), "nothing that saehook does to a model is in it"
    assert fingerprint != weights_fingerprint(build_lm("llama", seed=1))
    assert fingerprint != weights_fingerprint(build_lm("llama", dtype=torch.bfloat16))
    assert weights_fingerprint(build_lm("llama", dtype=torch.bfloat16)) != weights_fingerprint(build_lm("mistral"))
    seen = {fingerprint}
    parameters = dict(lm.named_parameters())
    for parameter in parameters.values():
        parameter.data.view(-1)[-1] += 1e-3
        seen.add(weights_fingerprint(lm))
    assert len(seen) == len(parameters) + 1
    lm.config.rms_norm_eps *= 2
    assert weights_fingerprint(lm) not in seen
    with pytest.raises(ArgumentError, match="not in memory"):
        weights_fingerprint(lm.to("meta"))


# --- the language model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return HookedModel(build_lm("llama"), byte_tokenizer())


@functools.cache
def ids() -> Tensor:
    """Windows for three forward passes, special tokens anywhere in them."""
    return torch.randint(0, VOCAB, (150, CONTEXT), generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def counted_passes(model: HookedModel) -> Iterator[list[int]]:
    """Rows of each forward pass."""
    rows: list[int] = []
    handle = model.lm.model.layers[0].register_forward_hook(lambda m, i, o: rows.append(len(i[0])))
    yield rows
    handle.remove()


def test_a_pass_begins_at_any_token_with_the_bits_of_a_whole_one(model):
    whole = list(activations_of(model, SITES, iter(ids())))
    expected = {site: torch.cat([chunk[site] for chunk in whole]) for site in SITES}
    first, tokens = len(whole[0][SITES[0]]), len(expected[SITES[0]])
    assert len(whole) == 3
    make = lm_pass(model, SITES, lambda: iter(ids()))
    cases = {0: 3, 1: 3, first - 1: 3, first: 2, first + 70: 2, tokens - 1: 1, tokens: 0, tokens + 9: 0}
    for skip, passes in cases.items():
        with counted_passes(model) as rows:
            got = collected(make(skip))
        assert len(rows) == passes
        for site in SITES if skip < tokens else ():
            assert torch.equal(got[site], expected[site][skip:])
        assert got or skip >= tokens


def trained(model: HookedModel, chunks: Iterator[dict[str, Tensor]]) -> list[Any]:
    """All that training makes of activations: parameters, and what calibration found."""
    facts: dict[str, Any] = {"d_sae": 48, "tokens": 4000, "batch_tokens": 200, "calibration_tokens": 1000}
    configs = [
        TrainConfig(site=SITES[0], activation=BatchTopK(k=4), **facts),
        TrainConfig(site=SITES[1], activation=TopK(k=4), **facts),
    ]
    batches = Shuffled(chunks, buffer_tokens=1600, batch_tokens=200, seed=0)
    widths = {site: model.width(model.sites(site)[0]) for site in SITES}
    saes = Trainer(configs, batches, d_in=widths, progress=False).fit()
    return [({name: p.tolist() for name, p in sae.named_parameters()}, sae.metadata) for sae in saes]


def test_training_from_the_cache_gives_the_saes_of_a_run_without_one(tmp_path):
    model = HookedModel(build_lm("llama", dtype=torch.bfloat16), byte_tokenizer())
    make = lm_pass(model, SITES, lambda: iter(ids()))
    cache = ActivationCache(tmp_path, {site: key(site=site) for site in SITES}, shard_tokens=500)
    without = trained(model, activations_of(model, SITES, iter(ids())))
    assert trained(model, cache.chunks(make)) == without
    with counted_passes(model) as rows:
        assert trained(model, cache.chunks(make)) == without
    assert not rows


def test_a_float32_model_is_rounded_in_the_first_run_already(model, tmp_path):
    make = lm_pass(model, SITES, lambda: iter(ids()))
    cache = ActivationCache(tmp_path, {site: key(site=site) for site in SITES}, shard_tokens=500)
    first = trained(model, cache.chunks(make))
    with counted_passes(model) as rows:
        assert trained(model, cache.chunks(make)) == first
    assert not rows
    plain = list(activations_of(model, SITES, iter(ids())))
    assert first == trained(model, ({site: x.bfloat16() for site, x in chunk.items()} for chunk in plain))
    assert first != trained(model, iter(plain)), "rounding is not nothing"


def test_a_shard_lost_under_a_real_model_is_made_to_the_same_bytes(model, tmp_path):
    make = lm_pass(model, SITES, lambda: iter(ids()))
    cache = ActivationCache(tmp_path, {site: key(site=site) for site in SITES}, shard_tokens=500)
    collected(cache.chunks(make))
    before = contents_of(tmp_path)
    (path,) = tmp_path.glob(f"{SITES[1]}-*/shard-00011.safetensors")
    flip(path, -20)
    with pytest.warns(UserWarning, match="shard-00011"), counted_passes(model) as rows:
        collected(cache.chunks(make))
    assert rows == [64], "only the forward pass that has these tokens"
    assert contents_of(tmp_path) == before
