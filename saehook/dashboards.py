"""Facts about a latent as plain data, for the page, a notebook or a report: no drawing here.

`latent_card` reads them off the weights and the recorded statistics. `scan_latent` runs text through the model and keeps where
the latent fires: the strongest contexts, some from each part of its range, and a histogram.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehook.edits import ablate
from saehook.errors import ArgumentError
from saehook.hooked_saes import HookedSAEs
from saehook.inspection import token_losses
from saehook.sae import QUANTILE_LEVELS

BARS_PER_OCTAVE = 2
"""Of a histogram of activations."""
CONTEXT_TOKENS = 12
"""Before and behind the strongest token of a context."""


class TokenWeight(NamedTuple):
    """What a latent's direction adds to a token's logit."""

    id: int
    token: str
    logit: float
    """W_dec[latent] · W_U[:, token], the final norm left out: of one unit of activation, before that norm's scale."""


class Neighbour(NamedTuple):
    """Another latent of the SAE."""

    latent: int
    cosine: float
    """Of the two decoder rows."""


@dataclass(frozen=True)
class LatentCard:
    """What is known of a latent without a text."""

    site: str
    latent: int
    d_sae: int
    density: float | None
    """Share of tokens on which it fired; None, as the next two, where the SAE has no statistics."""
    max_act: float | None
    mean_act: float | None
    """Over all tokens."""
    measured_tokens: int
    quantiles: dict[float, float]
    """Of its positive activations, by level; empty where they were not recorded."""
    threshold: float | None
    """What a pre-activation must exceed, where the activation function has one."""
    b_enc: float
    encoder_norm: float
    decoder_norm: float
    encoder_decoder_cosine: float | None
    """None for a transcoder, whose two vectors live at different sites."""
    raises: list[TokenWeight]
    """The tokens whose logits it raises most; empty, as the next, where the site is not as wide as the residual stream."""
    lowers: list[TokenWeight]
    neighbours: list[Neighbour]
    """The latents of the same SAE with the nearest decoder rows, nearest first."""

    @property
    def status(self) -> str:
        """`dead` where it never fired on the recorded text, `dense` above one token in ten, else `live`; `unknown` without
        statistics."""
        if self.density is None:
            return "unknown"
        return "dead" if self.density == 0 else "dense" if self.density > 0.1 else "live"

    def to_data(self) -> dict[str, Any]:
        """For JSON."""
        return {**_data(self), "status": self.status}


class Bar(NamedTuple):
    """One bar of a histogram of activations."""

    low: float
    high: float
    tokens: int


@dataclass(frozen=True)
class Context:
    """Tokens around one on which the latent fires."""

    window: int
    """Number of the window of text, from 0."""
    position: int
    """Of the strongest token in the window, which this is."""
    peak: int
    """Its index in what follows."""
    ids: list[int]
    tokens: list[str]
    activations: list[float]
    before: list[int]
    """Ids of the window in front of them."""
    loss_change: list[float | None] | None = None
    """What each token's loss, in nats, grows by when the latent is ablated in the window up to here; None for the window's
    first token, and where nobody has measured it (`ablate_contexts`)."""

    @property
    def mean_change(self) -> float | None:
        """Mean of `loss_change`."""
        known = [one for one in self.loss_change or () if one is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class LatentScan:
    """Where a latent fires in a text."""

    site: str
    latent: int
    tokens: int
    """Tokens of the mask that were read."""
    fired: int
    """On how many it fires."""
    max_act: float
    histogram: list[Bar]
    """Of the positive activations, in bars of equal width in the logarithm."""
    top: list[Context]
    """The strongest, strongest first; one for each window of text."""
    sampled: list[tuple[float, float, list[Context]]]
    """(low, high, contexts) of equal parts of the range from 0 to the maximum, the highest first: windows whose strongest
    activation lies there, evenly spread over them."""
    done: float
    """Share of the text that has been read."""

    @property
    def density(self) -> float:
        """Share of tokens on which it fires."""
        return self.fired / max(1, self.tokens)

    def to_data(self) -> dict[str, Any]:
        """For JSON."""
        return {**_data(self), "density": self.density}


def _data(value: Any) -> Any:
    """What JSON holds: objects with named fields become objects."""
    if dataclasses.is_dataclass(value):
        return {field.name: _data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {name: _data(part) for name, part in value._asdict().items()}
    if isinstance(value, (list, tuple)):
        return [_data(part) for part in value]
    return value


@torch.no_grad()
def latent_card(hooked: HookedSAEs, latent: int, site: str | None = None, n: int = 10) -> LatentCard:
    """What is known of a latent without a text; `n` tokens of each kind, and as many neighbours.

    Raises:
        LatentError: the SAE does not have it. SiteError: no SAE is attached there.
    """
    name = hooked.resolve_site(site)
    sae = hooked.saes[name]
    sae.check_latents((latent,))
    stats = sae.stats
    decoder, encoder = sae.W_dec[latent].float(), sae.W_enc[:, latent].float()
    cosines = torch.nn.functional.cosine_similarity(sae.W_dec.float(), decoder[None], dim=-1)
    cosines[latent] = -math.inf
    values, nearest = cosines.topk(min(n, sae.config.d_sae - 1))
    threshold = None
    if sae.threshold is not None:
        threshold = float(sae.threshold.expand(sae.config.d_sae)[latent])
    cosine = None if sae.is_transcoder else float(torch.nn.functional.cosine_similarity(encoder, decoder, dim=0))
    weights = logit_weights(hooked, decoder)
    quantiles = {}
    if stats is not None and stats.quantiles is not None:
        quantiles = dict(zip(QUANTILE_LEVELS, stats.quantiles[latent].tolist(), strict=True))
    return LatentCard(
        site=name,
        latent=latent,
        d_sae=sae.config.d_sae,
        density=None if stats is None else float(stats.density[latent]),
        max_act=None if stats is None else float(stats.max_act[latent]),
        mean_act=None if stats is None else float(stats.mean_act[latent]),
        measured_tokens=0 if stats is None else stats.tokens,
        quantiles=quantiles,
        threshold=threshold,
        b_enc=float(sae.b_enc[latent]),
        encoder_norm=float(encoder.norm()),
        decoder_norm=float(decoder.norm()),
        encoder_decoder_cosine=cosine,
        raises=[] if weights is None else _weights(hooked, weights, n, True),
        lowers=[] if weights is None else _weights(hooked, weights, n, False),
        neighbours=[Neighbour(i, value) for i, value in zip(nearest.tolist(), values.tolist(), strict=True)],
    )


def logit_weights(hooked: HookedSAEs, direction: Tensor) -> Tensor | None:
    """What a direction of the residual stream adds to each logit, [vocabulary] float32 on the CPU, the final norm left out; None
    where it is not as wide as that stream."""
    unembedding = hooked.lm.get_output_embeddings()
    if unembedding is None or unembedding.weight.shape[-1] != len(direction):
        return None
    weight = unembedding.weight.detach()
    return (weight @ direction.to(weight.device, weight.dtype)).float().cpu()


def _weights(hooked: HookedSAEs, weights: Tensor, n: int, largest: bool) -> list[TokenWeight]:
    # A vocabulary is often padded with rows that no token has.
    weights = weights[: len(hooked.tokenizer)]
    values, ids = weights.topk(min(n, len(weights)), largest=largest)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [TokenWeight(i, hooked.tokenizer.decode([i]), value) for i, value in pairs]


def scan_latent(
    hooked: HookedSAEs,
    latent: int,
    text: Sequence[Any] | Tensor,
    site: str | None = None,
    *,
    n_top: int = 10,
    n_parts: int = 5,
    n_sampled: int = 3,
    windows_at_once: int = 8,
) -> Generator[LatentScan, None, None]:
    """Read text and find where a latent fires: what is known so far after every few windows, and last all of it. Between two of
    them the caller may stop.

    Args:
        text: texts or rows of ids, or windows [n, length]; each is read by itself.
        n_top: contexts in `top`. n_parts, n_sampled: parts of the range, and contexts of each.

    Raises:
        LatentError: the SAE does not have it. ArgumentError: no text.
    """
    name = hooked.resolve_site(site)
    hooked.saes[name].check_latents((latent,))
    if not len(text):
        raise ArgumentError("there is no text to read. Give at least one window.")
    found = _Found(hooked, name, latent)
    for start in range(0, len(text), windows_at_once):
        rows = list(text[start : start + windows_at_once])
        for row in hooked.latents(rows, name):
            found.add(row.ids, row.of(latent).float().cpu() * row.mask, row.mask)
        yield found.scan(min(1.0, (start + len(rows)) / len(text)), n_top, n_parts, n_sampled)


class _Found:
    """What a scan has seen."""

    def __init__(self, hooked: HookedSAEs, site: str, latent: int) -> None:
        self.hooked, self.site, self.latent = hooked, site, latent
        self.windows = self.tokens = 0
        self.kept: list[tuple[float, int, Tensor, Tensor]] = []
        """(largest activation, number, ids, activations) of each window in which the latent fires."""

    def add(self, ids: Tensor, acts: Tensor, mask: Tensor) -> None:
        """One window: ids [n], activations [n], 0 outside the mask [n]."""
        if (largest := float(acts.max())) > 0:
            self.kept.append((largest, self.windows, ids, acts))
        self.windows += 1
        self.tokens += int(mask.sum())

    def scan(self, done: float, n_top: int, n_parts: int, n_sampled: int) -> LatentScan:
        """So far."""
        order = sorted(self.kept, key=lambda one: (-one[0], one[1]))
        most = order[0][0] if order else 0.0
        sampled = []
        for part in range(n_parts, 0, -1) if order else ():
            low, high = (most * edge / n_parts for edge in (part - 1, part))
            inside = [one for one in order if low < one[0] <= high or (part == n_parts and one[0] == most)]
            step = max(1, len(inside) // n_sampled)
            sampled.append((low, high, [self.context(*one) for one in inside[::step][:n_sampled]]))
        positive = torch.cat([acts[acts > 0] for *_, acts in order]) if order else torch.zeros(0)
        return LatentScan(
            site=self.site,
            latent=self.latent,
            tokens=self.tokens,
            fired=len(positive),
            max_act=most,
            histogram=bars(positive),
            top=[self.context(*one) for one in order[:n_top]],
            sampled=sampled,
            done=done,
        )

    def context(self, largest: float, window: int, ids: Tensor, acts: Tensor) -> Context:
        """Around the strongest token of a window."""
        position = int(acts.argmax())
        start = max(0, position - CONTEXT_TOKENS)
        cut = slice(start, position + CONTEXT_TOKENS + 1)
        chosen = ids[cut].tolist()
        tokens = [self.hooked.tokenizer.decode([i]) for i in chosen]
        return Context(window, position, position - start, chosen, tokens, acts[cut].tolist(), ids[:start].tolist())


def ablate_contexts(hooked: HookedSAEs, scan: LatentScan) -> Generator[LatentScan, None, None]:
    """The scan with the `loss_change` of one more context each time, in order: two forward passes of its window. Between two of
    them the caller may stop."""
    edit = ablate(scan.latent, site=scan.site)
    known: dict[int, list[float | None]] = {}

    def filled(contexts: list[Context]) -> list[Context]:
        return [replace(one, loss_change=known.get(one.window)) for one in contexts]

    for one in [*scan.top, *(one for *_, contexts in scan.sampled for one in contexts)]:
        if one.window in known:  # a window has one context, which may stand in both
            continue
        ids = torch.tensor([*one.before, *one.ids])
        with torch.no_grad():
            clean, without = (token_losses(hooked(ids, edits).logits[0].float(), ids) for edits in ((), edit))
        change = (without - clean)[len(one.before) :].tolist()
        known[one.window] = [None if math.isnan(value) else value for value in change]
        sampled = [(low, high, filled(contexts)) for low, high, contexts in scan.sampled]
        yield replace(scan, top=filled(scan.top), sampled=sampled)


def bars(values: Tensor) -> list[Bar]:
    """A histogram of positive values [n], in bars of equal width in the logarithm, from the smallest to the largest."""
    if not len(values):
        return []
    places = (values.double().log2() * BARS_PER_OCTAVE).floor().long()
    low = int(places.min())
    counts = (places - low).bincount().tolist()
    return [
        Bar(2 ** ((low + i) / BARS_PER_OCTAVE), 2 ** ((low + i + 1) / BARS_PER_OCTAVE), n) for i, n in enumerate(counts)
    ]
