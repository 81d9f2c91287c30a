"""Where the files of an SAE are: on this machine, or on the hub, of which only what the SAE needs is fetched."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from saehook import hub
from saehook.errors import ArgumentError, FileError

WEIGHTS = (".safetensors", ".npz", ".pt", ".pth")
CONFIGS = (".json", ".yaml", ".yml")
USUAL = (
    "sae_weights.safetensors",
    "sae.safetensors",
    "params.safetensors",
    "params.npz",
    "ae.pt",
    "sae.pt",
    "checkpoints/final.safetensors",
)
"""Names of a folder's weights, as peers write them; other files are looked at where none of these is there."""
BESIDE = {"sparsity.safetensors", "stats.safetensors", "activation_whitening.safetensors"}
"""Fetched with the weights where they are there."""
MAX_LISTED = 30


def local_path(path: str | Path, sub: str | None = None, revision: str | None = None) -> Path:
    """The file or folder on this machine; what is on the hub is fetched into its cache.

    Args:
        path: a path, `owner/name` or `hf:owner/name[,revision=..]`.
        sub: below it.

    Raises:
        FileError: it is not there; for a repository, which files in which cache would do.
    """
    if sub is not None and (not isinstance(sub, str) or ".." in PurePosixPath(sub).parts or sub.startswith("/")):
        raise ArgumentError(f"sub={sub!r}; a folder or file below the path is expected.")
    if hub.is_hub_name(path):
        place = hub.parse(str(path))
        return _fetch(place._replace(revision=place.revision or revision), sub)
    here = Path(path)
    if here.exists():
        inside = here / sub if sub else here
        if inside.exists():
            return inside
        names = sorted(p.name for p in here.iterdir())[:MAX_LISTED] if here.is_dir() else []
        raise FileError(f"{inside} is not there; {here} holds {', '.join(names) or 'nothing'}.")
    if hub.is_repo(str(path)):
        return _fetch(hub.HubPlace(str(path), revision), sub)
    raise FileError(f"{here} is not there. Name a folder or file of weights, or owner/name on the hub.")


def _fetch(place: hub.HubPlace, sub: str | None) -> Path:
    """The folder or file in the hub's cache."""
    offline = hub.cached_snapshot(place)
    if offline is not None and sub is not None and _is_whole(offline / sub):
        return offline / sub
    names = hub.list_files(place, sub or "")
    chosen = _choose(names, sub, place)
    local = [hub.download(place, name) for name in chosen]
    snapshot = local[0]
    for _ in PurePosixPath(chosen[0]).parts:
        snapshot = snapshot.parent
    return snapshot / sub if sub else snapshot


def _is_whole(path: Path) -> bool:
    """Whether weights are there already, so that the hub need not be asked."""
    return path.is_file() or (path.is_dir() and any(p.suffix in WEIGHTS for p in path.rglob("*")))


def _choose(names: list[str], sub: str | None, place: hub.HubPlace) -> list[str]:
    """Files that belong to the SAE: its weights, and configurations beside and above them."""
    base = PurePosixPath(sub or ".")
    single = sub is not None and sub in names
    weights = [n for n in names if n == sub or (n.endswith(WEIGHTS) and base in PurePosixPath(n).parents)]
    folders = {PurePosixPath(n).parent for n in weights}
    depth = min((len(folder.parts) for folder in folders), default=0)
    nearest = {folder for folder in folders if len(folder.parts) == depth}
    here = [n for n in weights if PurePosixPath(n).parent in nearest]
    usual = [n for n in here if n.endswith(USUAL)]
    chosen = [str(sub)] if single else usual or here
    if len(chosen) != 1:
        known = here if len(nearest) == 1 else sorted({str(PurePosixPath(n).parent) for n in here})
        known = known or sorted({str(PurePosixPath(n).parent) for n in names if n.endswith(WEIGHTS)}) or names
        close = [name for name in known if sub and name.startswith(sub.split("/")[0])] or known
        more = f" and {len(close) - MAX_LISTED} more" if len(close) > MAX_LISTED else ""
        what = f"{len(chosen)} SAEs" if chosen else f"no weights at {sub!r}" if sub else "no weights"
        raise FileError(
            f"{place.name} holds {what}: there are {', '.join(close[:MAX_LISTED])}{more}. Name one with sub=."
        )
    above = set(PurePosixPath(chosen[0]).parents)
    beside = [
        n
        for n in names
        if PurePosixPath(n).name in BESIDE and PurePosixPath(n).parent == PurePosixPath(chosen[0]).parent
    ]
    return chosen + beside + [n for n in names if n.endswith(CONFIGS) and PurePosixPath(n).parent in above]
