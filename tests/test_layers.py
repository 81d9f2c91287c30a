"""The house rules that the imports and the text of the source keep."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "saehook"

# One line per layer, lowest first. A file imports only files of a lower layer, or files listed before it on its own
# line. `kernels/*` means every file of that folder; these may import each other.
LAYERS = [
    "errors metrics kernels/*",
    "config corpus hub dataset_text bundle files gguf loggers fields metrics_log visible_text token_html formats/*",
    "losses activation_fns where conditions schedules interventions edits site_spellings sites conversation "
    "tokenization sweep run_state plan initial_rows rounding devices",
    "sae sparse_acts model_input lm_loading row_text positions decoder_rows row_adam optim auxk batches prefix intervals "
    "splice_losses tracks readback program_file",
    "checkpoint latent_notes writers reconstruction eval_result row_edits edit_blocks editing tap_point results edit_plan "
    "full_report sampling_noise calibration methods",
    "attachment runs attribution_metrics latent_effects attribution dose_response kl_strength hooked_saes hooked_model fit "
    "streaming sae_run trainer",
    "harvest activation_cache provenance lm_head evaluation latent_stats inspection continuation kl_tuning replay export "
    "neuronpedia distributed/*",
    "charts model_card page reports suite_report eval_report training_run dashboards latent_page latent_search suite/* adapters/*",
    "app/*",
    "commands/* cli __main__ __init__",
]
NNSIGHT = {"hooked_model"}
PRINT = {"cli"}


def name_of(path: Path) -> str:
    """`kernels/reference` for saehook/kernels/reference.py; a folder's __init__ is `kernels/__init__`."""
    return str(path.relative_to(PACKAGE).with_suffix(""))


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def place(name: str) -> tuple[int, int] | None:
    """(layer, position in it); the files of a folder share one position."""
    for layer, line in enumerate(LAYERS):
        for position, entry in enumerate(line.split()):
            if entry == name or (entry.endswith("/*") and name.startswith(entry[:-1])):
                return layer, position
    return None


def is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        if is_type_checking(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield other
                yield from run_time_nodes(other)
            continue
        yield child
        yield from run_time_nodes(child)


def modules_of(node: ast.AST, file: str) -> Iterator[str]:
    """Full names that an import statement may mean: `from a import b` is `a` and `a.b`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:  # relative: from the folder of the file
            parts = ["saehook", *file.split("/")][: -node.level]
            base = ".".join([*parts, *([node.module] if node.module else [])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def file_of(module: str) -> str | None:
    """The file of saehook that a full module name is, if it is one."""
    if module == "saehook":
        return "__init__"
    if not module.startswith("saehook."):
        return None
    name = module.removeprefix("saehook.").replace(".", "/")
    return name if name in FILES else f"{name}/__init__" if f"{name}/__init__" in FILES else None


def imported_files(name: str) -> set[str]:
    """Files of saehook that a file imports, at its top or within functions."""
    found = set()
    for node in run_time_nodes(TREES[name]):
        modules = list(modules_of(node, name))
        files = {file_of(module) for module in modules}
        if isinstance(node, ast.ImportFrom) and len(files - {None, "__init__"}) > 0:
            files.discard("__init__")  # `from saehook import corpus` means corpus
            if modules[0] != "saehook" and file_of(modules[0]) is not None and modules[0].count(".") == 1:
                submodules = {file for file in files if file and file.startswith(modules[0].split(".")[1] + "/")}
                files = submodules or files
        found |= {file for file in files if file is not None}
    return found - {name}


def imported_packages(name: str) -> set[str]:
    return {module.split(".")[0] for node in ast.walk(TREES[name]) for module in modules_of(node, name) if module}


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_a_place(name):
    assert place(name) is not None, f"saehook/{name}.py is in no layer: give it a place in LAYERS"


def test_the_table_names_no_file_twice_and_none_that_is_gone():
    entries = [entry for line in LAYERS for entry in line.split()]
    assert len(set(entries)) == len(entries)
    gone = [e for e in entries if not any(n == e or (e.endswith("/*") and n.startswith(e[:-1])) for n in FILES)]
    assert not gone, f"not in saehook/: {gone}"


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__"])
def test_a_file_imports_only_what_is_below_it(name):
    mine = place(name)
    assert mine is not None
    for other in imported_files(name):
        theirs = place(other)
        assert theirs is not None, other
        same_folder = mine == theirs and "/" in name
        assert theirs < mine or same_folder, f"saehook/{name}.py imports saehook/{other}.py, which is not below it"


def test_the_table_would_notice():
    """The reader of imports sees those that matter."""
    assert "hooked_saes" in imported_files("hooked_model")
    assert "hooked_model" not in imported_files("hooked_saes"), "imports for type checkers are free"
    assert "sae" in imported_files("checkpoint")
    assert any(file.startswith("kernels/") for file in imported_files("auxk"))
    for wrong in (("sae", "hooked_model"), ("interventions", "editing"), ("trainer", "harvest"), ("errors", "config")):
        low, high = place(wrong[0]), place(wrong[1])
        assert low is not None
        assert high is not None
        assert low < high


def test_folders_import_in_no_circle():
    """Files within a folder share a place, so their order is held here."""
    for folder in sorted({name.split("/")[0] for name in FILES if "/" in name}):
        inside = {name for name in FILES if name.startswith(f"{folder}/")}
        left = {name: imported_files(name) & inside for name in inside}
        while left:
            free = [name for name, needs in left.items() if not needs & set(left)]
            assert free, f"these files of {folder}/ import each other in a circle: {sorted(left)}"
            for name in free:
                del left[name]


@pytest.mark.parametrize("name", FILES)
def test_only_one_file_talks_to_nnsight(name):
    assert ("nnsight" in imported_packages(name)) == (name in NNSIGHT)


@pytest.mark.parametrize("name", FILES)
def test_the_library_prints_nothing(name):
    calls = [
        node.lineno
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert name in PRINT or name.startswith("commands/") or not calls, f"print in saehook/{name}.py, lines {calls}"


def lines_with_traps(text: str) -> list[int]:
    """nnsight reads the caller's line: `generate(` or `backward(` on a line that begins with `with` does not run."""
    return [
        number
        for number, line in enumerate(text.splitlines(), 1)
        if re.match(r"\s*(async\s+)?with\b.*\b(generate|backward)\(", line) and "pytest.raises" not in line
    ]


@pytest.mark.parametrize(
    "path",
    [path for folder in ("saehook", "tests", "demos") for path in sorted((PACKAGE.parent / folder).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(PACKAGE.parent)),
)
def test_no_generate_or_backward_on_a_with_line(path):
    if path == Path(__file__).resolve():
        return
    assert not lines_with_traps(path.read_text(encoding="utf-8"))


def test_the_trap_is_recognised():
    assert lines_with_traps("x = 1\nwith torch.no_grad(): ids = model.generate(x)\n") == [2]
    assert lines_with_traps("    with torch.enable_grad(): loss.backward()") == [1]
    assert lines_with_traps("with torch.no_grad():\n    ids = model.generate(x)\n") == []
