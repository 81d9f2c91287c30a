"""The README runs, and its tables are those of the stored numbers."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_tables_are_made_from_the_stored_numbers():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "demos" / "make_tables.py")
    assert spec is not None
    assert spec.loader is not None
    make_tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_tables)
    assert make_tables.filled(README) == README, "run: python demos/make_tables.py"


def test_every_module_has_a_place_in_the_architecture_table():
    table = README.split("## Architecture")[1].split("## Contributing")[0]
    for path in (ROOT / "saehook").iterdir():
        if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").exists()):
            assert f"`{path.name}" in table, path.name
