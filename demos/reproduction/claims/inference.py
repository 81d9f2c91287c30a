"""What is measured, and how: references, error terms, number formats, special tokens."""

from __future__ import annotations

import warnings

import torch

from reproduction.claims.latents import NO_MODEL
from reproduction.claims.ratios import delta_ce, exact, finding, kl, less, over, seeds_finding
from reproduction.laboratory import Lab
from reproduction.measure import fidelity, in_dtype, spliced
from reproduction.outcome import Outcome
from reproduction.registry import claim, methods
from saehook import ablate
from saehook.errors import NoEffectWarning


@claim(
    "zero-ablation",
    source="Gao et al. 2024, section 4.1",
    says="The share of loss that is recovered against zero ablation looks excellent where the absolute loss is not.",
    shown="ReLU SAEs recover more than 95 % against zero, while their added loss is above 0.1 nats; against the mean the share "
    "is lower.",
    trains=methods("relu", on=Lab.residual),
)
def zero_ablation(lab: Lab) -> Outcome:
    rows = []
    for site in lab.residual():
        held = site.held_out()
        assert held.ids is not None
        n = int(held.mask.sum())
        x = held.x[held.mask]
        saes = lab.arms(site, "relu")["relu"]
        zero = spliced(site.lm, site.site, held, torch.zeros_like(x))
        mean = spliced(site.lm, site.site, held, x.mean(0).expand(n, -1))
        tables = {
            "relu": lab.tables(saes, site),
            "zero": [zero] * len(saes),
            "mean": [mean] * len(saes),
        }

        def recovered(arm: str):
            return lambda s: 1 - delta_ce("relu")(s) / delta_ce(arm)(s)

        rows.append(finding(site, "recovered against zero", tables, recovered("zero"), above=0.95))
        rows.append(finding(site, "added loss, nats per token", tables, delta_ce("relu"), above=0.1))
        rows.append(finding(site, "recovered against the mean", tables, recovered("mean")))
        rows.append(
            finding(site, "recovered, mean less zero", tables, less(recovered("mean"), recovered("zero")), below=0.0)
        )
    return Outcome(rows, notes=["ReLU + L1."]) if rows else Outcome([], untestable=NO_MODEL)


@claim(
    "surgical",
    source="Marks et al. 2024, section 3",
    says="Edits with the error term kept touch nothing but the latent: an edit that changes no latent changes no logit.",
    shown="Ablating latents that do not fire leaves every logit as it is, bit for bit; without the error term the logits move.",
    trains=methods("topk", on=lambda lab: lab.sites),
)
def surgical(lab: Lab) -> Outcome:
    rows = []
    for site in lab.sites:
        held = site.held_out()
        assert held.ids is not None
        worst, dropped = 0.0, []
        for sae in lab.arms(site, "topk")["topk"]:
            hooked = site.lm.model.attach({site.site: sae})
            try:
                for ids in held.ids[:4]:
                    fired = (hooked.latents(ids).acts > 0).any(0)
                    silent = (~fired).nonzero()[:5, 0].tolist()
                    with torch.no_grad(), warnings.catch_warnings():
                        warnings.simplefilter("ignore", NoEffectWarning)  # that nothing changes is what is shown
                        clean = hooked.model(ids).logits
                        kept = hooked(ids, edits=[ablate(silent)]).logits
                        free = hooked(ids, splice=True).logits
                    worst = max(worst, float((kept - clean).abs().max()))
                    dropped.append(float((free - clean).abs().max()))
            finally:
                hooked.detach()
        rows.append(exact(site, "largest change of a logit, silent latents ablated", worst, below=1e-12))
        rows.append(seeds_finding(site, "largest change of a logit, spliced", dropped, above=0.01))
    return Outcome(rows) if rows else Outcome([], untestable=NO_MODEL)


BF16_TIMES = 8
"""The usual sequences that bfloat16 is measured on: what it changes is little beside how far sequences differ."""


@claim(
    "bf16",
    source="Lieberum et al. 2024 (Gemma Scope), section 4",
    says="Running SAEs in bfloat16 costs next to nothing.",
    shown="KL(clean ‖ spliced) and added loss with the SAE's weights and arithmetic in bfloat16 are those in float32 to 1 %.",
    trains=methods("topk", on=lambda lab: lab.sites),
)
def bf16(lab: Lab) -> Outcome:
    rows = []
    for site in lab.sites:
        longer = site.longer(BF16_TIMES)
        for arm, ones in lab.arms(site, "topk").items():
            held = longer.held_out()
            half = []
            for sae in ones:
                with torch.no_grad():
                    x_hat = in_dtype(sae, torch.bfloat16)(held.x[held.mask].bfloat16()).x_hat.float()
                half.append(spliced(longer.lm, site.site, held, x_hat))
            tables = {"half": half, "full": lab.tables(ones, longer)}
            for name, number in (("KL", kl), ("added loss", delta_ce)):
                ratio = over(number("half"), number("full"))
                rows.append(finding(site, f"{name}, bfloat16 / float32, {arm}", tables, ratio, above=0.99, below=1.01))
    note = f"Measured on {BF16_TIMES} times the usual sequences, since the usual ones, and four times as many, decided nothing."
    return Outcome(rows, notes=[note]) if rows else Outcome([], untestable=NO_MODEL)


@claim(
    "special-tokens",
    source="Lieberum et al. 2024 (Gemma Scope), section 3.2; public discussion of BOS in FVU",
    says="Special tokens are unlike all others: reconstructions of them are poor where they were not trained on, and counting "
    "them changes FVU.",
    shown="The squared error of BOS, relative to its square, is more than twice that of other tokens; FVU with BOS differs by more "
    "than 10 % from FVU without.",
    trains=methods("topk", on=lambda lab: lab.sites),
    remark="BOS is special where its norm is above that of other tokens, in the residual stream. At MLP outputs it is below, and "
    "there little changes.",
)
def special_tokens(lab: Lab) -> Outcome:
    rows = []
    for site in lab.sites:
        held = site.held_out()
        everything = torch.ones_like(held.mask)
        norms = torch.linalg.vector_norm(held.x, dim=-1)
        ratio = float(norms[~held.mask].mean() / norms[held.mask].median())
        rows.append(exact(site, "norm of BOS / median norm", ratio))
        errors, fvus, l0s = [], [], []
        for sae in lab.arms(site, "topk")["topk"]:
            found, _ = fidelity(sae, held)
            without = {name: float(v.sum()) for name, v in found.sums.by_sequence().items()}
            special = {name: float(v.sum()) for name, v in found.special.by_sequence().items()}
            whole, _ = fidelity(sae, type(held)(held.x, everything, held.ids))
            both = {name: float(v.sum()) for name, v in whole.sums.by_sequence().items()}
            errors.append((special["error"] / special["square"]) / (without["error"] / without["square"]))
            fvus.append((both["error"] / both["variance"]) / (without["error"] / without["variance"]))
            l0s.append(special["l0"] / special["n"])
        rows.append(seeds_finding(site, "relative error, BOS / other tokens", errors, above=2.0))
        apart = [max(f, 1 / f) for f in fvus]
        rows.append(seeds_finding(site, "FVU with BOS / without, the larger over the smaller", apart, above=1.1))
        rows.append(seeds_finding(site, "FVU with BOS / without", fvus))
        rows.append(seeds_finding(site, "L0 of BOS", l0s))
    return Outcome(rows) if rows else Outcome([], untestable=NO_MODEL)
