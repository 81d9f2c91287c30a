"""Tiny random language models, tokenizers and SAEs: everything offline, everything from a seed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from saehook.config import Activation, BatchTopK, JumpReLU, ReLU, SAEConfig, TopK
from saehook.kernels.row_sums import RowsParameter, gradient_rows
from saehook.sae import QUANTILE_LEVELS, SAE, LatentStats

BOS, EOS, PAD = 0, 1, 2
SPECIAL = (BOS, EOS, PAD)
FIRST_BYTE = 3
VOCAB = 300
CONTEXT = 64
WIDTH = 32
LAYERS = 3

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # heads together are wider than the residual stream: attn_z has a width of its own
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
}
_PHI3 = {**_LLAMA, "head_dim": 8}  # the fused projection of phi3 wants heads that fill the residual stream
_GEMMA = {**_LLAMA, "sliding_window": 16, "query_pre_attn_scalar": 8}
_NEOX = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 16}),
    "qwen2": ("qwen2", {**_LLAMA, "head_dim": 8}),
    "qwen3": ("qwen3", _LLAMA),
    "gemma": ("gemma", _LLAMA),
    "phi3": ("phi3", _PHI3),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3_text": ("gemma3_text", _GEMMA),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCAB,
            "n_embd": WIDTH,
            "n_inner": 48,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": CONTEXT,
            "initializer_range": 0.3,
        },
    ),
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_layers": LAYERS,
            "num_heads": 4,
            "max_position_embeddings": CONTEXT,
            "attention_types": [[["global"], LAYERS]],
            "initializer_range": 0.3,
        },
    ),
    "gpt_neox": ("gpt_neox", {**_NEOX, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "opt": (  # no row in the table of architectures
        "opt",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "init_std": 0.3,
        },
    ),
}
ARCHITECTURES = [name for name in CONFIGS if name != "opt"]


def build_lm(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A new random model; the same name and seed give the same weights."""
    kind, options = CONFIGS[name]
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = AutoConfig.for_model(kind, **options, **special, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in lm.parameters():
                if parameter.ndim == 1:  # norms and biases: random, so that no site equals another by accident
                    parameter.add_(0.3 * torch.randn_like(parameter))
            embedding = lm.get_input_embeddings()
            if embedding.padding_idx is not None:
                embedding.weight[embedding.padding_idx] = 0.2 * torch.randn(embedding.embedding_dim)
    lm.generation_config.eos_token_id = None  # rows end where a test wants them to
    return lm.to(dtype).eval()


@functools.cache
def byte_tokenizer(*, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, ids from `FIRST_BYTE`; BOS, EOS and PAD are 0, 1, 2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD} | {c: i + FIRST_BYTE for i, c in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=CONTEXT
    )


def random_ids(n: int, *, seed: int = 0, bos: bool = False) -> list[int]:
    """`n` ordinary ids (after a BOS if asked for)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_BYTE, VOCAB, (n,), generator=generator).tolist()
    return [BOS, *ids] if bos else ids


ACTIVATIONS: dict[str, Activation] = {
    "relu": ReLU(),
    "topk": TopK(k=6),
    "batchtopk": BatchTopK(k=6),
    "jumprelu": JumpReLU(),
}


def tiny_sae(
    d_in: int = WIDTH,
    *,
    d_sae: int = 48,
    activation: Activation | str = "relu",
    normalize: str = "none",
    subtract_b_dec: bool = True,
    site: str | None = None,
    seed: int = 0,
    stats: bool = True,
    dtype: torch.dtype = torch.float32,
) -> SAE:
    """A random SAE whose latents fire on about half of the tokens; every parameter is random."""
    kind = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    config = SAEConfig(d_in=d_in, d_sae=d_sae, activation=kind, normalize=normalize, subtract_b_dec=subtract_b_dec)
    sae = SAE(config, site=site)
    draw = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=draw) / d_in**0.5)
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=draw) / d_in**0.5)
        sae.b_enc.copy_(0.1 * torch.randn(sae.b_enc.shape, generator=draw))
        sae.b_dec.copy_(0.2 * torch.randn(sae.b_dec.shape, generator=draw))
    if isinstance(kind, (BatchTopK, JumpReLU)):
        sae.set_threshold(0.05 + 0.4 * torch.rand(d_sae, generator=draw))
    if stats:
        sae.stats = LatentStats(
            max_act=1.0 + torch.rand(d_sae, generator=draw),
            density=torch.rand(d_sae, generator=draw),
            mean_act=torch.rand(d_sae, generator=draw),
            tokens=1000,
            quantiles=torch.rand(d_sae, len(QUANTILE_LEVELS), generator=draw).sort(1).values,
            mean_error=0.1 * torch.randn(d_in, generator=draw),
        )
    return sae.to(dtype)


def identity_sae(d_in: int = WIDTH, *, site: str | None = None) -> SAE:
    """decode(encode(x)) = x exactly: one latent for each sign of each coordinate."""
    sae = SAE(SAEConfig(d_in=d_in, d_sae=2 * d_in, activation=ReLU()), site=site)
    eye = torch.eye(d_in)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def footprint(lm: nn.Module) -> tuple[Any, ...]:
    """What a library could leave behind on a torch model."""
    hooks = [
        (name, attribute, len(getattr(module, attribute)))
        for name, module in lm.named_modules()
        for attribute in vars(module)
        if "hooks" in attribute and isinstance(getattr(module, attribute), dict) and getattr(module, attribute)
    ]
    return (
        hooks,
        list(lm.state_dict()),
        [name for name, _ in lm.named_parameters()],
        [name for name, _ in lm.named_buffers()],
        [(name, type(module)) for name, module in lm.named_modules()],
    )


def gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Of all parameters of a method, by name, zeros where there is none; nothing stays in the parameters."""
    loss.backward(retain_graph=True)
    return taken_gradients(parameters)


def taken_gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients that a backward pass has left in the parameters, from which they are taken."""
    found = {}
    for name, p in parameters.items():
        found[name] = torch.zeros_like(p.detach()) if p.grad is None else p.grad
        if isinstance(p, RowsParameter):
            columns = name == "W_enc"
            rows = gradient_rows(p, slice(0, p.shape[columns]), columns=columns)[0]
            found[name] = rows.T if columns else rows
            p.pending.clear()
        p.grad = None
    return found
