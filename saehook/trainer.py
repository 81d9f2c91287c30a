"""Training: several SAEs on one stream of activations. Takes any iterator of tensors, so it needs no language model."""

from __future__ import annotations

import contextlib
import json
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

from saehook import kernels, metrics_log
from saehook.batches import Batch, InputFacts, JudgedBatches, Stream
from saehook.calibration import Calibration, Calibrator
from saehook.checkpoint import load_sae
from saehook.config import MOMENTS, WEIGHTS, BatchTopK, TrainConfig
from saehook.devices import ONE_DEVICE, OneDevice
from saehook.errors import ArgumentError, TrainingError, TrainingInterrupted
from saehook.files import DISK_FULL
from saehook.loggers import Loggers, check_loggers
from saehook.sae import SAE
from saehook.sae_run import SAERun, resolved_settings, sae_name

SAMPLE_TOKENS = 8192
"""Tokens at the start of the stream that set the input scale and b_dec; they are trained on afterwards."""
LOG_STEPS = 20
"""A line of metrics is written after so many steps; counted in steps, so that a resumed run writes the same lines."""
CHECKPOINT_SECONDS = 600.0
"""Time between checkpoints, where a folder for them is given."""
RETRY_SECONDS = 10.0
"""Pause before a write is tried again when the disk is full."""


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
        devices: OneDevice = ONE_DEVICE,
    ) -> None:
        """`batches` yields activations of shuffled tokens, as many at a time as it likes: a dict from each site to
        [n, d_in], or plain tensors where all configs share one site. It should go on for `calibration_tokens` beyond
        the training tokens. `d_in` is the width, of all sites or by site. `log_dir` gets `metrics.jsonl`,
        `checkpoint_dir` a checkpoint every `checkpoint_seconds` and when the run is stopped. `log` names further logs to
        write, "tensorboard" and "wandb" (`loggers`), which need `log_dir`, too. `kl_batches` gives the last batches, those
        of `kl_tokens`. `devices`: those that train together (`saehook.distributed`), each with a trainer of its own that is
        given the same batches.

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
        self.batches, self.kl_batches, self.devices = batches, kl_batches, devices
        devices.check(self.configs)
        self.device = device
        self.log_file = None if log_dir is None else Path(log_dir) / metrics_log.METRICS
        check_loggers(log)
        if log and log_dir is None:
            raise ArgumentError(f"{', '.join(log)} needs a folder. Give log_dir, too.")
        self.log = tuple(log)
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.checkpoint_seconds = checkpoint_seconds
        self.progress = progress and devices.is_main
        self.steps = 0
        """Steps taken so far."""
        self.runs: list[SAERun] = []
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
        as that of a run that was never interrupted. On several devices each holds some latents of the SAEs, which work
        where all call them.

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
            with contextlib.closing(
                Loggers(self.log if self.devices.is_main else (), folder, settings, self.steps)
            ) as self.loggers:
                self._train(stream, bar)
            if self.checkpoint_dir is not None:  # what follows can be done again
                self._save(stream)
        if (trained := self.steps * self.batch_tokens) < total and self.devices.is_main:
            warnings.warn(
                f"the activations ended early: trained on {trained:,} of {total:,} tokens.", UserWarning, stacklevel=2
            )
        saes = [run.finish() for run in self.runs]
        self._calibrate(stream, saes)
        return [
            self.devices.finished(sae, config.inference, config.group_ends)
            for sae, config in zip(saes, self.configs, strict=True)
        ]

    def _start(self, stream: Stream) -> list[SAERun]:
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

    def _make_runs(self, facts: Mapping[str, InputFacts]) -> list[SAERun]:
        names: list[str] = []
        for config in self.configs:
            name = sae_name(config)
            names.append(name if name not in names else f"{name}-{len(names)}")
        self.facts = dict(facts)
        return [
            SAERun(
                config,
                name,
                facts[config.site],
                None if config.site_out is None else facts[config.site_out],
                self.devices,
            )
            for config, name in zip(self.configs, names, strict=True)
        ]

    def _train(self, stream: Stream, bar: tqdm) -> None:
        """All steps, or as many as there are tokens for."""
        saved = time.monotonic()
        scratch = kernels.Scratch()
        while not all(run.done for run in self.runs):
            if self.devices.any(self._stop.is_set()):
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
            due = time.monotonic() - saved >= self.checkpoint_seconds
            if self.checkpoint_dir is not None and self.devices.main_says(due):
                self._save(stream, bar)
                saved = time.monotonic()
        self._log(bar)

    def _log(self, bar: tqdm) -> None:
        """Read the metrics of the SAEs that have stepped, show them and append them to the log."""
        lines = [{"sae": run.name, **run.read_metrics()} for run in self.runs if run.summed_steps]
        if not lines or not self.devices.is_main:
            return
        mean = {key: sum(line[key] for line in lines) / len(lines) for key in ("fvu", "l0", "dead_share")}
        bar.set_postfix(fvu=f"{mean['fvu']:.3f}", l0=f"{mean['l0']:.1f}", dead=f"{mean['dead_share']:.1%}")
        if self.log_file is not None:
            file = self.log_file
            text = "".join(json.dumps(line) + "\n" for line in lines)
            self._patiently(lambda: metrics_log.append(file, text), bar)
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
        return self._patiently(lambda: self.devices.save_state(folder, self.steps, tensors, data), bar)

    def _resume(self, stream: Stream) -> None:
        if self.checkpoint_dir is None:
            raise ArgumentError("there is nothing to resume from. Give the trainer the checkpoint_dir of the run.")
        tensors, data, folder = self.devices.load_state(self.checkpoint_dir)
        usual = {"weights": WEIGHTS[0], "moments": MOMENTS[0]}  # of a run from before these were settings
        recorded = [usual | config for config in data["configs"]]
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
        if self.log_file is not None and self.devices.is_main:
            metrics_log.drop_lines_after(self.log_file, self.steps)

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
                if error.errno not in DISK_FULL or self.devices.any(self._stop.is_set()):
                    raise
                if not said and self.devices.is_main:
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
        calibrators = [
            Calibrator(sae, config.calibration_tokens, config.inference, self.devices)
            for sae, config in zip(saes, self.configs, strict=True)
        ]
        left = max(wanted)
        while left > 0 and (n := stream.available(min(left, self.batch_tokens))) > 0:
            if self.devices.any(self._stop.is_set()):
                saved = "nothing is saved" if self.checkpoint_dir is None else "resume it to do that again"
                raise TrainingInterrupted(f"all steps were taken, but not yet all latents measured: {saved}.")
            batch = stream.take(n)
            for calibrator, config in zip(calibrators, self.configs, strict=True):
                calibrator.update(batch[config.site], None if config.site_out is None else batch[config.site_out])
            left -= n
        for calibrator, tokens in zip(calibrators, wanted, strict=True):
            running_mean = None if calibrator.sae.threshold is None else float(calibrator.sae.threshold.detach()[0])
            record_calibration(calibrator.sae, calibrator.finish(), tokens, running_mean, self.devices.is_main)


def record_calibration(
    sae: SAE, result: Calibration, wanted: int, running_mean: float | None, speaks: bool = True
) -> None:
    """Put what the calibration found into `sae.metadata`; warn where a threshold could not be calibrated, if it `speaks`."""
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
    if result.tokens == 0 and speaks:
        warnings.warn(
            f"no fresh tokens were left to calibrate the threshold of the BatchTopK at {sae.site}; it is the running "
            f"mean of the training batches. Let the activations go on for {wanted:,} tokens after training.",
            UserWarning,
            stacklevel=4,
        )
