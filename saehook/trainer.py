"""Training: several SAEs on one stream of activations. Takes any iterator of tensors, so it needs no language model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from saehook import kernels, losses
from saehook.batches import Batch, InputFacts, Judged, JudgedBatches, Stream
from saehook.calibration import Calibration, Calibrator
from saehook.checkpoint import load_sae
from saehook.config import BatchTopK, TrainConfig, activation_to_dict, method_to_dict
from saehook.errors import ArgumentError, FileError, TrainingError, TrainingInterrupted
from saehook.files import DISK_FULL, atomic_write
from saehook.loggers import Loggers, check_loggers
from saehook.methods import Terms, make_method
from saehook.optim import DecoderConstrainedAdam, normalize_rows_
from saehook.run_state import load_state, save_state
from saehook.sae import SAE

METRICS = "metrics.jsonl"
"""The log, in `log_dir`."""
SAMPLE_TOKENS = 8192
"""Tokens at the start of the stream that set the input scale and b_dec; they are trained on afterwards."""
LOG_STEPS = 20
"""A line of metrics is written after so many steps; counted in steps, so that a resumed run writes the same lines."""
DEVICE_REFRESH_STEPS = 20
"""On a GPU the list of dead latents is renewed this rarely, since it needs a synchronisation; on a CPU every step."""
CHECKPOINT_SECONDS = 600.0
"""Time between checkpoints, where a folder for them is given."""
RETRY_SECONDS = 10.0
"""Pause before a write is tried again when the disk is full."""
DEAD_TOKENS = 1_000_000
"""A finished SAE says which share of its latents fired on none of the last so many training tokens."""
BAD_VALUES = ("", "the activations were", "the loss was", "the gradient was")


class Run:
    """One SAE in training, in scaled units, where E‖x‖² = 1."""

    def __init__(self, config: TrainConfig, name: str, facts: InputFacts, target: InputFacts | None = None) -> None:
        """`facts` of the inputs; `target`: of what a transcoder reconstructs, None for an SAE."""
        self.config = config
        self.name = name
        self.facts = facts
        self.target = target or facts
        device = facts.center.device
        self.k_aux = config.k_aux or max(1, facts.center.numel() // 2)
        self.method = make_method(config, facts, target)
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
        )
        self.steps = 0
        self.tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
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
        self.method.start_from(sae, self.facts.scale, self.target.scale)
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
        x = batch[self.config.site] * self.facts.scale
        y = x if self.config.site_out is None else batch[self.config.site_out] * self.target.scale
        terms = self.method.terms(x, y, self.steps, scratch)
        sane = torch.stack([x.sum().isfinite() & y.sum().isfinite(), terms.loss.detach().isfinite()])
        allowed = sane.all() & (self.bad[0] == 0)
        before = self.tokens_since_fired, self.threshold
        self._track_firing(
            terms, len(x)
        )  # first, as in the released code of Gao et al.: it decides which latents are dead
        loss = terms.loss if judged is None else terms.loss + self._divergence(y, terms.x_hat, judged)
        loss.backward()
        aux = self._auxiliary_loss(x, y - terms.x_hat.detach())
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

    def _auxiliary_loss(self, x: Tensor, residual: Tensor) -> Tensor:
        """AuxK, whose gradient is added to that of the loss."""
        sae, coefficient = self.sae, self.config.resolved_auxk_coefficient
        if coefficient == 0:
            return x.new_zeros(())
        weights = sae.W_enc, sae.b_enc, sae.W_dec, self.method.center
        return losses.add_auxk_gradient(x, residual, *weights, self.dead, self.k_aux, coefficient)

    @torch.no_grad()
    def _track_firing(self, terms: Terms, tokens: int) -> None:
        """Count tokens since each latent fired; follow the threshold of a BatchTopK."""
        self.tokens_since_fired = torch.where(terms.fired > 0, 0, self.tokens_since_fired + tokens)
        if not kernels.queued(self.dead.device) or self.steps % DEVICE_REFRESH_STEPS == 0:
            self.dead = self.is_dead.nonzero().view(-1)
        if (smallest := terms.smallest) is not None:
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
            "error": losses.squared_error(y, terms.x_hat.detach()),
            "variance": losses.total_variance(y),
            "l0": terms.fired.sum() / y.shape[0],
            "aux": aux.detach(),
        }
        new = {key: torch.where(taken, value.double(), 0.0) for key, value in new.items()}
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
            "dead_share": float(self.is_dead.double().mean()),
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
        return None if threshold is None else float(threshold.detach().mean()) / self.target.scale

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
        return {"tokens": tokens, "share": float((self.tokens_since_fired >= tokens).double().mean())}


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
    """How the logs call an SAE, e.g. `layers.2.resid_post-batchtopk32-4096`."""
    sparsity = config.k or config.target_l0 or config.sparsity_coefficient
    return f"{site_name(config)}-{method_to_dict(config.activation)['name']}{sparsity:g}-{config.d_sae}"


class Trainer:
    """Trains one SAE per config; all of them see every batch."""

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        batches: Iterable[Tensor | Batch],
        *,
        d_in: int | Mapping[str, int],
        device: torch.device | str = "cpu",
        log_dir: str | Path | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        log: Sequence[str] = (),
        progress: bool = True,
        kl_batches: JudgedBatches | None = None,
    ) -> None:
        """`batches` yields activations of shuffled tokens, as many at a time as it likes: a dict from each site to
        [n, d_in], or plain tensors where all configs share one site. It should go on for `calibration_tokens` beyond
        the training tokens. `d_in` is the width, of all sites or by site. `log_dir` gets `metrics.jsonl`,
        `checkpoint_dir` a checkpoint every `checkpoint_seconds` and when the run is stopped. `log` names further logs to
        write, "tensorboard" and "wandb" (`loggers`), which need `log_dir`, too. `kl_batches` gives the last batches, those
        of `kl_tokens`.

        Raises:
            ArgumentError: no config, different batch sizes, a site without width, or a logger that is not installed.
        """
        self.configs = list(configs)
        sizes = {config.resolved_batch_tokens for config in self.configs}
        if len(sizes) != 1:
            raise ArgumentError(
                f"the SAEs of one run share their batches, but these {len(self.configs)} configs ask for "
                f"{sorted(sizes)} tokens a step. Give all of them the same batch_tokens."
            )
        self.batch_tokens = sizes.pop()
        sites = list(dict.fromkeys(site for config in self.configs for site in config.sites))
        self.d_in = dict.fromkeys(sites, d_in) if isinstance(d_in, int) else {s: d_in[s] for s in sites if s in d_in}
        if missing := [site for site in sites if site not in self.d_in]:
            raise ArgumentError(f"d_in names no width for {', '.join(missing)}.")
        if kl_batches is None and any(config.kl_tokens for config in self.configs):
            raise ArgumentError("kl_tokens needs the language model: train with saehook.training_run.train_saes.")
        self.batches, self.kl_batches = batches, kl_batches
        self.device = device
        self.log_file = None if log_dir is None else Path(log_dir) / METRICS
        check_loggers(log)
        if log and log_dir is None:
            raise ArgumentError(f"{', '.join(log)} needs a folder. Give log_dir, too.")
        self.log = tuple(log)
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.checkpoint_seconds = checkpoint_seconds
        self.progress = progress
        self.steps = 0
        """Steps taken so far."""
        self.runs: list[Run] = []
        """The SAEs in training, once `fit` has begun."""
        self.facts: dict[str, InputFacts] = {}
        """What the start of the stream says about each site."""
        self._stop = threading.Event()

    def stop(self) -> None:
        """Make `fit` finish its step, write a checkpoint and raise TrainingInterrupted. From any thread or handler."""
        self._stop.set()

    def fit(self, *, resume: bool = False) -> list[SAE]:
        """Train, calibrate on fresh tokens, and return the SAEs in the order of the configs; they take raw activations.

        `resume` goes on from the newest checkpoint, with `batches` made anew: those that can say where they were
        (`harvest.Shuffled`) go on there, others are read again up to that place. On a CPU the result has the same bits
        as that of a run that was never interrupted.

        Warns (UserWarning) where the activations ended early, or where no token was left to calibrate a threshold.

        Raises:
            TrainingError: too few tokens for one step, or something that is not finite.
            TrainingInterrupted: after `stop`.
            FileError, FormatError: there is no checkpoint to resume from, or none that is whole.
        """
        stream = Stream(self.batches, self.d_in, self.device)
        total = max(config.steps for config in self.configs) * self.batch_tokens
        with tqdm(total=total, disable=not self.progress, unit="tok", unit_scale=True) as bar:
            if resume:
                self._resume(stream)
                bar.update(self.steps * self.batch_tokens)
                bar.unpause()
            else:
                self.runs, self.steps = self._start(stream), 0
            settings = {run.name: resolved_settings(run.config, run.k_aux) for run in self.runs}
            folder = None if self.log_file is None else self.log_file.parent
            with contextlib.closing(Loggers(self.log, folder, settings, self.steps)) as self.loggers:
                self._train(stream, bar)
            if self.checkpoint_dir is not None:  # what follows can be done again
                self._save(stream)
        if (trained := self.steps * self.batch_tokens) < total:
            warnings.warn(
                f"the activations ended early: trained on {trained:,} of {total:,} tokens.", UserWarning, stacklevel=2
            )
        saes = [run.finish() for run in self.runs]
        self._calibrate(stream, saes)
        return saes

    def _start(self, stream: Stream) -> list[Run]:
        if (available := stream.available(self.batch_tokens)) < self.batch_tokens:
            raise TrainingError(
                f"the activations ended after {available:,} tokens, and one step needs {self.batch_tokens:,}. "
                "Give more text, or a smaller batch_tokens."
            )
        runs = self._make_runs(
            {site: InputFacts.measure(sample, site) for site, sample in stream.peek(SAMPLE_TOKENS).items()}
        )
        for run in runs:
            if run.config.init is not None:
                run.start_from(load_sae(run.config.init, device=self.device))
        return runs

    def _make_runs(self, facts: Mapping[str, InputFacts]) -> list[Run]:
        names: list[str] = []
        for config in self.configs:
            name = sae_name(config)
            names.append(name if name not in names else f"{name}-{len(names)}")
        self.facts = dict(facts)
        return [
            Run(config, name, facts[config.site], None if config.site_out is None else facts[config.site_out])
            for config, name in zip(self.configs, names, strict=True)
        ]

    def _train(self, stream: Stream, bar: tqdm) -> None:
        """All steps, or as many as there are tokens for."""
        saved = time.monotonic()
        scratch = kernels.Scratch()
        while not all(run.done for run in self.runs):
            if self._stop.is_set():
                raise TrainingInterrupted(self._said_where(stream, bar))
            active = [run for run in self.runs if not run.done]
            batch, judged = None, None
            if not all(run.judged for run in active):
                if stream.available(self.batch_tokens) < self.batch_tokens:
                    break
                batch = stream.take(self.batch_tokens)
            if any(run.judged for run in active):
                assert self.kl_batches is not None
                judged = self.kl_batches.take(self.batch_tokens)
            for run in active:
                if run.judged and judged is not None:
                    run.step(judged.activations, scratch, judged)
                elif batch is not None:
                    run.step(batch, scratch)
            self.steps += 1
            bar.update(self.batch_tokens)
            if self.steps % LOG_STEPS == 0:
                self._log(bar)
            if self.checkpoint_dir is not None and time.monotonic() - saved >= self.checkpoint_seconds:
                self._save(stream, bar)
                saved = time.monotonic()
        self._log(bar)

    def _log(self, bar: tqdm) -> None:
        """Read the metrics of the SAEs that have stepped, show them and append them to the log."""
        lines = [{"sae": run.name, **run.read_metrics()} for run in self.runs if run.summed_steps]
        if not lines:
            return
        mean = {key: sum(line[key] for line in lines) / len(lines) for key in ("fvu", "l0", "dead_share")}
        bar.set_postfix(fvu=f"{mean['fvu']:.3f}", l0=f"{mean['l0']:.1f}", dead=f"{mean['dead_share']:.1%}")
        if self.log_file is not None:
            file = self.log_file
            text = "".join(json.dumps(line) + "\n" for line in lines)
            self._patiently(lambda: _append(file, text), bar)
        self.loggers.write(lines)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _said_where(self, stream: Stream, bar: tqdm) -> str:
        """Write a checkpoint, and say where it is."""
        tokens = f"{self.steps * self.batch_tokens:,} tokens"
        if self.checkpoint_dir is None:
            return f"training was stopped after {tokens}; without a checkpoint_dir nothing is saved."
        return f"training was stopped after {tokens} and can be resumed from {self._save(stream, bar)}."

    def _save(self, stream: Stream, bar: tqdm | None = None) -> Path:
        assert self.checkpoint_dir is not None
        folder = self.checkpoint_dir
        for run in self.runs:
            if run.summed_steps and bool(run.bad[0]):
                run.read_metrics()  # raises: a run that went wrong must not replace its last good checkpoint
        tensors, source = stream.state()
        data: dict[str, Any] = {
            "configs": [resolved_settings(run.config, run.k_aux) for run in self.runs],
            "steps": self.steps,
            "stream": source,
            "kl_batches": None if self.kl_batches is None else self.kl_batches.state(),
            "scales": {site: facts.scale for site, facts in self.facts.items()},
            "runs": [],
        }
        for site, facts in self.facts.items():
            tensors |= {f"facts.center.{site}": facts.center, f"facts.variance.{site}": facts.variance}
        for i, run in enumerate(self.runs):
            run_tensors, run_data = run.state()
            tensors |= {f"runs.{i}.{name}": x for name, x in run_tensors.items()}
            data["runs"].append(run_data)
        return self._patiently(lambda: save_state(folder, self.steps, tensors, data), bar)

    def _resume(self, stream: Stream) -> None:
        if self.checkpoint_dir is None:
            raise ArgumentError("there is nothing to resume from. Give the trainer the checkpoint_dir of the run.")
        tensors, data, folder = load_state(self.checkpoint_dir)
        recorded = data["configs"]
        if len(recorded) == len(self.configs) and data["scales"].keys() == self.d_in.keys():
            on_device = {name: x.to(self.device) for name, x in tensors.items() if name.startswith("facts.")}
            self.runs = self._make_runs(
                {
                    site: InputFacts(scale, on_device[f"facts.center.{site}"], on_device[f"facts.variance.{site}"])
                    for site, scale in data["scales"].items()
                }
            )
        settings = [resolved_settings(run.config, run.k_aux) for run in self.runs]
        if json.loads(json.dumps(settings)) != recorded:
            raise ArgumentError(
                f"{folder} belongs to another run: its SAEs were configured otherwise. Resume with the settings that the "
                "run was started with, or start anew in another folder."
            )
        for i, (run, run_data) in enumerate(zip(self.runs, data["runs"], strict=True)):
            prefix = f"runs.{i}."
            run.load_state({k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}, run_data)
        self.steps = data["steps"]
        if self.kl_batches is not None:
            self.kl_batches.load_state(data["kl_batches"])
        stream.load_state(tensors, data["stream"], self._streamed_steps() * self.batch_tokens)
        if self.log_file is not None:
            _drop_lines_after(self.log_file, self.steps)

    def _streamed_steps(self) -> int:
        """Steps so far that took a batch of the stream."""
        return min(self.steps, max(config.steps - config.kl_steps for config in self.configs))

    def _patiently(self, write: Callable[[], Any], bar: tqdm | None = None) -> Any:
        """Do a write; while the disk is full wait, say so once, and try again. `stop` ends the waiting."""
        said = False
        while True:
            try:
                return write()
            except OSError as error:
                if error.errno not in DISK_FULL or self._stop.is_set():
                    raise
                if not said:
                    message = f"{error} Training pauses and goes on when there is room; nothing is lost."
                    if bar is not None:
                        bar.write(message, file=sys.stderr)
                    else:
                        warnings.warn(message, UserWarning, stacklevel=3)
                    said = True
            self._stop.wait(RETRY_SECONDS)

    # --- after the last step ------------------------------------------------------------------------------------------

    def _calibrate(self, stream: Stream, saes: list[SAE]) -> None:
        """Thresholds and statistics from the tokens that follow the training tokens."""
        wanted = [config.calibration_tokens for config in self.configs]
        calibrators = [Calibrator(sae, tokens) for sae, tokens in zip(saes, wanted, strict=True)]
        left = max(wanted)
        while left > 0 and (n := stream.available(min(left, self.batch_tokens))) > 0:
            if self._stop.is_set():
                saved = "nothing is saved" if self.checkpoint_dir is None else "resume it to do that again"
                raise TrainingInterrupted(f"all steps were taken, but not yet all latents measured: {saved}.")
            batch = stream.take(n)
            for calibrator, config in zip(calibrators, self.configs, strict=True):
                calibrator.update(batch[config.site], None if config.site_out is None else batch[config.site_out])
            left -= n
        for calibrator, tokens in zip(calibrators, wanted, strict=True):
            running_mean = None if calibrator.sae.threshold is None else float(calibrator.sae.threshold.detach()[0])
            record_calibration(calibrator.sae, calibrator.finish(), tokens, running_mean)


def record_calibration(sae: SAE, result: Calibration, wanted: int, running_mean: float | None) -> None:
    """Put what the calibration found into `sae.metadata`; warn where a threshold could not be calibrated."""
    sae.metadata["calibration"] = {"tokens": result.tokens, "wanted_tokens": wanted, "l0": result.l0}
    if not isinstance(sae.config.activation, BatchTopK):
        return
    sae.metadata["threshold"] = {
        "source": "calibrated" if result.tokens else "running_mean",
        "running_mean": running_mean,
        "running_mean_l0": result.l0_before,
        "calibrated": float(sae.threshold.detach()[0]) if result.tokens else None,
        "calibrated_l0": result.l0,
    }
    if result.tokens == 0:
        warnings.warn(
            f"no fresh tokens were left to calibrate the threshold of the BatchTopK at {sae.site}; it is the running "
            f"mean of the training batches. Let the activations go on for {wanted:,} tokens after training.",
            UserWarning,
            stacklevel=4,
        )


def _append(file: Path, text: str) -> None:
    """Append to a file, all of it or nothing."""
    data = text.encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as stream:  # a buffer would be written again when the file is closed
        end = stream.tell()
        try:
            while data:
                data = data[stream.write(data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                stream.truncate(end)
            raise FileError(error.errno, f"cannot write {file}: {error.strerror}.") from error


def _drop_lines_after(file: Path, step: int) -> None:
    """Take the lines of later steps out of a log: the steps will be taken again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # cut off by a kill
            continue
    atomic_write(file, "".join(line + "\n" for line in kept))
