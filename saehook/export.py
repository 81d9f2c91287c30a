"""Programs that need no SAE any more: unconditional adds, folded into the biases of a plain Hugging Face checkpoint, or written
as a control vector for llama.cpp.

An `add` of c to latent i writes c · W_dec[i] at its site, an `add` along a vector c · v. Where it does so at every token, that
is a constant, and:

- added behind a linear map, it belongs into the map's bias b: (W x + b) + v = W x + (b + v);
- added before one, its image does: W (x + v) + b = W x + (b + W v);
- added to the residual stream behind layer N, it is `direction.N` of a control vector, which llama.cpp adds there.

All else depends on the token and is refused. A bias knows no mask: it acts on special tokens, too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saehook.config import MaskRule
from saehook.errors import ExportError, ShapeError
from saehook.files import atomic_write, new_folder
from saehook.gguf import write_gguf
from saehook.interventions import AnyEdit, Edit, Program, VectorEdit
from saehook.program_file import program_id
from saehook.sites import Site, architecture, named_sites, resolve
from saehook.where import EVERYWHERE, Where

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs
    from saehook.sae import SAE

ALL_TOKENS = Where(special=True)
BIAS_FLAGS = ("attention_bias", "mlp_bias")
"""Switches of configs that give linear maps a bias."""

_LLAMA = {
    "attn_in": "self_attn.q_proj:input self_attn.k_proj:input self_attn.v_proj:input",
    "attn_z": "self_attn.o_proj:input",
    "attn_out": "self_attn.o_proj:output",
    "resid_mid": "self_attn.o_proj:output",
    "mlp_in": "mlp.gate_proj:input mlp.up_proj:input",
    "mlp_act": "mlp.down_proj:input",
    "mlp_out": "mlp.down_proj:output",
    "resid_post": "mlp.down_proj:output",
}
_GEMMA2 = {kind: maps for kind, maps in _LLAMA.items() if kind in {"attn_in", "attn_z", "mlp_in", "mlp_act"}}
_GPT2 = {
    "attn_in": "ln_1:output",
    "attn_z": "attn.c_proj:input",
    "attn_out": "attn.c_proj:output",
    "resid_mid": "attn.c_proj:output",
    "mlp_in": "ln_2:output",
    "mlp_act": "mlp.c_proj:input",
    "mlp_out": "mlp.c_proj:output",
    "resid_post": "mlp.c_proj:output",
}
_GPT_NEOX = {
    "attn_in": "input_layernorm:output",
    "attn_z": "attention.dense:input",
    "attn_out": "attention.dense:output",
    "resid_mid": "attention.dense:output",
    "mlp_in": "post_attention_layernorm:output",
    "mlp_act": "mlp.dense_4h_to_h:input",
    "mlp_out": "mlp.dense_4h_to_h:output",
    "resid_post": "mlp.dense_4h_to_h:output",
}
FOLDS: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "phi3": {**_LLAMA, "attn_in": "self_attn.qkv_proj:input", "mlp_in": "mlp.gate_up_proj:input"},
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": _GPT2,
    "gpt_neo": _GPT2
    | {
        "attn_z": "attn.attention.out_proj:input",
        "attn_out": "attn.attention.out_proj:output",
        "resid_mid": "attn.attention.out_proj:output",
    },
    "gpt_neox": _GPT_NEOX,
}
"""By `config.model_type` and kind of site: the modules below the layer whose biases hold what is added there."""


def export_checkpoint(
    hooked: HookedSAEs, program: Program | AnyEdit | Sequence[AnyEdit], folder: str | Path, *, every_token: bool = False
) -> Path:
    """Write the edited model as a checkpoint that `AutoModelForCausalLM.from_pretrained` reads: its logits are those of
    `hooked(..., edits=program)`, in float32 to 1e-5.

    Args:
        folder: new; model, tokenizer and a README are written into it.
        every_token: let edits act on special tokens, and on what an SAE's `mask_rule` leaves out, as a bias must.

    Raises:
        ExportError: the program is no sum of constants, or a site is followed by no bias; the message says which.
        FileError: the folder is there already, or cannot be written.
    """
    program = Program.of(program)
    lm = hooked.lm
    if getattr(lm, "hf_quantizer", None) is not None or any(p.is_meta for p in lm.parameters()):
        raise ExportError(
            "the model is quantised or offloaded, so its weights are not at hand. Load it as it is stored."
        )
    changes: dict[str, Tensor] = {}
    for site, vector in constants(hooked, program, every_token=every_token).items():
        for path, side in _folds(lm, resolve(lm, site)[0]):
            change = vector if side == "output" else _image(lm.get_submodule(path), vector)
            changes[path] = changes.get(path, torch.zeros(())) + change
    new = _with_biases(lm, list(changes))
    state = lm.state_dict()
    for name, tensor in new.state_dict().items():
        if name not in state:  # a bias that the config has asked for
            state[name] = torch.zeros(tensor.shape, dtype=lm.dtype)
    for path, change in changes.items():
        bias = state[f"{path}.bias"]
        state[f"{path}.bias"] = (bias.double() + change.to(bias.device)).to(bias.dtype)
    new.load_state_dict(state, assign=True)
    new.tie_weights()
    new.generation_config = copy.deepcopy(lm.generation_config)
    folder = Path(folder)
    with new_folder(folder) as partial:
        new.save_pretrained(partial)
        hooked.tokenizer.save_pretrained(partial)
        atomic_write(partial / "README.md", _card(hooked, program))
    return folder


def export_control_vector(
    hooked: HookedSAEs, program: Program | AnyEdit | Sequence[AnyEdit], path: str | Path, *, every_token: bool = False
) -> Path:
    """Write the program as a control vector (GGUF) for llama.cpp, which adds it to the residual stream:
    `llama-cli -m MODEL --control-vector FILE`.

    Args:
        every_token: as for `export_checkpoint`.

    Raises:
        ExportError: the program is no sum of constants; or a site is not the residual stream behind layer 1 or later.
        FileError: it cannot be written.
    """
    program = Program.of(program)
    layers: dict[int, Tensor] = {}
    for site, vector in constants(hooked, program, every_token=every_token).items():
        layer = _layer_before(hooked.lm, resolve(hooked.lm, site)[0])
        layers[layer] = layers.get(layer, torch.zeros(())) + vector
    facts: dict[str, str | int] = {
        "general.architecture": "controlvector",
        "general.description": f"saehook program {program_id(program)}",
        "controlvector.model_hint": hooked.lm.config.get_text_config().model_type,
        "controlvector.layer_count": len(layers),
    }
    path = Path(path)
    write_gguf(path, facts, {f"direction.{layer}": layers[layer] for layer in sorted(layers)})
    return path


def constants(hooked: HookedSAEs, program: Program, *, every_token: bool = False) -> dict[str, Tensor]:
    """What the program adds to every token, by the site that is written: [d], float64, on the CPU.

    Raises:
        ExportError: what it adds depends on the token; the message says by which edit.
        LatentError, MissingStatError, ShapeError: as when the program runs.
    """
    plain = Program(edits=program.edits)
    for field in dataclasses.fields(program):
        value = getattr(program, field.name)
        if value != getattr(plain, field.name) and (field.name, value) not in {("error", "keep"), ("parallel", True)}:
            raise ExportError(
                f"the program has {field.name}={value!r}, which depends on what each token is, and weights cannot. Leave it out."
            )
    if not program.edits:
        raise ExportError("the program has no edit, so there is nothing to fold. Give one, such as steer(123, 4.0).")
    found: dict[str, Tensor] = {}
    for number, edit in enumerate(program.edits, 1):
        reason = _obstacle(edit, every_token)
        if reason is None and isinstance(edit, Edit):
            reason = _sae_obstacle(hooked.saes[hooked.resolve_site(edit.site)], every_token)
        if reason is not None:
            raise ExportError(f"edit {number} ({edit}) cannot become part of the weights: {reason}")
        assert edit.value is not None
        site = edit.site
        name = hooked.resolve_site(site) if isinstance(edit, Edit) or site is None or site in hooked.attached else None
        if name is not None:
            site = hooked.attached[name].writes
        assert site is not None
        if isinstance(edit, Edit):
            assert name is not None
            vector = _constant(hooked.saes[name], edit)
        else:
            vector = edit.value * torch.tensor(edit.vector, dtype=torch.float64)
            if len(vector) != (width := hooked.model.place(site).width):
                raise ShapeError(f"edit {number} has a vector of {len(vector)} numbers; {site} has width {width}.")
        found[site] = found.get(site, torch.zeros(())) + vector
    return found


def _obstacle(edit: AnyEdit, every_token: bool) -> str | None:
    """Why the edit is no constant at every token; None if it is one."""
    if edit.op != "add":
        return "only 'add' writes the same at every token; all other operations look at the token."
    if edit.unit == "norm":
        return "its unit 'norm' is relative to each token's norm. Use 'raw' or 'max'."
    if edit.unit == "kl":
        return "a KL is no amount yet. Turn it into one with hooked.calibrate(edits, text)."
    # Whatever an edit can say besides these, it is not unconditional.
    if isinstance(edit, VectorEdit):
        plain: AnyEdit = VectorEdit(
            op="add", vector=edit.vector, value=edit.value, unit=edit.unit, site=edit.site, where=ALL_TOKENS
        )
    else:
        plain = Edit(op="add", latents=edit.latents, value=edit.value, unit=edit.unit, site=edit.site, where=ALL_TOKENS)
    if edit == plain or (every_token and edit == dataclasses.replace(plain, where=EVERYWHERE)):
        return None
    if edit == dataclasses.replace(plain, where=EVERYWHERE):
        return (
            "it leaves special tokens such as BOS out, and a bias cannot. Say where=Where(special=True), or export with "
            "every_token=True (--every-token), which edits them, too."
        )
    return (
        "it has a condition (where, when, schedule, active_only or mode), so it does not add the same at every token."
    )


def _sae_obstacle(sae: SAE, every_token: bool) -> str | None:
    if sae.config.normalize != "none":
        return "its SAE normalises each token, so what it adds is relative to the token's scale."
    rule = sae.mask_rule
    if not every_token and (rule.skip_first_tokens or rule.max_norm is not None):
        return (
            f"its SAE leaves tokens out ({rule}), and a bias cannot. Export with every_token=True (--every-token), which edits "
            f"them, too; set sae.mask_rule = {MaskRule.__name__}() to try it first."
        )
    return None


def _constant(sae: SAE, edit: Edit) -> Tensor:
    """Σ value · W_dec[i], [d_out] float64."""
    sae.check_latents(edit.latents)
    assert edit.value is not None
    if edit.unit == "max":
        values = edit.value * sae.max_act(edit.latents).cpu()
    elif edit.unit == "quantile":
        values = sae.quantile_act(edit.latents, edit.value).cpu()
    else:
        values = torch.full((len(edit.latents),), edit.value)
    return values.double() @ sae.W_dec[list(edit.latents)].detach().cpu().double()


def _named(lm: Any, site: Site) -> tuple[int, str] | None:
    """Layer and kind of a site, also of one that was named by its module path; None where it has no such name."""
    for known in named_sites(lm):
        if (known.path, known.side, known.in_place) == (site.path, site.side, site.in_place):
            _, layer, kind = known.name.split(".")
            # What is added between two layers may be named as the end of one or the start of the next.
            return (int(layer) - 1, "resid_post") if kind == "resid_pre" else (int(layer), kind)
    return None


def _folds(lm: Any, site: Site) -> list[tuple[str, str]]:
    """(module path, side) of the maps whose biases hold what is added at the site."""
    if (named := _named(lm, site)) is None:
        if not _is_affine(lm.get_submodule(site.path), site.side):
            raise ExportError(
                f"{site.name} is a {type(lm.get_submodule(site.path)).__name__}: no bias of a linear map or norm stands there "
                "that would hold a constant."
            )
        return [(site.path, site.side)]
    layer, kind = named
    row = architecture(lm)
    assert row is not None
    model_type = lm.config.get_text_config().model_type
    if layer < 0:
        raise ExportError(f"before {site.name} no layer stands whose bias could hold a constant. Edit a later site.")
    if kind not in FOLDS.get(model_type, {}):
        raise ExportError(
            f"in {model_type} a norm without bias stands before {site.name}, so no bias can hold a constant there. "
            f"{_SUGGESTION}"
        )
    return [
        (f"{row.layers}.{layer}.{path}", side)
        for path, side in (fold.split(":") for fold in FOLDS[model_type][kind].split())
    ]


_SUGGESTION = "What is added to the residual stream behind a layer can be exported as a control vector (a file .gguf)."


def _is_affine(module: nn.Module, side: str) -> bool:
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return linear or (isinstance(module, nn.LayerNorm) and side == "output")


def _image(module: Any, vector: Tensor) -> Tensor:
    """W v, float64, on the CPU. The weight of Linear is [out, in], that of transformers' Conv1D [in, out]."""
    weight = module.weight.detach().cpu().double()
    return weight @ vector if isinstance(module, nn.Linear) else vector @ weight


def _with_biases(lm: Any, paths: Sequence[str]) -> Any:
    """A model like `lm` without weights (on the meta device) whose modules at the paths have a bias.

    Raises:
        ExportError: no config of this architecture gives a module one.
    """
    config = copy.deepcopy(lm.config)
    text = config.get_text_config()
    new = _empty(type(lm), config)
    for path in paths:
        if new.get_submodule(path).bias is not None:
            continue
        for flag in BIAS_FLAGS:
            if getattr(text, flag, None) is False:
                setattr(text, flag, True)
                new = _empty(type(lm), config)
                if new.get_submodule(path).bias is not None:
                    break
                setattr(text, flag, False)
        else:
            if (twin := _as_llama(lm)) is not None:
                return twin
            raise ExportError(
                f"{path} of {text.model_type} has no bias, and no setting of its config gives it one, so a plain "
                f"checkpoint cannot hold the program. {_SUGGESTION}"
            )
    return new


def _as_llama(lm: Any) -> Any:
    """The Llama with all biases, on the meta device, that computes what a Mistral or Qwen 2 without sliding windows does; its
    parameters have the same names. None for other models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    given = lm.config.to_dict()
    windows = {"mistral": given.get("sliding_window"), "qwen2": "sliding_attention" in (given.get("layer_types") or ())}
    if type(lm).__name__ not in {"MistralForCausalLM", "Qwen2ForCausalLM"} or windows[lm.config.model_type]:
        return None
    known = set(LlamaConfig().to_dict()) - {"model_type", "architectures", "attention_bias", "mlp_bias"}
    shared = {name: value for name, value in given.items() if name in known}
    return _empty(LlamaForCausalLM, LlamaConfig(**shared, attention_bias=True, mlp_bias=True))


def _empty(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind(config)


def _layer_before(lm: Any, site: Site) -> int:
    """N, where what is added at the site is the same as added to the residual stream behind layer N."""
    named = _named(lm, site)
    if named is None or named[1] not in {"resid_post", "mlp_out"}:
        raise ExportError(
            f"{site.name} is not the residual stream behind a layer, and a control vector is added nowhere else. Use an SAE at "
            "resid_post, resid_pre or mlp_out, or export a checkpoint (a folder)."
        )
    if named[0] < 1:
        raise ExportError(
            f"{site.name} is the residual stream behind layer 0 or before it, where llama.cpp adds no control vector. Use a later "
            "site, or export a checkpoint (a folder)."
        )
    return named[0]


def _card(hooked: HookedSAEs, program: Program) -> str:
    lines = [
        f"# {hooked.model.name}, edited",
        "",
        "The language model with constants in its biases, by saehook; it needs no SAE. At every token, also special ones:",
        "",
        *(f"{i}. `{edit}`" for i, edit in enumerate(program.edits, 1)),
        "",
        f"Program `{program_id(program)}`.",
    ]
    return "\n".join(lines) + "\n"
