"""How the strength of an edit goes over the generated tokens, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saehook.errors import ArgumentError, FormatError
from saehook.fields import MAX_VALUE, check_fields, listed, number

MAX_STEPS = 100_000


@dataclass(frozen=True)
class Schedule:
    """A factor on an edit's change z' - z, by the generated token t = 0, 1, ...; tokens of the input have that of t = 0.

    So an added amount is multiplied, and a latent that is set or ablated goes that part of the way. Made by `linear`,
    `exponential` and `steps`; exactly one field is given.
    """

    line: tuple[float, float, int] | None = None
    """(a, b, n): from a at t = 0 in equal steps to b at t = n, which then stays."""
    rate: float | None = None
    """rate ** t, of a number from 0."""
    factors: tuple[float, ...] | None = None
    """The factor of each t; the last one stays."""

    def __post_init__(self) -> None:
        if sum(field is not None for field in (self.line, self.rate, self.factors)) != 1:
            raise ArgumentError(f"{self!r} gives not exactly one of line, rate and factors. Use Schedule.linear(...).")
        if self.line is not None:
            if not isinstance(self.line, (tuple, list)) or len(self.line) != 3:
                raise ArgumentError(f"the line of a schedule is {self.line!r}; (from, to, tokens) is expected.")
            start, stop, n = self.line
            if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_STEPS:
                raise ArgumentError(f"a schedule over {n!r} tokens; a whole number from 1 to {MAX_STEPS} is expected.")
            line = (number(start, "the start of a schedule"), number(stop, "the end of a schedule"), n)
            object.__setattr__(self, "line", line)
        if self.rate is not None:
            rate = number(self.rate, "the rate of a schedule")
            if rate < 0:
                raise ArgumentError(f"the rate of a schedule is {rate}; a number from 0 is expected.")
            object.__setattr__(self, "rate", rate)
        if self.factors is not None:
            if not isinstance(self.factors, (tuple, list)) or not 1 <= len(self.factors) <= MAX_STEPS:
                raise ArgumentError(f"the factors of a schedule are {self.factors!r}; 1 to {MAX_STEPS} are expected.")
            object.__setattr__(self, "factors", tuple(number(f, "a factor of a schedule") for f in self.factors))

    @staticmethod
    def linear(start: float, stop: float, tokens: int) -> Schedule:
        """From `start` at the first generated token to `stop` at the one `tokens` later, which then stays."""
        return Schedule(line=(start, stop, tokens))

    @staticmethod
    def exponential(rate: float) -> Schedule:
        """`rate` ** t: 0.9 fades out, 1.1 grows."""
        return Schedule(rate=rate)

    @staticmethod
    def steps(*factors: float) -> Schedule:
        """These factors, one a token; the last one stays."""
        return Schedule(factors=factors)

    def at(self, t: int) -> float:
        """The factor of generated token `t`, from 0; of a growing rate at most what float32 holds."""
        t = max(t, 0)
        if self.line is not None:
            start, stop, n = self.line
            part = min(t / n, 1.0)
            return start * (1 - part) + stop * part
        if self.rate is not None:
            try:
                return min(self.rate**t, MAX_VALUE)
            except OverflowError:
                return MAX_VALUE
        assert self.factors is not None
        return self.factors[min(t, len(self.factors) - 1)]

    def __str__(self) -> str:
        if self.line is not None:
            return "× {:g} to {:g} over {} tokens".format(*self.line)
        return f"× {self.rate:g} a token" if self.rate is not None else f"× {listed(self.factors or ())}"

    def to_data(self) -> dict[str, Any]:
        """What stands in a program's JSON."""
        if self.line is not None:
            return {"linear": list(self.line)}
        return {"exponential": self.rate} if self.rate is not None else {"steps": list(self.factors or ())}

    @staticmethod
    def from_data(data: Any, path: str) -> Schedule:
        """From a program's JSON.

        Raises:
            FormatError: an unknown field or a value of the wrong kind; `path` is named.
        """
        check_fields(data, path, {"linear", "exponential", "steps"})
        try:
            match list(data.items()):
                case [("linear", list(values))]:
                    return Schedule(line=tuple(values))  # type: ignore[arg-type]
                case [("exponential", rate)] if rate is not None:
                    return Schedule(rate=rate)
                case [("steps", list(values))]:
                    return Schedule(factors=tuple(values))
        except ArgumentError as error:
            raise FormatError(f"{path}: {error}") from None
        raise FormatError(
            f"{path} is {data!r}; one of {{'linear': [from, to, tokens]}}, {{'exponential': rate}} and "
            "{'steps': [factors]} is expected."
        )
