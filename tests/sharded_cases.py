"""What the processes of a world do with a finished SAE that they share, against the whole one on each."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build_lm, byte_tokenizer, random_ids
from distributed_cases import MeshOf, assert_near

from saehook import HookedModel, Program, ablate, clamp, keep_only, latent, steer
from saehook.checkpoint import load_sae, save_sae
from saehook.config import AbsTopK, Activation, BatchTopK, JumpReLU, ReLU, SAEConfig, TopK
from saehook.distributed.sharded_sae import ShardedSAE, load_sharded
from saehook.errors import ArgumentError
from saehook.evaluation import evaluate
from saehook.sae import SAE, LatentStats
from saehook.sparse_acts import SparseActs, encode, reconstructed

SITE = "layers.1.resid_post"
IDS = random_ids(12, seed=5, bos=True)
D_SAE = 47
RULES: tuple[Activation, ...] = (TopK(k=5), TopK(k=20), BatchTopK(k=5), JumpReLU(), ReLU(), AbsTopK(k=4))


def whole_sae(activation: Activation, d_in: int, *, transcoder: bool = False) -> SAE:
    """Random, float64, with statistics."""
    draw = torch.Generator().manual_seed(5)
    config = SAEConfig(d_in=d_in, d_sae=D_SAE, activation=activation)
    if transcoder:
        config = dataclasses.replace(config, d_out=d_in, skip=True, subtract_b_dec=False)
    sae = SAE(config, site=SITE, generator=draw).double()
    for p in (sae.W_enc, sae.b_enc, sae.b_dec):
        p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64) / 3
    if sae.W_skip is not None:
        sae.W_skip.data = torch.randn(sae.W_skip.shape, generator=draw, dtype=torch.float64) / 9
    if isinstance(activation, (BatchTopK, JumpReLU)):
        sae.set_threshold(torch.rand(D_SAE, generator=draw) if isinstance(activation, JumpReLU) else 0.4)
    ones = torch.rand(D_SAE, generator=draw) + 0.5
    sae.stats = LatentStats(ones, ones / 2, ones / 4, 100, None, torch.zeros(d_in))
    return sae


def works_alike(mesh_of: MeshOf, data: int, latent_devices: int, folder: str) -> int:
    """Encoding, decoding, gradients and files of every rule."""
    mesh, cases = mesh_of(data, latent_devices), 0
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, 7, 16, generator=draw, dtype=torch.float64)
    for number, activation in enumerate(RULES):
        for transcoder in (False, True):
            if transcoder and isinstance(activation, AbsTopK):
                continue
            sae = whole_sae(activation, 16, transcoder=transcoder)
            shared = ShardedSAE.of_whole(sae, mesh)
            given = [x.clone().requires_grad_() for _ in range(2)]
            found, expected = (reconstructed(one, inputs) for one, inputs in zip((shared, sae), given, strict=True))
            assert isinstance(found[1], SparseActs)
            acts = expected[1].dense() if isinstance(expected[1], SparseActs) else expected[1]
            assert_near(found[1].dense(), acts, (activation, "acts"))
            assert_near(found[0], expected[0], (activation, "x_hat"))
            for (x_hat, _), inputs in zip((found, expected), given, strict=True):
                x_hat.square().sum().backward()
                assert inputs.grad is not None
            assert_near(given[0].grad, given[1].grad, (activation, "gradient"))  # type: ignore[arg-type]
            out, other = shared(x), sae(x)
            for a, b, what in zip(out, other, ("x_hat", "acts", "pre_acts"), strict=True):
                assert_near(a, b, (activation, what))
            some = torch.tensor([46, 0, 23])
            assert torch.equal(shared.decoder_rows(some), sae.decoder_rows(some))
            assert torch.equal(shared.encoder_rows(some), sae.encoder_rows(some))
            with pytest.raises(ArgumentError, match="lies on"):
                _ = shared.W_dec
            if isinstance(activation, AbsTopK) or transcoder:
                continue
            ours, theirs = Path(folder) / f"ours{number}", Path(folder) / f"theirs{number}"
            shared.store(ours, torch.float32)
            if mesh.rank == 0:
                save_sae(sae, theirs, dtype=torch.float32)
                for name in ("cfg.json", "stats.safetensors"):
                    assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
                for (name, p), q in zip(load_sae(ours).named_parameters(), load_sae(theirs).parameters(), strict=True):
                    assert torch.equal(p, q), name
            mesh.check_same({"all have written": True})
            again = load_sharded(ours, mesh)
            assert_near(encode(again, x.float()).dense().double(), acts, (activation, "read again"), 1e-5)
            whole = again.whole() if isinstance(again, ShardedSAE) else again
            if whole is not None:
                assert_near(whole.W_enc.double(), sae.W_enc, (activation, "whole"), 1e-6)
            cases += 1
    return cases


PROGRAMS = {
    "steer": [steer(3, 2.0), steer(40, 0.5, unit="max")],
    "clamp, ablate": [clamp([1, 30], 1.5), ablate(7)],
    "read back": [clamp(12, 1.0, mode="readback")],
    "when": [steer(5, 3.0, when=~(latent(41) > 0.1))],
    "keep only": [keep_only([2, 20, 44])],
}


def edits_alike(mesh_of: MeshOf, data: int, latent_devices: int) -> list[Any]:
    """Logits, texts, latents and evaluation of a language model with the shared SAE and with the whole one."""
    mesh = mesh_of(data, latent_devices)
    model = HookedModel.from_pretrained(build_lm("llama"), byte_tokenizer())
    saes = [whole_sae(TopK(k=6), model.width(model.sites(SITE)[0])).float(), None]
    saes[1] = ShardedSAE.of_whole(copy.deepcopy(saes[0]), mesh)
    said: list[Any] = []
    results = []
    for sae in saes:
        hooked = model.attach(sae)
        found: dict[str, Any] = {"latents": hooked.latents(IDS).acts, "splice": hooked(IDS, splice=True).logits}
        for name, edits in PROGRAMS.items():
            for error in ("keep",) if name == "read back" else ("keep", "drop", "mean"):
                with torch.no_grad():
                    found[f"{name}, {error}"] = hooked(IDS, edits=Program(edits=edits, error=error)).logits
        text = hooked.generate(IDS, edits=PROGRAMS["steer"], max_new_tokens=6, do_sample=True, seed=1)
        found["text"] = text.ids
        with torch.no_grad(), hooked.trace(IDS):
            z = hooked.at(SITE).latents.output
            z[..., 9] = 2.0
            traced = hooked.nnsight.output.logits.save()
        found["trace"] = traced
        windows = torch.randint(5, 90, (6, 16), generator=torch.Generator().manual_seed(0))
        row = evaluate(hooked, windows, check="off", progress=False).results[0].numbers()
        results.append((found, row))
        hooked.detach()
    (expected, row), (ours, our_row) = results
    for name, value in expected.items():
        assert_near(ours[name].double(), value.double(), name, 2e-4)
    assert torch.equal(ours["text"], expected["text"])
    for name, value in row.items():
        if isinstance(value, float):
            assert our_row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    said.append(our_row)
    if data * latent_devices > 1:
        other = IDS if mesh.rank == 0 else [*IDS[:-1], IDS[-1] + 1]
        hooked = model.attach(saes[1])
        with pytest.raises(ArgumentError, match="other activations at its site"):
            hooked.latents(other)
    return said
