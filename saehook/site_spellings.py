"""Names that other tools give to sites, read as ours and written back. Strings only: `sites` says what is there.

| tool | names | source |
|---|---|---|
| `transformerlens` | `blocks.8.hook_resid_pre`, `blocks.8.attn.hook_z`, `blocks.8.hook_mlp_out` | also SAELens |
| `interp-engine` | `resid_post.8`, `z.8`, `mlp_out_post.8`, `path.model.layers.8.mlp` | interp-engine 1.13, Neuronpedia |
| `nnterp` | `layers_output[8]`, `mlps_input[8]`, `attentions_output[8]` | nnterp 1.3 |
| `sparsify` | `layers.8`, `h.8.mlp`: outputs of modules, from the base model on | sparsify 1.3 |
| `huggingface` | `model.layers.8`, `model.layers.3.self_attn.o_proj.input` | Gemma Scope 2 |

`resid_post_layer_8` (dictionary_learning) is read, too. Where a model has a norm behind attention and MLP (Gemma 2 and 3), a
module's own output and what is added to the residual stream are two things: `hook_mlp_out` and `mlp_out_post` mean what is
added, `mlp.hook_out` and `mlps_output` the module's own, and a bare `mlp_out.8` says neither clearly: that is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from saehook.errors import ArgumentError, SiteError

TOOLS = ("transformerlens", "interp-engine", "nnterp", "sparsify", "huggingface")
"""Whose names `spelled` writes."""
_INDEX = r"([^.:\[\]]+|\[[^\]]*\])"
"""Number of a layer, or a glob."""
_HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "attn.hook_in": "attn_in",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_post": "mlp_act",
    "hook_mlp_out": "mlp_out",
}
"""TransformerLens' hook in a block → kind. Its block hooks fire behind a post-norm."""
_OTHER_HOOKS = {
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
    "hook_z": "attn_z",
    "hook_post": "mlp_act",
}
"""The same places, other names of them."""
_OWN_OUTPUTS = {"attn.hook_out": "attn_in", "mlp.hook_out": "mlp_in"}
"""A module's own output → the kind at whose module it is."""
_REFUSED = {
    "hook_attn_in": "the residual stream before the norm, for the attention alone",
    "hook_mlp_in": "the residual stream before the norm, for the MLP alone",
    "ln1.hook_normalized": "a value inside the norm, before its gain",
    "ln2.hook_normalized": "a value inside the norm, before its gain",
}
_INSTEAD = {
    "hook_attn_in": ("resid_pre", "attn_in"),
    "hook_mlp_in": ("resid_mid", "mlp_in"),
    "ln1.hook_normalized": ("resid_pre", "attn_in"),
    "ln2.hook_normalized": ("resid_mid", "mlp_in"),
}
"""Before the norm, and behind it, gain included."""
_POINTS = {
    "resid_pre": "resid_pre",
    "resid_mid": "resid_mid",
    "resid_post": "resid_post",
    "attn_in": "attn_in",
    "z": "attn_z",
    "attn_out_post": "attn_out",
    "mlp_in": "mlp_in",
    "mlp_act": "mlp_act",
    "mlp_out_post": "mlp_out",
}
"""interp-engine's point → kind."""
_OWN_POINTS = {"attn_out": "attn_in", "mlp_out": "mlp_in"}
_ACCESSORS = {
    "layers_input": "resid_pre",
    "layers_output": "resid_post",
    "attentions_input": "attn_in",
    "mlps_input": "mlp_in",
}
_OWN_ACCESSORS = {"attentions_output": "attn_in", "mlps_output": "mlp_in"}


class Reading(NamedTuple):
    """What a name may mean."""

    tool: str
    names: tuple[str, ...]
    """In our grammar: `layers.{i}.{kind}`, i maybe a glob, or `path:side`."""


class Tree(NamedTuple):
    """What names are read against."""

    modules: Collection[str]
    """Paths of the model's modules."""
    base: str
    """Path of the base model, empty where the model is it."""
    layers: str
    """Path of the list of layers, empty where the architecture has no row in the table."""
    kinds: Mapping[str, str]
    """kind → `path:side` below a layer, as in the table's row."""


def readings(name: str, tree: Tree) -> list[Reading]:
    """All that a name may mean in the spellings of other tools; empty where it is none of them.

    Raises:
        SiteError: a name of TransformerLens for something that no site is; it says what comes near.
    """
    return [*_transformerlens(name, tree), *_interp_engine(name, tree), *_nnterp(name, tree), *_paths(name, tree)]


def _own_output(kind: str, layer: str, tree: Tree) -> tuple[str, ...]:
    """Output of the module whose input is `kind`."""
    path = tree.kinds[kind].partition(":")[0] if kind in tree.kinds else ""
    return (f"{tree.layers}.{layer}.{path}:output",) if path else ()


def _transformerlens(name: str, tree: Tree) -> Iterator[Reading]:
    tool = "TransformerLens"
    if name in {"unembed.hook_in", "hook_embed", "ln_final.hook_normalized"}:
        raise SiteError(
            f"{name!r} is no site here. Name the module's path, e.g. 'lm_head:input' or 'model.embed_tokens:output'."
        )
    match = re.fullmatch(rf"blocks\.{_INDEX}\.(.*hook_\w+)", name)
    if match is None:
        return
    layer, hook = match[1], match[2]
    if hook in _REFUSED:
        before, behind = (f"layers.{layer}.{kind}" for kind in _INSTEAD[hook])
        raise SiteError(
            f"{name!r} is {_REFUSED[hook]}, which is no site. Near it are {before!r}, the residual stream itself, and "
            f"{behind!r}, behind the norm with its gain: say which is meant."
        )
    if hook in _OWN_OUTPUTS:
        yield Reading(tool, _own_output(_OWN_OUTPUTS[hook], layer, tree))
        return
    kind = _HOOKS.get(hook) or _OTHER_HOOKS.get(hook)
    if kind is None:
        known = ", ".join([*_HOOKS, *_OTHER_HOOKS, *_OWN_OUTPUTS])
        raise SiteError(
            f"{name!r} is a hook of TransformerLens that is no site here; understood are {known}. Name the module's path "
            "with ':input' or ':output' instead."
        )
    yield Reading(tool, (f"layers.{layer}.{kind}",))


def _interp_engine(name: str, tree: Tree) -> Iterator[Reading]:
    tool = "interp-engine"
    if match := re.fullmatch(rf"(resid_(?:pre|mid|post))_layer_{_INDEX}", name):
        yield Reading("dictionary_learning", (f"layers.{match[2]}.{match[1]}",))
    if name.startswith("path.") and name.removeprefix("path.") in tree.modules:
        yield Reading(tool, (f"{name.removeprefix('path.')}:output",))
    match = re.fullmatch(rf"([a-z_]+)\.{_INDEX}", name)
    if match is None:
        return
    point, layer = match[1], match[2]
    if point in _POINTS:
        yield Reading(tool, (f"layers.{layer}.{_POINTS[point]}",))
    if point in _OWN_POINTS:
        yield Reading(tool, _own_output(_OWN_POINTS[point], layer, tree))
        yield Reading("saehook, what is added to the residual stream", (f"layers.{layer}.{point}",))


def _nnterp(name: str, tree: Tree) -> Iterator[Reading]:
    match = re.fullmatch(r"(\w+)\[([^\[\]]+)\]", name)
    if match is None:
        return
    accessor, layer = match[1], match[2]
    if accessor in _ACCESSORS:
        yield Reading("nnterp", (f"layers.{layer}.{_ACCESSORS[accessor]}",))
    if accessor in _OWN_ACCESSORS:
        yield Reading("nnterp", _own_output(_OWN_ACCESSORS[accessor], layer, tree))


def _paths(name: str, tree: Tree) -> Iterator[Reading]:
    """Module paths, from the model or its base on: the output, or what a last part `.input` or `.output` says."""
    meant = [(name, "output")]
    meant += [(name.removesuffix(f".{side}"), side) for side in ("input", "output") if name.endswith(f".{side}")]
    for path, side in meant:
        for tool, prefix in [("Hugging Face", ""), *([("sparsify", f"{tree.base}.")] if tree.base else [])]:
            if found := _modules(prefix + path, tree.modules):
                yield Reading(tool, tuple(f"{module}:{side}" for module in found))


def _modules(pattern: str, modules: Collection[str]) -> list[str]:
    """Those that a path names; `*` and `?` stand for characters of one part of it."""
    if not re.search(r"[*?\[]", pattern):
        return [pattern] if pattern in modules else []
    escaped = re.escape(pattern).replace(r"\*", "[^.]*").replace(r"\?", "[^.]")
    return [module for module in modules if re.fullmatch(escaped, module)]


def spelled(tool: str, name: str, path: str, side: str, tree: Tree) -> str | None:
    """The name that a tool gives to a site (`sites.Site`); None where it has none.

    Raises:
        ArgumentError: an unknown tool.
    """
    if tool not in TOOLS:
        raise ArgumentError(f"{tool!r} is no tool whose names are known; expected {', '.join(TOOLS)}.")
    if tool == "huggingface":
        dotted = f"{path}.{side}"
        return f"{path}:{side}" if dotted in tree.modules else dotted
    if tool == "sparsify":
        return path.removeprefix(f"{tree.base}.") if side == "output" else None
    if tool == "transformerlens":
        return transformerlens_name(name)
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)", name)
    if match is None:
        return f"path.{path}" if tool == "interp-engine" and side == "output" else None
    layer, kind = match[1], match[2]
    own = {"attn_out": "attn_in", "mlp_out": "mlp_in"}
    is_own = kind in own and _own_output(own[kind], layer, tree) == (f"{path}:{side}",)
    if tool == "interp-engine":
        return f"{kind if is_own else _reversed(_POINTS)[kind]}.{layer}"
    accessors = _reversed(_ACCESSORS) | ({"attn_out": "attentions_output", "mlp_out": "mlps_output"} if is_own else {})
    return f"{accessors[kind]}[{layer}]" if kind in accessors else None


def transformerlens_name(site: str | None) -> str | None:
    """`blocks.8.hook_resid_post` for `layers.8.resid_post`; None for a module path, which TransformerLens has no name for."""
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)", site or "")
    hook = _reversed(_HOOKS).get(match[2]) if match else None
    return f"blocks.{match[1]}.{hook}" if match and hook else None


def _reversed(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}
