"""The outside of the package: names, laziness, no module in the way of a name."""

import importlib
import pkgutil
import subprocess
import sys
import time

import pytest
import torch

import saehook

HEAVY = ("torch", "nnsight", "transformers", "accelerate", "gradio", "numpy", "safetensors", "huggingface_hub")


def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_all_is_sorted_and_whole():
    assert saehook.__all__ == sorted(
        saehook.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    assert set(saehook.__all__) == set(saehook._HOME)
    assert set(saehook.__all__) <= set(dir(saehook))
    with pytest.raises(AttributeError, match="steer"):
        saehook.nothing_of_that_name  # noqa: B018


@pytest.mark.parametrize("code", ["import saehook", "import saehook.cli; saehook.cli._parser().format_help()"])
def test_nothing_heavy_is_loaded(code):
    loaded = in_a_new_process(f"{code}; import sys; print(*sys.modules)").split()
    assert not [name for name in HEAVY if name in loaded]


@pytest.mark.parametrize(
    ("code", "most"), [("import saehook", 60), ("import saehook.cli as c; c._parser().format_help()", 160)]
)
def test_few_modules_are_loaded(code, most):
    """Counted, since seconds say more about the machine; torch alone loads more than a thousand."""
    count = "len(sys.modules)"
    found = in_a_new_process(f"import sys; before = {count}; {code}; print({count} - before)")
    assert int(found) <= most


def test_help_is_quick():
    start = time.perf_counter()
    assert "COMMAND" in in_a_new_process("from saehook.cli import _parser; print(_parser().format_help())")
    assert time.perf_counter() - start < 5  # half a second when the machine is idle


def test_every_public_name_works_after_every_module_was_imported():
    modules = [m.name for m in pkgutil.walk_packages(saehook.__path__, "saehook.") if not m.name.endswith("__main__")]
    assert "saehook.hooked_model" in modules
    for name in modules:
        importlib.import_module(name)
    importlib.reload(saehook)
    sae = saehook.SAE(saehook.SAEConfig(d_in=8, d_sae=16, activation=saehook.TopK(k=2)))
    assert sae(torch.ones(3, 8)).x_hat.shape == (3, 8)
    for activation in (saehook.ReLU(), saehook.BatchTopK(k=2), saehook.JumpReLU()):
        assert saehook.SAEConfig(d_in=8, d_sae=16, activation=activation).activation is activation
    edits = [
        saehook.steer(1, 2.0),
        saehook.clamp(1, 2.0),
        saehook.set_(1, 2.0),
        saehook.scale(1, 0.5),
        saehook.ablate([1]),
        saehook.at_least(1, 2.0),
        saehook.at_most(1, 2.0),
        saehook.to_mean(1),
        saehook.resample(1, (0, 3)),
        saehook.swap(1, 2),
        saehook.keep_only([1]),
    ]
    assert all(isinstance(edit, saehook.Edit) for edit in edits)
    assert edits[1] == edits[2]
    vectors = [saehook.add_vector([1.0]), saehook.project_out([1.0]), saehook.cap_along([1.0], 2.0)]
    assert all(isinstance(edit, saehook.VectorEdit) for edit in vectors)
    wheres = [saehook.prompt(), saehook.generation(), saehook.tokens(0, -1), saehook.span(0, 3), saehook.token_ids(4)]
    wheres += [saehook.matching("a"), saehook.roles("user"), saehook.Where(bos=True)]
    assert len({str(where) for where in wheres}) == len(wheres)
    assert str(saehook.latent(3) > 1.0) == "latent 3 > 1"
    assert saehook.Schedule.linear(1, 0, 10).at(5) == 0.5
    assert saehook.Program(edits=edits).edits == tuple(edits)
    assert saehook.bundled("lm").is_dir()
    assert issubclass(saehook.SaehookError, Exception)
    for name in ("HookedModel", "Trainer", "TrainConfig"):
        assert isinstance(getattr(saehook, name), type), name
    for name in ("evaluate", "load_sae", "save_sae"):
        assert callable(getattr(saehook, name)), name


def test_no_public_name_is_a_module():
    modules = {m.name for m in pkgutil.iter_modules(saehook.__path__)}
    assert not modules & set(saehook.__all__)


@pytest.mark.parametrize("first", ["nnsight", "saehook", "gradio"])
def test_gradio_event_loops_start_whatever_is_imported_first(first):
    """nnsight mounts `.save` on every object, which breaks anyio where its backend is not loaded before."""
    code = f"""
import warnings; warnings.simplefilter("ignore")
import {first}
import saehook.hooked_model
import anyio, gradio
async def main(): return 7
print(anyio.run(main))
print((3).save is not None)
"""
    assert in_a_new_process(code).split() == ["7", "True"]
