"""Sites by the names that published SAEs give them, in our grammar, as far as the name alone tells.

| peer's name | ours |
|---|---|
| `blocks.8.hook_resid_post`, `model.layers.8`, `layers.8`, `h.8` | `layers.8.resid_post` |
| `blocks.8.hook_mlp_out` (TransformerLens hooks behind a post-norm), `..post_feedforward_layernorm.output` | `layers.8.mlp_out` |
| `blocks.8.attn.hook_z`, `..self_attn.o_proj.input` | `layers.8.attn_z` |
| `layers.8.mlp` (sparsify: the module's own output) | `layers.8.mlp_out`; of Gemma 2 and 3 `model.layers.8.mlp:output` |
"""

from __future__ import annotations

import re

HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "attn_z",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_post": "mlp_act",
}
"""TransformerLens' hook in a block → kind."""
MODULES = {
    ".output": "resid_post",
    ".input": "resid_pre",
    "self_attn.o_proj.input": "attn_z",
    "attn.c_proj.input": "attn_z",
    "attention.dense.input": "attn_z",
    "mlp.input": "mlp_in",
    "mlp.down_proj.input": "mlp_act",
    "mlp.c_proj.input": "mlp_act",
    "mlp.dense_4h_to_h.input": "mlp_act",
    "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out",
}
"""Module below a layer and side → kind, where they are the same in every architecture that has such a module."""
OWN = {
    "mlp.output": "mlp_out",
    "self_attn.output": "attn_out",
    "attn.output": "attn_out",
    "attention.output": "attn_out",
}
"""What a module puts out itself → kind, in architectures without a norm behind it."""
INSIDE_A_NORM = ("ln1.hook_normalized", "ln2.hook_normalized")


def has_post_norms(lm: str | None) -> bool:
    """Whether attention and MLP of that model are followed by a norm, so that their own outputs are no sites of ours."""
    return re.search(r"gemma[-_]?[23]", (lm or "").lower()) is not None


def inside_a_norm(name: str) -> bool:
    """Whether that is a value before a norm's gain, which no module of a Hugging Face model gives or takes."""
    return name.endswith(INSIDE_A_NORM)


def depends_on_the_model(name: str | None) -> bool:
    """Whether a name is a module's own output, which is a site of ours only where no norm follows."""
    return our_site(name) != our_site(name, "gemma-2")


def our_site(name: str | None, lm: str | None = None) -> str | None:
    """`blocks.8.hook_resid_post` as `layers.8.resid_post`; other names as they are, None where it is no site of ours.

    Args:
        name: as the peer spells it; None stays None.
        lm: the language model, which decides what a module's own output is.
    """
    if name is None or inside_a_norm(name):
        return None
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        kind = HOOKS.get(match[2])
        return f"layers.{match[1]}.{kind}" if kind else name
    if match := re.fullmatch(r"resid_(pre|mid|post)_layer_(\d+)", name):
        return f"layers.{match[2]}.resid_{match[1]}"
    path = name.replace(":", ".")
    if not path.endswith((".input", ".output")):
        path += ".output"
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)\.(.+)", path)
    if match is None:
        return name
    layer, rest = match[1], match[2]
    rest = f".{rest}" if rest in ("input", "output") else rest
    if kind := MODULES.get(rest):
        return f"layers.{layer}.{kind}"
    if kind := OWN.get(rest):
        if not has_post_norms(lm):
            return f"layers.{layer}.{kind}"
        return f"model.layers.{layer}.{rest.removesuffix('.output')}:output"
    return name
