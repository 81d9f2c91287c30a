"""Counts what a run does: operations, sums of rows, fresh memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = frozenset(
    "_unsafe_view alias as_strided detach empty empty_like empty_strided expand new_empty permute select slice split squeeze t "
    "transpose unsqueeze view".split()
)
"""Operations that start nothing on a device."""

PRODUCTS = {"mm": 0, "mv": 0, "addmm": 1, "addmm_": 1, "addmv": 1, "addmv_": 1}
"""Products of matrices, with the place of the first factor."""


class Work(TorchDispatchMode):
    """Within `with Work() as work:` every operation is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.row_sums = 0
        """Multiplications and additions in sums of rows."""
        self.products: Counter[Any] = Counter()
        """The same in products of matrices, by dtype."""
        self.allocated: Counter[int] = Counter()
        """Fresh float tensors by number of entries; neither views, nor what is written into tensors that were given."""

    @property
    def started(self) -> int:
        """Operations that compute something: views are free."""
        return sum(n for name, n in self.operations.items() if name not in VIEWS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **kwargs)
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.operations[name] += 1
        if name.startswith("_embedding_bag") and "backward" not in name:
            self.row_sums += 2 * args[1].numel() * args[0].shape[1]
        if name in PRODUCTS:
            a, b = args[PRODUCTS[name] :][:2]
            self.products[a.dtype] += 2 * a.numel() * (b.shape[1] if b.ndim == 2 else 1)
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.is_floating_point() and x.untyped_storage().data_ptr() not in given:
                self.allocated[x.numel()] += 1
        return result
