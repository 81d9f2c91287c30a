"""A finished SAE whose latents lie on several devices: attached, spliced, edited and evaluated like any other.

Every process runs the language model on the same tokens and holds some columns of W_enc and rows of W_dec; biases, thresholds and
statistics are whole on all. What fires is found by each among its latents, as pairs, and shared; what is decoded is summed. So
all processes see the same numbers, those of the whole SAE but for the order of sums, and all must make the same calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from saehook import kernels
from saehook.checkpoint import load_sae, save_sae
from saehook.config import SAEConfig, TopK
from saehook.distributed import selection, state
from saehook.distributed.collectives import add, read
from saehook.distributed.mesh import Mesh, stripes
from saehook.errors import ArgumentError, FormatError
from saehook.initial_rows import indices
from saehook.sae import SAE

WHAT = "SAE"
_MATRICES = {"W_enc": 1, "W_dec": 0}
"""With the dimension that goes over latents."""
_KEPT = ("site", "site_out", "stats", "density", "mask_rule", "metadata", "source")


class ShardedSAE(SAE):
    """The latents of one process, in the place of the whole SAE."""

    latents: Tensor
    """Which of all latents are here, ascending."""
    W_enc_here: nn.Parameter
    W_dec_here: nn.Parameter

    def __init__(
        self, sae: SAE, mesh: Mesh, rows: Sequence[slice], config: SAEConfig, shared: dict[str, Tensor | None]
    ) -> None:
        """`sae` has both matrices of the latents `rows` of this process; `config` is of all latents, as are b_enc and the
        threshold in `shared`."""
        nn.Module.__init__(self)
        self.config, self.mesh, self.rows = config, mesh, tuple(rows)
        for name in _KEPT:
            setattr(self, name, getattr(sae, name))
        self.mapped = False
        self.register_buffer("latents", indices(self.rows).to(sae.device), persistent=False)
        self.widest = int(mesh.gather(torch.tensor([len(self.latents)], device=sae.device), "latent", WHAT).max())
        """The most latents that a process has."""
        for name, value in {
            "W_enc_here": sae.W_enc,
            "W_dec_here": sae.W_dec,
            "b_dec": sae.b_dec,
            "W_skip": sae.W_skip,
            **shared,
        }.items():
            kept = None if value is None else nn.Parameter(value.detach(), requires_grad=False)
            self.register_parameter(name, kept)

    @classmethod
    def of_parts(cls, sae: SAE, mesh: Mesh, config: SAEConfig, ends: Sequence[int]) -> ShardedSAE:
        """From an SAE of the latents of each process; all call it."""
        rows = stripes(ends, mesh.sizes["latent"], mesh.places["latent"])
        order = torch.cat(mesh.gather_some(indices(rows).to(sae.device), "latent", WHAT))

        def whole(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            moved = mesh.gather_some(x.detach().to(sae.device), "latent", WHAT)
            return torch.empty_like(torch.cat(moved)).index_copy_(0, order, torch.cat(moved)).to(x.device)

        threshold = None if sae.threshold is None else sae.threshold.detach().expand(sae.d_sae).contiguous()
        shared = {"b_enc": whole(sae.b_enc), "threshold": whole(threshold)}
        found = cls(sae, mesh, rows, config, shared)
        if sae.stats is not None:
            by_latent = ("max_act", "density", "mean_act", "quantiles")
            facts: dict[str, Any] = {name: whole(getattr(sae.stats, name)) for name in by_latent}
            found.stats = dataclasses.replace(sae.stats, **facts)
        return found

    @classmethod
    def of_whole(cls, sae: SAE, mesh: Mesh) -> ShardedSAE:
        """From an SAE that every process has whole, or mapped to its file: then each reads what is its own."""
        rows = stripes((sae.d_sae,), mesh.sizes["latent"], mesh.places["latent"])
        part = SAE(dataclasses.replace(sae.config), site=sae.site, site_out=sae.site_out, device="meta")
        for name in _KEPT:
            setattr(part, name, getattr(sae, name))
        dtype, device = torch.promote_types(sae.dtype, torch.float32), mesh.device
        for name, axis in _MATRICES.items():
            value = torch.cat(
                [getattr(sae, name).detach().narrow(axis, some.start, some.stop - some.start) for some in rows], axis
            )
            value = value.to(device, dtype).contiguous()
            if not bool(value.isfinite().all()):
                raise FormatError(f"{name} of {sae.source} holds NaN or infinity; the file is damaged. Copy it again.")
            setattr(part, name, nn.Parameter(value))
        b_dec, skip = sae.b_dec.detach().to(device, dtype), sae.W_skip
        part.b_dec = nn.Parameter(b_dec)
        part.register_parameter("W_skip", None if skip is None else nn.Parameter(skip.detach().to(device, dtype)))
        threshold = None if sae.threshold is None else sae.threshold.detach().to(device)
        shared = {"b_enc": sae.b_enc.detach().to(device, dtype), "threshold": threshold}
        return cls(part, mesh, rows, sae.config, shared)

    # --- what others ask ---------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.W_dec_here.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec_here.dtype

    @property
    def by_pairs(self) -> bool:
        return True

    @property
    def learns(self) -> bool:
        return False

    @property
    def W_enc(self) -> NoReturn:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._refuse("W_enc")

    @property
    def W_dec(self) -> NoReturn:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._refuse("W_dec")

    def _refuse(self, name: str) -> NoReturn:
        raise ArgumentError(
            f"{name} of this SAE lies on {self.mesh.sizes['latent']} devices, and what was asked for needs it whole. Load the SAE "
            "on one device (saehook.load_sae) for that; splice, edits, latents and evaluation work on several."
        )

    def inputs(self, x: Tensor) -> Tensor:
        """As `SAE.inputs`.

        Raises:
            ArgumentError: the processes do not have the same activations.
        """
        found = super().inputs(x)
        bits = found.detach().contiguous().view(selection.INTEGERS[found.element_size()]).sum(dtype=torch.int64)
        mark = torch.stack([bits, torch.tensor(len(found), device=found.device)])
        both = self.mesh.reduce_(torch.cat([mark, -mark]), "all", "check", selection.MAX)
        if not torch.equal(both[:2], -both[2:]):
            raise ArgumentError(
                "the processes that share this SAE have other activations at its site, so they run on other text or models. Give "
                "all the same, with the same seed."
            )
        return found

    def pre_acts(self, x: Tensor) -> Tensor:
        inputs = self.inputs(x)
        if self.tokens_at_once is not None and len(inputs) > self.tokens_at_once:
            self._refuse("[tokens, d_sae]")
        b_enc, inputs = self.b_enc[self.latents], read(inputs, self.mesh, "latent", WHAT)
        here = torch.addmm(b_enc, inputs, self.W_enc_here)
        whole = here.new_zeros(len(inputs), self.d_sae).index_copy(1, self.latents, here)
        return add(whole, self.mesh, "latent", WHAT).view(*x.shape[:-1], self.d_sae)

    def combine(self, acts: Tensor, offset: Tensor | None = None) -> Tensor:
        here = read(acts, self.mesh, "latent", WHAT)[..., self.latents] @ self.W_dec_here.to(acts.dtype)
        found = add(here, self.mesh, "latent", WHAT)
        return found if offset is None else found + offset

    def combine_pairs(self, values: Tensor, pairs: kernels.Selection, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        places, mine = self._places(pairs.latents)
        some = mine.nonzero().view(-1)
        here = read(values.to(dtype), self.mesh, "latent", WHAT)[some]
        used, latents = places[some].unique(return_inverse=True)
        own = kernels.Selection(pairs.tokens[some], latents, pairs.n_tokens, len(used), order="token")
        found = kernels.sparse.decode(here, self.W_dec_here[used].to(dtype), own)
        return add(found, self.mesh, "latent", WHAT)

    def _places(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Where latents stand among those here, and whether they do."""
        places = torch.searchsorted(self.latents, latents).clamp_max(max(0, len(self.latents) - 1))
        return places, self.latents[places] == latents

    def fired(self, inputs: Tensor) -> kernels.Encoded:
        b_enc, activation = self.b_enc[self.latents], self.config.activation
        if isinstance(activation, TopK):
            largest = kernels.largest_of_each_token(inputs, self.W_enc_here, b_enc, min(activation.k, self.widest))
            tokens, columns = selection.kept_of(largest, activation.k, self.mesh, self.d_sae, self.widest)
            values, latents = largest.values[tokens, columns], largest.latents[tokens, columns]
        else:
            self.check_threshold()
            threshold = self.threshold
            if threshold is not None and threshold.ndim:
                threshold = threshold[self.latents]
            values, pairs = kernels.encode_above(inputs, self.W_enc_here, b_enc, threshold)
            tokens, latents = pairs.tokens, pairs.latents
        parts = (values, tokens, self.latents[latents])
        values, tokens, latents = (torch.cat(self.mesh.gather_some(part, "latent", WHAT)) for part in parts)
        tokens, order = tokens.sort(stable=True)
        pairs = kernels.Selection(tokens, latents[order], len(inputs), self.d_sae, order="token")
        return kernels.Encoded(values[order], pairs)

    def encoder_rows(self, latents: Tensor) -> Tensor:
        return self._rows(self.W_enc_here.T, latents)

    def decoder_rows(self, latents: Tensor) -> Tensor:
        return self._rows(self.W_dec_here, latents)

    def _rows(self, here: Tensor, latents: Tensor) -> Tensor:
        places, mine = self._places(latents)
        return self.mesh.reduce_(torch.where(mine[:, None], here[places], 0.0), "latent", WHAT)

    # --- files -------------------------------------------------------------------------------------------------------

    def store(self, path: Path, dtype: torch.dtype | None = None) -> None:
        """`save_sae`, each process its latents; all call it, and one that fails fails on all."""
        dtype = dtype or self.dtype
        pieces = {
            name: state.Piece(getattr(self, f"{name}_here").detach().to(dtype), [], axis, self.rows)
            for name, axis in _MATRICES.items()
        }
        pieces |= {
            name: state.Piece(x.detach().to(torch.float32 if name == "threshold" else dtype), [], None)
            for name in ("b_enc", "b_dec", "W_skip", "threshold")
            if (x := getattr(self, name)) is not None
        }
        pieces = {name: piece._replace(shape=self._whole_shape(piece)) for name, piece in pieces.items()}
        bad = next((name for name, piece in pieces.items() if not bool(piece.x.isfinite().all())), None)
        names = [name for name in self.mesh.of_all(bad) if name is not None]
        if names:
            raise ArgumentError(f"{names[0]} holds NaN or infinity in {dtype}; the SAE is not written.")
        state.together(self.mesh, pieces, lambda fill: save_sae(self, path, dtype=dtype, write=fill))

    def _whole_shape(self, piece: state.Piece) -> list[int]:
        return [self.d_sae if axis == piece.axis else size for axis, size in enumerate(piece.x.shape)]

    def whole(self) -> SAE | None:
        """The SAE of all latents on the main process, in its memory; None on the others. All call it."""
        order = torch.cat(self.mesh.gather_some(self.latents, "latent", WHAT)).cpu()
        matrices = {name: self.mesh.to_main(getattr(self, f"{name}_here"), axis) for name, axis in _MATRICES.items()}
        if self.mesh.rank > 0:
            return None
        sae = SAE(self.config, site=self.site, site_out=self.site_out, device="meta")
        for name in _KEPT:
            setattr(sae, name, getattr(self, name))
        for name, axis in _MATRICES.items():
            found = matrices[name]
            assert found is not None
            value = torch.empty_like(found).index_copy_(axis, order, found)
            setattr(sae, name, nn.Parameter(value.to(self.device)))
        for name in ("b_enc", "b_dec", "W_skip", "threshold"):
            value = getattr(self, name)
            sae.register_parameter(name, None if value is None else nn.Parameter(value.detach().clone()))
        return sae


def load_sharded(path: str | Path, mesh: Mesh, sub: str | None = None) -> SAE:
    """`load_sae` where several processes share the latents: each reads its own. With one latent device the whole SAE.

    Raises:
        as `load_sae`; ArgumentError: fewer latents than devices.
    """
    if mesh.sizes["latent"] == 1:
        return load_sae(path, sub, device=mesh.device)
    try:
        sae = load_sae(path, sub, mapped=True)
    except ArgumentError:  # something has to be folded into the weights of another tool's file
        sae = load_sae(path, sub)
    if sae.d_sae < mesh.sizes["latent"]:
        raise ArgumentError(f"{sae.d_sae} latents cannot be shared by {mesh.sizes['latent']} devices.")
    return ShardedSAE.of_whole(sae, mesh)
