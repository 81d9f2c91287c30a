"""Attribution: what each active latent contributes to one number that is read off the logits, the metric m.

The effect of a latent on a token is what m would lose by ablating it there, m(clean) - m(ablated): positive where it raises
m. Ablation is that of `ablate`: the error is kept, and all that comes later reacts as the model does.

    gradient      z_i σ(x) · ∂m/∂x · W_dec[i]     first order; one forward and one backward pass for all latents
    integrated    the same with the mean of ∂m/∂x on the way from x without its latents, x - σ(x) z W_dec, to x
    exact         m(clean) - m(ablated)           one row of a batch for each effect

The first is attribution patching against zero, with the error passed through: x' = decode(z') + (x - x_hat), where the
bracket is constant for z', and ∂m/∂x' goes on to x unchanged (Marks et al. 2024, arXiv 2403.19647). So at several sites each
effect is the latent's total effect, what it does through the latents of later sites included: effects of one site add up,
to first order, and those of different sites overlap. The integrated effects of a site sum to what ablating all its latents
at once takes from m (Sundararajan et al. 2017, completeness), while the other sites are left as they are: they share out
what the latents do together, which one of them need not do alone.

Tokens outside the mask of an SAE have no effects.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saehook.edit_blocks import SourceAction, norm_of
from saehook.editing import Action, ChainAction
from saehook.errors import ArgumentError
from saehook.positions import TokenView

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs

MAX_NUMBERS = 2**24
"""Numbers of one temporary tensor: logits of a batch of ablated rows, activations of some tokens, decoder rows of some
latents."""


@dataclass(frozen=True)
class Logit:
    """The logit of a next token, or how far it is above that of another."""

    token: int | str
    """An id, or a text that is a single token."""
    minus: int | str | None = None
    """The other token."""
    position: int = -1
    """The token behind which it is predicted, counted among the row's own; -1 is the last."""


@dataclass(frozen=True)
class LogProb:
    """The log-probability of a next token, in nats."""

    token: int | str
    """An id, or a text that is a single token."""
    position: int = -1
    """As in `Logit`."""


@dataclass(frozen=True)
class Loss:
    """Mean cross-entropy of the row's next tokens in nats, as `hooked.loss` gives it. A latent that helps has an effect
    below 0."""


Function = Callable[[Tensor], Tensor]
Metric = Logit | LogProb | Loss | Function
"""A callable gets the logits of one row, [S, vocab] without padding, at least float32, and returns one number."""


class LatentEffect(NamedTuple):
    """One effect."""

    site: str
    latent: int
    position: int
    """The token, counted among the row's own; summed over tokens, that of the largest activation."""
    token: str
    activation: float
    effect: float


@dataclass(frozen=True)
class Attribution:
    """Effects of the active latents in one row: one for each token and latent, or one for each latent. All on the CPU."""

    metric: float
    """m(clean)."""
    sites: tuple[str, ...]
    """Names of the attached SAEs, as in `hooked.sites`."""
    site: Tensor
    """Index into `sites` of each effect, [n] int64."""
    position: Tensor
    """[n] int64, as in `LatentEffect`."""
    latent: Tensor
    """[n] int64."""
    activation: Tensor
    """[n] float32, raw."""
    effect: Tensor
    """[n] float32, in units of the metric."""
    ids: Tensor
    """The row, [S] int64."""
    tokens: list[str]
    """The text of each token."""
    by_token: bool = True
    """Whether each effect is that of one token."""

    def top(self, n: int = 10, *, sign: int = 0) -> list[LatentEffect]:
        """The n largest effects by absolute value, largest first; fewer if fewer are not 0.

        `sign`: 1 for those that raise the metric only, -1 for those that lower it.
        """
        if n < 1 or sign not in {-1, 0, 1}:
            raise ArgumentError(f"top({n}, sign={sign}); n of at least 1 and a sign of -1, 0 or 1 are expected.")
        size = self.effect.abs() if sign == 0 else self.effect * sign
        order = size.argsort(descending=True, stable=True)[:n]
        return [
            LatentEffect(
                self.sites[int(self.site[i])],
                int(self.latent[i]),
                int(self.position[i]),
                self.tokens[int(self.position[i])],
                float(self.activation[i]),
                float(self.effect[i]),
            )
            for i in order[size[order] > 0].tolist()
        ]

    @property
    def per_token(self) -> Tensor:
        """Sum of the effects at each token, [len(sites), S] float32.

        Raises:
            ArgumentError: `by_token` is False.
        """
        if not self.by_token:
            raise ArgumentError("these effects are those of whole latents. Ask for by_token=True.")
        sums = torch.zeros(len(self.sites), len(self.ids), dtype=torch.float64)
        sums.index_put_((self.site, self.position), self.effect.double(), accumulate=True)
        return sums.float()

    @functools.cached_property
    def summed(self) -> Attribution:
        """One effect for each latent, ordered by site and latent: the sum over its tokens, the largest of its activations and
        its position. Of exact effects this is the sum of single ablations; `by_token=False` ablates all tokens at once."""
        if not self.by_token:
            return self
        key = self.site * (int(self.latent.max()) + 1 if len(self.latent) else 1) + self.latent
        order = self.activation.argsort(descending=True, stable=True)
        order = order[key[order].argsort(stable=True)]
        _, group, counts = key[order].unique_consecutive(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, group, self.effect[order].double())
        peak = order[counts.cumsum(0) - counts]
        return replace(
            self,
            site=self.site[peak],
            position=self.position[peak],
            latent=self.latent[peak],
            activation=self.activation[peak],
            effect=sums.float(),
            by_token=False,
        )


def attribute_rows(
    hooked: HookedSAEs,
    rows: Sequence[Tensor],
    metric: Metric,
    *,
    steps: int | None = None,
    exact: bool = False,
    by_token: bool = True,
) -> list[Attribution]:
    """`HookedSAEs.attribute` of each row of ids."""
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ArgumentError(f"steps={steps!r}; a whole number of at least 1 is expected, or None for one gradient.")
    if steps is not None and exact:
        raise ArgumentError("exact=True needs no steps of an integral. Leave one of them out.")
    for name, value in (("exact", exact), ("by_token", by_token)):
        if not isinstance(value, bool):
            raise ArgumentError(f"{name}={value!r}; True or False is expected.")
    with torch.inference_mode(False), torch.enable_grad():  # whatever mode the caller is in
        rows = [row.clone() for row in rows]
        functions = [_function(metric, hooked, row) for row in rows]
        if exact:
            pairs = zip(rows, functions, strict=True)
            return [_exactly(hooked, row, function, by_token) for row, function in pairs]
        probed = _probed(hooked, hooked.sites)
        if steps is None:
            values, by_site = _gradients(hooked, rows, functions, probed)
            gradients = {name: by_site[one.writes] for name, one in hooked.attached.items()}
            active = _active(hooked, probed)
        else:
            values = _values(functions, _logits(hooked.run(rows, probed.actions), rows))
            active = _active(hooked, probed)
            gradients = {
                name: _mean_gradient(hooked, rows, functions, name, found, steps) for name, found in active.items()
            }
        effects = {name: _along(found, gradients[name], hooked.saes[name].W_dec) for name, found in active.items()}
    results = [
        _result(hooked, row, i, value, active, effects)
        for i, (row, value) in enumerate(zip(rows, values.tolist(), strict=True))
    ]
    return results if by_token else [result.summed for result in results]


# --- metrics ----------------------------------------------------------------------------------------------------------


def _function(metric: Metric, hooked: HookedSAEs, ids: Tensor) -> Function:
    """The metric of one row as a function of its logits."""
    match metric:
        case Logit(token=token, minus=None, position=position):
            i, at = _token_id(token, hooked), _position(position, ids)
            return lambda logits: logits[at, i]
        case Logit(token=token, minus=minus, position=position):
            assert minus is not None
            i, j, at = _token_id(token, hooked), _token_id(minus, hooked), _position(position, ids)
            return lambda logits: logits[at, i] - logits[at, j]
        case LogProb(token=token, position=position):
            i, at = _token_id(token, hooked), _position(position, ids)
            return lambda logits: logits[at].log_softmax(-1)[i]
        case Loss():
            if len(ids) < 2:
                raise ArgumentError(
                    "a single token predicts nothing, so there is no loss. Give at least two tokens, or a Logit."
                )
            return lambda logits: F.cross_entropy(logits[:-1], ids[1:].to(logits.device))
        case _ if callable(metric) and not isinstance(metric, type):
            return metric
    raise ArgumentError(
        f"{metric!r} is no metric; expected Logit(' token'), LogProb(' token'), Loss(), or a function of a row's logits "
        "[S, vocab]."
    )


def _token_id(token: int | str, hooked: HookedSAEs) -> int:
    vocab = hooked.lm.get_input_embeddings().num_embeddings
    if isinstance(token, str):
        ids = hooked.tokenizer(token, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(repr(hooked.tokenizer.decode([i])) for i in ids)
            raise ArgumentError(
                f"{token!r} is {len(ids)} tokens ({pieces}); a metric names one. Give a single one, or its id."
            )
        token = ids[0]
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
        raise ArgumentError(f"{token!r} is no token of the metric; a text, or an id in 0..{vocab - 1} is expected.")
    return token


def _position(position: int, ids: Tensor) -> int:
    n = len(ids)
    if isinstance(position, bool) or not isinstance(position, int) or not -n <= position < n:
        raise ArgumentError(
            f"position {position!r} of the metric is outside the {n} tokens of the row: expected {-n}..{n - 1}."
        )
    return position % n


def _values(functions: Sequence[Function], logits: Sequence[Tensor]) -> Tensor:
    """The metric of each row, [rows].

    Raises:
        ArgumentError: it is no number, or not finite.
    """
    values = []
    for function, row in zip(functions, logits, strict=True):
        value = function(row.to(torch.promote_types(row.dtype, torch.float32)))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            what = f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise ArgumentError(f"the metric gave {what}; a tensor with one floating-point number is expected.")
        values.append(value.reshape(()))
    result = torch.stack(values)
    if not result.isfinite().all():
        raise ArgumentError(f"the metric gave {result[~result.isfinite()][0].item()}; a finite number is expected.")
    return result


# --- runs of the model ------------------------------------------------------------------------------------------------


class _Probe:
    """Asks for the gradient where SAEs write."""

    def __init__(self, sources: Sequence[SourceAction], shift: Tensor | None) -> None:
        """`sources`: what these SAEs read. `shift`: is subtracted, [rows, n, d]."""
        self.sources, self.shift = sources, shift
        self.view: TokenView
        self.leaf: Tensor

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        self.view = view
        for source in self.sources:
            source.take()  # it must come first
        if self.shift is not None:
            x = (x - self.shift).to(x.dtype)
        if not torch.is_grad_enabled():
            return x
        self.leaf = torch.zeros_like(x, requires_grad=True)
        return x + self.leaf


class _Subtract:
    """Takes vectors from single tokens of single rows."""

    def __init__(self, row: Tensor, column: Tensor, vectors: Tensor) -> None:
        """`row`, `column`: [n] int64, no pair twice; `vectors`: [n, d]."""
        self.row, self.column, self.vectors = row, column, vectors

    def __call__(self, x: Tensor, view: TokenView) -> Tensor:
        new = x.clone()
        new[self.row, self.column] = (x[self.row, self.column] - self.vectors).to(x.dtype)
        return new


class _Active(NamedTuple):
    """The latents that fire on tokens of the mask at one site, token by token, all tensors [n]."""

    row: Tensor
    position: Tensor
    """Among the row's own tokens."""
    column: Tensor
    """In the padded row."""
    latent: Tensor
    activation: Tensor
    """z, float32."""
    weight: Tensor
    """z σ(x), float32: times W_dec[latent], what the latent adds."""


class _Probed(NamedTuple):
    """What looks on in a run."""

    sources: dict[str, SourceAction]
    """By the site that is read."""
    probes: dict[str, _Probe]
    """By the site that is written."""

    @property
    def actions(self) -> dict[str, Action]:
        """All of it by site."""
        both = {
            site: ChainAction([self.sources[site], self.probes[site]]) for site in self.sources if site in self.probes
        }
        return {**self.sources, **self.probes, **both}


def _probed(hooked: HookedSAEs, names: Sequence[str], shift: Tensor | None = None) -> _Probed:
    """Sources and probes of the SAEs of these names; `shift` as in `_Probe`."""
    attached = [hooked.attached[name] for name in names]
    sources = {one.reads: SourceAction(one.reads) for one in attached}
    written = {
        one.writes: [sources[other.reads] for other in attached if other.writes == one.writes] for one in attached
    }
    return _Probed(sources, {site: _Probe(read, shift) for site, read in written.items()})


@torch.no_grad()
def _active(hooked: HookedSAEs, probed: _Probed) -> dict[str, _Active]:
    """By name of the SAE. Some tokens at a time, so that no [tokens, d_sae] is held."""
    found = {}
    for name, (sae, reads, writes) in hooked.attached.items():
        read, view = probed.sources[reads].take().detach(), probed.probes[writes].view
        places = view.mask(sae.mask_rule, norm_of(read)).nonzero()
        index = view.index.to(places.device)
        parts: list[_Active] = []
        for row, column in (part.unbind(1) for part in places.split(max(1, MAX_NUMBERS // sae.d_sae))):
            x = read[row, column]
            acts, scale = sae.encode(x), sae.scale(x)
            token, latent = acts.nonzero(as_tuple=True)
            z = acts[token, latent].float()
            weight = z if scale is None else z * scale[token, 0].float()
            parts.append(_Active(row[token], index[row, column][token], column[token], latent, z, weight))
        found[name] = _Active(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return found


def _logits(output: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    """Those of each row, [S, vocab], without the padding on its left."""
    return [logits[-len(row) :] for logits, row in zip(output.logits, rows, strict=True)]


def _gradients(
    hooked: HookedSAEs, rows: Sequence[Tensor], functions: Sequence[Function], probed: _Probed
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward and one backward pass: the metric of each row, [rows], and ∂m/∂x by the site that is written, [rows, n, d]."""
    output = hooked.run(list(rows), probed.actions, gradients=True)
    values = _values(functions, _logits(output, rows))
    if not values.requires_grad:
        raise ArgumentError("the metric has no gradient with respect to the logits. Use exact=True, or one that has.")
    leaves = [probe.leaf for probe in probed.probes.values()]
    found = torch.autograd.grad(values.sum(), leaves, allow_unused=True, materialize_grads=True)
    return values.detach(), dict(zip(probed.probes, found, strict=True))


def _mean_gradient(
    hooked: HookedSAEs,
    rows: Sequence[Tensor],
    functions: Sequence[Function],
    name: str,
    active: _Active,
    steps: int,
) -> Tensor:
    """The mean of ∂m/∂x from x without what the active latents add to x, [rows, n, d] float32, by Gauss's rule."""
    W_dec = hooked.saes[name].W_dec.detach()
    longest = max(map(len, rows))
    added = torch.zeros(len(rows), longest, W_dec.shape[1], device=W_dec.device)
    flat = added.view(-1, W_dec.shape[1])
    for part in _parts(active, W_dec):
        place = active.row[part] * longest + active.column[part]
        flat.index_add_(0, place, active.weight[part, None] * W_dec[active.latent[part]].float())
    mean = torch.zeros_like(added)
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on -1..1, with weights that sum to 2
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        probed = _probed(hooked, [name], (1 - node) / 2 * added)
        mean += weight / 2 * _gradients(hooked, rows, functions, probed)[1][hooked.attached[name].writes]
    return mean


def _along(active: _Active, gradient: Tensor, W_dec: Tensor) -> Tensor:
    """z σ(x) ∂m/∂x · W_dec[latent], [n] float32."""
    W_dec = W_dec.detach()
    products = [
        (gradient[active.row[part], active.column[part]].float() * W_dec[active.latent[part]].float()).sum(-1)
        for part in _parts(active, W_dec)
    ]
    return active.weight * torch.cat(products)


def _parts(active: _Active, W_dec: Tensor) -> tuple[Tensor, ...]:
    """Indices of all active latents, in parts whose decoder rows may be held."""
    return torch.arange(len(active.latent), device=active.latent.device).split(max(1, MAX_NUMBERS // W_dec.shape[1]))


def _exactly(hooked: HookedSAEs, ids: Tensor, function: Function, by_token: bool) -> Attribution:
    """Effects in one row by ablation."""
    probed = _probed(hooked, hooked.sites)
    value = float(_values([function], _logits(hooked.run([ids], probed.actions), [ids])))
    active = _active(hooked, probed)
    effects = {name: _ablated(hooked, ids, function, name, found, by_token) for name, found in active.items()}
    if by_token:
        return _result(hooked, ids, 0, value, active, effects)
    result = _result(hooked, ids, 0, value, active, {name: found.activation for name, found in active.items()}).summed
    return replace(result, effect=torch.cat([effect.cpu() for effect in effects.values()]))


@torch.no_grad()
def _ablated(hooked: HookedSAEs, ids: Tensor, function: Function, name: str, active: _Active, by_token: bool) -> Tensor:
    """What the metric loses with one latent ablated on one token, or on all, in the order of `active`, or of latents."""
    sae = hooked.saes[name]
    group = torch.arange(len(active.latent), device=active.latent.device)
    if not by_token:
        group = active.latent.unique(return_inverse=True)[1]
    n_groups = int(group.max()) + 1 if len(group) else 0
    vocab = hooked.lm.get_input_embeddings().num_embeddings
    at_once = max(1, MAX_NUMBERS // (len(ids) * vocab) - 1)
    effects = [torch.zeros(0, device=active.weight.device)]
    for first in range(0, n_groups, at_once):
        n = min(at_once, n_groups - first)
        chosen = ((group >= first) & (group < first + n)).nonzero()[:, 0]
        vectors = active.weight[chosen, None] * sae.W_dec[active.latent[chosen]].float()
        # The first row stays clean: what a batch of another shape rounds otherwise is no effect.
        subtract = _Subtract(1 + group[chosen] - first, active.column[chosen], vectors)
        rows = ids.expand(n + 1, -1)
        output = hooked.run(rows, {hooked.attached[name].writes: subtract})
        values = _values([function] * (n + 1), _logits(output, list(rows)))
        effects.append((values[0] - values[1:]).float().to(active.weight.device))
    return torch.cat(effects)


def _result(
    hooked: HookedSAEs,
    ids: Tensor,
    row: int,
    value: float,
    active: Mapping[str, _Active],
    effects: Mapping[str, Tensor],
) -> Attribution:
    """The effects in one of the rows, and its metric."""
    columns: list[list[Tensor]] = []
    for number, (name, found) in enumerate(active.items()):
        mine = (found.row == row).nonzero()[:, 0]
        columns.append(
            [
                torch.full_like(mine, number),
                found.position[mine],
                found.latent[mine],
                found.activation[mine],
                effects[name][mine],
            ]
        )
    site, position, latent, activation, effect = (
        torch.cat([t.cpu() for t in parts]) for parts in zip(*columns, strict=True)
    )
    return Attribution(
        metric=value,
        sites=tuple(active),
        site=site,
        position=position,
        latent=latent,
        activation=activation,
        effect=effect,
        ids=ids,
        tokens=[hooked.tokenizer.decode([i]) for i in ids.tolist()],
    )
