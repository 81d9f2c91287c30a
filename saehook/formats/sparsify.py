"""sparsify (EleutherAI): `<hookpoint>/cfg.json` and `sae.safetensors` with encoder.weight [d_sae, d_in], encoder.bias, W_dec
[d_sae, d_in], b_dec, and W_skip [d_out, d_in] with a skip connection; one folder up `config.json` says the LM.

b_dec is subtracted from the input unless `transcode`. `num_latents: 0` means d_in · expansion_factor. Activation `topk`,
`groupmax`, in old files with `signed` the k largest in magnitude.
"""

from __future__ import annotations

from typing import Any

import torch

from saehook.config import AbsTopK, Activation, GroupMax, SAEConfig, TopK
from saehook.errors import FormatError
from saehook.formats.folder import Files, whole_number
from saehook.formats.found import Contents, Provenance

NEEDED = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
KNOWN = set(
    "activation expansion_factor normalize_decoder num_latents k multi_topk skip_connection transcode d_in signed".split()
)
SAYS = (("k", "d_in"), ("k", "num_latents"), ("k", "expansion_factor"))
"""Keys by which its configuration is known."""
HOOKPOINT = r"((?:[\w.]+\.)?(?:layers|h)\.\d+(?:\.[\w.]+)?|embed_tokens|embed_in|wte)/[^/]*$"


def matches(files: Files) -> bool:
    """An encoder by torch's names, and a decoder by ours."""
    return {"encoder.weight", "W_dec"} <= files.names


def read(files: Files) -> Contents:
    """See `saehook.formats`."""
    keys = next((keys for keys in SAYS if files.config(*keys) is not None), None)
    if keys is None:
        raise FormatError(f"{files.path}: no configuration (cfg.json) beside it says k and how many latents there are.")
    data, path = files.config(*keys) or {}, files.config_path(*keys)
    transcode, skip = _flag(data, "transcode"), "W_skip" in files.names
    if _flag(data, "skip_connection") != skip:
        raise FormatError(f"{path}: skip_connection is {data.get('skip_connection')!r}, and the weights say {skip}.")
    files.expect(NEEDED, ["W_skip"])
    tensors = {
        "W_enc": files.tensor("encoder.weight").T,
        "b_enc": files.tensor("encoder.bias"),
        "W_dec": files.decoder(files.tensor("W_dec")),
        "b_dec": files.tensor("b_dec"),
    }
    d_in, k = whole_number(data, "d_in", path, len(tensors["W_enc"])), whole_number(data, "k", path)
    if data.get("num_latents"):
        d_sae = whole_number(data, "num_latents", path)
    else:
        d_sae = d_in * whole_number(data, "expansion_factor", path)
    notes = []
    if skip:
        tensors["W_skip"] = files.tensor("W_skip")
        if not transcode:
            tensors["b_enc"] = _without_b_dec(tensors)
            notes.append("an SAE with a skip map: read as a transcoder of one site, with b_dec folded into b_enc")
    hook = files.in_path(HOOKPOINT)
    if hook is None:
        notes.append("the folder's name is no hookpoint, so that its site is not known")
    run = files.config("sae", "batch_size") or files.config("model") or {}
    lm = run.get("model") if isinstance(run.get("model"), str) else None
    is_transcoder = transcode or skip
    config = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        activation=_activation(data, k, path),
        subtract_b_dec=not is_transcoder,
        d_out=len(tensors["b_dec"]) if is_transcoder else None,
        skip=skip,
    )
    site = f"{hook}.input" if hook and transcode else hook
    provenance = Provenance(
        format="sparsify",
        peer_site=site,
        peer_site_out=hook if is_transcoder else None,
        lm=lm,
        config=data,
        unknown=tuple(sorted(set(data) - KNOWN)),
        notes=tuple(notes),
    )
    return Contents(config, tensors, provenance)


def _flag(data: dict[str, Any], name: str) -> bool:
    value = data.get(name, False)
    if not isinstance(value, bool):
        raise FormatError(f"{name} is {value!r}; true or false is expected.")
    return value


def _activation(data: dict[str, Any], k: int, path: Any) -> Activation:
    name = data.get("activation", "topk")
    if name == "groupmax":
        return GroupMax(k=k)
    if name != "topk":
        raise FormatError(f"{path}: activation {name!r} is unknown; 'topk' and 'groupmax' are read.")
    return AbsTopK(k=k) if _flag(data, "signed") else TopK(k=k)


def _without_b_dec(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """b_enc of the encoder that sees x instead of x - b_dec."""
    shift = tensors["b_dec"].double() @ tensors["W_enc"].double()
    return (tensors["b_enc"].double() - shift).float()
