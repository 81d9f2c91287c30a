"""Records solvers.json: what scikit-learn, SciPy and SAEBench (0.6.0) compute on the data of `solvers_case.py`.

In an environment of its own: `pip install torch==2.13.0 scikit-learn scipy` and `pip install --no-deps sae-bench==0.6.0`, then
`python tests/parity/record_solvers.py`. Nothing of those packages is in this repository but numbers that they computed.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from scipy.optimize import nnls  # pyright: ignore[reportMissingImports]
from scipy.stats import pearsonr, spearmanr  # pyright: ignore[reportMissingImports]
from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]
from sklearn.metrics import log_loss  # pyright: ignore[reportMissingImports]
from sklearn.preprocessing import StandardScaler  # pyright: ignore[reportMissingImports]
from solvers_case import MAIN, absorbing, codes, effects, probes

RIDGES = {"probe_loss": 1e-6, "absorption": 1e-2}
"""Those of `suite/probe_loss.py` and `suite/absorption.py`; scikit-learn's C is 1 / (examples · ridge)."""


def fitted(z: Any, y: Any, ridge: float) -> tuple[list[float], float, float]:
    """Weights and intercept of a logistic regression on standardised z, in units of z, and its mean loss."""
    scaler = StandardScaler().fit(z)
    model = LogisticRegression(C=1 / (len(z) * ridge), solver="newton-cholesky", tol=1e-12, max_iter=1000)
    model.fit(scaler.transform(z), y)
    weight = model.coef_[0] / scaler.scale_
    intercept = float(model.intercept_[0] - weight @ scaler.mean_)
    return weight.tolist(), intercept, float(log_loss(y, model.predict_proba(scaler.transform(z))))


def absorbed() -> list[float]:
    """Of each token, by SAEBench's calculator; prompts and model stand for tokens and activations. It wants two packages for
    the names of types only."""
    sys.modules["sae_lens"] = sys.modules["transformer_lens"] = SimpleNamespace(SAE=None, HookedTransformer=None)  # pyright: ignore
    from sae_bench.evals.absorption.feature_absorption_calculator import (  # pyright: ignore[reportMissingImports]
        FeatureAbsorptionCalculator,
    )

    x, encoder, decoder, direction = absorbing()
    prompts = [SimpleNamespace(base=str(i), word=str(i)) for i in range(len(x))]
    model = SimpleNamespace(
        run_with_cache=lambda texts, names_filter: (None, {names_filter[0]: x[[int(text) for text in texts]][:, None]}),
        to_tokens=lambda text: [[0]],
    )
    calculator = FeatureAbsorptionCalculator(model=model, icl_word_list=[], word_token_pos=0, topk_feats=5)
    calculator._build_prompts = lambda words: prompts
    sae = SimpleNamespace(device="cpu", W_dec=decoder, encode=lambda x: (x @ encoder).relu())
    words = [prompt.word for prompt in prompts]
    found = calculator.calculate_absorption(sae, words, direction, list(MAIN), layer=0, show_progress=False)
    return [float(result.absorption_fraction) for result in found.word_results]


def main() -> None:
    z, y = (each.double().numpy() for each in probes())
    acts, target, decoder = (each.double().numpy() for each in codes())
    a, b = (each.double().numpy() for each in effects())
    single = [fitted(z[:, i : i + 1], y, RIDGES["probe_loss"]) for i in range(z.shape[1])]
    weight, intercept, _ = fitted(z, y, RIDGES["absorption"])
    refined = torch.zeros(acts.shape, dtype=torch.float64)
    for i, row in enumerate(acts):
        active = row.nonzero()[0]
        refined[i, active] = torch.from_numpy(nnls(decoder[active].T, target[i])[0])
    found = {
        "versions": {name: version(name) for name in ("scikit-learn", "scipy", "sae-bench")},
        "probes": [{"weight": w[0], "bias": b, "loss": loss} for w, b, loss in single],
        "probe_of_all": {"weight": weight, "bias": intercept},
        "refined": refined.tolist(),
        "pearson": float(pearsonr(a, b).statistic),
        "spearman": float(spearmanr(a, b).statistic),
        "absorbed": absorbed(),
    }
    Path(__file__).with_name("solvers.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
