"""SAEs so wide that runs hold only what fires: the same results as the dense path, and no tensor of its size."""

from __future__ import annotations

import functools
import logging
import operator
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ACTIVATIONS, BOS, random_ids, tiny_sae
from torch import Tensor
from work_counter import Work

from saehook import (
    HookedModel,
    Program,
    ablate,
    at_least,
    clamp,
    keep_only,
    kernels,
    latent,
    load_sae,
    save_sae,
    scale,
    steer,
)
from saehook import resample as resampled
from saehook.config import BatchTopK, TopK
from saehook.edit_blocks import Encoder
from saehook.errors import ArgumentError, FormatError, LatentError, MissingStatError
from saehook.evaluation import evaluate
from saehook.kernels import blockwise
from saehook.latent_stats import measure_stats
from saehook.sae import SAE
from saehook.sparse_acts import SparseActs, encode

SITE = "layers.1.resid_post"
IDS = random_ids(12, bos=True)


@pytest.fixture
def wide(monkeypatch) -> None:
    """Every SAE counts as wide, and few latents are treated together."""
    monkeypatch.delenv("SAEHOOK_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "WIDE_FROM", 1)
    monkeypatch.setattr(blockwise, "LATENTS_AT_ONCE", 7)


def dense_path(monkeypatch) -> None:
    monkeypatch.setenv("SAEHOOK_KERNELS", "reference")


def tokens(n: int = 9, **kind: Any) -> Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(1), **kind)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encode_is_the_dense_one(wide, activation, normalize):
    sae = tiny_sae(activation=activation, normalize=normalize).double()
    x = tokens(dtype=torch.float64).view(3, 3, 32)
    found, expected = encode(sae, x), sae.encode(x)
    torch.testing.assert_close(found.dense(), expected)
    assert len(found.values) == int((expected != 0).sum())
    some = torch.tensor([40, 3, 17])
    torch.testing.assert_close(found.columns(some), expected[..., some])
    left = expected.clone()
    left[..., some] = 0.0
    left[1] = 0.0
    of_token_1 = torch.tensor([[0], [1], [0]]).bool().expand(3, 3)
    torch.testing.assert_close(found.without(some, of_token_1).dense(), left)
    torch.testing.assert_close(found.sum_rows(sae), expected @ sae.W_dec)
    single = found.sum_rows(sae, torch.float32)
    torch.testing.assert_close(single, (expected @ sae.W_dec).float(), rtol=1e-5, atol=1e-5)


def test_ties_zeros_and_no_token(wide):
    sae = tiny_sae(activation=TopK(k=9))
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(1.0)
    assert encode(sae, tokens()).dense().sum(-1).tolist() == [9.0] * 9, "exactly k of equal ones"
    with torch.no_grad():
        sae.b_enc.zero_()
    assert len(encode(sae, tokens()).values) == 0
    for activation in ACTIVATIONS:
        nothing = encode(tiny_sae(activation=activation), tokens(0))
        assert nothing.sum_rows(sae).shape == (0, 32)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_gradients_are_those_of_the_dense_path(wide, activation):
    results = []
    for way in (encode, SAE.encode):
        sae, x = tiny_sae(activation=activation).double(), tokens(dtype=torch.float64).requires_grad_()
        found = way(sae, x)
        if isinstance(found, SparseActs):
            with torch.no_grad():
                assert torch.equal(encode(sae, x).values, found.values), "gradients change no bit"
        x_hat = found.sum_rows(sae) if isinstance(found, SparseActs) else found @ sae.W_dec
        part = found.columns(torch.arange(5)) if isinstance(found, SparseActs) else found[:, :5]
        wanted = (x, sae.W_enc, sae.b_enc, sae.b_dec, sae.W_dec)
        results.append(torch.autograd.grad(x_hat.square().sum() + part.sum(), wanted))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_without_threshold_it_is_an_error(wide):
    sae = tiny_sae()
    sae.config = type(sae.config)(d_in=32, d_sae=48, activation=BatchTopK(k=4))
    with pytest.raises(MissingStatError, match="without threshold"):
        encode(sae, tokens())


SOME_FIRE = functools.reduce(operator.or_, (latent(i) > 0.5 for i in range(8, 24)))
PROGRAMS: dict[str, Program] = {
    "steer": Program(edits=[steer(3, 2.0), steer(5, 0.1, unit="norm")]),
    "clamp, ablate": Program(edits=[clamp(3, 2.0), scale([5, 7], 0.5, active_only=True), clamp(3, 1.0, unit="max")]),
    "keep_only": Program(edits=[keep_only([1, 2, 30, 31]), clamp(4, 1.0)]),
    "drop": Program(edits=[ablate([3, 5]), keep_only([1, 2, 9])], error="drop"),
    "splice": Program(edits=[at_least(3, 1.0)], splice=True),
    "only splice": Program(splice=True),
    "mean": Program(edits=[clamp(3, 1.0)], error="mean"),
    "conditions": Program(edits=[steer(3, 2.0, when=SOME_FIRE), resampled(4, (0, 3))]),
}


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_edits_do_the_same(wide, monkeypatch, models_by_name, program, activation):
    model = models_by_name("llama")[0]
    hooked = model.attach(tiny_sae(activation=activation, site=SITE))
    with torch.no_grad():
        found, report = hooked(IDS, program).logits, hooked.report(IDS, program)
        assert isinstance(Encoder(hooked.saes[SITE])(tokens(), report), SparseActs)  # type: ignore[arg-type]
        dense_path(monkeypatch)
        expected, other = hooked(IDS, program).logits, hooked.report(IDS, program)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [e.tokens for e in report.edits] == [e.tokens for e in other.edits]
    assert [e.dose for e in report.edits] == pytest.approx([e.dose for e in other.edits], rel=1e-4)
    assert float((found - model(IDS).logits).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_values_read_back_are_the_same(wide, monkeypatch, models_by_name, activation):
    hooked = models_by_name("llama")[0].attach(tiny_sae(activation=activation, site=SITE))
    edit = clamp([3, 8], 2.5, mode="readback")
    found = hooked.generate(IDS, edit, max_new_tokens=4)
    dense_path(monkeypatch)
    expected = hooked.generate(IDS, edit, max_new_tokens=4)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.report.edits[0].residual == pytest.approx(expected.report.edits[0].residual, abs=1e-4)


def test_latents_are_the_same(wide, monkeypatch, models_by_name):
    hooked = models_by_name("llama")[0].attach(tiny_sae(activation="topk", site=SITE))
    found = hooked.latents(IDS)
    dense_path(monkeypatch)
    expected = hooked.latents(IDS)
    assert isinstance(found.held, SparseActs)
    assert isinstance(expected.held, Tensor)
    torch.testing.assert_close(found.acts, expected.acts)
    assert found.l0().tolist() == expected.l0().tolist()
    for one, other in ((found.top(20), expected.top(20)), (found.at(-2), expected.at(-2))):
        assert [(hit.latent, hit.position) for hit in one] == [(hit.latent, hit.position) for hit in other]
    strongest = found.top(1)[0].latent
    torch.testing.assert_close(found.of(strongest), expected.acts[:, strongest])
    torch.testing.assert_close(expected.of(strongest), expected.acts[:, strongest])
    with pytest.raises(LatentError, match=r"0\.\.47"):
        found.of(48)


def test_a_result_too_large_is_refused_and_the_others_go_on(wide, monkeypatch, models_by_name):
    hooked = models_by_name("llama")[0].attach(tiny_sae(activation="topk", site=SITE))
    sae = hooked.saes[SITE]
    dense = evaluate(hooked, torch.tensor([IDS, IDS]), progress=False)
    stats = measure_stats(hooked, torch.tensor([IDS]), progress=False)[SITE]
    monkeypatch.setattr("saehook.sae.DENSE_ENTRIES", 4 * 48)
    monkeypatch.setattr("saehook.results.DENSE_ENTRIES", 4 * 48)
    assert sae.encode(tokens(4)).shape == (4, 48)
    for ask in (sae.encode, sae.pre_acts, sae):
        with pytest.raises(ArgumentError, match=r"9 tokens x 48 latents .* hooked\.latents\(text\).*sparse_acts"):
            ask(tokens())
    with pytest.raises(ArgumentError, match="too many for one dense tensor"):
        hooked.latents(IDS).acts  # noqa: B018
    assert hooked.latents(IDS).l0().sum() > 0
    again = evaluate(hooked, torch.tensor([IDS, IDS]), progress=False)
    numbers = [{k: v for k, v in r.results[0].numbers().items() if k not in {"sae", "site"}} for r in (again, dense)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    torch.testing.assert_close(measure_stats(hooked, torch.tensor([IDS]), progress=False)[SITE].max_act, stats.max_act)
    dense_path(monkeypatch)
    assert sae.encode(tokens()).shape == (9, 48)


def test_the_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.delenv("SAEHOOK_KERNELS", raising=False)
    kernels._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="saehook"):
        assert [kernels.by_blocks(n) for n in (2**18, 2**20, 2**18 - 1, 64)] == [True, True, False, False]
        monkeypatch.setenv("SAEHOOK_KERNELS", "sparse")
        assert kernels.by_blocks(64)
    assert [record.getMessage() for record in caplog.records] == [
        "blockwise kernels, because d_sae >= 262,144 at inference",
        "dense kernels, because d_sae < 262,144 at inference",
        "blockwise kernels, because SAEHOOK_KERNELS=sparse",
    ]


@pytest.mark.parametrize("program", [PROGRAMS["clamp, ablate"], PROGRAMS["splice"], PROGRAMS["keep_only"]])
def test_no_tensor_of_tokens_times_latents(wide, models_by_name, program):
    model: HookedModel = models_by_name("llama")[0]
    sae = tiny_sae(d_sae=4096, activation=TopK(k=4), site=SITE)
    hooked = model.attach(sae)
    assert len(IDS) * 4096 > 4 * (most := 8192)
    with torch.no_grad(), Work() as work:
        hooked.run(IDS, hooked.plan(program).actions)
        hooked.latents(IDS)
    assert max(work.allocated) <= most
    with Work() as work:
        sae.encode(tokens(len(IDS)))
    assert max(work.allocated) == len(IDS) * 4096, "it would be seen"


def test_a_mapped_file_gives_the_same(tmp_path, models_by_name):
    model = models_by_name("llama")[0]
    for dtype in (torch.float32, torch.bfloat16):
        folder = save_sae(tiny_sae(activation="topk", site=SITE), tmp_path / str(dtype), dtype=dtype)
        whole, mapped = load_sae(folder), load_sae(folder, mapped=True)
        assert mapped.dtype == dtype
        assert mapped.mapped
        expected = model.attach(whole)(IDS, steer(3, 2.0)).logits
        torch.testing.assert_close(model.attach(mapped)(IDS, steer(3, 2.0)).logits, expected)
    with pytest.raises(ArgumentError, match="mapped=True"):
        load_sae(folder, mapped=True, device="meta")


def test_what_is_damaged_in_a_mapped_file_is_found_where_it_is_used(wide, tmp_path, models_by_name):
    from safetensors.torch import load_file, save_file

    model = models_by_name("llama")[0]
    folder = save_sae(tiny_sae(activation="topk", site=SITE), tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    for name, place in (("W_dec", (3, 1)), ("W_enc", (1, 3))):
        broken = {key: value.clone() for key, value in tensors.items()}
        broken[name][place] = torch.nan
        save_file(broken, folder / "sae_weights.safetensors")
        with pytest.raises(FormatError, match=f"{name} holds NaN"):
            load_sae(folder)
        hooked = model.attach(load_sae(folder, mapped=True))
        with pytest.raises(FormatError, match="the file is damaged"):
            hooked.report(IDS, clamp(3, 1.0))
        if name == "W_dec":
            assert hooked.report(IDS, clamp(4, 1.0)).edits[0].tokens == len([i for i in IDS if i != BOS])


@pytest.mark.slow
def test_a_million_latents_in_little_memory():
    """Peak resident memory of a process of its own, against [128 tokens, 1 M latents] in float32."""
    script = Path(__file__).with_name("wide_sae.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
