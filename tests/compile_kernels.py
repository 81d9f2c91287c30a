"""Compiles each kernel in Triton for a GPU that need not be there; run by `test_triton.py` in a process of its own.

    python tests/compile_kernels.py

The kernels are called as training calls them, and instead of a launch the call is compiled. Prints one line of JSON for each:
its name, dtypes, registers of a thread, bytes that spill and shared memory of a program.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saehook.kernels.selection import Selection
from saehook.kernels.triton import adam, block_topk
from saehook.kernels.triton.latent_sums import latent_sums
from saehook.kernels.triton.token_errors import squared_error
from saehook.kernels.triton.token_sums import token_sums

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_call(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    """In the place of `JITFunction.run`."""
    given = dict(zip(self.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
    options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(self.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[place,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=self, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGET, options=options)
    registers, spilled = resources(compiled.asm["cubin"])
    line = {
        "kernel": self.__name__,
        "arguments": {name: constants.get(name, kind) for name, kind in signature.items()},
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
    }
    sys.stdout.write(json.dumps(line, default=str) + "\n")


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    assert found is not None, said
    return int(found[1]), int(found[2])


def main() -> None:
    triton.runtime.jit.JITFunction.run = compile_call  # type: ignore[method-assign]
    assert "TRITON_INTERPRET" not in os.environ
    for d_in, d_sae, k in ((768, 24576, 32), (2304, 65536, 64)):
        n = 64
        tokens = torch.arange(n).repeat_interleave(k)
        chosen = Selection(tokens, torch.randint(d_sae, (n * k,)), n, d_sae, order="token")
        rows, inputs = torch.zeros(d_sae, d_in, dtype=torch.bfloat16), torch.zeros(n, d_in, dtype=torch.bfloat16)
        values = torch.zeros(n * k)
        out = torch.empty(d_sae, d_in)
        block_topk.block_topk(torch.zeros(n, d_sae, dtype=torch.bfloat16), k)
        token_sums(values, rows, chosen)
        latent_sums(values, inputs, chosen, out, against=rows)
        latent_sums(values, inputs, chosen, out)
        x_hat = torch.zeros(n, d_in, requires_grad=True)
        squared_error(torch.zeros(n, d_in), x_hat).backward()
        weights = torch.nn.Parameter(out)
        weights.grad = torch.zeros_like(out)
        adam.remove_parallel_(weights.grad, out)
        adam.adam_rows_(torch.optim.Adam([weights]), torch.tensor(True), torch.ones(()), unit=weights)


if __name__ == "__main__":
    main()
