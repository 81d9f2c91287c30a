"""`saehook convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "read an SAE in any format and write it in ours, or another tool's"
LAYOUTS = ("saehook", "dictionary_learning", "sparsify")


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `convert`."""
    sub.add_argument(
        "source", metavar="SRC", help="a folder or file in any format that is read, or owner/name on the hub"
    )
    sub.add_argument(
        "destination", type=Path, metavar="DST", help="a folder; files of the same names there are replaced"
    )
    sub.add_argument("--sub", metavar="SUB", help="folder or file in SRC, where it holds several SAEs")
    sub.add_argument(
        "--site", metavar="SITE", help="where it belongs, if SRC does not say so, also by another tool's name"
    )
    sub.add_argument("--to", choices=LAYOUTS, default="saehook", help="layout (default: saehook, which SAELens opens)")
    sub.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights (default: float32)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write an SAE in another layout: the same latents and reconstructions. What the layout has no place for is refused.

    saehook convert google/gemma-scope-2b-pt-res DST --sub layer_12/width_16k/average_l0_82
    saehook convert path/to/trainer_0/ae.pt DST
    saehook convert runs/mine/layers.2.resid_post layers.2 --to sparsify
    """
    import torch

    from saehook.checkpoint import load_sae
    from saehook.writers import write_sae

    sae = load_sae(arguments.source, arguments.sub, dtype=getattr(torch, arguments.dtype))
    if arguments.site is not None:
        sae.site = arguments.site
    print(f"wrote {write_sae(sae, arguments.destination, arguments.to)}: {sae.extra_repr()}")
