"""`saehook sites`."""

from __future__ import annotations

import argparse
import dataclasses
import json

from saehook.commands.shared import add_json, load_lm, write_json

HELP = "list the places of a model where SAEs attach, with their widths"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `sites`."""
    sub.add_argument("pattern", nargs="?", help="only those, e.g. 'layers.*.resid_post'")
    add_json(sub)


def run(arguments: argparse.Namespace) -> None:
    """List the named places of a language model where SAEs attach.

    saehook sites
    saehook sites --lm DIR 'layers.*.resid_post'
    """
    found = load_lm(arguments).sites(arguments.pattern)
    for site in found:
        print(f"{site.name:24} {site.width or '?':>6}  {site.path}:{site.side}")
    write_json(arguments.json, json.dumps([dataclasses.asdict(site) for site in found], indent=1))
