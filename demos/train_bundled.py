"""Make checkpoints/sae and checkpoints/sae-mlp anew: train on the bundled model, put them there (`bundle.py`).

    python demos/train_bundled.py --text NOVELS [--tokens 5M]

One pass of the model over installed Python source and the novels (`.txt` files) trains both. The tables of the README follow
by `python demos/make_tables.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bundle import EVAL_TOKENS, bundle, held_out

import saehook
from saehook import BatchTopK, HookedModel, TopK, TrainConfig, corpus
from saehook.config import count
from saehook.corpus import Document
from saehook.training_run import train_saes

METHODS = {"sae": ("layers.2.resid_post", TopK(k=32), 1), "sae-mlp": ("layers.3.mlp_out", BatchTopK(k=32), 0)}
"""Site, method and seed; for `sae` the best of demos/compare_methods.py."""
PIECE_CHARS = 20_000


def documents(novels: Path) -> list[Document]:
    """Python source and novels, the novels in pieces."""
    texts = list(corpus.read_documents(corpus.python_files()))
    files = [file for file in sorted(novels.glob("*.txt")) if file.name != corpus.HELD_OUT_NOVEL]
    for novel in corpus.read_documents(files):
        pieces = range(0, len(novel.text), PIECE_CHARS)
        texts += [Document(f"{novel.name}:{i}", novel.text[i : i + PIECE_CHARS]) for i in pieces]
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with the novels")
    parser.add_argument("--tokens", type=count, default=count("5M"))
    parser.add_argument("--eval-tokens", type=count, default=EVAL_TOKENS)
    parser.add_argument("--run", type=Path, default=Path("runs/bundled"), help="log and working files")
    arguments = parser.parse_args()
    model = HookedModel.from_pretrained(saehook.bundled("lm"))
    d_sae = 16 * model.lm.config.hidden_size
    configs = [
        TrainConfig(site=site, activation=method, d_sae=d_sae, tokens=arguments.tokens, seed=seed)
        for site, method, seed in METHODS.values()
    ]
    text = held_out(model, arguments.eval_tokens)
    run = train_saes(model, configs, documents(arguments.text), arguments.run, held_out=text, dtype=torch.bfloat16)
    folders = {name: one.folder for name, one in zip(METHODS, run.saes, strict=True)}
    print(bundle(model, folders, text))


if __name__ == "__main__":
    main()
