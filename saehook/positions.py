"""Which tokens of a forward pass an edit acts on.

Positions are absolute: column of the padded input, counted from the length of the KV cache when the pass began. Nothing
counts calls, so a run with cache, without cache, or with several tokens a step selects the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saehook.config import MaskRule
from saehook.errors import ArgumentError
from saehook.interventions import Where
from saehook.tokenization import is_outlier, keep_mask


class Positions:
    """The input of one run: rows of ids [n_rows, length] with their attention mask."""

    def __init__(self, ids: Tensor, attention_mask: Tensor | None, special: Sequence[int], expansion: int = 1) -> None:
        """`expansion`: rows the model runs per input row (beams, return sequences), next to each other as in HF."""
        attended = torch.ones_like(ids) if attention_mask is None else attention_mask
        self.special = tuple(special)
        self.length = ids.shape[1]
        self.attended = attended.bool().repeat_interleave(expansion, 0)
        self.keep = keep_mask(ids, attended, special).repeat_interleave(expansion, 0)
        self.seen = 0
        """Positions that some pass has processed already; without a cache they come again, and reports count them once."""

    def token_mask(self, tokens: tuple[int, ...]) -> Tensor:
        """[rows, length], True at the named tokens of each row.

        Raises:
            ArgumentError: a row does not have that many tokens.
        """
        mask = torch.zeros_like(self.attended)
        for row, attended in enumerate(self.attended):
            columns = attended.nonzero()[:, 0]
            for token in tokens:
                if not -len(columns) <= token < len(columns):
                    raise ArgumentError(
                        f"token {token} is outside the {len(columns)} tokens of row {row}: expected "
                        f"{-len(columns)}..{len(columns) - 1}. Indices count the row's own tokens, BOS included."
                    )
                mask[row, columns[token]] = True
        return mask

    def view(self, past: int, ids: Tensor) -> TokenView:
        """The tokens of one forward pass: `ids` [rows, n], which stand at positions past .. past + n - 1."""
        view = TokenView(self, past, ids, fresh=max(0, self.seen - past))
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

    def mask(self, rule: MaskRule, norm: Tensor) -> Tensor:
        """The mask of an SAE with that rule, [rows, n] bool, on the device of `norm` = ‖x‖ [rows, n] at its site."""
        keep = self.keep
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
        if where.tokens is not None:
            return self.n_prompt > 0
        return (where.prompt and self.n_prompt > 0) or (where.generation and self.n_generated > 0)

    def select(self, where: Where, keep: Tensor) -> Tensor:
        """[rows, n] bool: the tokens that `where` names; of those that it does not name one by one, only those in `keep`,
        the mask. On the device of `keep`."""
        if where.tokens is not None:
            prompt = self.run.token_mask(where.tokens)[:, self.past : self.past + self.n_prompt]
            return torch.nn.functional.pad(prompt, (0, self.n_generated)).to(keep.device)
        if where.prompt and where.generation:
            return keep
        selected = keep.clone()
        if not where.prompt:
            selected[:, : self.n_prompt] = False
        if not where.generation:
            selected[:, self.n_prompt :] = False
        return selected
