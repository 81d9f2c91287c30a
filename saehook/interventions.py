"""Edits of latents as frozen data, with a JSON form. What they do to activations is in `editing.py`.

z are an SAE's latent activations at one token, after its activation function; z' what the listed edits make of them.

| op | z' | value |
|---|---|---|
| `set` | value | in `unit` |
| `add` | z + value, also where the latent is silent | in `unit` |
| `scale` | value · z | a factor |
| `ablate` | 0 | none |
| `min` | max(z, value) | in `unit` |
| `max` | min(z, value) | in `unit` |
| `mean` | the latent's recorded mean activation | none |
| `keep_only` | z, and 0 for every other latent of the SAE | none |

With `active_only` an edit acts where z, as the edits before it left it, is above 0; a token on which none of its latents
is, it does not touch.

Units of `set`, `add`, `min` and `max`: `raw`; `max` (times the latent's recorded maximum); `norm` (times
‖x‖ / ‖W_dec[latent]‖, so that the written vector has `value` times the norm of the token's activation).
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saehook.errors import ArgumentError, FormatError, LatentError

OPS = ("set", "add", "scale", "ablate", "min", "max", "mean", "keep_only")
NO_VALUE = ("ablate", "mean", "keep_only")
NO_UNIT = ("scale", *NO_VALUE)
NO_ACTIVE_ONLY = ("ablate", "keep_only")
UNITS = ("raw", "max", "norm")
ERRORS = ("keep", "drop")
SCHEMA = 1
MAX_VALUE = 3.4028234663852886e38
"""The largest float32: edits are computed in it."""


@dataclass(frozen=True)
class Where:
    """Which tokens an edit acts on: those that fit all that is given. Those outside the mask (special tokens, and what the
    SAE's `mask_rule` leaves out) only where `tokens` names them; special tokens also with `special`."""

    prompt: bool = True
    """Tokens of the input."""
    generation: bool = True
    """Tokens that the model has generated."""
    tokens: tuple[int, ...] | None = None
    """Exactly these tokens of the input, counted among the row's own real tokens; negative from its end."""
    positions: tuple[int, int | None] | None = None
    """From the first to before the second, counted among the row's own real tokens, generated ones included; None: no
    end."""
    token_ids: tuple[int, ...] | None = None
    """Tokens with one of these ids. A special one also wants `special`."""
    special: bool = False
    """Special tokens, too; the SAE's `mask_rule` holds for them as for others."""
    rows: tuple[int, ...] | None = None
    """Rows of the input, from 0; its beams and return sequences are of the row that they continue."""

    def __post_init__(self) -> None:
        for name in ("prompt", "generation", "special"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}={getattr(self, name)!r} in a Where; True or False is expected.")
        for name in ("token_ids", "rows"):
            if getattr(self, name) is not None:
                values = _integers(getattr(self, name), name)
                if not values or min(values) < 0:
                    raise ArgumentError(f"{name}={values} in a Where; one or more numbers from 0 are expected.")
                object.__setattr__(self, name, values)
        if self.positions is not None:
            object.__setattr__(self, "positions", _range(self.positions))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", _integers(self.tokens, "tokens"))
            if not self.tokens:
                raise ArgumentError("a Where with tokens=() names no token. Name one, or leave tokens out.")
            if not (self.prompt and self.generation):
                raise ArgumentError(
                    f"a Where with tokens={self.tokens} says prompt or generation, too. Tokens stand alone."
                )
        elif not (self.prompt or self.generation):
            raise ArgumentError("a Where with neither prompt nor generation nor tokens touches nothing. Switch one on.")

    def __str__(self) -> str:
        parts = []
        if self.tokens is not None:
            parts.append(f"tokens {_listed(self.tokens)}")
        elif not (self.prompt and self.generation):
            parts.append("prompt" if self.prompt else "generation")
        if self.positions is not None:
            start, stop = self.positions
            parts.append(f"positions from {start}" + ("" if stop is None else f" to before {stop}"))
        if self.token_ids is not None:
            parts.append(f"ids {_listed(self.token_ids)}")
        if self.rows is not None:
            parts.append(f"rows {_listed(self.rows)}")
        return ", ".join(parts or ["every token"]) + (", special ones included" if self.special else "")


def prompt() -> Where:
    """The tokens of the input that are in the mask."""
    return Where(generation=False)


def generation() -> Where:
    """The tokens that the model generates."""
    return Where(prompt=False)


def tokens(*indices: int) -> Where:
    """Tokens of the input by index among the row's own real tokens: 0 the first (BOS counts where there is one),
    -1 the last of the prompt. An index that a row does not have is an error when the edit runs."""
    if not indices:
        raise ArgumentError("tokens() names no token. Write for example tokens(0, 3, -1).")
    return Where(tokens=tuple(indices))


def positions(start: int, stop: int | None = None) -> Where:
    """Tokens `start` .. `stop` - 1 of the row, counted among its own real tokens, generated ones included; None: no end."""
    return Where(positions=(start, stop))


def token_ids(*ids: int) -> Where:
    """Tokens with one of these ids, of prompt and generation; `Where(token_ids=..., special=True)` for special ones."""
    return Where(token_ids=tuple(ids))


EVERYWHERE = Where()


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One operation on some latents of the SAE at one site."""

    op: str
    """One of `OPS`."""
    latents: tuple[int, ...]
    """Which latents; each once."""
    value: float | None = None
    """What the op needs; None for those of `NO_VALUE`."""
    unit: str = "raw"
    """One of `UNITS`; those of `NO_UNIT` have none but `raw`."""
    site: str | None = None
    """The attached SAE meant; None where only one is attached."""
    where: Where = EVERYWHERE
    """Which tokens."""
    active_only: bool = False
    """Act only where the latent is active, z > 0; not for those of `NO_ACTIVE_ONLY`."""

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ArgumentError(f"there is no operation {self.op!r}; expected one of {', '.join(OPS)}.")
        latents = _integers(self.latents, "latents")
        if not latents:
            raise ArgumentError(f"the edit {self.op!r} names no latent. Name at least one.")
        if len(set(latents)) < len(latents):
            raise ArgumentError(f"the edit {self.op!r} names a latent twice: {latents}. Name each once.")
        if min(latents) < 0:
            raise LatentError(f"latent {min(latents)} is negative; latents are counted from 0.")
        object.__setattr__(self, "latents", latents)
        if self.unit not in UNITS:
            raise ArgumentError(f"there is no unit {self.unit!r}; expected one of {', '.join(UNITS)}.")
        if self.op in NO_UNIT and self.unit != "raw":
            raise ArgumentError(f"{self.op!r} has no unit, but unit={self.unit!r} was given. Leave it out.")
        if self.op in NO_VALUE:
            if self.value is not None:
                raise ArgumentError(f"{self.op!r} takes no value, but {self.value!r} was given. Use 'set' or 'scale'.")
        else:
            if (
                isinstance(self.value, bool)
                or not isinstance(self.value, (int, float))
                or not abs(self.value) <= MAX_VALUE
            ):
                raise ArgumentError(
                    f"the value of {self.op!r} is {self.value!r}; a finite number is expected (in float32)."
                )
            object.__setattr__(self, "value", float(self.value))
        if not isinstance(self.active_only, bool):
            raise ArgumentError(f"active_only={self.active_only!r}; True or False is expected.")
        if self.active_only and self.op in NO_ACTIVE_ONLY:
            raise ArgumentError(f"{self.op!r} does the same with active_only=True or without. Leave it out.")
        if not isinstance(self.site, (str, type(None))):
            raise ArgumentError(f"site={self.site!r} is no site name; expected for example 'layers.2.resid_post'.")
        if not isinstance(self.where, Where):
            raise ArgumentError(
                f"where={self.where!r} is no Where; expected prompt(), generation(), tokens(0, -1), or None for every token."
            )

    def __str__(self) -> str:
        amount = "" if self.value is None else f" {self.value:g}" + ("" if self.unit == "raw" else f" {self.unit}")
        site = f" at {self.site}" if self.site else ""
        active = " where active" if self.active_only else ""
        return f"{self.op} {_listed(self.latents)}{amount}{active}{site} ({self.where})"


@dataclass(frozen=True)
class Cap:
    """‖x' - x‖ is at most `limit` · ‖x‖; a longer change is shortened, its direction stays."""

    limit: float
    """Above 0."""

    def __post_init__(self) -> None:
        limit = self.limit
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit <= MAX_VALUE:
            raise ArgumentError(f"the cap of a norm is {limit!r}; a finite number above 0 is expected.")
        object.__setattr__(self, "limit", float(limit))


@dataclass(frozen=True, kw_only=True)
class Program:
    """Edits in the order in which they apply, and what happens to the SAE's reconstruction error."""

    edits: Sequence[Edit] = ()
    """Edits of one SAE apply in this order; kept as a tuple."""
    splice: bool = False
    """Put decode(z') on every token of the mask at every attached SAE."""
    error: str | None = None
    """`keep`: x' = x + (z' - z) W_dec. `drop`: x' = decode(z') on the tokens that an edit touches. None: `keep`, or
    with `splice`, which drops it everywhere, nothing."""
    norm: str | Cap | Mapping[str, float] | None = None
    """After all edits of a site, on the tokens that they touch: `preserve` makes ‖x'‖ = ‖x‖, so that only the direction
    changes; `{"cap": f}`, kept as a `Cap`, makes ‖x' - x‖ ≤ f · ‖x‖. A token of norm 0 stays as it is."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        for edit in self.edits:
            if not isinstance(edit, Edit):
                raise ArgumentError(
                    f"{edit!r} is no edit; expected an Edit such as steer(...), clamp(...) or ablate(...)."
                )
        if self.error is not None and self.error not in ERRORS:
            raise ArgumentError(f"error={self.error!r} is unknown; expected 'keep' or 'drop'.")
        object.__setattr__(self, "norm", _norm(self.norm))
        if not isinstance(self.splice, bool):
            raise ArgumentError(f"splice={self.splice!r}; True or False is expected.")
        if self.splice and self.error == "keep":
            raise ArgumentError(
                "splice=True puts the reconstruction in, error='keep' leaves the error there: together they are the "
                "unspliced model. Leave one of them out."
            )

    @staticmethod
    def of(edits: Program | Edit | Iterable[Edit], splice: bool = False, error: str | None = None) -> Program:
        """A program from what a call was given: edits, a single edit, or a whole program, which the others add to."""
        if isinstance(edits, Program):
            return replace(edits, splice=splice or edits.splice, error=error or edits.error)
        return Program(edits=(edits,) if isinstance(edits, Edit) else tuple(edits), splice=splice, error=error)

    @property
    def drops_error(self) -> bool:
        """Whether a touched token becomes the pure reconstruction."""
        return self.splice or self.error == "drop"

    def to_json(self) -> str:
        """The program as JSON; `from_json` gives an equal one back."""
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "edits": [_edit_to_dict(edit) for edit in self.edits],
            "splice": self.splice,
            "error": self.error,
        }
        if self.norm is not None:
            data["norm"] = {"cap": self.norm.limit} if isinstance(self.norm, Cap) else self.norm
        return json.dumps(data, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Program:
        """A program from its JSON form. Data only: nothing is imported or run.

        Raises:
            FormatError: not JSON, an unknown schema or field, or a value of the wrong kind; the field is named.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"the program is not JSON: {error}. Write what Program.to_json() gives.") from None
        _check_fields(data, "program", {"schema", "edits", "splice", "error", "norm"}, {"schema", "edits"})
        if data["schema"] != SCHEMA:
            raise FormatError(f"the program's schema is {data['schema']!r}; this version reads schema {SCHEMA}.")
        if not isinstance(data["edits"], list):
            raise FormatError(f"program.edits is {data['edits']!r}; a list is expected.")
        if not isinstance(data.get("splice", False), bool):
            raise FormatError(f"program.splice is {data['splice']!r}; true or false is expected.")
        edits = tuple(_edit_from_dict(edit, f"edits[{i}]") for i, edit in enumerate(data["edits"]))
        try:
            return Program(
                edits=edits, splice=data.get("splice", False), error=data.get("error"), norm=data.get("norm")
            )
        except (ArgumentError, TypeError) as error:
            raise FormatError(f"program: {error}") from None


def _integers(values: Iterable[Any], what: str) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ArgumentError(f"{what} are {values!r}; whole numbers are expected.")
    result = []
    for value in values:
        try:
            if isinstance(value, bool):
                raise TypeError
            result.append(operator.index(value))
        except TypeError:
            raise ArgumentError(f"{value!r} among the {what} is no whole number.") from None
    return tuple(result)


def _range(given: Any) -> tuple[int, int | None]:
    """(start, stop) of `positions`; stop may be None."""
    try:
        start, stop = given
    except (TypeError, ValueError):
        raise ArgumentError(
            f"positions={given!r} in a Where; (start, stop) is expected, stop None for no end."
        ) from None
    start, *rest = _integers([start] if stop is None else [start, stop], "positions")
    if start < 0 or (rest and rest[0] <= start):
        raise ArgumentError(
            f"positions={given!r} hold no token; 0 <= start < stop is expected, counted from the row's first."
        )
    return start, rest[0] if rest else None


def _norm(given: Any) -> str | Cap | None:
    if given is None or isinstance(given, Cap) or (isinstance(given, str) and given == "preserve"):
        return given
    if isinstance(given, Mapping) and set(given) == {"cap"}:
        return Cap(given["cap"])
    raise ArgumentError(f"norm={given!r} is unknown; expected 'preserve' or {{'cap': a number above 0}}.")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _check_fields(data: Any, path: str, known: set[str], required: set[str]) -> None:
    if not isinstance(data, dict):
        raise FormatError(f"{path} is {data!r}; an object is expected.")
    unknown, missing = set(data) - known, required - set(data)
    if unknown or missing:
        problem = f"has unknown fields {sorted(unknown)}" if unknown else f"lacks {sorted(missing)}"
        raise FormatError(f"{path} {problem}; expected are {sorted(known)}.")


def _edit_to_dict(edit: Edit) -> dict[str, Any]:
    data: dict[str, Any] = {"op": edit.op, "latents": list(edit.latents)}
    if edit.value is not None:
        data |= {"value": edit.value, "unit": edit.unit}
    if edit.active_only:
        data["active_only"] = True
    if edit.site is not None:
        data["site"] = edit.site
    if edit.where != EVERYWHERE:
        data["where"] = _where_to_dict(edit.where)
    return data


def _where_to_dict(where: Where) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if where.tokens is None and not (where.prompt and where.generation):
        data |= {"prompt": where.prompt, "generation": where.generation}
    for name in _WHERE_LISTS:
        if (values := getattr(where, name)) is not None:
            data[name] = list(values)
    if where.special:
        data["special"] = True
    return data


_WHERE_LISTS = ("tokens", "positions", "token_ids", "rows")
_WHERE_SWITCHES = ("prompt", "generation", "special")


def _edit_from_dict(data: Any, path: str) -> Edit:
    known = {"op", "latents", "value", "unit", "active_only", "site", "where"}
    _check_fields(data, path, known, {"op", "latents"})
    if not isinstance(data.get("site"), (str, type(None))):
        raise FormatError(f"{path}.site is {data['site']!r}; a string is expected.")
    for name in ("op", "unit"):
        if not isinstance(data.get(name, ""), str):
            raise FormatError(f"{path}.{name} is {data[name]!r}; a string is expected.")
    where = EVERYWHERE
    try:
        if "where" in data:
            _check_fields(data["where"], f"{path}.where", {*_WHERE_LISTS, *_WHERE_SWITCHES}, set())
            fields = dict(data["where"])
            for name in _WHERE_SWITCHES:
                if name in fields and not isinstance(fields[name], bool):
                    raise FormatError(f"{path}.where.{name} is {fields[name]!r}; true or false is expected.")
            if fields.get("tokens") is not None and {"prompt", "generation"} & set(fields):
                raise FormatError(f"{path}.where names tokens and more: {fields}. Leave out prompt and generation.")
            where = Where(**fields)
        return Edit(**{**data, "where": where})
    except (ArgumentError, LatentError) as error:
        raise FormatError(f"{path}: {error}") from None


def _edit(op: str, latents: int | Sequence[int], where: Where | None, **fields: Any) -> Edit:
    many = latents if isinstance(latents, Iterable) else (latents,)
    return Edit(op=op, latents=tuple(many), where=EVERYWHERE if where is None else where, **fields)


def steer(
    latent: int | Sequence[int],
    amount: float,
    unit: str = "raw",
    site: str | None = None,
    where: Where | None = None,
    active_only: bool = False,
) -> Edit:
    """Add `amount` to the latent, also where it is silent: x' = x + amount · W_dec[latent].

    `unit`: `raw`, `max` (times the recorded maximum) or `norm` (times the norm of the token's activation).
    """
    return _edit("add", latent, where, value=amount, unit=unit, site=site, active_only=active_only)


def clamp(
    latent: int | Sequence[int],
    value: float,
    unit: str = "raw",
    site: str | None = None,
    where: Where | None = None,
    active_only: bool = False,
) -> Edit:
    """Set the latent to `value`, whatever it was: x' = x + (value - z) · W_dec[latent]."""
    return _edit("set", latent, where, value=value, unit=unit, site=site, active_only=active_only)


set_ = clamp


def scale(
    latent: int | Sequence[int],
    factor: float,
    site: str | None = None,
    where: Where | None = None,
    active_only: bool = False,
) -> Edit:
    """Multiply the latent by `factor`: x' = x + (factor - 1) · z · W_dec[latent]."""
    return _edit("scale", latent, where, value=factor, site=site, active_only=active_only)


def ablate(latents: int | Sequence[int], site: str | None = None, where: Where | None = None) -> Edit:
    """Set the latents to 0: x' = x - Σ z · W_dec[latent]."""
    return _edit("ablate", latents, where, site=site)


def at_least(
    latent: int | Sequence[int],
    value: float,
    unit: str = "raw",
    site: str | None = None,
    where: Where | None = None,
    active_only: bool = False,
) -> Edit:
    """Raise the latent to `value` where it is below: z' = max(z, value), the op `min`."""
    return _edit("min", latent, where, value=value, unit=unit, site=site, active_only=active_only)


def at_most(
    latent: int | Sequence[int],
    value: float,
    unit: str = "raw",
    site: str | None = None,
    where: Where | None = None,
    active_only: bool = False,
) -> Edit:
    """Lower the latent to `value` where it is above: z' = min(z, value), the op `max`."""
    return _edit("max", latent, where, value=value, unit=unit, site=site, active_only=active_only)


def to_mean(
    latents: int | Sequence[int], site: str | None = None, where: Where | None = None, active_only: bool = False
) -> Edit:
    """Set the latents to their recorded mean activations; the SAE needs statistics."""
    return _edit("mean", latents, where, site=site, active_only=active_only)


def keep_only(latents: int | Sequence[int], site: str | None = None, where: Where | None = None) -> Edit:
    """Set all latents but these to 0: x' = x - Σ z · W_dec over the others."""
    return _edit("keep_only", latents, where, site=site)
