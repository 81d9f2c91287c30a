"""One SAE in training: its steps, what it counts, its state."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saehook import kernels
from saehook.auxk import Weights, add_auxk_gradient
from saehook.batches import Batch, InputFacts, Judged
from saehook.config import BatchTopK, TrainConfig, activation_to_dict, method_to_dict
from saehook.decoder_rows import normalize_rows_
from saehook.devices import ONE_DEVICE, OneDevice
from saehook.errors import TrainingError
from saehook.initial_rows import indices
from saehook.methods import Terms, make_method
from saehook.optim import DecoderConstrainedAdam
from saehook.sae import SAE

DEVICE_REFRESH_STEPS = 20
"""On a GPU the list of dead latents is renewed this rarely, since it needs a synchronisation; on a CPU every step."""
DEAD_TOKENS = 1_000_000
"""A finished SAE says which share of its latents fired on none of the last so many training tokens."""
BAD_VALUES = ("", "the activations were", "the loss was", "the gradient was")


class SAERun:
    """One SAE in training, in scaled units, where E‖x‖² = 1."""

    def __init__(
        self,
        config: TrainConfig,
        name: str,
        facts: InputFacts,
        target: InputFacts | None = None,
        devices: OneDevice = ONE_DEVICE,
    ) -> None:
        """`facts` of the inputs; `target`: of what a transcoder reconstructs, None for an SAE. Of several `devices` this one
        has some of the latents: what has a row for each is that long."""
        self.config = config
        self.devices = devices
        self.name = name
        self.facts = facts
        self.target = target or facts
        device = facts.center.device
        self.k_aux = config.k_aux or max(1, facts.center.numel() // 2)
        self.method = make_method(config, facts, target, devices)
        self.latents = indices(devices.latents(config.group_ends)).to(device)
        """Which of all latents are here, [d_sae of this device]."""
        self.sae = self.method.sae
        self.optimizer = DecoderConstrainedAdam(
            self.method.parameters,
            lr=config.resolved_lr,
            steps=config.steps,
            warmup_steps=config.resolved_warmup_steps,
            decay_share=config.decay_share,
            beta1=config.resolved_adam_beta1,
            eps=config.adam_eps,
            clip_norm=config.clip_norm,
            unit_rows=self.method.unit_rows,
            devices=devices,
            latents=self.latents,
            eight_bit=config.moments == "8-bit",
            seed=config.seed,
        )
        self.steps = 0
        self.tokens_since_fired = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=device)
        self.dead = torch.empty(0, dtype=torch.int64, device=device)
        """Indices of the dead latents."""
        self.threshold = torch.full((), -1.0, device=device)
        """Running mean of the smallest selected activation; negative before the first. Over at most the last tenth of
        the steps or so, and 1 / (1 - threshold_beta) steps, so that a short run does not remember its start."""
        self.averages = {
            name: torch.zeros_like(p) for name, p in self.method.parameters.items() if config.ema_decay > 0
        }
        """Moving averages of the parameters, from zeros: `finish` corrects the bias."""
        self.sums: dict[str, Tensor] = {}
        """Sums of the metrics since the last line."""
        self.summed_steps = 0
        self.kl, self.kl_steps = torch.zeros((), dtype=torch.float64, device=device), 0
        """Sum of KL(clean ‖ spliced) over the steps with it, since the last line."""
        self.bad = torch.zeros(2, dtype=torch.int64, device=device)
        """First step that was not finite, counted from 1 (0: none), and which of BAD_VALUES it was. From then on nothing
        changes any more; it is read when metrics are, so that no step needs a synchronisation."""
        self.metrics: dict[str, float] = {}
        """The last line of metrics."""
        self.origin: dict[str, Any] = {}
        """What is known of the SAE that training went on from; nothing where it began with random weights."""

    def start_from(self, sae: SAE) -> None:
        """Take over the weights of a finished SAE, before the first step.

        Raises:
            ShapeError, ArgumentError: it is not of the kind and size that the config asks for.
        """
        part = self.devices.part_of(sae, self.config.group_ends)
        self.method.start_from(part, self.facts.scale, self.target.scale)
        self.origin = {
            "site": sae.site,
            "activation": activation_to_dict(sae.config.activation),
            "tokens_seen": sae.metadata.get("tokens_seen"),
            "W_dec_sha256": hashlib.sha256(sae.W_dec.detach().cpu().float().numpy().tobytes()).hexdigest(),
        }

    @property
    def judged(self) -> bool:
        """Whether the next step goes through the language model."""
        return self.config.steps - self.config.kl_steps <= self.steps < self.config.steps

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.steps >= self.config.steps

    def step(self, batch: Batch, scratch: kernels.Scratch | None = None, judged: Judged | None = None) -> None:
        """One optimiser step on raw activations [batch_tokens, width] by site; `scratch` is memory that steps share.

        `judged`: that batch, where the language model has a say.
        """
        x = self.devices.tokens(batch[self.config.site]) * self.facts.scale
        y = x
        if self.config.site_out is not None:
            y = self.devices.tokens(batch[self.config.site_out]) * self.target.scale
        scratch = scratch or kernels.Scratch()
        scratch.forget()
        terms = self.method.terms(x, y, self.steps, scratch)
        terms = terms._replace(fired=self.devices.add_tokens(terms.fired))
        sane = torch.stack([x.sum() if y is x else x.sum() + y.sum(), terms.loss.detach()]).isfinite()
        sane = self.devices.all(sane)
        allowed = sane.all() & (self.bad[0] == 0)
        before = self.tokens_since_fired, self.threshold
        self._track_firing(
            terms, self.devices.number(len(x))
        )  # first, as in the released code of Gao et al.: it decides which latents are dead
        loss = terms.loss if judged is None else terms.loss + self._divergence(y, terms.x_hat, judged)
        loss.backward()
        aux = self._auxiliary_loss(x, y - terms.x_hat.detach(), scratch.taken("pre_acts"))
        taken = self.optimizer.step(allowed)
        self.tokens_since_fired = torch.where(taken, self.tokens_since_fired, before[0])
        self.threshold = torch.where(taken, self.threshold, before[1])
        self.method.after_step(taken)
        self._average(taken)
        self.steps += 1
        self._note_bad(sane, taken)
        self._add_metrics(y, terms, aux, taken)

    def _divergence(self, y: Tensor, x_hat: Tensor, judged: Judged) -> Tensor:
        """What is added to the loss so that the KL, brought to the size of the error, counts as much as the error, and both
        together as much as the error before: the penalty keeps its weight (Karvonen 2025). A scalar that is 0 but for its
        gradient."""
        kl, gradient = judged.divergence(self.config.site_out or self.config.site, x_hat.detach() / self.target.scale)
        error = self.method.error(y, x_hat)
        size = error.detach() / kl.clamp(min=torch.finfo(kl.dtype).tiny)
        pulled = (x_hat * (gradient / self.target.scale)).sum() * size
        self.kl = self.kl + kl.double()
        self.kl_steps += 1
        return (pulled - pulled.detach() + error.detach() - error) / 2

    def _auxiliary_loss(self, x: Tensor, residual: Tensor, pre_acts: Tensor | None) -> Tensor:
        """AuxK, whose gradient is added to that of the loss; `pre_acts` of all latents [d_sae, n] where they are there."""
        sae, coefficient = self.sae, self.config.resolved_auxk_coefficient
        if coefficient == 0:
            return x.new_zeros(())
        weights = Weights(sae.W_enc, sae.b_enc, sae.W_dec, self.method.center)
        return add_auxk_gradient(x, residual, weights, self.dead, self.k_aux, coefficient, self.devices, pre_acts)

    @torch.no_grad()
    def _track_firing(self, terms: Terms, tokens: int) -> None:
        """Count tokens since each latent fired; follow the threshold of a BatchTopK."""
        self.tokens_since_fired = torch.where(terms.fired > 0, 0, self.tokens_since_fired + tokens)
        if not kernels.queued(self.dead.device) or self.steps % DEVICE_REFRESH_STEPS == 0:
            self.dead = self.is_dead.nonzero().view(-1)
        if terms.smallest is not None:
            smallest = self.devices.least(terms.smallest)
            beta = min(self.config.threshold_beta, self.steps / (self.steps + 10))
            moved = torch.where(self.threshold < 0, smallest, beta * self.threshold + (1 - beta) * smallest)
            self.threshold = torch.where(smallest.isfinite(), moved, self.threshold)

    @property
    def is_dead(self) -> Tensor:
        """Latents that have not fired for `dead_after_tokens`, [d_sae], bool."""
        return self.tokens_since_fired >= self.config.resolved_dead_after_tokens

    @torch.no_grad()
    def _average(self, taken: Tensor) -> None:
        weight = torch.where(taken, 1 - self.config.ema_decay, 0.0)
        for name, average in self.averages.items():
            average.lerp_(self.method.parameters[name], weight)

    @torch.no_grad()
    def _note_bad(self, sane: Tensor, taken: Tensor) -> None:
        what = torch.where(sane[0], torch.where(sane[1], 3, 2), 1)
        now = torch.stack([torch.full_like(what, self.steps), what])
        self.bad = torch.where(~taken & (self.bad[0] == 0), now, self.bad)

    @torch.no_grad()
    def _add_metrics(self, y: Tensor, terms: Terms, aux: Tensor, taken: Tensor) -> None:
        new = {
            "loss": terms.loss.detach(),
            "error": self.devices.squared_error(y, terms.x_hat.detach()),
            "variance": self.devices.total_variance(y),
            "l0": self.devices.add_latents(terms.fired.sum()) / self.devices.number(y.shape[0]),
            "aux": aux.detach(),
        }
        # All at once: on a GPU each operation on a number costs as much as one on thousands.
        values = torch.where(taken, torch.stack([value.to(y.dtype) for value in new.values()]).double(), 0.0)
        new = dict(zip(new, values.unbind(), strict=True))
        self.sums = {key: self.sums[key] + value for key, value in new.items()} if self.sums else new
        self.summed_steps += 1

    def read_metrics(self) -> dict[str, float]:
        """Means since the last call; one synchronisation.

        Raises:
            TrainingError: a step was not finite.
        """
        step, what = self.bad.tolist()
        if step:
            raise TrainingError(
                f"{BAD_VALUES[what]} not finite in step {step} of {self.name} at {self.config.site}. The weights are those "
                "before that step. Look for NaN or infinity in the activations, or lower the learning rate (it is "
                f"{self.config.resolved_lr:.3g})."
            )
        sums = {key: float(value) for key, value in self.sums.items()}
        self.metrics = {
            "step": self.steps,
            "tokens": self.tokens,
            "loss": sums["loss"] / self.summed_steps,
            "fvu": sums["error"] / sums["variance"] if sums["variance"] > 0 else math.nan,
            "l0": sums["l0"] / self.summed_steps,
            "auxk": sums["aux"] / self.summed_steps,
            "dead_share": self.devices.latent_mean(self.is_dead),
            "lr": self.optimizer.lr,
        }
        if (threshold := self._mean_threshold()) is not None:
            self.metrics["threshold"] = threshold
        if self.kl_steps:
            self.metrics["kl"] = float(self.kl) / self.kl_steps
        self.sums, self.summed_steps = {}, 0
        self.kl, self.kl_steps = torch.zeros_like(self.kl), 0
        return self.metrics

    def _mean_threshold(self) -> float | None:
        """Threshold in the units of the activations; of a JumpReLU its mean."""
        if isinstance(self.config.inference, BatchTopK):
            return max(0.0, float(self.threshold)) / self.target.scale
        threshold = self.sae.threshold
        return None if threshold is None else self.devices.latent_mean(threshold.detach()) / self.target.scale

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.steps * self.config.resolved_batch_tokens

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (not copies) and JSON-able data from which `load_state` goes on bit for bit."""
        parts = {
            "parameters": self.method.parameters,
            "optimizer": self.optimizer.state(),
            "method": self.method.state(),
            "averages": self.averages,
            "sums": self.sums,
            "run": {
                "tokens_since_fired": self.tokens_since_fired,
                "dead": self.dead,
                "threshold": self.threshold,
                "bad": self.bad,
                "kl": self.kl,
            },
        }
        tensors = {f"{part}.{name}": x for part, named in parts.items() for name, x in named.items()}
        data = {
            "steps": self.steps,
            "summed_steps": self.summed_steps,
            "kl_steps": self.kl_steps,
            "metrics": self.metrics,
            "origin": self.origin,
        }
        return tensors, data

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""

        def part(name: str) -> dict[str, Tensor]:
            found = {key: x for key, x in tensors.items() if key.startswith(f"{name}.")}
            return {key.removeprefix(f"{name}."): x.to(self.dead.device) for key, x in found.items()}

        for name, value in part("parameters").items():
            self.method.parameters[name].copy_(value)
        for name, value in part("method").items():
            self.method.state()[name].copy_(value)
        for name, value in part("averages").items():
            self.averages[name].copy_(value)
        # Adam keeps its step counts where it made them; that is on the device, too.
        self.optimizer.load_state(part("optimizer"), data["steps"])
        self.sums = part("sums")
        for name, value in part("run").items():
            setattr(self, name, value)
        self.steps, self.summed_steps, self.metrics = data["steps"], data["summed_steps"], data["metrics"]
        self.kl_steps, self.origin = data["kl_steps"], data["origin"]

    @torch.no_grad()
    def finish(self) -> SAE:
        """The SAE of raw activations: c·x ↦ c·x_hat becomes x ↦ x_hat, with latents in units of what is reconstructed."""
        sae, scale = self.sae, self.target.scale
        if isinstance(sae.W_enc, kernels.RowsParameter):
            self.optimizer.release()
            for name in ("W_enc", "W_dec"):
                matrix = getattr(sae, name).detach()
                setattr(sae, name, nn.Parameter(matrix.float() if self.config.by_rows else matrix))
        for name, average in self.averages.items():
            self.method.parameters[name].copy_(average / (1 - self.config.ema_decay**self.steps))
        if self.method.unit_rows:
            normalize_rows_(sae.W_dec)
        self.method.finish()
        sae.W_enc.data = sae.W_enc.data.contiguous()
        for matrix in (sae.W_enc, sae.W_skip):
            if matrix is not None and self.target is not self.facts:
                matrix.data *= self.facts.scale / scale
        sae.b_enc.data /= scale
        sae.b_dec.data /= scale
        if isinstance(self.config.inference, BatchTopK):
            sae.set_threshold(max(0.0, float(self.threshold)) / scale)
        elif sae.threshold is not None:
            sae.set_threshold(sae.threshold.detach() / scale)
        sae.requires_grad_(True).zero_grad(set_to_none=True)
        sae.metadata = {
            "training": resolved_settings(self.config, self.k_aux),
            "input_scale": self.facts.scale,
            **({"output_scale": scale} if sae.is_transcoder else {}),
            "tokens_seen": self.tokens,
            **({"started_from": self.origin} if self.origin else {}),
            "training_metrics": dict(self.metrics),
            "dead_at_the_end": self._dead_at_the_end(),
        }
        return sae

    def _dead_at_the_end(self) -> dict[str, Any]:
        """The share of latents that were silent in the last steps, at least `DEAD_TOKENS` if there were so many."""
        steps = min(self.steps, math.ceil(DEAD_TOKENS / self.config.resolved_batch_tokens))
        tokens = steps * self.config.resolved_batch_tokens
        return {"tokens": tokens, "share": self.devices.latent_mean(self.tokens_since_fired >= tokens)}


def resolved_settings(config: TrainConfig, k_aux: int) -> dict[str, Any]:
    """All settings of a run as JSON-able data, defaults resolved."""
    return {
        **dataclasses.asdict(config),
        "init": None if config.init is None else Path(config.init).name,  # nothing of the machine's paths
        "activation": method_to_dict(config.activation),
        "batch_tokens": config.resolved_batch_tokens,
        "lr": config.resolved_lr,
        "adam_beta1": config.resolved_adam_beta1,
        "auxk_coefficient": config.resolved_auxk_coefficient,
        "k_aux": k_aux,
        "steps": config.steps,
        "warmup_steps": config.resolved_warmup_steps,
        "sparsity_warmup_steps": config.resolved_sparsity_warmup_steps,
        "dead_after_tokens": config.resolved_dead_after_tokens,
        "buffer_tokens": config.resolved_buffer_tokens,
    }


def site_name(config: TrainConfig) -> str:
    """The site, or both of a transcoder, e.g. `layers.2.mlp_in-transcoder-layers.2.mlp_out`."""
    kind = "skip-transcoder" if config.skip else "transcoder"
    return config.site if config.site_out is None else f"{config.site}-{kind}-{config.site_out}"


def sae_name(config: TrainConfig) -> str:
    """How the logs call an SAE, e.g. `layers.2.resid_post-batchtopk32-4096`, with what is kept otherwise than in float32."""
    sparsity = config.k or config.target_l0 or config.sparsity_coefficient
    name = f"{site_name(config)}-{method_to_dict(config.activation)['name']}{sparsity:g}-{config.d_sae}"
    kept = {"weights": config.weights, "moments": config.moments}
    return name + "".join(f"-{what}-{how}" for what, how in kept.items() if how != "float32")
