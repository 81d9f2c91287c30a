"""Gemma Scope (Gemma 2): `layer_L/width_W/average_l0_X/params.npz` with W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_enc, b_dec
and threshold [d_sae]; no configuration, so that LM and site are those of the repository's name and the folders.

JumpReLU; b_dec is not subtracted from the input. `mlp` is the MLP's output behind its norm, `att` the heads before the output
projection, `embedding` sees the embeddings before they are multiplied by sqrt(d_in). Transcoders read the MLP's input inside its
norm.
"""

from __future__ import annotations

from saehook.config import JumpReLU, SAEConfig
from saehook.formats.checks import d_in_of
from saehook.formats.folder import Files
from saehook.formats.folding import fold_input_scale
from saehook.formats.found import Contents, Provenance

NAMES = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
SHORT = {"wenc": "w_enc", "w_e": "w_enc", "wdec": "w_dec", "w_d": "w_dec", "b_e": "b_enc", "b_d": "b_dec"}
"""Spellings in some of the transcoders."""
HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


def _names(files: Files) -> dict[str, str]:
    """Name in the file by ours."""
    lower = {name.lower().replace("benc", "b_enc").replace("bdec", "b_dec"): name for name in files.names}
    lower = {SHORT.get(name, name): own for name, own in lower.items()}
    return {ours: lower[name] for name, ours in NAMES.items() if name in lower}


def matches(files: Files) -> bool:
    """The five arrays of an npz file."""
    return files.kind == "npz" and len(_names(files)) == len(NAMES)


def read(files: Files) -> Contents:
    """See `saehook.formats`."""
    own = _names(files)
    files.expect(own.values())
    tensors = {ours: files.tensor(name) for ours, name in own.items() if ours != "W_dec"}
    tensors["W_dec"] = files.decoder(files.tensor(own["W_dec"]))
    d_in, d_out = d_in_of(tensors), len(tensors["b_dec"])
    layer, kind = files.in_path(r"layer_(\d+)"), files.in_path(r"gemma-scope-\w+-(?:pt|it)-(res|mlp|att|transcoders)")
    size, tuning = files.in_path(r"gemma-scope-(\d+b)-(?:pt|it)"), files.in_path(r"gemma-scope-\d+b-(pt|it)")
    lm = f"google/gemma-2-{size}{'-it' if tuning == 'it' else ''}" if size else None
    notes = []
    embedding = files.in_path(r"/(embedding)/") is not None
    is_transcoder = kind == "transcoders" or d_in != d_out
    site, site_out = None, None
    if embedding:
        site = "blocks.0.hook_resid_pre"
        tensors = fold_input_scale(tensors, d_in**-0.5)
        notes.append(
            "of embeddings before they are multiplied by sqrt(d_in), which is folded: it reads the stream itself"
        )
    elif is_transcoder and layer:
        site, site_out = f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out"
    elif layer and kind:
        site = f"blocks.{layer}.{HOOKS[kind]}"
    else:
        notes.append(
            "neither file nor path says its site: the folders of Gemma Scope do (gemma-scope-2b-pt-res/layer_12/..)"
        )
    config = SAEConfig(
        d_in=d_in,
        d_sae=len(tensors["b_enc"]),
        activation=JumpReLU(),
        subtract_b_dec=False,
        d_out=d_out if is_transcoder else None,
    )
    provenance = Provenance(format="gemma_scope", peer_site=site, peer_site_out=site_out, lm=lm, notes=tuple(notes))
    return Contents(config, tensors, provenance)
