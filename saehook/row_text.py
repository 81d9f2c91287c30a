"""The text of the rows of one run, and which of their tokens take part in matches of a regular expression."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Sequence

import regex
import torch
from torch import Tensor

from saehook.errors import ArgumentError

SECONDS = 2.0
"""After which a match is given up: some expressions never end."""

Span = tuple[int, int]


class RowText:
    """What the rows of a run say, so far."""

    def __init__(self, ids: Tensor, attended: Tensor, decode: Callable[[list[int]], str]) -> None:
        """`ids` [rows, length] of the input, `attended` [rows, length] bool; `decode`: the text of ids, special tokens and
        all."""
        self.decode = decode
        self.prompts = [row[mask].tolist() for row, mask in zip(ids.cpu(), attended.cpu(), strict=True)]
        self.attended = attended.cpu()
        self.generated = torch.empty(len(ids), 0, dtype=torch.int64)
        self._prompt_masks: dict[str, Tensor] = {}
        self._last: dict[tuple[str, tuple[int, ...]], bool] = {}

    def note(self, behind: int, ids: Tensor) -> None:
        """Generated tokens [rows, n] that stand at `behind` .. behind + n - 1 behind the input."""
        self.generated = torch.cat([self.generated[:, :behind], ids.cpu()], 1)

    def prompt_mask(self, pattern: str) -> Tensor:
        """[rows, length] bool: tokens of the input that share a character with a match in its text."""
        if pattern not in self._prompt_masks:
            mask = torch.zeros_like(self.attended)
            for row, ids in enumerate(self.prompts):
                text = self.decode(ids)
                matches = matches_in(pattern, text)
                hit = [any(start < b and a < end for a, b in matches) for start, end in spans(ids, text, self.decode)]
                mask[row, self.attended[row]] = torch.tensor(hit)
            self._prompt_masks[pattern] = mask
        return self._prompt_masks[pattern]

    def generated_mask(self, pattern: str, start: int, stop: int) -> Tensor:
        """[rows, stop - start] bool: of the generated tokens `start` .. `stop` - 1 those that share a character with a match
        in the text that ends with them."""
        rows = [
            [self._last_matches(pattern, (*prompt, *generated[: i + 1])) for i in range(start, stop)]
            for prompt, generated in zip(self.prompts, self.generated.tolist(), strict=True)
        ]
        return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), stop - start)

    def _last_matches(self, pattern: str, ids: tuple[int, ...]) -> bool:
        if (pattern, ids) not in self._last:
            before, text = self.decode(list(ids[:-1])), self.decode(list(ids))
            start = len(os.path.commonprefix([before, text]))
            whole = not text.endswith("\ufffd")  # else it is a part of a character
            self._last[pattern, ids] = whole and any(start < b and a < len(text) for a, b in matches_in(pattern, text))
        return self._last[pattern, ids]


def matches_in(pattern: str, text: str) -> list[Span]:
    """Where the expression matches one or more characters.

    Raises:
        ArgumentError: after `SECONDS` there is no end to it.
    """
    try:
        matches = [match.span() for match in regex.finditer(pattern, text, timeout=SECONDS)]
    except TimeoutError:
        raise ArgumentError(
            f"the pattern {pattern!r} takes more than {SECONDS:g} s on {len(text)} characters. Make it simpler."
        ) from None
    return [(start, end) for start, end in matches if start < end]


def spans(ids: Sequence[int], text: str, decode: Callable[[list[int]], str]) -> list[Span]:
    """(start, end) of each token in `text`, which is `decode(ids)`. Tokens that are parts of one character share it."""
    ends: list[int] = []
    first = read = end = 0  # decoded from `first` on, so that a tokenizer's rules for the start of a text do not matter
    for i in range(len(ids)):
        before, now = decode(list(ids[first:read])), decode(list(ids[first : i + 1]))
        if not now.endswith("\ufffd") or i == len(ids) - 1:
            end += len(now) - len(before)
            ends += [end] * (i + 1 - len(ends))
            first, read = read, i + 1
    if end != len(text):  # a decoder that looks further back
        ends = [len(os.path.commonprefix([decode(list(ids[: i + 1])), text])) for i in range(len(ids))]
    starts = [0, *ends[:-1]]
    for i in range(1, len(ids)):
        if ends[i] == ends[i - 1]:
            starts[i] = starts[i - 1]
    return list(zip(starts, ends, strict=True))
