"""Quantiles from counted bins against those of all values."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saehook.metrics import BINS, BINS_PER_OCTAVE, Histogram
from saehook.sae import QUANTILE_LEVELS

WIDTH = 2 ** (1 / BINS_PER_OCTAVE) - 1
"""The largest relative error."""


def draw(n: int, d_sae: int, *, seed: int = 0, share: float = 0.3) -> Tensor:
    """Exponential activations of latents of very different size, positive on `share` of the tokens, else 0."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.linspace(-4, 4, d_sae)
    values = -torch.log1p(-torch.rand(n, d_sae, generator=generator)) * scale
    return values * (torch.rand(n, d_sae, generator=generator) < share)


def exact(acts: Tensor) -> Tensor:
    """[d_sae, levels]; 0 where nothing is positive."""
    levels = torch.tensor(QUANTILE_LEVELS, dtype=torch.float64)
    rows = [row[row > 0].double() for row in acts.T]
    return torch.stack([row.quantile(levels) if len(row) else torch.zeros(len(levels)).double() for row in rows])


def counted(*parts: Tensor) -> Histogram:
    histogram = Histogram(parts[0].shape[1])
    for part in parts:
        histogram.update(part)
    return histogram


def quantiles(acts: Tensor, *, chunk: int = 10_000) -> Tensor:
    return counted(*acts.split(chunk)).quantiles(QUANTILE_LEVELS, acts.amax(0))


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    return ((found - expected) / expected).abs()


def test_quantiles_of_many_activations():
    acts = draw(20_000, 12)
    found = quantiles(acts, chunk=999)
    error = relative_error(found, exact(acts))
    assert error.max() < 0.015
    assert found.dtype == torch.float32
    assert found.shape == (12, len(QUANTILE_LEVELS))


@pytest.mark.parametrize(
    "shape",
    [
        lambda u: 3.0 + 0 * u,  # always the same
        lambda u: torch.where(u < 0.5, 1.0, 1000.0),  # two values
        lambda u: 2.0 ** ((u * 40).floor() / BINS_PER_OCTAVE),  # on the edges of bins
        lambda u: u**8,  # small ones beyond the range of the bins
        lambda u: torch.where(u < 0.999, u, 1e4 * u),  # rare large ones
        lambda u: 1e-42 + 1e-42 * u,  # subnormal
        lambda u: 1e38 * (1 + u),
    ],
)
def test_the_bound_holds_for_any_distribution_and_number(shape: Callable[[Tensor], Tensor]):
    generator = torch.Generator().manual_seed(1)
    for n in (1, 2, 3, 10, 1000):
        acts = shape(torch.rand(n, 20, generator=generator)).float()
        expected, found = exact(acts), quantiles(acts, chunk=7)
        lowest = 2 ** ((2 - BINS) / BINS_PER_OCTAVE) * acts.amax(0)[:, None].double()
        assert ((found - expected).abs() <= 1.0001 * (WIDTH * expected + lowest)).all()
        assert (found.diff(dim=1) >= 0).all()
        assert (found[:, -1] <= acts.amax(0)).all()


def test_what_never_fired_has_no_quantiles():
    acts = draw(50, 4)
    acts[:, 2] = 0
    acts[:, 1] *= -1
    found = quantiles(acts)
    assert not found[1:3].any()
    assert found[[0, 3]].all()
    assert not Histogram(4).quantiles(QUANTILE_LEVELS, torch.zeros(4)).any()


def test_order_and_processes_do_not_matter(monkeypatch):
    """The largest activations come first, last or in another process; the same counts."""
    acts = draw(3000, 40, share=0.01)
    acts = acts[acts.sum(1).argsort()]
    acts[:, 7] = 0
    acts[:1500, 8] = 0
    acts[1500:, 9] = 0
    together = counted(acts)
    rising, falling = counted(*acts.split(50)), counted(*acts.flip(0).split(50))
    monkeypatch.setattr("saehook.metrics.ROWS_AT_ONCE", 6)
    parts = [counted(*part.split(100)) for part in acts.split(1000)]
    before = parts[1].counts.clone()
    merged = Histogram(40)
    for part in (parts[1], parts[2], parts[0], Histogram(40)):
        merged.merge(part)
    assert torch.equal(parts[1].counts, before), "what is merged stays as it is"
    for other in (rising, falling, merged):
        assert torch.equal(other.counts, together.counts)
        assert torch.equal(other.top, together.top)
    assert torch.equal(together.counts.sum(1), (acts > 0).sum(0))
    assert torch.equal(merged.quantiles(QUANTILE_LEVELS, acts.amax(0)), quantiles(acts))


def test_single_entries_are_those_of_a_dense_table():
    acts = draw(200, 30).bfloat16()
    found = Histogram(30)
    tokens, latents = acts.nonzero(as_tuple=True)
    found.add(acts[tokens, latents], latents.int())
    assert torch.equal(found.counts, counted(acts).counts)
