"""`saehook eval`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saehook.commands.shared import (
    add_json,
    add_mesh,
    add_saes,
    add_text,
    attach,
    documents_of_setting,
    held_out_text,
    load_model,
    note_other_text,
    on_mesh,
    whole_number,
    write_json,
)
from saehook.errors import ArgumentError
from saehook.suite import METRICS

if TYPE_CHECKING:
    from saehook.corpus import Document
    from saehook.devices import OneDevice
    from saehook.hooked_saes import HookedSAEs
    from saehook.suite.probe_tasks import ProbeTask

HELP = "what the model loses when reconstructions take the place of activations"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `eval`."""
    add_saes(sub)
    add_mesh(sub)
    add_text(sub, "(default: held-out modules of the standard library)", "100k")
    add_json(sub)
    sub.add_argument(
        "--check",
        choices=["fingerprint", "off"],
        default="fingerprint",
        help="refuse SAEs of another model by the fingerprint in their files (default), or measure them all the same",
    )
    sub.add_argument(
        "--seed", type=int, default=0, help="of all that is drawn, for the intervals and the suite (default: 0)"
    )
    sub.add_argument(
        "--suite",
        nargs="+",
        choices=["core", "full", *METRICS],
        default=["core"],
        metavar="METRIC",
        help=f"full adds slow metrics of the latents, or name some: {', '.join(METRICS)} (default: core, none of them)",
    )
    sub.add_argument(
        "--probe-tasks",
        nargs="+",
        metavar="FILE",
        help='two-class questions for the suite, one {"text": .., "labels": {..}} a line; `saehook probes` writes such '
        "files\n(default: made from the text, or from the held-out modules)",
    )
    sub.add_argument(
        "--lm-checkpoints",
        nargs="+",
        type=lm_checkpoint,
        default=[],
        metavar="STEP=LM",
        help="checkpoints of the language model's own training for compute_equivalent: steps or tokens, and a folder or "
        "hf:owner/name,revision=..",
    )


def run(arguments: argparse.Namespace) -> None:
    """Splice-in evaluation: the language model's loss with each SAE's reconstruction in place of its activations, one row for
    each SAE, and one for all of them at once where they have different sites.

    saehook eval                                        the bundled model and SAEs on held-out standard-library modules
    saehook eval --lm gpt2 --sae runs/a/* --text heldout.txt --tokens 1M --json eval.json
    saehook eval --suite full                           and what takes longer: probes, explanations, steering, ...
    saehook eval --suite stability --sae runs/seeds/*   latents that the SAEs of several seeds share
    saehook eval --suite compute_equivalent --lm-checkpoints 10M=lm/10M 20M=lm/20M 40M=lm/40M
    saehook report eval.json -o report.html             a page with plots
    torchrun --nproc-per-node 8 -m saehook eval --sae DIR --mesh latent=8    an SAE too large for one device
    """
    metrics = [name for name in METRICS if name in arguments.suite or "full" in arguments.suite]
    for option, given, needed in (
        ("--probe-tasks", arguments.probe_tasks, {"probe_loss", "absorption"}),
        ("--lm-checkpoints", arguments.lm_checkpoints, {"compute_equivalent"}),
    ):
        if given and not needed & set(metrics):
            raise ArgumentError(
                f"{option} is for --suite full or {' or '.join(sorted(needed))}. Give both, or neither."
            )
    with on_mesh(arguments) as devices:
        evaluated(arguments, check=arguments.check, seed=arguments.seed, metrics=metrics, devices=devices)


def lm_checkpoint(text: str) -> tuple[int, str]:
    """`10M=folder` as (10000000, "folder")."""
    step, _, lm = text.partition("=")
    if not lm:
        raise argparse.ArgumentTypeError(f"{text!r}; STEP=LM is expected, e.g. 10M=checkpoints/10M")
    return whole_number(step), lm


def evaluated(
    arguments: argparse.Namespace,
    *,
    check: str = "fingerprint",
    seed: int = 0,
    metrics: Sequence[str] = (),
    devices: OneDevice | None = None,
) -> tuple[HookedSAEs, dict[str, Path]]:
    """The model with the SAEs attached, and the folder of each by its name there, after the tables were printed."""
    from saehook.evaluation import evaluate as run

    hooked, folders = attach(arguments, devices)
    documents = documents_of_setting(vars(arguments), "text")
    text = held_out_text(documents, arguments.tokens, hooked.model)
    probed = bool({"probe_loss", "absorption"} & set(metrics))
    tasks = probe_tasks(arguments.probe_tasks, documents, seed) if probed else []
    only = None if set(metrics) == set(METRICS) else metrics
    if metrics:
        from saehook.suite.run import check_suite

        check_suite(hooked, only, tasks, lm_checkpoints=bool(arguments.lm_checkpoints))
    if not arguments.text:
        note_other_text(hooked, text)
    result = run(hooked, text, names=labels(folders), check=check, seed=seed)
    print(result.table())
    write_json(arguments.json, result.to_json())
    if metrics:
        from saehook.suite.run import run_suite

        given = arguments.lm_checkpoints
        suite = run_suite(
            hooked,
            text,
            names=labels(folders),
            tasks=tasks,
            lm_checkpoints=((step, load_model(lm)) for step, lm in given) if given else (),
            only=only,
            check=check,
            seed=seed,
        )
        print(suite.table())
        both = json.loads(result.to_json()) | {"suite": suite.to_dict()}
        write_json(arguments.json, json.dumps(both, indent=1, allow_nan=False))
    return hooked, folders


def probe_tasks(files: Sequence[str] | None, documents: Iterable[Document] | None, seed: int) -> list[ProbeTask]:
    """The tasks of the files; else those made from the documents, where these are read already and give some; else those
    of the held-out modules."""
    from saehook import corpus
    from saehook.suite.probe_tasks import make_tasks, read_tasks

    if files:
        return [task for file in files for task in read_tasks(file)]
    made = make_tasks(documents, seed=seed) if isinstance(documents, list) else []
    return made or make_tasks(corpus.read_documents(corpus.held_out_files()), seed=seed)


def labels(folders: dict[str, Path]) -> dict[str, str]:
    """Names of the folders, with as many folders above as tell all apart; numbered where one is given twice."""
    paths = [folder.resolve() for folder in folders.values()]
    found = []
    for i, path in enumerate(paths):
        others = [other for other in paths if other != path]
        own = next(tail for n in range(1, len(path.parts) + 1) if _unlike(tail := path.parts[-n:], others))
        again = f"#{paths[:i].count(path)}" if paths.count(path) > 1 else ""
        found.append("/".join(own) + again)
    return dict(zip(folders, found, strict=True))


def _unlike(tail: tuple[str, ...], paths: Iterable[Path]) -> bool:
    return all(path.parts[-len(tail) :] != tail for path in paths)
