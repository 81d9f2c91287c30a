"""Options that several commands take, and what they stand for: model, SAEs, text, files."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehook.bundle import bundled
from saehook.config import count
from saehook.errors import ArgumentError, FileError

if TYPE_CHECKING:
    from saehook.corpus import Document
    from saehook.dataset_text import DatasetText
    from saehook.devices import OneDevice
    from saehook.hooked_model import HookedModel
    from saehook.hooked_saes import HookedSAEs
    from saehook.program_file import ProgramFile
    from saehook.sae import SAE
    from saehook.tokenization import Windows

CONFIG = "cfg.json"
"""What makes a folder an SAE; `checkpoint.CONFIG`, which would load torch."""
BESIDE_SUFFIXES, BESIDE_FOLDERS = {".json", ".jsonl", ".html", ".yaml"}, {"checkpoints", "tensorboard", "wandb"}
"""What a run writes beside its SAEs."""
TEXT_HELP = """text files, .jsonl (one {"text": ...} a line), folders of them, or one Hugging Face dataset, streamed:
hf:NAME[,config=..][,split=train][,column=text][,skip=N][,take=N][,revision=..], NAME on the hub or a folder
"""


def add_saes(sub: argparse.ArgumentParser) -> None:
    """`--sae`."""
    sub.add_argument("--sae", nargs="+", metavar="DIR", help="SAE folders (default: the bundled ones)")


def add_mesh(sub: argparse.ArgumentParser) -> None:
    """`--mesh` of what runs a model with SAEs."""
    sub.add_argument(
        "--mesh",
        metavar="MESH",
        help="share the latents of each SAE among the processes that torchrun started, e.g. latent=8; each runs the LM",
    )


@contextlib.contextmanager
def on_mesh(arguments: argparse.Namespace) -> Iterator[OneDevice]:
    """The devices of the command: one, or those of `--mesh`, of which only the main process prints and writes."""
    from saehook.devices import ONE_DEVICE

    if arguments.mesh is None and int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield ONE_DEVICE
        return
    from saehook.distributed.session import session

    with session(arguments.mesh) as devices, contextlib.ExitStack() as stack:
        if not devices.is_main:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            arguments.json = None
        yield devices


def add_text(sub: argparse.ArgumentParser, what: str, tokens: str, *, preset: bool = True) -> None:
    """`--text` and `--tokens`; without `preset`, tokens that are not given are None."""
    sub.add_argument("--text", nargs="+", metavar="TEXT", help=f"{TEXT_HELP} {what}")
    default = count(tokens) if preset else None
    sub.add_argument(
        "--tokens", type=whole_number, default=default, metavar="N", help=f"tokens, e.g. 100k (default: {tokens})"
    )


def add_json(sub: argparse.ArgumentParser) -> None:
    """`--json`."""
    sub.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")


def add_program(sub: argparse.ArgumentParser) -> None:
    """The program file."""
    sub.add_argument("program", metavar="PROGRAM", help="a program file, or hf:owner/name[,revision=..]")


def whole_number(text: str) -> int:
    try:
        return count(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def load_lm(arguments: argparse.Namespace) -> HookedModel:
    return load_model(str(arguments.lm or bundled("lm")))


def load_model(name: str) -> HookedModel:
    """A folder, a hub id, or `hf:owner/name[,revision=..]`."""
    from transformers.utils import logging

    from saehook import hub
    from saehook.hooked_model import HookedModel

    logging.disable_progress_bar()
    if not hub.is_hub_name(name):
        if not Path(name).exists() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
            raise FileError(f"there is no language model at {name}. Name a folder, or owner/name on the hub.")
        return HookedModel.from_pretrained(name)
    place = hub.parse(name)
    return HookedModel.from_pretrained(place.repo, revision=place.revision or "main")


def sae_folders(arguments: argparse.Namespace) -> list[Path]:
    if arguments.sae:
        return [Path(folder) for folder in arguments.sae]
    if arguments.lm:
        raise ArgumentError("the bundled SAEs belong to the bundled model. Name the SAEs of this one with --sae DIR.")
    return [bundled("sae"), bundled("sae-mlp")]


def attach(arguments: argparse.Namespace, devices: OneDevice | None = None) -> tuple[HookedSAEs, dict[str, Path]]:
    """The model with the SAEs attached, and the folder of each by its name there; several may have one site. Several
    `devices` share the latents."""
    from saehook.checkpoint import load_sae

    mesh, load = getattr(devices, "mesh", None), load_sae
    if mesh is not None:
        from saehook.distributed.sharded_sae import load_sharded

        load = functools.partial(load_sharded, mesh=mesh)

    model = load_lm(arguments)
    by_site: dict[str, list[tuple[SAE, Path]]] = {}
    for folder in _only_saes(sae_folders(arguments)):
        sae = load(folder)
        if sae.site is None:
            raise ArgumentError(
                f"{folder} does not say which site it belongs to; attach it in Python with the site's name."
            )
        by_site.setdefault(sae.site, []).append((sae, folder))
    hooked = model.attach({site: [sae for sae, _ in found] for site, found in by_site.items()})
    folders = [folder for found in by_site.values() for _, folder in found]
    return hooked, dict(zip(hooked.sites, folders, strict=True))


def _only_saes(places: list[Path]) -> list[Path]:
    """Without what `saehook train` and `eval` write beside SAEs, so that `runs/a/*` means the SAEs of a run."""
    if not any((place / CONFIG).is_file() for place in places):
        return places
    beside = [place for place in places if place.suffix in BESIDE_SUFFIXES and place.is_file()]
    beside += [place for place in places if place.name in BESIDE_FOLDERS and not (place / CONFIG).exists()]
    if beside:
        print(f"note: left out {', '.join(map(str, beside))}: no SAEs.", file=sys.stderr)
    return [place for place in places if place not in beside]


def hooked_for(file: ProgramFile, lm: str | None, saes: list[str] | None) -> HookedSAEs:
    """The language model and SAEs of a program file, or those that are named here, attached.

    Raises:
        ArgumentError: a model is named, and no SAE. Those of loading and attaching.
    """
    from transformers.utils import logging

    from saehook import hub
    from saehook.checkpoint import load_sae
    from saehook.formats.repository import local_path
    from saehook.hooked_model import HookedModel

    logging.disable_progress_bar()
    if saes:
        folders = [Path(folder) for folder in saes]
    elif all(ref.repo for ref in file.saes):
        folders = []
        for ref in file.saes:
            if ref.path and Path(ref.path).name in ref.sha256:  # a file in the format of others, with what is beside it
                folders.append(local_path(f"{hub.PREFIX}{ref.repo}", ref.path, ref.revision))
                continue
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


def held_out_text(documents: Iterable[Document] | None, tokens: int, model: HookedModel) -> Windows:
    """Windows of the text, or of the held-out modules.

    Raises:
        ArgumentError: no token is asked for. Those of `tokenization.windows`.
    """
    if tokens < 1:
        raise ArgumentError(f"--tokens {tokens}: nothing can be measured on no text. At least 1 is expected.")
    from saehook import corpus
    from saehook.tokenization import window_size, windows

    if documents is None:
        documents = corpus.read_documents(corpus.held_out_files())
    found = windows(documents, model.tokenizer, window_size(model.context), max_tokens=tokens)
    if (dataset := found.dataset) is not None:
        print(
            f"note: of {dataset['name']} ({dataset['split']}) {found.documents:,} documents are used.", file=sys.stderr
        )
    return found


def documents_of_setting(settings: dict[str, Any], name: str) -> Sequence[Document] | DatasetText | None:
    """The documents of `text` or `eval_text`, None where it is not given. Of a dataset the settings then hold the commit or
    folder of today, for `--resume`."""
    from saehook.dataset_text import DatasetText, documents_of

    if settings.get(name) is None:
        return None
    documents = documents_of(settings[name])
    if isinstance(documents, DatasetText):
        settings[name] = [documents.spec]
    return documents


def note_other_text(hooked: HookedSAEs, text: Windows) -> None:
    """Say when the default text is not the one that the files' numbers come from."""
    for site, sae in hooked.saes.items():
        recorded = sae.metadata.get("evaluation", {}).get("text_sha256")
        if recorded and recorded != text.text_sha256:
            print(
                f"note: the SAE at {site} was evaluated on other text (sha256 {recorded[:12]}, here {text.text_sha256[:12]}); "
                "the standard library differs between Python versions.",
                file=sys.stderr,
            )


def write_json(path: Path | None, text: str) -> None:
    if path is not None:
        from saehook.files import atomic_write

        atomic_write(path, text + "\n")
