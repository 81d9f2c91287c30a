"""Records formats/saelens/*: small SAEs as the package `sae-lens` (6.54.12) writes them, and what it computes with them.

In an environment of its own: `pip install torch==2.13.0 sae-lens`, then `python tests/parity/record_saelens.py`. Each folder
holds the peer's own files and `recorded.safetensors` (x, acts, x_hat). Nothing of that package is in this repository.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE  # pyright: ignore[reportMissingImports]
from sae_lens.registry import get_sae_class, get_sae_training_class  # pyright: ignore[reportMissingImports]
from sae_lens.saes.sae import SAEMetadata  # pyright: ignore[reportMissingImports]
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening  # pyright: ignore
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).with_name("formats") / "saelens"
D_IN, D_SAE, D_OUT, N, K = 10, 24, 7, 8, 4
METADATA = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_pre", "prepend_bos": True}
OUT = {**METADATA, "hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}


def randomised(sae: Any) -> Any:
    """All parameters random: no zero bias, no tied encoder, no unit norms."""
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(
                torch.rand_like(parameter) * 0.4 if name == "threshold" else torch.randn_like(parameter) * 0.4
            )
    return sae


def new(architecture: str, metadata: dict[str, Any] | None = None, **options: Any) -> Any:
    kind, config = get_sae_class(architecture)
    return randomised(kind(config(d_in=D_IN, d_sae=D_SAE, metadata=SAEMetadata(**(metadata or METADATA)), **options)))


def new_training(architecture: str, **options: Any) -> Any:
    kind, config = get_sae_training_class(architecture)
    sae = randomised(kind(config(d_in=D_IN, d_sae=D_SAE, k=K, metadata=SAEMetadata(**METADATA), **options)))
    sae.topk_threshold = torch.tensor(0.31, dtype=torch.float64)
    return sae


def record(name: str, sae: Any) -> None:
    """What the peer makes of random tokens, beside its files."""
    x = torch.randn(N, D_IN) * 2 + 0.5
    with torch.no_grad():
        acts = sae.encode(x)
        x_hat = sae(x)
    save(FOLDER / name, x=x, acts=acts, x_hat=x_hat)


def save(folder: Path, **tensors: Tensor) -> None:
    said = {"package": f"sae-lens {version('sae-lens')}"}
    save_file({n: t.float().contiguous() for n, t in tensors.items()}, folder / "recorded.safetensors", metadata=said)


def plain(name: str, sae: Any, change: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
    """Written by the peer, its configuration maybe changed to an older one, read by the peer, recorded."""
    sae.save_model(FOLDER / name)
    path = FOLDER / name / "cfg.json"
    if change is not None:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    record(name, SAE.load_from_disk(FOLDER / name))


def version_5(more: dict[str, Any], drop: tuple[str, ...] = ()) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A flat configuration as versions before 6 wrote it."""

    def change(data: dict[str, Any]) -> dict[str, Any]:
        flat = {key: value for key, value in data.items() if key not in ("metadata", "reshape_activations")}
        flat |= {
            "model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre", "hook_layer": 8, "hook_head_index": None,
            "activation_fn_str": "relu", "activation_fn_kwargs": {}, "finetuning_scaling_factor": False, "context_size": 128,
            "sae_lens_training_version": "5.1.0", "prepend_bos": True, "dataset_path": "openwebtext", **more,
        }  # fmt: skip
        return {key: value for key, value in flat.items() if key not in drop}

    return change


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(0)
    plain("standard", new("standard"))
    plain("standard_no_b_dec", new("standard", apply_b_dec_to_input=False))
    plain("topk", new("topk", k=K))
    plain("topk_rescaled", new("topk", k=K, rescale_acts_by_decoder_norm=True))
    plain("abstopk", new("abstopk", k=K))
    plain("jumprelu", new("jumprelu"))
    plain("gated", new("gated"))
    plain("layer_norm", new("topk", k=K, normalize_activations="layer_norm"))
    plain("constant_norm", new("standard", normalize_activations="constant_norm_rescale"))
    for architecture in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        plain(architecture, new(architecture, OUT, d_out=D_OUT, apply_b_dec_to_input=False))
    plain("version_5", new("standard"), version_5({"normalize_activations": False}, ("architecture",)))
    more = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "architecture": "standard"}
    plain("version_5_topk", new("topk", k=K), version_5(more, ("k", "rescale_acts_by_decoder_norm")))
    plain("version_4_jumprelu", new("jumprelu"), version_5({"hook_point": "blocks.8.hook_mlp_out"}, ("hook_name",)))
    for architecture, options in (("batchtopk", {}), ("matryoshka_batchtopk", {"matryoshka_widths": [8, D_SAE]})):
        sae = new_training(architecture, **options)
        sae.save_inference_model(FOLDER / architecture)
        inference = SAE.load_from_disk(FOLDER / architecture)
        record(architecture, inference)
        sae = new_training(architecture, **options)
        sae.save_model(FOLDER / f"{architecture}_checkpoint")
        sae.save_inference_model(FOLDER / "temporary")
        record(f"{architecture}_checkpoint", SAE.load_from_disk(FOLDER / "temporary"))
        shutil.rmtree(FOLDER / "temporary")
    scaled()


def scaled() -> None:
    """Training checkpoints whose input is scaled or whitened, with the file that says how."""
    sae = new("jumprelu", normalize_activations="expected_average_only_in")
    sae.save_model(FOLDER / "scaled_checkpoint")
    ActivationScaler(scaling_factor=0.37).save(str(FOLDER / "scaled_checkpoint" / "activation_scaler.json"))
    sae.fold_activation_norm_scaling_factor(0.37)
    record("scaled_checkpoint", sae)
    for subtract in (True, False):
        name = f"whitened_checkpoint{'' if subtract else '_no_b_dec'}"
        sae = new("standard", normalize_activations="covariance_whitening", apply_b_dec_to_input=subtract)
        sae.save_model(FOLDER / name)
        matrix = torch.randn(D_IN, D_IN, dtype=torch.float64) + 3 * torch.eye(D_IN, dtype=torch.float64)
        whitening = ActivationWhitening(torch.randn(D_IN, dtype=torch.float64), matrix, torch.linalg.inv(matrix))
        ActivationScaler(whitening=whitening).save(str(FOLDER / name / "activation_scaler.json"))
        sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
        record(name, sae)


if __name__ == "__main__":
    main()
