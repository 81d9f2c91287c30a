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


def run(arguments: argparse.Namespace) -> None:
    """Splice-in evaluation: the language model's loss with each SAE's reconstruction in place of its activations.

    saehook eval                                        the bundled model and SAEs on held-out standard-library modules
    saehook eval --lm DIR --sae DIR ... --text FILE --tokens 100k --json out.json
    """
    evaluated(arguments)


def evaluated(arguments: argparse.Namespace) -> tuple[HookedSAEs, dict[str, Path]]:
    """The model with the SAEs attached, and the folder of each by site, after the table was printed."""
    from saehook.evaluation import evaluate as run

    hooked, folders = attach(arguments)
    text = held_out_text(documents_of_setting(vars(arguments), "text"), arguments.tokens, hooked.model)
    if not arguments.text:
        note_other_text(hooked, text)
    result = run(hooked, text, names={site: folder.name for site, folder in folders.items()})
    print(result.table())
    write_json(arguments.json, result.to_json())
    return hooked, folders
