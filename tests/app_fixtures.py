"""A tiny random Llama with a byte-level tokenizer and two SAEs, for the tests of streaming and of the page."""

from __future__ import annotations

import asyncio
import functools
import gc
import socket
import warnings
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saehook import SAE, SAEConfig, TopK
from saehook.hooked_model import HookedModel
from saehook.hooked_saes import HookedSAEs
from saehook.sae import LatentStats

SITES = ("layers.0.resid_post", "layers.1.mlp_out")
SPECIAL = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
HOSTILE = (
    "<img src=x onerror='window.PWN=1'><script>window.PWN=2</script>",
    "${Object.assign(window,{PWN:3})} {{value}} echo ${HOME}",
    "a\n\tb\r \u202e gnirts <b>bold</b> &amp; \U0001f600 é",
    f"{SPECIAL}[x](http://example.invalid/x.png) ![y](http://example.invalid/y.png)",
)


def byte_tokenizer() -> Any:
    """One token per byte, and one special token; with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {SPECIAL: 0} | {char: i + 1 for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL, eos_token=SPECIAL, chat_template=TEMPLATE
    )


@functools.cache
def tiny() -> HookedSAEs:
    """The model with both SAEs; read it only, it is shared. The one at `SITES[1]` has no statistics."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=0, eos_token_id=None, pad_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    model = HookedModel(LlamaForCausalLM(config), byte_tokenizer(), model_id="tiny")
    saes = {}
    for i, site in enumerate(SITES):
        sae = SAE(
            SAEConfig(d_in=32, d_sae=96, activation=TopK(k=8)), site=site, generator=torch.Generator().manual_seed(i)
        )
        saes[site] = sae.requires_grad_(False)
    saes[SITES[0]].stats = LatentStats(torch.full((96,), 2.0), torch.full((96,), 0.125), torch.full((96,), 0.1), 1000)
    return model.attach(saes)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def collect_loops() -> None:
    """Gradio leaves its event loops, one for each page that is built, to the garbage collector; collect them quietly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.set_event_loop(None)
        gc.collect()
