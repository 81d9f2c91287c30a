"""A slow reference for reads, writes and edits: plain torch hooks, token by token, no cache.

Nothing here knows saehook's code: only its data classes (`Program`, `Edit`, `Where`) and an SAE's tensors are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saehook.config import BatchTopK, JumpReLU, MaskRule, TopK
from saehook.interventions import Program
from saehook.sae import SAE

Write = Callable[[Tensor], Tensor]

_LLAMA = {"attention": "self_attn", "o_proj": "self_attn.o_proj", "mlp": "mlp", "down": "mlp.down_proj"}
_PARTS = {
    "llama": ("model.layers", _LLAMA),
    "mistral": ("model.layers", _LLAMA),
    "qwen2": ("model.layers", _LLAMA),
    "qwen3": ("model.layers", _LLAMA),
    "gemma": ("model.layers", _LLAMA),
    "phi3": ("model.layers", _LLAMA),
    "gemma2": ("model.layers", _LLAMA),
    "gemma3_text": ("model.layers", _LLAMA),
    "gpt2": ("transformer.h", {"attention": "attn", "o_proj": "attn.c_proj", "mlp": "mlp", "down": "mlp.c_proj"}),
    "gpt_neo": (
        "transformer.h",
        {"attention": "attn", "o_proj": "attn.attention.out_proj", "mlp": "mlp", "down": "mlp.c_proj"},
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {"attention": "attention", "o_proj": "attention.dense", "mlp": "mlp", "down": "mlp.dense_4h_to_h"},
    ),
}
_POST_NORMS = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


def _place(lm: nn.Module, site: str) -> tuple[nn.Module, str]:
    """(module, side) of a site; of `resid_mid` the module that adds attention to the residual stream."""
    if ":" in site:
        path, side = site.split(":")
        return lm.get_submodule(path), side
    _, number, kind = site.split(".")
    model_type: Any = lm.config.model_type  # type: ignore[union-attr]
    layers, parts = _PARTS[model_type]
    layer = lm.get_submodule(f"{layers}.{number}")
    after_attention, after_mlp = _POST_NORMS.get(model_type, (parts["attention"], parts["mlp"]))
    inner, side = {
        "resid_pre": ("", "input"),
        "resid_post": ("", "output"),
        "attn_in": (parts["attention"], "input"),
        "attn_z": (parts["o_proj"], "input"),
        "attn_out": (after_attention, "output"),
        "resid_mid": (after_attention, "output"),
        "mlp_in": (parts["mlp"], "input"),
        "mlp_act": (parts["down"], "input"),
        "mlp_out": (after_mlp, "output"),
    }[kind]
    return (layer.get_submodule(inner) if inner else layer), side


def _first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _with_first(value: Any, new: Tensor) -> Any:
    return new if isinstance(value, Tensor) else (new, *value[1:])


@contextlib.contextmanager
def written(lm: nn.Module, site: str, write: Write) -> Iterator[None]:
    """While open, the value at `site` is `write(value)`; a `write` that returns its argument only reads.

    What is written to `resid_mid` goes through the attention's contribution: resid_mid = resid_pre + attn_out.
    """
    module, side = _place(lm, site)
    handles = []
    if site.endswith(".resid_mid"):
        layer, _ = _place(lm, site.replace("resid_mid", "resid_pre"))
        before: list[Tensor] = []
        handles.append(layer.register_forward_pre_hook(lambda m, a: before.append(_first(a)), prepend=True))

        def through_attention(module: nn.Module, args: Any, output: Any) -> Any:
            x, residual = _first(output), before.pop()
            mid = residual + x
            new = write(mid)
            return None if new is mid else _with_first(output, new - residual)

        handles.append(module.register_forward_hook(through_attention))
    elif side == "output":

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            new = write(_first(output))
            return None if new is _first(output) else _with_first(output, new)

        handles.append(module.register_forward_hook(after))
    else:

        def ahead(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                new = write(args[0])
                return None if new is args[0] else ((new, *args[1:]), kwargs)
            name = next(iter(kwargs))
            new = write(kwargs[name])
            return None if new is kwargs[name] else (args, {**kwargs, name: new})

        handles.append(module.register_forward_pre_hook(ahead, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read(lm: Any, site: str, ids: Tensor, **arguments: Any) -> Tensor:
    """The value at a site in one plain forward pass over `ids` [rows, length]."""
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x

    with torch.no_grad(), written(lm, site, look):
        lm(input_ids=ids, use_cache=False, **arguments)
    return seen[-1]


# --- one token of one site -------------------------------------------------------------------------------------------


def _normalised(sae: SAE, x: Tensor) -> tuple[Tensor, float, float]:
    if sae.config.normalize == "none":
        return x, 0.0, 1.0
    mean, std = float(x.mean()), float(x.std())
    return (x - mean) / (std + 1e-5), mean, std


@torch.no_grad()
def encode(sae: SAE, x: Tensor) -> Tensor:
    """Latents of one token, [d_sae]."""
    x, _, _ = _normalised(sae, x.float())
    if sae.config.subtract_b_dec:
        x = x - sae.b_dec
    pre = x @ sae.W_enc + sae.b_enc
    match sae.config.activation:
        case TopK(k=k):
            largest = set(pre.argsort(descending=True)[:k].tolist())
            return torch.tensor([max(0.0, float(v)) if i in largest else 0.0 for i, v in enumerate(pre)])
        case BatchTopK() | JumpReLU():
            assert sae.threshold is not None
            return torch.where(pre > sae.threshold.clamp_min(0.0), pre, 0.0)
        case _:
            return pre.clamp_min(0.0)


@torch.no_grad()
def decode(sae: SAE, z: Tensor, x: Tensor) -> Tensor:
    """x_hat of one token."""
    _, mean, std = _normalised(sae, x.float())
    return (z @ sae.W_dec + sae.b_dec) * std + mean


@dataclass
class Row:
    """One row without padding: which of its ids are the prompt."""

    prompt: int
    special: Sequence[int]
    number: int = 0

    def counts(self, rule: MaskRule, position: int, token: int, x: Tensor, special: bool = False) -> bool:
        """Whether the token at this position is in the mask of an SAE with that rule, or would be if special ones were."""
        largest = float("inf") if rule.max_norm_ratio is None else rule.max_norm_ratio * float(rule.median_norm or 0)
        return (
            (special or token not in self.special)
            and position >= rule.skip_first_tokens
            and float(x.float().norm()) <= largest
        )

    def selects(self, where: Any, position: int, token: int, counts: bool) -> bool:
        """Whether `where` means the token at this position; `counts`: it is in the mask."""
        start, stop = where.positions or (0, None)
        if position < start or (stop is not None and position >= stop):
            return False
        if where.rows is not None and self.number not in where.rows:
            return False
        if where.token_ids is not None and token not in where.token_ids:
            return False
        if where.tokens is not None:
            return position < self.prompt and any(position == t % self.prompt for t in where.tokens)
        if not counts:
            return False
        return where.prompt if position < self.prompt else where.generation


@torch.no_grad()
def edited_token(x: Tensor, sae: SAE, program: Program, active: Sequence[Any], on_mask: bool) -> Tensor:
    """x' of one token [d] from x, the edits that select it, and whether it is on the mask."""
    spliced = program.splice and on_mask
    if not active and not spliced:
        return x
    z = encode(sae, x)
    new, acted = z.clone(), False
    norm = float(x.float().norm())
    _, _, sigma = _normalised(sae, x.float())
    for edit in active:
        for latent in edit.latents if edit.op != "keep_only" else range(sae.d_sae):
            old = float(new[latent])
            if (edit.active_only and old <= 0) or (edit.op == "keep_only" and latent in edit.latents):
                continue
            value = edit.value or 0.0
            if edit.unit == "max":
                assert sae.stats is not None
                value *= float(sae.stats.max_act[latent])
            elif edit.unit == "norm":
                value *= norm / sigma / float(sae.W_dec[latent].float().norm())
            elif edit.op == "mean":
                assert sae.stats is not None
                value = float(sae.stats.mean_act[latent])
            outcomes = {"set": value, "add": old + value, "scale": value * old, "min": max(old, value), "mean": value}
            new[latent] = (outcomes | {"max": min(old, value)}).get(edit.op, 0.0)
            acted = True
        acted = acted or edit.op == "keep_only"
    if not acted and not spliced:
        return x
    if spliced or program.error == "drop" or program.splice:
        return in_norm(program.norm, x.float(), decode(sae, new, x)).to(x.dtype)
    delta = torch.zeros(x.shape[-1])
    for latent in range(sae.d_sae):
        if new[latent] != z[latent]:
            delta = delta + (new[latent] - z[latent]) * sae.W_dec[latent].float()
    return in_norm(program.norm, x.float(), x.float() + sigma * delta).to(x.dtype)


def in_norm(rule: Any, x: Tensor, new: Tensor) -> Tensor:
    """x' of one token as `Program.norm` leaves it."""
    if rule == "preserve":
        return new * (float(x.norm()) / (float(new.norm()) or 1.0))
    if rule is not None and float((new - x).norm()) > rule.limit * float(x.norm()):
        return x + (new - x) / (new - x).norm() * rule.limit * x.norm()
    return new


def program_write(program: Program, edits: Sequence[Any], sae: SAE, row: Row, ids: Sequence[int]) -> Write:
    """What the program makes of [1, len(ids), d] at one site."""

    def write(x: Tensor) -> Tensor:
        tokens = []
        for position, token in enumerate(ids):
            counts = {s: row.counts(sae.mask_rule, position, token, x[0, position], s) for s in (False, True)}
            active = [edit for edit in edits if row.selects(edit.where, position, token, counts[edit.where.special])]
            tokens.append(edited_token(x[0, position], sae, program, active, counts[False]))
        return torch.stack(tokens)[None]

    return write


@torch.no_grad()
def logits(
    lm: Any,
    ids: Sequence[int],
    program: Program,
    saes: Mapping[str, SAE],
    *,
    special: Sequence[int],
    prompt: int,
    number: int = 0,
) -> Tensor:
    """Logits [len(ids), vocab] of one row, the one of that number in its batch, under the program, uncached."""
    row = Row(prompt, special, number)
    with contextlib.ExitStack() as stack:
        for site, sae in saes.items():
            edits = [edit for edit in program.edits if edit.site in (site, None)]
            if edits or program.splice:
                stack.enter_context(written(lm, site, program_write(program, edits, sae, row, ids)))
        return lm(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def generate(
    lm: Any,
    ids: Sequence[int],
    program: Program,
    saes: Mapping[str, SAE],
    *,
    special: Sequence[int],
    new: int,
    eos: int | None = None,
    number: int = 0,
) -> tuple[list[int], float]:
    """(new ids, smallest margin between the best and the second best logit) of greedy decoding, the whole row again at
    every step."""
    row, smallest = list(ids), float("inf")
    for _ in range(new):
        best = logits(lm, row, program, saes, special=special, prompt=len(ids), number=number)[-1].topk(2)
        smallest = min(smallest, float(best.values[0] - best.values[1]))
        row.append(int(best.indices[0]))
        if row[-1] == eos:
            break
    return row[len(ids) :], smallest
