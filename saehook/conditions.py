"""When an edit acts: comparisons on latents of attached SAEs, as data.

    latent(501) > 3.0                                     at this token
    (latent(501, over="prompt_max") > 3.0) & ~(latent(7, site="layers.1.mlp_out") > 0)
    (latent(501) > 3.0).hold(8)                           at this token or one of the 8 before it

What is compared is z as it reaches the SAE, before the edits there, with 0 for tokens outside the SAE's mask. A condition
looks only at what the model has computed by then: its site runs before that of the edit or is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from saehook.errors import ArgumentError, FormatError, LatentError
from saehook.fields import check_fields, integers, number

OVER = ("here", "last", "so_far_max", "prompt_max", "decay")
COMPARISONS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
MAX_DEPTH = 32
"""Of conditions inside conditions."""


class Condition:
    """Something that is true or false at each token. Conditions combine with `&`, `|` and `~`."""

    def __and__(self, other: Condition) -> Condition:
        return And((self, other))

    def __or__(self, other: Condition) -> Condition:
        return Or((self, other))

    def __invert__(self) -> Condition:
        return Not(self)

    def __bool__(self) -> bool:
        raise ArgumentError(
            "a condition is true or false only at a token. Combine conditions with &, | and ~, each comparison in "
            "parentheses, and not with and, or, not or chained comparisons."
        )

    def hold(self, tokens: int) -> Condition:
        """Also true at the `tokens` tokens after one where this is."""
        return Hold(self, tokens)

    @property
    def parts(self) -> tuple[Condition, ...]:
        """The conditions inside."""
        return ()

    def comparisons(self) -> Iterator[Comparison]:
        """All comparisons inside."""
        for part in self.parts:
            yield from part.comparisons()

    @property
    def looks_back(self) -> bool:
        """Whether it depends on generated tokens before the one at which it is asked."""
        return any(part.looks_back for part in self.parts)

    def to_data(self) -> dict[str, Any]:
        """What stands in a program's JSON."""
        raise NotImplementedError

    def _check(self) -> None:
        if not self.parts:
            raise ArgumentError("no conditions to combine are given; at least one is expected.")
        for part in self.parts:
            if not isinstance(part, Condition):
                raise ArgumentError(f"{part!r} is no condition; expected for example latent(501) > 3.0.")
        if _depth(self) > MAX_DEPTH:
            raise ArgumentError(f"conditions are nested more than {MAX_DEPTH} deep. Make them simpler.")


def _depth(condition: Condition) -> int:
    level, depth = [condition], 0
    while level and depth <= MAX_DEPTH:
        level, depth = [part for one in level for part in one.parts], depth + 1
    return depth


@dataclass(frozen=True)
class LatentValue:
    """A latent's activation, to be compared with a number; made by `latent`."""

    latent: int
    site: str | None = None
    """The attached SAE meant; None where only one is attached."""
    over: str = "here"
    """One of `OVER`."""
    decay: float | None = None
    """With over='decay', how much of the activation is left one token later."""

    def __post_init__(self) -> None:
        (latent,) = integers((self.latent,), "latents")
        if latent < 0:
            raise LatentError(f"latent {latent} is negative; latents are counted from 0.")
        object.__setattr__(self, "latent", latent)
        if not isinstance(self.site, (str, type(None))):
            raise ArgumentError(f"site={self.site!r} is no site name; expected for example 'layers.2.resid_post'.")
        if self.over not in OVER:
            raise ArgumentError(f"over={self.over!r} is unknown; expected one of {', '.join(OVER)}.")
        if (self.over == "decay") != (self.decay is not None):
            raise ArgumentError(f"over={self.over!r} with decay={self.decay!r}; decay goes with over='decay' only.")
        if self.decay is not None:
            decay = number(self.decay, "decay")
            if not 0 < decay < 1:
                raise ArgumentError(f"decay={decay}; a number between 0 and 1 is expected.")
            object.__setattr__(self, "decay", decay)

    def __gt__(self, value: float) -> Condition:
        return Comparison("gt", self, value)

    def __ge__(self, value: float) -> Condition:
        return Comparison("ge", self, value)

    def __lt__(self, value: float) -> Condition:
        return Comparison("lt", self, value)

    def __le__(self, value: float) -> Condition:
        return Comparison("le", self, value)

    def __str__(self) -> str:
        over = "" if self.over == "here" else f" {self.over}" + (f" {self.decay:g}" if self.decay else "")
        return f"latent {self.latent}{over}" + (f" at {self.site}" if self.site else "")


def latent(latent: int, site: str | None = None, over: str = "here", decay: float | None = None) -> LatentValue:
    """The activation of a latent at the token where a condition is asked: `latent(501) > 3.0`.

    Args:
        latent: its number.
        site: the attached SAE meant; None where only one is attached.
        over: `here`: at the token itself; `last`: at the one before; `so_far_max`: the largest up to the token, itself
            included; `prompt_max`: the largest on the tokens of the input; `decay`: the largest of z · `decay` ** distance
            up to the token.
        decay: with over='decay', between 0 and 1.
    """
    return LatentValue(latent, site, over, decay)


@dataclass(frozen=True)
class Comparison(Condition):
    """A latent's activation against a number."""

    op: str
    """One of `COMPARISONS`."""
    left: LatentValue
    right: float

    def __post_init__(self) -> None:
        if self.op not in COMPARISONS:
            raise ArgumentError(f"there is no comparison {self.op!r}; expected one of {', '.join(COMPARISONS)}.")
        if not isinstance(self.left, LatentValue):
            raise ArgumentError(f"{self.left!r} cannot be compared; expected latent(...).")
        object.__setattr__(self, "right", number(self.right, "what a latent is compared with"))

    def comparisons(self) -> Iterator[Comparison]:
        yield self

    @property
    def looks_back(self) -> bool:
        return self.left.over not in ("here", "prompt_max")

    def __str__(self) -> str:
        return f"{self.left} {COMPARISONS[self.op]} {self.right:g}"

    def to_data(self) -> dict[str, Any]:
        data: dict[str, Any] = {"latent": self.left.latent}
        if self.left.site is not None:
            data["site"] = self.left.site
        if self.left.over != "here":
            data["over"] = self.left.over
        if self.left.decay is not None:
            data["decay"] = self.left.decay
        return {self.op: [data, self.right]}


@dataclass(frozen=True)
class _Several(Condition):
    """Conditions joined by the word of the class."""

    word: ClassVar[str]
    of: tuple[Condition, ...]

    def __post_init__(self) -> None:
        self._check()

    @property
    def parts(self) -> tuple[Condition, ...]:
        return self.of

    def __str__(self) -> str:
        return "(" + f" {self.word} ".join(map(str, self.of)) + ")"

    def to_data(self) -> dict[str, Any]:
        return {self.word: [part.to_data() for part in self.of]}


@dataclass(frozen=True)
class And(_Several):
    """All of some conditions."""

    word = "and"


@dataclass(frozen=True)
class Or(_Several):
    """At least one of some conditions."""

    word = "or"


@dataclass(frozen=True)
class Not(Condition):
    """The opposite of a condition."""

    of: Condition

    def __post_init__(self) -> None:
        self._check()

    @property
    def parts(self) -> tuple[Condition, ...]:
        return (self.of,)

    def __str__(self) -> str:
        return f"not ({self.of})"

    def to_data(self) -> dict[str, Any]:
        return {"not": self.of.to_data()}


@dataclass(frozen=True)
class Hold(Condition):
    """A condition at the token or one of the `tokens` before it."""

    of: Condition
    tokens: int

    def __post_init__(self) -> None:
        self._check()
        (tokens,) = integers((self.tokens,), "tokens of hold")
        if tokens < 1:
            raise ArgumentError(f"hold({tokens}); a whole number of tokens from 1 is expected.")
        object.__setattr__(self, "tokens", tokens)

    @property
    def parts(self) -> tuple[Condition, ...]:
        return (self.of,)

    @property
    def looks_back(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"({self.of}) held for {self.tokens} tokens"

    def to_data(self) -> dict[str, Any]:
        return {"hold": [self.of.to_data(), self.tokens]}


def condition_from_data(data: Any, path: str, depth: int = 0) -> Condition:
    """From a program's JSON.

    Raises:
        FormatError: an unknown field or a value of the wrong kind; `path` is named.
    """
    check_fields(data, path, {*COMPARISONS, "and", "or", "not", "hold"})
    if len(data) != 1:
        raise FormatError(f"{path} has {len(data)} fields; exactly one of them is expected.")
    if depth >= MAX_DEPTH:
        raise FormatError(f"{path}: conditions are nested more than {MAX_DEPTH} deep. Make them simpler.")
    ((op, value),) = data.items()
    inside = f"{path}.{op}"
    if op == "not":
        return Not(condition_from_data(value, inside, depth + 1))
    if not isinstance(value, list):
        raise FormatError(f"{inside} is {value!r}; a list is expected.")
    if op in ("and", "or"):
        if not value:
            raise FormatError(f"{inside} is empty; at least one condition is expected.")
        parts = tuple(condition_from_data(part, f"{inside}[{i}]", depth + 1) for i, part in enumerate(value))
        return And(parts) if op == "and" else Or(parts)
    if len(value) != 2:
        raise FormatError(f"{inside} has {len(value)} entries; two are expected.")
    try:
        if op == "hold":
            return Hold(condition_from_data(value[0], f"{inside}[0]", depth + 1), value[1])
        check_fields(value[0], f"{inside}[0]", {"latent", "site", "over", "decay"}, {"latent"})
        return Comparison(op, LatentValue(**value[0]), value[1])
    except (ArgumentError, LatentError, TypeError) as error:
        raise FormatError(f"{inside}: {error}") from None
