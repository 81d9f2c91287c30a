"""Records llama_cpp.safetensors: logits of a tiny Llama in llama.cpp with control vectors that saehook wrote.

Made with the llama.cpp (commit c919d5d) in the source package of llama-cpp-python 0.3.1: build its library with cmake, compile
llama_cpp_logits.cpp and its common/{common,log,sampling,build-info}.cpp against it, install `gguf` into an environment of its
own, then `PYTHONPATH=tests:tests/parity python tests/parity/record_llama_cpp.py ./llama_cpp_logits`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import torch
from llama_cpp_case import IDS, PROGRAMS, hooked
from safetensors.torch import save_file
from torch import Tensor

from saehook.export import export_control_vector

FILE = Path(__file__).with_name("llama_cpp.safetensors")
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def turned(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key map in the order in which llama.cpp rotates them: the halves of each head interleaved."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_model(lm: Any, path: Path) -> None:
    """The language model as GGUF, without a tokenizer."""
    config = lm.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    tensors = {
        "token_embd": lm.model.embed_tokens.weight,
        "output_norm": lm.model.norm.weight,
        "output": lm.lm_head.weight,
    }
    for i, layer in enumerate(lm.model.layers):
        for ours, theirs in NAMES.items():
            weight = layer.get_submodule(ours).weight
            tensors[f"blk.{i}.{theirs}"] = turned(weight, heads[ours]) if ours in heads else weight
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(program: str) -> None:
    recorded = {}
    model = hooked()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(model.lm, folder / "model.gguf")
        for case, edits in PROGRAMS.items():
            vector: Any = "-" if not edits.edits else export_control_vector(model, edits, folder / f"{case}.gguf")
            if edits.edits:  # the reader of the package agrees about what is in it
                reader = gguf.GGUFReader(vector)
                assert reader.get_field("general.architecture").contents() == "controlvector"
                recorded |= {f"{case}.{t.name}": torch.tensor(t.data.copy()) for t in reader.tensors}
            out = folder / "logits"
            subprocess.run([program, folder / "model.gguf", vector, out, *map(str, IDS)], check=True)
            recorded[case] = (
                torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.float32).view(len(IDS), -1).clone()
            )
            with torch.no_grad():
                ours = model(torch.tensor([IDS]), edits=edits).logits[0]
            print(case, float((recorded[case] - ours).abs().max()), "of", float(ours.abs().max()))  # noqa: T201
    save_file(recorded, FILE)


if __name__ == "__main__":
    main(sys.argv[1])
