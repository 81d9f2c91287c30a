"""Changes of parameters that leave the SAE's function as it is, to bring a peer's layout into ours.

Each takes tensors by our names and gives new ones in float32, where something changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saehook.errors import FormatError

Tensors = dict[str, Tensor]


def fold_gated(tensors: Tensors, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor) -> Tensors:
    """A gated encoder as the JumpReLU that it is equal to (Rajamanoharan et al. 2024a, section 3.2):
    W_enc exp(r_mag), b_mag, and a latent fires where that is above b_mag - exp(r_mag) b_gate."""
    gain = r_mag.float().exp()
    return tensors | {
        "W_enc": tensors["W_enc"].float() * gain,
        "b_enc": b_mag.float(),
        "threshold": b_mag.float() - gain * b_gate.float(),
    }


def fold_input_scale(tensors: Tensors, scale: float, scale_out: float | None = None) -> Tensors:
    """An SAE of scale · x as one of x, with the same activations; a transcoder's y may have another scale."""
    if not 0 < scale < float("inf"):
        raise FormatError(f"the scale of the input is {scale!r}; a finite number above 0 is expected.")
    out = scale if scale_out is None else scale_out
    changed = {
        "W_enc": tensors["W_enc"].float() * scale,
        "W_dec": tensors["W_dec"].float() / out,
        "b_dec": tensors["b_dec"].float() / out,
    }
    if "W_skip" in tensors:
        changed["W_skip"] = tensors["W_skip"].float() * (scale / out)
    return tensors | changed


def fold_data_scale(tensors: Tensors, scale: float) -> Tensors:
    """An SAE of x / scale as one of x, whose activations are larger by `scale` (dictionary_learning's scale_biases)."""
    if not 0 < scale < float("inf"):
        raise FormatError(f"the scale of the data is {scale!r}; a finite number above 0 is expected.")
    changed = {name: tensors[name].float() * scale for name in ("b_enc", "b_dec", "threshold") if name in tensors}
    return tensors | changed


def fold_decoder_norms(tensors: Tensors) -> Tensors:
    """Unit decoder rows; the activations become what they were times the rows' norms, as `rescale_acts_by_decoder_norm`
    selects by. A threshold is left as it is: it is in these units."""
    norms = torch.linalg.vector_norm(tensors["W_dec"].float(), dim=-1).clamp_min(1e-8)
    rows = tensors["W_dec"].float() / norms[:, None]
    if norms.device != tensors["W_enc"].device:  # only some rows of the decoder are there
        return tensors | {"W_dec": rows}
    return tensors | {
        "W_dec": rows,
        "W_enc": tensors["W_enc"].float() * norms,
        "b_enc": tensors["b_enc"].float() * norms,
    }


def fold_whitening(tensors: Tensors, mean: Tensor, matrix: Tensor, inverse: Tensor, subtract_b_dec: bool) -> Tensors:
    """An SAE of (x - mean) M, whose reconstruction goes back by M⁻¹, as one of x."""
    W_enc, W_dec, b_dec = (tensors[name].double() for name in ("W_enc", "W_dec", "b_dec"))
    W_enc = matrix.to(W_enc) @ W_enc
    changed = {
        "W_enc": W_enc.float(),
        "W_dec": (W_dec @ inverse.to(W_dec)).float(),
        "b_dec": (b_dec @ inverse.to(b_dec) + mean.to(b_dec)).float(),
    }
    if not subtract_b_dec:
        changed["b_enc"] = (tensors["b_enc"].double() - mean.to(W_enc) @ W_enc).float()
    return tensors | changed
