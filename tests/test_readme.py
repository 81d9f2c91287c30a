"""The README runs, and its tables are those of the stored numbers."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saehook.suite import METRICS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^saehook (\w+)", "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)), re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_block_runs(block, tmp_path):
    script = tmp_path / "block.py"  # nnsight reads a `with` block back from its file
    script.write_text(block)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_two_commands_stand_there():
    assert "pip install -c constraints.txt -e . && saehook demo" in README
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in README


def test_every_command_shown_exists():
    from saehook.cli import _parser

    assert set(COMMANDS) >= {"train", "eval", "stats", "generate", "replay", "export", "sites"}
    helps = _parser().format_help()
    assert all(command in helps for command in COMMANDS)


@pytest.fixture(scope="module")
def make_tables():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "demos" / "make_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_made_from_the_stored_numbers(make_tables):
    assert make_tables.filled(README) == README, "run: python demos/make_tables.py"
    assert make_tables.suite_table() == make_tables.SUITE_TABLE.read_text(encoding="utf-8")


def test_the_slow_metrics_are_those_of_the_bundled_weights(make_tables):
    suite = json.loads(make_tables.SUITE.read_text(encoding="utf-8"))
    for name, digest in suite["provenance"]["weights_sha256"].items():
        assert make_tables.weights_sha256(name) == digest, (
            f"{name} is another now; run: python demos/make_tables.py --suite"
        )
    left_out = {gone["metric"] for gone in suite["left_out"]}
    assert {row["metric"] for row in suite["rows"]} | left_out == set(METRICS) - {"stability", "compute_equivalent"}
    assert {"sae", "sae-mlp"} == {row["sae"] for row in suite["rows"]}


def test_every_module_has_a_place_in_the_architecture_table():
    table = README.split("## Architecture")[1].split("## Contributing")[0]
    for path in (ROOT / "saehook").iterdir():
        if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").exists()):
            assert f"`{path.name}" in table, path.name
