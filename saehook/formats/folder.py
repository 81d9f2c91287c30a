"""A file of weights with what lies beside it: the view that a format gets."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from saehook import hub
from saehook.errors import FileError, FormatError
from saehook.formats.weights import read_weights

MAX_CONFIG_BYTES = 16 * 2**20
CONFIGS = ("cfg.json", "config.json", "hyperparams.json")
"""Names that peers use; one of these that cannot be read is an error, another file is no matter."""
YAML = ("config.yaml", "wandb-config.yaml", "wanb-config.yaml")
DECODERS = {"W_dec", "w_dec", "decoder.weight", "decoder_linear.weight"}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileError: it cannot be read. FormatError: it is too large, or no JSON object.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise FormatError(
                f"{path} has {path.stat().st_size:,} bytes; a configuration has at most {MAX_CONFIG_BYTES:,}."
            )
        data = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise FormatError(f"{path} is no text file; JSON is expected.") from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error}.") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is no valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds {type(data).__name__}; a JSON object is expected.")
    return data


class Files:
    """One file of weights, the configurations beside it, and what its place tells."""

    def __init__(
        self,
        path: Path,
        *,
        shapes_only: bool = False,
        rows: Iterable[int] | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the file `path`; its tensors are read when they are used.

        Args:
            shapes_only: matrices and vectors are of the device `meta`; only numbers are there.
            rows: only these rows of the decoder are there, the rest is of the device `meta`.
            known: what the user says and the file may not: `k`, `input_scale`.

        Raises:
            FileError, FormatError: as `read_weights`.
        """
        self.path = path
        self.rows = None if rows is None else list(rows)
        self.known = dict(known or {})
        self.kind, self.entries = read_weights(path)
        """`safetensors`, `npz` or `torch`; and what the file holds, by name."""
        self._without = shapes_only, shapes_only or rows is not None
        self._configs: list[tuple[Path, dict[str, Any]]] | None = None

    @property
    def names(self) -> set[str]:
        """Of everything that the file of weights holds."""
        return set(self.entries)

    def descend(self, name: str) -> None:
        """Go on with the dictionary of that name as if the file held it alone: `ae` of a backup."""
        self.entries = dict(self.entries[name])

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, of a float dtype or a number.

        Raises:
            FormatError: it is not there, or no dense tensor of numbers.
        """
        value = self.entries.get(name)
        if value is None:
            raise FormatError(f"{self.path}: {name} is missing; it holds {', '.join(sorted(self.names)) or 'nothing'}.")
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            raise FormatError(f"{self.path}: {name} is no dense tensor but {type(value).__name__}.")
        if value.ndim and not value.is_floating_point():
            raise FormatError(f"{self.path}: {name} has dtype {value.dtype}; a float dtype is expected.")
        if value.ndim == 0 or not self._without[name not in DECODERS]:
            return value
        return value.to("meta")

    def decoder(self, rows: Tensor) -> Tensor:
        """A decoder whose first dimension are the latents: those that are asked for."""
        if self.rows is None:
            return rows
        for row in self.rows:
            if not -1 < row < len(rows):
                raise FormatError(f"{self.path}: row {row} of the decoder is outside 0..{len(rows) - 1}.")
        return rows[self.rows]

    def number(self, name: str) -> float | None:
        """The value of a tensor that holds one number, or a number; None where it is not there."""
        value = self.entries.get(name)
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise FormatError(f"{self.path}: {name} has shape {tuple(value.shape)}; one number is expected.")
            value = value.item()
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise FormatError(f"{self.path}: {name} is {value!r}; a number is expected.")
        return value

    def expect(self, needed: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Raises FormatError unless the file holds `needed`, maybe of `optional`, and nothing else."""
        needed = set(needed)
        missing, unknown = sorted(needed - self.names), sorted(self.names - needed - set(optional))
        if missing or unknown:
            said = [f"{', '.join(missing)} is missing"] if missing else []
            said += [f"{', '.join(unknown)} is unknown"] if unknown else []
            raise FormatError(f"{self.path} should hold {sorted(needed)}, but {' and '.join(said)}.")

    def configs(self) -> list[tuple[Path, dict[str, Any]]]:
        """The JSON and YAML objects beside the file and one folder up, the usual names first.

        Raises:
            FormatError: one of a usual name beside the file is damaged.
        """
        if self._configs is None:
            self._configs = list(self._read_configs())
        return self._configs

    def _read_configs(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        here, above = self.path.parent, self.path.parent.parent
        usual = [here / name for name in CONFIGS if (here / name).exists()]
        same = sorted(here.glob(f"{glob.escape(self.path.stem)}*.json"))[:5]
        others = same + [path for path in sorted(here.glob("*.json"))[:50] if path not in usual + same]
        others += [above / name for name in CONFIGS]
        for path in usual:
            yield path, read_json(path)
        for path in others:
            try:
                if path.is_file():
                    yield path, read_json(path)
            except (FileError, FormatError):
                continue
        for path in [folder / name for folder in (here, above) for name in YAML]:
            if path.is_file() and path.stat().st_size <= MAX_CONFIG_BYTES:
                data = _read_yaml(path)
                if isinstance(data, dict):
                    yield path, data

    def config(self, *keys: str) -> dict[str, Any] | None:
        """The first configuration that has all these keys."""
        return next((data for _, data in self.configs() if all(key in data for key in keys)), None)

    def config_path(self, *keys: str) -> Path:
        """The file of `config(*keys)`; the weights' own where there is none."""
        return next((path for path, data in self.configs() if all(key in data for key in keys)), self.path)

    @property
    def repo(self) -> str:
        """`owner/name` of a file in the hub's cache, else the names of the folders above it."""
        place = hub.place_of(self.path.parent)
        return place.repo if place else "/".join(self.path.absolute().parts[-6:-1])

    def in_path(self, pattern: str) -> str | None:
        """First group of a pattern found in the file's path, from its repository down; the last match wins."""
        found = re.findall(pattern, f"{self.repo}/{'/'.join(self.path.absolute().parts[-5:])}")
        return found[-1] if found else None


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError):
        return None


def as_whole(value: Any) -> Any:
    """4.0 as 4, which some tools write; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole_number(data: Mapping[str, Any], name: str, path: Path, default: int | None = None) -> int:
    """A field that is a whole number of at least 1.

    Raises:
        FormatError: it is something else, or missing without a default.
    """
    if name not in data and default is not None:
        return default
    if name not in data:
        raise FormatError(f"{path}: {name!r} is missing.")
    value = as_whole(data[name])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FormatError(f"{path}: {name} is {data[name]!r}; a whole number of at least 1 is expected.")
    return value
