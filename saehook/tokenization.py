"""Text to windows of ids, and the one mask that says which tokens count.

The window rule, the same for training and evaluation: documents are tokenised without special tokens and joined, each
preceded by BOS (EOS where the tokenizer has no BOS); the stream is cut into windows of min(context, 256) tokens; each
window starts with BOS where the tokenizer has one; no token is used twice; the tail that fills no window is dropped
and counted. For an encoder, whose tokenizer has `[CLS]` and `[SEP]` instead, each window stands between these two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saehook.config import MaskRule
from saehook.conversation import conversation_ids, is_conversation
from saehook.corpus import Document, update_text_hash
from saehook.dataset_text import DatasetText
from saehook.errors import ArgumentError

MAX_WINDOW = 256


@dataclass
class Windows:
    """Windows of one text."""

    ids: Tensor
    """Token ids, [n, window], int64."""
    text_sha256: str
    """Hash of the whole text (`corpus.text_hash`), also of what lies beyond the last window; of a dataset, which is read no
    further than needed, of the documents read."""
    documents: int
    """Documents of the text, or those read of a dataset."""
    dropped_tail: int
    """Tokens at the end of the text that filled no window; 0 where `max_tokens` ended the windows before."""
    rule: dict[str, Any] = field(default_factory=dict)
    """The window rule as data: window, separator, starts_with_bos."""
    dataset: dict[str, Any] | None = None
    """`DatasetText.facts` where the text is a dataset."""


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokenizer's BOS, EOS and padding token, those it has, sorted; none without a tokenizer. Chat markers are
    ordinary tokens. What an encoder's tokenizer has in place of BOS and EOS, `[CLS]` and `[SEP]`, counts as these."""
    if tokenizer is None:
        return ()
    ids = (*_edges(tokenizer), tokenizer.pad_token_id)
    return tuple(sorted({i for i in ids if i is not None}))


def _edges(tokenizer: Any) -> tuple[int | None, int | None]:
    """The ids that begin and end a text: BOS, else `[CLS]`; EOS, else `[SEP]`."""
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    return (
        getattr(tokenizer, "cls_token_id", None) if first is None else first,
        getattr(tokenizer, "sep_token_id", None) if last is None else last,
    )


def _is_encoder(tokenizer: Any) -> bool:
    """Whether texts are written between `[CLS]` and `[SEP]`, as encoders have them."""
    first, last = _edges(tokenizer)
    return tokenizer.bos_token_id is None and tokenizer.eos_token_id is None and None not in (first, last)


def keep_mask(ids: Tensor, attention_mask: Tensor | None, special: Sequence[int], skip_first_tokens: int = 0) -> Tensor:
    """The mask, as far as it depends on ids: True where a token is attended, its id is not among `special`, and it is not
    among the first attended tokens of its row. Shape and device of `ids`, whose last dimension is the row."""
    keep = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.to(ids.device).bool()
    if skip_first_tokens:
        keep = keep & (keep.cumsum(-1) > skip_first_tokens)
    for token in special:
        keep = keep & (ids != token)
    return keep


def is_outlier(norm: Tensor, rule: MaskRule) -> Tensor:
    """The rest of the mask: True where ‖x‖, of any shape, is more than the rule allows. What is not finite is no outlier:
    it is a fault, and must be seen."""
    if rule.max_norm is None:
        return torch.zeros_like(norm, dtype=torch.bool)
    return (norm > rule.max_norm) & norm.isfinite()


def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash of all that decides the ids: vocabulary, special tokens and, where it can be had, merges and normalisation."""
    rules: Any = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        rules = json.loads(backend.to_str())
        for unused in ("padding", "truncation", "post_processor"):  # texts are tokenised without special tokens
            rules.pop(unused, None)
    return hashlib.sha256(json.dumps([rules, special_ids(tokenizer)], sort_keys=True).encode()).hexdigest()


def window_size(context: int | None) -> int:
    """min(context, 256): tokens in a window of a model that takes `context` tokens."""
    return MAX_WINDOW if context is None else min(context, MAX_WINDOW)


class WindowCutter:
    """Cuts the joined stream of documents into windows, one document at a time."""

    def __init__(self, tokenizer: Any, window: int) -> None:
        """Raises ArgumentError where `window` is below 2, or the tokenizer has nothing to separate documents with."""
        if window < 2:
            raise ArgumentError(f"a window of {window} tokens predicts nothing; at least 2 are needed.")
        bos, end = tokenizer.bos_token_id, _edges(tokenizer)[1]
        self.tokenizer = tokenizer
        self.separator = bos if bos is not None else end
        if self.separator is None:
            raise ArgumentError(
                "the tokenizer has neither a BOS nor an EOS token to put between documents. Set one of them."
            )
        self.first = [] if bos is None else [bos]
        self.last: list[int] = []
        if _is_encoder(tokenizer):
            self.first, self.last = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
        self.body = window - len(self.first) - len(self.last)
        if self.body < 1:
            raise ArgumentError(
                f"a window of {window} tokens holds no text between [CLS] and [SEP]; at least 3 are needed."
            )
        self.pending: list[int] = []
        """Ids that fill no window yet."""

    def add(self, document: Document) -> list[Tensor]:
        """The windows that this document completes, [window] int64 each."""
        ids = self.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        stream = [*self.pending, self.separator, *ids]
        end = len(stream) // self.body * self.body
        bodies = [stream[i : i + self.body] for i in range(0, end, self.body)]
        self.pending = stream[end:]
        return [torch.tensor(self.first + body + self.last, dtype=torch.int64) for body in bodies]


def windows(documents: Iterable[Document], tokenizer: Any, window: int, *, max_tokens: int | None = None) -> Windows:
    """The windows of a whole text, at most enough of them for `max_tokens` tokens that count (`keep_mask`).

    Raises:
        ArgumentError: the text fills no window.
    """
    special = special_ids(tokenizer)
    cutter = WindowCutter(tokenizer, window)
    dataset = documents.facts if isinstance(documents, DatasetText) else None
    rows: list[Tensor] = []
    counted = read = 0
    full = False
    digest = hashlib.sha256()
    for document in documents:
        update_text_hash(digest, document)
        read += 1
        for row in [] if full else cutter.add(document):
            rows.append(row)
            counted += int(keep_mask(row, None, special).sum())
            if full := max_tokens is not None and counted >= max_tokens:
                cutter.pending = []
                break
        if full and dataset is not None:
            break
    if not rows:
        raise ArgumentError(
            f"the text has {len(cutter.pending)} tokens, and one window needs {window}. Give more text, at least one full window."
        )
    rule = {
        "window": window,
        "separator": "bos" if tokenizer.bos_token_id is not None else "sep" if _is_encoder(tokenizer) else "eos",
        "starts_with_bos": tokenizer.bos_token_id is not None,
    }
    return Windows(torch.stack(rows), digest.hexdigest(), read, len(cutter.pending), rule, dataset)


@dataclass
class Batch:
    """Rows of ids as a model takes them, padded on the left."""

    ids: Tensor
    """[rows, length] int64."""
    attention_mask: Tensor
    """[rows, length] int64, 0 at padding."""
    single: bool
    """Whether the caller gave one row and not a list of rows."""
    roles: list[list[str] | None] | None = None
    """Of rows that are conversations: the role of each of their own tokens, where the chat template shows it."""
    inputs: dict[str, Tensor] | None = None
    """What a model that takes no ids gets instead (`model_input`)."""

    @property
    def padded(self) -> bool:
        """Whether any position is not attended."""
        return not bool(self.attention_mask.all())


def _row(x: Any, tokenizer: Any, roles: list[list[str] | None]) -> Tensor:
    """One row: text, a conversation, a list of ids, or a 1-D tensor. Its roles go to `roles`."""
    found = None
    if is_conversation(x):
        x, found = conversation_ids(x, tokenizer)
    roles.append(found)
    if isinstance(x, str):
        if not x:
            raise ArgumentError("the prompt is empty. Give some text, or ids.")
        x = tokenizer(x, verbose=False)["input_ids"]
    try:
        ids = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"{type(x).__name__} is no input; expected text, a list of ids, or a 1-D tensor.") from None
    if ids.ndim != 1 or ids.numel() == 0:
        raise ArgumentError(f"a row of ids has shape {tuple(ids.shape)}; at least one id is expected.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ArgumentError(f"ids have dtype {ids.dtype}; whole numbers are expected.")
    return ids.to("cpu", torch.int64)


def to_batch(x: Any, tokenizer: Any, *, vocab_size: int, attention_mask: Tensor | None = None) -> Batch:
    """What a user gives as a padded batch: text, ids, a conversation, or a list of those; a 2-D tensor is a batch as it
    stands.

    Text becomes ids by `tokenizer(text)`, a conversation by its chat template; ids are used as they are. With
    `attention_mask` (same shape as a 2-D `x`) the padding is the caller's.

    Raises:
        ArgumentError: empty input, something that is no input, ids outside the vocabulary, a mask that does not fit.
    """
    if isinstance(x, np.ndarray):
        x = x.tolist()
    single = isinstance(x, str) or (isinstance(x, Tensor) and x.ndim == 1)
    roles: list[list[str] | None] = []
    if isinstance(x, (list, tuple)):
        if not x:
            raise ArgumentError("the input is an empty list. Give at least one row.")
        single = all(isinstance(item, Integral) or (isinstance(item, Tensor) and item.ndim == 0) for item in x)
        single = single or is_conversation(x)
    if isinstance(x, Tensor) and x.ndim == 2:
        rows = [_row(row, tokenizer, roles) for row in x]
        if not rows:
            raise ArgumentError(f"the input has shape {tuple(x.shape)}; at least one row is expected.")
    elif single or not isinstance(x, (list, tuple)):
        rows = [_row(x, tokenizer, roles)]
    else:
        rows = [_row(row, tokenizer, roles) for row in x]
    for row in rows:
        if int(row.min()) < 0 or int(row.max()) >= vocab_size:
            raise ArgumentError(
                f"the ids go from {int(row.min())} to {int(row.max())}, but the model's vocabulary has {vocab_size} "
                "tokens. Use this model's tokenizer."
            )
    length = max(len(row) for row in rows)
    if attention_mask is not None:
        mask = torch.as_tensor(attention_mask).to("cpu", torch.int64)
        mask = mask[None] if mask.ndim == 1 else mask
        if mask.shape != (len(rows), length) or any(len(row) != length for row in rows):
            raise ArgumentError(
                f"attention_mask has shape {tuple(mask.shape)}, the ids ({len(rows)}, {length}). Give one value per id."
            )
        if not mask.any(1).all():
            raise ArgumentError("a row of attention_mask is all 0: that row has no token.")
        return Batch(torch.stack(rows), mask, single)
    pad = tokenizer.pad_token_id if tokenizer is not None and tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return Batch(ids, mask, single, roles if any(roles) else None)
