"""An installation that is no checkout finds the bundled checkpoints, too."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_wheel_holds_the_checkpoints_and_works_where_it_is_installed(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("saehook-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests", "demos")) or name.endswith(".pyi")]
    for name in ("lm/config.json", "sae/sae_weights.safetensors", "sae-mlp/cfg.json"):
        assert f"saehook/checkpoints/{name}" in names
    place = tmp_path / "place"
    venv.create(place, with_pip=False)
    site = next(place.glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    # The dependencies come from this environment, saehook itself only from the wheel.
    packages = next(Path(p) for p in sys.path if p.endswith("site-packages"))
    (site / "dependencies.pth").write_text(f"{packages}\n")
    code = "import saehook; print(saehook.__file__); print(saehook.load_sae(saehook.bundled('sae')).d_sae)"
    done = subprocess.run(
        [place / "bin" / "python", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    file, d_sae = done.stdout.split()
    assert file.startswith(str(site))
    assert int(d_sae) > 0
