"""`saehook info`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from saehook.bundle import bundled
from saehook.commands.shared import add_json, write_json

HELP = "say what an SAE file is, where it belongs, and whether it fits a model"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `info`."""
    sub.add_argument(
        "source", metavar="SRC", help="a folder or file in any format that is read, or owner/name on the hub"
    )
    sub.add_argument("sub", nargs="?", metavar="SUB", help="folder or file in it, where it holds several SAEs")
    add_json(sub)


def run(arguments: argparse.Namespace) -> int:
    """Say what a file is: format, rule, sizes, the language model and site that it was trained on; and whether it fits a
    language model, --lm or the bundled one where it was trained on that. Exit code 1 where it does not. No weights are read.

    saehook info runs/mine/layers.2.resid_post
    saehook info google/gemma-scope-2b-pt-res layer_12/width_16k/average_l0_82 --lm google/gemma-2-2b
    """
    from saehook.fit import misfits, skeleton
    from saehook.formats import identify

    found = identify(arguments.source, arguments.sub)
    config = found.config
    site = found.site if found.site == found.peer_site else f"{found.site} ({found.peer_site} there)"
    facts = {
        "file": found.path,
        "format": found.format,
        "activation": config.activation,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "d_out": config.d_out,
        "dtype": str(found.dtype).removeprefix("torch."),
        "site": site,
        "site_out": found.site_out,
        "lm": found.lm,
    }
    for name, value in facts.items():
        if value is not None:
            print(f"{name:12} {value}")
    for note in found.notes:
        print(f"note: {note}")
    lm, reasons = _model(arguments.lm, found.lm), None
    if lm is not None:
        reasons = misfits(found, skeleton(lm))
        print(f"{'fits':12} {'yes' if not reasons else 'no'}, {Path(lm).name if Path(lm).exists() else lm}")
        for reason in reasons:
            print(f"  {reason}")
    else:
        print(f"{'fits':12} not tried: name a model with --lm")
    data = {name: None if value is None else str(value) for name, value in facts.items()}
    data |= {name: getattr(config, name) for name in ("d_in", "d_sae", "d_out")}
    data |= {"site": found.site, "peer_site": found.peer_site, "notes": list(found.notes), "misfits": reasons}
    write_json(arguments.json, json.dumps(data, indent=1))
    return 1 if reasons else 0


def _model(asked: str | None, recorded: str | None) -> str | None:
    """The model that is asked for, or the bundled one where the SAE was trained on that."""
    if asked is not None:
        return asked
    if recorded == bundled("lm").name:
        return str(bundled("lm"))
    return None
