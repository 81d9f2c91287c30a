"""Settings as data: combinations, defaults, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from saehook.config import METHODS, BatchTopK, Gated, JumpReLU, Matryoshka, MultiTopK, ReLU, TopK, TrainConfig
from saehook.errors import ArgumentError, FileError, FormatError
from saehook.sweep import expand, read_settings

SITES = {"layers.1.resid_post": 32, "layers.2.resid_post": 32, "layers.2.mlp_out": 16}


def find(pattern: str) -> list[str]:
    if pattern == "layers.*.resid_post":
        return [site for site in SITES if site.endswith("resid_post")]
    assert pattern in SITES
    return [pattern]


def expanded(**settings: Any) -> list[TrainConfig]:
    base: dict[str, Any] = {"site": "layers.2.mlp_out", "tokens": "10k"}
    return expand({**base, **settings}, find, SITES.__getitem__)


def test_defaults():
    (config,) = expanded()
    assert config.activation == BatchTopK(k=32)
    assert config.d_sae == 16 * 16
    assert config.tokens == 10_000
    assert config == TrainConfig(site="layers.2.mlp_out", activation=BatchTopK(k=32), d_sae=256, tokens=10_000)


def test_lists_mean_all_combinations():
    configs = expanded(
        site=["layers.*.resid_post", "layers.1.resid_post", "layers.2.mlp_out"],
        activation=["topk", "JumpReLU"],
        k=[2, 4],
        seed=[0, 1],
        d_sae="1k",
        lr="1e-3",
    )
    assert len(set(configs)) == len(configs) == 3 * 2 * 2 * 2
    assert {c.site for c in configs} == set(SITES)
    assert {c.activation for c in configs} == {TopK(k=2), TopK(k=4), JumpReLU()}
    assert {c.target_l0 for c in configs if c.activation == JumpReLU()} == {2, 4}
    assert {c.lr for c in configs} == {1e-3}
    assert {c.d_sae for c in configs} == {1000}


def test_a_setting_goes_to_the_methods_that_have_it():
    configs = expanded(activation=["topk", "jumprelu"], bandwidth=[0.01, 0.1], k=8)
    assert [(c.activation, c.bandwidth) for c in configs if c.activation == JumpReLU()] == [
        (JumpReLU(), 0.01),
        (JumpReLU(), 0.1),
    ]
    assert sum(c.activation == TopK(k=8) for c in configs) == 1, "and makes no doubles of the others"
    assert expanded(activation="matryoshka", k=4, fractions=[0.5, 0.5])[0].activation == Matryoshka(
        k=4, fractions=(0.5, 0.5)
    )
    two = expanded(activation="matryoshka", k=4, fractions=[[0.5, 0.5], [0.25, 0.75]])
    assert [c.activation for c in two] == [Matryoshka(k=4, fractions=f) for f in ((0.5, 0.5), (0.25, 0.75))]
    assert expanded(activation="multitopk", k=4, multiple=2, weight="0.5")[0].activation == MultiTopK(
        k=4, multiple=2, weight=0.5
    )
    (config,) = expanded(activation="relu", sparsity_coefficient=0.1)
    assert (config.activation, config.target_l0) == (ReLU(), None)


def test_tables_of_their_own():
    configs = expanded(saes=[{"activation": "topk", "k": 4}, {"activation": "gated", "target-l0": [3, 5]}], d_sae=64)
    assert [c.activation for c in configs] == [TopK(k=4), Gated(), Gated()]
    assert [c.target_l0 for c in configs] == [None, 3, 5]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_name_and_needs_nothing_else(name):
    (config,) = expanded(activation=name, k=4)
    assert isinstance(config.activation, METHODS[name])
    assert (config.k or config.target_l0) == 4


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"activtion": "topk"}, "Did you mean activation"),
        ({"saes": [{"kk": 3}]}, "'kk' is no setting"),
        ({"saes": "topk"}, "list of tables"),
        ({"activation": "tanh"}, "activation 'tanh' is unknown"),
        ({"activation": "topk", "bandwidth": 0.1}, "bandwidth = 0.1 has no meaning for topk"),
        ({"activation": "topk", "fractions": [1.0]}, "fractions"),
        ({"k": []}, "empty list"),
        ({"lr": "fast"}, "no number"),
        ({"tokens": "many"}, "not a count"),
        ({"site": None}, "no site is given"),
        ({"d_sae": 8}, "more latents than d_sae"),
    ],
)
def test_what_cannot_be_meant(settings, match):
    with pytest.raises(ArgumentError, match=match):
        expanded(**settings)


def test_files(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "site: layers.2.mlp_out\nd-sae: 64\nactivation: [topk, batchtopk]\nk: [2, 4]\ntokens: 2e4\nlr: 1e-3\n"
    )
    settings = read_settings(file)
    assert settings["d_sae"] == 64
    configs = expand(settings, find, SITES.__getitem__)
    assert [c.activation for c in configs] == [TopK(k=2), TopK(k=4), BatchTopK(k=2), BatchTopK(k=4)]
    assert {(c.tokens, c.lr) for c in configs} == {(20_000, 1e-3)}
    with pytest.raises(FileError, match="cannot read"):
        read_settings(tmp_path / "nothing.yaml")
    for text, error in (("a: [1", FormatError), ("- 1", FormatError), ("sites: 3", ArgumentError)):
        file.write_text(text)
        with pytest.raises(error):
            read_settings(file)
    file.write_text("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(FormatError, match="is no YAML"):
        read_settings(file)
