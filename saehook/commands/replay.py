"""`saehook replay`."""

from __future__ import annotations

import argparse

from saehook.commands.shared import add_json, add_program, add_saes, hooked_for, write_json

HELP = "say whether a program still does what it did where it was made"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `replay`."""
    add_program(sub)
    add_saes(sub)
    add_json(sub)


def run(arguments: argparse.Namespace) -> int:
    """Run the prompt of a program file again and compare the numbers, and the files of model and SAEs, with what it says.
    Prints same (exit code 0) or drifted (1), and what differs. Model and SAEs are those of the hub that the file names, else
    the bundled ones, unless others are given.

    saehook replay program.json
    saehook replay hf:owner/name --lm DIR --sae DIR ...
    """
    from saehook.program_file import load_program
    from saehook.replay import replay

    file = load_program(arguments.program)
    result = replay(hooked_for(file, arguments.lm, arguments.sae), file)
    print(result)
    write_json(arguments.json, result.to_json())
    return 0 if result.same else 1
