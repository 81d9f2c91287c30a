"""From text to files, on a small random model."""

import json

import pytest
import torch
from builders import WIDTH, build_lm, byte_tokenizer

from saehook import BatchTopK, TopK, TrainConfig, load_sae
from saehook.corpus import Document, text_hash
from saehook.dataset_text import DatasetText
from saehook.errors import ArgumentError, SiteError
from saehook.hooked_model import HookedModel
from saehook.tokenization import windows
from saehook.training_run import train_saes

SITES = ("layers.1.resid_post", "layers.2.mlp_out")


def documents(n: int, start: int = 0) -> list[Document]:
    """Made-up prose: enough structure that a site has some."""
    words = "the a red blue cat dog sees runs to from house tree and or with under".split()
    draw = torch.Generator().manual_seed(start)
    return [
        Document(f"d{i}", " ".join(words[j] for j in torch.randint(len(words), (60,), generator=draw)) + ".")
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def model():
    return HookedModel(build_lm("llama"), byte_tokenizer())


def config(site=SITES[0], **changes):
    return TrainConfig(
        **{"site": site, "activation": BatchTopK(k=4), "d_sae": 96, "tokens": 8000, "calibration_tokens": 2000}
        | changes
    )


def test_two_sites_from_one_pass_evaluated_and_stored(model, tmp_path):
    held_out = windows(documents(20, start=9), model.tokenizer, 64)
    training = documents(60)
    run = train_saes(
        model,
        [config(), config(SITES[1], activation=TopK(k=4))],
        training,
        tmp_path,
        held_out=held_out,
        dtype=torch.bfloat16,
        progress=False,
    )
    assert [one.folder.name for one in run.saes] == list(SITES)
    assert run.evaluation is not None
    assert json.loads((tmp_path / "eval.json").read_text()) == json.loads(run.evaluation.to_json())
    x = torch.randn(5, WIDTH)
    for one, row in zip(run.saes, run.evaluation.results, strict=False):
        stored = load_sae(one.folder)
        assert stored.config == one.sae.config
        assert torch.equal(stored.encode(x), one.sae.encode(x)), "what was evaluated is what is stored"
        assert stored.site == row.site
        assert stored.metadata["evaluation"]["delta_ce"] == row.delta_ce
        assert stored.metadata["text"]["sha256"] == text_hash(training)
        assert stored.metadata["training"]["tokens"] == 8000
        assert stored.metadata["lm"]["tokenizer_sha256"]
        assert stored.stats is not None
        assert row.fvu is not None
        assert row.fvu < 1
        hooked = model.attach(stored, check="fingerprint")
        hooked.detach()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["sae"].split("-")[0] for line in lines} == set(SITES)


def test_several_saes_of_one_site_get_folders_of_their_own(model, tmp_path):
    run = train_saes(model, [config(tokens=3000), config(tokens=3000, seed=1)], documents(40), tmp_path, progress=False)
    assert len({one.folder for one in run.saes}) == 2
    assert all((one.folder / "cfg.json").exists() for one in run.saes)
    assert not torch.equal(run.saes[0].sae.W_dec, run.saes[1].sae.W_dec)


def test_the_same_seed_gives_the_same_files(model, tmp_path):
    for name in ("a", "b"):
        train_saes(model, [config(tokens=3000)], documents(40), tmp_path / name, progress=False)
    files = [(tmp_path / name / SITES[0] / "sae_weights.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_text_that_ends_early_is_said_and_can_be_repeated(model, tmp_path):
    few = documents(12)
    with pytest.warns(UserWarning, match="ended early"):
        train_saes(model, [config()], few, tmp_path / "once", progress=False)
    run = train_saes(model, [config()], few, tmp_path / "again", repeat=True, progress=False)
    assert run.saes[0].sae.metadata["tokens_seen"] == 8000
    assert run.saes[0].sae.metadata["text"]["passes"] > 1


def test_a_dataset_is_streamed_and_named_in_the_files(model, tmp_path):
    """Also where it ends early, and is repeated."""
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps({"id": i, "body": d.text}) + "\n" for i, d in enumerate(documents(9)))
    (tmp_path / "data" / "train.jsonl").write_text(lines)
    text = DatasetText(str(tmp_path / "data"), column="body", skip=2)
    more = config(tokens=2400, calibration_tokens=100, batch_tokens=50)
    with pytest.warns(UserWarning, match="ended early|no fresh tokens"):
        once = train_saes(model, [more], text, tmp_path / "once", progress=False).saes[0].sae.metadata
    dataset = {"name": "data", "split": "train", "column": "body", "skip": 2, "fingerprint": text.fingerprint}
    assert once["text"]["dataset"] == dataset
    assert once["text"]["documents"] == 7
    assert once["tokens_seen"] < 2400
    again = train_saes(model, [more], text, tmp_path / "again", repeat=True, progress=False).saes[0].sae.metadata
    assert again["tokens_seen"] == 2400
    assert again["text"]["documents"] > 7


def test_a_dataset_through_the_cache_gives_the_same_twice(model, tmp_path):
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps({"text": d.text}) + "\n" for d in documents(12))
    (tmp_path / "data" / "train.jsonl").write_text(lines)
    text = DatasetText(str(tmp_path / "data"))
    options = {"cache": tmp_path / "cache", "progress": False}
    small = config(tokens=1000, calibration_tokens=100, batch_tokens=50)
    saes = [train_saes(model, [small], text, tmp_path / name, **options).saes[0].sae for name in ("a", "b")]
    assert torch.equal(saes[0].W_dec, saes[1].W_dec)
    assert saes[1].metadata["text"]["cached"]
    assert saes[1].metadata["text"]["dataset"]["name"] == "data"


def test_what_cannot_be_trained_is_refused_before_anything_runs(model, tmp_path):
    cases = [
        (ArgumentError, [], documents(4)),
        (SiteError, [config(site="layers.9.resid_post")], documents(4)),
        (ArgumentError, [config(site="layers.*.resid_post")], documents(4)),
        (ArgumentError, [config(), config()], documents(4)),
    ]
    for error, configs, text in cases:
        with pytest.raises(error):
            train_saes(model, configs, text, tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ArgumentError, match="no window|fills no"):
        train_saes(model, [config()], [Document("a", "tiny")], tmp_path / "tiny", repeat=True, progress=False)


def test_a_run_from_the_cache_needs_no_language_model_and_is_the_same(model, tmp_path):
    """The first run fills the cache and sees what is stored; the second one, of other SAEs, too, makes no LM pass."""
    passes = []
    handle = model.lm.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    options = {"cache": tmp_path / "cache", "progress": False}
    texts = documents(60)
    first = train_saes(model, [config()], texts, tmp_path / "a", **options)
    made = len(passes)
    second = train_saes(model, [config(), config(activation=TopK(k=3))], texts, tmp_path / "b", **options)
    handle.remove()
    assert made >= 4
    assert len(passes) - made <= 2, "only the fingerprints of the SAEs are measured"
    for name, tensor in first.saes[0].sae.named_parameters():
        assert torch.equal(tensor, second.saes[0].sae.get_parameter(name)), name
    assert second.saes[0].sae.metadata["text"]["cached"]


def test_report_and_an_unfinished_run_in_the_way(model, tmp_path):
    train_saes(model, [config()], documents(60), tmp_path, progress=False)
    page = (tmp_path / "report.html").read_text()
    assert SITES[0] in page
    assert "<svg" in page
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "checkpoints" / "step-000000007").mkdir(parents=True)
    with pytest.raises(ArgumentError, match="holds a run that was stopped"):
        train_saes(model, [config()], documents(60), tmp_path, progress=False)
