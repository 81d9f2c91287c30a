"""The slow metrics that need a language model, on planted patterns and a tiny random model."""

import copy
import json
import math

import pytest
import torch
from builders import build_lm, byte_tokenizer, identity_sae, random_ids, tiny_sae

from saehook import HookedModel, bundled
from saehook.checkpoint import save_sae
from saehook.cli import main
from saehook.commands.eval import probe_tasks
from saehook.corpus import Document
from saehook.errors import ArgumentError
from saehook.eval_result import EvalResult
from saehook.suite import METRICS
from saehook.suite.ablation_sparsity import ablation_sparsity, effect_sparsity
from saehook.suite.attribution_accuracy import attribution_accuracy, pearson, ranks, spearman
from saehook.suite.compute_equivalent import checkpoint_losses
from saehook.suite.explanations import ANY, START, explain, explanations, of_latent
from saehook.suite.probe_tasks import ProbeTask
from saehook.suite.progressive_code import loss_by_k, thresholds_for
from saehook.suite.run import run_suite
from saehook.suite.sample import read_samples, spread, window_losses
from saehook.suite.steering import Response, respond, steering, usable_window

RESID, LAST = "layers.0.resid_post", "layers.2.resid_post"


@pytest.fixture
def model(models_by_name):
    return models_by_name("llama")[0]


@pytest.fixture(scope="module")
def ids():
    return torch.tensor([random_ids(39, seed=i, bos=True) for i in range(12)])


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_sample_has_the_tokens_of_the_mask(model, ids):
    hooked = model.attach({RESID: tiny_sae(), LAST: tiny_sae(seed=1)})
    sample = read_samples(hooked, ids)[LAST]
    hooked.detach()
    assert len(sample) == 12 * 39
    assert (sample.column > 0).all()
    with torch.no_grad():
        seen = []
        handle = model.lm.model.layers[2].register_forward_hook(lambda module, inputs, output: seen.append(output))
        model.lm(input_ids=ids)
        handle.remove()
    torch.testing.assert_close(sample.x, seen[0][:, 1:].flatten(0, 1), atol=1e-5, rtol=1e-4)
    assert torch.equal(sample.y, sample.x)
    assert sample.by_window(torch.ones(len(sample))).tolist() == [39.0] * 12


def test_what_cannot_be_read(model, ids):
    hooked = model.attach({RESID: tiny_sae()})
    with pytest.raises(ArgumentError, match=r"shape \(0, 8\).*empty after tokenisation"):
        read_samples(hooked, torch.zeros(0, 8, dtype=torch.long))
    with pytest.raises(ArgumentError, match="no token of the text is in its mask"):
        read_samples(hooked, torch.zeros(2, 8, dtype=torch.long))
    hooked.detach()


def test_tokens_that_are_not_finite_are_counted_and_left_out(ids):
    lm = build_lm("llama")
    poisoned = int(ids[4, 30])
    with torch.no_grad():
        lm.get_input_embeddings().weight[poisoned, 3] = math.nan
    hooked = HookedModel(lm, byte_tokenizer()).attach({RESID: tiny_sae()})
    sample = read_samples(hooked, ids)[RESID]
    struck = (ids == poisoned).any(1)
    behind = (ids == poisoned).cumsum(1) > 0  # attention carries it on, and some kernels back, too
    assert int(behind.sum()) <= sample.not_finite <= 39 * int(struck.sum())
    assert set((~struck).nonzero()[:, 0].tolist()) <= set(sample.row.tolist())
    assert len(sample) + sample.not_finite == 12 * 39
    assert sample.x.isfinite().all()
    hooked.detach()


def test_windows_that_are_too_short(model, ids):
    hooked = model.attach({RESID: tiny_sae()})
    short = ids[:, :12]
    with pytest.raises(ArgumentError, match="over 16 tokens, and windows of 12"):
        ablation_sparsity(hooked, read_samples(hooked, short)[RESID], short)
    hooked.detach()


def test_windows_are_spread_over_the_text():
    ids = torch.arange(40).reshape(10, 4)
    assert spread(ids, 13)[:, 0].tolist() == [0, 12, 24]
    assert len(spread(ids, 1)) == 1
    assert torch.equal(spread(ids, 1000), ids)


# --- ablation sparsity ------------------------------------------------------------------------------------------------


def test_unit_values_of_the_sparsity():
    T, V = 4, 5001
    assert float(effect_sparsity(torch.randn(T, V))) == pytest.approx(2 / math.pi, rel=0.02)
    one = torch.zeros(T, V)
    one[2, 17] = -3.0
    assert float(effect_sparsity(one)) == pytest.approx(1 / (T * V))
    two = one.clone()
    two[0, 9] = 3.0
    assert float(effect_sparsity(two)) == pytest.approx(2 / (T * V))
    assert float(effect_sparsity(one + 5.0)) == pytest.approx(1 / (T * V)), "a constant changes no prediction"
    assert math.isnan(float(effect_sparsity(torch.full((T, V), 2.0))))
    assert effect_sparsity(torch.randn(3, T, V)).shape == (3,)


def test_sparsity_of_latents_against_plain_torch(model, ids):
    hooked = model.attach({LAST: tiny_sae()})
    sample = read_samples(hooked, ids)[LAST]
    latents, coordinates = ablation_sparsity(hooked, sample, ids, n_tokens=3)
    hooked.detach()
    assert latents.n == coordinates.n == 3
    fits = (sample.column + 16 <= 40).nonzero()[:, 0]
    chosen = fits[torch.randperm(len(fits), generator=torch.Generator().manual_seed(0))[:3]].tolist()
    scores = []
    for i in chosen:
        t = int(sample.column[i])
        window = ids[sample.row[i], : t + 16][None]
        acts = sample.sae.encode(sample.x[i])
        for latent in acts.nonzero()[:, 0].tolist():
            delta = acts[latent] * sample.sae.W_dec[latent]

            def ablate(module, inputs, output, t=t, delta=delta):
                output = output.clone()
                output[:, t] -= delta
                return output

            with torch.no_grad():
                clean = model.lm(input_ids=window).logits[0, t:]
                handle = model.lm.model.layers[2].register_forward_hook(ablate)
                edited = model.lm(input_ids=window).logits[0, t:]
                handle.remove()
            scores.append(float(effect_sparsity(edited - clean)))
    assert len(scores) > 10
    if all(len(sample.sae.encode(sample.x[i]).nonzero()) <= 32 for i in chosen):
        assert latents.value == pytest.approx(sum(scores) / len(scores), rel=1e-3)


# --- explanations -----------------------------------------------------------------------------------------------------


def pattern(fires):
    """An activation from a function of the ids up to the last one."""
    return lambda rows: torch.tensor([float(fires(list(row))) for row in rows])


A, B, C, D, FILL = 10, 11, 12, 13, 99


def test_a_single_token_is_explained():
    found = explain(pattern(lambda row: 2.0 * (row[-1] == C)), [[A, B, C], [B, C]], FILL)
    assert list(found.edges) == [C]
    assert found.predict([C, B, C]).tolist() == [2, 0, 2]


def test_a_bigram_and_a_wildcard():
    bigram = explain(pattern(lambda row: row[-2:] == [A, B]), [[D, A, B]], FILL)
    assert bigram.predict([A, B, D, B, A, A, B]).tolist() == [0, 1, 0, 0, 0, 0, 1]
    gap = explain(pattern(lambda row: len(row) > 2 and row[-1] == C and row[-3] == A), [[D, A, B, C]], FILL)
    assert list(gap.edges[C].edges) == [ANY]
    assert gap.predict([A, D, C, A, C, C, C]).tolist() == [0, 0, 1, 0, 0, 1, 0]


def test_the_start_of_the_text():
    found = explain(pattern(lambda row: len(row) == 1), [[A], [B]], FILL)
    assert list(found.edges) == [ANY]
    assert list(found.edges[ANY].edges) == [START]
    assert found.predict([D, A, B]).tolist() == [1, 0, 0]


def test_values_are_those_of_the_shortest_suffix():
    found = explain(pattern(lambda row: 0.5 * min(len(row), 4) * (row[-1] == C)), [[A, B, D, A, C]], FILL)
    assert found.predict([D, C]).tolist() == [0, 1.0]
    assert explain(pattern(lambda row: 0), [[A]], FILL).predict([A]).tolist() == [0]
    assert explain(pattern(lambda row: 0), [], FILL).predict([A]).tolist() == [0]


def test_a_latent_that_reads_one_token_is_explained_fully(models_by_name, ids):
    """Precision, recall and recovered loss are 1: a latent of the embeddings fires on one byte and nothing else."""
    model = models_by_name("llama")[0]
    site = "model.embed_tokens:output"
    sae = tiny_sae(d_sae=64)
    tokens = ids[:, 1:].unique()[:20]
    ids = tokens[torch.randint(20, (16, 40), generator=torch.Generator().manual_seed(1))]
    ids[:, 0] = 0
    with torch.no_grad():
        rows = model.lm.get_input_embeddings().weight[tokens]
        sae.W_enc.zero_()
        sae.W_enc[:, :20] = torch.linalg.pinv(rows)
        sae.b_enc.fill_(-0.5)
        sae.b_dec.zero_()
    hooked = model.attach({site: sae})
    sample = read_samples(hooked, ids)[hooked.sites[0]]
    found = explanations(hooked, sample, ids, n_latents=12, examples=4)
    latent = found.latents[0]
    assert float(of_latent(hooked, hooked.sites[0], latent)([[int(tokens[latent])]])) == pytest.approx(0.5, abs=1e-4)
    hooked.detach()
    assert [measure.value for measure in found.measures[:2]] == [1.0, 1.0]
    assert found.measures[2].value == pytest.approx(1.0, abs=1e-3)
    assert found.measures[0].n == 12


# --- losses -----------------------------------------------------------------------------------------------------------


def test_loss_at_all_latents_of_an_identity_is_the_clean_loss(model, ids):
    hooked = model.attach({RESID: identity_sae()})
    sample = read_samples(hooked, ids)[RESID]
    found = {measure.name: measure for measure in loss_by_k(hooked, sample, ids, [2, 64])}
    hooked.detach()
    assert found["delta_ce_topk.64"].value == pytest.approx(0.0, abs=1e-6)
    assert found["delta_ce_threshold.64"].value == pytest.approx(0.0, abs=1e-6)  # θ is 0: half of the 64 are positive
    assert abs(found["delta_ce_topk.2"].value) > 0.01
    assert found["delta_ce_topk.2"].tokens == 12 * 38


def test_loss_at_a_threshold_against_a_hook(model, ids):
    sae = tiny_sae(seed=4, activation="topk")
    hooked = model.attach({RESID: sae})
    sample = read_samples(hooked, ids)[RESID]
    (theta,) = thresholds_for(sample, [5])
    (_, found) = loss_by_k(hooked, sample, ids, [5])
    clean = model.loss(ids)
    hooked.detach()
    assert found.note == f"θ {theta:.4g}"

    def splice(module, inputs, output):
        pre = sae.pre_acts(output)
        x_hat = (pre * (pre > max(theta, 0))) @ sae.W_dec + sae.b_dec
        return torch.where((ids < 3)[..., None], output, x_hat)

    handle = model.lm.model.layers[0].register_forward_hook(splice)
    with torch.no_grad():
        logits = model.lm(input_ids=ids).logits
    handle.remove()
    losses = torch.nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())
    with torch.no_grad():
        before = torch.nn.functional.cross_entropy(
            model.lm(input_ids=ids).logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten()
        )
    assert found.value == pytest.approx(float(losses - before), abs=1e-4)
    assert clean > 0


def test_window_losses_are_the_models_own(model, ids):
    hooked = model.attach({RESID: identity_sae()})
    losses = window_losses(hooked, ids, torch.ones_like(ids, dtype=torch.bool), {})
    hooked.detach()
    assert float(losses.sum()) / (12 * 39) == pytest.approx(model.loss(ids), abs=1e-5)


def test_losses_of_checkpoints(models_by_name):
    model, other = models_by_name("llama")[0], models_by_name("gpt2")[0]
    hooked = model.attach({RESID: identity_sae()})
    ids = torch.tensor([random_ids(20, seed=i) for i in range(3)])
    losses = checkpoint_losses(hooked, ((step, lm) for step, lm in [(20, other), (3, model)]), ids)
    assert list(losses) == [3, 20]
    assert losses[3].shape == (3, 19)
    means = [float(each.mean()) for each in losses.values()]
    assert means == pytest.approx([model.loss(ids), other.loss(ids)], abs=1e-5)
    with pytest.raises(ArgumentError, match="two checkpoints have the step 3"):
        checkpoint_losses(hooked, [(3, model), (3, other)], ids)
    foreign = HookedModel(model.lm, copy.deepcopy(byte_tokenizer()))
    foreign.tokenizer.add_tokens(["<new>"])
    with pytest.raises(ArgumentError, match="another tokenizer"):
        checkpoint_losses(hooked, [(3, foreign)], ids)
    hooked.detach()


def test_the_training_that_a_spliced_loss_is_worth(model, ids):
    """With x in place of x: all of it. With another SAE: what the curve says of its spliced loss."""
    worse = build_lm("llama")
    with torch.no_grad():
        worse.lm_head.weight.mul_(3)  # surer than it may be
    checkpoints = [(10, HookedModel(worse, byte_tokenizer())), (1000, model)]
    texts = ids[:, :24]
    losses = [lm.loss(texts) for _, lm in checkpoints]
    assert losses[0] > losses[1] + 0.1
    hooked = model.attach({RESID: identity_sae()})
    result = run_suite(hooked, texts, lm_checkpoints=checkpoints, only=["compute_equivalent"], progress=False)
    hooked.detach()
    (row,) = result.rows
    assert (row.measure.value, row.measure.low, row.measure.high) == pytest.approx((1, 1, 1), abs=1e-4)
    assert row.measure.note == "2 checkpoints, the last at 1000"
    assert result.provenance["lm_checkpoints"] == [10, 1000]


def test_saes_of_one_site_are_compared(model, ids):
    sae = tiny_sae(seed=1)
    with torch.no_grad():
        other = tiny_sae(seed=1)
        order = torch.randperm(sae.d_sae)
        for name in ("W_enc", "b_enc", "W_dec"):
            own = getattr(sae, name)
            getattr(other, name).copy_(own[:, order] if name == "W_enc" else own[order])
    hooked = model.attach({RESID: [sae, other], LAST: tiny_sae(seed=2)})
    names = dict(zip(hooked.sites, ("one", "two", "three"), strict=True))
    result = run_suite(hooked, ids, only=["stability"], names=names, progress=False)
    hooked.detach()
    assert {(row.sae, row.site, row.metric) for row in result.rows} == {("one, two", RESID, "stability")}
    assert {row.measure.name: row.measure.value for row in result.rows} == {
        "max_cosine": pytest.approx(1, abs=1e-5),
        "shared_latents": 1.0,
    }


def test_what_there_is_nothing_to_compare_with(model, ids):
    hooked = model.attach({RESID: tiny_sae()})
    with pytest.raises(ArgumentError, match="stability compares SAEs of one site"):
        run_suite(hooked, ids, only=["stability"])
    with pytest.raises(ArgumentError, match="none are given"):
        run_suite(hooked, ids, only=["compute_equivalent"])
    hooked.detach()


# --- steering and attribution -----------------------------------------------------------------------------------------


def test_windows_of_use():
    strengths = [0.5, 1, 2, 4, 8]
    assert usable_window(strengths, [0, 2, 3, 4, 5], [0, 0, 0.5, 3, 4], [0] * 5) == (1, 2)
    assert usable_window(strengths, [0, 2, 3, 4, 5], [0, 2, 2, 3, 4], [0] * 5) is None
    assert usable_window(strengths, [2, 0, 2, 2, 2], [0] * 5, [0, 0, 0, 0, 0.9]) == (2, 4)
    assert usable_window(strengths, [2, 0, 2, 2, 2], [0] * 5, [0, 0, 0, 0.9, 0]) == (0.5, 0.5)


def test_a_direction_of_the_unembedding_raises_its_token(model, ids):
    """At the last site the promoted tokens must gain, and the more the stronger."""
    sae = tiny_sae(seed=2)
    with torch.no_grad():
        sae.W_dec[5] = model.lm.get_output_embeddings().weight[77] / model.lm.get_output_embeddings().weight[77].norm()
    hooked = model.attach({LAST: sae})
    prompts = [row[:8] for row in ids[:2]]
    found = respond(hooked, LAST, 5, 4.0, prompts)
    assert isinstance(found, Response)
    assert model.tokenizer.decode([77]) in found.promoted
    assert found.gain == sorted(found.gain)
    assert found.gain[-1] > 1
    assert all(kl >= 0 for kl in found.kl)
    assert found.kl == sorted(found.kl)
    hooked.detach()
    wide = model.attach({"layers.1.mlp_act": tiny_sae(48)})
    sample = read_samples(wide, ids)["layers.1.mlp_act"]
    with pytest.raises(ArgumentError, match="which the unembedding does not take"):
        steering(wide, sample, ids)
    wide.detach()


def test_correlations():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert pearson(a, 3 * a - 7) == pytest.approx(1)
    assert spearman(a, -(a**3)) == pytest.approx(-1)
    assert math.isnan(pearson(a, torch.ones(4)))
    assert ranks(torch.tensor([5.0, 1.0, 5.0, 9.0])).tolist() == [2.5, 1, 2.5, 4]


def test_first_order_is_near_ablation_for_small_latents(model, ids):
    sae = tiny_sae()
    with torch.no_grad():
        sae.W_dec.mul_(1e-3)
    hooked = model.attach({RESID: tiny_sae(seed=3), LAST: sae})
    found = attribution_accuracy(hooked, ids, n_rows=4)
    hooked.detach()
    measures = {m.name: m for m in found[LAST]}
    assert measures["attribution_pearson"].value > 0.99
    assert measures["attribution_pearson"].n == 4
    assert list(found) == [RESID, LAST]


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_suite_is_plain_data(models_by_name, ids):
    model = models_by_name("gpt2")[0]
    hooked = model.attach({RESID: tiny_sae(), "layers.1.mlp_act": tiny_sae(48, seed=1)})
    texts = [f"{i} {'a' if i % 2 else 'b'}" for i in range(160)]
    tasks = [ProbeTask("letter", texts, [bool(i % 2) for i in range(160)])]
    result = run_suite(hooked, ids, tasks=tasks, names={RESID: "mine"}, progress=False)
    hooked.detach()
    data = json.loads(result.to_json())
    assert {row["metric"] for row in data["rows"]} == set(METRICS) - {"stability", "compute_equivalent"}
    assert all({"value", "low", "high", "unit", "n", "of", "tokens"} <= row.keys() for row in data["rows"])
    # No latent of one of the random SAEs stands for the letter, and the MLP's channels are no directions of the residual stream.
    assert sorted(gone["metric"] for gone in data["left_out"]) == ["absorption", "steering"]
    assert len(data["steering"][RESID][0]["gain"]) == 6
    assert "mine" in result.table()


def test_some_of_the_suite(model, ids):
    hooked = model.attach({RESID: tiny_sae(), "layers.1.mlp_act": tiny_sae(48, seed=1)})
    with pytest.raises(ArgumentError, match="no metric 'magic'; there are latent_quality"):
        run_suite(hooked, ids, only=["magic"])
    only = ["latent_quality", "ablation_sparsity", "steering"]
    hooked.detach()
    hooked = model.attach({"layers.1.mlp_act": tiny_sae(48, seed=1)})
    result = run_suite(hooked, ids, only=only, names={"layers.1.mlp_act": "mine"}, progress=False)
    hooked.detach()
    assert list(dict.fromkeys(row.metric for row in result.rows)) == only[:2]
    assert [gone["metric"] for gone in result.left_out] == ["steering"]
    assert result.provenance["tokens"] == {"layers.1.mlp_act": 12 * 39}
    table = result.table()
    assert "mine  ablation_sparsity" in table
    assert "layers.1.mlp_act: no steering: the latents at" in table
    assert json.loads(result.to_json())["rows"][0]["metric"] == "latent_quality"


def test_the_command_adds_the_suite_to_its_file_and_its_page(tmp_path, capsys):
    tasks = tmp_path / "tasks.jsonl"
    rows = ({"text": f"x = {i}{end}", "labels": {"closed": end == ")"}} for i in range(60) for end in (")", ","))
    tasks.write_text("\n".join(map(json.dumps, rows)))
    out, sae = tmp_path / "eval.json", str(bundled("sae"))
    arguments = ["eval", "--sae", sae, "--tokens", "3k", "--json", str(out), "--probe-tasks", str(tasks)]
    assert main(arguments) == 2
    assert "--probe-tasks is for --suite full or absorption or probe_loss" in capsys.readouterr().err
    assert main([*arguments, "--suite", "shrinkage", "probe_loss"]) == 0
    shown = capsys.readouterr().out
    assert "refinement_shift" in shown
    data = json.loads(out.read_text())
    assert {row["metric"] for row in data["suite"]["rows"]} == {"shrinkage", "probe_loss"}
    assert [row.sae for row in EvalResult.from_json(out.read_text()).results] == ["sae"]
    assert main(["report", str(out)]) == 0
    page = out.with_suffix(".html").read_text()
    assert "refinement shift" in page
    assert "probe loss.closed" in page


def test_metrics_that_compare_several_things_from_the_shell(tmp_path, capsys):
    """Two SAEs of one site, and a curve of checkpoints that says nothing: two times the same model."""
    lm = tmp_path / "lm"
    build_lm("gpt2").save_pretrained(lm)
    byte_tokenizer().save_pretrained(lm)
    (tmp_path / "text.txt").write_text("the cat sees a red house and the dog runs under the tree . " * 60)
    for seed in (0, 1):
        save_sae(tiny_sae(seed=seed, site=RESID), tmp_path / f"seed{seed}")
    out = tmp_path / "eval.json"
    base = ["eval", "--lm", str(lm), "--text", str(tmp_path / "text.txt"), "--tokens", "1k", "--json", str(out)]
    base += ["--sae", str(tmp_path / "seed0"), str(tmp_path / "seed1"), "--suite"]
    assert main([*base, "stability", "compute_equivalent", "--lm-checkpoints", f"1k={lm}", f"2k={lm}"]) == 0
    assert "shared_latents" in capsys.readouterr().out
    suite = json.loads(out.read_text())["suite"]
    assert {(row["sae"], row["metric"]) for row in suite["rows"]} == {("seed0, seed1", "stability")}
    assert suite["provenance"]["lm_checkpoints"] == [1000, 2000]
    assert {gone["metric"] for gone in suite["left_out"]} == {"compute_equivalent"}
    one = base[: base.index("--sae")] + ["--sae", str(tmp_path / "seed0"), "--suite", "stability"]
    assert main(one) == 2
    said = capsys.readouterr()
    assert "stability compares SAEs of one site" in said.err
    assert not said.out, "before the evaluation"
    assert main([*base, "stability", "--lm-checkpoints", f"1k={lm}"]) == 2
    assert "--lm-checkpoints is for --suite full or compute_equivalent" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*base, "compute_equivalent", "--lm-checkpoints", str(lm)])
    assert "STEP=LM is expected" in capsys.readouterr().err


def test_where_probe_tasks_come_from(tmp_path):
    line = "def f_{0}(x):\n    return [x, x + {0}]  # the same again\n"
    source = [Document(f"{i}.py", "".join(line.format(10 * i + j) for j in range(10))) for i in range(20)]
    made = {task.name for task in probe_tasks(None, source, seed=0)}
    assert "in_comment" in made
    assert "in_docstring" not in made
