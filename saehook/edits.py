"""Edits by name: `steer(3, 0.5, unit="max")` and the others, which make the data of `interventions.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from saehook.interventions import Edit, VectorEdit
from saehook.where import EVERYWHERE, Where


def _edit(op: str, latents: int | Sequence[int], where: Where | None, **fields: Any) -> Edit:
    many = latents if isinstance(latents, Iterable) else (latents,)
    return Edit(op=op, latents=tuple(many), where=EVERYWHERE if where is None else where, **fields)


def steer(
    latent: int | Sequence[int],
    amount: float,
    unit: str = "raw",
    site: str | None = None,
    where: Where | None = None,
    **more: Any,
) -> Edit:
    """Add `amount` to the latent, also where it is silent: x' = x + amount · W_dec[latent].

    Args:
        latent: one latent, or several.
        amount: in `unit`, one of `UNITS`: `raw`, `max` (times the recorded maximum), `norm` (times the norm of the token's
            activation), `quantile` of its recorded activations, `kl` (`hooked.calibrate`).
        site: the attached SAE meant; None where only one is attached.
        where: which tokens; None: all of the mask.
        more: the other fields of `Edit`: when, schedule, active_only, mode.
    """
    return _edit("add", latent, where, value=amount, unit=unit, site=site, **more)


def clamp(
    latent: int | Sequence[int],
    value: float,
    unit: str = "raw",
    site: str | None = None,
    where: Where | None = None,
    **more: Any,
) -> Edit:
    """Set the latent to `value`, whatever it was: x' = x + (value - z) · W_dec[latent]. Arguments as for `steer`."""
    return _edit("set", latent, where, value=value, unit=unit, site=site, **more)


set_ = clamp


def scale(
    latent: int | Sequence[int], factor: float, site: str | None = None, where: Where | None = None, **more: Any
) -> Edit:
    """Multiply the latent by `factor`: x' = x + (factor - 1) · z · W_dec[latent]. `more` as for `steer`."""
    return _edit("scale", latent, where, value=factor, site=site, **more)


def ablate(latents: int | Sequence[int], site: str | None = None, where: Where | None = None, **more: Any) -> Edit:
    """Set the latents to 0: x' = x - Σ z · W_dec[latent]. `more` as for `steer`."""
    return _edit("ablate", latents, where, site=site, **more)


def at_least(
    latent: int | Sequence[int],
    value: float,
    unit: str = "raw",
    site: str | None = None,
    where: Where | None = None,
    **more: Any,
) -> Edit:
    """Raise the latent to `value` where it is below: z' = max(z, value), the op `min`. Arguments as for `steer`."""
    return _edit("min", latent, where, value=value, unit=unit, site=site, **more)


def at_most(
    latent: int | Sequence[int],
    value: float,
    unit: str = "raw",
    site: str | None = None,
    where: Where | None = None,
    **more: Any,
) -> Edit:
    """Lower the latent to `value` where it is above: z' = min(z, value), the op `max`. Arguments as for `steer`."""
    return _edit("max", latent, where, value=value, unit=unit, site=site, **more)


def to_mean(latents: int | Sequence[int], site: str | None = None, where: Where | None = None, **more: Any) -> Edit:
    """Set the latents to their recorded mean activations; the SAE needs statistics. `more` as for `steer`."""
    return _edit("mean", latents, where, site=site, **more)


def resample(
    latents: int | Sequence[int],
    source: tuple[int, int],
    site: str | None = None,
    where: Where | None = None,
    **more: Any,
) -> Edit:
    """Set the latents to what they are at another token of the input, `source` = (row, token; negative from its end), as
    x reaches the SAE there; 0 if that token is outside the mask. `more` as for `steer`."""
    return _edit("resample", latents, where, source=source, site=site, **more)


def swap(a: int, b: int, site: str | None = None, where: Where | None = None, **more: Any) -> Edit:
    """Exchange the activations of two latents. `more` as for `steer`."""
    return _edit("swap", (a, b), where, site=site, **more)


def keep_only(latents: int | Sequence[int], site: str | None = None, where: Where | None = None, **more: Any) -> Edit:
    """Set all latents but these to 0: x' = x - Σ z · W_dec over the others. `more` as for `steer`."""
    return _edit("keep_only", latents, where, site=site, **more)


def _vector_edit(op: str, vector: Any, where: Where | None, **fields: Any) -> VectorEdit:
    return VectorEdit(op=op, vector=vector, where=EVERYWHERE if where is None else where, **fields)


def add_vector(
    vector: Any,
    amount: float = 1.0,
    unit: str = "raw",
    site: str | None = None,
    where: Where | None = None,
    **more: Any,
) -> VectorEdit:
    """x' = x + amount · v; in unit `norm` x + amount · ‖x‖ · v / ‖v‖. `vector`: 1-D, the site's width; `more` as for `steer`
    but for active_only and mode."""
    return _vector_edit("add", vector, where, value=amount, unit=unit, site=site, **more)


def project_out(vector: Any, site: str | None = None, where: Where | None = None, **more: Any) -> VectorEdit:
    """x without its component along the vector. Arguments as for `add_vector`."""
    return _vector_edit("project_out", vector, where, site=site, **more)


def cap_along(
    vector: Any,
    limit: float,
    unit: str = "raw",
    site: str | None = None,
    where: Where | None = None,
    **more: Any,
) -> VectorEdit:
    """The component of x along v / ‖v‖ is at most `limit`; in unit `norm`, limit · ‖x‖. Arguments as for `add_vector`."""
    return _vector_edit("cap", vector, where, value=limit, unit=unit, site=site, **more)
