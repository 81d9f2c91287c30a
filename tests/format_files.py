"""Small files in the layouts of those published SAEs whose code installs from nowhere, and what each computes, written out.

Names, shapes and folders are those of the published files; the numbers are random.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, D_OUT, K = 10, 24, 7, 4
Rule = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x → (acts, x_hat)."""


@dataclass(frozen=True)
class Written:
    """A file and what is to be found in it."""

    path: Path
    """What `load_sae` is given."""
    rule: Rule
    format: str
    site: str | None
    lm: str | None
    site_out: str | None = None


def numbers(*shape: int, positive: bool = False) -> Tensor:
    return torch.rand(*shape) * 0.4 if positive else torch.randn(*shape) * 0.4


def jumprelu(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | float) -> Tensor:
    pre = x @ W_enc + b_enc
    return pre.relu() * (pre > threshold)


def top_k(pre: Tensor) -> Tensor:
    acts = pre.relu()
    values, indices = acts.topk(K, dim=-1)
    return torch.zeros_like(acts).scatter_(-1, indices, values)


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True)
    std = (x - mean).std(-1, keepdim=True)
    return (x - mean) / (std + 1e-5), mean, std


def gemma_scope(root: Path, kind: str = "res", *, compressed: bool = False) -> Written:
    """`kind`: res, mlp, att, transcoders or embedding."""
    embedding = kind == "embedding"
    place = "embedding" if embedding else "layer_12"
    folder = root / f"gemma-scope-2b-pt-{'res' if embedding else kind}" / place / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True)
    d_out = D_OUT if kind == "transcoders" else D_IN
    p = {
        "W_enc": numbers(D_IN, D_SAE), "W_dec": numbers(D_SAE, d_out), "b_enc": numbers(D_SAE), "b_dec": numbers(d_out),
        "threshold": numbers(D_SAE, positive=True),
    }  # fmt: skip
    arrays = {name: tensor.numpy() for name, tensor in p.items()}
    if compressed:
        np.savez_compressed(folder / "params.npz", **arrays)  # pyright: ignore[reportArgumentType]
    else:
        np.savez(folder / "params.npz", **arrays)  # pyright: ignore[reportArgumentType]
    scale = D_IN**0.5 if embedding else 1.0

    def rule(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = jumprelu(x / scale, p["W_enc"], p["b_enc"], p["threshold"])
        return acts, (acts @ p["W_dec"] + p["b_dec"]) * scale

    sites = {
        "res": "layers.12.resid_post", "mlp": "layers.12.mlp_out", "att": "layers.12.attn_z", "transcoders": None,
        "embedding": "layers.0.resid_pre",
    }  # fmt: skip
    out = "layers.12.mlp_out" if kind == "transcoders" else None
    return Written(folder, rule, "gemma_scope", sites[kind], "google/gemma-2-2b", out)


def gemma_scope_2(root: Path, kind: str = "resid_post", *, config: bool = True) -> Written:
    """`kind`: resid_post, attn_out, mlp_out, transcoder or transcoder_affine."""
    folder = root / "gemma-scope-2-1b-pt" / kind / "layer_3_width_16k_l0_small"
    folder.mkdir(parents=True)
    is_transcoder = kind.startswith("transcoder")
    d_out = D_OUT if is_transcoder else D_IN
    p = {
        "w_enc": numbers(D_IN, D_SAE), "w_dec": numbers(D_SAE, d_out), "b_enc": numbers(D_SAE), "b_dec": numbers(d_out),
        "threshold": numbers(D_SAE, positive=True),
    }  # fmt: skip
    if kind == "transcoder_affine":
        p["affine_skip_connection"] = numbers(D_IN, d_out)
    save_file(p, folder / "params.safetensors")
    points = {
        "resid_post": "model.layers.3.output",
        "attn_out": "model.layers.3.self_attn.o_proj.input",
        "mlp_out": "model.layers.3.post_feedforward_layernorm.output",
    }
    data: dict[str, Any] = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": points.get(kind),
    }
    if is_transcoder:
        data |= {
            "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output", "hf_hook_point_out": points["mlp_out"],
            "affine_connection": kind == "transcoder_affine",
        }  # fmt: skip
    if config:
        (folder / "config.json").write_text(json.dumps(data))

    def rule(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = jumprelu(x, p["w_enc"], p["b_enc"], p["threshold"])
        x_hat = acts @ p["w_dec"] + p["b_dec"]
        return acts, x_hat + x @ p["affine_skip_connection"] if kind == "transcoder_affine" else x_hat

    kinds = {"resid_post": "resid_post", "attn_out": "attn_z", "mlp_out": "mlp_out"}
    site, out = f"layers.3.{kinds.get(kind, 'mlp_in')}", "layers.3.mlp_out" if is_transcoder else None
    return Written(folder, rule, "gemma_scope_2", site, "google/gemma-3-1b-pt", out)


def openai(root: Path, activation: str = "TopK") -> Written:
    """As `Autoencoder.state_dict()` has it, with the key that its own reader trips over."""
    folder = root / "gpt2-small" / "resid_delta_mlp_v5_32k" / "autoencoders"
    folder.mkdir(parents=True)
    p: dict[str, Any] = {
        "pre_bias": numbers(D_IN), "latent_bias": numbers(D_SAE), "encoder.weight": numbers(D_SAE, D_IN),
        "decoder.weight": numbers(D_IN, D_SAE), "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "latents_activation_frequency": torch.ones(D_SAE), "latents_mean_square": torch.zeros(D_SAE),
        "activation": activation, "activation_state_dict": {},
    }  # fmt: skip
    if activation == "TopK":
        p |= {
            "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
            "activation.k": K,
            "activation.postact_fn": "ReLU",
        }
    torch.save(p, folder / "6.pt")

    def rule(x: Tensor) -> tuple[Tensor, Tensor]:
        x, mean, std = layer_norm(x) if activation == "TopK" else (x, 0.0, 1.0)
        pre = (x - p["pre_bias"]) @ p["encoder.weight"].T + p["latent_bias"]
        acts = top_k(pre) if activation == "TopK" else pre.relu()
        return acts, (acts @ p["decoder.weight"].T + p["pre_bias"]) * std + mean

    return Written(folder / "6.pt", rule, "openai", "layers.6.mlp_out", "openai-community/gpt2")


def batchtopk_repository(root: Path, kind: str = "topk", *, unit_norm: bool = True) -> Written:
    """`kind`: vanilla, topk, batchtopk or jumprelu."""
    folder = root / "checkpoints" / "gpt2_blocks.8.hook_resid_pre_24_topk_4_0.0003_1000"
    folder.mkdir(parents=True)
    p = {"W_enc": numbers(D_IN, D_SAE), "W_dec": numbers(D_SAE, D_IN), "b_enc": numbers(D_SAE), "b_dec": numbers(D_IN)}
    if kind == "jumprelu":
        p["jumprelu.log_threshold"] = numbers(D_SAE) - 1
    torch.save(p, folder / "sae.pt")
    data = {
        "seed": 49, "batch_size": 4096, "lr": 3e-4, "dtype": "torch.float32", "model_name": "gpt2-small",
        "site": "resid_pre", "layer": 8, "act_size": D_IN, "dict_size": D_SAE, "device": "cuda:0", "input_unit_norm": unit_norm,
        "sae_type": kind, "hook_point": "blocks.8.hook_resid_pre", "top_k": K, "bandwidth": 0.001,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(data, indent=4))

    def rule(x: Tensor) -> tuple[Tensor, Tensor]:
        x, mean, std = layer_norm(x) if unit_norm else (x, 0.0, 1.0)
        centred = x if kind == "jumprelu" else x - p["b_dec"]
        pre = centred @ p["W_enc"]
        match kind:
            case "topk":
                acts = top_k(pre)
            case "batchtopk":
                acts = pre.relu() * (pre > 0.3)
            case "jumprelu":
                acts = jumprelu(centred, p["W_enc"], p["b_enc"], p["jumprelu.log_threshold"].exp())
            case _:
                acts = (pre + p["b_enc"]).relu()
        return acts, (acts @ p["W_dec"] + p["b_dec"]) * std + mean

    return Written(folder, rule, "batchtopk_repository", "layers.8.resid_pre", "gpt2-small")


def llama_scope(root: Path) -> Written:
    folder = root / "Llama3_1-8B-Base-LXM-8x" / "Llama3_1-8B-Base-L5M-8x"
    (folder / "checkpoints").mkdir(parents=True)
    p = {
        "encoder.weight": numbers(D_SAE, D_IN), "encoder.bias": numbers(D_SAE), "decoder.weight": numbers(D_IN, D_SAE),
        "decoder.bias": numbers(D_IN),
    }  # fmt: skip
    p = {name: tensor.bfloat16() for name, tensor in p.items()}
    save_file(p, folder / "checkpoints" / "final.safetensors")
    data = {
        "hook_point_in": "blocks.5.hook_mlp_out", "hook_point_out": "blocks.5.hook_mlp_out", "d_model": D_IN, "d_sae": D_SAE,
        "expansion_factor": 2.4, "act_fn": "jumprelu", "jump_relu_threshold": 0.3,
        "dataset_average_activation_norm": {"in": 2.0, "out": 2.0},
    }  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(data))
    scale = D_IN**0.5 / 2.0

    def rule(x: Tensor) -> tuple[Tensor, Tensor]:
        q = {name: tensor.float() for name, tensor in p.items()}
        acts = jumprelu(x * scale, q["encoder.weight"].T, q["encoder.bias"], 0.3 * scale)
        return acts, (acts @ q["decoder.weight"].T + q["decoder.bias"]) / scale

    return Written(folder, rule, "llama_scope", "layers.5.mlp_out", "meta-llama/Llama-3.1-8B")


def llama_scope_r1(root: Path) -> Written:
    folder = root / "Llama-Scope-R1-Distill" / "400M-Slimpajama-400M-OpenR1-Math-220k" / "L5R"
    folder.mkdir(parents=True)
    p = {
        "encoder.weight": numbers(2 * D_IN, D_IN), "encoder.bias": numbers(2 * D_IN), "decoder.weight": numbers(D_IN, 2 * D_IN),
        "decoder.bias": numbers(D_IN), "log_jumprelu_threshold": numbers(2 * D_IN) - 1,
    }  # fmt: skip
    save_file(p, folder / "sae_weights.safetensors")
    hook = "blocks.5.hook_resid_post"
    data = {"sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "d_model": D_IN, "expansion_factor": 2}
    (folder / "config.json").write_text(json.dumps(data))

    def rule(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = jumprelu(x, p["encoder.weight"].T, p["encoder.bias"], p["log_jumprelu_threshold"].exp())
        return acts, acts @ p["decoder.weight"].T + p["decoder.bias"]

    lm = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    return Written(folder, rule, "llama_scope", "layers.5.resid_post", lm)


def qwen_scope(root: Path) -> Written:
    folder = root / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    folder.mkdir(parents=True)
    p = {"W_enc": numbers(D_SAE, D_IN), "W_dec": numbers(D_IN, D_SAE), "b_enc": numbers(D_SAE), "b_dec": numbers(D_IN)}
    for layer in (0, 5):
        torch.save(p, folder / f"layer{layer}.sae.pt")

    def rule(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = top_k(x @ p["W_enc"].T + p["b_enc"])
        return acts, acts @ p["W_dec"].T + p["b_dec"]

    return Written(folder / "layer5.sae.pt", rule, "qwen_scope", "layers.5.resid_post", "Qwen/Qwen3-1.7B-Base")


def goodfire(root: Path) -> Written:
    root.mkdir(parents=True, exist_ok=True)
    p = {
        "encoder_linear.weight": numbers(D_SAE, D_IN), "encoder_linear.bias": numbers(D_SAE),
        "decoder_linear.weight": numbers(D_IN, D_SAE), "decoder_linear.bias": numbers(D_IN),
    }  # fmt: skip
    path = root / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    torch.save(p, path)

    def rule(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = (x @ p["encoder_linear.weight"].T + p["encoder_linear.bias"]).relu()
        return acts, acts @ p["decoder_linear.weight"].T + p["decoder_linear.bias"]

    return Written(path, rule, "goodfire", "layers.19.resid_post", "meta-llama/Llama-3.1-8B-Instruct")


def mwhanna(root: Path) -> Written:
    folder = root / "qwen3-1.7b-transcoders"
    folder.mkdir(parents=True)
    p = {"W_enc": numbers(D_SAE, D_IN), "W_dec": numbers(D_SAE, D_IN), "b_enc": numbers(D_SAE), "b_dec": numbers(D_IN)}
    for layer in (2, 17):
        save_file(p, folder / f"layer_{layer}.safetensors")
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"model_name": "Qwen/Qwen3-1.7B", "model_kind": "transcoder_set"})
    )
    (folder / "wanb-config.yaml").write_text(
        yaml.safe_dump({"d_model": {"value": D_IN}, "d_feature": {"value": D_SAE}})
    )

    def rule(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = (x @ p["W_enc"].T + p["b_enc"]).relu()
        return acts, acts @ p["W_dec"] + p["b_dec"]

    path = folder / "layer_17.safetensors"
    return Written(path, rule, "mwhanna", "layers.17.mlp_in", "Qwen/Qwen3-1.7B", "layers.17.mlp_out")


CASES: dict[str, Callable[[Path], Written]] = {
    **{
        f"gemma_scope {k}": lambda root, k=k: gemma_scope(root, k)
        for k in ("res", "mlp", "att", "transcoders", "embedding")
    },
    "gemma_scope compressed": lambda root: gemma_scope(root, compressed=True),
    **{
        f"gemma_scope_2 {k}": lambda root, k=k: gemma_scope_2(root, k)
        for k in ("resid_post", "attn_out", "mlp_out", "transcoder", "transcoder_affine")
    },
    "gemma_scope_2 without configuration": lambda root: gemma_scope_2(root, "attn_out", config=False),
    "openai TopK": openai,
    "openai ReLU": lambda root: openai(root, "ReLU"),
    **{
        f"batchtopk_repository {k}": lambda root, k=k: batchtopk_repository(root, k)
        for k in ("vanilla", "topk", "jumprelu")
    },
    "batchtopk_repository as it comes": lambda root: batchtopk_repository(root, unit_norm=False),
    "llama_scope": llama_scope,
    "llama_scope R1": llama_scope_r1,
    "qwen_scope": qwen_scope,
    "goodfire": goodfire,
    "mwhanna": mwhanna,
}
"""Every layout once."""
