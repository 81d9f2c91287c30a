"""Other tools open what we write and compute the same: recorded numbers of their own code, and, where an environment with the
tool is named (SAEHOOK_PYTHON_SAELENS, ..), the tool itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import written_case
from safetensors import safe_open
from safetensors.torch import load_file

from saehook.checkpoint import load_sae

HERE = Path(__file__).parent
CASES = [(tool, name) for tool in written_case.LAYOUT_OF for name in written_case.cases(tool)]


def check(recorded: dict[str, torch.Tensor], tool: str, name: str) -> None:
    sae = written_case.cases(tool)[name]
    with torch.no_grad():
        out = sae(written_case.inputs())
    tolerance = 2e-2 if sae.dtype == torch.bfloat16 else 1e-5
    for what, value in (("acts", out.acts), ("x_hat", out.x_hat)):
        torch.testing.assert_close(value.float(), recorded[f"{name}.{what}"], rtol=tolerance, atol=tolerance)
    assert out.acts.any()


@pytest.mark.parametrize(("tool", "name"), CASES)
def test_the_tool_computed_what_we_compute(tool, name):
    check(load_file(HERE / f"written_{tool}.safetensors"), tool, name)


@pytest.mark.parametrize("tool", written_case.LAYOUT_OF)
def test_the_record_names_the_tools_version_and_every_case(tool):
    with safe_open(HERE / f"written_{tool}.safetensors", "pt") as file:
        assert {key.partition(".")[0] for key in file.keys()} == set(written_case.cases(tool))  # noqa: SIM118
        assert file.metadata()["version"].split()[1][0].isdigit()


@pytest.mark.parametrize(("tool", "name"), CASES)
def test_what_was_written_comes_back(tool, name, tmp_path):
    """The files that were recorded from are those that we write today, and our reader agrees with the tool's."""
    sae = written_case.cases(tool)[name]
    folder = tmp_path / "layers.2"
    written_case.write_sae(sae, folder, written_case.LAYOUT_OF[tool])
    back = load_sae(folder, dtype=sae.dtype)
    x = written_case.inputs()
    with torch.no_grad():
        for ours, theirs in zip(back(x)[:2], sae(x)[:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("tool", written_case.LAYOUT_OF)
def test_the_installed_tool_opens_what_we_write(tool, tmp_path):
    python = os.environ.get(f"SAEHOOK_PYTHON_{tool.upper()}")
    assert python, f"name the Python of an environment with the tool in SAEHOOK_PYTHON_{tool.upper()}"
    written_case.write(tool, tmp_path / "saes")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    file = tmp_path / "recorded.safetensors"
    subprocess.run([python, HERE / "record_written.py", tool, tmp_path / "saes", file], check=True, env=environment)
    recorded = load_file(file)
    for name in written_case.cases(tool):
        check(recorded, tool, name)
