"""SAEs in the layouts of other tools: `dictionary_learning` (`ae.pt` and `config.json`), `sparsify` (`cfg.json` and
`sae.safetensors`). Ours, which SAELens opens, is in `checkpoint`.

What a layout has no place for (statistics, the mask rule) is left out; what it cannot compute is refused. b_dec is folded into
b_enc where the other tool subtracts it and we do not, or the other way round: (x - b_dec) W_enc + b_enc is x W_enc + (b_enc -
b_dec W_enc).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saehook.checkpoint import save_sae
from saehook.config import Activation, BatchTopK, GroupMax, JumpReLU, ReLU, TopK
from saehook.errors import ArgumentError, MissingStatError
from saehook.files import atomic_write, atomically
from saehook.sae import SAE


def write_sae(sae: SAE, path: str | Path, layout: str = "saehook") -> Path:
    """Write an SAE into the folder `path` in a layout of `LAYOUTS`; files of the same names there are replaced.

    Raises:
        ArgumentError: an unknown layout, or an SAE that the layout has no place for; it says why.
        MissingStatError: a threshold is needed and missing.
        FileError: the folder cannot be written.
    """
    if layout not in LAYOUTS:
        raise ArgumentError(f"layout {layout!r} is unknown; expected {', '.join(LAYOUTS)}.")
    return LAYOUTS[layout](sae, Path(path))


def write_dictionary_learning(sae: SAE, path: Path) -> Path:
    """`ae.pt` and `config.json`, as dictionary_learning 0.1's `load_dictionary` takes them.

    | ours | class |
    |---|---|
    | ReLU | `AutoEncoder`; without b_dec on the input `AutoEncoderNew` |
    | TopK | `AutoEncoderTopK` |
    | BatchTopK with one threshold | `BatchTopKSAE` |
    | JumpReLU, BatchTopK with many thresholds | `JumpReluAutoEncoder` |

    `AutoEncoder.from_pretrained` scales latents so that decoder rows have norm 1, unless it is told `normalize_decoder=False`.
    """
    activation = sae.config.activation
    if sae.is_transcoder or sae.config.normalize != "none":
        what = "transcoders" if sae.is_transcoder else f"SAEs that normalise each token ({sae.config.normalize})"
        raise ArgumentError(f"dictionary_learning has no place for {what}. Write it with layout='saehook'.")
    tensors = _tensors(sae)
    one = sae.threshold is not None and bool((sae.threshold == sae.threshold.flatten()[0]).all())
    if isinstance(activation, ReLU):
        name, subtracts = ("AutoEncoder", True) if sae.config.subtract_b_dec else ("AutoEncoderNew", False)
    elif isinstance(activation, TopK):
        name, subtracts = "AutoEncoderTopK", True
    elif isinstance(activation, BatchTopK) and one:
        name, subtracts = "BatchTopKSAE", True
    elif isinstance(activation, (BatchTopK, JumpReLU)):
        name, subtracts = "JumpReluAutoEncoder", False
    else:
        raise _refused("dictionary_learning", activation)
    b_enc = _b_enc(sae, subtracts)
    if name == "JumpReluAutoEncoder":
        state = {**tensors, "b_enc": b_enc, "threshold": _threshold(sae)}
    else:
        b_dec = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
        state = {
            "encoder.weight": tensors["W_enc"].T.contiguous(),
            "encoder.bias": b_enc,
            "decoder.weight": tensors["W_dec"].T.contiguous(),
            b_dec: tensors["b_dec"],
        }
    trainer: dict[str, Any] = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae, "device": "cpu"}
    if isinstance(activation, (TopK, BatchTopK)) and name != "JumpReluAutoEncoder":
        threshold = _threshold(sae)[0] if isinstance(activation, BatchTopK) else torch.tensor(-1.0)  # -1: not set
        state |= {"k": torch.tensor(activation.k, dtype=torch.int32), "threshold": threshold.clone()}
        trainer["k"] = activation.k
    trainer |= _place(sae)
    with atomically(path / "ae.pt") as partial:
        torch.save(state, partial)
    atomic_write(
        path / "config.json", json.dumps({"trainer": trainer, "buffer": {"d_submodule": sae.d_in}}, indent=1) + "\n"
    )
    return path


def write_sparsify(sae: SAE, path: Path) -> Path:
    """`cfg.json` and `sae.safetensors`, as sparsify 1.3's `Sae.load_from_disk` takes them; call the folder by its hookpoint.

    TopK and GroupMax, and transcoders of them whose two sites are equally wide; sparsify knows no other activation.
    """
    activation = sae.config.activation
    if not isinstance(activation, (TopK, GroupMax)):
        raise _refused("sparsify", activation)
    if sae.config.normalize != "none":
        raise ArgumentError("sparsify has no place for SAEs that normalise each token. Write it with layout='saehook'.")
    if sae.d_out != sae.d_in:
        raise ArgumentError(f"sparsify writes what is as wide as it reads, not {sae.d_out} from {sae.d_in}.")
    tensors = _tensors(sae)
    state = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": _b_enc(sae, not sae.is_transcoder),
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    if sae.W_skip is not None:
        state["W_skip"] = sae.W_skip.detach().to("cpu", copy=True).contiguous()
    config = {
        "activation": "groupmax" if isinstance(activation, GroupMax) else "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": activation.k,
        "multi_topk": False,
        "skip_connection": sae.config.skip,
        "transcode": sae.is_transcoder,
        "d_in": sae.d_in,
    }
    with atomically(path / "sae.safetensors") as partial:
        save_file(state, partial)
    atomic_write(path / "cfg.json", json.dumps(config, indent=1) + "\n")
    return path


LAYOUTS: dict[str, Callable[[SAE, Path], Path]] = {
    "saehook": save_sae,
    "dictionary_learning": write_dictionary_learning,
    "sparsify": write_sparsify,
}
"""What writes each layout."""


def _refused(tool: str, activation: Activation) -> ArgumentError:
    return ArgumentError(f"{tool} has no place for the activation {activation}. Write it with layout='saehook'.")


def _tensors(sae: SAE) -> dict[str, Tensor]:
    """Copies of the weights on the CPU.

    Raises:
        ArgumentError: NaN or infinity among them.
    """
    tensors = {name: getattr(sae, name).detach().cpu().contiguous() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArgumentError(f"{name} holds NaN or infinity; the SAE is not written.")
    return tensors


def _b_enc(sae: SAE, subtracts: bool) -> Tensor:
    """b_enc for a tool that subtracts b_dec from the input, or does not."""
    b_enc = sae.b_enc.detach().cpu()
    if subtracts == sae.config.subtract_b_dec:
        return b_enc.clone()
    shift = (sae.b_dec.detach().cpu().double() @ sae.W_enc.detach().cpu().double()).to(b_enc.dtype)
    return b_enc + shift if subtracts else b_enc - shift


def _threshold(sae: SAE) -> Tensor:
    """[d_sae], float32."""
    if sae.threshold is None:
        kind = type(sae.config.activation).__name__
        raise MissingStatError(f"this {kind} has no threshold. Train it to the end, or call sae.set_threshold(value).")
    return sae.threshold.detach().float().cpu().expand(sae.d_sae).contiguous()


def _place(sae: SAE) -> dict[str, Any]:
    """Where it was trained, as dictionary_learning's `config.json` says it."""
    lm = sae.metadata.get("lm")
    place: dict[str, Any] = {"lm_name": lm.get("id")} if isinstance(lm, dict) else {}
    if match := re.fullmatch(r"layers\.(\d+)\.(\w+)", sae.site or ""):
        place |= {"layer": int(match[1]), "submodule_name": f"{match[2]}_layer_{match[1]}"}
    elif sae.site:
        place["submodule_name"] = sae.site
    return place
