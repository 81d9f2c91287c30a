"""`saehook demo`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from saehook.bundle import bundled
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
    from saehook.evaluation import EvalResult
    from saehook.hooked_saes import HookedSAEs
    from saehook.tokenization import Windows

HELP = "serve the live page on the bundled SAEs, with what they lose"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `demo`."""
    add_saes(sub)
    add_text(sub, "to evaluate on (default: held-out modules of the standard library)", "8k")
    add_json(sub)
    sub.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    sub.add_argument("--port", type=int, default=7860, help="port to serve on (default: 7860)")
    sub.add_argument(
        "--mcp", action="store_true", help="offer the page's endpoints by MCP, too (pip install 'mcp>=1.21,<2')"
    )
    sub.add_argument(
        "--allow-uploads",
        action="store_true",
        help="let visitors attach an SAE of their own: cfg.json and .safetensors",
    )
    sub.add_argument("--no-serve", action="store_true", help="only evaluate")


def run(arguments: argparse.Namespace) -> None:
    """Serve the live page. First what is recorded of the SAEs is printed, and measured again while the page is up.

    saehook demo                 the bundled model and SAEs, page on http://127.0.0.1:7860
    saehook demo --no-serve      only the measurement
    """
    hooked, folders = attach(arguments)
    text = held_out_text(documents_of_setting(vars(arguments), "text"), arguments.tokens, hooked.model)
    if arguments.no_serve:
        measure(hooked, folders, text, arguments)
        return
    if (stored := recorded(hooked, folders)) is not None:
        print(f"recorded when the SAEs were made:\n{stored.table()}\n", flush=True)
    from saehook.app import serve

    print(f"serving on http://{arguments.host}:{arguments.port} - stop with Ctrl-C", flush=True)
    page = serve(
        hooked,
        host=arguments.host,
        port=arguments.port,
        sae_paths=folders,
        mcp=arguments.mcp,
        uploads=arguments.allow_uploads,
        block=False,
    )
    print("\nmeasured again here, while the page is up:", flush=True)
    measure(hooked, folders, text, arguments)
    page.block_thread()


def measure(hooked: HookedSAEs, folders: Mapping[str, Path], text: Windows, arguments: argparse.Namespace) -> None:
    """Splice every SAE into the model, and print the table."""
    from saehook.evaluation import evaluate

    if not arguments.text:
        note_other_text(hooked, text)
    result = evaluate(hooked, text, names={site: folder.name for site, folder in folders.items()})
    print(result.table(), flush=True)
    write_json(arguments.json, result.to_json())


def recorded(hooked: HookedSAEs, folders: Mapping[str, Path]) -> EvalResult | None:
    """What is stored: beside the bundled SAEs, where these are attached, else in the files of the SAEs; None if nothing is."""
    from saehook.evaluation import EvalResult, EvalRow

    if {folder.resolve() for folder in folders.values()} == {bundled("sae").resolve(), bundled("sae-mlp").resolve()}:
        stored = bundled("sae").with_name("eval.json")
        if stored.is_file():
            return EvalResult.from_json(stored.read_text(encoding="utf-8"))
    fields = dataclasses.fields(EvalRow)
    needed = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    rows = []
    for site, sae in hooked.saes.items():
        facts = sae.metadata.get("evaluation", {}) | {"sae": folders[site].name, "site": site}
        if needed <= set(facts):
            rows.append(EvalRow(**{f.name: facts[f.name] for f in fields if f.name in facts}))
    return EvalResult(rows) if rows else None
