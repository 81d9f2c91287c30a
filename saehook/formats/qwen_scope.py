"""Qwen Scope: `layer{L}.sae.pt` with W_enc [d_sae, d_in], W_dec [d_in, d_sae], b_enc, b_dec. No configuration: LM and k are
those of the repository's name, `SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`.

TopK on the output of the layer; b_dec is not subtracted.
"""

from __future__ import annotations

from saehook.config import SAEConfig, TopK
from saehook.errors import ArgumentError, FormatError
from saehook.formats.folder import Files
from saehook.formats.found import Contents, Provenance

NEEDED = {"W_enc", "W_dec", "b_enc", "b_dec"}


def matches(files: Files) -> bool:
    """The four tensors, the matrices as torch has them, or a path that says so."""
    if not files.names >= NEEDED or files.kind != "torch":
        return False
    if files.in_path("(SAE-Res-)") is not None:
        return True
    W_enc, W_dec, b_enc, b_dec = (files.tensor(name).shape for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    return W_enc == (*b_enc, *b_dec) and W_dec == (*b_dec, *b_enc) and b_enc != b_dec


def read(files: Files) -> Contents:
    """See `saehook.formats`."""
    files.expect(NEEDED)
    named, layer = files.in_path(r"SAE-Res-(.+?)-W\d+K-L0_\d+"), files.in_path(r"layer_?(\d+)[^/]*$")
    in_name = files.in_path(r"L0_(\d+)")
    k = files.known.get("k") or (int(in_name) if in_name else None)
    if k is None:
        raise FormatError(
            f"{files.path} does not say how many latents its TopK keeps, nor does its path (..-W32K-L0_50). Give k=."
        )
    tensors = {
        "W_enc": files.tensor("W_enc").T,
        "W_dec": files.decoder(files.tensor("W_dec").T),
        "b_enc": files.tensor("b_enc"),
        "b_dec": files.tensor("b_dec"),
    }
    try:
        config = SAEConfig(
            d_in=len(tensors["b_dec"]), d_sae=len(tensors["b_enc"]), activation=TopK(k=k), subtract_b_dec=False
        )
    except ArgumentError as error:
        raise FormatError(f"{files.path}: {error}") from None
    provenance = Provenance(
        format="qwen_scope",
        peer_site=f"model.layers.{layer}" if layer else None,
        lm=f"Qwen/{named}" if named else None,
        config={"k": k},
        notes=() if layer else ("the file's name does not say its layer",),
    )
    return Contents(config, tensors, provenance)
