"""SAELens, from the first flat configurations to version 6, also its training checkpoints; and our own files.

`cfg.json` and `sae_weights.safetensors` with W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_dec, and
| architecture | more tensors | is read as |
|---|---|---|
| `standard`, `topk`, `abstopk` | b_enc | ReLU, TopK, AbsTopK |
| `jumprelu` | b_enc, threshold (older checkpoints: log_threshold) | JumpReLU |
| `gated` | b_gate, b_mag, r_mag | the JumpReLU that it is equal to |
| `batchtopk`, `matryoshka_batchtopk` (checkpoints) | b_enc, topk_threshold () | BatchTopK |
| `transcoder`, `jumprelu_transcoder`, with `skip_` | b_enc, threshold, W_skip [d_out, d_in] | transcoders |

`topk_transcoder`, `groupmax` and the like are ours; SAELens has no name for them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from saehook.config import (
    AbsTopK,
    Activation,
    BatchTopK,
    GroupMax,
    JumpReLU,
    ReLU,
    SAEConfig,
    TopK,
    activation_from_dict,
)
from saehook.errors import ArgumentError, FormatError
from saehook.formats.folder import Files, as_whole, read_json
from saehook.formats.folding import fold_decoder_norms, fold_gated, fold_input_scale, fold_whitening
from saehook.formats.found import Contents, Provenance
from saehook.formats.weights import read_weights

ARCHITECTURES: dict[str, type[Activation]] = {
    "standard": ReLU,
    "topk": TopK,
    "abstopk": AbsTopK,
    "groupmax": GroupMax,
    "jumprelu": JumpReLU,
    "gated": JumpReLU,
    "batchtopk": BatchTopK,
    "matryoshka_batchtopk": BatchTopK,
}
"""Inference rule by architecture."""
TRANSCODERS: dict[str, tuple[type[Activation], bool]] = {
    "transcoder": (ReLU, False),
    "skip_transcoder": (ReLU, True),
    "jumprelu_transcoder": (JumpReLU, False),
    "jumprelu_skip_transcoder": (JumpReLU, True),
    "topk_transcoder": (TopK, False),
    "topk_skip_transcoder": (TopK, True),
    "groupmax_transcoder": (GroupMax, False),
    "groupmax_skip_transcoder": (GroupMax, True),
}
"""Inference rule and skip map by architecture; those with topk and groupmax are ours."""
NORMALIZATIONS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
    "expected_average_only_in": "none",
    "covariance_whitening": "none",
}
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
KNOWN = set(
    "architecture d_in d_sae d_out dtype device apply_b_dec_to_input normalize_activations reshape_activations metadata k "
    "rescale_acts_by_decoder_norm l1_coefficient lp_norm l1_warm_up_steps decoder_init_norm jumprelu_init_threshold "
    "jumprelu_bandwidth jumprelu_sparsity_loss_mode jumprelu_tanh_scale jumprelu_ste_to_input l0_coefficient "
    "l0_warm_up_steps target_l0 pre_act_loss_coefficient topk_threshold_lr aux_loss_coefficient use_sparse_activations "
    "matryoshka_widths use_matryoshka_aux_loss activation_fn activation_fn_str activation_fn_kwargs model_name "
    "model_class_name hook_name hook_name_out hook_point hook_point_head_index hook_layer hook_point_layer "
    "hook_head_index hook_head_index_out hook_layer_out prepend_bos context_size dataset_path dataset_trust_remote_code "
    "sae_lens_version sae_lens_training_version neuronpedia_id model_from_pretrained_kwargs seqpos_slice "
    "finetuning_scaling_factor hf_hook_name hf_hook_name_out exclude_special_tokens".split()
)


OWN = set(
    "architecture metadata apply_b_dec_to_input normalize_activations activation_fn activation_fn_str hook_name hook_point "
    "sae_lens_version sae_lens_training_version".split()
)
"""Of these every configuration of SAELens has some."""


def matches(files: Files) -> bool:
    """Tensors by SAELens' names and its configuration."""
    return len({"W_enc", "W_dec", "b_enc", "b_dec"} & files.names) > 1 and _config(files) is not None


def _config(files: Files) -> dict[str, Any] | None:
    """The first that has the sizes and something of SAELens' own: another file may say the sizes, too."""
    sized = (data for _, data in files.configs() if {"d_in", "d_sae"} <= data.keys() and OWN & data.keys())
    return next(sized, None) or files.config("architecture", "metadata")


def read(files: Files) -> Contents:
    """See `saehook.formats`."""
    data = _config(files)
    assert data is not None
    path = files.path.parent / "cfg.json"
    try:
        config, notes = sae_config(data)
        provenance = _provenance(data, notes)
        tensors, more = _tensors(files, data, config)
    except ArgumentError as error:
        raise FormatError(f"{path}: {error}") from None
    except FormatError as error:
        raise error if str(path.parent) in str(error) else FormatError(f"{path}: {error}") from None
    notes += more
    return Contents(config, tensors, dataclasses.replace(provenance, notes=tuple(notes)))


def _provenance(data: dict[str, Any], notes: list[str]) -> Provenance:
    """Version 6 has it under `metadata`, older ones beside everything else."""
    metadata = data.get("metadata")
    facts = data | (metadata if isinstance(metadata, dict) else {})
    ours = _object(facts.get("saehook"))
    lm = facts.get("model_name") or _object(ours.get("lm")).get("id")
    hook = facts.get("hook_name") or facts.get("hook_point")
    head = facts.get("hook_head_index", facts.get("hook_point_head_index"))
    if head is not None and not ours:
        notes.append(f"it reads head {head} of {hook} alone, which is no site here: say to `attach` where it stands")
        hook = None
    return Provenance(
        format="saelens",
        in_our_grammar=bool(ours),
        peer_site=_text(ours.get("site") or facts.get("hf_hook_name") or hook, "recorded site"),
        peer_site_out=_text(
            ours.get("site_out") or facts.get("hf_hook_name_out") or facts.get("hook_name_out"), "recorded site"
        )
        if data.get("architecture") in TRANSCODERS
        else None,
        lm=_text(lm, "model_name"),
        config={} if ours else data,
        unknown=tuple(sorted(set(data) - KNOWN)) if not ours else (),
        notes=tuple(notes),
    )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any, what: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise FormatError(f"the {what} is {value!r}; a string is expected.")
    return value


def sae_config(data: dict[str, Any]) -> tuple[SAEConfig, list[str]]:
    """`SAEConfig` of a `cfg.json`, and what to say about it.

    Raises:
        ArgumentError, FormatError: what this reader would compute wrongly.
    """
    notes: list[str] = []
    for name in ("d_in", "d_sae"):
        if name not in data:
            raise FormatError(f"{name!r} is missing; a configuration of SAELens has architecture, d_in and d_sae.")
        if isinstance(data[name], bool) or not isinstance(data[name], int) or data[name] < 1:
            raise FormatError(f"{name} is {data[name]!r}; a whole number of at least 1 is expected.")
    metadata = data.get("metadata")
    if "architecture" not in data and isinstance(metadata, dict):
        raise FormatError("'architecture' is missing; a configuration of SAELens has architecture, d_in and d_sae.")
    architecture = data.get("architecture", "standard")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES | TRANSCODERS:
        known = ", ".join([*ARCHITECTURES, *TRANSCODERS])
        raise FormatError(f"architecture {architecture!r} is unknown; {known} are read.")
    if not isinstance(data.get("apply_b_dec_to_input", True), bool):
        raise FormatError(f"apply_b_dec_to_input is {data['apply_b_dec_to_input']!r}; true or false is expected.")
    if data.get("reshape_activations", "none") not in ("none", "hook_z"):
        raise FormatError(
            f"reshape_activations = {data['reshape_activations']!r} is not supported; 'none' and 'hook_z' are."
        )
    is_transcoder = architecture in TRANSCODERS
    kind, skip = TRANSCODERS[architecture] if is_transcoder else (ARCHITECTURES[architecture], False)
    config = SAEConfig(
        d_in=data["d_in"],
        d_sae=data["d_sae"],
        activation=_activation(data, kind, notes),
        subtract_b_dec=data.get("apply_b_dec_to_input", not is_transcoder),
        normalize=_normalize(data),
        d_out=data.get("d_out", data["d_in"]) if is_transcoder else None,
        skip=skip,
    )
    return config, notes


def _activation(data: dict[str, Any], kind: type[Activation], notes: list[str]) -> Activation:
    metadata = data.get("metadata") if isinstance(data.get("metadata"), dict) else {}
    ours = metadata.get("saehook") if isinstance(metadata, dict) else None
    recorded = ours.get("activation") if isinstance(ours, dict) else None
    arguments = data.get("activation_fn_kwargs")
    k = as_whole(data.get("k", arguments.get("k", 0) if isinstance(arguments, dict) else 0))
    old = data.get("activation_fn", data.get("activation_fn_str"))
    if old == "topk" and kind is ReLU:
        kind = TopK
    elif kind is ReLU and old not in (None, "relu"):
        raise FormatError(f"the activation function is {old!r}; 'relu' and 'topk' are read.")
    if kind in (JumpReLU, BatchTopK) and isinstance(recorded, dict):
        activation = activation_from_dict(recorded)
        if not isinstance(activation, (BatchTopK, JumpReLU)):
            raise FormatError(f"{recorded} is recorded for an architecture {data['architecture']!r}.")
        return activation
    if kind is BatchTopK:
        if isinstance(k, float):
            notes.append(f"its k = {k} is no whole number; it is read as a JumpReLU, which it is at inference")
            return JumpReLU()
        return BatchTopK(k=k)
    return kind(k=k) if kind in (TopK, AbsTopK, GroupMax) else kind()  # type: ignore[call-arg]


def _normalize(data: dict[str, Any]) -> str:
    value = data.get("normalize_activations", "none")
    if value is None or isinstance(value, bool):  # before version 3
        value = "expected_average_only_in" if value else "none"
    if not isinstance(value, str) or value not in NORMALIZATIONS:
        raise FormatError(f"normalize_activations = {value!r} is not supported; {', '.join(NORMALIZATIONS)} are.")
    return NORMALIZATIONS[value]


def _tensors(files: Files, data: dict[str, Any], config: SAEConfig) -> tuple[dict[str, Tensor], list[str]]:
    gated = data.get("architecture") == "gated"
    encoder = {"b_gate", "b_mag", "r_mag"} if gated else {"b_enc"}
    needed = {"W_enc", "W_dec", "b_dec", *encoder} | ({"W_skip"} if config.skip else set())
    thresholds = ["threshold", "log_threshold", "topk_threshold"]
    jumps = isinstance(config.activation, (BatchTopK, JumpReLU)) and not gated
    threshold = next((name for name in thresholds if name in files.names), "threshold")
    if jumps:
        needed.add(threshold)
    scales = {"scaling_factor", "finetuning_scaling_factor"}
    files.expect(needed, scales)
    tensors = {name: files.tensor(name) for name in needed - {"W_dec", threshold, "b_gate", "b_mag", "r_mag"}}
    tensors["W_dec"] = files.decoder(files.tensor("W_dec"))
    notes: list[str] = []
    if jumps:
        value = files.tensor(threshold)
        value = value.exp() if threshold == "log_threshold" else value
        tensors["threshold"] = value.float().expand(config.d_sae) if value.ndim == 0 else value
        if threshold == "topk_threshold":
            notes.append("a training checkpoint: at inference each token is treated alone, by topk_threshold")
    if gated:
        tensors = fold_gated(tensors, *(files.tensor(name) for name in ("b_gate", "b_mag", "r_mag")))
    for name in scales & files.names:
        tensors = _finetuned(files, data, name, tensors)
    if data.get("rescale_acts_by_decoder_norm"):
        tensors = fold_decoder_norms(tensors)
        notes.append("its decoder norms are folded (rescale_acts_by_decoder_norm)")
    return _unscaled(files, data, config, tensors, notes), notes


def _finetuned(files: Files, data: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`scaling_factor` [d_sae] multiplies the activations before decoding; without fine-tuning it is all ones."""
    factor = files.decoder(files.tensor(name))
    if factor.is_meta or bool((factor == 1).all()):
        return tensors
    if not data.get("finetuning_scaling_factor") and name == "scaling_factor":
        raise FormatError("there is a scaling_factor, and finetuning_scaling_factor does not say that it is used.")
    return tensors | {"W_dec": tensors["W_dec"].float() * factor.float()[:, None]}


def _unscaled(
    files: Files, data: dict[str, Any], config: SAEConfig, tensors: dict[str, Tensor], notes: list[str]
) -> dict[str, Tensor]:
    """Tensors for x as the model has it, where training saw it scaled or whitened and the file says by what."""
    kind = data.get("normalize_activations")
    if kind == "covariance_whitening":
        path = files.path.parent / WHITENING
        if not path.is_file():
            raise FormatError(f"it sees whitened activations, and {WHITENING}, which says how, is not beside it.")
        maps = read_weights(path)[1]
        if missing := {"mean", "matrix", "inverse_matrix"} - set(maps):
            raise FormatError(f"{path}: {', '.join(sorted(missing))} is missing.")
        notes.append("the whitening of its input is folded")
        return fold_whitening(tensors, maps["mean"], maps["matrix"], maps["inverse_matrix"], config.subtract_b_dec)
    if kind is not True and kind != "expected_average_only_in":
        return tensors
    scale = files.known.get("input_scale")
    path = files.path.parent / SCALER
    if scale is None and path.is_file():
        scale = read_json(path).get("scaling_factor")
        if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
            raise FormatError(f"{path}: scaling_factor is {scale!r}; a number is expected.")
    if scale is None:
        notes.append(
            "it was trained on x · sqrt(d_in) / E‖x‖ and no file says which number that is, so x is taken as it is: give "
            "input_scale=, or scale x"
        )
        return tensors
    notes.append(f"the scale of its input, {scale:.6g}, is folded")
    return fold_input_scale(tensors, float(scale))
