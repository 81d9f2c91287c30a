"""Records explanations by the code of openai/sparse_autoencoder: `python record_n2g.py FOLDER_OF_explanations.py`.

An activation is a sum over the last tokens of a row of a table's entries, so that it has a meaning with any token in any
place; the start of the row has an entry of its own.
"""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path

FILLER, VOCAB, REACH = 0, 7, 3


def activation(table: list[list[int]], row: list[int]) -> int:
    """max(0, Σ table[distance from the end][token]), token `VOCAB` where the row has not begun."""
    padded = [VOCAB] * REACH + row
    return max(0, sum(table[i][padded[-1 - i]] for i in range(REACH)))


def main() -> None:
    sys.modules["blobfile"] = types.ModuleType("blobfile")
    sys.path.insert(0, sys.argv[1])
    from explanations import create_n2g_explanation  # pyright: ignore[reportMissingImports]

    draw = random.Random(0)
    cases = []
    while len(cases) < 40:
        table = [[draw.choice([-3, -1, 0, 0, 1, 4]) for _ in range(VOCAB + 1)] for _ in range(REACH)]
        texts = [[draw.randrange(1, VOCAB) for _ in range(9)] for _ in range(30)]
        ends = [(text, i) for text in texts for i in range(9) if activation(table, text[: i + 1]) > 0]
        if len(ends) < 8:
            continue
        examples = [text[: i + 1] for text, i in draw.sample(ends, 8)]

        def acts(rows: list[list[int]], table: list[list[int]] = table) -> list[list[int]]:
            return [[activation(table, row[: i + 1]) for i in range(len(row))] for row in rows]

        documents = [
            {"idx": len(e) - 1, "act": activation(table, e), "acts": acts([e])[0], "tokens": e, "token_ints": e}
            for e in examples
        ]
        theirs = create_n2g_explanation(acts, documents, padding_token=FILLER)
        cases.append(
            {"table": table, "examples": examples, "texts": texts, "predicted": [theirs.predict(t) for t in texts]}
        )
    Path(__file__).with_name("n2g.json").write_text(json.dumps(cases, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
