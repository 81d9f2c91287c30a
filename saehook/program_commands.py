"""The commands `saehook replay` and `saehook export`, which take a program file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from saehook.bundle import bundled
from saehook.errors import ArgumentError

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs
    from saehook.program_file import ProgramFile


def add_program(sub: argparse.ArgumentParser) -> None:
    """What both commands take."""
    sub.add_argument("program", metavar="PROGRAM", help="a program file, or hf:owner/name[,revision=..]")


def add_export(sub: argparse.ArgumentParser) -> None:
    """Options of `export`."""
    sub.add_argument(
        "--out", type=Path, required=True, metavar="OUT", help="a new folder, or a file .gguf for a control vector"
    )
    sub.add_argument(
        "--every-token", action="store_true", help="act on special tokens, too, as a bias must, whatever the edits say"
    )


def replay(arguments: argparse.Namespace) -> int:
    """Run the prompt of a program file again and compare the numbers, and the files of model and SAEs, with what it says.
    Prints same (exit code 0) or drifted (1), and what differs. Model and SAEs are those of the hub that the file names, else
    the bundled ones, unless others are given.

    saehook replay program.json
    saehook replay hf:owner/name --lm DIR --sae DIR ...
    """
    from saehook.files import atomic_write
    from saehook.program_file import load_program
    from saehook.replay import replay as run

    file = load_program(arguments.program)
    result = run(hooked_for(file, arguments.lm, arguments.sae), file)
    print(result)
    if arguments.json is not None:
        atomic_write(arguments.json, result.to_json() + "\n")
    return 0 if result.same else 1


def export(arguments: argparse.Namespace) -> None:
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


def hooked_for(file: ProgramFile, lm: str | None, saes: list[str] | None) -> HookedSAEs:
    """The language model and SAEs of a program file, or those that are named here, attached.

    Raises:
        ArgumentError: a model is named, and no SAE. Those of loading and attaching.
    """
    from transformers.utils import logging

    from saehook import hub
    from saehook.checkpoint import load_sae
    from saehook.hooked_model import HookedModel

    logging.disable_progress_bar()
    if saes:
        folders = [Path(folder) for folder in saes]
    elif all(ref.repo for ref in file.saes):
        folders = []
        for ref in file.saes:
            place = hub.HubPlace(str(ref.repo), ref.revision, ref.path)
            folders.append([hub.download(place, name) for name in ref.sha256][0].parent)
    elif lm:
        raise ArgumentError("the bundled SAEs belong to the bundled model. Name the SAEs of this one with --sae DIR.")
    else:
        folders = [bundled("sae"), bundled("sae-mlp")]
    if lm is None and (file.model.revision is not None or hub.is_repo(file.model.id)):
        model = HookedModel.from_pretrained(file.model.id, revision=file.model.revision or "main")
    else:
        model = HookedModel.from_pretrained(str(lm or bundled("lm")))
    loaded = [load_sae(folder) for folder in folders]
    sites = [
        file.saes[0].site if sae.site is None and len(loaded) == len(file.saes) == 1 else sae.site for sae in loaded
    ]
    by_site = dict(zip(sites, loaded, strict=True))
    if None in by_site or len(by_site) < len(loaded):
        raise ArgumentError(
            f"the SAEs {', '.join(map(str, folders))} record the sites {', '.join(map(str, sites))}; one SAE for each of "
            f"{', '.join(ref.site for ref in file.saes)} is expected. Attach them in Python."
        )
    return model.attach(by_site)
