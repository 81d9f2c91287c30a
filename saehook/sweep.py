"""What to train, as plain data: from the command line or a YAML file, one SAE or all combinations of several settings.

    site: "layers.{4,8}.resid_post"
    activation: [topk, batchtopk, jumprelu]
    k: [16, 32]
    d_sae: 24576
    tokens: 100M

Every setting of `TrainConfig` and of the training methods can be given; a list means each of its values. `saes:` holds a
list of such tables, each with the settings around it. For the methods with a penalty `k` is the L0 to aim at. `site_out`
names as many sites as `site`: the first is reconstructed from the first, and so on.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saehook.config import METHODS, PENALISED, Method, TrainConfig, count, uses
from saehook.errors import ArgumentError, FileError, FormatError

DEFAULT_K = 32
RUN_SETTINGS = {
    "lm", "text", "out", "eval_text", "eval_tokens", "repeat", "skip_first_tokens", "max_norm_ratio", "dtype", "cache",
    "checkpoint_seconds", "log",
}  # fmt: skip
"""Settings of the whole run, which are not those of an SAE."""
METHOD_SETTINGS = {field.name for kind in METHODS.values() for field in dataclasses.fields(kind)}
SAE_SETTINGS = {field.name for field in dataclasses.fields(TrainConfig)} | METHOD_SETTINGS


def read_settings(path: str | Path) -> dict[str, Any]:
    """The table of a YAML file, `-` in names as `_`.

    Raises:
        FileError: it cannot be read.
        FormatError: it is no YAML, or no table.
        ArgumentError: a setting that does not exist.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(error.errno, f"cannot read {path}: {error.strerror}. Name a YAML file.") from None
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeError) as error:
        raise FormatError(f"{path} is no YAML: {error}") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds no table of settings such as `site: layers.2.resid_post`.")
    settings = {str(key).replace("-", "_"): value for key, value in data.items()}
    check_names(settings)
    return settings


def check_names(settings: Mapping[str, Any]) -> None:
    """Raises ArgumentError for a setting that does not exist."""
    import difflib

    known = SAE_SETTINGS | RUN_SETTINGS | {"saes"}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Known are {', '.join(sorted(known))}."
            raise ArgumentError(f"{name!r} is no setting of a training run. {hint}")


def expand(
    settings: Mapping[str, Any], find_sites: Callable[[str], Sequence[str]], width: Callable[[str], int]
) -> list[TrainConfig]:
    """One config for each combination of settings, in the order of the sites; settings of a run are passed over.

    `find_sites` gives the sites that a pattern names, `width` the width of one. d_sae is 16 × width by default.

    Raises:
        ArgumentError: a setting that does not exist, has no meaning for any of the methods, or a wrong value.
    """
    check_names(settings)
    own = settings.get("saes", [{}])
    if not isinstance(own, list) or not all(isinstance(table, Mapping) for table in own):
        raise ArgumentError(f"saes is {own!r}; a list of tables of settings is expected.")
    configs: dict[TrainConfig, None] = {}
    shared = {name: value for name, value in settings.items() if name in SAE_SETTINGS}
    for table in own:
        table = {str(key).replace("-", "_"): value for key, value in table.items()}
        check_names(table)
        configs |= dict.fromkeys(_combinations({**shared, **table}, find_sites, width))
    return list(configs)


def _combinations(
    settings: Mapping[str, Any], find_sites: Callable[[str], Sequence[str]], width: Callable[[str], int]
) -> list[TrainConfig]:
    axes = {name: _choices(name, value) for name, value in settings.items() if value is not None}
    if "site" not in axes:
        raise ArgumentError("no site is given. Say where the activations come from, e.g. site: layers.2.resid_post.")
    axes["site"] = _found(axes["site"], find_sites)
    if "site_out" in axes:
        axes["site"] = _pairs(axes["site"], _found(axes.pop("site_out"), find_sites))
    kinds = [_kind(name) for name in axes.setdefault("activation", ["batchtopk"])]
    for name in axes:
        if not any(_has(kind, name) for kind in kinds):
            names = ", ".join(str(activation) for activation in axes["activation"])
            raise ArgumentError(f"{name} = {settings[name]} has no meaning for {names}. Leave it out.")
    rows = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [_config(row, width) for row in rows]


def _found(patterns: list[Any], find_sites: Callable[[str], Sequence[str]]) -> list[Any]:
    return list(dict.fromkeys(site for pattern in patterns for site in find_sites(str(pattern))))


def _pairs(sites: list[str], outs: list[str]) -> list[Any]:
    if len(sites) != len(outs):
        raise ArgumentError(
            f"site names {len(sites)} sites ({', '.join(sites)}) and site_out {len(outs)} ({', '.join(outs)}). Give as many "
            "of both: the first is reconstructed from the first, and so on."
        )
    return list(zip(sites, outs, strict=True))


def _choices(name: str, value: Any) -> list[Any]:
    """The values of a setting; `fractions` is a list itself."""
    if name == "fractions":
        return value if value and isinstance(value[0], (list, tuple)) else [value]
    choices = list(value) if isinstance(value, (list, tuple)) else [value]
    if not choices:
        raise ArgumentError(f"{name} is an empty list; at least one value is expected.")
    return choices


def _kind(name: Any) -> type[Method]:
    kind = METHODS.get(str(name).lower())
    if kind is None:
        raise ArgumentError(f"activation {name!r} is unknown; expected one of {', '.join(METHODS)}.")
    return kind


def _has(kind: type[Method], name: str) -> bool:
    if name in METHOD_SETTINGS:
        return name in {field.name for field in dataclasses.fields(kind)} or (name == "k" and kind in PENALISED)
    return uses(kind, name)


def _config(row: dict[str, Any], width: Callable[[str], int]) -> TrainConfig:
    kind = _kind(row.pop("activation"))
    if isinstance(row["site"], tuple):
        row["site"], row["site_out"] = row["site"]
    own = {field.name for field in dataclasses.fields(kind)}
    method = {name: row.pop(name) for name in METHOD_SETTINGS & row.keys() & own}
    if "k" in own:
        method = {"k": DEFAULT_K, **method}
    elif "sparsity_coefficient" not in row and "target_l0" not in row:
        row["target_l0"] = row.get("k", DEFAULT_K)
    row = {name: value for name, value in row.items() if name not in METHOD_SETTINGS and uses(kind, name)}
    row.setdefault("d_sae", 16 * width(row["site"]))
    activation = kind(**{name: _converted(kind, name, value) for name, value in method.items()})
    return TrainConfig(
        activation=activation, **{name: _converted(TrainConfig, name, value) for name, value in row.items()}
    )


def _converted(config: type, name: str, value: Any) -> Any:
    """`value` in the type of the field: counts such as 5M, and numbers that YAML reads as text, such as 1e-3."""
    kind = typing.get_type_hints(config)[name]
    kinds = set(typing.get_args(kind)) if isinstance(kind, types.UnionType) else {kind}
    if int in kinds:
        return count(value)
    if float in kinds and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ArgumentError(f"{name} = {value!r} is no number.") from None
    return value
