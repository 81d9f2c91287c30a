"""Every knob on one page: frozen dataclasses, checked when they are made. Standard library only.

The command line is generated from `TrainConfig`: a field's name, type, default and docstring become the option.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saehook.errors import ArgumentError, FormatError


def count(value: str | int | float) -> int:
    """`600k`, `5M`, `1.5B`, `2**24` or a whole number as an integer; k, M, B and T are powers of ten.

    Raises:
        ArgumentError: anything else, or a negative number.
    """
    if isinstance(value, str):
        text = value.strip().replace("_", "").replace(",", "")
        try:
            if "**" in text:
                base, exponent = (int(part) for part in text.split("**"))
                number: float = base**exponent if 0 <= exponent <= 64 else math.inf
            else:
                scale = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}.get(text[-1:])
                number = float(text[:-1]) * scale if scale else float(text)
        except ValueError:
            number = math.nan
    else:
        number = value
    if not math.isfinite(number) or number < 0 or number != round(number):
        raise ArgumentError(f"{value!r} is not a count. Write a whole number such as 600000, 600k, 5M, 1.5B or 2**24.")
    return int(round(number))


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(
                f"{type(config).__name__}.{name} is {value!r}; a whole number of at least 1 is expected."
            )


def _number(config: object, name: str, low: float, high: float = math.inf) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or math.isnan(value):
        raise ArgumentError(f"{type(config).__name__}.{name} is {value!r}; a number from {low} to {high} is expected.")


@dataclass(frozen=True, kw_only=True)
class ReLU:
    """z = max(0, pre)."""


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k largest pre-activations of a token, then ReLU (Gao et al. 2024, equation 4 and the released code)."""

    k: int
    """Latents kept per token; fewer fire where fewer pre-activations are positive."""

    def __post_init__(self) -> None:
        _positive(self, "k")


@dataclass(frozen=True, kw_only=True)
class BatchTopK:
    """Training keeps the batch × k largest of the whole batch; inference is a JumpReLU with the SAE's `threshold`
    (Bussmann et al. 2024, section 3)."""

    k: int
    """Latents kept per token on average."""

    def __post_init__(self) -> None:
        _positive(self, "k")


@dataclass(frozen=True, kw_only=True)
class JumpReLU:
    """z = pre where pre > threshold, else 0; one threshold per latent (Rajamanoharan et al. 2024)."""


@dataclass(frozen=True, kw_only=True)
class AbsTopK:
    """The k pre-activations of a token that are largest in magnitude, with their signs: latents may be negative
    (arXiv 2510.00404). Read from files, not trained here."""

    k: int
    """Latents kept per token."""

    def __post_init__(self) -> None:
        _positive(self, "k")


@dataclass(frozen=True, kw_only=True)
class GroupMax:
    """The latents lie in k groups of neighbours, and of each group the largest is kept, then ReLU (sparsify). Read from
    files, not trained here."""

    k: int
    """Groups, and so latents kept per token; it divides d_sae."""

    def __post_init__(self) -> None:
        _positive(self, "k")


Activation = ReLU | TopK | BatchTopK | JumpReLU | AbsTopK | GroupMax
TRAINED: dict[str, type[Activation]] = {"relu": ReLU, "topk": TopK, "batchtopk": BatchTopK, "jumprelu": JumpReLU}
"""Those that can be trained, by the names used in files and on the command line."""
ACTIVATIONS: dict[str, type[Activation]] = TRAINED | {"abstopk": AbsTopK, "groupmax": GroupMax}
"""All, by the names used in files."""


NORMALIZATIONS = ("none", "layer_norm", "constant_norm")


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Shape and function of a sparse autoencoder."""

    d_in: int
    """Width of the site."""
    d_sae: int
    """Number of latents."""
    activation: Activation
    """`ReLU()`, `TopK(k=...)`, `BatchTopK(k=...)`, `JumpReLU()`; of read files also `AbsTopK(k=...)`, `GroupMax(k=...)`."""
    subtract_b_dec: bool = True
    """Whether the encoder sees x - b_dec (else x)."""
    normalize: str = "none"
    """What is done to each token before, and undone after decoding. `layer_norm`: it is centred and divided by its standard
    deviation. `constant_norm`: it is scaled to the norm sqrt(d_in). `none`."""
    d_out: int | None = None
    """Transcoder: width of the site that is reconstructed from the other. None: an SAE, which reconstructs its input."""
    skip: bool = False
    """Transcoder: whether a linear map of the input is added to the reconstruction (Paulo et al. 2025)."""

    def __post_init__(self) -> None:
        _positive(self, "d_in", "d_sae")
        self._check_transcoder()
        if not isinstance(self.activation, tuple(ACTIVATIONS.values())):
            raise ArgumentError(
                f"SAEConfig.activation is {self.activation!r}; expected ReLU(), TopK(k=...), BatchTopK(k=...), JumpReLU(), "
                "AbsTopK(k=...) or GroupMax(k=...)."
            )
        k = getattr(self.activation, "k", None)
        if k is not None and k > self.d_sae:
            raise ArgumentError(f"k = {k} is larger than d_sae = {self.d_sae}; at most all latents can be kept.")
        if isinstance(self.activation, GroupMax) and self.d_sae % self.activation.k:
            raise ArgumentError(f"d_sae = {self.d_sae} latents make no {self.activation.k} groups of the same size.")
        if self.normalize not in NORMALIZATIONS:
            raise ArgumentError(
                f"SAEConfig.normalize is {self.normalize!r}; expected one of {', '.join(NORMALIZATIONS)}."
            )

    def _check_transcoder(self) -> None:
        if self.d_out is None:
            if self.skip:
                raise ArgumentError("skip=True is for a transcoder. Give d_out, the width of what it reconstructs.")
            return
        _positive(self, "d_out")
        if self.subtract_b_dec:
            raise ArgumentError("b_dec of a transcoder belongs to its output: give subtract_b_dec=False with d_out.")
        if self.normalize != "none":
            raise ArgumentError(f"a transcoder with normalize={self.normalize!r} is not supported, only 'none'.")


def activation_to_dict(activation: Activation) -> dict[str, Any]:
    """`TopK(k=32)` as `{"name": "topk", "k": 32}`."""
    name = next(name for name, kind in ACTIVATIONS.items() if type(activation) is kind)
    return {"name": name, **dataclasses.asdict(activation)}


def activation_from_dict(data: dict[str, Any]) -> Activation:
    """The inverse of `activation_to_dict`.

    Raises:
        FormatError: unknown name or field.
    """
    fields = dict(data)
    name = fields.pop("name", None)
    kind = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise FormatError(f"{data!r} names no activation function; expected one of {', '.join(ACTIVATIONS)}.")
    known = {f.name for f in dataclasses.fields(kind)}
    if set(fields) != known:
        raise FormatError(f"the activation function {data!r} should have exactly the fields {sorted(known)}.")
    return kind(**fields)


MAX_NORM_RATIO = 10.0
"""What training leaves out by default: tokens with more than ten times the median norm, as `dictionary_learning` does for
Qwen. Attention sinks have many times that, whatever the token and its place, and would decide the input scale, b_dec and the
FVU."""


MESH_TIMEOUT_SECONDS = 600.0
"""After so long without an answer a process of a run on several devices is taken for dead."""


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """Which tokens count for an SAE: those that are attended and no special token, less what the fields leave out.

    Other tokens are not trained on, keep their activation in splice, ablation and edits, and are in no metric. An edit of
    `tokens(...)` acts on them all the same.
    """

    skip_first_tokens: int = 0
    """So many tokens at the start of each row, counted from its first attended one, special tokens included."""
    max_norm_ratio: float | None = None
    """Tokens whose ‖x‖ is more than this many times `median_norm`; None: none."""
    median_norm: float | None = None
    """The median ‖x‖ at the site, a recorded number: whether a token counts depends on no other token."""

    def __post_init__(self) -> None:
        skip = self.skip_first_tokens
        if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
            raise ArgumentError(f"MaskRule.skip_first_tokens is {skip!r}; a whole number of at least 0 is expected.")
        for name, least in (("max_norm_ratio", 1.0), ("median_norm", sys.float_info.min)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and least <= value < math.inf):
                raise ArgumentError(
                    f"MaskRule.{name} is {value!r}; a finite number {'above 0' if least < 1 else 'of at least 1'} is expected."
                )
        if (self.max_norm_ratio is None) != (self.median_norm is None):
            raise ArgumentError(
                f"MaskRule.max_norm_ratio is {self.max_norm_ratio!r} and median_norm is {self.median_norm!r}; both or "
                "neither are expected."
            )

    @property
    def max_norm(self) -> float | None:
        """The largest ‖x‖ of a token that counts; None where any does."""
        if self.max_norm_ratio is None or self.median_norm is None:
            return None
        return self.max_norm_ratio * self.median_norm

    def __str__(self) -> str:
        text = "attended, and the id is not the tokenizer's bos, eos or pad"
        if self.skip_first_tokens:
            text += f"; not the first {self.skip_first_tokens} of a row"
        if self.max_norm is not None:
            text += f"; norm at most {self.max_norm:.6g} = {self.max_norm_ratio:g} x the median"
        return text


def mask_rule_from_data(data: Any) -> MaskRule:
    """A rule from what a file says: its fields, or, in files of earlier versions, the words of the rule without fields.

    Raises:
        FormatError: other words, an unknown or missing field, or a wrong value.
    """
    if data == str(MaskRule()):
        return MaskRule()
    known = [f.name for f in dataclasses.fields(MaskRule)]
    if not isinstance(data, dict) or set(data) != set(known):
        raise FormatError(
            f"the mask rule is {data!r}; an object with exactly the fields {', '.join(known)} is expected."
        )
    try:
        return MaskRule(**data)
    except ArgumentError as error:
        raise FormatError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class MultiTopK:
    """A TopK that is trained to be good with more latents, too: L(k) + weight * L(multiple * k) (Gao et al. 2024,
    section 5.3). Stored as a TopK."""

    k: int
    """Latents kept per token."""
    multiple: int = 4
    """The second loss keeps that many times k."""
    weight: float = 1 / 8
    """Weight of the second loss."""

    def __post_init__(self) -> None:
        _positive(self, "k", "multiple")
        _number(self, "weight", 0.0)


@dataclass(frozen=True, kw_only=True)
class Matryoshka:
    """A BatchTopK whose first latents reconstruct alone, too: the mean of the losses of nested prefixes (Bussmann et al.
    2025). Stored as a BatchTopK."""

    k: int
    """Latents kept per token on average."""
    fractions: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    """Sizes of the groups as shares of d_sae; the prefixes end where the groups do. They sum to 1."""

    def __post_init__(self) -> None:
        _positive(self, "k")
        object.__setattr__(self, "fractions", tuple(self.fractions))
        if not self.fractions or min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ArgumentError(
                f"Matryoshka.fractions is {self.fractions}; shares of d_sae are expected, all positive, that sum to 1."
            )


@dataclass(frozen=True, kw_only=True)
class Gated:
    """One half of the encoder says which latents fire, the other how strongly (Rajamanoharan et al. 2024a). Stored as
    the JumpReLU that it is equal to."""


Method = Activation | MultiTopK | Matryoshka | Gated
WEIGHTS, MOMENTS = ("float32", "bfloat16"), ("float32", "8-bit")
"""How training may keep them; the first is usual."""
METHODS: dict[str, type[Method]] = TRAINED | {"multitopk": MultiTopK, "matryoshka": Matryoshka, "gated": Gated}
"""Training methods by the names that are used in files and on the command line."""


def method_to_dict(method: Method) -> dict[str, Any]:
    """`Matryoshka(k=32)` as `{"name": "matryoshka", "k": 32, "fractions": [...]}`."""
    name = next(name for name, kind in METHODS.items() if type(method) is kind)
    return {"name": name, **dataclasses.asdict(method)}


def group_ends(d_sae: int, fractions: Sequence[float]) -> tuple[int, ...]:
    """Where groups end that are such shares of all latents."""
    ends = [min(d_sae, round(d_sae * sum(fractions[: i + 1]))) for i in range(len(fractions))]
    return (*ends[:-1], d_sae)


PENALISED: frozenset[type[Method]] = frozenset({ReLU, JumpReLU, Gated})
"""Methods whose sparsity comes from a penalty; the others keep k latents."""
_USED_BY: dict[str, frozenset[type[Method]]] = {
    "sparsity_coefficient": PENALISED,
    "target_l0": PENALISED,
    "sparsity_warmup_steps": PENALISED,
    "decoder_norm_penalty": frozenset({ReLU}),
    "bandwidth": frozenset({JumpReLU}),
    "initial_threshold": frozenset({JumpReLU}),
    "k_anneal_steps": frozenset(METHODS.values()) - PENALISED,
    "threshold_beta": frozenset({BatchTopK, Matryoshka}),
    "auxk_coefficient": frozenset(METHODS.values()) - {Gated},
    "k_aux": frozenset(METHODS.values()) - {Gated},
}


def uses(method: type[Method], setting: str) -> bool:
    """Whether that setting of `TrainConfig` means anything for the method."""
    return setting not in _USED_BY or method in _USED_BY[setting]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One SAE to train. Defaults scale with the number of tokens; a setting that the method does not use is an error.

    Lengths and losses are in scaled units, where E‖x‖² = 1 (Gemma Scope, section 3.2).
    """

    site: str
    """Where the activations come from, e.g. `layers.2.resid_post`."""
    site_out: str | None = None
    """Train a transcoder: reconstruct the activations of this site, e.g. `layers.2.mlp_out` from `layers.2.mlp_in`."""
    skip: bool = False
    """Transcoder: add a learned linear map of the input to the reconstruction (Paulo et al. 2025)."""
    init: str | None = None
    """Folder of a finished SAE whose weights training goes on from, instead of random ones."""
    activation: Method
    """Training method: `ReLU()`, `TopK(k=...)`, `MultiTopK(k=...)`, `BatchTopK(k=...)`, `Matryoshka(k=...)`, `JumpReLU()`
    or `Gated()`."""
    d_sae: int
    """Number of latents."""
    tokens: int
    """Tokens to train on (special tokens are not counted)."""
    batch_tokens: int | None = None
    """Tokens a step. Default: at most 4096, at least 64, and between these few enough for 1000 steps."""
    lr: float | None = None
    """Peak learning rate. Default: 2e-4 / sqrt(d_sae / 2**14) (Gao et al. 2024, figure 3), times sqrt(8000 / steps) in
    runs of under 8,000 steps, but at most doubled."""
    warmup_steps: int | None = None
    """Steps of linear warm-up. Default: min(1000, 5 % of the steps)."""
    decay_share: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    adam_beta1: float | None = None
    """Adam's beta 1. Default: 0.9; for jumprelu and gated 0 (Gemma Scope, section 3.2)."""
    adam_eps: float = 6.25e-10
    """Adam's epsilon (Gao et al. 2024, released code)."""
    clip_norm: float = 1.0
    """Clip the gradient's global norm to this; 0 is off."""
    sparsity_coefficient: float | None = None
    """relu, gated: weight of the L1 penalty. jumprelu: of the L0 penalty, or with `target_l0` of (L0 / target_l0 - 1)**2,
    where the default is 1. Needed unless `target_l0` is given."""
    target_l0: float | None = None
    """relu, gated: steer the L1 penalty so that this many latents fire per token. jumprelu: penalise the distance to it."""
    sparsity_warmup_steps: int | None = None
    """relu, gated, jumprelu: steps over which the penalty rises linearly. Default: min(5000, 10 % of the steps)."""
    decoder_norm_penalty: bool = False
    """relu: weight the L1 penalty of a latent by the norm of its decoder row, and leave the norms free (Anthropic, April
    2024); they are folded into the encoder in the end."""
    bandwidth: float = 0.05
    """jumprelu: width of the kernel of the straight-through estimators. The paper's 0.001 is for billions of tokens."""
    initial_threshold: float = 0.01
    """jumprelu: threshold of all latents at the start."""
    k_anneal_steps: int = 0
    """topk and batchtopk kinds: steps over which k falls linearly from d_in to k."""
    ema_decay: float = 0.0
    """Keep the exponential moving average of the weights with this decay, and store it instead of the last weights; 0 is
    off. With bias correction, as in Adam."""
    kl_tokens: int = 0
    """Train on the last so many of `tokens` through the language model: KL(clean ‖ spliced) counts as much as the squared
    error then (Karvonen 2025)."""
    auxk_coefficient: float | None = None
    """Weight of the auxiliary loss that revives dead latents; 0 is off (Gao et al. 2024, appendix A.2). Default: 1/32 for
    the topk and batchtopk kinds, 0 for the others."""
    k_aux: int | None = None
    """Dead latents used by the auxiliary loss per token. Default: d_in / 2."""
    dead_after_tokens: int | None = None
    """A latent is dead after this many tokens without firing. Default: min(10M, 4 % of `tokens`)."""
    threshold_beta: float = 0.999
    """BatchTopK: how slowly the running mean of the batch's smallest selected activation moves."""
    calibration_tokens: int = 100_000
    """BatchTopK: fresh tokens on which the stored threshold is set so that mean L0 = k."""
    buffer_tokens: int | None = None
    """Size of the shuffled buffer of activations. Default: min(2**18, a quarter of `tokens`)."""
    seed: int = 0
    """Seed of initialisation and shuffling."""
    weights: str = "float32"
    """How both matrices are kept in training: float32, or bfloat16, rounded stochastically (Gupta et al. 2015)."""
    moments: str = "float32"
    """How Adam's moments of both matrices are kept: float32, or 8-bit, a byte a number (after Dettmers et al. 2022)."""

    def __post_init__(self) -> None:
        _positive(self, "d_sae", "tokens", "calibration_tokens")
        for name in ("batch_tokens", "k_aux", "dead_after_tokens", "buffer_tokens"):
            if getattr(self, name) is not None:
                _positive(self, name)
        for name in ("lr", "adam_eps", "clip_norm", "auxk_coefficient", "sparsity_coefficient", "bandwidth"):
            if getattr(self, name) is not None:
                _number(self, name, 0.0)
        for name in ("warmup_steps", "sparsity_warmup_steps", "k_anneal_steps", "kl_tokens", "initial_threshold"):
            if getattr(self, name) is not None:
                _number(self, name, 0)
        for name in ("decay_share", "threshold_beta", "adam_beta1", "ema_decay"):
            if getattr(self, name) is not None:
                _number(self, name, 0.0, 1.0)
        if self.target_l0 is not None:
            _number(self, "target_l0", 0.0, self.d_sae)
        if not isinstance(self.activation, tuple(METHODS.values())):
            raise ArgumentError(
                f"TrainConfig.activation is {self.activation!r}; expected one of "
                f"{', '.join(kind.__name__ for kind in METHODS.values())}, for example BatchTopK(k=32)."
            )
        if self.k is not None and self.k * getattr(self.activation, "multiple", 1) > self.d_sae:
            raise ArgumentError(f"{self.activation} keeps more latents than d_sae = {self.d_sae}.")
        if self.skip and self.site_out is None:
            raise ArgumentError("skip is for a transcoder. Give site_out, the site whose activations it reconstructs.")
        if self.kl_tokens > self.tokens:
            raise ArgumentError(
                f"kl_tokens = {self.kl_tokens:,} are the last of tokens = {self.tokens:,}, so at most as many."
            )
        for name, kept in (("weights", WEIGHTS), ("moments", MOMENTS)):
            if getattr(self, name) not in kept:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}; {' or '.join(kept)} is expected.")
        if self.by_rows and (self.ema_decay or self.decoder_norm_penalty):
            name = "ema_decay" if self.ema_decay else "decoder_norm_penalty"
            raise ArgumentError(
                f"{name} needs whole matrices in float32, which weights = {self.weights} with moments = {self.moments} are to "
                "save. Leave one out."
            )
        if self.site_out == self.site:
            raise ArgumentError(f"site_out is {self.site_out}, as site is; leave it out to train an SAE.")
        self._check_method()

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose activations are needed."""
        return (self.site,) if self.site_out is None else (self.site, self.site_out)

    def _check_method(self) -> None:
        """Raises ArgumentError for a setting that the method does not use, or one that it lacks."""
        kind = type(self.activation)
        penalised = kind in PENALISED
        for field in dataclasses.fields(self):
            name = field.name
            if not uses(kind, name) and getattr(self, name) != field.default:
                raise ArgumentError(f"{name} = {getattr(self, name)} has no meaning for {kind.__name__}. Leave it out.")
        if penalised and self.sparsity_coefficient is None and self.target_l0 is None:
            raise ArgumentError(
                f"{kind.__name__} needs target_l0 = the latents that shall fire per token, or sparsity_coefficient."
            )
        if kind is not JumpReLU and None not in (self.sparsity_coefficient, self.target_l0):
            raise ArgumentError(
                f"target_l0 steers the penalty of {kind.__name__}, so sparsity_coefficient cannot be given with it."
            )

    @property
    def k(self) -> int | None:
        """Latents per token of the topk and batchtopk kinds."""
        return getattr(self.activation, "k", None)

    @property
    def by_rows(self) -> bool:
        """Whether memory is to be saved: weights or moments in fewer bits, and no gradient of a whole matrix."""
        return (self.weights, self.moments) != (WEIGHTS[0], MOMENTS[0])

    @property
    def group_ends(self) -> tuple[int, ...]:
        """Where each group of latents ends; all but a Matryoshka have one."""
        return group_ends(self.d_sae, getattr(self.activation, "fractions", (1.0,)))

    @property
    def inference(self) -> Activation:
        """The activation function of the finished SAE."""
        match self.activation:
            case MultiTopK(k=k):
                return TopK(k=k)
            case Matryoshka(k=k):
                return BatchTopK(k=k)
            case Gated():
                return JumpReLU()
            case other:
                return other

    @property
    def resolved_adam_beta1(self) -> float:
        """`adam_beta1`, or the default of the method."""
        if self.adam_beta1 is not None:
            return self.adam_beta1
        return 0.0 if isinstance(self.activation, (JumpReLU, Gated)) else 0.9

    @property
    def resolved_auxk_coefficient(self) -> float:
        """`auxk_coefficient`, or the default of the method."""
        if self.auxk_coefficient is not None:
            return self.auxk_coefficient
        return 1 / 32 if self.k is not None else 0.0

    @property
    def resolved_sparsity_warmup_steps(self) -> int:
        """`sparsity_warmup_steps`, or the default for this budget."""
        return min(5000, self.steps // 10) if self.sparsity_warmup_steps is None else self.sparsity_warmup_steps

    @property
    def resolved_batch_tokens(self) -> int:
        """`batch_tokens`, or the default for this budget."""
        return self.batch_tokens or min(self.tokens, max(64, min(4096, self.tokens // 1000)))

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return max(1, self.tokens // self.resolved_batch_tokens)

    @property
    def resolved_lr(self) -> float:
        """`lr`, or the default for this width and budget."""
        if self.lr is not None:
            return self.lr
        return 2e-4 / math.sqrt(self.d_sae / 2**14) * min(2.0, max(1.0, math.sqrt(8000 / self.steps)))

    @property
    def kl_steps(self) -> int:
        """How many of the last steps go through the language model."""
        return min(self.steps, -(-self.kl_tokens // self.resolved_batch_tokens))

    @property
    def resolved_warmup_steps(self) -> int:
        """`warmup_steps`, or the default for this budget."""
        return min(1000, self.steps // 20) if self.warmup_steps is None else self.warmup_steps

    @property
    def resolved_dead_after_tokens(self) -> int:
        """`dead_after_tokens`, or the default for this budget."""
        return self.dead_after_tokens or min(10_000_000, max(1, self.tokens // 25))

    @property
    def resolved_buffer_tokens(self) -> int:
        """`buffer_tokens`, or the default for this budget; at least two batches."""
        size = self.buffer_tokens or min(2**18, self.tokens // 4)
        return max(size, 2 * self.resolved_batch_tokens)
