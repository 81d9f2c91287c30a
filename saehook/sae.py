"""The sparse autoencoder: parameters, `encode`, `decode`, `forward`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saehook import kernels
from saehook.activation_fns import activate, check_threshold
from saehook.config import AbsTopK, BatchTopK, JumpReLU, MaskRule, SAEConfig, TopK
from saehook.errors import ArgumentError, FormatError, LatentError, MissingStatError, ShapeError

LAYER_NORM_EPS = 1e-5
INITIAL_JUMPRELU_THRESHOLD = 1e-3
DENSE_ENTRIES = 2**26
"""Latent activations that a wide SAE makes at once as one dense tensor, at most: 256 MiB in float32."""
QUANTILE_LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
"""Levels of `LatentStats.quantiles`."""


class SAEOutput(NamedTuple):
    """What `SAE.forward` returns."""

    x_hat: Tensor
    """Reconstruction, [..., d_out], in the SAE's dtype."""
    acts: Tensor
    """Latent activations, [..., d_sae]."""
    pre_acts: Tensor
    """Before the activation function, [..., d_sae]."""


@dataclass
class LatentStats:
    """Facts measured on text, most of them per latent; `tokens` says on how much."""

    max_act: Tensor
    """Largest activation seen, [d_sae], float32; 0 for a latent that never fired."""
    density: Tensor
    """Share of tokens on which the latent fired, [d_sae], float32."""
    mean_act: Tensor
    """Mean activation over all tokens, [d_sae], float32."""
    tokens: int
    """Tokens of the mask that were measured."""
    quantiles: Tensor | None = None
    """Quantiles of the positive activations at `QUANTILE_LEVELS`, [d_sae, levels], float32, within 7.2 % (see
    `metrics.Histogram`); 0 for a latent that never fired. None in a file from before they were measured."""
    mean_error: Tensor | None = None
    """Mean of x - x_hat, of a transcoder y - x_hat, over all tokens, [d_out], float32. None in such a file."""


class SAE(nn.Module):
    """z = activation((x - b_dec) W_enc + b_enc),  x_hat = z W_dec + b_dec.

    Shapes: `W_enc` [d_in, d_sae], `W_dec` [d_sae, d_in] (row i is the direction of latent i), `b_enc` [d_sae],
    `b_dec` [d_in], `threshold` None, scalar or [d_sae] (float32 always: bf16 thresholds round away what training
    learned). All are `nn.Parameter`s and may be set in place.

    A transcoder reads x at one site and reconstructs y at another: `W_dec` is [d_sae, d_out], `b_dec` [d_out], and
    y_hat = z W_dec + b_dec + x W_skipᵀ, with `W_skip` None or [d_out, d_in] as in SAELens' files.
    """

    def __init__(
        self,
        config: SAEConfig,
        *,
        site: str | None = None,
        site_out: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        draw: Callable[[int], Tensor] | None = None,
    ) -> None:
        """A new SAE: random unit decoder rows, encoder = decoder transposed, biases 0 (Gao et al. 2024, A.1).

        The encoder of a transcoder has random unit columns of its own, and its skip map starts at 0. `threshold` starts at
        0.001 for JumpReLU and is None for the others: a BatchTopK gets it from its trainer.

        Args:
            site: where x is read.
            site_out: where a transcoder's y is; None for an SAE.
            draw: gives the random unit rows of a width, [d_sae, width]; None: from `generator`.
        """
        super().__init__()
        self.config = config
        self.site = site
        self.site_out = site_out
        self.stats: LatentStats | None = None
        self.density: Tensor | None = None
        """Share of tokens on which each latent fired, [d_sae], float32, where a file of SAELens says it without `stats`."""
        self.mask_rule = MaskRule()
        """Which tokens count for this SAE, in training and wherever it is used."""
        self.metadata: dict[str, Any] = {}
        self.source: Path | None = None
        """The folder that `load_sae` read it from; in the formats of others the file of its weights."""
        self.mapped = False
        """Whether the weights lie in that file, and only what is used of them is read."""

        def unit_rows(width: int) -> Tensor:
            if device is not None and torch.device(device).type == "meta":  # sizes only: whoever asks fills them in
                return torch.empty(config.d_sae, width, device=device, dtype=dtype)
            if draw is not None:
                return draw(width).to(device, dtype)
            return F.normalize(torch.randn(config.d_sae, width, generator=generator), dim=-1).to(device, dtype)

        rows = unit_rows(self.d_out)
        self.W_enc = nn.Parameter((unit_rows(config.d_in) if self.is_transcoder else rows).T.contiguous())
        self.W_dec = nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae, device=device, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, device=device, dtype=dtype))
        self.register_parameter("W_skip", None)
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(self.d_out, config.d_in, device=device, dtype=dtype))
        self.register_parameter("threshold", None)
        if isinstance(config.activation, JumpReLU):
            self.threshold = nn.Parameter(torch.full((config.d_sae,), INITIAL_JUMPRELU_THRESHOLD, device=device))

    @property
    def d_in(self) -> int:
        """Width of the site that is read."""
        return self.config.d_in

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed: of x, or of a transcoder's y."""
        return self.config.d_out or self.config.d_in

    @property
    def is_transcoder(self) -> bool:
        """Whether another site is reconstructed than the one that is read."""
        return self.config.d_out is not None

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.config.d_sae

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; `threshold` is float32 whatever this says."""
        return self.W_enc.dtype

    def extra_repr(self) -> str:
        """One line for `print(sae)`."""
        line = f"{self.config.activation}, d_in={self.d_in}, d_sae={self.d_sae}, site={self.site!r}"
        return f"{line}, d_out={self.d_out}, site_out={self.site_out!r}" if self.is_transcoder else line

    def _apply(self, fn, recurse: bool = True):  # nn.Module's hook for .to(), .half(), ...
        before = None if self.threshold is None else self.threshold.detach()
        super()._apply(fn, recurse)
        if before is not None and self.threshold.dtype != torch.float32:
            # From the values before: those that went through another dtype are rounded.
            threshold = before.to(self.threshold.device, torch.float32)
            self.threshold = nn.Parameter(threshold, requires_grad=self.threshold.requires_grad)
        return self

    def _normalize(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The token as the SAE sees it, and what puts x_hat back: x_hat * scale + mean; (x, None, None) where nothing does."""
        if self.config.normalize == "none":
            return x, None, None
        if self.config.normalize == "constant_norm":
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
            return x * (self.d_in**0.5 / norm), torch.zeros_like(norm), norm / self.d_in**0.5
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        # The peers (OpenAI, SAELens, BatchTopK) divide by std + eps and multiply by std.
        return (x - mean) / (std + LAYER_NORM_EPS), mean, std

    def inputs(self, x: Tensor) -> Tensor:
        """What the encoder multiplies: `x` [..., d_in] as a list of tokens [n, d_in], normalised and centred, in the SAE's dtype.

        Raises:
            ShapeError: the last dimension of `x` is not d_in.
        """
        if x.shape[-1] != self.d_in:
            raise ShapeError(
                f"the SAE expects activations of width d_in = {self.d_in}, but got {tuple(x.shape)}. "
                f"It belongs to another site or model{f' (recorded site: {self.site})' if self.site else ''}."
            )
        x, _, _ = self._normalize(x.to(self.dtype))
        if self.config.subtract_b_dec:
            x = x - self.b_dec
        return x.reshape(-1, self.d_in)

    @property
    def by_pairs(self) -> bool:
        """Whether runs hold its activations as pairs (`sparse_acts`)."""
        return kernels.by_blocks(self.d_sae)

    @property
    def tokens_at_once(self) -> int | None:
        """Tokens that `encode`, `pre_acts` and `forward` take at once; None: any number, as of every SAE that is not wide
        (`kernels.by_blocks`)."""
        return max(1, DENSE_ENTRIES // self.d_sae) if kernels.is_wide(self.d_sae) else None

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """`x` [n, d_in] as pieces that `encode`, `pre_acts` and `forward` take."""
        return x.split(self.tokens_at_once or max(1, len(x)))

    def pre_acts(self, x: Tensor) -> Tensor:
        """Pre-activations, [..., d_sae], in the SAE's dtype. `x` is [..., d_in], of any float dtype.

        Raises:
            ShapeError: the last dimension of `x` is not d_in.
            ArgumentError: the result would be too large; see `tokens_at_once`.
        """
        inputs = self.inputs(x)
        if self.tokens_at_once is not None and len(inputs) > self.tokens_at_once:
            size = len(inputs) * self.d_sae * self.dtype.itemsize / 2**30
            raise ArgumentError(
                f"{len(inputs):,} tokens x {self.d_sae:,} latents as one dense tensor would be {size:,.1f} GiB. Give at most "
                f"{self.tokens_at_once} tokens at once (sae.pieces(x)), or use what keeps only those that fire: "
                "hooked.latents(text), edits and splice, or saehook.sparse_acts.encode(sae, x). SAEHOOK_KERNELS=reference "
                "in the environment lifts the limit."
            )
        pre_acts = torch.addmm(self.b_enc, inputs, self.W_enc)
        self.check_read(pre_acts, inputs)
        return pre_acts.view(*x.shape[:-1], self.d_sae)

    def check_read(self, result: Tensor, given: Tensor | None = None) -> None:
        """Raises FormatError where the weights of a mapped file gave NaN or infinity, from numbers that were finite."""
        if self.mapped and not bool(result.isfinite().all()) and (given is None or bool(given.isfinite().all())):
            raise FormatError(f"the weights in {self.source} give NaN or infinity; the file is damaged. Copy it again.")

    def activate(self, pre_acts: Tensor) -> Tensor:
        """Latent activations from pre-activations by the inference rule; see `encode`."""
        return activate(pre_acts, self.config.activation, self.threshold)

    def fires(self, acts: Tensor) -> Tensor:
        """Where latents are active: above 0, of an AbsTopK also below."""
        return acts != 0 if isinstance(self.config.activation, AbsTopK) else acts > 0

    def check_threshold(self) -> None:
        """Raises MissingStatError for a BatchTopK that has no threshold yet."""
        check_threshold(self.config.activation, self.threshold)

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations, dense [..., d_sae], by the inference rule: every token is treated alone.

        Raises:
            ShapeError: the last dimension of `x` is not d_in.
            MissingStatError: a BatchTopK that has no threshold yet.
            ArgumentError: the result would be too large; see `tokens_at_once`.
        """
        return self.activate(self.pre_acts(x))

    def decode(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstruction [..., d_out] of latent activations [..., d_sae].

        `x` is only needed by an SAE that normalises each token, whose mean and scale are put back, and by a transcoder
        with a skip map.

        Raises:
            ShapeError: the last dimension of `acts` is not d_sae.
            ArgumentError: `x` is missing and needed.
        """
        if acts.shape[-1] != self.d_sae:
            raise ShapeError(
                f"the SAE has d_sae = {self.d_sae} latents, but got activations of shape {tuple(acts.shape)}."
            )
        flat = self.combine(acts.to(self.dtype).reshape(-1, self.d_sae), self.b_dec)
        return self.finish(flat.view(*acts.shape[:-1], self.d_out), x)

    # What runs ask of the weights; `distributed.sharded_sae` answers where these lie on several devices.

    def combine(self, acts: Tensor, offset: Tensor | None = None) -> Tensor:
        """z W_dec [..., d_out] of `acts` [..., d_sae], plus `offset` [d_out], which needs z as a matrix, in the dtype of both."""
        W_dec = self.W_dec.to(acts.dtype)
        return acts @ W_dec if offset is None else torch.addmm(offset, acts, W_dec)

    def combine_pairs(self, values: Tensor, pairs: kernels.Selection, dtype: torch.dtype | None = None) -> Tensor:
        """The same of pairs with values [m], [n_tokens, d_out], computed in `dtype`; None: that of the weights."""
        W_dec = self.W_dec
        if dtype is not None and dtype != W_dec.dtype:  # only the rows that are used are converted
            used, latents = pairs.latents.unique(return_inverse=True)
            values, W_dec = values.to(dtype), W_dec[used].to(dtype)
            pairs = kernels.Selection(pairs.tokens, latents, pairs.n_tokens, len(used), order="token")
        return kernels.sparse.decode(values, W_dec, pairs)

    def fired(self, inputs: Tensor) -> kernels.Encoded:
        """Activations of `inputs` [n, d_in] (`SAE.inputs`) that are not 0, [m], without gradients, and their pairs, ordered by
        token; some latents are encoded at a time. Not of an AbsTopK or GroupMax."""
        if isinstance(self.config.activation, TopK):
            return kernels.Encoded(*kernels.encode_topk(inputs, self.W_enc, self.b_enc, self.config.activation.k))
        self.check_threshold()
        return kernels.Encoded(*kernels.encode_above(inputs, self.W_enc, self.b_enc, self.threshold))

    @property
    def learns(self) -> bool:
        """Whether the encoder's weights may get gradients."""
        return self.W_enc.requires_grad or self.b_enc.requires_grad

    def encoder_rows(self, latents: Tensor) -> Tensor:
        """Columns of W_enc, as rows [s, d_in]."""
        return self.W_enc.T[latents]

    def finish(self, x_hat: Tensor, x: Tensor | None) -> Tensor:
        """The reconstruction from z W_dec + b_dec, [..., d_out]: with the skip map, or the token's mean and scale put back.

        Raises:
            ArgumentError: `x` is missing and needed; see `decode`.
        """
        self.check_read(x_hat, x)
        if self.config.normalize == "none" and self.W_skip is None:
            return x_hat
        if x is None:
            what = "normalises each token" if self.W_skip is None else "has a skip map"
            raise ArgumentError(
                f"this SAE {what}, so the reconstruction needs the token itself: call decode(acts, x=x), or sae(x).x_hat."
            )
        if self.W_skip is not None:
            return x_hat + x.to(self.dtype) @ self.W_skip.T
        _, mean, std = self._normalize(x.to(self.dtype))
        assert mean is not None
        assert std is not None
        return x_hat * std + mean

    def decoder_rows(self, latents: Tensor) -> Tensor:
        """Directions of some latents, [s, d_out]; of a mapped file nothing else is read.

        Raises:
            FormatError: a mapped file holds NaN or infinity there.
        """
        rows = self.W_dec[latents]
        self.check_read(rows)
        return rows

    def scale(self, x: Tensor) -> Tensor | None:
        """Factor per token, [..., 1], from latent units to the units of `x`; None where it is 1 everywhere."""
        return self._normalize(x.to(self.dtype))[2]

    def forward(self, x: Tensor) -> SAEOutput:
        """Reconstruction, activations and pre-activations of `x` [..., d_in]."""
        pre_acts = self.pre_acts(x)
        acts = self.activate(pre_acts)
        return SAEOutput(self.decode(acts, x), acts, pre_acts)

    def check_latents(self, latents: tuple[int, ...]) -> None:
        """Raises LatentError unless every latent is in 0..d_sae-1."""
        for latent in latents:
            if not 0 <= latent < self.d_sae:
                where = f" at {self.site}" if self.site else ""
                raise LatentError(f"latent {latent} is outside 0..{self.d_sae - 1}, the latents of the SAE{where}.")

    def max_act(self, latents: tuple[int, ...]) -> Tensor:
        """Recorded maxima of `latents`, [len(latents)], float32, for edits in units of the maximum.

        Raises:
            MissingStatError: the file holds no statistics, or a latent never fired when they were measured.
        """
        if self.stats is None:
            raise MissingStatError(
                "unit='max' needs each latent's recorded maximum, and this SAE has no statistics. Measure them with "
                "`saehook stats SAE --text FILE`, or use unit='raw' or unit='norm'."
            )
        return self._maxima(self.stats, latents, "max")

    def quantile_act(self, latents: tuple[int, ...], level: float) -> Tensor:
        """Quantiles of the positive activations of `latents`, [len(latents)], float32, for edits in such units.

        Linear between the recorded levels, from 0 at level 0 to the recorded maximum at level 1.

        Raises:
            ArgumentError: `level` is outside 0..1.
            MissingStatError: the file holds no statistics or none of this kind, or a latent never fired when they were
                measured.
        """
        if not 0 <= level <= 1:
            raise ArgumentError(f"the level of a quantile is {level!r}; a number from 0 to 1 is expected.")
        if self.stats is None or self.stats.quantiles is None:
            what = "no statistics" if self.stats is None else "statistics from before quantiles were measured"
            raise MissingStatError(
                f"unit='quantile' needs each latent's recorded quantiles, and this SAE has {what}. Measure them with "
                "`saehook stats SAE --text FILE`, or use unit='raw' or unit='norm'."
            )
        maxima = self._maxima(self.stats, latents, "quantile")
        levels = (0.0, *QUANTILE_LEVELS, 1.0)
        values = F.pad(torch.cat([self.stats.quantiles[list(latents)], maxima[:, None]], 1), (1, 0))
        i = max(1, bisect_left(levels, level))
        share = (level - levels[i - 1]) / (levels[i] - levels[i - 1])
        return torch.lerp(values[:, i - 1], values[:, i], share)

    @staticmethod
    def _maxima(stats: LatentStats, latents: tuple[int, ...], unit: str) -> Tensor:
        maxima = stats.max_act[list(latents)]
        for latent, maximum in zip(latents, maxima.tolist(), strict=True):
            if maximum <= 0:
                raise MissingStatError(
                    f"latent {latent} never fired on the {stats.tokens:,} tokens its statistics come from, so "
                    f"unit={unit!r} has no meaning for it. Use unit='raw' or unit='norm'."
                )
        return maxima

    def mean_act(self, latents: tuple[int, ...]) -> Tensor:
        """Recorded means of `latents` over all tokens, [len(latents)], float32.

        Raises:
            MissingStatError: the file holds no statistics.
        """
        if self.stats is None:
            raise MissingStatError(
                "the operation 'mean' needs each latent's recorded mean, and this SAE has no statistics. Measure them with "
                "`saehook stats SAE --text FILE`, or use 'set' with a value."
            )
        return self.stats.mean_act[list(latents)]

    def mean_error(self) -> Tensor:
        """Recorded mean of x - x_hat, of a transcoder y - x_hat, over all tokens, [d_out], float32.

        Raises:
            MissingStatError: the file holds no statistics, or none of this kind.
        """
        if self.stats is None or self.stats.mean_error is None:
            what = "no statistics" if self.stats is None else "statistics from before the error was measured"
            raise MissingStatError(
                f"error='mean' needs the recorded mean of the error, and this SAE has {what}. Measure it with "
                "`saehook stats SAE --text FILE`, or use error='keep' or error='drop'."
            )
        return self.stats.mean_error

    def set_threshold(self, value: float | Tensor) -> None:
        """Set the inference threshold (BatchTopK, JumpReLU) to one value, or one per latent, in float32."""
        if not isinstance(self.config.activation, (BatchTopK, JumpReLU)):
            raise ArgumentError(f"{self.config.activation} has no threshold.")
        value = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        self.threshold = nn.Parameter(value.expand(self.d_sae).clone())
