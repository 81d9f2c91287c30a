"""`saehook eval`."""

from __future__ import annotations

import argparse
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

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs

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
    sub.add_argument("--seed", type=int, default=0, help="of the draws for the intervals (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    """Splice-in evaluation: the language model's loss with each SAE's reconstruction in place of its activations, one row for
    each SAE, and one for all of them at once where they have different sites.

    saehook eval                                        the bundled model and SAEs on held-out standard-library modules
    saehook eval --lm gpt2 --sae runs/a/* --text heldout.txt --tokens 1M --json eval.json
    saehook report eval.json -o report.html             a page with plots
    """
    evaluated(arguments, check=arguments.check, seed=arguments.seed)


def evaluated(
    arguments: argparse.Namespace, *, check: str = "fingerprint", seed: int = 0
) -> tuple[HookedSAEs, dict[str, Path]]:
    """The model with the SAEs attached, and the folder of each by its name there, after the table was printed."""
    from saehook.evaluation import evaluate as run

    hooked, folders = attach(arguments)
    text = held_out_text(documents_of_setting(vars(arguments), "text"), arguments.tokens, hooked.model)
    if not arguments.text:
        note_other_text(hooked, text)
    result = run(hooked, text, names=labels(folders), check=check, seed=seed)
    print(result.table())
    write_json(arguments.json, result.to_json())
    return hooked, folders


def labels(folders: dict[str, Path]) -> dict[str, str]:
    """Names of the folders, with the folder above where several have the same name."""
    names = [folder.resolve().name for folder in folders.values()]
    return {
        name: own if names.count(own) == 1 else f"{folder.resolve().parent.name}/{own}"
        for (name, folder), own in zip(folders.items(), names, strict=True)
    }
