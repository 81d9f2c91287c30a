"""`saehook stats`."""

from __future__ import annotations

import argparse

from saehook.commands.shared import add_text, attach, documents_of_setting

HELP = "measure each latent's maximum and density, for strengths in units of the maximum"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `stats`."""
    sub.add_argument("sae", nargs="*", metavar="SAE", help="SAE folders (default: the bundled ones)")
    add_text(sub, "to measure on (default: Python source installed on this machine)", "100k")


def run(arguments: argparse.Namespace) -> None:
    """Measure each latent's maximum, density, mean and quantiles on text, and the mean error; store them beside the SAE.

    saehook stats SAE ... --text FILE --tokens 1M
    """
    from saehook import corpus
    from saehook.checkpoint import save_sae, stored_dtype
    from saehook.latent_stats import measure_stats
    from saehook.tokenization import window_size, windows

    hooked, folders = attach(arguments)
    documents = documents_of_setting(vars(arguments), "text")
    if documents is None:
        documents = corpus.read_documents(corpus.python_files())
    text = windows(documents, hooked.tokenizer, window_size(hooked.model.context), max_tokens=arguments.tokens)
    for site, measured in measure_stats(hooked, text).items():
        sae = hooked.saes[site]
        sae.stats = measured
        save_sae(sae, folders[site], dtype=stored_dtype(folders[site]))
        fired = int((measured.max_act > 0).sum())
        print(f"{folders[site]}: {fired:,} of {sae.d_sae:,} latents fired on {measured.tokens:,} tokens")
