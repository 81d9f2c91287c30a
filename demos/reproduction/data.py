"""What SAEs of a claim are trained and measured on: planted directions, or the activations of a language model."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import saehook
from saehook import HookedModel, corpus
from saehook.activation_cache import ActivationCache, cache_key, lm_pass, weights_fingerprint
from saehook.config import MaskRule
from saehook.corpus import Document
from saehook.harvest import TextStream
from saehook.tokenization import keep_mask, special_ids, tokenizer_sha256, windows

ORDER_SEED = 0
"""All SAEs see the tokens in one order; their own seeds decide how they begin."""
SEQUENCE = 128
"""Tokens of a sequence that is measured on, and drawn again by the bootstrap."""
SEQUENCES = {"planted": 64, "stories": 64, "bundled": 32}
"""How many are measured on; fewer of the largest model."""
WIDTH = {"stories": 64, "bundled": 256}
"""Of the residual stream."""
SPREAD = 96
LONGER = 4
"""Times as much is measured on where that was too little to decide."""
HELD_OUT_SEED = 1
CHUNK = 16_384


@dataclass(frozen=True)
class HeldOut:
    """Activations that nothing was trained on."""

    x: Tensor
    """[sequences, SEQUENCE, d_in]"""
    mask: Tensor
    """[sequences, SEQUENCE] bool: tokens that count."""
    ids: Tensor | None = None
    """[sequences, SEQUENCE] int64; None for planted data."""


@dataclass(frozen=True)
class Planted:
    """Sums of unit directions with strengths 0.5 + Exp(1) around an offset; the truth is known."""

    counts: str = "poisson"
    """How many directions a token has: `constant`, 1 + `poisson` or 1 + `geometric`, `mean` on average."""
    mean: int = 4
    d_in: int = 32
    features: int = 96
    noise: float = 0.02
    offset: float = 0.5
    """Of every coordinate."""
    scale: float = 1.0
    site: str = "planted"
    times: int = 1
    """So many times `SEQUENCES` are measured on."""

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the activations."""
        return {"planted": {name: value for name, value in asdict(self).items() if name != "times"}}

    @property
    def words(self) -> str:
        """For the page."""
        return f"planted directions ({self.features} in {self.d_in} dimensions, {self.counts} counts, mean {self.mean} per token)"

    def directions(self) -> Tensor:
        """[features, d_in], unit rows."""
        generator = torch.Generator().manual_seed(99)
        return F.normalize(torch.randn(self.features, self.d_in, generator=generator), dim=-1)

    def draw(self, n: int, seed: int) -> Tensor:
        """[n, d_in]"""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(n, 1, generator=generator, dtype=torch.float64)
        if self.counts == "constant":
            wanted = torch.full((n, 1), float(self.mean), dtype=torch.float64)
        elif self.counts == "geometric":
            wanted = 1 + (torch.log1p(-uniform) / math.log1p(-1 / self.mean)).floor()
        else:
            rate = self.mean - 1
            chances = [math.exp(-rate) * rate**i / math.factorial(i) for i in range(40)]
            wanted = 1 + (uniform > torch.tensor(chances).double().cumsum(0)).sum(-1, keepdim=True)
        rank = torch.rand(n, self.features, generator=generator).argsort(-1).argsort(-1)
        strength = 0.5 - torch.log1p(-torch.rand(n, self.features, generator=generator))
        x = (strength * (rank < wanted)) @ self.directions()
        return self.scale * (x + self.noise * torch.randn(n, self.d_in, generator=generator) + self.offset)

    def chunks(self) -> Iterator[dict[str, Tensor]]:
        """Tokens without end, in the one order."""
        seed = 1000
        while True:
            yield {self.site: self.draw(CHUNK, seed)}
            seed += 1

    @functools.cached_property
    def _held(self) -> HeldOut:
        n = self.times * SEQUENCES["planted"]
        x = self.draw(n * SEQUENCE, HELD_OUT_SEED).view(n, SEQUENCE, self.d_in)
        return HeldOut(x, torch.ones(x.shape[:2], dtype=torch.bool))

    def held_out(self) -> HeldOut:
        """What is measured on."""
        return self._held

    def longer(self, times: int = LONGER) -> Planted:
        """With so many times as much to measure on."""
        return replace(self, times=times)


@dataclass(frozen=True)
class Places:
    """Where data lies that is not in the repository."""

    novels: Path | None = None
    stories_lm: Path | None = None
    stories_text: Path | None = None
    stories_held_out: Path | None = None
    checkpoints: tuple[tuple[float, Path], ...] = ()
    """Of the bundled model's training: tokens and folder, the last one the model itself."""


@dataclass(eq=False)
class LanguageModel:
    """A model with its text; both are read when they are needed."""

    name: str
    sites: tuple[str, ...]
    cache: Path
    places: Places = field(default_factory=Places)
    clean_logits: Tensor | None = None
    """Of the measured sequences, [sequences, SEQUENCE, vocabulary], once they were made."""
    times: int = 1
    """So many times `SEQUENCES` are measured on."""
    device: str = "cpu"
    """Where training activations are made."""
    _longer: dict[int, LanguageModel] = field(default_factory=dict)

    @functools.cached_property
    def model(self) -> HookedModel:
        """What is measured on, in float32 on the CPU, as both are small."""
        return self._load("cpu")

    def _load(self, device: str) -> HookedModel:
        folder = saehook.bundled("lm") if self.name == "bundled" else self.places.stories_lm
        assert folder is not None
        return HookedModel.from_pretrained(folder, device=device, dtype=torch.float32)

    @functools.cached_property
    def _trained_on(self) -> HookedModel:
        """What training activations come from."""
        return self.model if self.device == "cpu" else self._load(self.device)

    @functools.cached_property
    def documents(self) -> list[Document]:
        """The training text."""
        if self.name == "bundled":
            texts = list(corpus.read_documents(corpus.python_files()))
            files = [] if self.places.novels is None else sorted(self.places.novels.glob("*.txt"))
            for novel in corpus.read_documents(file for file in files if file.name != corpus.HELD_OUT_NOVEL):
                texts += [
                    Document(f"{novel.name}:{i}", novel.text[i : i + 20_000]) for i in range(0, len(novel.text), 20_000)
                ]
            return texts
        assert self.places.stories_text is not None
        return stories(self.places.stories_text)

    @functools.cached_property
    def held_out_ids(self) -> Tensor:
        """[sequences, SEQUENCE], spread over the held-out text; a third of what is spread is left for choices by hand."""
        if self.name == "bundled":
            texts = list(corpus.read_documents(corpus.held_out_files()))
        else:
            assert self.places.stories_held_out is not None
            texts = stories(self.places.stories_held_out)
        ids = windows(texts, self.model.tokenizer, SEQUENCE, max_tokens=150_000).ids
        places = torch.arange(self.times * SPREAD)
        spread = ids[(places * len(ids)) // len(places)]
        measured = spread[places % 3 > 0]
        return measured[:: len(measured) // (self.times * SEQUENCES[self.name])]

    def longer(self, times: int) -> LanguageModel:
        """The same with so many times as much to measure on."""
        if times not in self._longer:
            self._longer[times] = LanguageModel(self.name, self.sites, self.cache, self.places, times=times)
            self._longer[times].__dict__["model"] = self.model
        return self._longer[times]

    @functools.cached_property
    def text_sha256(self) -> str:
        """Of the training text."""
        return self._text().sha256

    def _text(self) -> TextStream:
        return TextStream(self.documents, self.model.tokenizer, self.window, repeat=True, seed=ORDER_SEED)

    @property
    def window(self) -> int:
        """Tokens of a training window."""
        return 256

    @functools.cached_property
    def _activations(self) -> ActivationCache:
        model = self.model
        common: dict[str, Any] = {
            "lm": self.name,
            "revision": None,
            "weights": weights_fingerprint(model.lm),
            "text_sha256": self.text_sha256,
            "order": f"seed {ORDER_SEED}, repeated",
            "tokenizer_sha256": tokenizer_sha256(model.tokenizer),
            "window": self.window,
            "mask_rule": str(MaskRule()),
        }
        return ActivationCache(self.cache, {site: cache_key(site=site, **common) for site in self.sites})

    def chunks(self) -> Iterator[dict[str, Tensor]]:
        """All sites at once, from one pass of the model, kept on disk."""
        return self._activations.chunks(lm_pass(self._trained_on, list(self.sites), self._text))

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What decides the activations."""
        keys = json.dumps(self._activations.keys, sort_keys=True)
        return {"activations": hashlib.sha256(keys.encode()).hexdigest()[:16], "lm": self.name}

    @functools.cached_property
    def _held_x(self) -> dict[str, Tensor]:
        found = self.model.activations(self.held_out_ids, self.sites)
        return {site: x.cpu() for site, x in found.items()}

    def held(self, site: str) -> HeldOut:
        """Activations of one site."""
        ids = self.held_out_ids
        return HeldOut(self._held_x[site].float(), keep_mask(ids, None, special_ids(self.model.tokenizer)), ids)


@dataclass(frozen=True, eq=False)
class Site:
    """One site of a language model."""

    lm: LanguageModel
    site: str

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the activations."""
        return self.lm.facts | {"site": self.site}

    @property
    def words(self) -> str:
        """For the page."""
        return f"`{self.site}` of {'the bundled model' if self.lm.name == 'bundled' else 'stories260K'}"

    @property
    def times(self) -> int:
        """So many times `SEQUENCES` are measured on."""
        return self.lm.times

    @property
    def d_in(self) -> int:
        """Width."""
        return WIDTH[self.lm.name]

    def chunks(self) -> Iterator[dict[str, Tensor]]:
        """Those of all sites of the model."""
        return self.lm.chunks()

    def held_out(self) -> HeldOut:
        """What is measured on."""
        return self.lm.held(self.site)

    def longer(self, times: int = LONGER) -> Site:
        """With so many times as much to measure on."""
        return Site(self.lm.longer(times), self.site)


Data = Planted | Site


def stories(path: Path) -> list[Document]:
    """The stories of a file: `.jsonl` of {"text": ...}, or text cut where one begins with "Once upon a time"."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        found = [json.loads(line)["text"] for line in text.splitlines() if line]
    else:
        found = re.split(r"\n\n(?=Once upon a time)", text)
    found = [re.sub(r"\s*\n\s*", "\n", story).strip() for story in found]
    return [Document(f"{path.name}:{i}", story) for i, story in enumerate(found) if story]
