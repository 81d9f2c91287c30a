"""OpenAI's sparse_autoencoder: `gpt2-small/{location}/autoencoders/{layer}.pt`, a state dict with encoder.weight [d_sae, d_in],
decoder.weight [d_in, d_sae], pre_bias [d_in], latent_bias [d_sae], the strings `activation` and `activation_state_dict`, and
counters of its training.

TopK (version 5) normalises each token: x - mean, divided by std + 1e-5, and undone after decoding; ReLU does not.
"""

from __future__ import annotations

from typing import Any

from saehook.config import Activation, ReLU, SAEConfig, TopK
from saehook.errors import FormatError
from saehook.formats.folder import Files, as_whole
from saehook.formats.found import Contents, Provenance

NEEDED = {"encoder.weight", "pre_bias", "latent_bias"}
COUNTERS = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
HOOKS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}


def matches(files: Files) -> bool:
    """The names of the two biases."""
    return files.names >= NEEDED


def read(files: Files) -> Contents:
    """See `saehook.formats`."""
    own = {name for name in files.names if name.startswith("activation")}
    files.expect(NEEDED, {"decoder.weight", "decoder.linear.weight"} | COUNTERS | own)
    encoder = files.tensor("encoder.weight")
    decoder = files.tensor("decoder.weight").T if "decoder.weight" in files.names else encoder  # tied
    activation = _activation(files)
    tensors = {
        "W_enc": encoder.T,
        "W_dec": files.decoder(decoder),
        "b_enc": files.tensor("latent_bias"),
        "b_dec": files.tensor("pre_bias"),
    }
    config = SAEConfig(
        d_in=len(tensors["b_dec"]),
        d_sae=len(tensors["b_enc"]),
        activation=activation,
        normalize="layer_norm" if isinstance(activation, TopK) else "none",
    )
    location, layer = files.in_path(rf"({'|'.join(HOOKS)})"), files.in_path(r"/(\d+)\.\w+$")
    known = location is not None and layer is not None
    notes = ("trained on 64 tokens of context",) if known else ("the path does not say its site (location and layer)",)
    provenance = Provenance(
        format="openai",
        peer_site=f"blocks.{layer}.{HOOKS[location]}" if known and location else None,
        lm="openai-community/gpt2" if files.in_path("(gpt2-small)") else None,
        config={name: files.entries[name] for name in sorted(own) if _plain(files.entries[name])},
        notes=notes,
    )
    return Contents(config, tensors, provenance)


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) or (isinstance(value, dict) and all(map(_plain, value.values())))


def _activation(files: Files) -> Activation:
    name = files.entries.get("activation", "ReLU")
    if name == "ReLU":
        return ReLU()
    state = files.entries.get("activation_state_dict")
    state = state if isinstance(state, dict) else {}
    k = as_whole(state.get("k", files.entries.get("activation.k")))
    after = state.get("postact_fn", files.entries.get("activation.postact_fn", "ReLU"))
    if name != "TopK" or after != "ReLU":
        raise FormatError(
            f"{files.path}: the activation {name!r} with {after!r} is not supported; ReLU and TopK with ReLU are."
        )
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise FormatError(f"{files.path}: k of its TopK is {k!r}; a whole number of at least 1 is expected.")
    return TopK(k=k)
