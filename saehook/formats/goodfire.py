"""Goodfire: one `.pt` or `.pth` with encoder_linear.weight [d_sae, d_in], encoder_linear.bias, decoder_linear.weight [d_in, d_sae],
decoder_linear.bias. ReLU on the output of the layer that the file's name ends with (`Llama-3.1-8B-Instruct-SAE-l19`); b_dec is
not subtracted.
"""

from __future__ import annotations

from saehook.config import ReLU, SAEConfig
from saehook.formats.folder import Files
from saehook.formats.found import Contents, Provenance

NEEDED = {"encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias"}


def matches(files: Files) -> bool:
    """Its names."""
    return {"encoder_linear.weight", "decoder_linear.weight"} <= files.names


def read(files: Files) -> Contents:
    """See `saehook.formats`."""
    files.expect(NEEDED)
    tensors = {
        "W_enc": files.tensor("encoder_linear.weight").T,
        "W_dec": files.decoder(files.tensor("decoder_linear.weight").T),
        "b_enc": files.tensor("encoder_linear.bias"),
        "b_dec": files.tensor("decoder_linear.bias"),
    }
    config = SAEConfig(d_in=len(tensors["b_dec"]), d_sae=len(tensors["b_enc"]), activation=ReLU(), subtract_b_dec=False)
    named, layer = files.in_path(r"([^/]+)-SAE-l\d+"), files.in_path(r"-SAE-l(\d+)")
    provenance = Provenance(
        format="goodfire",
        peer_site=f"blocks.{layer}.hook_resid_post" if layer else None,
        lm=f"meta-llama/{named}" if named else None,
        notes=() if layer else ("the file's name does not say its layer",),
    )
    return Contents(config, tensors, provenance)
