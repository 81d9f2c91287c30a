"""Transcoders for Qwen 3 by Hanna et al.: `layer_L.safetensors` with W_enc [d_sae, d_in], W_dec [d_sae, d_out], b_enc, b_dec, maybe
W_skip [d_out, d_in]; in the same folder `config.yaml` (model_name) and `wandb-config.yaml`, in some `wanb-config.yaml`.

ReLU, from the MLP's input to its output.
"""

from __future__ import annotations

from typing import Any

from saehook.config import ReLU, SAEConfig
from saehook.formats.folder import Files
from saehook.formats.found import Contents, Provenance

NEEDED = {"W_enc", "W_dec", "b_enc", "b_dec"}


def matches(files: Files) -> bool:
    """Both matrices with the latents first."""
    if not NEEDED <= files.names <= NEEDED | {"W_skip"} or files.kind != "safetensors":
        return False
    W_enc, W_dec, b_enc = (files.tensor(name).shape for name in ("W_enc", "W_dec", "b_enc"))
    return W_enc[:1] == W_dec[:1] == b_enc


def read(files: Files) -> Contents:
    """See `saehook.formats`."""
    tensors = {
        "W_enc": files.tensor("W_enc").T,
        "W_dec": files.decoder(files.tensor("W_dec")),
        "b_enc": files.tensor("b_enc"),
        "b_dec": files.tensor("b_dec"),
    }
    if "W_skip" in files.names:
        tensors["W_skip"] = files.tensor("W_skip")
    config = SAEConfig(
        d_in=len(tensors["W_enc"]),
        d_sae=len(tensors["b_enc"]),
        activation=ReLU(),
        subtract_b_dec=False,
        d_out=len(tensors["b_dec"]),
        skip="W_skip" in files.names,
    )
    layer, data = files.in_path(r"layer_?(\d+)[^/]*$"), files.config("model_name") or {}
    lm: Any = data.get("model_name")
    if not isinstance(lm, str):
        size = files.in_path(r"qwen3-(\d+(?:\.\d+)?b)")
        lm = f"Qwen/Qwen3-{size.upper()}" if size else None
    provenance = Provenance(
        format="mwhanna",
        peer_site=f"blocks.{layer}.mlp.hook_in" if layer else None,
        peer_site_out=f"blocks.{layer}.hook_mlp_out" if layer else None,
        lm=lm,
        config=data,
        notes=() if layer else ("the file's name does not say its layer",),
    )
    return Contents(config, tensors, provenance)
