"""Which tokens of a forward pass an edit acts on.

Positions are absolute: column of the padded input, counted from the length of the KV cache when the pass began. Nothing
counts calls, so a run with cache, without cache, or with several tokens a step selects the same tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saehook.config import MaskRule
from saehook.errors import ArgumentError
from saehook.interventions import AnyEdit, Edit
from saehook.row_text import RowText
from saehook.tokenization import is_outlier, keep_mask
from saehook.where import EVERYWHERE, Where


class Positions:
    """The input of one run: rows of ids [n_rows, length] with their attention mask."""

    def __init__(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        special: Sequence[int],
        expansion: int = 1,
        *,
        bos: int | None = None,
        roles: list[list[str] | None] | None = None,
        decode: Callable[[list[int]], str] | None = None,
        reorders: bool = False,
    ) -> None:
        """`expansion`: rows the model runs per input row (beams, return sequences), next to each other as in HF. `roles`: of
        each row's own tokens. `decode`: ids as text. `reorders`: rows change places during the run, as beams do."""
        attended = torch.ones_like(ids) if attention_mask is None else attention_mask
        self.ids = ids
        self.special, self.bos = tuple(special), bos
        self.length = ids.shape[1]
        self.expansion = expansion
        self.reorders = reorders
        self.attended = attended.bool().repeat_interleave(expansion, 0)
        self.keep = keep_mask(ids, attended, special).repeat_interleave(expansion, 0)
        self.seen = 0
        """Positions that some pass has processed already; without a cache they come again, and reports count them once."""
        self._roles, self._decode = roles, decode
        self._text: RowText | None = None

    def check_edit(self, edit: AnyEdit) -> None:
        """Raises ArgumentError if an edit names a row that the input lacks, a token that one of its rows lacks, roles where
        none are known, or looks back along beams."""
        self.check(edit.where)
        if isinstance(edit, Edit) and edit.source is not None:
            self.column(*edit.source)
        if self.reorders and edit.when is not None and edit.when.looks_back:
            raise ArgumentError(
                f"beams change places while they are generated, so what came before is not known to the condition "
                f"{edit.when}. Use a latent's value at the token itself or its prompt_max, or generate without beams."
            )

    def check(self, where: Where) -> None:
        """Raises ArgumentError if `where` cannot be meant for this input; see `check_edit`."""
        n_rows = len(self.attended) // self.expansion
        if where.rows is not None and max(where.rows) >= n_rows:
            raise ArgumentError(
                f"row {max(where.rows)} is outside the {n_rows} rows of the input: expected 0..{n_rows - 1}."
            )
        if where.tokens is not None:
            self.token_mask(where.tokens, where.rows)
        if where.roles is not None:
            self.role_mask(where.roles)
        if where.pattern is not None:
            if self.reorders and where.generation and where.tokens is None:
                raise ArgumentError(
                    "beams change places while they are generated, so their text is not known to a pattern. Restrict it to "
                    "the prompt, Where(pattern=..., generation=False), or generate without beams."
                )
            if self._decode is None:
                raise ArgumentError("a pattern needs a tokenizer, and this run has none.")
            if self._text is None:
                self._text = RowText(self.ids.repeat_interleave(self.expansion, 0), self.attended, self._decode)

    @property
    def text(self) -> RowText:
        """What the rows say; there once a `Where` with a pattern was checked."""
        assert self._text is not None
        return self._text

    def column(self, row: int, token: int) -> tuple[int, int]:
        """(row, column) among the rows that run of a token of the input, counted among its row's own, negative from its end.

        Raises:
            ArgumentError: there is no such row or token.
        """
        n_rows = len(self.attended) // self.expansion
        if not 0 <= row < n_rows:
            raise ArgumentError(f"row {row} is outside the {n_rows} rows of the input: expected 0..{n_rows - 1}.")
        self.token_mask((token,), (row,))
        place = row * self.expansion
        return place, int(self.attended[place].nonzero()[token, 0])

    def role_mask(self, roles: tuple[str, ...]) -> Tensor:
        """[rows, length], True at the input's tokens in messages of one of these roles.

        Raises:
            ArgumentError: a row is no conversation, or its chat template does not show whose its tokens are.
        """
        mask = torch.zeros_like(self.attended)
        for place, attended in enumerate(self.attended):
            row = place // self.expansion
            known = self._roles[row] if self._roles is not None else None
            if known is None:
                raise ArgumentError(
                    f"roles={roles}, and whose the tokens of row {row} are is not known: it is no list of messages "
                    "({'role': ..., 'content': ...}), or the chat template does not write them one after another."
                )
            mask[place, attended] = torch.tensor([role in roles for role in known], device=mask.device)
        return mask

    @functools.cached_property
    def shortest(self) -> int:
        """Tokens of the shortest row."""
        return int(self.attended.sum(1).min())

    def row_mask(self, rows: tuple[int, ...]) -> Tensor:
        """[rows], True for the rows that continue these rows of the input."""
        mask = torch.zeros(len(self.attended) // self.expansion, dtype=torch.bool)
        mask[list(rows)] = True
        return mask.repeat_interleave(self.expansion).to(self.attended.device)

    def token_mask(self, tokens: tuple[int, ...], rows: tuple[int, ...] | None = None) -> Tensor:
        """[rows, length], True at the named tokens of each row, or of those of the input's rows.

        Raises:
            ArgumentError: a row does not have that many tokens.
        """
        mask = torch.zeros_like(self.attended)
        for place, attended in enumerate(self.attended):
            row = place // self.expansion
            if rows is not None and row not in rows:
                continue
            columns = attended.nonzero()[:, 0]
            for token in tokens:
                if not -len(columns) <= token < len(columns):
                    raise ArgumentError(
                        f"token {token} is outside the {len(columns)} tokens of row {row}: expected "
                        f"{-len(columns)}..{len(columns) - 1}. Indices count the row's own tokens, BOS included."
                    )
                mask[place, columns[token]] = True
        return mask

    def view(self, past: int, ids: Tensor) -> TokenView:
        """The tokens of one forward pass: `ids` [rows, n], which stand at positions past .. past + n - 1."""
        view = TokenView(self, past, ids, fresh=max(0, self.seen - past))
        if self._text is not None and view.n_generated:
            self._text.note(max(0, past - self.length), ids[:, view.n_prompt :])
        self.seen = max(self.seen, past + ids.shape[1])
        return view


@dataclass
class TokenView:
    """The tokens of one forward pass."""

    run: Positions
    past: int
    ids: Tensor
    fresh: int = 0
    """The first token that no earlier pass has processed."""

    def __post_init__(self) -> None:
        n = self.ids.shape[1]
        self.n_prompt = max(0, min(self.run.length - self.past, n))
        """How many of them belong to the input; the others were generated."""
        self.n_generated = n - self.n_prompt
        self._keep: Tensor | None = None

    def mask(self, rule: MaskRule, norm: Tensor, where: Where = EVERYWHERE) -> Tensor:
        """The mask of an SAE with that rule, [rows, n] bool, on the device of `norm` = ‖x‖ [rows, n] at its site; with the
        special tokens that `where` includes."""
        keep = self.attended if where.special else self.keep
        if where.bos and self.run.bos is not None:
            keep = keep | (self.attended & (self.ids.to(keep.device) == self.run.bos))
        if rule.skip_first_tokens:
            keep = keep & (self.index >= rule.skip_first_tokens)
        keep = keep.to(norm.device)
        return keep if rule.max_norm is None else keep & ~is_outlier(norm, rule)

    @property
    def index(self) -> Tensor:
        """Which of its row's own tokens each one is, from 0, [rows, n] int64; at padding -1, or that of the token before."""
        attended = self.run.attended
        prompt = attended.cumsum(1)[:, self.past : self.past + self.n_prompt] - 1
        behind = max(0, self.past - self.run.length)
        generated = attended.sum(1, keepdim=True) + torch.arange(
            behind, behind + self.n_generated, device=attended.device
        )
        return torch.cat([prompt, generated], 1)

    @property
    def attended(self) -> Tensor:
        """Which are no padding of the input, [rows, n]."""
        return self.attended_since(self.past)

    def attended_since(self, start: int) -> Tensor:
        """Which positions from `start` to the end of this pass are no padding of the input, [rows, end - start]."""
        end = self.past + self.ids.shape[1]
        prompt = self.run.attended[:, start:end]
        return torch.nn.functional.pad(prompt, (0, end - start - prompt.shape[1]), value=True)

    @property
    def keep(self) -> Tensor:
        """What the masks of all SAEs have in common, [rows, n]: attended and no special token."""
        if self._keep is None:
            prompt = self.run.keep[:, self.past : self.past + self.n_prompt]
            if self.n_generated == 0:
                self._keep = prompt
            else:
                generated = keep_mask(self.ids[:, self.n_prompt :], None, self.run.special)
                self._keep = torch.cat([prompt, generated], 1) if self.n_prompt else generated
        return self._keep

    def may_select(self, where: Where) -> bool:
        """False where no token of this pass can be meant; costs nothing."""
        if where.positions is not None:
            start, stop = where.positions
            if self.past + self.ids.shape[1] <= start:  # padding only makes positions smaller
                return False
            behind = self.past - self.run.length
            if stop is not None and behind >= 0 and self.run.shortest + behind >= stop:
                return False
        if where.tokens is not None:
            return self.n_prompt > 0
        return (where.prompt and self.n_prompt > 0) or (where.generation and self.n_generated > 0)

    def select(self, where: Where, keep: Tensor) -> Tensor:
        """[rows, n] bool: the tokens that `where` names; of those that it does not name one by one, only those in `keep`,
        the mask. On the device of `keep`."""
        if where.tokens is not None:
            prompt = self.run.token_mask(where.tokens, where.rows)[:, self.past : self.past + self.n_prompt]
            selected = torch.nn.functional.pad(prompt, (0, self.n_generated)).to(keep.device)
        else:
            selected = keep
            if not (where.prompt and where.generation):
                selected = keep.clone()
                selected[:, slice(self.n_prompt, None) if where.prompt else slice(self.n_prompt)] = False
            if where.rows is not None:
                selected = selected & self.run.row_mask(where.rows).to(keep.device)[:, None]
        if where.positions is not None:
            start, stop = where.positions
            index = self.index.to(keep.device)
            selected = selected & (index >= start)
            if stop is not None:
                selected = selected & (index < stop)
        if where.roles is not None:
            prompt = self.run.role_mask(where.roles)[:, self.past : self.past + self.n_prompt]
            new = "assistant" in where.roles
            selected = selected & torch.nn.functional.pad(prompt, (0, self.n_generated), value=new).to(keep.device)
        if where.pattern is not None:
            selected = selected & self._matching(where.pattern).to(keep.device)
        if where.token_ids is not None:
            ids = torch.tensor(where.token_ids, dtype=self.ids.dtype)
            selected = selected & torch.isin(self.ids, ids.to(self.ids.device)).to(keep.device)
        return selected

    def _matching(self, pattern: str) -> Tensor:
        """[rows, n] bool: tokens whose text takes part in a match."""
        text = self.run.text
        behind = max(0, self.past - self.run.length)
        prompt = text.prompt_mask(pattern)[:, self.past : self.past + self.n_prompt]
        return torch.cat([prompt, text.generated_mask(pattern, behind, behind + self.n_generated)], 1)
