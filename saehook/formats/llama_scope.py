"""Llama Scope: encoder.weight [d_sae, d_in], encoder.bias, decoder.weight [d_out, d_sae], decoder.bias.

`checkpoints/final.safetensors` with `hyperparams.json` one folder up (d_model, d_sae, hook_point_in, hook_point_out,
jump_relu_threshold, dataset_average_activation_norm): one threshold for all latents. Of the R1 distillates
`sae_weights.safetensors` with log_jumprelu_threshold [d_sae] and `config.json` (d_model, expansion_factor).

JumpReLU; b_dec is not subtracted. Training saw x · sqrt(d_in) / E‖x‖: that is folded, and the one threshold scaled with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from saehook.config import JumpReLU, SAEConfig
from saehook.errors import FormatError
from saehook.formats.folder import Files, whole_number
from saehook.formats.folding import fold_input_scale
from saehook.formats.found import Contents, Provenance

NEEDED = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
LOG_THRESHOLD = "log_jumprelu_threshold"
NORM = "dataset_average_activation_norm"
KNOWN = set(
    "hook_point_in hook_point_out d_model d_sae expansion_factor act_fn jump_relu_threshold dataset_average_activation_norm "
    "sae_type model_name use_decoder_bias apply_decoder_bias_to_pre_encoder norm_activation sparsity_include_decoder_norm "
    "top_k strict_mode dtype device init_decoder_norm init_encoder_norm init_encoder_with_decoder_transpose lp l1_coefficient "
    "l1_coefficient_warmup_steps top_k_warmup_steps use_glu_encoder use_ghost_grads tp_size ddp_size ignore_token_ids "
    "sae_pretrained_name_or_path sae_from_pretrained_path init_with_bias".split()
)


def matches(files: Files) -> bool:
    """Torch's names, and one of the two kinds of thresholds."""
    return files.names >= NEEDED and (
        LOG_THRESHOLD in files.names or files.config("d_model", "jump_relu_threshold") is not None
    )


def read(files: Files) -> Contents:
    """See `saehook.formats`."""
    distilled = LOG_THRESHOLD in files.names
    norms_here = {name for name in files.names if name.startswith(NORM)}
    files.expect(NEEDED | ({LOG_THRESHOLD} if distilled else set()), norms_here)
    keys = ("d_model",) if distilled else ("d_model", "jump_relu_threshold")
    data, path = files.config(*keys), files.config_path(*keys)
    if data is None:
        raise FormatError(f"{files.path}: config.json beside it, which says d_model, is missing.")
    d_in = whole_number(data, "d_model", path)
    d_sae = _d_sae(data, d_in, path)
    if data.get("use_decoder_bias") is False or data.get("apply_decoder_bias_to_pre_encoder"):
        raise FormatError(f"{path}: such a use of the decoder's bias is not supported.")
    tensors = {
        "W_enc": files.tensor("encoder.weight").T,
        "W_dec": files.decoder(files.tensor("decoder.weight").T),
        "b_enc": files.tensor("encoder.bias"),
        "b_dec": files.tensor("decoder.bias"),
    }
    site, out = data.get("hook_point_in"), data.get("hook_point_out")
    is_transcoder = out is not None and out != site
    scale, scale_out = (_scale(files, data, which, name, d_in) for which, name in (("in", site), ("out", out or site)))
    notes = []
    if distilled:
        tensors["threshold"] = files.tensor(LOG_THRESHOLD).float().exp()
    else:
        value = data["jump_relu_threshold"]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FormatError(f"{path}: jump_relu_threshold is {value!r}; a number is expected.")
        tensors["threshold"] = torch.full((d_sae,), value * (scale or 1.0))
    if scale is None:
        notes.append(
            "it was trained on x · sqrt(d_in) / E‖x‖ and no file says which number that is, so x is taken as it is: give "
            "input_scale="
        )
    else:
        notes.append(f"the scale of its input, {scale:.6g}, is folded")
        tensors = fold_input_scale(tensors, scale, scale_out if is_transcoder else None)
    config = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        activation=JumpReLU(),
        subtract_b_dec=False,
        d_out=len(tensors["b_dec"]) if is_transcoder else None,
    )
    provenance = Provenance(
        format="llama_scope",
        peer_site=site if isinstance(site, str) else None,
        peer_site_out=out if is_transcoder and isinstance(out, str) else None,
        lm=_lm(files, data),
        config=data,
        unknown=tuple(sorted(set(data) - KNOWN)),
        notes=tuple(notes),
    )
    return Contents(config, tensors, provenance)


def _d_sae(data: dict[str, Any], d_in: int, path: Path) -> int:
    if "d_sae" in data:
        return whole_number(data, "d_sae", path)
    factor = data.get("expansion_factor")
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
        raise FormatError(
            f"{path}: expansion_factor is {factor!r}, and there is no d_sae; a number above 0 is expected."
        )
    return round(d_in * factor)


def _scale(files: Files, data: dict[str, Any], which: str, site: Any, d_in: int) -> float | None:
    """sqrt(d) / E‖x‖ where a file says the mean norm: by `in` and `out`, or by the name of the site."""
    if which == "in" and files.known.get("input_scale"):
        return files.known["input_scale"]
    norms = data.get(NORM)
    norm = norms.get(which, norms.get(str(site))) if isinstance(norms, dict) else None
    if norm is None:
        norm = files.number(f"{NORM}.{site}")
    if norm is not None and (isinstance(norm, bool) or not isinstance(norm, (int, float)) or not norm > 0):
        raise FormatError(f"{files.path}: {NORM} is {norm!r}; a number above 0 is expected.")
    return None if norm is None else d_in**0.5 / norm


def _lm(files: Files, data: dict[str, Any]) -> str | None:
    name = data.get("model_name")
    if isinstance(name, str):
        return name
    if files.in_path("(R1-Distill)"):
        return "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    return "meta-llama/Llama-3.1-8B" if files.in_path("(Llama3_1-8B-Base)") else None
