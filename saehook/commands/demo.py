"""`saehook demo`."""

from __future__ import annotations

import argparse

from saehook.commands import eval as eval_command
from saehook.commands.shared import add_json, add_saes, add_text

HELP = "evaluate the bundled SAEs, then serve the live page"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `demo`."""
    add_saes(sub)
    add_text(sub, "to evaluate on (default: held-out modules of the standard library)", "8k")
    add_json(sub)
    sub.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    sub.add_argument("--port", type=int, default=7860, help="port to serve on (default: 7860)")
    sub.add_argument("--no-serve", action="store_true", help="stop after the table")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate the SAEs by splicing them into the model, print the table, then serve the live page.

    saehook demo                 the bundled model and SAEs, page on http://127.0.0.1:7860
    saehook demo --no-serve      the table only
    """
    hooked, folders = eval_command.evaluated(arguments)
    if arguments.no_serve:
        return
    from saehook.app import serve

    print(f"\nserving on http://{arguments.host}:{arguments.port} - stop with Ctrl-C", flush=True)
    serve(hooked, host=arguments.host, port=arguments.port, sae_paths=folders)
