"""`saehook push`."""

from __future__ import annotations

import argparse

HELP = "publish SAEs on the Hugging Face Hub, with a card"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `push`."""
    sub.add_argument("repo", metavar="OWNER/NAME", help="a model repository; it is made where it does not exist")
    sub.add_argument("sae", nargs="+", metavar="SAE", help="SAE folders")
    sub.add_argument("--licence", required=True, metavar="ID", help="of the weights, as the hub spells it, e.g. mit")
    sub.add_argument("--private", action="store_true", help="make the repository private")


def run(arguments: argparse.Namespace) -> None:
    """Write SAEs into a model repository as one commit, a folder each, with a card: facts, evaluation, how to use them. The
    account is that of `hf auth login`, or of the variable HF_TOKEN.

    saehook push me/my-saes runs/mine/layers.2.resid_post --licence mit
    """
    from saehook.checkpoint import load_sae, stored_dtype
    from saehook.model_card import push_to_hub

    dtypes = {stored_dtype(folder) for folder in arguments.sae}
    saes = [load_sae(folder) for folder in arguments.sae]
    place = push_to_hub(
        saes,
        arguments.repo,
        licence=arguments.licence,
        private=arguments.private,
        dtype=dtypes.pop() if len(dtypes) == 1 else None,
    )
    print(f"pushed {len(saes)} to {place.name}")
