"""Gemma Scope 2 (Gemma 3): `{kind}/layer_L_width_W_l0_S/params.safetensors` with lower-case w_enc [d_in, d_sae], w_dec
[d_sae, d_out], b_enc, b_dec, threshold, of some transcoders affine_skip_connection [d_in, d_out]; and mostly `config.json`
(architecture, model_name, hf_hook_point_in, hf_hook_point_out, affine_connection).

JumpReLU; b_dec is not subtracted from the input.
"""

from __future__ import annotations

from typing import Any

from saehook.config import JumpReLU, SAEConfig
from saehook.errors import FormatError
from saehook.formats.checks import d_in_of
from saehook.formats.folder import Files
from saehook.formats.found import Contents, Provenance

NEEDED = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
SKIP = "affine_skip_connection"
POINTS = {
    "resid_post": "output",
    "attn_out": "self_attn.o_proj.input",
    "mlp_out": "post_feedforward_layernorm.output",
    "transcoder": "pre_feedforward_layernorm.output",
}
"""Kind in the path → where x is read, below a layer."""
KNOWN = set(
    "architecture model_name hf_hook_point_in hf_hook_point_out affine_connection width l0 type num_layers layer "
    "release_date target_l0".split()
)


def matches(files: Files) -> bool:
    """The lower-case names."""
    return {"w_enc", "w_dec", "threshold"} <= files.names


def read(files: Files) -> Contents:
    """See `saehook.formats`."""
    files.expect(NEEDED, [SKIP])
    data = files.config("hf_hook_point_in") or {}
    if data.get("architecture", "jump_relu") not in ("jump_relu", "jumprelu"):
        raise FormatError(
            f"{files.config_path('hf_hook_point_in')}: architecture {data['architecture']!r}; 'jump_relu' is expected."
        )
    tensors = {ours: files.tensor(ours.lower()) for ours in ("W_enc", "b_enc", "b_dec", "threshold")}
    W_dec = files.tensor("w_dec")
    if W_dec.ndim == 3:
        raise FormatError(
            f"{files.path} is a cross-layer transcoder, which writes at {W_dec.shape[1]} layers; only one is supported."
        )
    tensors["W_dec"] = files.decoder(W_dec)
    site, site_out = _sites(files, data)
    is_transcoder = site_out is not None or SKIP in files.names or d_in_of(tensors) != len(tensors["b_dec"])
    if SKIP in files.names:
        tensors["W_skip"] = files.tensor(SKIP).T
    elif data.get("affine_connection"):
        raise FormatError(f"{files.path}: the configuration says affine_connection, and {SKIP} is missing.")
    config = SAEConfig(
        d_in=d_in_of(tensors),
        d_sae=len(tensors["b_enc"]),
        activation=JumpReLU(),
        subtract_b_dec=False,
        d_out=len(tensors["b_dec"]) if is_transcoder else None,
        skip=SKIP in files.names,
    )
    notes = () if site else ("neither configuration nor path says its site",)
    provenance = Provenance(
        format="gemma_scope_2",
        peer_site=site,
        peer_site_out=site_out,
        lm=_lm(files, data),
        config=data,
        unknown=tuple(sorted(set(data) - KNOWN)),
        notes=notes,
    )
    return Contents(config, tensors, provenance)


def _sites(files: Files, data: dict[str, Any]) -> tuple[str | None, str | None]:
    """As the configuration says; without one, by the folders."""
    if data:
        site, out = data["hf_hook_point_in"], data.get("hf_hook_point_out")
        if not isinstance(site, str) or not isinstance(out, (str, type(None))):
            raise FormatError(f"{files.config_path('hf_hook_point_in')}: {site!r} and {out!r} are no names of sites.")
        return site, None if out == site else out
    layer, kind = files.in_path(r"layer_(\d+)"), files.in_path(f"({'|'.join(POINTS)})")
    if layer is None or kind is None:
        return None, None
    out = f"model.layers.{layer}.post_feedforward_layernorm.output" if kind == "transcoder" else None
    return f"model.layers.{layer}.{POINTS[kind]}", out


def _lm(files: Files, data: dict[str, Any]) -> str | None:
    name = data.get("model_name")
    if not isinstance(name, str):
        found = files.in_path(r"gemma-scope-2-([0-9a-z]+-(?:pt|it))")
        name = f"gemma-3-{found}" if found else None
    if name is None:
        return None
    name = name.replace("-v3", "-3")
    name = name.replace("-pt", "") if "270m" in name else name  # the hub has that one without the ending
    return name if "/" in name else f"google/{name}"
