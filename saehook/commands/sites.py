"""`saehook sites`."""

from __future__ import annotations

import argparse
import dataclasses
import json

from saehook.commands.shared import add_json, load_lm, write_json
from saehook.site_spellings import TOOLS

HELP = "list the places of a model where SAEs attach, with their widths"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `sites`."""
    sub.add_argument(
        "pattern",
        nargs="?",
        help="only those, e.g. 'layers.*.resid_post', also by another tool's name, e.g. blocks.8.hook_resid_pre",
    )
    sub.add_argument("--as", dest="tool", choices=TOOLS, help="also show what this tool calls each place")
    add_json(sub)


def run(arguments: argparse.Namespace) -> None:
    """List the named places of a language model where SAEs attach.

    saehook sites
    saehook sites --lm DIR 'layers.*.resid_post'
    saehook sites blocks.1.hook_mlp_out --as interp-engine
    """
    from saehook.sites import spelling

    model = load_lm(arguments)
    rows = []
    for site in model.sites(arguments.pattern):
        rows.append(dataclasses.asdict(site))
        line = f"{site.name:24} {site.width or '?':>6}  {site.path}:{site.side}"
        if arguments.tool:
            rows[-1][arguments.tool] = theirs = spelling(model.lm, site, arguments.tool)
            line = f"{line:72}  {theirs or '-'}"
        print(line)
    write_json(arguments.json, json.dumps(rows, indent=1))
