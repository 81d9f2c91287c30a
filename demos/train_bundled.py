"""Make checkpoints/sae and checkpoints/sae-mlp anew: train on the bundled model, evaluate the stored files, write cards.

    python demos/train_bundled.py --text NOVELS [--tokens 5M]

One pass of the model over installed Python source and the novels (`.txt` files) trains both. The tables of the README follow
by `python demos/make_tables.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

import saehook
from saehook import BatchTopK, HookedModel, TrainConfig, corpus
from saehook.config import count
from saehook.corpus import Document
from saehook.tokenization import window_size, windows
from saehook.training_run import train_saes

SITES = {"sae": "layers.2.resid_post", "sae-mlp": "layers.3.mlp_out"}
EVAL_TOKENS = 100_000
PIECE_CHARS = 20_000
CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"

CARD = """# {name}: {d_sae:,} latents on `{site}` of the bundled language model

BatchTopK, k = {k}, stored in bf16 (threshold float32). Made by `demos/train_bundled.py`; generated file, computed from the
stored weights.

- {tokens_trained:,} tokens of installed Python source and public-domain novels, without the held-out modules and novel.
- Threshold {threshold:.4g}: mean L0 {l0:.1f} on {eval_tokens:,} tokens of the held-out modules.

| loss clean | spliced | zero | mean | delta | KL | recovered (zero) | recovered (mean) | FVU | L0 | dead |
|---|---|---|---|---|---|---|---|---|---|---|
| {ce_clean:.3f} | {ce_spliced:.3f} | {ce_zero:.3f} | {ce_mean:.3f} | {delta_ce:.3f} | {kl:.3f} | {ce_recovered_zero:.3f} | \
{ce_recovered_mean:.3f} | {fvu:.3f} | {l0:.1f} | {dead_share:.1%} |
"""


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
    width = model.lm.config.hidden_size
    configs = [
        TrainConfig(site=site, activation=BatchTopK(k=32), d_sae=16 * width, tokens=arguments.tokens)
        for site in SITES.values()
    ]
    window = window_size(model.context)
    held_out = windows(
        corpus.read_documents(corpus.held_out_files()), model.tokenizer, window, max_tokens=arguments.eval_tokens
    )
    run = train_saes(model, configs, documents(arguments.text), arguments.run, held_out=held_out, dtype=torch.bfloat16)
    assert run.evaluation is not None
    for (name, site), one in zip(SITES.items(), run.saes, strict=True):
        folder = CHECKPOINTS / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(one.folder, folder)
        row = next(row for row in run.evaluation.results if row.site == site)
        assert one.sae.threshold is not None
        facts = vars(row) | {
            "name": name,
            "k": 32,
            "d_sae": one.sae.d_sae,
            "threshold": float(one.sae.threshold.detach()[0]),
            "tokens_trained": arguments.tokens,
            "eval_tokens": row.tokens,
        }
        (folder / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    result = json.loads(run.evaluation.to_json())
    for row in result["results"]:
        row["sae"] = next((name for name, site in SITES.items() if site == row["site"]), row["sae"])
    (CHECKPOINTS / "eval.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(run.evaluation.table())


if __name__ == "__main__":
    main()
