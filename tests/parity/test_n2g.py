"""N2G explanations against those of openai/sparse_autoencoder on the same activations (`record_n2g.py`)."""

import json
from pathlib import Path

import torch
from record_n2g import FILLER, activation

from saehook.suite.explanations import explain

CASES = json.loads(Path(__file__).with_name("n2g.json").read_text())


def test_predictions_are_theirs():
    fired = 0
    for case in CASES:
        table = case["table"]
        found = explain(
            lambda rows, table=table: torch.tensor([float(activation(table, list(row))) for row in rows]),
            case["examples"],
            FILLER,
        )
        for text, predicted in zip(case["texts"], case["predicted"], strict=True):
            assert found.predict(text).tolist() == predicted
            fired += sum(p > 0 for p in predicted)
    assert fired > 1000
