"""`saehook export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from saehook.commands.shared import add_program, add_saes, hooked_for

HELP = "write a program into plain weights, or a vector for llama.cpp"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `export`."""
    add_program(sub)
    add_saes(sub)
    sub.add_argument(
        "--out", type=Path, required=True, metavar="OUT", help="a new folder, or a file .gguf for a control vector"
    )
    sub.add_argument(
        "--every-token", action="store_true", help="act on special tokens, too, as a bias must, whatever the edits say"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write a program whose edits add the same at every token into weights, so that no SAE is needed any more: into a plain
    Hugging Face checkpoint, or as a control vector for llama.cpp. Other programs are refused, with the reason.

    saehook export program.json --out DIR
    saehook export program.json --out steer.gguf
    """
    from saehook.export import export_checkpoint, export_control_vector
    from saehook.program_file import load_program

    file = load_program(arguments.program)
    hooked = hooked_for(file, arguments.lm, arguments.sae)
    write = export_control_vector if arguments.out.suffix == ".gguf" else export_checkpoint
    print(f"wrote {write(hooked, file.program, arguments.out, every_token=arguments.every_token)}")
