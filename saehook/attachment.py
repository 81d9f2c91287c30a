"""Which SAE stands at which site of a model, and whether it belongs there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehook.edit_plan import Attached
from saehook.errors import ArgumentError, MissingStatError, ShapeError, SiteError
from saehook.metrics import Firing, Reconstruction
from saehook.sae import SAE
from saehook.sites import Site, resolve, same_site
from saehook.tokenization import is_outlier, keep_mask, special_ids

if TYPE_CHECKING:
    from saehook.hooked_model import HookedModel

FINGERPRINT_FACTOR = 2.0


def place_saes(
    model: HookedModel, saes: SAE | Mapping[Any, SAE | Sequence[SAE]], *, checked: bool
) -> tuple[dict[str, Attached], dict[str, Site]]:
    """What `HookedModel.attach` was given, by the names that it gets; and all sites that are read or written, by name.

    `checked`: an SAE whose file says another site is an error.

    Raises:
        SiteError: unknown site, no site recorded and none named, an SAE of another site.
        ShapeError: an SAE of another width.
    """
    if isinstance(saes, SAE):
        if saes.site is None:
            raise SiteError(
                "this SAE does not say which site it belongs to. Name it: model.attach({'layers.2.resid_post': sae})."
            )
        saes = {saes.site: saes}
    if not saes:
        raise ArgumentError("attach() got no SAE. Give one, or {site: sae}.")
    attached: dict[str, Attached] = {}
    sites: dict[str, Site] = {}
    for given, several in saes.items():
        many = several if isinstance(several, (list, tuple)) else [several]
        taken = {one.reads for one in attached.values()}
        for number, sae in enumerate(many):
            if not isinstance(sae, SAE):
                raise ArgumentError(f"{type(sae).__name__} is no SAE; load one with saehook.load_sae(path).")
            if sae.device.type == "meta":
                raise ArgumentError(f"the SAE for {given} has sizes and no weights. Load it without device='meta'.")
            read_name, written_name = _names(given, sae)
            read = written = _one_site(model, read_name, sae.site if checked else None, sae.d_in, sites)
            if written_name is not None:
                written = _one_site(model, written_name, sae.site_out if checked else None, sae.d_out, sites)
            name = read.name if len(many) == 1 else f"{read.name}#{number}"
            if read.name in taken:
                raise SiteError(
                    f"two SAEs are given for {read.name}, one by one; give them together: {{site: [sae, other]}}."
                )
            attached[name] = Attached(sae, read.name, written.name)
    return attached, sites


def _names(name: str | tuple[str, str], sae: SAE) -> tuple[str, str | None]:
    """The site that an SAE reads, and the other one that a transcoder writes."""
    if isinstance(name, str):
        if sae.is_transcoder and sae.site_out is None:
            raise SiteError(
                f"the transcoder for {name} does not say which site it writes. Name both: "
                "model.attach({('layers.2.mlp_in', 'layers.2.mlp_out'): sae})."
            )
        return name, sae.site_out if sae.is_transcoder else None
    if not sae.is_transcoder:
        raise SiteError(f"{name!r} names two sites, and the SAE is no transcoder: name one.")
    return name


def _one_site(model: HookedModel, name: str, recorded: str | None, width: int, known: dict[str, Site]) -> Site:
    """The site of that name, put among those that are known, for an SAE that was trained on `recorded`.

    Raises:
        SiteError, ShapeError: as `place_saes` says.
    """
    found = resolve(model.lm, name)
    if len(found) != 1:
        raise SiteError(f"{name!r} names {len(found)} sites; an SAE is attached at exactly one.")
    site = found[0]
    for other in known.values():  # one place has one name
        if (site.path, site.side, site.in_place) == (other.path, other.side, other.in_place):
            site = other
    if recorded is not None and not same_site(model.lm, recorded, site.name):
        raise SiteError(
            f"this SAE was trained on {recorded}, not on {site.name}: its numbers would be meaningless there. "
            "Attach it at its own site, or pass check='off' if you mean it."
        )
    if width != model.width(site):
        raise ShapeError(
            f"the SAE expects width {width}, but {site.name} of {model.model_id} has {model.width(site)}. "
            "It belongs to another model or site."
        )
    known[site.name] = site
    return site


def fingerprint(model: HookedModel, site: str, sae: SAE, ids: Tensor, site_out: str | None = None) -> dict[str, Any]:
    """What the SAE does on one window of ids: FVU, L0 and mean norm over the mask, and the ids.

    `site_out`: where a transcoder writes.
    """
    site = site.partition("#")[0]
    names = [site] if site_out is None or site_out == site else [site, site_out]
    values = [x[0].float() for x in model.activations(ids[None], names).values()]
    x, y = values[0], values[-1]
    keep = keep_mask(ids, None, special_ids(model.tokenizer), sae.mask_rule.skip_first_tokens).to(x.device)
    keep = keep & ~is_outlier(torch.linalg.vector_norm(x, dim=-1), sae.mask_rule)
    x, y = x[keep], y[keep]
    reconstruction, firing = Reconstruction(), Firing()
    with torch.no_grad():
        for some, target in zip(sae.pieces(x), sae.pieces(y), strict=True):
            out = sae(some)
            reconstruction.update(target, out.x_hat)
            firing.update(out.acts)
    norm = float(torch.linalg.vector_norm(x.double(), dim=-1).mean())
    return {"fvu": reconstruction.fvu, "l0": firing.l0, "mean_norm": norm, "token_ids": ids.tolist()}


def check_fingerprint(model: HookedModel, site: str, site_out: str, sae: SAE) -> None:
    """Measure an SAE that reads `site` and writes `site_out` on the tokens of the fingerprint in its file.

    Raises:
        MissingStatError: its file holds none.
        SiteError: FVU, L0 or norm differ by more than a factor of `FINGERPRINT_FACTOR`.
    """
    recorded = sae.metadata.get("fingerprint")
    if not recorded:
        raise MissingStatError(
            f"the SAE for {site} holds no fingerprint, so check='fingerprint' has nothing to compare. Use check='site'."
        )
    measured = fingerprint(model, site, sae, torch.tensor(recorded["token_ids"]), site_out)
    for name in ("fvu", "l0", "mean_norm"):
        ratio = measured[name] / recorded[name] if recorded[name] else float("inf")
        if not 1 / FINGERPRINT_FACTOR <= ratio <= FINGERPRINT_FACTOR:
            raise SiteError(
                f"at {site} of {model.model_id} this SAE has {name} = {measured[name]:.4g}, its file records "
                f"{recorded[name]:.4g} on the same tokens: another model, revision or site. Check where it comes from."
            )
