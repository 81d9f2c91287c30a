"""Input to batches, the one mask, and windows of a text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from builders import BOS, EOS, FIRST_BYTE, PAD, SPECIAL, VOCAB, byte_tokenizer
from torch import Tensor

from saehook.corpus import Document
from saehook.errors import ArgumentError
from saehook.tokenization import (
    WindowCutter,
    keep_mask,
    special_ids,
    to_batch,
    tokenizer_sha256,
    window_size,
    windows,
)

TEXTS = ["hello world, ", "what a day it is", "x", "the last of the documents"]
DOCUMENTS = [Document(f"doc{i}", text) for i, text in enumerate(TEXTS)]


class Tokenizer:
    """A tokenizer object with some special tokens and characters as ids."""

    def __init__(self, bos: int | None, eos: int | None, pad: int | None) -> None:
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, pad

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def plain_ids(text: str) -> list[int]:
    return byte_tokenizer(adds_bos=False)(text)["input_ids"]


# --- special tokens and the mask -------------------------------------------------------------------------------------


def test_special_ids():
    assert special_ids(byte_tokenizer()) == SPECIAL
    assert special_ids(Tokenizer(None, 5, None)) == (5,)
    assert special_ids(Tokenizer(5, 5, 5)) == (5,)
    assert special_ids(Tokenizer(9, 0, 3)) == (0, 3, 9)
    assert special_ids(Tokenizer(None, None, None)) == ()


def test_keep_mask():
    ids = torch.tensor([[BOS, 7, EOS, 8], [PAD, PAD, 7, 8]])
    assert keep_mask(ids, None, SPECIAL).tolist() == [[False, True, False, True], [False, False, True, True]]
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert keep_mask(ids, mask, SPECIAL).tolist() == [[False, True, False, False], [False, False, True, True]]
    assert keep_mask(ids, mask, ()).tolist() == mask.bool().tolist()
    assert keep_mask(ids[0], None, (7,)).tolist() == [True, False, True, True]
    assert mask.tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        [5, 6, 7],
        (5, 6, 7),
        torch.tensor([5, 6, 7]),
        torch.tensor([5, 6, 7], dtype=torch.int32),
        [torch.tensor(5), torch.tensor(6), torch.tensor(7)],
        np.array([5, 6, 7]),
        [np.int64(5), np.int64(6), np.int64(7)],
    ],
    ids=["list", "tuple", "tensor", "int32", "tensors", "array", "numpy integers"],
)
def test_one_row(x):
    batch = to_batch(x, byte_tokenizer(), vocab_size=VOCAB)
    assert batch.single
    assert batch.ids.tolist() == [[5, 6, 7]]
    assert batch.ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.attention_mask.tolist() == [[1, 1, 1]]
    assert not batch.padded


def test_text_is_what_the_tokenizer_makes_of_it():
    for tokenizer in (byte_tokenizer(), byte_tokenizer(adds_bos=False)):
        batch = to_batch("héllo", tokenizer, vocab_size=VOCAB)
        assert batch.single
        assert batch.ids[0].tolist() == tokenizer("héllo")["input_ids"]
    assert to_batch("a", byte_tokenizer(), vocab_size=VOCAB).ids[0, 0] == BOS
    assert to_batch([5], byte_tokenizer(), vocab_size=VOCAB).ids.tolist() == [[5]], "ids are used as they are"


@pytest.mark.parametrize(
    "x",
    [
        [[5, 6, 7], [8]],
        [torch.tensor([5, 6, 7]), torch.tensor([8])],
        ([5, 6, 7], torch.tensor([8])),
    ],
)
def test_rows_are_padded_on_the_left(x):
    batch = to_batch(x, byte_tokenizer(), vocab_size=VOCAB)
    assert not batch.single
    assert batch.ids.tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.padded


def test_a_batch_of_one_is_a_batch():
    for x in (["a"], [[5]], torch.tensor([[5]])):
        assert not to_batch(x, byte_tokenizer(), vocab_size=VOCAB).single


def test_a_padding_token_in_the_text_is_attended():
    batch = to_batch([[PAD, 5], [PAD]], byte_tokenizer(), vocab_size=VOCAB)
    assert batch.attention_mask.tolist() == [[1, 1], [0, 1]]


def test_a_tokenizer_without_padding_token():
    batch = to_batch([[5, 6], [7]], Tokenizer(None, None, None), vocab_size=VOCAB)
    assert batch.ids.tolist() == [[5, 6], [0, 7]]
    assert batch.attention_mask.tolist() == [[1, 1], [0, 1]]


def test_the_callers_own_mask():
    ids = torch.tensor([[5, 6, 7], [8, 9, 9]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch = to_batch(ids, byte_tokenizer(), vocab_size=VOCAB, attention_mask=mask)
    assert batch.ids.tolist() == ids.tolist()
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    one = to_batch([5, 6], byte_tokenizer(), vocab_size=VOCAB, attention_mask=torch.tensor([0, 1]))
    assert one.single
    assert one.attention_mask.tolist() == [[0, 1]]
    for bad, match in (
        (torch.ones(2, 2), "shape"),
        (torch.ones(3), "shape"),
        (torch.tensor([[1, 1, 1], [0, 0, 0]]), "all 0"),
    ):
        with pytest.raises(ArgumentError, match=match):
            to_batch(ids, byte_tokenizer(), vocab_size=VOCAB, attention_mask=bad)
    with pytest.raises(ArgumentError, match="shape"):
        to_batch([[5, 6], [7]], byte_tokenizer(), vocab_size=VOCAB, attention_mask=torch.ones(2, 2))


@pytest.mark.parametrize(
    ("x", "match"),
    [
        ("", "prompt is empty"),
        ([""], "prompt is empty"),
        ([], "empty list"),
        ([[]], "at least one id"),
        ([[5], []], "at least one id"),
        (torch.zeros(0, 4, dtype=torch.int64), "at least one row"),
        (torch.zeros(2, 0, dtype=torch.int64), "at least one id"),
        (torch.tensor(5), "shape"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), "shape"),
        ([[5, [6]]], "list is no input|."),
        (torch.tensor([5.0]), "dtype torch.float32; whole numbers"),
        ([[5.0, 6.0]], "float32"),
        (torch.tensor([True]), "torch.bool"),
        ([True, False], "torch.bool"),
        ([5, VOCAB], f"from 5 to {VOCAB}, but the model's vocabulary has {VOCAB}"),
        ([-1], "from -1"),
        ([[5], [10**6]], "1000000"),
        ([10**30], "."),
        (None, "NoneType is no input"),
        (object(), "object is no input"),
        ({"input_ids": [5]}, "dict is no input"),
        (["a", None], "NoneType is no input"),
        ([None], "NoneType is no input"),
        (5, "shape"),
    ],
)
def test_what_is_no_input(x, match):
    with pytest.raises(ArgumentError, match=match):
        to_batch(x, byte_tokenizer(), vocab_size=VOCAB)


# --- windows ---------------------------------------------------------------------------------------------------------


def cut(documents: Iterable[Document], tokenizer: Any, window: int) -> tuple[list[Tensor], list[int]]:
    """All windows, and the ids that filled none."""
    cutter = WindowCutter(tokenizer, window)
    return [row for document in documents for row in cutter.add(document)], cutter.pending


def test_the_window_rule_with_bos():
    window = 8
    rows, tail = cut(DOCUMENTS, byte_tokenizer(), window)
    stream: list[int] = []
    for text in TEXTS:
        stream += [BOS, *plain_ids(text)]
    assert all(row.shape == (window,) for row in rows)
    assert all(int(row[0]) == BOS for row in rows)
    assert [i for row in rows for i in row[1:].tolist()] + tail == stream, "no token is used twice or lost"
    assert len(tail) < window - 1


def test_the_window_rule_without_bos():
    rows, tail = cut(DOCUMENTS, Tokenizer(None, 1, None), 6)
    stream: list[int] = []
    for text in TEXTS:
        stream += [1, *map(ord, text)]
    assert [i for row in rows for i in row.tolist()] + tail == stream
    with pytest.raises(ArgumentError, match="neither a BOS nor an EOS"):
        WindowCutter(Tokenizer(None, None, 0), 6)


def test_special_tokens_in_a_text():
    """A tokenizer that adds BOS adds none here: documents are tokenised without special tokens."""
    rows = windows([Document("a", "abcdefgh")], byte_tokenizer(), 4)
    assert rows.ids[0].tolist() == [BOS, BOS, *[plain_ids("ab")[0], plain_ids("ab")[1]]]
    assert (rows.ids[:, 1:] == BOS).sum() == 1


def test_whole_texts():
    result = windows(DOCUMENTS, byte_tokenizer(), 8)
    n = sum(len(text) + 1 for text in TEXTS)
    assert result.ids.shape == (n // 7, 8)
    assert result.dropped_tail == n % 7
    assert result.documents == 4
    assert result.rule == {"window": 8, "separator": "bos", "starts_with_bos": True}
    some = windows(DOCUMENTS, byte_tokenizer(), 8, max_tokens=10)
    counted = keep_mask(some.ids, None, SPECIAL).sum(1)
    assert counted.sum() >= 10
    assert counted[:-1].sum() < 10
    assert torch.equal(some.ids, result.ids[: len(some.ids)])
    other = windows([*DOCUMENTS[:-1], Document("doc3", "the lost of the documents")], byte_tokenizer(), 8)
    assert other.text_sha256 != result.text_sha256


def test_windows_that_cannot_be_meant():
    with pytest.raises(ArgumentError, match="3 tokens, and one window needs 8"):
        windows([Document("a", "ab")], byte_tokenizer(), 8)
    with pytest.raises(ArgumentError, match="window of 1"):
        windows(DOCUMENTS, byte_tokenizer(), 1)
    with pytest.raises(ArgumentError, match="0 tokens"):
        windows([], byte_tokenizer(), 8)


def test_window_sizes():
    assert [window_size(c) for c in (None, 64, 256, 4096)] == [256, 64, 256, 256]


def test_the_tokenizer_hash_is_that_of_its_ids():
    assert tokenizer_sha256(byte_tokenizer()) == tokenizer_sha256(byte_tokenizer(adds_bos=False))
    other = byte_tokenizer.__wrapped__()
    assert tokenizer_sha256(other) == tokenizer_sha256(byte_tokenizer())
    other.pad_token = "<eos>"
    assert tokenizer_sha256(other) != tokenizer_sha256(byte_tokenizer())
    other = byte_tokenizer.__wrapped__()
    other.add_tokens(["new"])
    assert tokenizer_sha256(other) != tokenizer_sha256(byte_tokenizer())
    assert len(SPECIAL) == FIRST_BYTE
