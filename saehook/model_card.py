"""An SAE on the hub: its files with a card made from what they say, in one commit."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saehook import hub
from saehook.charts import CSS, histogram
from saehook.checkpoint import save_sae
from saehook.config import MaskRule
from saehook.errors import ArgumentError
from saehook.hub import HubPlace
from saehook.sae import SAE
from saehook.site_spellings import transformerlens_name

DENSITY = "density.svg"
"""The figure beside the card: how often the latents fire."""
FACTS = ("folder", "site", "TransformerLens' name", "rule", "d_in", "d_sae", "trained on")
COLUMNS = {
    "ce_clean": "loss clean",
    "ce_spliced": "spliced",
    "delta_ce": "delta",
    "kl": "KL",
    "ce_recovered_zero": "recovered (zero)",
    "ce_recovered_mean": "recovered (mean)",
    "fvu": "FVU",
    "l0": "L0",
    "dead_share": "dead",
}
"""What of an evaluation the table shows, as far as it was measured."""


def push_to_hub(
    saes: SAE | Sequence[SAE],
    repo: str,
    *,
    licence: str,
    private: bool = False,
    dtype: Any = None,
) -> HubPlace:
    """Write SAEs into a model repository on the hub as one commit: a folder for each, by its site, and a card for all.

    The repository is made where it does not exist. `load_sae(repo, site)` reads them again, and so does SAELens.

    Args:
        repo: `owner/name`.
        licence: of the weights, as the hub spells it: `mit`, `apache-2.0`, `cc-by-4.0`, ...; only you can know it.
        dtype: of the stored weights; None: each SAE's.

    Raises:
        ArgumentError: no SAE, two of one site, an SAE without site, a licence that is no identifier, no name `owner/name`.
        FileError: the hub cannot be written.
    """
    several = [saes] if isinstance(saes, SAE) else list(saes)
    folders = [folder_of(sae) for sae in several]
    if not several or len(set(folders)) < len(folders):
        raise ArgumentError(
            f"SAEs for {', '.join(folders) or 'no site'} are given; at least one, and one for each site."
        )
    name = repo.removeprefix(hub.PREFIX)
    files: dict[str, str | Path] = {"README.md": model_card(dict(zip(folders, several, strict=True)), name, licence)}
    with tempfile.TemporaryDirectory() as temporary:
        for folder, sae in zip(folders, several, strict=True):
            written = save_sae(sae, Path(temporary) / folder, dtype=dtype)
            files |= {f"{folder}/{file.name}": file for file in sorted(written.iterdir())}
            if sae.stats is not None:
                files[f"{folder}/{DENSITY}"] = density_figure(sae)
        return hub.upload(repo, files, message=f"SAEs for {', '.join(folders)}", private=private)


def folder_of(sae: SAE) -> str:
    """The folder of an SAE in its repository: the site, and where a transcoder writes.

    Raises:
        ArgumentError: it has none.
    """
    if sae.site is None:
        raise ArgumentError("the SAE does not say which site it belongs to. Set it: sae.site = 'layers.2.resid_post'.")
    name = sae.site if sae.site_out is None else f"{sae.site}-to-{sae.site_out}"
    return name.replace(":", ".")


def model_card(saes: Mapping[str, SAE], repo: str, licence: str) -> str:
    """The text of README.md for a repository with SAEs in folders: facts, evaluation, how to use them, licence.

    Raises:
        ArgumentError: a licence that is no identifier of the hub.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", licence):
        raise ArgumentError(f"{licence!r} is no licence as the hub spells it; expected for example mit or apache-2.0.")
    lms = sorted({str(lm) for sae in saes.values() if (lm := _fact(sae, "lm", "id"))})
    on = f" of {' and '.join(f'`{lm}`' for lm in lms)}" if lms else ""
    folder, sae = next(iter(saes.items()))
    parts = [
        _front_matter(lms, licence),
        f"# {repo.rpartition('/')[2]}\n",
        f"Sparse autoencoders on activations{on}, made with saehook.\n",
        _table(FACTS, [_facts(*item) for item in saes.items()]),
        _evaluation(saes),
        *(_figure(name) for name, one in saes.items() if one.stats is not None),
        _usage(repo, folder, sae, lms),
        _notes(saes),
        f"## Licence\n\n{licence}, for the weights of the SAEs. The language model has a licence of its own.\n",
    ]
    return "\n".join(part for part in parts if part)


def density_figure(sae: SAE) -> str:
    """How often the latents fire, as an SVG that stands alone."""
    assert sae.stats is not None
    logs = [math.log10(value) for value in sae.stats.density.tolist() if value > 0]
    low = math.floor(min(logs, default=-1))
    picture = histogram(
        "Density of the latents", logs, low, 0, below="share of tokens on which a latent fires", what="latents"
    )
    colours = "svg { --soft: #666; --rule: #ddd; --bar: #1f5fa8; background: #fff; font-family: sans-serif }"
    picture = picture.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return picture.replace(">", f"><style>{colours}{CSS}</style>", 1) + "\n"


def _front_matter(lms: Sequence[str], licence: str) -> str:
    base = [f"base_model: {lm}" for lm in lms[:1] if re.fullmatch(r"[\w.\-]+/[\w.\-]+", lm)]
    tags = [f"- {tag}" for tag in ("saehook", "saelens", "sparse-autoencoder", "interpretability")]
    return "\n".join(["---", f"license: {licence}", *base, "library_name: saehook", "tags:", *tags, "---", ""])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def _facts(folder: str, sae: SAE) -> list[str]:
    tokens = sae.metadata.get("tokens_seen")
    site = sae.site or ""
    return [
        f"`{folder}`",
        site if sae.site_out is None else f"{site} → {sae.site_out}",
        transformerlens_name(sae.site) or "",
        str(sae.config.activation),
        f"{sae.d_in:,}",
        f"{sae.d_sae:,}",
        f"{tokens:,} tokens" if isinstance(tokens, int) else "",
    ]


def _evaluation(saes: Mapping[str, SAE]) -> str:
    measured = {
        folder: found for folder, sae in saes.items() if isinstance(found := sae.metadata.get("evaluation"), dict)
    }
    columns = [key for key in COLUMNS if any(isinstance(row.get(key), (int, float)) for row in measured.values())]
    if not columns:
        return ""
    rows = [[f"`{folder}`", *(_number(key, row.get(key)) for key in columns)] for folder, row in measured.items()]
    table = _table(["folder", *(COLUMNS[key] for key in columns)], rows)
    return f"## Evaluation\n\nOn held-out text, nats per token; measured on the stored weights.\n\n{table}"


def _number(key: str, value: Any) -> str:
    if not isinstance(value, (int, float)):
        return ""
    return f"{value:.1%}" if key == "dead_share" else f"{value:.1f}" if key == "l0" else f"{value:.3f}"


def _figure(folder: str) -> str:
    return f"![How often the latents of {folder} fire]({folder}/{DENSITY})\n"


def _usage(repo: str, folder: str, sae: SAE, lms: Sequence[str]) -> str:
    lm = lms[0] if lms else "the language model"
    site = "" if sae.is_transcoder else f", {sae.site}"
    return f"""## Use

```python
import saehook

sae = saehook.load_sae("{repo}", "{folder}")
hooked = saehook.HookedModel.from_pretrained("{lm}").attach(sae)
print(hooked.generate("Once upon a time", [saehook.steer(123, 0.5, unit="norm")]).text)
```

With SAELens{site}: `SAE.from_pretrained("{repo}", "{folder}")`.
"""


def _notes(saes: Mapping[str, SAE]) -> str:
    lines = []
    for folder, sae in saes.items():
        rule: MaskRule = sae.mask_rule
        left_out = [f"the first {rule.skip_first_tokens} tokens of each text"] * bool(rule.skip_first_tokens)
        if rule.max_norm is not None:
            left_out.append(f"tokens with a norm above {rule.max_norm:.4g}, {rule.max_norm_ratio:g} × the median")
        revision = _fact(sae, "lm", "revision")
        lines += [f"- `{folder}`: special tokens and {' and '.join(left_out)} were left out in training."] * bool(
            left_out
        )
        lines += [f"- `{folder}`: trained on commit {revision} of the language model."] * bool(revision)
    return "## Notes\n\n" + "\n".join(lines) + "\n" if lines else ""


def _fact(sae: SAE, *path: str) -> Any:
    found: Any = sae.metadata
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found
