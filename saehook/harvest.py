"""Activations for training: one pass of the language model over text feeds all sites, shuffled in a buffer.

`TextStream` → `activations_of` → `WithoutOutliers` → `Shuffled`. The model stops after the deepest site. Tokens outside the
mask are left out: by their ids in the first step (`tokenization.keep_mask`), by their norms in the second. The buffer is
allocated once per site, in the model's dtype and on its device; all sites share one permutation. When half of it has been
served, that half is refilled, so a batch mixes tokens of many windows.

The state of a stream is all that a checkpoint needs to go on with the same batches: the position in the text, the random
state and the contents of the buffer.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from saehook.config import MaskRule
from saehook.corpus import Document, text_hash
from saehook.dataset_text import DatasetText
from saehook.errors import ArgumentError
from saehook.hooked_model import HookedModel
from saehook.kernels.device import fetch, queued, send
from saehook.model_input import image_batch, takes_text
from saehook.tokenization import WindowCutter, is_outlier, keep_mask, special_ids

TOKENS_PER_FORWARD = 4096
TOKENS_PER_FORWARD_QUEUED = 2**14
"""The same on a GPU, where each pass has work for the host, too, and small ones do not fill the device."""
MEDIAN_TOKENS = 4096
"""Tokens at the start of the text whose norms set the median of a `MaskRule`."""
MANY_OUTLIERS = 0.05
"""Share of them beyond which the rule is said to be wrong."""


class ShuffledDocuments(Iterator[Document]):
    """One pass over documents in memory, in an order that `seed` decides."""

    def __init__(self, documents: Sequence[Document], seed: str) -> None:
        self.documents = documents
        self.order = list(range(len(documents)))
        random.Random(seed).shuffle(self.order)
        self.position = 0

    def __next__(self) -> Document:
        if self.position == len(self.order):
            raise StopIteration
        self.position += 1
        return self.documents[self.order[self.position - 1]]

    def state(self) -> int:
        """The place."""
        return self.position

    def load_state(self, state: int) -> None:
        """Go on where `state` was taken."""
        self.position = state


class TextStream(Iterator[Tensor]):
    """Windows of ids, [window] int64, of documents in an order that the seed decides, or of a dataset in its own order;
    once, or again and again."""

    def __init__(
        self,
        documents: Sequence[Document] | DatasetText,
        tokenizer: Any,
        window: int,
        *,
        repeat: bool = False,
        seed: int = 0,
    ) -> None:
        """`repeat`: begin again, in another order, when the text ends."""
        self.documents = documents
        self.tokenizer = tokenizer
        self.window = window
        self.repeat = repeat
        self.seed = seed
        self.served = 0
        """Windows given out so far."""
        self.passes = 0
        """Times that the whole text has been read."""
        self.read = 0
        """Documents read so far, in all passes."""
        self._cutter = WindowCutter(tokenizer, window)
        self._reader = self._from_the_start()
        self._ready: list[Tensor] = []
        self._before = {"documents": self._reader.state(), "read": 0, "pending": []}
        """The place before the document that the ready windows come from."""
        self._taken = 0
        """How many of that document's windows have been given out."""

    def _from_the_start(self) -> Any:
        """A reader of the documents of this pass."""
        if isinstance(self.documents, DatasetText):
            return iter(self.documents)
        return ShuffledDocuments(self.documents, f"{self.seed} {self.passes}")

    def __next__(self) -> Tensor:
        """Raises ArgumentError where the whole text fills no window."""
        while self._taken == len(self._ready):
            self._advance()
        self._taken += 1
        self.served += 1
        return self._ready[self._taken - 1]

    def _advance(self) -> None:
        """Read one more document, or begin the next pass."""
        before = {"documents": self._reader.state(), "read": self.read, "pending": self._cutter.pending}
        document = next(self._reader, None)
        if document is not None:
            self.read += 1
            self._before = before
            self._ready, self._taken = self._cutter.add(document), 0
            return
        if self.served == 0:
            raise ArgumentError(f"the text fills no window of {self.window} tokens. Give more text.")
        if not self.repeat:
            raise StopIteration
        self.passes += 1
        self._reader = self._from_the_start()
        self._cutter = WindowCutter(self.tokenizer, self.window)

    def state(self) -> dict[str, Any]:
        """The position, as JSON-able data."""
        return {
            "served": self.served,
            "passes": self.passes,
            "taken": self._taken,
            "before": self._before,
            "sha256": self.sha256,
        }

    @cached_property
    def sha256(self) -> str:
        """Hash of the documents (`corpus.text_hash`); of a dataset its fingerprint."""
        return self.documents.fingerprint if isinstance(self.documents, DatasetText) else text_hash(self.documents)

    @property
    def facts(self) -> dict[str, Any]:
        """What was read, for the files of SAEs."""
        if isinstance(self.documents, DatasetText):
            return {"dataset": self.documents.facts, **({"documents": self.read} if self.read else {})}
        return {"sha256": self.sha256, "documents": len(self.documents)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, of a stream over the same documents.

        Raises:
            ArgumentError: over other documents.
        """
        if state["sha256"] != self.sha256:
            raise ArgumentError(
                f"the text has changed since training stopped (sha256 {self.sha256[:12]}, before {state['sha256'][:12]}). "
                "Resume with the same text, or start anew in another folder."
            )
        self.served, self.passes = state["served"], state["passes"]
        before = state["before"]
        self._reader = self._from_the_start()
        self._reader.load_state(before["documents"])
        self.read, self._cutter.pending = before["read"], list(before["pending"])
        if self.served:
            self._advance()
        self._taken = state["taken"]


def tokens_per_forward(device: torch.device) -> int:
    """Tokens that a language model on `device` reads at once."""
    return TOKENS_PER_FORWARD_QUEUED if queued(device) else TOKENS_PER_FORWARD


def activations_of(
    model: HookedModel, sites: Sequence[str], windows: Iterator[Tensor], skip_first_tokens: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Per forward pass, the activations of the tokens that count: `{site: [n, width]}`, in the order of the text.

    `windows` are ids [window] of one length; of a vision model, images [channels, height, width], of which every token counts.
    Outliers are among them (`WithoutOutliers`): which tokens there are depends on ids only, not on the sites.
    """
    special = special_ids(model.tokenizer)
    first = next(windows, None)
    if first is None:
        return
    rows = max(1, tokens_per_forward(model.device) // _ids(model, first).shape[-1])
    head = [first]
    while batch := head + list(islice(windows, rows - len(head))):
        head = []
        given = torch.stack(batch)
        # The ids are on the host: which tokens count is known before the model has run, and nobody waits for it.
        kept = keep_mask(_ids(model, given), None, special, skip_first_tokens).view(-1).nonzero().view(-1)
        values = model.activations(given, sites)
        places = _everywhere(kept, values)
        yield {site: x.flatten(0, 1).index_select(0, places[x.device]) for site, x in values.items()}


def _everywhere(indices: Tensor, at: Mapping[str, Tensor]) -> dict[torch.device, Tensor]:
    """The same indices on each of the devices of some tensors."""
    return {device: send(indices, device) for device in {x.device for x in at.values()}}


def _ids(model: HookedModel, x: Tensor) -> Tensor:
    """Windows of ids as they are; of images, the ids that stand for their tokens."""
    return x if takes_text(model.lm) else image_batch(model.lm, x, model.device).ids


def mask_rules(
    chunks: Iterator[dict[str, Tensor]], max_norm_ratio: float, skip_first_tokens: int = 0
) -> dict[str, MaskRule]:
    """The rule of each site, with the median norm of the first tokens of `chunks`, which are those of `activations_of`.

    Where the median is 0 or not finite there are no outliers to be told from it, and the rule has no largest norm.

    Warns (UserWarning) where the rule leaves out so many of these tokens that they are no outliers.
    """
    parts: dict[str, list[Tensor]] = {}
    tokens = 0
    for chunk in chunks:
        for site, x in chunk.items():
            parts.setdefault(site, []).append(_norm(x))
        tokens += len(next(iter(chunk.values())))
        if tokens >= MEDIAN_TOKENS:
            break
    rules = {}
    for site, norms in parts.items():
        norm = torch.cat(norms)[:MEDIAN_TOKENS]
        median = float(norm.median()) if len(norm) else 0.0
        if not 0 < median < math.inf:
            rules[site] = MaskRule(skip_first_tokens=skip_first_tokens)
            continue
        rules[site] = MaskRule(skip_first_tokens=skip_first_tokens, max_norm_ratio=max_norm_ratio, median_norm=median)
        if (share := float(is_outlier(norm, rules[site]).double().mean())) > MANY_OUTLIERS:
            warnings.warn(
                f"{share:.1%} of the tokens at {site} have a norm above {max_norm_ratio:g} x the median ({median:.4g}) and "
                "are left out, too many for outliers. Raise max_norm_ratio, or switch it off with 0.",
                UserWarning,
                stacklevel=3,
            )
    return rules


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.float(), dim=-1)


class Place(Protocol):
    """What a stream of activations is made from and can go on from, such as a `TextStream`."""

    def state(self) -> dict[str, Any]:
        """The place, as JSON-able data."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on there."""
        ...


class WithoutOutliers(Iterator[dict[str, Tensor]]):
    """Chunks without the tokens that are an outlier at any of the sites, so that all sites go on with the same tokens.

    How many these are is found out on the device. A GPU is given the next pass of the model before the answer is waited for, so
    that it has work meanwhile; `state` is the place before what has not been served.
    """

    def __init__(
        self, chunks: Iterator[dict[str, Tensor]], rules: Mapping[str, MaskRule], text: Place | None = None
    ) -> None:
        """`text` is what the chunks are made from; without it there is no state."""
        self.chunks, self.rules, self.text = chunks, rules, text
        self.ahead: tuple[dict[str, Tensor], list[Callable[[], Tensor]]] | None = None
        """The next chunk, where it has been begun, and its outliers by site."""
        self._before: dict[str, Any] | None = None
        """The place before it."""

    def __next__(self) -> dict[str, Tensor]:
        self.ahead = self.ahead or self._begin()
        if self.ahead is None:
            raise StopIteration
        chunk, found = self.ahead
        self.ahead = self._begin() if any(queued(x.device) for x in chunk.values()) else None
        outliers = torch.stack([each() for each in found]).any(0)
        if not outliers.any():
            return chunk
        kept = (~outliers).nonzero().view(-1)
        places = _everywhere(kept, chunk)
        return {site: x.index_select(0, places[x.device]) for site, x in chunk.items()}

    def _begin(self) -> tuple[dict[str, Tensor], list[Callable[[], Tensor]]] | None:
        self._before = None if self.text is None else self.text.state()
        if (chunk := next(self.chunks, None)) is None:
            return None
        return chunk, [fetch(is_outlier(_norm(x), self.rules[site])) for site, x in chunk.items()]

    def state(self) -> dict[str, Any]:
        """The place, as JSON-able data."""
        assert self.text is not None
        return self.text.state() if self.ahead is None or self._before is None else self._before

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; the chunks must not have been read from yet."""
        assert self.text is not None
        self.text.load_state(state)


class Shuffled(Iterator[dict[str, Tensor]]):
    """Batches in random order; the last one, when the text has ended, may be smaller."""

    def __init__(
        self,
        chunks: Iterator[dict[str, Tensor]],
        *,
        buffer_tokens: int,
        batch_tokens: int,
        seed: int,
        text: Place | None = None,
    ) -> None:
        """`chunks` as `activations_of` gives them; the same seed and chunks give the same batches. `text` is what they
        are made from: with it, the state is enough to go on.

        Raises:
            ArgumentError: a buffer that holds less than two batches.
        """
        if buffer_tokens < 2 * batch_tokens:
            raise ArgumentError(
                f"a buffer of {buffer_tokens} tokens cannot mix batches of {batch_tokens}; at least two fit in."
            )
        self.chunks = chunks
        self.buffer_tokens, self.batch_tokens = buffer_tokens, batch_tokens
        self.text = text
        self.generator = torch.Generator().manual_seed(seed)
        self.buffers: dict[str, Tensor] = {}
        self.left: dict[str, Tensor] = {}
        """What of the last chunk found no room yet."""
        self.ended = False
        self.order = torch.empty(0, dtype=torch.int64)
        """Slots of the buffer that hold tokens, in random order."""
        self.position = self.until = 0
        """The next slot to serve, in that order, and where to stop and refill."""
        self.started = False

    def __next__(self) -> dict[str, Tensor]:
        if self.position >= self.until:
            self._refill()
            if len(self.order) == 0:
                raise StopIteration
        slots = self.order[self.position : min(self.position + self.batch_tokens, self.until)]
        self.position += len(slots)
        places = _everywhere(slots, self.buffers)
        return {site: buffer[places[buffer.device]] for site, buffer in self.buffers.items()}

    def _refill(self) -> None:
        """Put new tokens into the slots that have been served, and shuffle all."""
        free = self.order[: self.until] if self.started else torch.arange(self.buffer_tokens)
        filled = 0 if self.ended else self._fill(free)
        self.started = True
        live = torch.cat([self.order[self.until :], free[:filled]])
        self.order = live[torch.randperm(len(live), generator=self.generator)]
        half = max(self.batch_tokens, len(live) // 2 // self.batch_tokens * self.batch_tokens)
        self.position, self.until = 0, len(live) if self.ended else half

    def _fill(self, slots: Tensor) -> int:
        """Write new activations into these slots of all buffers; how many there were."""
        done = 0
        while done < len(slots):
            if not self.left:
                chunk = next(self.chunks, None)
                if chunk is None:
                    self.ended = True
                    return done
                self.left = chunk
            n = min(len(slots) - done, len(next(iter(self.left.values()))))
            places = _everywhere(slots[done : done + n], self.left)
            for site, x in self.left.items():
                if site not in self.buffers:
                    self.buffers[site] = x.new_empty(self.buffer_tokens, x.shape[1])
                self.buffers[site][places[x.device]] = x[:n]
            self.left = {site: x[n:] for site, x in self.left.items() if n < len(x)}
            done += n
        return done

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors (not copies) and JSON-able data to go on from; None without `text`."""
        if self.text is None:
            return None
        tensors = {"generator": self.generator.get_state(), "order": self.order}
        tensors |= {f"buffer.{site}": x for site, x in self.buffers.items()}
        tensors |= {f"left.{site}": x for site, x in self.left.items()}
        data = {"position": self.position, "until": self.until, "started": self.started, "ended": self.ended}
        return tensors, data | {"text": self.text.state()}

    def load_state(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any], device: torch.device | str) -> None:
        """Go on where `state` was taken; the chunks must not have been read from yet."""
        assert self.text is not None
        self.text.load_state(data["text"])
        self.generator.set_state(tensors["generator"].cpu())
        self.order = tensors["order"].cpu()
        for part, target in (("buffer.", self.buffers), ("left.", self.left)):
            target |= {key.removeprefix(part): x.to(device) for key, x in tensors.items() if key.startswith(part)}
        self.position, self.until = data["position"], data["until"]
        self.started, self.ended = data["started"], data["ended"]
