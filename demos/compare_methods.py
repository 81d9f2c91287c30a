"""ReLU + L1, TopK, BatchTopK and JumpReLU at matched L0 on the bundled model: train, evaluate the stored files, keep the rows.

    python demos/compare_methods.py --text NOVELS [--unseen FILE ...] [--tokens 5M] [--k 32] [--seeds 3] [--run runs/methods]
        --json FILE

One pass of the model over installed Python source and the novels feeds all of them; ReLU and JumpReLU are steered to L0 = k by
the target-L0 controller. Stopped by Ctrl-C or a signal, the same command goes on. Dead latents are counted on the last
training tokens and on held-out text: the standard-library modules and the novel that nothing was trained on, and other files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from train_bundled import documents

import saehook
from saehook import SAE, HookedModel, corpus
from saehook.config import count
from saehook.metrics import Firing
from saehook.sweep import expand
from saehook.tokenization import Windows, is_outlier, keep_mask, special_ids, window_size, windows
from saehook.training_run import CHECKPOINTS, TrainedSAE, train_saes

METHODS = ["relu", "topk", "batchtopk", "jumprelu"]
EVAL_TOKENS = 100_000
DEAD_TOKENS = 1_000_000
ROWS = 16


def unseen_text(model: HookedModel, files: Iterable[Path], window: int) -> Windows:
    """As many tokens as dead latents are counted on, where the files have them."""
    return windows(corpus.read_documents(files), model.tokenizer, window, max_tokens=DEAD_TOKENS)


@torch.no_grad()
def silent_shares(model: HookedModel, saes: Iterable[SAE], site: str, text: Windows) -> tuple[list[float], int]:
    """Share of each SAE's latents that fire on no token of the text's mask, and the number of those tokens."""
    firing = [(sae, Firing()) for sae in saes]
    for ids in tqdm(text.ids.split(ROWS), desc="dead latents", unit="batch"):
        x = model.activations(ids, site)[site].float()
        keep = keep_mask(ids, None, special_ids(model.tokenizer))
        for sae, fired in firing:
            outlier = is_outlier(torch.linalg.vector_norm(x, dim=-1), sae.mask_rule)
            fired.update(sae.encode(x[keep & ~outlier]))
    return [fired.dead_share for _, fired in firing], firing[0][1].tokens


def row(one: TrainedSAE, measured: Any, silent: float, silent_tokens: int) -> dict[str, Any]:
    """What is kept of one SAE."""
    training, end = one.sae.metadata["training"], one.sae.metadata["dead_at_the_end"]
    names = ("l0", "fvu", "delta_ce", "kl", "ce_recovered_zero", "tokens")
    return {
        "method": training["activation"]["name"],
        "seed": training["seed"],
        "training_tokens": training["tokens"],
        **{name: getattr(measured, name) for name in names},
        "dead_in_training": end["share"],
        "dead_in_training_tokens": end["tokens"],
        "dead_held_out": silent,
        "dead_held_out_tokens": silent_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with the novels")
    parser.add_argument("--site", default="layers.2.resid_post")
    parser.add_argument("--tokens", type=count, default=count("5M"))
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", type=Path, default=Path("runs/methods"), help="SAEs, log and working files")
    parser.add_argument("--unseen", type=Path, nargs="*", default=[], help="more text files to count dead latents on")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    model = HookedModel.from_pretrained(saehook.bundled("lm"))
    settings = {
        "site": options.site,
        "activation": METHODS,
        "k": options.k,
        "tokens": options.tokens,
        "seed": list(range(options.seeds)),
    }
    configs = expand(
        settings, lambda name: [site.name for site in model.sites(name)], lambda name: model.width(model.sites(name)[0])
    )
    window = window_size(model.context)
    held_out_files = corpus.held_out_files()
    held_out = windows(corpus.read_documents(held_out_files), model.tokenizer, window, max_tokens=EVAL_TOKENS)
    novel = options.text / corpus.HELD_OUT_NOVEL
    unseen = unseen_text(model, [*held_out_files, novel, *options.unseen], window)
    run = train_saes(
        model,
        configs,
        documents(options.text),
        options.run,
        held_out=held_out,
        dtype=torch.bfloat16,
        resume=(options.run / CHECKPOINTS).exists(),
    )
    assert run.evaluation is not None
    silent, n_silent = silent_shares(model, [one.sae for one in run.saes], options.site, unseen)
    measured = {result.sae: result for result in run.evaluation.results}
    rows = [row(one, measured[one.folder.name], share, n_silent) for one, share in zip(run.saes, silent, strict=True)]
    machine = {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
    text = json.dumps({"site": options.site, "k": options.k, "machine": machine, "rows": rows}, indent=1)
    options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
