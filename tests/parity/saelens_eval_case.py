"""A language model, an SAE and ids from formulas, so that two environments measure the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

WIDTH, D_SAE, LAYER = 16, 40, 1
VOCAB = 60


def draw(seed: int, *shape: int) -> Tensor:
    """Normal numbers by formula: every build of torch draws the same."""
    u = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((-2 * (1 - u[0]).log()).sqrt() * (2 * torch.pi * u[1]).cos()).float()


def language_model() -> Any:
    """A Llama of three layers."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(lm.named_parameters())):
            values = draw(100 + i, *parameter.shape)
            parameter.copy_(1 + 0.3 * values if parameter.ndim == 1 else 0.4 * values)
    return lm


def sae_weights() -> dict[str, Tensor]:
    """A ReLU SAE, x_hat = relu((x - b_dec) W_enc + b_enc) W_dec + b_dec."""
    return {
        "W_enc": 0.3 * draw(1, WIDTH, D_SAE),
        "b_enc": 0.2 * draw(2, D_SAE),
        "W_dec": 0.3 * draw(3, D_SAE, WIDTH),
        "b_dec": 0.5 * draw(4, WIDTH),
    }


def ids() -> Tensor:
    """[6, 24], no special token among them."""
    return 3 + (torch.rand(6, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * (VOCAB - 3)).long()
