"""Named places of a language model where activations are read and written. Plain torch, no nnsight.

`layers.{i}.{kind}`, i from 0, or any module path with `:input` or `:output` (`model.layers.3.mlp:output`).

| kind | activation |
|---|---|
| `resid_pre`, `resid_post` | residual stream before and after layer i |
| `resid_mid` | residual stream between attention and MLP (none where both read the same stream) |
| `attn_in`, `mlp_in` | what attention and MLP get, after their norm |
| `attn_z` | attention heads, concatenated, before the output projection |
| `attn_out`, `mlp_out` | what attention and MLP add to the residual stream: after the post-norm of Gemma 2 and 3 |
| `mlp_act` | MLP activations before its output projection |

An architecture without a row in `ARCHITECTURES` still works by module path. Names that other tools give to these places
are understood, too (`site_spellings`); they come back as ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from saehook.errors import SiteError
from saehook.fields import short
from saehook.site_spellings import Reading, Tree, readings, spelled

KINDS = ("resid_pre", "attn_in", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_act", "mlp_out", "resid_post")
"""In the order in which a layer computes them."""


@dataclass(frozen=True)
class Architecture:
    """Where the kinds are: module path below the layer (empty: the layer itself) and side."""

    layers: str
    """Path of the list of layers."""
    kinds: dict[str, str]
    """kind -> `path:side`."""
    same: dict[str, str]
    """`path:side` -> the kind whose value it is, too, and that a write there reaches what a write to the kind does."""

    def with_kinds(self, **changes: str) -> Architecture:
        """A copy with some kinds elsewhere."""
        return Architecture(self.layers, {**self.kinds, **changes}, self.same)


LLAMA = Architecture(
    "model.layers",
    {
        "resid_pre": ":input",
        "attn_in": "self_attn:input",
        "attn_z": "self_attn.o_proj:input",
        "attn_out": "self_attn:output",
        "resid_mid": "post_attention_layernorm:input",
        "mlp_in": "mlp:input",
        "mlp_act": "mlp.down_proj:input",
        "mlp_out": "mlp:output",
        "resid_post": ":output",
    },
    {"input_layernorm:output": "attn_in", "post_attention_layernorm:output": "mlp_in"},
)
GEMMA2 = Architecture(
    LLAMA.layers,
    LLAMA.kinds
    | {
        "attn_out": "post_attention_layernorm:output",
        "resid_mid": "pre_feedforward_layernorm:input",
        "mlp_out": "post_feedforward_layernorm:output",
    },
    {"input_layernorm:output": "attn_in", "pre_feedforward_layernorm:output": "mlp_in"},
)
GPT2 = Architecture(
    "transformer.h",
    {
        "resid_pre": ":input",
        "attn_in": "attn:input",
        "attn_z": "attn.c_proj:input",
        "attn_out": "attn:output",
        "resid_mid": "ln_2:input",
        "mlp_in": "mlp:input",
        "mlp_act": "mlp.c_proj:input",
        "mlp_out": "mlp:output",
        "resid_post": ":output",
    },
    {"ln_1:output": "attn_in", "ln_2:output": "mlp_in"},
)
GPT_NEOX = Architecture(
    "gpt_neox.layers",
    {
        "resid_pre": ":input",
        "attn_in": "attention:input",
        "attn_z": "attention.dense:input",
        "attn_out": "attention:output",
        "resid_mid": "post_attention_layernorm:input",
        "mlp_in": "mlp:input",
        "mlp_act": "mlp.dense_4h_to_h:input",
        "mlp_out": "mlp:output",
        "resid_post": ":output",
    },
    {"input_layernorm:output": "attn_in", "post_attention_layernorm:output": "mlp_in"},
)
BERT = Architecture(
    "bert.encoder.layer",
    {
        "resid_pre": ":input",
        "attn_in": "attention:input",
        "attn_z": "attention.output.dense:input",
        "attn_out": "attention.output.dense:output",
        "resid_mid": "attention:output",  # behind the norm: a post-norm block's stream goes on there
        "mlp_in": "intermediate:input",
        "mlp_act": "output.dense:input",
        "mlp_out": "output.dense:output",
        "resid_post": ":output",
    },
    {},
)
VIT = Architecture(
    "vit.layers",
    {
        "resid_pre": ":input",
        "attn_in": "attention:input",
        "attn_z": "attention.o_proj:input",
        "attn_out": "attention:output",
        "resid_mid": "layernorm_after:input",
        "mlp_in": "mlp:input",
        "mlp_act": "mlp.fc2:input",
        "mlp_out": "mlp:output",
        "resid_post": ":output",
    },
    {"layernorm_before:output": "attn_in", "layernorm_after:output": "mlp_in"},
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "phi3": LLAMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gpt2": GPT2,
    "gpt_neo": GPT2.with_kinds(attn_z="attn.attention.out_proj:input"),
    "gpt_neox": GPT_NEOX,
    "bert": BERT,
    "roberta": dataclasses.replace(BERT, layers="roberta.encoder.layer"),
    "vit": VIT,
}
"""One row per `config.model_type`."""


@dataclass(frozen=True)
class Site:
    """One place: the value at one side of one module."""

    name: str
    """`layers.2.resid_post`, or `model.layers.2.mlp:output` where it was asked for by path."""
    path: str
    """Module path in the Hugging Face model."""
    side: str
    """`input` (the first argument) or `output` (of a tuple: its first element)."""
    width: int | None
    """Size of the last dimension; None where only running the model can tell."""
    in_place: bool = False
    """Whether a write must change the tensor itself, because others hold it, too (`resid_mid`)."""


def _linear_width(module: Any, side: str) -> int | None:
    """Width at a module with one weight matrix or norm vector: Linear, Conv1D, Embedding, norms."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    if weight.ndim == 1:
        return weight.shape[0]
    if isinstance(module, nn.Linear):
        return module.in_features if side == "input" else module.out_features
    if type(module).__name__ == "Conv1D":  # transformers: weight is [in, out]
        return weight.shape[0 if side == "input" else 1]
    if isinstance(module, nn.Embedding) and side == "output":
        return module.embedding_dim
    return None


def _text_config(lm: Any) -> Any:
    config = lm.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _without_resid_mid(lm: Any, model_type: str) -> bool:
    return model_type == "gpt_neox" and bool(getattr(lm.config, "use_parallel_residual", True))


def architecture(lm: Any) -> Architecture | None:
    """The table row of this model, or None: then sites are named by module path."""
    row = ARCHITECTURES.get(getattr(_text_config(lm), "model_type", ""))
    if row is None:
        return None
    for layers in (row.layers, row.layers.partition(".")[2]):  # the second in a model without head, `AutoModel`
        if any(name == layers for name, _ in lm.named_modules()):
            return dataclasses.replace(row, layers=layers)
    return None


def named_sites(lm: Any) -> list[Site]:
    """All `layers.{i}.{kind}` of this model with their widths, in the order in which they are computed. Runs nothing."""
    row = architecture(lm)
    if row is None:
        return []
    modules = dict(lm.named_modules())
    hidden = _text_config(lm).hidden_size
    skipped = {"resid_mid"} if _without_resid_mid(lm, _text_config(lm).model_type) else set()
    sites = []
    for i in range(len(list(modules[row.layers].children()))):
        for kind in KINDS:
            inner, side = row.kinds[kind].split(":")
            path = f"{row.layers}.{i}" + (f".{inner}" if inner else "")
            if kind in skipped or path not in modules:
                continue
            width = hidden if kind not in {"attn_z", "mlp_act"} else _linear_width(modules[path], side)
            sites.append(
                Site(f"layers.{i}.{kind}", path, side, width, in_place=kind == "resid_mid" and side == "input")
            )
    return sites


def layer_paths(lm: Any) -> list[str]:
    """Module paths of the layers in the order in which they run; none where the architecture has no row."""
    row = architecture(lm)
    if row is None:
        return []
    return [f"{row.layers}.{name}" for name, _ in lm.get_submodule(row.layers).named_children()]


def layers_before(lm: Any, site: Site) -> int:
    """How many of the first layers compute the same whatever is written at the site; 0 where that is not known."""
    for i, path in enumerate(layer_paths(lm)):
        if site.path == path:
            return i + (site.side == "output")
        if site.path.startswith(f"{path}."):
            return i
    return 0


MAX_NAMES = 10_000
"""That one pattern may stand for."""


def _expand(pattern: str) -> list[str]:
    """`layers.{2..4}.x` and `{a,b}` as the list of patterns without braces."""
    names, rest = [], [pattern]
    while rest:
        name = rest.pop()
        match = re.search(r"\{([^{}]*)\}", name)
        if match is None:
            names.append(name)
            continue
        choices = _choices(match[1], pattern)
        if len(names) + len(rest) + len(choices) > MAX_NAMES:
            raise SiteError(f"{short(pattern)} stands for more than {MAX_NAMES:,} names. Use fewer or smaller ranges.")
        rest += [name[: match.start()] + choice + name[match.end() :] for choice in reversed(choices)]
    return names


def _choices(body: str, pattern: str) -> Sequence[str]:
    """What stands in one pair of braces."""
    numbers = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", body)
    if numbers is None:
        return body.split(",")
    low, high = int(numbers[1]), int(numbers[2])
    if low > high:
        raise SiteError(f"the range {{{body}}} in {pattern!r} is empty. Write the smaller number first.")
    return [str(n) for n in range(low, min(high, low + MAX_NAMES) + 1)]


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def _by_path(lm: Any, pattern: str) -> list[Site]:
    path, _, side = pattern.rpartition(":")
    if side not in {"input", "output"}:
        raise SiteError(f"{pattern!r} ends in {side!r}; a module path ends in ':input' or ':output'.")
    modules = dict(lm.named_modules())
    found = [name for name in modules if name and fnmatch.fnmatchcase(name, path)]
    if not found:
        raise SiteError(
            f"{pattern!r} matches no module of {type(lm).__name__}.{_nearest(path, list(modules))} "
            "The paths are those of lm.named_modules()."
        )
    return [Site(f"{name}:{side}", name, side, _linear_width(modules[name], side)) for name in found]


def resolve(lm: Any, patterns: str | Iterable[str]) -> list[Site]:
    """The sites that the patterns name, each once, in the order of the patterns.

    Globs (`layers.*.resid_post`), ranges (`layers.{2..5}.mlp_out`) and lists (`{2,4}`) are understood, and the names of
    other tools (`site_spellings`), which give sites under our names.

    Raises:
        SiteError: a pattern, or one member of a range or list, that matches no site, with the nearest names; a name that
            may mean several places, with all of them.
    """
    named = {site.name: site for site in named_sites(lm)}
    found: dict[str, Site] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str) or not pattern:
            raise SiteError(f"{pattern!r} is no site name. Write for example 'layers.2.resid_post'.")
        for name in _expand(pattern):
            found.update({site.name: site for site in _matching(lm, name, named)})
    return list(found.values())


def _matching(lm: Any, name: str, named: dict[str, Site]) -> list[Site]:
    """The sites that one name without braces means."""
    if ":" in name:
        return _by_path(lm, name)
    if matches := [site for site in named.values() if fnmatch.fnmatchcase(site.name, name)]:
        return matches
    found: dict[tuple[Site, ...], list[Reading]] = {}
    read = readings(name, _tree(lm))
    for reading in read:
        if sites := tuple(_ours(lm, reading, named)):
            found.setdefault(sites, []).append(reading)
    if len(found) > 1:
        meant = [f"{sites[0].name} ({same[0].tool})" for sites, same in found.items()]
        raise SiteError(f"{name!r} may mean {' or '.join(meant)}, which differ in {type(lm).__name__}. Say which.")
    if found:
        return list(next(iter(found)))
    raise SiteError(_no_match(lm, read[0].names[0] if read and read[0].names else name, list(named)))


def _ours(lm: Any, reading: Reading, named: dict[str, Site]) -> list[Site]:
    """What a reading names, by our name of each place where it has one."""
    sites = []
    for name in reading.names:
        if ":" not in name:
            sites += [site for site in named.values() if fnmatch.fnmatchcase(site.name, name)]
            continue
        row = architecture(lm)
        places = {(site.path, site.side): site for site in named.values() if not site.in_place}
        for site in _by_path(lm, name):
            ours = places.get((site.path, site.side))
            match = re.fullmatch(rf"{re.escape(row.layers)}\.(\d+)\.(.+)", f"{site.path}:{site.side}") if row else None
            if row is not None and match is not None and match[2] in row.same:
                ours = named.get(f"layers.{match[1]}.{row.same[match[2]]}")
            sites.append(ours or site)
    return sites


def _tree(lm: Any) -> Tree:
    """What names of other tools are read against."""
    row = architecture(lm)
    modules = dict.fromkeys(name for name, _ in lm.named_modules() if name)
    base = getattr(lm, "base_model_prefix", "")
    return Tree(modules, base if base in modules else "", row.layers if row else "", row.kinds if row else {})


def spelling(lm: Any, site: Site, tool: str) -> str | None:
    """The name that another tool (`site_spellings.TOOLS`) gives to a site of this model, None where it has none.

    Raises:
        ArgumentError: an unknown tool.
    """
    return spelled(tool, site.name, site.path, site.side, _tree(lm))


def _no_match(lm: Any, name: str, known: list[str]) -> str:
    kind = type(lm).__name__
    if not known:
        return (
            f"{kind} has no row in the table of architectures ({', '.join(ARCHITECTURES)}), so {name!r} means nothing. "
            "Name a module path with ':input' or ':output', for example 'model.layers.2.mlp:output'."
        )
    if name.endswith(".resid_mid") and not any(site.endswith(".resid_mid") for site in known):
        return f"{kind} adds attention and MLP to the same residual stream, so it has no resid_mid ({name!r})."
    return f"{name!r} matches no site of {kind}.{_nearest(name, known)} It has {len(known)} sites: see model.sites()."


def same_site(lm: Any, first: str, second: str) -> bool:
    """Whether two names mean the same place of this model."""
    try:
        places = [[(s.path, s.side, s.in_place) for s in resolve(lm, name)] for name in (first, second)]
    except SiteError:
        return False
    return places[0] == places[1] and len(places[0]) == 1
