"""Train the language model of checkpoints/lm: byte-level BPE tokenizer and a small Llama, on Python source and novels.

    python demos/train_lm.py --text NOVELS --run-dir runs/lm --tokens 400M --out checkpoints/lm    # from nothing
    python demos/train_lm.py --text NOVELS --run-dir runs/lm --tokens 40M --init checkpoints/lm    # go on from a model
    python demos/train_lm.py --run-dir runs/lm --tokens 45M --decay-tokens 5M --resume --out ...   # and from a stopped run
    torchrun --nproc-per-node 2 demos/train_lm.py ...    # data-parallel: on 2 CPU cores 2 x the speed of one thread

The Python source is what is installed on the machine (`saehook.corpus`), the novels are the `.txt` files of --text.
Held-out modules and the held-out novel are never trained on. Ctrl-C and SIGTERM finish the step, save, and say where.
Needs torch, transformers and tokenizers only. On an accelerator: bf16, compiled, larger batches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from saehook import corpus  # noqa: E402  (runs where saehook is not installed)

PYTHON_SHARE = 9 / 16
PIECE_CHARS = 20_000
"""Novels are cut into documents of this many characters."""
PROMPTS = ("def load(path):\n", "class Stack:\n    def __init__(self", "She looked out of the window")
EVAL_TOKENS = 98_304
EVAL_WINDOW = 256


def count(text: str) -> int:
    """`600k`, `5M`, `1.5B`, `2**24` as an integer (powers of ten)."""
    text = text.strip().replace("_", "")
    if "**" in text:
        base, exponent = text.split("**")
        return int(base) ** int(exponent)
    scale = {"k": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}.get(text[-1])
    return round(float(text[:-1]) * scale) if scale else int(text)


def training_documents(novels: Path) -> dict[str, list[str]]:
    """Texts to train on, by kind."""
    prose = []
    for file in sorted(novels.glob("*.txt")):
        if file.name != corpus.HELD_OUT_NOVEL:
            text = file.read_text(encoding="utf-8", errors="replace")
            prose += [text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)]
    return {"python": [d.text for d in corpus.read_documents(corpus.python_files())], "prose": prose}


def train_tokenizer(documents: dict[str, list[str]], vocab: int):
    """Byte-level BPE of `vocab` tokens; `<|endoftext|>` has id 0 and is bos, eos and pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    # Every fifth document is plenty for a few thousand merges.
    tokenizer.train_from_iterator((d for kind in documents.values() for d in kind[::5]), trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def new_model(vocab: int, width: int, layers: int, context: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=-(-width * 11 // 4 // 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def tokenise(documents: list[str], tokenizer, file: Path) -> np.ndarray:
    """One stream of ids, each document after `<|endoftext|>`; kept in `file` so that a resumed run reads the same."""
    parts = []
    for i in range(0, len(documents), 512):
        for encoding in tokenizer._tokenizer.encode_batch(documents[i : i + 512], add_special_tokens=False):
            parts.append(np.array([tokenizer.bos_token_id, *encoding.ids], dtype=np.uint16))
        print(f"\rtokenising {file.stem}: {i + 512:,} of {len(documents):,} documents", end="", file=sys.stderr)
    print(file=sys.stderr)
    stream = np.concatenate(parts)
    partial = file.with_suffix(".part")
    stream.tofile(partial)
    os.replace(partial, file)
    return stream


class Windows:
    """Random windows of a stream without replacement: BOS and `size - 1` tokens. Position and order are resumable."""

    def __init__(self, stream: np.ndarray, size: int, seed: int):
        self.stream, self.size, self.seed = stream, size, seed
        self.n = len(stream) // (size - 1)
        self.served = 0

    def take(self, n: int) -> torch.Tensor:
        rows = []
        for i in range(self.served, self.served + n):
            epoch, index = divmod(i, self.n)
            if index == 0 or not hasattr(self, "order"):
                self.order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
            start = int(self.order[index]) * (self.size - 1)
            rows.append(np.concatenate([[0], self.stream[start : start + self.size - 1]]))
        self.served += n
        return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def held_out_loss(model, tokenizer, text: str, device: str) -> dict[str, float]:
    """Loss in nats per token and in bits per byte on the first `EVAL_TOKENS` tokens, windows of 256 that start with BOS."""
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = min(len(ids), EVAL_TOKENS) // (EVAL_WINDOW - 1)
    body = torch.from_numpy(ids[: rows * (EVAL_WINDOW - 1)].reshape(rows, -1))
    windows = torch.cat([torch.zeros(rows, 1, dtype=torch.long), body], dim=1)
    model.eval()
    total = 0.0
    for batch in windows.split(16):
        batch = batch.to(device)
        logits = model(batch).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    model.train()
    n_bytes = len(tokenizer.decode(body.flatten().tolist()).encode())
    return {"nats_per_token": total / body.numel(), "bits_per_byte": total / n_bytes / math.log(2)}


def evaluate(model, tokenizer, novels: Path, device: str) -> dict[str, dict[str, float]]:
    python = "\n".join(d.text for d in corpus.read_documents(corpus.held_out_files()))
    novel = (novels / corpus.HELD_OUT_NOVEL).read_text(encoding="utf-8", errors="replace")
    return {
        "python": held_out_loss(model, tokenizer, python, device),
        "prose": held_out_loss(model, tokenizer, novel, device),
    }


@torch.no_grad()
def samples(model, tokenizer, device: str) -> list[str]:
    texts = []
    model.eval()
    for i, prompt in enumerate(PROMPTS):
        torch.manual_seed(i)
        ids = torch.tensor([[0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]], device=device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=96, do_sample=True, temperature=0.7
        )
        texts.append(tokenizer.decode(out[0, 1:], skip_special_tokens=True))
    model.train()
    return texts


CARD = """# The language model of saehook

`LlamaForCausalLM`, {parameters:,} parameters: width {width}, {layers} layers, {heads} heads, vocabulary {vocab}
(byte-level BPE), tied embeddings, context {context}, bf16. `<|endoftext|>` (id 0) begins every document and is bos, eos
and pad; the tokenizer does not add it by itself. It exists so that installation, tests and demo need no download.

Made by `demos/train_lm.py`. Generated file: the numbers below are what that script measured on the stored weights.

## Data

- Python source installed on the machine that trained it: the standard library and {packages}
  ({python_tokens:,} tokens once each; files of 400 B to 200 kB, without exact duplicates).
- {n_novels} English novels, 1839-1929, in the public domain ({prose_tokens:,} tokens).
- Held out: the standard-library modules {modules}, and the novel {novel}.

## Training

{history}

## Loss on held-out text (first {eval_tokens:,} tokens of each, windows of {eval_window} that start with `<|endoftext|>`)

| text | nats per token | bits per byte |
|---|---|---|
| standard-library modules (Python {python_version}) | {python[nats_per_token]:.3f} | {python[bits_per_byte]:.3f} |
| novel | {prose[nats_per_token]:.3f} | {prose[bits_per_byte]:.3f} |

## Three samples (temperature 0.7, seeds 0, 1, 2, unedited)

{samples}
"""


def export(model, tokenizer, out: Path, facts: dict) -> None:
    """Write bf16 safetensors in shards under 15 MB, the tokenizer and the model card; measure on the stored weights."""
    from transformers import AutoModelForCausalLM

    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("model*.safetensors*"):
        stale.unlink()
    bare = getattr(model, "_orig_mod", model)
    copy = type(bare)(bare.config)
    copy.load_state_dict(bare.state_dict())
    copy.to("cpu", torch.bfloat16).save_pretrained(out, max_shard_size="14MB")
    tokenizer.save_pretrained(out)
    device = facts["device"]
    stored = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(device)
    losses = evaluate(stored, tokenizer, facts["novels"], device)
    config = stored.config
    card = CARD.format(
        parameters=stored.num_parameters(),
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        packages=" ".join(corpus.PACKAGES),
        python_tokens=facts["python_tokens"],
        prose_tokens=facts["prose_tokens"],
        n_novels=facts["n_novels"],
        modules=" ".join(corpus.HELD_OUT_MODULES),
        novel=corpus.HELD_OUT_NOVEL,
        history="\n".join(f"- {line}" for line in facts["history"]),
        eval_tokens=EVAL_TOKENS,
        eval_window=EVAL_WINDOW,
        python_version=".".join(map(str, sys.version_info[:3])),
        samples="\n\n".join(f"```\n{text}\n```" for text in samples(stored, tokenizer, device)),
        **losses,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "training.json").write_text(json.dumps({"history": facts["history"], "held_out": losses}, indent=1) + "\n")
    print(f"wrote {out}: {losses}", file=sys.stderr)


def average_gradients(parameters: list[torch.Tensor], loss: torch.Tensor) -> None:
    """Mean over the processes of all gradients and of the loss, in place."""
    tensors = [p.grad for p in parameters if p.grad is not None] + [loss]
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, required=True, help="folder with the novels (.txt)")
    p.add_argument(
        "--run-dir", dest="run", type=Path, default=Path("runs/lm"), help="folder for tokens, state and log.jsonl"
    )
    p.add_argument("--out", type=Path, help="write the finished model here (weights, tokenizer, card)")
    p.add_argument("--init", type=Path, help="start from this model and its tokenizer")
    p.add_argument("--resume", action="store_true", help="go on from the state in --run-dir")
    p.add_argument(
        "--tokens", type=count, default=count("40M"), help="tokens to train on, those before --resume counted"
    )
    p.add_argument(
        "--decay-tokens", type=count, default=None, help="linear decay over the last N (default: 40 %% of --tokens)"
    )
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--warmup-steps", type=int, default=100)
    p.add_argument("--batch", type=int, help="windows a step, of all processes (8 on CPU, 64 on an accelerator)")
    p.add_argument("--window", type=int, default=512)
    p.add_argument("--micro-batch", type=int, help="windows a backward pass (2 on CPU, all on an accelerator)")
    p.add_argument("--vocab", type=int, default=4096)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--eval-every", type=count, default=count("2M"), help="tokens between held-out losses")
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


def main() -> None:
    a = parse()
    cuda = torch.cuda.is_available()
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    a.batch = a.batch or (64 if cuda else 8)
    a.micro_batch = a.micro_batch or (a.batch if cuda else 2)
    if a.batch % world:
        raise SystemExit(f"--batch {a.batch} cannot be shared out to {world} processes")
    decay_tokens = a.decay_tokens if a.decay_tokens is not None else round(0.4 * a.tokens)
    a.run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(a.seed)
    torch.set_float32_matmul_precision("high")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    streams = {kind: a.run / f"{kind}.bin" for kind in ("python", "prose")}
    fresh = not all(f.exists() for f in streams.values()) or not (a.run / "tokenizer.json").exists()
    if fresh and world > 1:
        raise SystemExit(f"{a.run} holds no tokenised text yet; make it with one process first (--tokens 0)")
    documents = training_documents(a.text) if fresh else {}
    if a.init:
        tokenizer = AutoTokenizer.from_pretrained(a.init)
    elif fresh:
        tokenizer = train_tokenizer(documents, a.vocab)
    else:
        tokenizer = AutoTokenizer.from_pretrained(a.run)
    if fresh:
        for kind, file in streams.items():
            tokenise(documents[kind], tokenizer, file)
        tokenizer.save_pretrained(a.run)
    data = {
        kind: Windows(np.fromfile(file, dtype=np.uint16), a.window, a.seed + i)
        for i, (kind, file) in enumerate(streams.items())
    }
    history: list[str] = []
    if a.init:
        model: Any = AutoModelForCausalLM.from_pretrained(a.init, dtype=torch.float32)
        notes = a.init / "training.json"
        history = json.loads(notes.read_text())["history"] if notes.exists() else [f"started from {a.init.name}"]
    else:
        model = new_model(len(tokenizer), a.width, a.layers, max(512, a.window))
    model = model.to(device).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=a.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    step, tokens = 0, 0
    state_file = a.run / "state.pt"
    if a.resume:
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, tokens, history = state["step"], state["tokens"], state["history"]
        for kind, windows in data.items():
            windows.served = state["served"][kind]
    start_tokens = tokens

    def save() -> None:
        if rank:
            return
        partial = state_file.with_suffix(".part")
        torch.save(
            {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step,
                "tokens": tokens,
                "history": history,
                "served": {kind: windows.served for kind, windows in data.items()},
            },
            partial,
        )
        os.replace(partial, state_file)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    forward = loss_of if a.no_compile else torch.compile(loss_of)
    parameters = list(model.parameters())
    stop = False

    def on_signal(*_: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    n_python = round(a.batch * PYTHON_SHARE)
    log = (a.run / "log.jsonl").open("a", buffering=1)
    began, next_eval, next_save = time.monotonic(), tokens + a.eval_every, time.monotonic() + 300
    while tokens < a.tokens:
        if world > 1:  # a signal reaches the processes at different steps; they must stop after the same one
            flag = torch.tensor(float(stop), device=device)
            dist.all_reduce(flag)
            stop = bool(flag.item())
        if stop:
            break
        lr = a.lr * min(1.0, (step + 1) / a.warmup_steps, (a.tokens - tokens) / max(1, decay_tokens))
        for group in optimiser.param_groups:
            group["lr"] = lr
        batch = torch.cat([data["python"].take(n_python), data["prose"].take(a.batch - n_python)]).to(device)
        batch = batch[torch.randperm(len(batch), generator=torch.Generator().manual_seed(step)).to(device)]
        step_tokens = batch.numel()
        batch = batch[rank::world]
        parts = batch.split(a.micro_batch)
        loss = torch.zeros((), device=device)
        for part in parts:
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
                part_loss = forward(part) * (len(part) / len(batch))
            part_loss.backward()
            loss += part_loss.detach()
        if world > 1:
            average_gradients(parameters, loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        tokens += step_tokens
        if rank == 0 and (step % 10 == 0 or tokens >= a.tokens):
            seconds = time.monotonic() - began
            rate = (tokens - start_tokens) / seconds
            line = {
                "step": step,
                "tokens": tokens,
                "loss": round(loss.item(), 4),
                "lr": lr,
                "tokens_per_second": round(rate),
            }
            log.write(json.dumps(line) + "\n")
            left = (a.tokens - tokens) / rate / 60
            print(
                f"\r{tokens / 1e6:8.2f}M of {a.tokens / 1e6:.0f}M tokens  {rate:,.0f} tok/s  loss {line['loss']:.3f}  "
                f"lr {lr:.1e}  {left:.0f} min left ",
                end="",
                file=sys.stderr,
                flush=True,
            )
            if not math.isfinite(line["loss"]):
                raise SystemExit(f"the loss is {line['loss']} at step {step}; the last good state is {state_file}")
        if rank == 0 and tokens >= next_eval:
            next_eval += a.eval_every
            losses = evaluate(model, tokenizer, a.text, device)
            log.write(json.dumps({"step": step, "tokens": tokens, "held_out": losses}) + "\n")
        if time.monotonic() > next_save:
            save()
            next_save = time.monotonic() + 300
    if world > 1:
        dist.destroy_process_group()
    if rank:
        return
    print(file=sys.stderr)
    if tokens > start_tokens:
        where = f"{world} x {torch.cuda.get_device_name()}" if cuda else f"{world * torch.get_num_threads()} CPU cores"
        minutes = (time.monotonic() - began) / 60
        history.append(
            f"{tokens - start_tokens:,} tokens in {minutes:.0f} minutes on {where}: batches of {a.batch} windows of "
            f"{a.window} tokens ({n_python} of Python), AdamW (peak lr {a.lr:g}, betas 0.9 and 0.95, weight decay 0.1 on "
            f"matrices, clipping 1.0), linear decay over the last {decay_tokens:,} of {a.tokens:,} tokens"
        )
    save()
    print(f"state in {state_file}: {tokens:,} tokens, {step:,} steps", file=sys.stderr)
    if a.out and not stop:
        facts = {
            "device": device,
            "novels": a.text,
            "history": history,
            "python_tokens": len(data["python"].stream),
            "prose_tokens": len(data["prose"].stream),
            "n_novels": len(list(a.text.glob("*.txt"))) - 1,
        }
        export(model, tokenizer, a.out, facts)


if __name__ == "__main__":
    main()
