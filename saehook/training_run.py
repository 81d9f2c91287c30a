"""A whole training run: text → activations → SAEs → evaluation → files and a report."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saehook.activation_cache import ActivationCache, cache_key, lm_pass, weights_fingerprint
from saehook.checkpoint import save_sae
from saehook.config import MAX_NORM_RATIO, MaskRule, TrainConfig
from saehook.corpus import Document
from saehook.dataset_text import DatasetText
from saehook.devices import ONE_DEVICE, OneDevice
from saehook.distributed.reading import SharedPass
from saehook.distributed.sharded_sae import ShardedSAE
from saehook.distributed.shards import Shards
from saehook.errors import ArgumentError
from saehook.eval_result import EvalResult
from saehook.evaluation import evaluate
from saehook.files import atomic_write
from saehook.harvest import Shuffled, TextStream, WithoutOutliers, activations_of, mask_rules
from saehook.hooked_model import HookedModel
from saehook.kl_tuning import KLBatches
from saehook.loggers import check_loggers
from saehook.metrics_log import METRICS
from saehook.reports import write_report
from saehook.run_state import checkpoints
from saehook.sae import SAE
from saehook.sae_run import sae_name, site_name
from saehook.sites import Site
from saehook.tokenization import Windows, tokenizer_sha256, window_size
from saehook.trainer import CHECKPOINT_SECONDS, Trainer

FINGERPRINT_TOKENS = 256
CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints, below its `out`."""


@dataclass
class TrainedSAE:
    """One finished SAE."""

    sae: SAE
    folder: Path
    """Where it was written."""


@dataclass
class TrainingRun:
    """What a run gives back."""

    saes: list[TrainedSAE]
    evaluation: EvalResult | None = None
    """On held-out text, measured on the stored files; None where no text was given for it."""


def train_saes(
    model: HookedModel,
    configs: Sequence[TrainConfig],
    documents: Sequence[Document] | DatasetText,
    out: Path,
    *,
    held_out: Windows | None = None,
    repeat: bool = False,
    skip_first_tokens: int = 0,
    max_norm_ratio: float = MAX_NORM_RATIO,
    dtype: torch.dtype | None = None,
    cache: Path | None = None,
    progress: bool = True,
    resume: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    log: Sequence[str] = (),
    devices: OneDevice = ONE_DEVICE,
) -> TrainingRun:
    """Train SAEs on text in one pass of the language model and write each into a folder of its own below `out`.

    SIGINT and SIGTERM let the step end, write a checkpoint below `out/checkpoints` and raise TrainingInterrupted; the
    checkpoints go away when the SAEs are written.

    Args:
        documents: the training text; read in an order shuffled by the first config's seed, a dataset in its own order.
        held_out: windows to evaluate on; the result goes into every file and into `out/eval.json`.
        repeat: begin again when the text ends before `tokens`; else training ends there, and says so.
        skip_first_tokens: leave out so many tokens at the start of each window.
        max_norm_ratio: leave out tokens whose norm at any of the sites is more than this many times the median there; 0 is
            off. The files record both as the SAE's `MaskRule`, with the median of its own site.
        dtype: of the stored weights; None: float32.
        cache: folder for the activations, in bfloat16 (2 bytes x width x tokens a site): another run on the same text, LM
            and first seed needs no pass of the LM.
        resume: go on from the newest checkpoint in `out`; everything else must be as it was.
        log: "tensorboard", "wandb" or both; the curves go there, too (`loggers`).
        devices: those that train together (`distributed.session`), each in a process that calls this with the same arguments;
            the SAEs that are returned work where all of them call them (`distributed.sharded_sae`).

    Raises:
        ArgumentError: no config, two that would be written to the same folder, an `out` that holds an unfinished run, or
            a logger that is not installed; with `resume`, other settings or text; a negative `skip_first_tokens`, or a
            `max_norm_ratio` below 1 but 0.
        TrainingInterrupted: a signal.
        SiteError: a site that the model does not have. Nothing is trained then.
    """
    if not configs:
        raise ArgumentError("there is nothing to train. Give at least one TrainConfig.")
    base = MaskRule(skip_first_tokens=skip_first_tokens)
    if max_norm_ratio:
        MaskRule(max_norm_ratio=max_norm_ratio, median_norm=1.0)  # an error before anything runs
    if held_out is not None:
        model.check_causal("loss to evaluate SAEs by; train with held_out=None (--eval-tokens 0)")
    sites = {name: model.sites(name) for config in configs for name in config.sites}
    for name, found in sites.items():
        if len(found) != 1:
            raise ArgumentError(f"{name!r} names {len(found)} sites; a TrainConfig has exactly one.")
    configs = [_under_our_names(config, sites) for config in configs]
    widths = {found[0].name: model.width(found[0]) for found in sites.values()}
    folders = [out / _folder(config, configs) for config in configs]
    if len(set(folders)) < len(folders):
        raise ArgumentError("two configs have the same site, activation and size. Change one, or train them apart.")
    check_loggers(log)
    shards = devices if isinstance(devices, Shards) else None
    devices.check(configs)

    def prepare() -> None:
        if not resume:
            check_unused(out)
        out.mkdir(parents=True, exist_ok=True)

    devices.main_does(prepare)
    seed = configs[0].seed

    def from_the_start(repeat: bool = repeat, seed: int = seed) -> TextStream:
        return TextStream(documents, model.tokenizer, window_size(model.context), repeat=repeat, seed=seed)

    text = from_the_start()
    lm = {
        "id": model.name,
        "revision": getattr(model.lm.config, "_commit_hash", None),
        "tokenizer_sha256": tokenizer_sha256(model.tokenizer),
    }
    source_text: TextStream | SharedPass = text
    if shards is not None:
        facts = {"settings": [dataclasses.asdict(config) for config in configs], "text": text.sha256, **lm}
        shards.mesh.check_same(facts | {"mask": (str(base), max_norm_ratio), "repeat": repeat, "cache": str(cache)})
    if cache is None and shards is not None:
        opening, chunks = (
            SharedPass(model, list(widths), t, shards.mesh, skip_first_tokens) for t in (from_the_start(), text)
        )
        source_text = chunks
    elif cache is None:
        opening, chunks = (activations_of(model, list(widths), t, skip_first_tokens) for t in (from_the_start(), text))
    else:
        common: dict[str, Any] = {
            "lm": model.name,
            "revision": lm["revision"],
            "weights": weights_fingerprint(model.lm),
            "text_sha256": text.sha256,
            "order": f"seed {seed}, {'repeated' if repeat else 'once'}",
            "tokenizer_sha256": lm["tokenizer_sha256"],
            "window": text.window,
            "mask_rule": str(base),
        }
        cached = ActivationCache(cache, {site: cache_key(site=site, **common) for site in widths})
        make = lm_pass(model, list(widths), from_the_start, skip_first_tokens)
        opening, chunks = (cached.chunks(make, device=model.device) for _ in range(2))
    rules = mask_rules(opening, max_norm_ratio, skip_first_tokens) if max_norm_ratio else dict.fromkeys(widths, base)
    served = WithoutOutliers(chunks, rules, source_text)
    batches = Shuffled(
        served,
        buffer_tokens=max(config.resolved_buffer_tokens for config in configs),
        batch_tokens=configs[0].resolved_batch_tokens,
        seed=seed,
        text=served if cache is None else None,  # a cache is read again up to the place where a run was stopped
    )
    kl_batches = None
    if any(config.kl_tokens for config in configs):
        # In an order of its own, so that whole windows do not follow what the buffer holds.
        kl_batches = KLBatches(model, list(widths), from_the_start(repeat=True, seed=seed + 1), rules)
    trainer = Trainer(
        configs,
        batches,
        kl_batches=kl_batches,
        d_in=widths,
        device=str(model.device),
        log_dir=out,
        checkpoint_dir=out / CHECKPOINTS,
        checkpoint_seconds=checkpoint_seconds,
        log=log,
        progress=progress,
        devices=devices,
    )
    if not resume:
        devices.main_does(lambda: (out / METRICS).unlink(missing_ok=True))
    with stopped_by_signals(trainer):
        saes = trainer.fit(resume=resume)
    place = served.state()
    read = {"windows_read": place["served"], "passes": place["passes"] + 1} if cache is None else {"cached": True}
    source = {
        "lm": lm,
        "text": {**text.facts, "window": text.window, **read},
    }
    sample = held_out.ids[0] if held_out is not None else next(TextStream(documents, model.tokenizer, text.window))
    trained = []
    for sae, folder in zip(saes, folders, strict=True):
        assert sae.site is not None
        sae.mask_rule = rules[sae.site]
        sae.metadata |= copy.deepcopy(source)
        stored = sae.to(dtype) if dtype is not None else sae
        stored = stored.to(torch.float32)  # what a reader of the file gets
        stored.metadata["fingerprint"] = model.fingerprint(
            sae.site, stored, sample[:FINGERPRINT_TOKENS], site_out=sae.site_out
        )
        _save(stored, folder, dtype, devices)
        trained.append(TrainedSAE(stored, folder))
    evaluation = None if held_out is None else _evaluate(model, trained, held_out, out, dtype, progress, devices)

    def end() -> None:
        write_report(out)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)

    devices.main_does(end)
    return TrainingRun(trained, evaluation)


def _save(sae: SAE, folder: Path, dtype: torch.dtype | None, devices: OneDevice) -> None:
    """Write an SAE: each process its latents, or the main one all of them."""
    if isinstance(sae, ShardedSAE):
        sae.store(folder, dtype)
    else:
        devices.main_does(lambda: save_sae(sae, folder, dtype=dtype))


def check_unused(out: Path) -> None:
    """Raises ArgumentError where `out` holds a run that was stopped and could be resumed."""
    if found := checkpoints(out / CHECKPOINTS):
        raise ArgumentError(
            f"{out} holds a run that was stopped ({found[-1].name}). Resume it (`saehook train --resume {out}`, resume=True), "
            f"or remove {out / CHECKPOINTS} to start anew."
        )


@contextlib.contextmanager
def stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """SIGINT and SIGTERM stop the trainer after its step; a second one acts as it always does. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: object) -> None:
        trainer.stop()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _under_our_names(config: TrainConfig, sites: Mapping[str, Sequence[Site]]) -> TrainConfig:
    """The same with the sites' own names, where it has another tool's."""
    names = {"site": sites[config.site][0].name}
    if config.site_out is not None:
        names["site_out"] = sites[config.site_out][0].name
    return dataclasses.replace(config, **names)


def _folder(config: TrainConfig, configs: Sequence[TrainConfig]) -> str:
    """The site or sites, and more where several configs share them."""
    name = site_name(config)
    if sum(site_name(other) == name for other in configs) > 1:
        name = f"{sae_name(config)}-seed{config.seed}"
    return name.replace(":", ".")


def _evaluate(
    model: HookedModel,
    trained: list[TrainedSAE],
    held_out: Windows,
    out: Path,
    dtype: Any,
    progress: bool,
    devices: OneDevice,
) -> EvalResult:
    """Evaluate, one SAE per site at a time, and note each row in its file. On several devices all run the language model."""
    by_site: dict[str, list[TrainedSAE]] = {}
    for one in trained:
        by_site.setdefault(str(one.sae.site), []).append(one)
    rounds = [[ones[i] for ones in by_site.values() if i < len(ones)] for i in range(max(map(len, by_site.values())))]
    results: list[EvalResult] = []
    for group in rounds:
        hooked = model.attach({str(one.sae.site): one.sae for one in group})
        names = {str(one.sae.site): one.folder.name for one in group}
        try:
            results.append(evaluate(hooked, held_out, names=names, progress=progress and devices.is_main))
        finally:
            hooked.detach()
        for one, row in zip(group, results[-1].results, strict=False):
            one.sae.metadata["evaluation"] = row.numbers() | {"text_sha256": held_out.text_sha256}
            _save(one.sae, one.folder, dtype, devices)
    result = EvalResult([row for r in results for row in r.results], results[0].provenance)
    devices.main_does(lambda: atomic_write(out / "eval.json", result.to_json() + "\n"))
    return result
