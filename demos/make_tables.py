"""Fill the tables of the README and checkpoints/suite.md from the stored numbers; tests compare them.

python demos/make_tables.py            the tables
python demos/make_tables.py --suite    first measure the slow metrics of the bundled SAEs anew, into checkpoints/suite.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EVALUATION = ROOT / "checkpoints" / "eval.json"
SUITE, SUITE_TABLE = ROOT / "checkpoints" / "suite.json", ROOT / "checkpoints" / "suite.md"


def evaluation() -> str:
    """The splice-in evaluation of the bundled SAEs."""
    data = json.loads(EVALUATION.read_text())
    lines = [
        "| SAE | site | loss clean | spliced | zero | mean | delta | KL | recovered (zero) | (mean) | FVU | L0 | dead |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in data["results"]:
        losses = " | ".join(f"{r[n]:.3f}" for n in ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "delta_ce", "kl"))
        shares = " | ".join(f"{r[n]:.3f}" for n in ("ce_recovered_zero", "ce_recovered_mean", "fvu"))
        lines.append(f"| {r['sae']} | {r['site']} | {losses} | {shares} | {r['l0']:.1f} | {r['dead_share']:.1%} |")
    python = data["provenance"]["versions"]["python"]
    lines.append(
        f"\nNats per token on {data['results'][0]['tokens']:,} tokens of the held-out standard-library modules (Python {python}); "
        "`saehook eval` measures it again."
    )
    return "\n".join(lines)


def speed() -> str:
    """The newest recorded run of tests/bench/bench_splice.py."""
    file = sorted((ROOT / "tests" / "bench" / "RESULTS").glob("splice_*.json"))[-1]
    data = json.loads(file.read_text())
    machine = data.pop("machine")
    lines = ["| | time | against hand-written torch hooks |", "|---|---|---|"]
    for what, r in data.items():
        time = f"{r['ms_per_token']:.1f} ms a token" if "ms_per_token" in r else f"{r['seconds']:.2f} s"
        added = f" (+{r['added_ms_per_token']:.2f} ms a token)" if "added_ms_per_token" in r else ""
        lines.append(f"| {what} | {time} | {r['ratio']:.2f} ×{added} |")
    idle = next(r["ratio_idle_to_clean"] for r in data.values() if "ratio_idle_to_clean" in r)
    lines.append(
        f"\nAn SAE attached and idle: {idle:.2f} × the clean model. {machine['threads']} CPU threads, torch {machine['torch']}; "
        "medians of one interleaved run of `python tests/bench/bench_splice.py`."
    )
    return "\n".join(lines)


def evaluating() -> str:
    """The newest recorded run of tests/bench/bench_eval.py."""
    file = sorted((ROOT / "tests" / "bench" / "RESULTS").glob("eval_*.json"))[-1]
    data = json.loads(file.read_text(encoding="utf-8"))
    variants, memory, table = (
        data[what]
        for what in ("splice-in variants, GPT-2 size", "memory of an evaluation", "table of the bundled SAEs")
    )
    machine = data["machine"]
    return (
        f"Evaluation: {variants['variants']} splice-in variants at {len(variants['sites'])} sites of a GPT-2-sized model take "
        f"{variants['ratio_to_forward_passes']:.2f} of a forward pass each, SAEs apart; with {memory['vocabulary']:,} tokens in "
        f"the vocabulary it holds {memory['gigabytes_above_the_model']:.2f} GB above the model; `{table['command']}` on the "
        f"bundled SAEs takes {table['seconds']:.0f} s, start-up included. {machine['threads']} CPU threads, torch "
        f"{machine['torch']}; `python tests/bench/bench_eval.py`."
    )


def training() -> str:
    """The newest recorded runs of tests/bench/bench_train_step.py, as it is and with --in-float32."""
    rows, in_float32 = _recorded("train_step_cpu"), _recorded("train_step_in_float32_cpu")
    lines = [
        "| method | tokens a step | latents that fire | a step, × the encoder's product | all in float32 | "
        "memory, × the pre-activations | all in float32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r, other in zip(rows, in_float32, strict=True):
        assert (r["what"], r["batch"]) == (other["what"], other["batch"])
        lines.append(
            f"| {r['what']} | {r['batch']:,} | {r['fired_per_token']:,.0f} | {r['ratio_to_encoder_product']:.2f} | "
            f"{other['ratio_to_encoder_product']:.2f} | {r['memory_over_pre_activations']:.2f} | "
            f"{other['memory_over_pre_activations']:.2f} |"
        )
    r = rows[0]
    lines.append(
        f"\nWhole steps of the trainer, {r['d_in']} → {r['d_sae']:,}, against the encoder's product in float32; memory above "
        f"model and optimiser, gradients with it. {r['threads']} CPU threads, torch {r['torch']}, a processor with AVX-512 BF16; "
        "medians of one interleaved run of `python tests/bench/bench_train_step.py`, and of one with `--in-float32`."
    )
    return "\n".join(lines)


def peers() -> str:
    """The recorded runs of tests/bench/bench_train_step.py --only --peers: with bfloat16, without, and on a slower processor."""
    rows = _recorded("peers_cpu")
    others = [_recorded(f"peers_in_float32_{which}cpu") for which in ("", "slower_")]
    lines = [
        "| | seconds a step | × the encoder's product | × ours | × ours, all in float32 | the same, slower processor | "
        "losses differ by |",
        "|---|---|---|---|---|---|---|",
    ]
    for r, *same in zip(rows, *others, strict=True):
        assert all(other["package"] == r["package"] for other in same)
        ratios = " | ".join(f"{one['ratio_to_ours']:.1f}" for one in (r, *same))
        lines.append(
            f"| {r['package'].replace('==', ' ')} | {r['seconds']:.2f} | {r['ratio_to_encoder_product']:.1f} | {ratios} | "
            f"{r['largest_difference']:.0e} |"
        )
    r = rows[0]
    lines.append(
        f"\nTopK steps, {r['d_in']} → {r['d_sae']:,}, k {r['k']}, {r['batch']:,} tokens; same data, weights and mathematics, "
        f"losses compared over the first 20 steps. {r['threads']} CPU threads, torch {r['torch']}; medians, each peer "
        "interleaved with ours, by `python tests/bench/bench_train_step.py --only --peers`. The product took "
        f"{_product(rows):.2f} s, on the slower processor {_product(others[1]):.2f} s; both columns in float32 are of the version "
        "before products in bfloat16."
    )
    return "\n".join(lines)


def _recorded(name: str) -> list[dict[str, Any]]:
    """The newest of the files of that name in tests/bench/RESULTS."""
    files = (ROOT / "tests" / "bench" / "RESULTS").glob(f"{name}*.json")
    return json.loads(max(files).read_text())


def _product(rows: list[dict[str, Any]]) -> float:
    return statistics.median(r["seconds_encoder_product"] for r in rows)


def startup() -> str:
    """The newest recorded runs of tests/bench/bench_startup.py and bench_end_to_end.py, as sentences."""
    results = ROOT / "tests" / "bench" / "RESULTS"
    taken = json.loads(sorted(results.glob("startup_cpu*.json"))[-1].read_text())["seconds"]
    r = json.loads(sorted(results.glob("end_to_end_cpu*.json"))[-1].read_text())
    return (
        f"`import saehook` takes {taken['import saehook']:.2f} s, `saehook --help` {taken['saehook --help']:.2f} s, the page "
        f"{taken['saehook demo, page']:.0f} s, `saehook demo --no-serve` {taken['saehook demo --no-serve']:.0f} s "
        "(`bench_startup.py`). A whole training, "
        f"{r['what']}, {r['d_sae']:,} latents, {r['tokens']:,} tokens, runs at {r['share_of_the_limit']:.0%} of what the language "
        "model and the bare encoder products take alone (`bench_end_to_end.py`)."
    )


def page() -> str:
    """The newest recorded run of tests/bench/bench_page.py."""
    file = sorted((ROOT / "tests" / "bench" / "RESULTS").glob("page_*.json"))[-1]
    data = json.loads(file.read_text())
    machine, measured = data["machine"], data["measured"]
    lines = ["| the page | median | worst | promised |", "|---|---|---|---|"]
    for name, limit in data["at most"].items():
        what, value = name.removesuffix(", s"), measured[name]
        if isinstance(value, dict):
            lines.append(f"| {what} | {value['median']:.2f} s | {max(value['each']):.2f} s | {limit:g} s |")
        else:
            lines.append(f"| {what} |  | {value:+.1%} | {limit:+.0%} |")
    alone, together = (measured[name] for name in ("one caller alone, s", "three at once, of whom one leaves, s"))
    lines.append(
        f"\n{data['visitors']} visitors one after another in Chromium {machine['chromium'].split('.')[0]} on the server's "
        f"{machine['cores']} cores, bundled model, Playwright's own time included. 60 tokens take one caller {alone:.2f} s; when "
        f"three ask at once and the first one leaves, the others are done after {together:.2f} s. gradio {machine['gradio']}, "
        f"torch {machine['torch']}; `python tests/bench/bench_page.py`."
    )
    return "\n".join(lines)


def methods() -> str:
    """The newest recorded run of demos/compare_methods.py: mean over the seeds, and from which to which."""
    file = sorted((ROOT / "tests" / "bench" / "RESULTS").glob("methods_*.json"))[-1]
    data = json.loads(file.read_text())
    names = {
        "l0": ".1f",
        "fvu": ".3f",
        "delta_ce": ".3f",
        "kl": ".3f",
        "dead_in_training": ".1%",
        "dead_held_out": ".1%",
    }
    lines = [
        "| method | L0 | FVU | delta CE | KL | dead, training | dead, held-out |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in data["rows"]):
        cells = []
        for name, form in names.items():
            values = [row[name] for row in data["rows"] if row["method"] == method]
            least, most = (format(value, form) for value in (min(values), max(values)))
            spread = f" ({least}–{most})" if least != most else ""
            cells.append(format(sum(values) / len(values), form) + spread)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    row, seeds = data["rows"][0], len({row["seed"] for row in data["rows"]})
    lines.append(
        f"\n{data['site']} of the bundled model, {row['training_tokens']:,} tokens, mean of {seeds} seeds (least–most); ReLU and "
        f"JumpReLU steered to L0 {data['k']}. Splice-in loss on {row['tokens']:,} tokens of the held-out modules; dead: silent "
        f"over the last {row['dead_in_training_tokens']:,} training tokens, and over {row['dead_held_out_tokens']:,} held-out "
        f"ones. {data['machine']['cores']} CPU cores, torch {data['machine']['torch']}; "
        "`python demos/compare_methods.py --text NOVELS --json FILE`."
    )
    return "\n".join(lines)


def weights_sha256(name: str) -> str:
    """Of a bundled SAE: says which weights numbers are of."""
    return hashlib.sha256((ROOT / "checkpoints" / name / "sae_weights.safetensors").read_bytes()).hexdigest()


def measure_suite() -> None:
    """What `saehook eval --suite full` adds for the bundled SAEs is stored."""
    import saehook
    from saehook.commands.shared import held_out_text
    from saehook.suite.run import run_suite

    names = ("sae", "sae-mlp")
    saes = {name: saehook.load_sae(saehook.bundled(name)) for name in names}
    model = saehook.HookedModel.from_pretrained(saehook.bundled("lm"))
    hooked = model.attach({sae.site: sae for sae in saes.values()})
    text = held_out_text(None, 100_000, model)
    suite = run_suite(hooked, text, names=dict(zip(hooked.sites, names, strict=True))).to_dict()
    suite["provenance"]["weights_sha256"] = {name: weights_sha256(name) for name in names}
    SUITE.write_text(json.dumps(suite, indent=1) + "\n", encoding="utf-8")


def suite_table() -> str:
    """checkpoints/suite.md."""
    from saehook.suite_report import measure_text

    suite = json.loads(SUITE.read_text(encoding="utf-8"))
    cells = {(row["name"], row["sae"]): row for row in suite["rows"]}
    saes = list(dict.fromkeys(row["sae"] for row in suite["rows"]))
    provenance = suite["provenance"]
    lines = [
        "# Slow metrics of the bundled SAEs",
        "",
        "Made again by `python demos/make_tables.py --suite`, which runs `saehook eval --suite full`: held-out modules of Python "
        f"{provenance['versions']['python']}, {max(provenance['tokens'].values()):,} tokens of them, seed {provenance['seed']}. "
        "What each measure is: `saehook/suite/`. In brackets 95 % intervals over what it is measured on.",
        "",
        f"| measure | {' | '.join(saes)} | unit | measured on |",
        "|---|" + "---|" * (len(saes) + 2),
    ]
    for name in dict.fromkeys(row["name"] for row in suite["rows"]):
        found = [cells.get((name, sae)) for sae in saes]
        first = next(row for row in found if row)
        measured = " / ".join(dict.fromkeys(f"{row['n']:,} {row['of']}" for row in found if row))
        values = " | ".join(measure_text(row) if row else "–" for row in found)
        lines.append(f"| {name} | {values} | {first['unit']} | {measured} |")
    lines += ["", *(f"{gone['site']}: no {gone['metric']}: {gone['why']}\n" for gone in suite["left_out"])]
    return "\n".join(lines).rstrip() + "\n"


def distributed() -> str:
    """Some rows of the newest recorded run of tests/bench/bench_distributed.py."""
    file = sorted((ROOT / "tests" / "bench" / "RESULTS").glob("distributed_bytes_*.json"))[-1]
    lines = ["| devices | mesh | held, MB | x_hat, kB | top-k, kB | gradients, kB |", "|---:|---|---:|---:|---:|---:|"]
    for r in json.loads(file.read_text())["rows"]:
        if r["devices"] in (2, 8, 64, 512):
            mesh = f"data={r['data']},latent={r['devices'] // r['data']}"
            sent = " | ".join(f"{r['sent_bytes'][what] / 1e3:,.0f}" for what in ("x_hat", "top-k", "gradients"))
            lines.append(f"| {r['devices']} | {mesh} | {r['held_bytes'] / 1e6:,.2f} | {sent} |")
    return "\n".join(lines)


TABLES = {
    "checkpoints/eval.json": evaluation,
    "compare_methods": methods,
    "bench_splice": speed,
    "bench_eval": evaluating,
    "bench_train_step": training,
    "bench_peers": peers,
    "bench_startup": startup,
    "bench_page": page,
    "bench_distributed": distributed,
}


def filled(text: str) -> str:
    """`text` with every table made anew."""
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end of table -->)", re.DOTALL)
        assert block.search(text), f"README.md has no table {name}"
        text = block.sub(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="store_true", help="measure the slow metrics anew; some minutes")
    if parser.parse_args().suite:
        measure_suite()
    SUITE_TABLE.write_text(suite_table(), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
