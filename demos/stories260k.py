"""A model and text that others made: train SAEs on a published 260,032-parameter Llama, evaluate, write, read back, steer.

    python demos/stories260k.py --lm stories260K --text train.jsonl --eval-text valid.txt
        [--tokens 1M] [--saelens PYTHON] [--out runs/stories260k] [--report demos/STORIES260K.md]

The model is tinyllamas/stories260K in Hugging Face's layout, the text TinyStories: a .jsonl of {"text": ...} to train on, and
held-out stories as plain text, cut where one begins with "Once upon a time". `--saelens` names the Python of an environment
with sae-lens: then it opens the files, too. What comes out is a table of numbers; no text or weight is kept in the repository.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import saehook
from saehook import BatchTopK, HookedModel, JumpReLU, TopK, TrainConfig, generation, steer
from saehook.config import count
from saehook.corpus import Document
from saehook.files import atomic_write
from saehook.tokenization import Windows, window_size, windows
from saehook.training_run import TrainedSAE, train_saes

SITE = "layers.2.resid_post"
METHODS = {"BatchTopK": BatchTopK(k=16), "TopK": TopK(k=16), "JumpReLU": JumpReLU()}
D_SAE, TARGET_L0, SEED = 1024, 16, 0
WORDS = ("cat", "ball", "tree", "rain", "mom", "cake")
"""Each is looked for among the latents, and then written into stories by steering the latent that is most about it."""
PROMPT = "Once upon a time, there was a little girl named Lily. One day,"
STRENGTHS = (0.25, 0.5, 1.0)
"""Times the norm of the activation."""
ROWS, NEW_TOKENS, TEMPERATURE = 32, 60, 0.8

READ_BACK = """
import sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
import torch
sae = SAE.load_from_disk(sys.argv[1])
with torch.no_grad():
    x = load_file(sys.argv[2])["x"]
    save_file({"acts": sae.encode(x).contiguous(), "x_hat": sae(x).contiguous()}, sys.argv[3])
"""


def stories(path: Path) -> list[Document]:
    """The stories of a file, paragraphs ended by one newline, as the model was trained."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        found = [json.loads(line)["text"] for line in text.splitlines() if line]
    else:
        found = re.split(r"\n\n(?=Once upon a time)", text)
    found = [re.sub(r"\s*\n\s*", "\n", story).strip() for story in found]
    return [Document(f"{path.name}:{i}", story) for i, story in enumerate(found) if story]


def configs(tokens: int) -> list[TrainConfig]:
    """One SAE of each method, all on the same activations."""
    return [
        TrainConfig(
            site=SITE,
            activation=activation,
            d_sae=D_SAE,
            tokens=tokens,
            seed=SEED,
            target_l0=TARGET_L0 if isinstance(activation, JumpReLU) else None,
        )
        for activation in METHODS.values()
    ]


def clean_loss(model: HookedModel, texts: list[Document]) -> tuple[float, int]:
    """Nats per token, BOS before each story and no other context, and the tokens."""
    nats = tokens = 0
    for text in texts:
        ids = model.tokenizer(text.text, verbose=False)["input_ids"][: model.context]
        if len(ids) > 1:
            nats += model.loss(ids) * (len(ids) - 1)
            tokens += len(ids) - 1
    return nats / tokens, tokens


def read_by_saelens(model: HookedModel, one: TrainedSAE, held_out: Windows, python: str) -> dict[str, float]:
    """Largest difference between sae-lens' latents and reconstructions and ours, relative to the largest value."""
    x = model.activations(held_out.ids[:8], SITE)[SITE].flatten(0, 1)
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "x.safetensors", Path(folder) / "found.safetensors"
        save_file({"x": x.contiguous()}, given)
        subprocess.run([python, "-c", READ_BACK, one.folder, given, found], check=True)
        theirs = load_file(found)
    with torch.no_grad():
        ours = saehook.load_sae(one.folder)(x)
    pairs = {"latents": (theirs["acts"], ours.acts), "reconstruction": (theirs["x_hat"], ours.x_hat)}
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def latent_about(acts: torch.Tensor, at: torch.Tensor) -> tuple[int, float]:
    """The latent with the largest share of its activation on the tokens `at`, among those that fire on half of them."""
    often = (acts[at] > 0).float().mean(0) >= 0.5
    share = torch.where(often, acts[at].sum(0) / acts.sum(0).clamp_min(1e-9), 0.0)
    return int(share.argmax()), float(share.max())


def ends_of(word: str, ids: torch.Tensor, tokenizer: object) -> torch.Tensor:
    """[n, length], True at the last token of each occurrence of a word."""
    pattern = re.compile(rf"\b{word}\b")
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, window in enumerate(ids.tolist()):
        pieces = [tokenizer.decode(window[: i + 1]) for i in range(len(window))]  # type: ignore[attr-defined]
        for match in pattern.finditer(pieces[-1]):
            mask[row, next(i for i, piece in enumerate(pieces) if len(piece) >= match.end())] = True
    return mask


def steering(model: HookedModel, one: TrainedSAE, text: Windows) -> list[list[str]]:
    """For each word: its latent, and the share of stories with the word, unedited and steered."""
    hooked = model.attach(saehook.load_sae(one.folder))
    ids = text.ids[:60]
    acts = torch.cat([found.acts for found in hooked.latents(ids)])
    rows = []
    for word in WORDS:
        at = ends_of(word, ids, model.tokenizer).flatten()
        if at.sum() < 3:
            continue
        latent, share = latent_about(acts, at)

        def told(edits: list[saehook.Edit], word: str = word) -> float:
            found = hooked.generate(
                [PROMPT] * ROWS, edits, seed=SEED, do_sample=True, temperature=TEMPERATURE, max_new_tokens=NEW_TOKENS
            )
            return sum(word in generation.text for generation in found) / ROWS

        edits = [[]] + [[steer(latent, strength, unit="norm", where=generation())] for strength in STRENGTHS]
        rows.append([word, str(latent), f"{share:.0%}", *(f"{told(edit):.0%}" for edit in edits)])
    hooked.detach()
    return rows


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", type=Path, required=True, help="folder of the model")
    parser.add_argument("--text", type=Path, required=True, help="stories to train on")
    parser.add_argument("--eval-text", type=Path, required=True, help="held-out stories")
    parser.add_argument("--tokens", type=count, default=count("1M"))
    parser.add_argument("--saelens", metavar="PYTHON", help="Python of an environment with sae-lens")
    parser.add_argument("--out", type=Path, default=Path("runs/stories260k"))
    parser.add_argument("--report", type=Path, help="write the tables here")
    arguments = parser.parse_args()
    model = HookedModel.from_pretrained(arguments.lm)
    train, held = stories(arguments.text), stories(arguments.eval_text)
    loss, loss_tokens = clean_loss(model, held)
    held_out = windows(held, model.tokenizer, window_size(model.context), max_tokens=count("50k"))
    run = train_saes(model, configs(arguments.tokens), train, arguments.out, held_out=held_out, repeat=True)
    assert run.evaluation is not None
    rows = []
    for name, one, row in zip(METHODS, run.saes, run.evaluation.results, strict=False):
        numbers = [row.ce_clean, row.ce_spliced, row.delta_ce, row.ce_recovered_zero, row.ce_recovered_mean, row.fvu]
        line = [name, *(f"{number:.3f}" for number in numbers), f"{row.l0:.1f}", f"{row.dead_share:.1%}"]
        if arguments.saelens:
            apart = read_by_saelens(model, one, held_out, arguments.saelens)
            line += [f"{apart['latents']:.0e}", f"{apart['reconstruction']:.0e}"]
        rows.append(line)
    head = ["method", "loss clean", "spliced", "delta", "recovered (zero)", "(mean)", "FVU", "L0", "dead"]
    head += ["latents", "reconstruction"] * bool(arguments.saelens)
    text = windows(train, model.tokenizer, window_size(model.context), max_tokens=count("50k"))
    apart_note = (
        "The last two columns: the largest difference between what sae-lens makes of the files and what we make of them, as a\n"
        "share of the largest value."
    )
    steered = steering(model, run.saes[0], text)
    report = f"""# stories260K: SAEs on a model that others made

Made by `demos/stories260k.py`; generated file.

A published Llama of 260,032 parameters (5 layers, width 64, 512 tokens; MIT), trained by others on TinyStories
(CDLA-Sharing-1.0). Its loss on the held-out stories, one BOS before each: {loss:.3f} nats per token ({loss_tokens:,} tokens).

## SAEs

{D_SAE:,} latents on `{SITE}`, {arguments.tokens:,} tokens of {len(train):,} stories, read again and again; k, or the L0
aimed at, {TARGET_L0}. Measured on the stored files: {held_out.ids.numel():,} tokens of held-out stories in windows of
{held_out.ids.shape[1]}. {apart_note if arguments.saelens else ""}

{table(head, rows)}

## Steering

The latent of the {next(iter(METHODS))} SAE with the largest share of its activation on the last token of a word, added to every
generated token with so many times the norm of the activation. Of {ROWS} stories ({NEW_TOKENS} tokens, temperature
{TEMPERATURE}, the same sampling noise), the share that has the word.

{table(["word", "latent", "share on the word", "unedited", *(f"{s:g} × norm" for s in STRENGTHS)], steered)}
"""
    print(report)
    if arguments.report is not None:
        atomic_write(arguments.report, report)


if __name__ == "__main__":
    main()
