"""Activations from text to shuffled batches."""

import pytest
import torch

import saehook
from saehook.errors import ArgumentError
from saehook.harvest import Shuffled, activations_of
from saehook.tokenization import keep_mask, special_ids

SITES = ["layers.1.resid_post", "layers.3.mlp_out"]


@pytest.fixture(scope="module")
def model():
    return saehook.HookedModel.from_pretrained(saehook.bundled("lm"))


def chunks(n_chunks: int, n: int):
    """Rows that say which token they are: the same number at two sites of different width."""
    for i in range(n_chunks):
        numbers = torch.arange(i * n, (i + 1) * n, dtype=torch.float32)[:, None]
        yield {"a": numbers.expand(-1, 3).clone(), "b": numbers.expand(-1, 2).clone() * 10}


def test_activations_are_those_of_a_plain_hook_without_special_tokens(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 4000, (20, 64), generator=generator)
    ids[:, 0] = 0
    ids[3, 40] = 0
    seen = {}
    layers = model.lm.model.layers
    handles = [
        layers[1].register_forward_hook(lambda m, i, o: seen.__setitem__(SITES[0], o)),
        layers[3].mlp.register_forward_hook(lambda m, i, o: seen.__setitem__(SITES[1], o)),
    ]
    with torch.no_grad():
        model.lm(input_ids=ids)
    for handle in handles:
        handle.remove()
    mask = keep_mask(ids, None, special_ids(model.tokenizer))
    assert int(mask.sum()) == 20 * 63 - 1
    got = list(activations_of(model, SITES, iter(ids)))
    for site in SITES:
        torch.testing.assert_close(torch.cat([chunk[site] for chunk in got]), seen[site][mask], rtol=1e-4, atol=1e-4)


def test_the_model_stops_after_the_deepest_site(model):
    ran = []
    handle = model.lm.model.layers[4].register_forward_hook(lambda m, i, o: ran.append(1))
    list(activations_of(model, SITES, iter(torch.ones(2, 16, dtype=torch.long))))
    handle.remove()
    assert not ran


@pytest.mark.parametrize(
    ("n_chunks", "n", "buffer", "batch"), [(10, 7, 20, 5), (3, 100, 40, 20), (1, 8, 64, 4), (4, 5, 10, 5)]
)
def test_every_token_is_served_once_and_sites_stay_aligned(n_chunks, n, buffer, batch):
    served = []
    sizes = []
    for part in Shuffled(chunks(n_chunks, n), buffer_tokens=buffer, batch_tokens=batch, seed=0):
        assert torch.equal(part["a"][:, :2] * 10, part["b"])
        served += part["a"][:, 0].int().tolist()
        sizes.append(len(part["a"]))
    assert sorted(served) == list(range(n_chunks * n))
    assert served != sorted(served)
    assert set(sizes[:-1]) <= {batch}, "only the last batch may be smaller"


def test_tokens_of_distant_chunks_meet_in_a_batch():
    first = next(iter(Shuffled(chunks(100, 10), buffer_tokens=400, batch_tokens=50, seed=0)))["a"][:, 0]
    assert first.max() - first.min() > 300


def test_the_seed_decides_the_order():
    def order(seed):
        return [
            part["a"][:, 0].tolist() for part in Shuffled(chunks(9, 10), buffer_tokens=40, batch_tokens=8, seed=seed)
        ]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_buffer_too_small_to_mix_is_refused():
    with pytest.raises(ArgumentError, match="15"):
        next(iter(Shuffled(chunks(2, 10), buffer_tokens=15, batch_tokens=10, seed=0)))
