"""The curves of a run for TensorBoard and Weights & Biases, beside `metrics.jsonl`, which stays the source of truth.

Each SAE is a run of its own there, so the charts of a sweep lie over each other. What goes wrong here never ends training: it
is said once, and training goes on without that logger.

A run that is resumed goes on with its curves: TensorBoard forgets the steps that are taken again; Weights & Biases, whose ids
lie in `wandb.json`, keeps what it has of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from saehook.errors import ArgumentError

TENSORBOARD_DIR = "tensorboard"
WANDB_IDS = "wandb.json"
"""In the folder of the run: the id of each SAE's run at Weights & Biases."""


class Logger(Protocol):
    """What takes the lines of `metrics.jsonl`."""

    def write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """The metrics of one SAE after that step."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class TensorBoard:
    """Events below `folder/tensorboard`, a folder for each SAE."""

    def __init__(self, folder: Path, settings: Mapping[str, Mapping[str, Any]], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writers = {
            name: SummaryWriter(folder / TENSORBOARD_DIR / name.replace(":", "."), purge_step=step + 1)
            for name in settings
        }

    def write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        for key, value in values.items():
            self.writers[name].add_scalar(key, value, step)
        self.writers[name].flush()  # a run that is killed keeps them

    def close(self) -> None:
        """See `Logger`."""
        for writer in self.writers.values():
            writer.close()


class WandB:
    """Runs of Weights & Biases in one group. Project, entity and mode are those of its environment variables; the project
    is `saehook` where WANDB_PROJECT is not set."""

    def __init__(self, folder: Path, settings: Mapping[str, Mapping[str, Any]], step: int) -> None:
        import wandb

        from saehook.files import atomic_write

        file = folder / WANDB_IDS
        ids = json.loads(file.read_text(encoding="utf-8")) if step and file.exists() else {}
        ids = {name: ids.get(name) or uuid.uuid4().hex[:12] for name in settings}
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(ids, indent=1) + "\n")
        self.runs = {
            name: wandb.init(
                project=os.environ.get("WANDB_PROJECT", "saehook"),
                group=os.environ.get("WANDB_RUN_GROUP", folder.resolve().name),
                name=name,
                id=ids[name],
                config=dict(config),
                dir=folder,
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(console="off"),
            )
            for name, config in settings.items()
        }

    def write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self.runs[name].log(dict(values), step=step)

    def close(self) -> None:
        """See `Logger`."""
        for run in self.runs.values():
            run.finish()


LOGGERS: dict[str, type[TensorBoard | WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}
"""By the names that are used on the command line, which are those of their packages and extras."""


def check_loggers(names: Sequence[str]) -> None:
    """Raises ArgumentError for a logger that does not exist, or whose package is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise ArgumentError(f"{name!r} is no logger; expected {' or '.join(LOGGERS)}.")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # None: just a folder of that name, such as those that loggers make
            raise ArgumentError(f"the logger {name} needs a package. Install it: pip install 'saehook[{name}]'.")


class Loggers:
    """Those that were asked for, maybe none; one that fails is left out from then on, with a UserWarning."""

    def __init__(
        self, names: Sequence[str], folder: Path | None, settings: Mapping[str, Mapping[str, Any]], step: int
    ) -> None:
        """`settings`: what each SAE is trained with, by its name; `step`: where a resumed run goes on, else 0."""
        self.open: dict[str, Logger] = {}
        for name in names:
            assert folder is not None
            if (logger := self._guarded(name, LOGGERS[name], folder, settings, step)) is not None:
                self.open[name] = logger

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Lines of `metrics.jsonl`."""
        for line in lines:
            values = {key: value for key, value in line.items() if key not in ("sae", "step")}
            for name, logger in list(self.open.items()):
                self._guarded(name, logger.write, line["sae"], line["step"], values)

    def close(self) -> None:
        """Finish all."""
        for name, logger in list(self.open.items()):
            self._guarded(name, logger.close)
        self.open = {}

    def _guarded(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:
            self.open.pop(name, None)
            said = " ".join(str(error).split())[:500]
            warnings.warn(
                f"{name} failed, and training goes on without it: {type(error).__name__}: {said}",
                UserWarning,
                stacklevel=3,
            )
            return None
