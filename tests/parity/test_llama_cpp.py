"""Control vectors in llama.cpp itself, from a recording: its logits are those of the program.

llama.cpp keeps values and SiLU in float16 on the CPU, so that also the unedited model differs by 0.005 of logits up to 7.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_reader import read_gguf
from llama_cpp_case import IDS, PROGRAMS, hooked
from safetensors.torch import load_file

from saehook.export import export_control_vector

RECORDED = load_file(Path(__file__).with_name("llama_cpp.safetensors"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_llama_cpp_computes_what_the_program_does(name, tmp_path):
    model, program = hooked(), PROGRAMS[name]
    with torch.no_grad():
        ours = model(torch.tensor([IDS]), edits=program).logits[0]
    torch.testing.assert_close(RECORDED[name], ours, atol=0.01, rtol=0.0)
    if not program.edits:
        return
    assert (RECORDED[name] - RECORDED["clean"]).abs().max() > 0.5
    _, vectors = read_gguf(export_control_vector(model, program, tmp_path / "vector.gguf"))
    assert {f"{name}.{direction}" for direction in vectors} == {n for n in RECORDED if n.startswith(f"{name}.")}
    for direction, vector in vectors.items():
        torch.testing.assert_close(vector, RECORDED[f"{name}.{direction}"], atol=1e-6, rtol=1e-6)
