"""What a model makes of one text, token by token, as plain data: latents at one site, losses and predictions, clean, with the
SAEs' reconstructions spliced in, and under a program.

Of token i, counted from 0, and with p the clean model, q the other one:

    loss     -log p(token i | those before), nats; NaN for the first
    kl       KL(p ‖ q) of the token after it, nats
    error    ‖x - x_hat‖² / ‖x‖² at the site; NaN outside the SAE's mask, and for a transcoder
    effect   of a latent: the mean loss without it (`ablate`, on all tokens) minus the mean loss, to first order in `Inspection`,
             measured by `ablation_effects`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehook.attribution import Loss
from saehook.editing import ReadAction
from saehook.edits import ablate
from saehook.errors import ArgumentError
from saehook.hooked_saes import HookedSAEs
from saehook.interventions import AnyEdit, Program
from saehook.latent_effects import MAX_NUMBERS
from saehook.metrics import token_kl
from saehook.results import LatentHit, Latents, Report
from saehook.sparse_acts import encode_for
from saehook.tokenization import Batch
from saehook.where import Where


class NextToken(NamedTuple):
    """One prediction of what comes after a token."""

    id: int
    token: str
    clean: float
    """Its probability in the clean model."""
    edited: float
    """Its probability under the program."""


@dataclass(frozen=True)
class Inspection:
    """One text at one site. Tensors are on the CPU; [S] is one number per token."""

    site: str
    ids: list[int]
    tokens: list[str]
    mask: list[bool]
    """False outside the mask (`Latents.mask`)."""
    position: Tensor
    """Where a latent fires, [n] int64; all three go by position, the tokens outside the mask included."""
    latent: Tensor
    """Which one, [n] int64."""
    activation: Tensor
    """How strong, [n] float32."""
    error: Tensor
    """[S] float32."""
    loss: Tensor
    """[S] float32, of the clean model."""
    loss_spliced: Tensor
    """[S] float32."""
    loss_edited: Tensor
    """[S] float32."""
    kl_spliced: Tensor
    """[S] float32."""
    kl_edited: Tensor
    """[S] float32."""
    next_tokens: list[list[NextToken]]
    """After each token: those that the clean model or the edited one finds likeliest, likeliest in either first."""
    effects: dict[int, float]
    """Of each latent that fires, nats a token, to first order."""
    report: Report
    """What the program did."""

    def activations_of(self, latent: int) -> Tensor:
        """What one latent does on each token, [S] float32."""
        values = torch.zeros(len(self.ids))
        mine = self.latent == latent
        values[self.position[mine]] = self.activation[mine]
        return values

    @property
    def l0(self) -> Tensor:
        """How many latents fire on each token, [S] int64."""
        return self.position.bincount(minlength=len(self.ids))

    def strongest(self, n: int, start: int = 0, stop: int | None = None) -> tuple[list[LatentHit], int]:
        """The n strongest latents on the tokens from `start` to before `stop`, and how many fire there. A token outside the
        mask counts only where it is asked for alone."""
        stop = len(self.ids) if stop is None else stop
        if not 0 <= start < stop <= len(self.ids):
            raise ArgumentError(f"tokens {start} to before {stop} are asked for; the text has {len(self.ids)}.")
        chosen = (self.position >= start) & (self.position < stop)
        if stop - start > 1:
            chosen &= torch.tensor(self.mask)[self.position]
        order = chosen.nonzero()[:, 0]
        order = order[self.activation[order].argsort(descending=True, stable=True)]
        hits: dict[int, LatentHit] = {}
        for i in order.tolist():
            place = int(self.position[i])
            hit = LatentHit(int(self.latent[i]), float(self.activation[i]), place, self.tokens[place])
            hits.setdefault(hit.latent, hit)
        return list(hits.values())[:n], len(hits)


def inspect_text(
    hooked: HookedSAEs, x: Any, site: str | None = None, edits: Program | AnyEdit | Any = (), *, predictions: int = 10
) -> Inspection:
    """Run a text through the model: clean, with every attached SAE spliced in, and under edits.

    Args:
        x: a text or ids, one row.
        site: which SAE's latents; None where only one is attached.
        edits: edits or a program, for `loss_edited`, `kl_edited` and the predictions.
        predictions: how many of them, of the clean model and of the edited one.

    Raises:
        ArgumentError: several rows. What `hooked(x, edits)` raises.
    """
    name, program = hooked.resolve_site(site), Program.of(edits)
    batch = hooked._batch(x)
    if not batch.single:
        raise ArgumentError("inspect_text takes one row: a text, or one list of ids. Call it once for each.")
    ids = batch.ids[0]
    sae, reads, _ = hooked.attached[name]
    with torch.no_grad():
        reader = ReadAction([], stop=False)
        clean = hooked.run(ids, {reads: reader}).logits[0].float()
        assert reader.value is not None
        values, mask = reader.value[0], reader.mask(sae.mask_rule)[0].cpu()
        tokens = [hooked.tokenizer.decode([i]) for i in ids.tolist()]
        latents = Latents(name, encode_for(sae, values), ids, tokens, mask)
        position, latent, activation = latents.fired
        spliced, _ = _logits(hooked, batch, Program(splice=True))
        edited, report = (clean, Report()) if _idle(program) else _logits(hooked, batch, program)
        error = torch.full((len(ids),), torch.nan)
        if not sae.is_transcoder:
            x32 = values.float()
            x_hat = torch.cat([sae(x).x_hat for x in sae.pieces(values)])
            squares = (x32 - x_hat.float()).square().sum(-1) / x32.square().sum(-1)
            error = torch.where(mask, squares.cpu(), error)
        return Inspection(
            site=name,
            ids=ids.tolist(),
            tokens=tokens,
            mask=mask.tolist(),
            position=position.cpu(),
            latent=latent.cpu(),
            activation=activation.float().cpu(),
            error=error,
            loss=token_losses(clean, ids),
            loss_spliced=token_losses(spliced, ids),
            loss_edited=token_losses(edited, ids),
            kl_spliced=token_kl(clean, spliced).float().cpu(),
            kl_edited=token_kl(clean, edited).float().cpu(),
            next_tokens=_next_tokens(hooked, clean, edited, predictions),
            effects=_effects(hooked, ids, name),
            report=report,
        )


def _idle(program: Program) -> bool:
    return not program.edits and not program.splice


def _logits(hooked: HookedSAEs, batch: Batch, program: Program) -> tuple[Tensor, Report]:
    arguments = hooked._arguments(batch, masked=False)
    positions = hooked._positions(batch, program)
    output, report = hooked._call(lambda: hooked.lm(**arguments, use_cache=False), program, positions)
    return output.logits[0].float(), report


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """-log p of each token behind those before it, [S] float32 on the CPU, of logits [S, vocabulary]; NaN for the first."""
    losses = torch.full((len(ids),), torch.nan)
    if len(ids) > 1:
        wanted = ids[1:].to(logits.device)
        losses[1:] = torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="none").cpu()
    return losses


def _next_tokens(hooked: HookedSAEs, clean: Tensor, edited: Tensor, n: int) -> list[list[NextToken]]:
    p, q = clean.softmax(-1), edited.softmax(-1)
    n = min(n, p.shape[-1])
    found = []
    for before, after in zip(p, q, strict=True):
        ids = torch.cat([before.topk(n).indices, after.topk(n).indices]).unique()
        ids = ids[before[ids].maximum(after[ids]).argsort(descending=True, stable=True)]
        columns = (ids.tolist(), before[ids].tolist(), after[ids].tolist())
        found.append([NextToken(i, hooked.tokenizer.decode([i]), a, b) for i, a, b in zip(*columns, strict=True)])
    return found


def _effects(hooked: HookedSAEs, ids: Tensor, name: str) -> dict[int, float]:
    """What the mean loss gains by ablating each latent."""
    if len(ids) < 2:
        return {}
    found = hooked.attribute(ids, Loss(), by_token=False)
    mine = found.site == found.sites.index(name)
    return dict(zip(found.latent[mine].tolist(), (-found.effect[mine]).tolist(), strict=True))


@torch.no_grad()
def ablation_effects(hooked: HookedSAEs, x: Any, site: str | None, latents: Sequence[int]) -> dict[int, float]:
    """What the mean loss of a text gains, in nats a token, by ablating each of these latents: one row of a batch for each.

    Args:
        x: a text or ids, one row.
        site: which SAE's latents; None where only one is attached.

    Raises:
        ArgumentError: several rows. LatentError: the SAE does not have one.
    """
    name = hooked.resolve_site(site)
    ids = hooked._batch(x).ids
    if len(ids) != 1:
        raise ArgumentError("ablation_effects takes one row: a text, or one list of ids. Call it once for each.")
    effects: dict[int, float] = {}
    if len(ids[0]) < 2:
        return effects
    vocabulary = hooked.lm.get_input_embeddings().num_embeddings
    at_once = max(1, MAX_NUMBERS // (len(ids[0]) * vocabulary) - 1)
    for first in range(0, len(latents), at_once):
        some = latents[first : first + at_once]
        # The first row stays clean: what a batch of another shape rounds otherwise is no effect.
        edits = [ablate(latent, site=name, where=Where(rows=(row,))) for row, latent in enumerate(some, 1)]
        logits = hooked([ids[0].tolist()] * (1 + len(some)), edits).logits.float()
        clean, *without = (float(token_losses(row, ids[0])[1:].double().mean()) for row in logits)
        effects |= {latent: loss - clean for latent, loss in zip(some, without, strict=True)}
    return effects
