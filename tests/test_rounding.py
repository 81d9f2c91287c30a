"""Stochastic rounding and 8-bit codes: between which neighbours, how often, and that the bits depend on place alone."""

from __future__ import annotations

import pytest
import torch

from saehook import rounding

STEP = torch.tensor(3)


def bits(rows: int, width: int, *, seed: int = 0, first: int = 0, step: int = 3) -> torch.Tensor:
    return rounding.random_bits(seed, torch.tensor(step), torch.arange(first, first + rows), width)


def test_the_bits_of_a_number_follow_from_its_place():
    whole = bits(10, 7)
    assert torch.equal(whole[4:6], bits(2, 7, first=4))
    assert torch.equal(whole[:, :3], bits(10, 3))
    for other in (bits(10, 7, seed=1), bits(10, 7, step=4)):
        assert not (other == whole).any()


def test_the_bits_are_as_good_as_random():
    found = bits(256, 256)
    assert found.unique().numel() == found.numel()
    ones = torch.stack([(found >> i & 1).double().mean() for i in range(rounding.BITS)])
    assert float((ones - 0.5).abs().max()) < 5 * 0.5 / 256, "each bit is set half of the time"
    for a, b in ((found, found.roll(1, 0)), (found, found.roll(1, 1)), (found, bits(256, 256, step=4))):
        same = torch.stack([((a ^ b) >> i & 1).double().mean() for i in range(rounding.BITS)])
        assert float((same - 0.5).abs().max()) < 5 * 0.5 / 256, "and says nothing about its neighbours"


def test_bfloat16_is_right_on_average():
    x = torch.linspace(-2, 2, 64).repeat(4096, 1) * 1.0117
    rounded = rounding.to_bfloat16(x, bits(*x.shape)).float()
    assert len(rounded[:, 5].unique()) == 2, "both neighbours"
    unit = (rounded.amax(0) - rounded.amin(0)).clamp_min(1e-9)
    assert float(((rounded - x).mean(0).abs() / unit).max()) < 0.05
    exact = torch.tensor([[1.0, -0.5, 0.0, 3.0e38, float("inf"), float("nan")]])
    kept = rounding.to_bfloat16(exact, bits(1, 6)).float()
    assert torch.equal(kept[:, :5].isfinite(), exact[:, :5].isfinite())
    assert torch.equal(kept[0, :3], exact[0, :3])
    assert kept[0, 5].isnan()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_right_on_average(signed):
    draw = torch.Generator().manual_seed(0)
    row = torch.randn(300, generator=draw) * 10 ** (-3 * torch.rand(300, generator=draw))  # more than one block
    row[7] = 0
    x = (row if signed else row.abs()).expand(8192, 300)
    kept = rounding.encode(x, bits(*x.shape), signed=signed)
    assert kept.codes.dtype == torch.uint8
    assert kept.largest.shape == (8192, 2)
    found = rounding.decode(kept, signed=signed)
    assert torch.equal(found[:, 7], torch.zeros(8192))
    largest = int(row[:256].abs().argmax())
    torch.testing.assert_close(found[:, largest], x[:, largest], msg="the largest of a block keeps its value")
    unit = (found.amax(0) - found.amin(0)).clamp_min(1e-12)
    error = (found.double().mean(0) - x[0]).abs() / unit
    error[[7, largest]] = 0
    assert float(error.max()) < 0.03
    big = x[0].abs() > x[0].abs().max() / 10
    assert float((unit[big] / x[0].abs()[big]).max()) < (0.09 if signed else 0.05), "the distance of neighbours"


def test_nothing_is_coded_as_nothing():
    zeros = torch.zeros(2, 5)
    for signed in (True, False):
        kept = rounding.encode(zeros, bits(2, 5), signed=signed)
        empty = rounding.Codes.zeros(2, 5, torch.device("cpu"), signed=signed)
        assert torch.equal(rounding.decode(kept, signed=signed), zeros)
        assert torch.equal(rounding.decode(empty, signed=signed), zeros)
