"""Random numbers of sampling: noise of each row's own, and a random state that a second run begins with again.

A token is drawn as argmax_v log p_v + g_v with Gumbel noise g, which is a draw from p (Maddison et al. 2014, "A* Sampling",
section 2). With a seed, g depends on the seed, the row of the input, the number of its return sequence and the number of the
new token, and on nothing else: a row gets the same noise alone and in a batch, with and without cache, edited and unedited,
and by prompt lookup or with an assistant model the tokens of plain sampling.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.configuration_utils import BaseWatermarkingConfig

from saehook.errors import ArgumentError

FAR = 1e4
"""Below the score of the token that was drawn are all others: exp(-FAR) is 0 in float32."""


@dataclass(repr=False)
class RowNoise(BaseWatermarkingConfig):
    """Noise of a seeded generation.

    A watermark for Hugging Face's `generate`, since what a watermark makes of the scores comes after temperature, top-k and
    all else that shapes p; a `logits_processor` of the caller comes before them.
    """

    seed: int
    length: int
    """Of the input, padding included."""
    returned: int = 1
    """Return sequences of each row of the input, next to each other."""
    same: bool = False
    """All rows have the noise of the first."""

    def validate(self) -> None:
        pass

    def construct_processor(self, vocab_size: int, device: Any = None) -> LogitsProcessor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Draw(self)

    def of(self, scores: Tensor, token: int) -> Tensor:
        """Gumbel noise for the scores [rows, vocabulary] of new token number `token`, in their dtype."""
        generator = torch.Generator(scores.device)
        noise = torch.empty_like(scores)
        for number, row in enumerate(noise[:1] if self.same else noise):
            key = f"{self.seed} {number // self.returned} {number % self.returned} {token}"
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            row.exponential_(generator=generator.manual_seed(int.from_bytes(digest)))
        noise = noise[:1].expand_as(scores).clone() if self.same else noise
        return noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_().neg_()


def with_noise(hf: dict[str, Any], noise: RowNoise, default: Any) -> dict[str, Any]:
    """Arguments of `generate` that draw with this noise, where they sample; one with a real watermark draws from torch's
    random state. `default`: the model's generation config."""
    given = hf.get("generation_config")

    def setting(name: str) -> Any:
        places = (hf, vars(given) if given is not None else {}, vars(default))
        return next((place[name] for place in places if place.get(name) is not None), None)

    if not setting("do_sample") or setting("watermarking_config") is not None:
        return hf
    if given is None:
        return hf | {"watermarking_config": noise}
    given = copy.copy(given)
    given.watermarking_config = noise
    return hf | {"generation_config": given}


class _Draw(LogitsProcessor):
    """Leaves one token to draw. Scores that are not finite go on, for `generate` to complain about."""

    def __init__(self, noise: RowNoise) -> None:
        self.noise = noise

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        noise = self.noise.of(scores, input_ids.shape[1] - self.noise.length)
        drawn = (scores + noise).argmax(-1, keepdim=True)
        score = scores.gather(-1, drawn)
        score = torch.where(score.isfinite(), 0.0, score)
        return (score - FAR).expand_as(scores).scatter(-1, drawn, score)


class RandomState:
    """The random state of torch that a run begins with: a seed's, or the caller's, which a second run begins with again."""

    def __init__(self, seed: int | None, device: torch.device) -> None:
        """`device`: of the model.

        Raises:
            ArgumentError: a seed that is no whole number.
        """
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ArgumentError(f"seed={seed!r}; a whole number is expected, or None for the caller's random state.")
        self.seed = seed
        self.device = device
        self._first: list[Tensor] | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Draw from it; but for the first run from the caller's state, that one is left alone."""
        cuda = self.device.type == "cuda"
        own = self.seed is not None or self._first is not None
        with torch.random.fork_rng(devices=[self.device] if cuda else [], enabled=own):
            if self.seed is not None:
                torch.manual_seed(self.seed)
            elif self._first is None:
                self._first = [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if cuda else [])]
            else:
                torch.set_rng_state(self._first[0])
                if cuda:
                    torch.cuda.set_rng_state(self._first[1], self.device)
            yield
