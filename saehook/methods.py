"""The training methods: what each minimises, and how its result becomes an SAE of the inference rule.

All of them see scaled inputs (E‖x‖² = 1) and reconstruct a target with the weights of an `SAE`: the inputs themselves, or
the activations of another site (a transcoder). What else a method learns stands in its `parameters`. The squared error is
summed over the d components of a token. The topk and batchtopk kinds divide it by the variance of the target, as Gao et
al. do; relu, jumprelu and gated take it as it is, so that the weight of their penalty means what it means in their papers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saehook import kernels
from saehook.activation_fns import jumprelu_ste
from saehook.batches import InputFacts
from saehook.config import BatchTopK, Gated, JumpReLU, Matryoshka, MultiTopK, ReLU, SAEConfig, TopK, TrainConfig
from saehook.devices import ONE_DEVICE, OneDevice
from saehook.errors import ArgumentError, ShapeError
from saehook.initial_rows import indices, unit_rows
from saehook.sae import SAE

L1_START = 1e-3
"""First weight of an L1 penalty that is steered towards `target_l0`."""
L1_GAIN = 0.03
"""How fast it moves: by this power of L0 / target_l0 a step, where the ratio is within a factor of e."""


class Terms(NamedTuple):
    """One batch through a method."""

    loss: Tensor
    """What is minimised, without the auxiliary loss, a scalar."""
    x_hat: Tensor
    """Reconstruction, [n, d_out], with its gradient."""
    fired: Tensor
    """On how many tokens each latent fired, [d_sae], float32."""
    smallest: Tensor | None = None
    """Smallest positive activation that the batch rule kept, infinite where it kept none; BatchTopK kinds only."""


class Method:
    """One SAE and the loss that trains it."""

    unit_rows = True
    """Whether the decoder rows are held at unit length."""

    def __init__(self, config: TrainConfig, sae: SAE, variance: Tensor, devices: OneDevice = ONE_DEVICE) -> None:
        """`variance`: total variance of the scaled target, a scalar. `sae` has the latents of this one of the `devices`."""
        self.config = config
        self.sae = sae
        self.variance = variance
        self.devices = devices
        self._no_center = torch.zeros(sae.d_in, device=sae.device, dtype=sae.b_dec.dtype)
        self.parameters: dict[str, nn.Parameter] = dict(sae.named_parameters())

    def terms(self, x: Tensor, y: Tensor, step: int, scratch: kernels.Scratch | None = None) -> Terms:
        """Loss of scaled tokens [n, d_in] with the target `y` [n, d_out] at step `step`; `scratch` is shared memory."""
        raise NotImplementedError

    def error(self, y: Tensor, x_hat: Tensor) -> Tensor:
        """The squared error in the units of the loss, a scalar."""
        return self.devices.squared_error(y, x_hat)

    @property
    def center(self) -> Tensor:
        """What the encoder subtracts from its input, [d_in]: b_dec, or nothing for a transcoder."""
        return self._no_center if self.sae.is_transcoder else self.sae.b_dec

    @property
    def _center(self) -> Tensor:
        """The same where latents of other devices subtract it, too."""
        return self.devices.read_by_all(self.center)

    def after_step(self, taken: Tensor) -> None:
        """Bring the parameters back to where they may be; `taken`: whether the step was, 0-dim bool."""

    @torch.no_grad()
    def start_from(self, sae: SAE, scale_in: float, scale_out: float) -> None:
        """Take over the weights of a finished SAE, in units where the inputs are `scale_in` and what is reconstructed
        `scale_out` times as large: the reconstruction is the same. A running threshold begins anew.

        Raises:
            ShapeError: other widths or another number of latents.
            ArgumentError: an SAE where a transcoder is trained or the reverse, or one that normalises each token.
        """
        own = self.sae
        for name in ("d_in", "d_sae", "d_out"):
            if getattr(sae, name) != getattr(own, name):
                raise ShapeError(
                    f"the SAE to start from has {name} = {getattr(sae, name)}, but training asks for {getattr(own, name)}."
                )
        if sae.config.normalize != "none":
            raise ArgumentError("the SAE to start from normalises each token; such SAEs are not trained here.")
        if (sae.is_transcoder, sae.config.skip) != (own.is_transcoder, own.config.skip):
            raise ArgumentError(
                "one is a transcoder and the other is not, or only one has a skip map: of the SAE to start from and the one "
                "to train. Give site_out and skip as it has them."
            )
        norm = torch.linalg.vector_norm(sae.W_dec, dim=-1)
        norm = torch.where(norm > 0, norm, 1.0) if self.unit_rows else torch.ones_like(norm)
        shift = 0 if sae.config.subtract_b_dec or sae.is_transcoder else sae.b_dec @ sae.W_enc
        own.W_enc.copy_(sae.W_enc * norm * (scale_out / scale_in))
        own.b_enc.copy_((sae.b_enc + shift) * norm * scale_out)
        own.W_dec.copy_(sae.W_dec / norm[:, None])
        own.b_dec.copy_(sae.b_dec * scale_out)
        if own.W_skip is not None and sae.W_skip is not None:
            own.W_skip.copy_(sae.W_skip * (scale_out / scale_in))
        self._take_threshold(None if sae.threshold is None else sae.threshold * norm * scale_out)

    def _take_threshold(self, threshold: Tensor | None) -> None:
        """Begin with the thresholds [d_sae], in scaled units, of the SAE started from, where the method learns any."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the parameters."""
        return {}

    def finish(self) -> None:
        """Make `self.sae` an SAE of its inference rule, still in scaled units."""

    def _autoencode(
        self,
        x: Tensor,
        rule: kernels.Rule,
        per_latent: Sequence[Tensor],
        lower: Tensor,
        scratch: kernels.Scratch | None,
    ) -> kernels.Autoencoded:
        sae = self.sae
        found = kernels.autoencode(
            x, sae.W_enc, sae.b_enc, self._center, sae.W_dec, rule, per_latent, lower, scratch=scratch
        )
        return self.devices.add_up(found)

    def _decode(
        self,
        values: Tensor,
        selection: kernels.Selection,
        k: int,
        scratch: kernels.Scratch | None = None,
    ) -> Tensor:
        """Σ values · W_dec over each token's pairs, of all latents, without b_dec."""
        return self.devices.add_latents(kernels.decode(values, self.sae.W_dec, selection, k=k, scratch=scratch))

    def offset(self, x: Tensor) -> Tensor:
        """What is added to the decoded activations of `x`: b_dec, [d_out], and the skip map, then [n, d_out]."""
        sae = self.sae
        return sae.b_dec if sae.W_skip is None else x @ sae.W_skip.T + sae.b_dec


class TopKMethod(Method):
    """TopK (Gao et al. 2024): the k largest of each token."""

    def error(self, y: Tensor, x_hat: Tensor) -> Tensor:
        return self.devices.squared_error(y, x_hat) / self.variance

    def terms(self, x: Tensor, y: Tensor, step: int, scratch: kernels.Scratch | None = None) -> Terms:
        k = self.k_at(step)
        values, selection = self._encode(x, k, scratch)
        x_hat = self._decode(values, selection, k, scratch) + self.offset(x)
        return Terms(self.error(y, x_hat), x_hat, self._fired(values, selection))

    def _encode(
        self, x: Tensor, k: int, scratch: kernels.Scratch | None, *, descending: bool = False
    ) -> tuple[Tensor, kernels.Selection]:
        """Activations of the k largest of each token, [m], and the pairs."""
        weights = self.sae.W_enc, self.sae.b_enc, self._center
        found, pairs = self.devices.encode_topk(x, *weights, k, self.config.d_sae, scratch, descending=descending)
        return found.relu(), pairs

    def k_at(self, step: int) -> int:
        """k at this step: it falls linearly from d_in over `k_anneal_steps`."""
        k, anneal = self.config.k, self.config.k_anneal_steps
        assert k is not None
        if step >= anneal:
            return k
        start = max(k, min(self.sae.d_in, self.config.d_sae))
        return round(start + (k - start) * step / anneal)

    def _fired(self, values: Tensor, selection: kernels.Selection) -> Tensor:
        fired = torch.zeros(self.sae.d_sae, device=values.device)
        return fired.index_add_(0, selection.latents, (values.detach() > 0).float())


class MultiTopKMethod(TopKMethod):
    """TopK with a second loss at a multiple of k, from the same pre-activations (Gao et al. 2024, section 5.3)."""

    def terms(self, x: Tensor, y: Tensor, step: int, scratch: kernels.Scratch | None = None) -> Terms:
        method, k = self.config.activation, self.k_at(step)
        assert isinstance(method, MultiTopK)
        more = min(method.multiple * k, self.config.d_sae)
        values, selection = self._encode(x, more, scratch, descending=True)
        first, first_values = self.devices.first_of_each_token(selection, values, k, more)
        offset = self.offset(x)
        x_hat = self._decode(first_values, first, k) + offset
        wide = self._decode(values, selection, more, scratch) + offset
        loss = self.error(y, x_hat) + method.weight * self.error(y, wide)
        return Terms(loss, x_hat, self._fired(first_values, first))


class BatchTopKMethod(TopKMethod):
    """BatchTopK (Bussmann et al. 2024): the tokens × k largest of the batch, by one exact cut."""

    def _encode_batch(self, x: Tensor, k: int, scratch: kernels.Scratch | None) -> tuple[Tensor, kernels.Selection]:
        """Activations of the largest of the batch, [m], and the pairs."""
        weights = self.sae.W_enc, self.sae.b_enc, self._center
        found, pairs = self.devices.encode_batch_topk(x, *weights, k, self.config.group_ends, scratch)
        return found.relu(), pairs

    def terms(self, x: Tensor, y: Tensor, step: int, scratch: kernels.Scratch | None = None) -> Terms:
        k = self.k_at(step)
        values, selection = self._encode_batch(x, k, scratch)
        x_hat = self._decode(values, selection, k, scratch) + self.offset(x)
        return Terms(self.error(y, x_hat), x_hat, self._fired(values, selection), _smallest(values))


class MatryoshkaMethod(BatchTopKMethod):
    """Matryoshka BatchTopK (Bussmann et al. 2025): one BatchTopK over all latents, the mean loss of nested prefixes."""

    def __init__(self, config: TrainConfig, sae: SAE, variance: Tensor, devices: OneDevice = ONE_DEVICE) -> None:
        super().__init__(config, sae, variance, devices)
        latents = indices(devices.latents(config.group_ends)).to(sae.device)
        self.ends = torch.searchsorted(latents, torch.tensor(config.group_ends, device=sae.device))
        """Where each group of latents ends, among those here."""

    def terms(self, x: Tensor, y: Tensor, step: int, scratch: kernels.Scratch | None = None) -> Terms:
        k = self.k_at(step)
        values, selection = self._encode_batch(x, k, scratch)
        parts = self._decode(values, selection.by_group(self.ends), k, scratch)
        offset = self.offset(x).expand_as(y)
        prefixes = parts.view(len(x), len(self.ends), -1).cumsum(1) + offset[:, None]
        loss = self.devices.mean((prefixes - y[:, None]).square().sum(-1)) / self.variance
        return Terms(loss, prefixes[:, -1], self._fired(values, selection), _smallest(values))


class ReLUMethod(Method):
    """ReLU + L1 (Bricken et al. 2023, Cunningham et al. 2023); with `decoder_norm_penalty` that of April 2024."""

    def __init__(self, config: TrainConfig, sae: SAE, variance: Tensor, devices: OneDevice = ONE_DEVICE) -> None:
        super().__init__(config, sae, variance, devices)
        self.unit_rows = not config.decoder_norm_penalty
        if config.decoder_norm_penalty:  # rows of norm 0.1, and the encoder their transpose
            sae.W_dec.data *= 0.1
            sae.W_enc.data *= 0.1
        start = L1_START if config.sparsity_coefficient is None else config.sparsity_coefficient
        self.coefficient = torch.tensor(math.log(max(start, 1e-30)), dtype=torch.float64, device=sae.device)
        """Log of the penalty's weight."""
        self._l0 = torch.zeros((), device=sae.device)

    def terms(self, x: Tensor, y: Tensor, step: int, scratch: kernels.Scratch | None = None) -> Terms:
        sae = self.sae
        per_latent = [torch.linalg.vector_norm(sae.W_dec, dim=-1)] if self.config.decoder_norm_penalty else []
        found = self._autoencode(x, _relu, per_latent, torch.zeros_like(sae.b_enc), scratch)
        x_hat = found.decoded + self.offset(x)
        tokens = self.devices.number(len(x))
        loss = self.error(y, x_hat) + self._weight(step) * found.cost / tokens
        return Terms(loss, x_hat, self._count(found.fired, tokens))

    def _weight(self, step: int) -> Tensor:
        return self.coefficient.exp().float() * warm(step, self.config.resolved_sparsity_warmup_steps)

    def _count(self, fired: Tensor, n_tokens: int) -> Tensor:
        self._l0 = self.devices.total(fired.sum()) / n_tokens
        return fired

    def after_step(self, taken: Tensor) -> None:
        if (target := self.config.target_l0) is None:
            return
        move = L1_GAIN * (self._l0.double() / max(target, 1e-9)).clamp(min=1e-9).log().clamp(-1, 1)
        self.coefficient = torch.where(taken, self.coefficient + move, self.coefficient)

    def state(self) -> dict[str, Tensor]:
        return {"coefficient": self.coefficient}

    @torch.no_grad()
    def finish(self) -> None:
        if self.config.decoder_norm_penalty:
            sae = self.sae
            norm = torch.linalg.vector_norm(sae.W_dec, dim=-1).clamp(min=1e-12)
            sae.W_enc.data *= norm
            sae.b_enc.data *= norm
            sae.W_dec.data /= norm[:, None]


class JumpReLUMethod(Method):
    """JumpReLU (Rajamanoharan et al. 2024) with the L0 penalty, or with a penalty on the distance to `target_l0`."""

    def __init__(self, config: TrainConfig, sae: SAE, variance: Tensor, devices: OneDevice = ONE_DEVICE) -> None:
        super().__init__(config, sae, variance, devices)
        sae.set_threshold(config.initial_threshold)
        self.parameters = dict(sae.named_parameters())

    def terms(self, x: Tensor, y: Tensor, step: int, scratch: kernels.Scratch | None = None) -> Terms:
        config, sae = self.config, self.sae
        assert sae.threshold is not None
        rule = functools.partial(_jumprelu, bandwidth=config.bandwidth)
        window_starts = sae.threshold - config.bandwidth / 2
        found = self._autoencode(x, rule, [sae.threshold], window_starts, scratch)
        x_hat = found.decoded + self.offset(x)
        l0 = found.cost / self.devices.number(len(x))
        if config.target_l0 is None:
            assert config.sparsity_coefficient is not None
            penalty = config.sparsity_coefficient * l0
        else:
            weight = 1.0 if config.sparsity_coefficient is None else config.sparsity_coefficient
            penalty = weight * (l0 / config.target_l0 - 1).square()
        loss = self.error(y, x_hat) + warm(step, config.resolved_sparsity_warmup_steps) * penalty
        return Terms(loss, x_hat, found.fired)

    def _take_threshold(self, threshold: Tensor | None) -> None:
        assert self.sae.threshold is not None
        if threshold is not None:
            self.sae.threshold.copy_(threshold)

    @torch.no_grad()
    def after_step(self, taken: Tensor) -> None:
        # A negative threshold would let negative activations through in training, but not at inference.
        assert self.sae.threshold is not None
        self.sae.threshold.clamp_(min=0)


class GatedMethod(ReLUMethod):
    """Gated SAE (Rajamanoharan et al. 2024a): f = 1[π_gate > 0] · ReLU(π_mag), with W_mag = W_gate · exp(r).

    π_gate > 0 where π_mag > b_mag - exp(r) · b_gate: so the finished SAE is a JumpReLU with that threshold.
    """

    def __init__(self, config: TrainConfig, sae: SAE, variance: Tensor, devices: OneDevice = ONE_DEVICE) -> None:
        super().__init__(config, sae, variance, devices)
        sae.register_parameter("threshold", None)  # it follows from the other parameters in the end
        zeros = torch.zeros(sae.d_sae, device=sae.device)
        self.r_mag, self.b_mag = nn.Parameter(zeros), nn.Parameter(zeros.clone())
        self.parameters = {**dict(sae.named_parameters()), "r_mag": self.r_mag, "b_mag": self.b_mag}

    def terms(self, x: Tensor, y: Tensor, step: int, scratch: kernels.Scratch | None = None) -> Terms:
        sae = self.sae
        per_latent = [sae.b_enc, self.r_mag.exp(), self.b_mag]
        found = self._autoencode(x, _gated, per_latent, torch.zeros_like(sae.b_enc), scratch)
        assert found.frozen is not None
        offset = self.offset(x)
        x_hat, gate_only = found.decoded + offset, found.frozen + offset.detach()
        loss, tokens = self.error(y, x_hat) + self.error(y, gate_only), self.devices.number(len(x))
        loss = loss + self._weight(step) * found.cost / tokens
        return Terms(loss, x_hat, self._count(found.fired, tokens))

    def _take_threshold(self, threshold: Tensor | None) -> None:
        self.b_mag.copy_(self.sae.b_enc)
        if threshold is not None:
            self.sae.b_enc.sub_(threshold)

    @torch.no_grad()
    def finish(self) -> None:
        sae, gain = self.sae, self.r_mag.exp()
        threshold = self.b_mag - gain * sae.b_enc
        sae.W_enc.data *= gain
        sae.b_enc.data.copy_(self.b_mag)
        sae.set_threshold(threshold)


def _relu(pre: Tensor, norm: Tensor | None = None) -> kernels.Activated:
    acts = pre.relu()
    return kernels.Activated(acts, acts if norm is None else acts * norm)


def _jumprelu(pre: Tensor, threshold: Tensor, *, bandwidth: float) -> kernels.Activated:
    return kernels.Activated(*jumprelu_ste(pre, threshold, bandwidth))


def _gated(pre_gate: Tensor, b_gate: Tensor, gain: Tensor, b_mag: Tensor) -> kernels.Activated:
    gate = pre_gate.relu()
    acts = kernels.ones_above(pre_gate, 0) * ((pre_gate - b_gate) * gain + b_mag).relu()
    return kernels.Activated(acts, gate, gate)


METHODS: dict[type, type[Method]] = {
    ReLU: ReLUMethod,
    TopK: TopKMethod,
    MultiTopK: MultiTopKMethod,
    BatchTopK: BatchTopKMethod,
    Matryoshka: MatryoshkaMethod,
    JumpReLU: JumpReLUMethod,
    Gated: GatedMethod,
}


def make_method(
    config: TrainConfig, source: InputFacts, target: InputFacts | None = None, devices: OneDevice = ONE_DEVICE
) -> Method:
    """A new SAE for `config` and its method, on the device of the facts: of several devices the latents of this one.

    `source` says what its inputs are like, in whose centre an SAE's b_dec begins; `target` what a transcoder
    reconstructs: b_dec begins there, and b_enc where the pre-activations of the inputs' centre are 0.
    """
    device, center = source.center.device, (target or source).center
    sae_config = SAEConfig(
        d_in=source.center.numel(),
        d_sae=config.d_sae,
        activation=config.inference,
        subtract_b_dec=target is None,
        d_out=None if target is None else center.numel(),
        skip=config.skip,
    )
    generator = torch.Generator().manual_seed(config.seed)
    rows = devices.latents(config.group_ends)
    sae = SAE(
        of_size(sae_config, sum(some.stop - some.start for some in rows)),
        site=config.site,
        site_out=config.site_out,
        draw=lambda width: unit_rows(config.d_sae, width, generator, rows),
    ).to(device)
    sae.b_dec.data.copy_(center)
    if target is not None:
        sae.b_enc.data = -(source.center @ sae.W_enc.detach())
    sae.W_enc.data = sae.W_enc.data.T.contiguous().T  # latent-major in memory: see kernels/sparse.py
    if config.by_rows or (devices.alone and kernels.gradients_by_rows(sae.W_dec)):
        for name in ("W_enc", "W_dec"):
            matrix = getattr(sae, name).to(getattr(torch, config.weights))
            setattr(sae, name, kernels.RowsParameter.of(matrix, streamed=config.by_rows))
    return METHODS[type(config.activation)](config, sae, (target or source).variance, devices)


def of_size(config: SAEConfig, d_sae: int) -> SAEConfig:
    """An SAE of some of the latents; the k of all of them says nothing about these, and is that of the config in training."""
    activation = config.activation
    if isinstance(activation, (TopK, BatchTopK)):
        activation = dataclasses.replace(activation, k=min(activation.k, d_sae))
    return dataclasses.replace(config, d_sae=d_sae, activation=activation)


def warm(step: int, warmup_steps: int) -> float:
    """Share of the penalty at this step: a linear rise to 1."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _smallest(values: Tensor) -> Tensor:
    """Smallest positive of the kept activations, float32; infinite where there is none."""
    values = torch.where(values.detach() > 0, values.detach(), math.inf)
    return (values.min() if values.numel() else values.new_tensor(math.inf)).float()
