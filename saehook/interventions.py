"""Edits of latents as frozen data, with a JSON form. `edits.py` makes them; what they do to activations is in `editing.py`.

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
| `resample` | the latent's z at another token of the input, `source` | none |
| `swap` | z of the other one of two latents | none |
| `keep_only` | z, and 0 for every other latent of the SAE | none |

With `active_only` an edit acts where z, as the edits before it left it, is above 0; a token on which none of its latents
is, it does not touch. `where` says at which tokens it acts, `when` under which condition on latents, and `schedule` how much
of the change z' - z is made at each generated token.

Units of `set`, `add`, `min` and `max`: `raw`; `max` (times the latent's recorded maximum); `norm` (times
‖x‖ / ‖W_dec[latent]‖, so that the written vector has `value` times the norm of the token's activation); `quantile` (the
activation below which that share of the latent's recorded positive activations lies). `kl`, of `set`, `add` and `scale`, is
a mean KL to the unedited model in nats per token, to be turned into a strength by `hooked.calibrate(edits, text)`.

`mode="readback"`: what is written is solved for so that encoding x' gives z'; without it x' gets (z' - z) W_dec, which
the encoder reads back as more or less than z', since latents overlap.

A `VectorEdit` acts on x along a direction v that need not be a latent's:

| op | x' | value |
|---|---|---|
| `add` | x + value · v; in unit `norm` x + value · ‖x‖ · v / ‖v‖ | in `unit` |
| `project_out` | x without its component along v | none |
| `cap` | x with a component along v / ‖v‖ of at most value; in unit `norm`, value · ‖x‖ | in `unit` |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saehook.conditions import Condition, condition_from_data
from saehook.errors import ArgumentError, FormatError, LatentError
from saehook.fields import MAX_VALUE, check_fields, check_kinds, from_json, integers, listed, number, short
from saehook.schedules import Schedule
from saehook.token_html import table_html
from saehook.where import EVERYWHERE, Where

OPS = ("set", "add", "scale", "ablate", "min", "max", "mean", "resample", "swap", "keep_only")
NO_VALUE = ("ablate", "mean", "resample", "swap", "keep_only")
NO_UNIT = ("scale", *NO_VALUE)
NO_ACTIVE_ONLY = ("ablate", "keep_only")
UNITS = ("raw", "max", "norm", "quantile", "kl")
KL_OPS = ("set", "add", "scale")
MODES = ("decoder", "readback")
VECTOR_OPS = ("add", "project_out", "cap")
VECTOR_UNITS = ("raw", "norm", "kl")
ERRORS = ("keep", "drop", "mean")
SCHEMA = 1


def _place_from_data(data: dict[str, Any], path: str) -> dict[str, Any]:
    """`data` with objects instead of where, when and schedule."""
    check_kinds(data, path, str, ("op", "unit", "mode"))
    if not isinstance(data.get("site"), (str, type(None))):
        raise FormatError(f"{path}.site is {short(data['site'])}; a string is expected.")
    readers = {"where": Where.from_data, "when": condition_from_data, "schedule": Schedule.from_data}
    return data | {name: read(data[name], f"{path}.{name}") for name, read in readers.items() if name in data}


_PLACE = ("site", "where", "when", "schedule")


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where and when an edit acts."""

    site: str | None = None
    """The attached SAE meant, or the site of a vector; None: the only SAE that is attached, or its site."""
    where: Where = EVERYWHERE
    """Which tokens; for a vector the mask is that of an SAE without a `mask_rule`."""
    when: Condition | None = None
    """Under which condition on latents; None: always."""
    schedule: Schedule | None = None
    """How much of the change at each generated token; None: all of it."""

    def _check_place(self) -> None:
        """Raises ArgumentError where one of these is of another kind."""
        if not isinstance(self.site, (str, type(None))):
            raise ArgumentError(f"site={self.site!r} is no site name; expected for example 'layers.2.resid_post'.")
        if not isinstance(self.where, Where):
            raise ArgumentError(
                f"where={self.where!r} is no Where; expected prompt(), generation(), tokens(0, -1), or None for every token."
            )
        if not isinstance(self.when, (Condition, type(None))):
            raise ArgumentError(f"when={self.when!r} is no condition; expected for example latent(501) > 3.0.")
        if not isinstance(self.schedule, (Schedule, type(None))):
            raise ArgumentError(f"schedule={self.schedule!r} is none; expected for example Schedule.linear(1, 0, 20).")

    def _place_words(self) -> str:
        site = f" at {self.site}" if self.site else ""
        when = f" when {self.when}" if self.when is not None else ""
        schedule = f" {self.schedule}" if self.schedule is not None else ""
        return f"{schedule}{site}{when} ({self.where})"

    def _place_to_data(self) -> dict[str, Any]:
        data: dict[str, Any] = {}
        if self.site is not None:
            data["site"] = self.site
        if self.where != EVERYWHERE:
            data["where"] = self.where.to_data()
        if self.when is not None:
            data["when"] = self.when.to_data()
        if self.schedule is not None:
            data["schedule"] = self.schedule.to_data()
        return data


@dataclass(frozen=True, kw_only=True)
class Edit(Placed):
    """One operation on some latents of the SAE at one site."""

    op: str
    """One of `OPS`."""
    latents: tuple[int, ...]
    """Which latents; each once."""
    value: float | None = None
    """What the op needs; None for those of `NO_VALUE`."""
    unit: str = "raw"
    """One of `UNITS`; those of `NO_UNIT` have none but `raw`."""
    active_only: bool = False
    """Act only where the latent is active, z > 0; not for those of `NO_ACTIVE_ONLY`."""
    mode: str = "decoder"
    """One of `MODES`."""
    source: tuple[int, int] | None = None
    """Of `resample`: (row of the input, index among its own real tokens, negative from its end)."""

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ArgumentError(f"there is no operation {self.op!r}; expected one of {', '.join(OPS)}.")
        latents = integers(self.latents, "latents")
        if not latents:
            raise ArgumentError(f"the edit {self.op!r} names no latent. Name at least one.")
        if len(set(latents)) < len(latents):
            raise ArgumentError(f"the edit {self.op!r} names a latent twice: {latents}. Name each once.")
        if min(latents) < 0:
            raise LatentError(f"latent {min(latents)} is negative; latents are counted from 0.")
        if self.op == "swap" and len(latents) != 2:
            raise ArgumentError(f"'swap' names {len(latents)} latents; exactly two are expected.")
        object.__setattr__(self, "latents", latents)
        self._check_value()
        if not isinstance(self.active_only, bool):
            raise ArgumentError(f"active_only={self.active_only!r}; True or False is expected.")
        if self.active_only and self.op in NO_ACTIVE_ONLY:
            raise ArgumentError(f"{self.op!r} does the same with active_only=True or without. Leave it out.")
        if self.mode not in MODES:
            raise ArgumentError(f"mode={self.mode!r} is unknown; expected one of {', '.join(MODES)}.")
        if self.mode == "readback" and self.op == "keep_only":
            raise ArgumentError("'keep_only' writes all latents, so it cannot be solved for some. Leave mode out.")
        if self.op == "keep_only" and self.schedule is not None:
            raise ArgumentError("'keep_only' has no schedule: it sets latents to 0 or leaves them. Leave it out.")
        if (self.op == "resample") != (self.source is not None):
            raise ArgumentError(f"{self.op!r} with source={self.source!r}; 'resample' has a source, and no other op.")
        if self.source is not None:
            source = integers(self.source, "source")
            if len(source) != 2 or source[0] < 0:
                raise ArgumentError(f"source={self.source!r}; (row of the input, token of the row) is expected.")
            object.__setattr__(self, "source", source)
        self._check_place()

    def _check_value(self) -> None:
        if self.unit not in UNITS:
            raise ArgumentError(f"there is no unit {self.unit!r}; expected one of {', '.join(UNITS)}.")
        if self.unit == "kl" and self.op not in KL_OPS:
            raise ArgumentError(f"unit='kl' is for {', '.join(KL_OPS)}, not for {self.op!r}.")
        if self.op in NO_UNIT and self.unit not in ("raw", "kl"):
            raise ArgumentError(f"{self.op!r} has no unit, but unit={self.unit!r} was given. Leave it out.")
        if self.op in NO_VALUE:
            if self.value is not None:
                raise ArgumentError(f"{self.op!r} takes no value, but {self.value!r} was given. Use 'set' or 'scale'.")
            return
        object.__setattr__(self, "value", number(self.value, f"the value of {self.op!r}"))
        assert self.value is not None
        if self.unit == "quantile" and not 0 <= self.value <= 1:
            raise ArgumentError(f"the quantile of {self.op!r} is {self.value:g}; a number from 0 to 1 is expected.")
        if self.unit == "kl" and self.value == 0:
            raise ArgumentError("a KL of 0 is the unedited model. Leave the edit out.")

    def __str__(self) -> str:
        amount = "" if self.value is None else f" {self.value:g}" + ("" if self.unit == "raw" else f" {self.unit}")
        if self.source is not None:
            amount += f" from token {self.source[1]} of row {self.source[0]}"
        amount += " read back" if self.mode == "readback" else ""
        active = " where active" if self.active_only else ""
        return f"{self.op} {listed(self.latents)}{amount}{active}{self._place_words()}"

    def to_data(self) -> dict[str, Any]:
        """What stands in a program's JSON."""
        data: dict[str, Any] = {"op": self.op, "latents": list(self.latents)}
        if self.value is not None:
            data |= {"value": self.value, "unit": self.unit}
        if self.active_only:
            data["active_only"] = True
        if self.mode != "decoder":
            data["mode"] = self.mode
        if self.source is not None:
            data["source"] = list(self.source)
        return data | self._place_to_data()

    @staticmethod
    def from_data(data: Any, path: str) -> Edit:
        """From a program's JSON.

        Raises:
            FormatError: an unknown field or a value of the wrong kind; `path` is named.
        """
        known = {"op", "latents", "value", "unit", "active_only", "mode", "source", *_PLACE}
        check_fields(data, path, known, {"op", "latents"})
        try:
            return Edit(**_place_from_data(data, path))
        except (ArgumentError, LatentError) as error:
            raise FormatError(f"{path}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class VectorEdit(Placed):
    """One operation on the activations of a site along a direction; no SAE is needed there."""

    op: str
    """One of `VECTOR_OPS`."""
    vector: tuple[float, ...]
    """v, one number per channel of the site; not all 0."""
    value: float | None = None
    """What `add` and `cap` need."""
    unit: str = "raw"
    """One of `VECTOR_UNITS`."""

    def __post_init__(self) -> None:
        if self.op not in VECTOR_OPS:
            raise ArgumentError(f"there is no operation {self.op!r} on a vector; expected one of {listed(VECTOR_OPS)}.")
        given = self.vector.tolist() if hasattr(self.vector, "tolist") else self.vector  # type: ignore[union-attr]
        if not isinstance(given, (list, tuple)) or not given:
            raise ArgumentError(f"the vector is {short(given)}; one number per channel of the site is expected.")
        vector = tuple(number(v, "an entry of the vector") for v in given)
        if not any(vector):
            raise ArgumentError("the vector is 0, so it has no direction.")
        object.__setattr__(self, "vector", vector)
        if self.unit not in VECTOR_UNITS or (self.unit == "kl" and self.op != "add"):
            raise ArgumentError(
                f"there is no unit {self.unit!r} for {self.op!r} on a vector; expected raw or norm, or kl for 'add'."
            )
        if self.op == "project_out":
            if self.value is not None or self.unit != "raw":
                raise ArgumentError("'project_out' takes neither value nor unit. Leave them out.")
        else:
            object.__setattr__(self, "value", number(self.value, f"the value of {self.op!r}"))
        if self.unit == "kl" and self.value == 0:
            raise ArgumentError("a KL of 0 is the unedited model. Leave the edit out.")
        self._check_place()

    def __str__(self) -> str:
        amount = "" if self.value is None else f" {self.value:g}" + ("" if self.unit == "raw" else f" {self.unit}")
        return f"{self.op} along a vector{amount}{self._place_words()}"

    def to_data(self) -> dict[str, Any]:
        """What stands in a program's JSON."""
        data: dict[str, Any] = {"op": self.op, "vector": list(self.vector)}
        if self.value is not None:
            data |= {"value": self.value, "unit": self.unit}
        return data | self._place_to_data()

    @staticmethod
    def from_data(data: Any, path: str) -> VectorEdit:
        """From a program's JSON.

        Raises:
            FormatError: an unknown field or a value of the wrong kind; `path` is named.
        """
        check_fields(data, path, {"op", "vector", "value", "unit", *_PLACE}, {"op", "vector"})
        if not isinstance(data["vector"], list):
            raise FormatError(f"{path}.vector is {short(data['vector'])}; a list of numbers is expected.")
        try:
            return VectorEdit(**_place_from_data(data, path))
        except ArgumentError as error:
            raise FormatError(f"{path}: {error}") from None


AnyEdit = Edit | VectorEdit


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
    """Edits in the order in which they apply, and what happens to the SAE's reconstruction error.

    At one site, edits of one SAE that follow each other are one block: it encodes x once, and its edits apply to z in listed
    order. The next block, of another SAE or a vector, sees what the block before it wrote; with `parallel` all blocks
    see the same x, and their changes are added up.
    """

    edits: Sequence[AnyEdit] = ()
    """In the order in which they apply; kept as a tuple."""
    splice: bool = False
    """Put decode(z') on every token of the mask at every attached SAE."""
    error: str | None = None
    """`keep`: x' = x + (z' - z) W_dec. `drop`: x' = decode(z') on the tokens that an edit touches. `mean`: as `drop`, plus
    the SAE's recorded mean error. None: `keep`, or with `splice`, which drops it everywhere, nothing."""
    norm: str | Cap | Mapping[str, float] | None = None
    """After all edits of a site, on the tokens that they touch: `preserve` makes ‖x'‖ = ‖x‖, so that only the direction
    changes; `{"cap": f}`, kept as a `Cap`, makes ‖x' - x‖ ≤ f · ‖x‖. A token of norm 0 stays as it is."""
    parallel: bool = False
    """All blocks of a site see the same x; only with the error kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        for edit in self.edits:
            if not isinstance(edit, (Edit, VectorEdit)):
                raise ArgumentError(
                    f"{edit!r} is no edit; expected an Edit such as steer(...), clamp(...) or ablate(...)."
                )
        if self.error is not None and self.error not in ERRORS:
            raise ArgumentError(f"error={self.error!r} is unknown; expected one of {', '.join(ERRORS)}.")
        object.__setattr__(self, "norm", _norm(self.norm))
        for name in ("splice", "parallel"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}={getattr(self, name)!r}; True or False is expected.")
        if self.splice and self.error == "keep":
            raise ArgumentError(
                "splice=True puts the reconstruction in, error='keep' leaves the error there: together they are the "
                "unspliced model. Leave one of them out."
            )
        if self.drops_error:
            if self.parallel:
                raise ArgumentError(
                    "parallel=True adds changes up, and a dropped error is none. Leave one of them out."
                )
            if any(isinstance(edit, Edit) and edit.mode == "readback" for edit in self.edits):
                raise ArgumentError(
                    "mode='readback' solves for a change of x, so the error is kept. Leave one of them out."
                )

    @staticmethod
    def of(edits: Program | AnyEdit | Iterable[AnyEdit], splice: bool = False, error: str | None = None) -> Program:
        """A program from what a call was given: edits, a single edit, or a whole program, which the others add to."""
        if isinstance(edits, Program):
            return replace(edits, splice=splice or edits.splice, error=error or edits.error)
        many = (edits,) if isinstance(edits, (Edit, VectorEdit)) else tuple(edits)
        return Program(edits=many, splice=splice, error=error)

    @property
    def drops_error(self) -> bool:
        """Whether a touched token becomes the reconstruction, with or without the mean error."""
        return self.splice or self.error in ("drop", "mean")

    def _repr_html_(self) -> str:
        """For notebooks: one row for each edit, and what belongs to all."""
        rows = [(number, str(edit)) for number, edit in enumerate(self.edits, 1)]
        whole = {
            "splice": self.splice or None,
            "error": self.error,
            "norm": self.norm,
            "parallel": self.parallel or None,
        }
        rows += [("", f"{name}: {value}") for name, value in whole.items() if value is not None]
        return table_html(("", "edit"), rows)

    def to_json(self) -> str:
        """The program as JSON; `from_json` gives an equal one back."""
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "edits": [edit.to_data() for edit in self.edits],
            "splice": self.splice,
            "error": self.error,
        }
        if self.norm is not None:
            data["norm"] = {"cap": self.norm.limit} if isinstance(self.norm, Cap) else self.norm
        if self.parallel:
            data["parallel"] = True
        return json.dumps(data, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Program:
        """A program from its JSON form. Data only: nothing is imported or run.

        Raises:
            FormatError: not JSON, an unknown schema or field, or a value of the wrong kind; the field is named.
        """
        return Program.from_data(from_json(text, "program"))

    @staticmethod
    def from_data(data: Any) -> Program:
        """As `from_json`, from what `fields.from_json` read."""
        known = {"schema", "edits", "splice", "error", "norm", "parallel"}
        check_fields(data, "program", known, {"schema", "edits"})
        if isinstance(data["schema"], bool) or data["schema"] != SCHEMA:
            raise FormatError(f"the program's schema is {short(data['schema'])}; this version reads schema {SCHEMA}.")
        if not isinstance(data["edits"], list):
            raise FormatError(f"program.edits is {short(data['edits'])}; a list is expected.")
        check_kinds(data, "program", bool, ("splice", "parallel"))
        if isinstance(data.get("norm"), dict):
            check_fields(data["norm"], "program.norm", {"cap"})
        edits = tuple(_edit_from_data(edit, f"edits[{i}]") for i, edit in enumerate(data["edits"]))
        try:
            fields = {name: value for name, value in data.items() if name not in ("schema", "edits")}
            return Program(edits=edits, **fields)
        except (ArgumentError, TypeError) as error:
            raise FormatError(f"program: {error}") from None


def _edit_from_data(data: Any, path: str) -> AnyEdit:
    if isinstance(data, dict) and "vector" in data:
        return VectorEdit.from_data(data, path)
    return Edit.from_data(data, path)


def _norm(given: Any) -> str | Cap | None:
    if given is None or isinstance(given, Cap) or (isinstance(given, str) and given == "preserve"):
        return given
    if isinstance(given, Mapping) and set(given) == {"cap"}:
        return Cap(given["cap"])
    raise ArgumentError(f"norm={given!r} is unknown; expected 'preserve' or {{'cap': a number above 0}}.")
