"""The language model and SAEs that come with saehook."""

from __future__ import annotations

from pathlib import Path

from saehook.errors import ArgumentError, FileError

NAMES = {
    "lm": "a small Llama that writes Python and prose",
    "sae": "TopK SAE on the residual stream of the bundled lm",
    "sae-mlp": "BatchTopK SAE on an MLP output of the bundled lm",
}


def bundled(name: str) -> Path:
    """The folder of a bundled checkpoint: `lm`, `sae` (residual stream) or `sae-mlp`.

    Raises:
        ArgumentError: another name. FileError: the installation lacks the checkpoints.
    """
    if name not in NAMES:
        raise ArgumentError(f"there is no bundled {name!r}; bundled are {', '.join(NAMES)}.")
    package = Path(__file__).resolve().parent
    for root in (package / "checkpoints", package.parent / "checkpoints"):  # in a wheel; in a checkout
        if (root / name).is_dir():
            return root / name
    raise FileError(f"this installation of saehook has no checkpoints/{name}. Install it from a checkout or a wheel.")
