"""The bootstrap over sequences where the answer is known."""

from __future__ import annotations

import pytest
import torch

from saehook.intervals import MIN_SEQUENCES, STUDENT, SequenceSums, intervals

MEAN = {"mean": lambda s: s["x"] / s["n"]}


def sums_of(values: torch.Tensor) -> SequenceSums:
    """One token of a value in each sequence, or several: [sequences, tokens]."""
    sums = SequenceSums()
    owner = torch.arange(len(values)).repeat_interleave(values.shape[1])
    sums.add(owner, len(values), x=values.flatten())
    return sums


def test_sequences_that_are_alike_leave_no_doubt():
    values = torch.arange(5.0).expand(40, 5)
    assert intervals(sums_of(values).by_sequence(), MEAN) == {"mean": (2.0, 2.0)}


def test_the_width_is_that_of_the_mean_of_independent_sequences():
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(1)).double() + 5
    low, high = intervals(sums_of(values).by_sequence(), MEAN)["mean"]
    spread = 1.96 * values.std().item() / 20
    assert (high - low) / 2 == pytest.approx(spread, rel=0.1)
    assert (high + low) / 2 == pytest.approx(values.mean().item(), abs=0.1 * spread)


def test_tokens_of_one_sequence_are_no_independent_ones():
    """The same tokens, alike within a sequence: the interval is that of the sequences and not of the tokens."""
    values = torch.randn(100, 1, generator=torch.Generator().manual_seed(1)).expand(100, 64)
    together = intervals(sums_of(values).by_sequence(), MEAN)["mean"]
    apart = intervals(sums_of(values.T.reshape(-1, 1)).by_sequence(), MEAN)["mean"]
    assert together[1] - together[0] > 6 * (apart[1] - apart[0])


def test_a_ratio_of_sums_is_no_mean_of_ratios():
    sums = SequenceSums()
    sums.add(torch.tensor([0, 1, 1, 1]), 2, x=torch.tensor([10.0, 1.0, 1.0, 1.0]))
    totals = sums.totals()
    assert float(MEAN["mean"](totals)) == 13 / 4
    assert totals["n"] == 4


def test_what_too_few_sequences_say():
    """One says nothing; of a few the interval of a mean is the textbook's, with Student's t."""
    values = torch.rand(MIN_SEQUENCES, 3)
    assert not intervals(sums_of(values[:1]).by_sequence(), MEAN)
    assert intervals(sums_of(values).by_sequence(), MEAN)
    for n in (2, 4, MIN_SEQUENCES - 1):
        low, high = intervals(sums_of(values[:n, :1]).by_sequence(), MEAN)["mean"]
        some = values[:n, 0].double()
        assert (low + high) / 2 == pytest.approx(some.mean().item())
        assert (high - low) / 2 == pytest.approx(STUDENT[n - 2] * some.std().item() / n**0.5)


def test_few_sequences_hold_the_truth_as_often_as_they_say():
    values = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)).double()
    found = [intervals({"x": row, "n": torch.ones(4)}, MEAN)["mean"] for row in values]
    assert sum(low < 0 < high for low, high in found) / len(found) == pytest.approx(0.95, abs=0.02)


def test_a_denominator_of_zero_has_no_interval():
    zero = {"none": lambda s: s["x"] / (s["n"] - s["n"]), **MEAN}
    for n in (3, 20):
        assert set(intervals(sums_of(torch.rand(n, 2)).by_sequence(), zero)) == {"mean"}


def test_parts_of_several_processes_and_the_seed():
    values = torch.rand(30, 4)
    whole, first = sums_of(values), sums_of(values[:11])
    first.merge(sums_of(values[11:]))
    a, b = whole.by_sequence(), first.by_sequence()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert intervals(a, MEAN, seed=3) == intervals(b, MEAN, seed=3) != intervals(a, MEAN, seed=4)


def test_many_sequences_are_drawn_in_parts(monkeypatch):
    sums = sums_of(torch.rand(50, 2)).by_sequence()
    monkeypatch.setattr("saehook.intervals._DRAWN_AT_ONCE", 120)
    low, high = intervals(sums, MEAN)["mean"]
    assert low < float(sums["x"].sum() / sums["n"].sum()) < high
