"""An SAE of ours as one of SAEBench's (`pip install sae-bench`; Karvonen et al. 2025), for its evaluations:

    from sae_bench.evals.core import main as core
    from saehook.adapters.saebench import as_saebench

    theirs = as_saebench(saehook.load_sae("runs/mine"), model_name="pythia-70m-deduped")
    assert theirs.check_decoder_norms()
    core.multiple_evals(selected_saes=[("mine", theirs)], ...)

That package is imported when `as_saebench` is called, and not before.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from saehook.config import BatchTopK, JumpReLU, ReLU, TopK
from saehook.errors import ArgumentError
from saehook.sae import SAE

_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "mlp_act": "mlp.hook_post",
}
"""TransformerLens' name of each kind of site within a block."""


def hook_of(site: str) -> tuple[str, int]:
    """TransformerLens' hook and layer of one of our sites: `layers.3.resid_post` is `("blocks.3.hook_resid_post", 3)`.

    Raises:
        ArgumentError: the site is a module path, or of a kind that TransformerLens has no hook for.
    """
    found = re.fullmatch(r"layers\.(\d+)\.(\w+)", site)
    if found is None or found[2] not in _HOOKS:
        raise ArgumentError(
            f"the site {site!r} has no hook in TransformerLens, which SAEBench runs on; those of {', '.join(_HOOKS)} have "
            "one. Name it with hook_name= and hook_layer=."
        )
    return f"blocks.{found[1]}.{_HOOKS[found[2]]}", int(found[1])


def unit_decoder(sae: SAE) -> SAE:
    """The same function with decoder rows of length 1, in float32: activations grow by the length that is taken off.

    Rows of length 0 become unit vectors whose latent never fires.

    Raises:
        ArgumentError: a TopK whose rows have several lengths, since its choice depends on them; an SAE that
            normalises each token, whose reconstruction needs more than activations; a transcoder.
    """
    if sae.is_transcoder or sae.config.normalize != "none":
        what = "a transcoder" if sae.is_transcoder else "an SAE that normalises each token"
        raise ArgumentError(f"{what} does not decode from its activations alone, as SAEBench needs it.")
    W_dec = sae.W_dec.detach().float()
    norms = torch.linalg.vector_norm(W_dec, dim=-1)
    dead = norms == 0
    even = torch.allclose(norms[~dead], norms[~dead].mean().expand_as(norms[~dead]), rtol=2e-2)
    if isinstance(sae.config.activation, TopK) and not even:
        raise ArgumentError(
            "the decoder rows of this TopK have different lengths, and with rows of length 1 another k latents would be the "
            "largest. Train it anew, or convert it to thresholds."
        )
    length = torch.where(dead, 1.0, norms)
    with torch.no_grad():
        first = torch.zeros_like(W_dec[0])
        first[0] = 1.0
        made = SAE(sae.config, site=sae.site, device="meta")
        made.W_enc = torch.nn.Parameter(sae.W_enc.detach().float() * torch.where(dead, 0.0, length))
        made.b_enc = torch.nn.Parameter(torch.where(dead, -1.0, sae.b_enc.detach().float() * length))
        made.W_dec = torch.nn.Parameter(torch.where(dead[:, None], first, W_dec / length[:, None]))
        made.b_dec = torch.nn.Parameter(sae.b_dec.detach().float().clone())
        if sae.threshold is not None:
            made.threshold = torch.nn.Parameter(sae.threshold.detach().float().expand(sae.d_sae) * length)
    return made


def as_saebench(
    sae: SAE,
    *,
    model_name: str,
    hook_name: str | None = None,
    hook_layer: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The SAE as an `sae_bench.custom_saes.base_sae.BaseSAE`, on the SAE's device.

    Args:
        model_name: TransformerLens' name of the language model.
        hook_name, hook_layer: where it is attached; default: what the SAE's site is there.
        dtype: of weights and activations.

    Raises:
        ArgumentError: SAEBench is not installed; those of `unit_decoder` and `hook_of`.
    """
    try:
        from sae_bench.custom_saes.base_sae import BaseSAE  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ArgumentError(f"SAEBench cannot be imported ({error}). Install it: pip install sae-bench.") from None
    if hook_name is None or hook_layer is None:
        named, layer = hook_of(str(sae.site))
        hook_name, hook_layer = hook_name or named, layer if hook_layer is None else hook_layer
    return _adapter(BaseSAE)(unit_decoder(sae), model_name, hook_name, hook_layer, dtype)


def _adapter(base: Any) -> Any:
    """A subclass of that package's base class."""

    class SaehookSAE(base):
        """Encodes and decodes by our rules; the parameters that SAEBench reads are those of our SAE."""

        def __init__(self, sae: SAE, model_name: str, hook_name: str, hook_layer: int, dtype: torch.dtype) -> None:
            super().__init__(sae.d_in, sae.d_sae, model_name, hook_layer, sae.device, dtype, hook_name)
            self.sae = sae.to(dtype)
            self.W_enc, self.b_enc, self.W_dec, self.b_dec = sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec
            self.cfg.architecture = _NAMES[type(sae.config.activation)]
            self.cfg.architecture_str = self.cfg.architecture  # its core evaluation (0.6.0) asks for this name
            self.cfg.apply_b_dec_to_input = sae.config.subtract_b_dec

        def encode(self, x: Tensor) -> Tensor:
            return self.sae.encode(x)

        def decode(self, feature_acts: Tensor) -> Tensor:
            return self.sae.decode(feature_acts)

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.encode(x))

    return SaehookSAE


_NAMES = {ReLU: "standard", TopK: "topk", BatchTopK: "jumprelu", JumpReLU: "jumprelu"}
