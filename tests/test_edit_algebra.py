"""Programs of every op, place, error and norm against the reference, however the model runs them."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import reference_hooks as reference
import torch
from builders import ACTIVATIONS, BOS, SPECIAL, WIDTH, build_lm, byte_tokenizer, random_ids, tiny_sae

from saehook.config import AbsTopK, MaskRule, TopK
from saehook.edits import ablate, at_least, at_most, clamp, keep_only, scale, steer, to_mean
from saehook.errors import ArgumentError, MissingStatError, NoEffectWarning
from saehook.hooked_model import HookedModel
from saehook.interventions import NO_ACTIVE_ONLY, NO_UNIT, NO_VALUE, Edit, Program
from saehook.where import Where, generation, prompt, span, token_ids, tokens

# Those of the reference in `reference_hooks.py`; the others are in test_programs.py.
OPS = ("set", "add", "scale", "ablate", "min", "max", "mean", "keep_only")
UNITS = ("raw", "max", "norm")

pytestmark = pytest.mark.filterwarnings("ignore::saehook.errors.NoEffectWarning")

FEW = ["llama", "gpt2", "gpt_neox", "gemma2"]
SITE = "layers.1.resid_post"
IDS = [*random_ids(8, seed=5, bos=True), 1, 40]  # with an EOS
OTHER = random_ids(5, seed=6, bos=True)


def random_where(rng: random.Random) -> Where:
    where = rng.choice([Where(), Where(), prompt(), generation(), tokens(0, 2), tokens(-1)])
    more: dict[str, Any] = {}
    if rng.random() < 0.3:
        more["positions"] = rng.choice([(0, 4), (3, None), (2, 12)])
    if rng.random() < 0.2:
        more["token_ids"] = tuple(range(0, 300, 2))
    if rng.random() < 0.2:
        more["rows"] = (rng.choice([0, 1]),)
    return dataclasses.replace(where, special=rng.random() < 0.3, **more)


def random_edit(rng: random.Random, op: str) -> Edit:
    return Edit(
        op=op,
        latents=tuple(rng.sample(range(48), rng.choice([1, 3]))),
        value=None if op in NO_VALUE else rng.uniform(-1, 2),
        unit="raw" if op in NO_UNIT else rng.choice(UNITS),
        active_only=op not in NO_ACTIVE_ONLY and rng.random() < 0.4,
        where=random_where(rng),
    )


def random_programs(n: int, seed: int) -> list[Program]:
    """Programs of one to three edits; every op is the first of n / len(OPS) of them."""
    rng = random.Random(seed)
    result = []
    for first in itertools.islice(itertools.cycle(OPS), n):
        edits = [random_edit(rng, op) for op in [first, *rng.choices(OPS, k=rng.choice([0, 1, 2]))]]
        options: dict[str, Any] = rng.choice([{}, {"error": "keep"}, {"error": "drop"}, {"splice": True}])
        result.append(Program(edits=edits, norm=rng.choice([None, None, "preserve", {"cap": 0.3}]), **options))
    return result


def attach(models_by_name: Any, name: str, **sae: Any) -> tuple[Any, Any]:
    """(handle, plain torch model with the same weights)."""
    model, lm = models_by_name(name)
    made = tiny_sae(site=SITE, **sae)
    made.mask_rule = MaskRule(skip_first_tokens=1)
    return model.attach(made), lm


def site_values(hooked: Any, ids: Any, program: Any) -> torch.Tensor:
    """x' at the site, [rows, n, d]: what the next layer reads."""
    seen = []
    layer = reference._place(hooked.lm, "layers.2.resid_pre")[0]
    handle = layer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone()),
        with_kwargs=True,
    )
    with torch.no_grad():
        hooked(ids, program)
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("name", FEW)
def test_a_forward_pass_equals_the_reference_alone_and_in_a_batch(models_by_name, name, normalize):
    for number, program in enumerate(random_programs(24, seed=len(name))):
        kind = list(ACTIVATIONS)[number % 4]
        hooked, lm = attach(models_by_name, name, activation=kind, normalize=normalize, seed=number)
        with torch.no_grad():
            batch = hooked([IDS, OTHER], program).logits
        for row, ids in enumerate((IDS, OTHER)):
            expected = reference.logits(lm, ids, program, hooked.saes, special=SPECIAL, prompt=len(ids), number=row)
            torch.testing.assert_close(batch[row, -len(ids) :], expected, rtol=0, atol=1e-4, msg=program.to_json())
            if row == 0 and not any(edit.where.rows == (1,) for edit in program.edits):
                with torch.no_grad():
                    torch.testing.assert_close(hooked(ids, program).logits[0], expected, rtol=0, atol=1e-4)
        hooked.detach()


@pytest.mark.parametrize("activation", [AbsTopK(k=6), TopK(k=6)], ids=str)
@pytest.mark.parametrize("normalize", ["none", "constant_norm", "layer_norm"])
def test_edits_of_signed_and_normalising_saes_by_the_formula(models_by_name, activation, normalize):
    """x' = x + σ(x) (z' - z) W_dec, with σ written out, latents of both signs among the edited ones."""
    model, lm = models_by_name("llama")
    sae = tiny_sae(activation=activation, normalize=normalize, site=SITE, seed=5)
    ids = torch.tensor([IDS])
    hooked = model.attach(sae)
    acts = hooked.latents(ids)[0].acts
    fired = acts.abs().sum(0).topk(3).indices.tolist()
    edits = [scale(fired[0], 0.25), steer(fired[1], 1.5), clamp(40, -0.7), ablate(fired[2])]
    with torch.no_grad():
        found = hooked(ids, edits).logits
        spliced = hooked(ids, splice=True).logits
        clean = hooked(ids).logits

    def tokens_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the SAE sees, what takes it back (factor and mean), [n, d] and [n, 1]."""
        zero = torch.zeros_like(x[:, :1])
        if normalize == "constant_norm":
            sigma = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            return x / sigma, sigma, zero
        if normalize == "layer_norm":
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            return (x - mean) / (std + 1e-5), std, mean
        return x, zero + 1, zero

    def rule(x: torch.Tensor, edited: bool) -> torch.Tensor:
        seen, sigma, mean = tokens_of(x)
        pre = (seen - sae.b_dec) @ sae.W_enc + sae.b_enc
        kept = (pre.abs() if isinstance(activation, AbsTopK) else pre).topk(6).indices
        z = torch.zeros_like(pre).scatter(-1, kept, pre.gather(-1, kept))
        z = z if isinstance(activation, AbsTopK) else z.relu()
        if not edited:
            return (z @ sae.W_dec + sae.b_dec) * sigma + mean
        new = z.clone()
        new[:, fired[0]] *= 0.25
        new[:, fired[1]] += 1.5
        new[:, 40] = -0.7
        new[:, fired[2]] = 0
        return x + sigma * ((new - z) @ sae.W_dec)

    def expected(edited: bool) -> torch.Tensor:
        special = torch.isin(ids, torch.tensor(SPECIAL))[0]

        def replace(module: Any, args: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            x = torch.where(special[:, None], x[0], rule(x[0], edited))[None]
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = reference._place(lm, "layers.1.resid_post")[0].register_forward_hook(replace)
        with torch.no_grad():
            logits = lm(input_ids=ids).logits
        handle.remove()
        return logits

    torch.testing.assert_close(found, expected(True), rtol=0, atol=1e-4)
    torch.testing.assert_close(spliced, expected(False), rtol=0, atol=1e-4)
    assert (found - clean).abs().max() > 0.1
    assert isinstance(activation, TopK) == (acts >= 0).all()
    hooked.detach()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_generation_equals_the_reference_loop_in_every_way_of_running(models_by_name, name):
    hooked, lm = attach(models_by_name, name, activation="topk", seed=3)
    new, close = 6, 0
    programs = random_programs(8, seed=1)
    for program in programs:
        rows = [
            reference.generate(lm, ids, program, hooked.saes, special=SPECIAL, new=new, number=row)
            for row, ids in enumerate((IDS, OTHER))
        ]
        if min(margin for _, margin in rows) < 1e-3:  # rounding may decide here
            close += 1
            continue
        expected = [ids for ids, _ in rows]
        for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            ours = hooked.generate([IDS, OTHER], program, max_new_tokens=new, **settings)
            assert [g.new_ids.tolist() for g in ours] == expected, (settings, program.to_json())
        returned = hooked.generate([IDS, OTHER], program, max_new_tokens=1, num_beams=3, num_return_sequences=2)
        assert [g.new_ids.tolist() for g in returned[::2]] == [ids[:1] for ids in expected], program.to_json()
        if not any((edit.where.rows or (0,)) != (0,) for edit in program.edits):
            for settings in ({}, {"prompt_lookup_num_tokens": 3}):
                assert hooked.generate(IDS, program, max_new_tokens=new, **settings).new_ids.tolist() == expected[0]
    assert close <= len(programs) // 4
    hooked.detach()


# --- single rules, by hand -------------------------------------------------------------------------------------------


def test_what_each_op_makes_of_a_latent(models_by_name):
    hooked, lm = attach(models_by_name, "llama")
    sae = hooked.saes[SITE]
    x = reference.read(lm, SITE, torch.tensor([IDS]))[0]
    z = hooked.latents(IDS).acts
    firing, silent = int(z[3].argmax()), int((z[3] == 0).nonzero()[0])
    high = float(z[3, firing])
    assert sae.stats is not None
    mean = [float(sae.stats.mean_act[latent]) for latent in (firing, silent)]
    cases = [
        (at_least(firing, high + 1), firing, high + 1),
        (at_least(firing, high - 1), firing, high),
        (at_most(firing, high - 0.1), firing, high - 0.1),
        (at_most(firing, high + 1), firing, high),
        (at_least(silent, 0.5), silent, 0.5),
        (at_least(silent, 0.5, active_only=True), silent, 0.0),
        (at_most(silent, -0.5), silent, -0.5),
        (to_mean(firing), firing, mean[0]),
        (to_mean(silent), silent, mean[1]),
        (to_mean(silent, active_only=True), silent, 0.0),
        (steer(silent, 2.0, active_only=True), silent, 0.0),
        (steer(firing, 2.0, active_only=True), firing, high + 2),
        (clamp(firing, 2.0, active_only=True), firing, 2.0),
        (scale(firing, 2.0, active_only=True), firing, 2 * high),
    ]
    for edit, latent, result in cases:
        changed = site_values(hooked, IDS, [dataclasses.replace(edit, where=tokens(3))])[0]
        expected = x[3] + (result - float(z[3, latent])) * sae.W_dec[latent].detach()
        torch.testing.assert_close(changed[3], expected, msg=str(edit))
        assert torch.equal(changed[3], x[3]) == (result == float(z[3, latent])), edit
        changed[3] = x[3]
        assert torch.equal(changed, x)
    hooked.detach()


def test_keep_only_takes_the_others_out_and_keeps_the_error(models_by_name):
    hooked, lm = attach(models_by_name, "llama")
    sae = hooked.saes[SITE]
    x = reference.read(lm, SITE, torch.tensor([IDS]))[0, 3]
    z = sae.encode(x).detach()
    rest = z.clone()
    rest[[4, 9]] = 0.0
    expected = (x - rest @ sae.W_dec).detach()
    only = keep_only((4, 9), where=tokens(3))
    torch.testing.assert_close(site_values(hooked, IDS, [only])[0, 3], expected)
    torch.testing.assert_close(site_values(hooked, IDS, [only, only])[0, 3], expected)
    # Edits before it are of what is emptied, edits behind it are of 0.
    before = site_values(hooked, IDS, [clamp(20, 5.0), only])[0, 3]
    torch.testing.assert_close(before, expected)
    after = site_values(hooked, IDS, [only, steer(20, 5.0)])[0, 3]
    torch.testing.assert_close(after, expected + 5.0 * sae.W_dec[20].detach())
    dropped = site_values(hooked, IDS, Program(edits=[only], error="drop"))[0, 3]
    torch.testing.assert_close(dropped, sae.decode(z - rest).detach())
    everything = site_values(hooked, IDS, [keep_only(range(48), where=tokens(3))])[0, 3]
    assert torch.equal(everything, x)
    hooked.detach()


@pytest.mark.parametrize("error", ["keep", "drop"])
def test_active_only_leaves_a_token_without_the_latent_bit_for_bit(models_by_name, error):
    hooked, lm = attach(models_by_name, "llama")
    x = reference.read(lm, SITE, torch.tensor([IDS]))[0]
    z = hooked.latents(IDS).acts
    latent = int(((z > 0).sum(0) - 4).abs().argmin())
    firing = (z[:, latent] > 0) & hooked.latents(IDS).mask
    assert 0 < firing.sum() < len(IDS) - 3
    program = Program(edits=[steer(latent, 2.0, active_only=True)], error=error)
    changed = site_values(hooked, IDS, program)[0]
    assert torch.equal((changed != x).any(-1), firing)
    report = hooked.generate(IDS, program, max_new_tokens=1).report
    assert report.edits[0].tokens == int(firing.sum())
    hooked.detach()


def test_an_active_only_edit_of_a_silent_latent_is_named(models_by_name):
    hooked, _ = attach(models_by_name, "llama")
    with torch.no_grad():
        hooked.saes[SITE].b_enc[7] = -1e9
    with pytest.warns(NoEffectWarning, match="min 7 1 where active .* selected no token.*ever active"):
        hooked.loss(IDS, [at_least(7, 1.0, active_only=True)])
    hooked.detach()


def test_the_mean_needs_statistics(models_by_name):
    hooked, _ = attach(models_by_name, "llama", stats=False)
    with pytest.raises(MissingStatError, match="'mean' needs .* no statistics"):
        hooked(IDS, [to_mean(3)])
    hooked.detach()


@pytest.mark.parametrize("options", [{"error": "keep"}, {"error": "drop"}, {"splice": True}])
def test_the_norm_is_preserved_or_capped(models_by_name, options):
    hooked, lm = attach(models_by_name, "gpt2")
    x = reference.read(lm, SITE, torch.tensor([IDS]))[0]
    edits = [steer(9, 3.0, unit="norm", where=span(2, 6)), steer(4, 0.01, where=span(2, 4))]
    free = site_values(hooked, IDS, Program(edits=edits, **options))[0]
    kept = site_values(hooked, IDS, Program(edits=edits, norm="preserve", **options))[0]
    capped = site_values(hooked, IDS, Program(edits=edits, norm={"cap": 0.3}, **options))[0]
    touched = (free != x).any(-1)
    assert touched[2:6].all()
    torch.testing.assert_close(kept.norm(dim=-1), x.norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(kept, free), torch.ones(len(IDS)))
    ratio = (capped - x).norm(dim=-1) / x.norm(dim=-1)
    assert (ratio <= 0.3 + 1e-5).all()
    torch.testing.assert_close(cosine(capped - x, free - x)[touched], torch.ones(int(touched.sum())))
    for values in (kept, capped):
        assert torch.equal(values[~touched], x[~touched])
    loose = site_values(hooked, IDS, Program(edits=edits, norm={"cap": 1e6}, **options))[0]
    assert torch.equal(loose, free), "a cap that nothing reaches changes no bit"
    for some in (edits, edits[:1]):
        result = hooked.generate(IDS, Program(edits=some, norm={"cap": 0.3}, **options), max_new_tokens=1)
        assert 0 < result.report.sites[0].dose <= 0.3 + 1e-5
    hooked.detach()


def test_norms_of_nothing():
    from saehook.edit_blocks import LatentBlock
    from saehook.editing import EditAction
    from saehook.positions import Positions

    sae = tiny_sae(WIDTH)
    ids = torch.tensor([[5, 6, 7]])
    x = torch.randn(1, 3, WIDTH)
    x[0, 1] = 0.0
    x[0, 2] = -1.5 * sae.W_dec[3].detach()
    x.requires_grad_()
    for norm in ("preserve", {"cap": 0.5}):
        edit = steer(3, 1.5)
        program = Program(edits=[edit], norm=norm)
        action = EditAction([LatentBlock(sae, [(0, edit)], program)], program)
        new = action(x, Positions(ids, None, SPECIAL).view(0, ids))
        assert torch.equal(new[0, 1], x[0, 1]), "a token of norm 0 stays"
        assert new.isfinite().all()
        assert torch.autograd.grad(new.sum(), x)[0].isfinite().all()
    edit = steer(3, 0.0)
    program = Program(edits=[edit], norm="preserve")
    for same in (x, x * 1e30):  # the norm of the second is beyond float32
        action = EditAction([LatentBlock(sae, [(0, edit)], program)], program)
        new = action(same, Positions(ids, None, SPECIAL).view(0, ids))
        assert torch.equal(new, same), "what no edit changes keeps its bits"


def test_rows_are_those_of_the_input(models_by_name):
    hooked, lm = attach(models_by_name, "llama")
    edits = [steer(9, 3.0, where=Where(rows=(1,))), ablate((1, 2), where=Where(tokens=(7,), rows=(0,)))]
    rows = hooked.generate([IDS, OTHER], edits, max_new_tokens=3, num_return_sequences=3, num_beams=3)
    assert len(rows) == 6
    for row, ids in enumerate((IDS, OTHER)):
        alone = [
            dataclasses.replace(e, where=dataclasses.replace(e.where, rows=None)) for e in edits[1 - row : 2 - row]
        ]
        single = hooked.generate(ids, alone, max_new_tokens=3, num_return_sequences=3, num_beams=3)
        assert [g.ids.tolist() for g in rows[3 * row : 3 * row + 3]] == [g.ids.tolist() for g in single]
    for call in (hooked, hooked.loss, hooked.generate):
        with pytest.raises(ArgumentError, match=r"row 2 is outside the 2 rows .* 0\.\.1"):
            call([IDS, OTHER], [steer(9, 3.0, where=Where(rows=(0, 2)))])
    hooked.detach()


def test_special_tokens_and_ids(models_by_name):
    model, lm = models_by_name("llama")
    hooked = model.attach(tiny_sae(site=SITE))
    ids = [BOS, 20, 1, 30, 20]
    x = reference.read(lm, SITE, torch.tensor([ids]))[0]

    def touched(where: Where) -> list[int]:
        return (site_values(hooked, ids, [steer(3, 2.0, where=where)])[0] != x).any(-1).nonzero()[:, 0].tolist()

    assert touched(Where(special=True)) == [0, 1, 2, 3, 4]
    assert touched(token_ids(20, 1)) == [1, 4]
    assert touched(Where(token_ids=(20, 1), special=True)) == [1, 2, 4]
    assert touched(Where(token_ids=(20, 1), special=True, positions=(2, None))) == [2, 4]
    hooked.saes[SITE].mask_rule = MaskRule(skip_first_tokens=1)
    assert touched(Where(special=True)) == [1, 2, 3, 4], "the SAE's own rule holds for special tokens, too"
    hooked.detach()


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [1e20, 1e38])
def test_a_length_that_float32_cannot_hold_is_named(amount):
    """x' itself may be finite; the sum of its squares, which every normalisation takes, would not be."""
    hooked = HookedModel(build_lm("llama"), byte_tokenizer()).attach(tiny_sae(site=SITE))
    edit = steer(7, amount, where=Where(positions=(2, None), rows=(1,)))
    expected = (
        rf"add 7 .* at {SITE} gave a vector whose length torch.float32 cannot hold, first at token 2 \(.*\) of row 1"
    )
    for call in (hooked, hooked.loss, hooked.generate):
        with pytest.raises(ArgumentError, match=expected):
            call([IDS, OTHER], edit)
    assert hooked(IDS, steer(7, 1e15)).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_the_dtype_cannot_hold_is_named(dtype):
    hooked = HookedModel(build_lm("llama", dtype=dtype), byte_tokenizer()).attach(tiny_sae(site=SITE))
    largest = torch.finfo(dtype).max
    edit = steer((7, 9), largest / 2, where=Where(positions=(2, None), rows=(1,)))
    expected = rf"add 7, 9 .* at {SITE} gave a value that {dtype} cannot hold, first at token 2 \(.*\) of row 1"
    with torch.no_grad():
        hooked.saes[SITE].W_dec[[7, 9]] = 3.0
        for call in (hooked, hooked.loss, hooked.generate):
            with pytest.raises(ArgumentError, match=expected):
                call([IDS, OTHER], edit)
        with pytest.raises(ArgumentError, match=expected):
            hooked.generate([IDS, OTHER], edit, do_sample=True, seed=1, num_return_sequences=2)
        later = steer(7, largest / 2, where=generation())
        with pytest.raises(ArgumentError, match=f"first at token {len(IDS)} .* of row 0"):
            hooked.generate(IDS, later, max_new_tokens=3)
        capped = Program(edits=[edit], norm={"cap": 0.5})
        if dtype == torch.float16:
            assert hooked([IDS, OTHER], capped).logits.isfinite().all()
        else:  # beyond float32, in which edits are computed, nothing is left to shorten
            with pytest.raises(ArgumentError, match=expected):
                hooked([IDS, OTHER], capped)
        assert hooked([IDS, OTHER]).logits.isfinite().all()
