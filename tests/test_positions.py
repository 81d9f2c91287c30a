"""Which tokens of a pass an edit means: absolute positions, whatever a pass holds."""

from __future__ import annotations

import pytest
import torch
from builders import BOS, EOS, PAD, SPECIAL

from saehook.config import MaskRule
from saehook.errors import ArgumentError
from saehook.positions import Positions, TokenView
from saehook.where import EVERYWHERE, Where, generation, prompt, token_ids, tokens
from saehook.where import span as from_to

IDS = torch.tensor([[BOS, 11, 12, EOS, 13], [PAD, PAD, BOS, 21, 22]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
RULE = MaskRule(skip_first_tokens=2, max_norm_ratio=2.0, median_norm=2.0)
WHERE = [
    EVERYWHERE,
    prompt(),
    generation(),
    tokens(0),
    tokens(-1, 1),
    from_to(1, 4),
    from_to(4),
    token_ids(11, 32, 33),
    Where(rows=(1,)),
    Where(special=True),
    Where(generation=False, positions=(0, 2), rows=(0,), special=True),
    Where(tokens=(0, -1), positions=(1, None), rows=(1,)),
]


def positions(expansion: int = 1) -> Positions:
    return Positions(IDS, MASK, SPECIAL, expansion)


def selected(view: TokenView, where: Where) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in view.select(where, view.keep)]


def test_the_first_pass_holds_the_prompt():
    view = positions().view(0, IDS)
    assert (view.n_prompt, view.n_generated) == (5, 0)
    assert selected(view, EVERYWHERE) == [[1, 2, 4], [3, 4]]
    assert selected(view, prompt()) == [[1, 2, 4], [3, 4]]
    assert selected(view, generation()) == [[], []]
    assert not view.may_select(generation())
    assert view.may_select(prompt())


def test_tokens_count_each_rows_own_tokens_and_may_name_special_ones():
    view = positions().view(0, IDS)
    assert selected(view, tokens(0)) == [[0], [2]]
    assert selected(view, tokens(0, -1)) == [[0, 4], [2, 4]]
    assert selected(view, tokens(1, -2)) == [[1, 3], [3]]
    assert selected(view, tokens(2, 2)) == [[2], [4]]


@pytest.mark.parametrize(
    ("index", "row"), [(3, "3 tokens of row 1: expected -3..2"), (-4, "3 tokens of row 1"), (5, "5 tokens of row 0")]
)
def test_an_index_that_one_row_lacks_is_an_error(index, row):
    with pytest.raises(ArgumentError, match=f"token {index} is outside the {row}"):
        selected(positions().view(0, IDS), Where(tokens=(index,)))


def test_a_cached_step_holds_one_generated_token():
    step = torch.tensor([[31], [EOS]])
    view = positions().view(5, step)
    assert (view.n_prompt, view.n_generated) == (0, 1)
    assert selected(view, EVERYWHERE) == [[0], []], "a generated EOS is special, too"
    assert selected(view, generation()) == [[0], []]
    assert selected(view, prompt()) == [[], []]
    assert selected(view, tokens(0, -1)) == [[], []], "indices are those of the prompt"
    assert not view.may_select(tokens(-1))
    assert not view.may_select(prompt())
    assert view.may_select(EVERYWHERE)


def test_an_uncached_step_holds_everything_again():
    ids = torch.cat([IDS, torch.tensor([[31, 32], [PAD, 33]])], 1)
    view = positions().view(0, ids)
    assert (view.n_prompt, view.n_generated) == (5, 2)
    assert selected(view, EVERYWHERE) == [[1, 2, 4, 5, 6], [3, 4, 6]]
    assert selected(view, prompt()) == [[1, 2, 4], [3, 4]]
    assert selected(view, generation()) == [[5, 6], [6]]
    assert selected(view, tokens(-1)) == [[4], [4]], "the last of the prompt, not of the pass"


def test_a_pass_that_begins_within_the_prompt():
    """Chunked prefill, or candidates behind the rest of a prompt."""
    ids = torch.cat([IDS[:, 3:], torch.tensor([[31], [32]])], 1)
    view = positions().view(3, ids)
    assert (view.n_prompt, view.n_generated) == (2, 1)
    assert selected(view, EVERYWHERE) == [[1, 2], [0, 1, 2]]
    assert selected(view, prompt()) == [[1], [0, 1]]
    assert selected(view, generation()) == [[2], [2]]
    assert selected(view, tokens(0, -1)) == [[1], [1]], "token 0 came in an earlier pass"
    first = positions().view(0, IDS[:, :3])
    assert selected(first, tokens(0, -1)) == [[0], [2]]
    assert selected(first, EVERYWHERE) == [[1, 2], []]


def test_a_step_with_several_generated_tokens():
    view = positions().view(6, torch.tensor([[31, BOS, 32], [33, 34, PAD]]))
    assert selected(view, generation()) == [[0, 2], [0, 1]]
    assert selected(view, prompt()) == [[], []]


@pytest.mark.parametrize("where", WHERE, ids=str)
def test_beams_stand_next_to_each_other(where):
    ids = IDS.repeat_interleave(3, 0)
    expanded = selected(positions(3).view(0, ids), where)
    assert expanded == [row for row in selected(positions().view(0, IDS), where) for _ in range(3)]
    step = torch.arange(6)[:, None] + 30
    view = positions(3).view(5, step)
    assert view.select(generation(), view.keep).all()
    assert view.keep.shape == (6, 1)


@pytest.mark.parametrize("where", WHERE, ids=str)
@pytest.mark.parametrize("cuts", [[5], [1, 4, 5], [2, 5, 6, 8], [3, 7, 8], [8], [1, 2, 3, 4, 5, 6, 7, 8]])
@pytest.mark.parametrize("rule", [MaskRule(), RULE], ids=["no rule", "rule"])
def test_however_the_row_is_cut_into_passes_the_same_tokens_are_meant(where, cuts, rule):
    norms = torch.tensor([[1.0, 9.0, 1.0, 1.0, 9.0, 1.0, 1.0, 9.0], [9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 1.0]])
    ids = torch.cat([IDS, torch.tensor([[31, EOS, 32], [33, 34, 35]])], 1)[:, : cuts[-1]]
    run = positions()
    view = run.view(0, ids)
    whole = view.select(where, view.mask(rule, norms[:, : cuts[-1]], where))
    parts, past = [], 0
    for end in cuts:
        view = run.view(past, ids[:, past:end])
        part = view.select(where, view.mask(rule, norms[:, past:end], where))
        assert view.may_select(where) or not part.any()
        parts.append(part)
        past = end
    assert torch.equal(torch.cat(parts, 1), whole)


def test_positions_are_counted_among_the_rows_own_tokens():
    view = positions().view(0, torch.cat([IDS, torch.tensor([[31, 32, 33], [34, 35, 36]])], 1))
    assert selected(view, from_to(0, 3)) == [[1, 2], [3, 4]], "BOS is outside the mask"
    assert selected(view, from_to(2, 6)) == [[2, 4, 5], [4, 5, 6, 7]]
    assert selected(view, from_to(5)) == [[5, 6, 7], [7]]
    assert selected(view, Where(prompt=False, positions=(3, 5))) == [[], [5, 6]]
    assert selected(view, from_to(99)) == [[], []]


def test_positions_that_no_row_reaches_or_all_have_left_cost_nothing():
    run = positions()
    assert not run.view(0, IDS).may_select(from_to(5))
    assert run.view(0, IDS).may_select(from_to(4))
    assert run.view(0, IDS).may_select(from_to(0, 1))
    step = torch.tensor([[31], [32]])
    assert run.view(6, step).may_select(from_to(0, 5)), "the second row is at its token 4"
    assert not run.view(6, step).may_select(from_to(0, 4))


def test_the_mask_with_special_tokens_has_no_padding():
    view = positions().view(0, torch.cat([IDS, torch.tensor([[31, EOS], [32, 33]])], 1))
    ones = torch.ones(2, 7)
    assert view.mask(MaskRule(), ones, Where(special=True)).tolist() == [[True] * 7, [False] * 2 + [True] * 5]
    assert view.mask(MaskRule(), ones).sum(1).tolist() == [4, 4]
    assert view.mask(MaskRule(skip_first_tokens=1), ones, Where(special=True)).sum(1).tolist() == [6, 4]


def test_rows_are_checked_before_anything_runs():
    positions(3).check(Where(rows=(0, 1)))
    with pytest.raises(ArgumentError, match=r"row 2 is outside the 2 rows of the input: expected 0\.\.1"):
        positions(3).check(Where(rows=(0, 2)))
    positions().check(Where(tokens=(4,), rows=(0,)))
    with pytest.raises(ArgumentError, match="token 4 is outside the 3 tokens of row 1"):
        positions(3).check(Where(tokens=(4,)))


def test_selecting_changes_no_mask():
    view = positions().view(0, IDS)
    keep = view.keep.clone()
    for where in WHERE:
        view.select(where, view.keep)
        view.mask(RULE, torch.ones(2, 5))
    assert torch.equal(view.keep, keep)
    assert torch.equal(view.run.keep, keep)


def test_without_a_mask_every_token_is_attended():
    view = Positions(IDS[:1], None, ()).view(0, IDS[:1])
    assert view.keep.all()
    assert selected(view, tokens(-5, 4)) == [[0, 4]]


def test_first_tokens_are_those_of_the_row_wherever_it_begins():
    """Padding is not counted, BOS is; where the prompt is shorter than the rule, generated tokens are among the first."""
    rule, ones = MaskRule(skip_first_tokens=4), torch.ones(2, 5)
    run = positions()
    assert run.view(0, IDS).mask(rule, ones).nonzero().tolist() == [[0, 4]]
    assert run.view(5, torch.tensor([[31], [32]])).mask(rule, ones[:, :1]).tolist() == [[True], [False]]
    assert run.view(6, torch.tensor([[31], [32]])).mask(rule, ones[:, :1]).tolist() == [[True], [True]]
    late = run.view(3, torch.tensor([[EOS, 13, 31, 32], [21, 22, 33, 34]])).mask(rule, ones[:, :4])
    assert late.tolist() == [[False, True, True, True], [False, False, False, True]]


def test_outliers_are_left_out_and_faults_are_not():
    norm = torch.tensor([[1.0, 4.0, 4.1, 1.0, float("nan")], [1.0, 1.0, 1.0, float("inf"), 99.0]])
    view = positions().view(0, IDS)
    assert view.mask(MaskRule(max_norm_ratio=2.0, median_norm=2.0), norm).nonzero().tolist() == [[0, 1], [0, 4], [1, 3]]
    assert torch.equal(view.mask(MaskRule(), norm), view.keep)


def test_right_padding_and_holes():
    run = Positions(torch.tensor([[7, 8, 9, 9], [7, 8, 7, 8]]), torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]]), ())
    view = run.view(0, torch.zeros(2, 4, dtype=torch.int64))
    assert selected(view, EVERYWHERE) == [[0, 1], [0, 2, 3]]
    assert selected(view, tokens(-1, 1)) == [[1], [2, 3]]
