"""Trains what a claim needs, all of it on one stream, and keeps finished SAEs under a hash of all that decides them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reproduction.data import ORDER_SEED, Data
from saehook import SAE, TrainConfig, load_sae
from saehook.checkpoint import save_sae
from saehook.config import SAEConfig
from saehook.harvest import Shuffled
from saehook.run_state import checkpoints
from saehook.sae_run import resolved_settings
from saehook.trainer import Trainer
from saehook.training_run import stopped_by_signals

SCHEMA = 1
BUFFER_TOKENS = 2**16
AT_ONCE = 12
"""SAEs that are trained together: memory, and what a kill can cost."""


@dataclass(frozen=True)
class Run:
    """One SAE to train."""

    data: Data
    config: TrainConfig
    untied: bool = False
    """Begin with an encoder that has nothing to do with the decoder."""
    given: Path | None = None
    """A finished SAE of that config, which stands for the run."""

    @property
    def facts(self) -> dict[str, Any]:
        """All that decides the weights."""
        settings = resolved_settings(self.config, self.config.k_aux or 0)
        return {
            "schema": SCHEMA,
            "data": self.data.facts,
            "order": {"seed": ORDER_SEED, "buffer_tokens": BUFFER_TOKENS},
            "settings": {name: value for name, value in settings.items() if name not in ("init", "buffer_tokens")},
            "untied": self.untied,
        }

    @property
    def key(self) -> str:
        """The name of the finished SAE's folder."""
        if self.given is not None:
            return self.given.name
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def work(runs: Sequence[Run]) -> str:
    """What training them takes, in words; every run counts once."""
    if not runs:
        return "no SAE"
    different = dict.fromkeys((run.data, run.config, run.untied) for run in runs)
    tokens = sum(config.tokens for _, config, _ in different)
    operations = sum(2.0 * config.tokens * data.d_in * config.d_sae for data, config, _ in different)
    widest = max(config.d_sae for _, config, _ in different)
    return (
        f"{len(different)} SAEs of up to {widest:,} latents on {round(tokens / 1e6, 1):,g} M tokens in all; their encoders alone "
        f"take {operations:.1e} operations"
    )


class Runner:
    """Finished SAEs lie in `folder/saes/KEY`."""

    def __init__(self, folder: Path, *, progress: bool = True, device: str = "cpu") -> None:
        """`device`: to train on; finished SAEs are read back to the CPU."""
        self.folder = folder
        self.device = device
        self.progress = progress
        self.loaded: dict[str, SAE] = {}
        """By key; one object for all claims."""
        self.trained = 0
        """SAEs that were trained, not found, by this runner."""

    def finished(self, run: Run) -> Path | None:
        """Where the SAE is, if it was trained before."""
        if run.given is not None:
            return run.given
        folder = self._place(run)
        return folder if (folder / "run.json").exists() else None

    def saes(self, runs: Sequence[Run]) -> list[SAE]:
        """Train what is missing, and load all, in the order of the runs."""
        missing = {run.key: run for run in runs if self.finished(run) is None}
        for group in self._groups(list(missing.values())):
            self._train(group)
        for run in runs:
            if run.key not in self.loaded:
                self.loaded[run.key] = load_sae(run.given or self._place(run))
        return [self.loaded[run.key] for run in runs]

    def _place(self, run: Run) -> Path:
        return self.folder / "saes" / run.key

    @staticmethod
    def _groups(runs: Sequence[Run]) -> Iterator[list[Run]]:
        """Runs that can share a stream, `AT_ONCE` of them."""
        by_stream: dict[tuple[int, int, int], list[Run]] = {}
        for run in runs:
            source = getattr(run.data, "lm", run.data)
            config = run.config
            shared = (hash(source), config.resolved_batch_tokens, config.steps)
            by_stream.setdefault(shared, []).append(run)
        for group in by_stream.values():
            for start in range(0, len(group), AT_ONCE):
                yield group[start : start + AT_ONCE]

    def _train(self, group: Sequence[Run]) -> None:
        data, config = group[0].data, group[0].config
        work = self.folder / "unfinished" / hashlib.sha256("".join(run.key for run in group).encode()).hexdigest()[:20]
        configs = [self._started(run, work) for run in group]
        sites = list(dict.fromkeys(run.config.site for run in group))
        batches = Shuffled(
            ({site: chunk[site] for site in sites} for chunk in data.chunks()),
            buffer_tokens=BUFFER_TOKENS,
            batch_tokens=config.resolved_batch_tokens,
            seed=ORDER_SEED,
        )
        trainer = Trainer(
            configs,
            batches,
            d_in={run.config.site: run.data.d_in for run in group},
            device=self.device,
            checkpoint_dir=work,
            checkpoint_seconds=300,
            progress=self.progress,
        )
        with stopped_by_signals(trainer), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            saes = trainer.fit(resume=bool(checkpoints(work)))
        for run, sae in zip(group, saes, strict=True):
            partial = work / run.key
            save_sae(sae, partial)
            (partial / "run.json").write_text(json.dumps(run.facts, indent=1, default=str) + "\n", encoding="utf-8")
            place = self._place(run)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
            self.trained += 1
        shutil.rmtree(work)

    @staticmethod
    def _started(run: Run, work: Path) -> TrainConfig:
        """The config, with the SAE to start from where the encoder shall be a stranger to the decoder."""
        if not run.untied:
            return run.config
        folder = work / f"untied-{run.key}"
        if not folder.exists():
            x = next(run.data.chunks())[run.config.site].float()
            save_sae(untied(run.config, x), folder)
        return dataclasses.replace(run.config, init=str(folder))


@torch.no_grad()
def untied(config: TrainConfig, x: Tensor) -> SAE:
    """An untrained SAE whose encoder and decoder are drawn apart, both with unit columns and rows; b_dec is the mean of x."""
    generator = torch.Generator().manual_seed(7000 + config.seed)
    d_in = x.shape[1]
    sae = SAE(SAEConfig(d_in=d_in, d_sae=config.d_sae, activation=config.inference), site=config.site)
    sae.W_dec.copy_(F.normalize(torch.randn(config.d_sae, d_in, generator=generator), dim=-1))
    sae.W_enc.copy_(F.normalize(torch.randn(config.d_sae, d_in, generator=generator), dim=-1).T)
    sae.b_enc.zero_()
    sae.b_dec.copy_(x.mean(0))
    if sae.threshold is not None:
        sae.set_threshold(0.0)
    return sae
