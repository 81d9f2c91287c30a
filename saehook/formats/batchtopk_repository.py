"""The BatchTopK paper's repository: `checkpoints/{name}_{step}/sae.pt` with W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc, b_dec,
for jumprelu `jumprelu.log_threshold` [d_sae]; and `config.json` (act_size, dict_size, sae_type, top_k, input_unit_norm, ..).

`input_unit_norm`: each token is normalised, and that undone after decoding. topk and batchtopk do not use b_enc. A batchtopk has
no threshold in its file: it is read without, and has to be given one. jumprelu does not subtract b_dec.
"""

from __future__ import annotations

from typing import Any

import torch

from saehook.config import Activation, BatchTopK, JumpReLU, ReLU, SAEConfig, TopK
from saehook.errors import ArgumentError, FormatError
from saehook.formats.folder import Files, whole_number
from saehook.formats.found import Contents, Provenance

NEEDED = {"W_enc", "W_dec", "b_enc", "b_dec"}
LOG_THRESHOLD = "jumprelu.log_threshold"
KNOWN = set(
    "seed batch_size lr num_tokens l1_coeff beta1 beta2 max_grad_norm seq_len dtype model_name site layer act_size dict_size "
    "device model_batch_size num_batches_in_buffer dataset_path wandb_project input_unit_norm perf_log_freq sae_type "
    "checkpoint_freq n_batches_to_dead hook_point name top_k top_k_aux aux_penalty bandwidth act_name cross_entropy_loss "
    "use_encoder_bias activation tied_weights l1_warmup_frac softmax_aux_penalty".split()
)


def matches(files: Files) -> bool:
    """Our names, and a configuration with act_size and dict_size."""
    return files.names >= NEEDED and files.config("act_size", "dict_size") is not None


def read(files: Files) -> Contents:
    """See `saehook.formats`."""
    data, path = files.config("act_size", "dict_size"), files.config_path("act_size", "dict_size")
    assert data is not None
    kind = data.get("sae_type", "vanilla")
    if kind not in ("vanilla", "topk", "batchtopk", "jumprelu"):
        raise FormatError(f"{path}: sae_type {kind!r} is unknown; vanilla, topk, batchtopk and jumprelu are read.")
    if data.get("activation", "relu") != "relu":
        raise FormatError(f"{path}: activation {data['activation']!r} is not supported, only 'relu'.")
    files.expect(NEEDED | ({LOG_THRESHOLD} if kind == "jumprelu" else set()))
    tensors = {name: files.tensor(name) for name in ("W_enc", "b_enc", "b_dec")}
    tied = data.get("tied_weights") is True
    tensors["W_dec"] = files.decoder(files.tensor("W_enc").T if tied else files.tensor("W_dec"))
    notes = []
    if "input_unit_norm" not in data:
        notes.append("its configuration does not say input_unit_norm; its input is taken as it is")
    if kind in ("topk", "batchtopk") and not data.get("use_encoder_bias"):
        tensors["b_enc"] = torch.zeros_like(tensors["b_enc"])
    if kind == "batchtopk":
        notes.append(
            "its file holds no threshold, so it has no rule for one token alone until it gets one: sae.set_threshold(value), "
            "such that k latents fire on average"
        )
    if kind == "jumprelu":
        tensors["threshold"] = files.tensor(LOG_THRESHOLD).float().exp()
    try:
        config = SAEConfig(
            d_in=whole_number(data, "act_size", path),
            d_sae=whole_number(data, "dict_size", path),
            activation=_activation(data, kind, path),
            subtract_b_dec=kind != "jumprelu",
            normalize="layer_norm" if data.get("input_unit_norm") else "none",
        )
    except ArgumentError as error:
        raise FormatError(f"{path}: {error}") from None
    hook = data.get("hook_point", data.get("act_name"))
    if hook is None and isinstance(data.get("layer"), int) and isinstance(data.get("site"), str):
        hook = f"blocks.{data['layer']}.hook_{data['site']}"
    lm = data.get("model_name")
    provenance = Provenance(
        format="batchtopk_repository",
        peer_site=hook if isinstance(hook, str) else None,
        lm=lm if isinstance(lm, str) else None,
        config=data,
        unknown=tuple(sorted(set(data) - KNOWN)),
        notes=tuple(notes),
    )
    return Contents(config, tensors, provenance)


def _activation(data: dict[str, Any], kind: str, path: Any) -> Activation:
    match kind:
        case "topk":
            return TopK(k=whole_number(data, "top_k", path))
        case "batchtopk":
            return BatchTopK(k=whole_number(data, "top_k", path))
        case "jumprelu":
            return JumpReLU()
        case _:
            return ReLU()
