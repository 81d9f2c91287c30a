"""`saehook eval`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saehook.commands.shared import (
    add_json,
    add_saes,
    add_text,
    attach,
    documents_of_setting,
    held_out_text,
    note_other_text,
    write_json,
)
from saehook.errors import ArgumentError

if TYPE_CHECKING:
    from saehook.corpus import Document
    from saehook.hooked_saes import HookedSAEs
    from saehook.suite.probe_tasks import ProbeTask

HELP = "what the model loses when reconstructions take the place of activations"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `eval`."""
    add_saes(sub)
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
        choices=["core", "full"],
        default="core",
        help="full adds slow metrics of the latents (default: core)",
    )
    sub.add_argument(
        "--probe-tasks",
        nargs="+",
        metavar="FILE",
        help='two-class questions for --suite full, one {"text": .., "labels": {..}} a line (default: made from the text, or '
        "from the held-out modules)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Splice-in evaluation: the language model's loss with each SAE's reconstruction in place of its activations, one row for
    each SAE, and one for all of them at once where they have different sites.

    saehook eval                                        the bundled model and SAEs on held-out standard-library modules
    saehook eval --lm gpt2 --sae runs/a/* --text heldout.txt --tokens 1M --json eval.json
    saehook eval --suite full                           and what takes longer: probes, explanations, steering, ...
    saehook report eval.json -o report.html             a page with plots
    """
    if arguments.probe_tasks and arguments.suite != "full":
        raise ArgumentError("--probe-tasks are for --suite full. Give both, or neither.")
    evaluated(arguments, check=arguments.check, seed=arguments.seed, full=arguments.suite == "full")


def evaluated(
    arguments: argparse.Namespace, *, check: str = "fingerprint", seed: int = 0, full: bool = False
) -> tuple[HookedSAEs, dict[str, Path]]:
    """The model with the SAEs attached, and the folder of each by its name there, after the table was printed."""
    from saehook.evaluation import evaluate as run

    hooked, folders = attach(arguments)
    documents = documents_of_setting(vars(arguments), "text")
    text = held_out_text(documents, arguments.tokens, hooked.model)
    tasks = probe_tasks(arguments.probe_tasks, documents, seed) if full else []
    if not arguments.text:
        note_other_text(hooked, text)
    result = run(hooked, text, names=labels(folders), check=check, seed=seed)
    print(result.table())
    write_json(arguments.json, result.to_json())
    if full:
        from saehook.suite.run import run_suite

        suite = run_suite(hooked, text, names=labels(folders), tasks=tasks, seed=seed)
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
    """Names of the folders, with the folder above where several have the same name."""
    names = [folder.resolve().name for folder in folders.values()]
    return {
        name: own if names.count(own) == 1 else f"{folder.resolve().parent.name}/{own}"
        for (name, folder), own in zip(folders.items(), names, strict=True)
    }
