"""What a program means, token by token: plain torch hooks, no cache, rows padded behind their end. Slow, and 80 lines.

It knows saehook's data classes, a schedule's factors, and an SAE's encode and decode; nothing of what runs edits.
"""

import operator
from contextlib import ExitStack
from functools import partial
from itertools import groupby, product

import numpy as np
import regex
import torch
from reference_hooks import written
from torch.nn.utils.rnn import pad_sequence

from saehook.conditions import And, Not
from saehook.sae import QUANTILE_LEVELS
from saehook.where import EVERYWHERE


def run(lm, saes, program, rows, prompts, tokenizer):
    """Logits of `rows` of ids, each with its first `prompts` ids as input, and the tokens touched: (site, row, token)."""
    zs, touched, tokens = {}, set(), [(row, i) for row, ids in enumerate(rows) for i in range(len(ids))]

    def counts(row, i, name, norm, where=EVERYWHERE):
        rule, token = saes[name].mask_rule if name in saes else None, rows[row][i]
        included = where.special or token not in tokenizer.all_special_ids or (where.bos and token == 0)
        return included and not (rule and (i < rule.skip_first_tokens or norm > (rule.max_norm or np.inf)))

    def holds(when, row, i):
        if parts := [holds(p, row, i - k) for p in when.parts for k in range(getattr(when, "tokens", 0) + 1) if k <= i]:
            return not parts[0] if isinstance(when, Not) else (all if isinstance(when, And) else any)(parts)
        left, z = when.left, [zs[when.left.site, row, j][when.left.latent] for j in range(len(rows[row]))]
        fade = {"so_far_max": 1.0, "decay": left.decay}.get(left.over, 0.0)  # for "here", as 0 ** 0 is 1
        other = {"prompt_max": max(z[: prompts[row]]), "last": z[i - 1] * (i > 0)}
        value = other.get(left.over, max(z[j] * fade ** (i - j) for j in range(i + 1)))
        return getattr(operator, when.op)(value, when.right)

    def share(edit, row, i, name, norm):  # of the change, that is made at this token; None: it is not selected
        where, ids, (start, stop) = edit.where, rows[row], edit.where.positions or (0, None)
        fits = start <= i < (stop or len(ids)) and row in (where.rows or [row]) and ids[i] in (where.token_ids or ids)
        begin, end = (len(tokenizer.decode(ids[:n])) if where.pattern else 0 for n in (i, i + 1))
        found = regex.finditer(where.pattern or "", tokenizer.decode(ids[: max(i + 1, prompts[row])]))
        fits &= not where.pattern or any(max(begin, m.start()) < min(end, m.end()) for m in found)
        phase = (where.prompt if i < prompts[row] else where.generation) and counts(row, i, name, norm, where)
        fits &= i in [token % prompts[row] for token in where.tokens] if where.tokens else phase
        part = 1.0 if edit.schedule is None else edit.schedule.at(i - prompts[row])
        return part if fits and (edit.when is None or holds(edit.when, row, i)) else None

    def vector(_, edits, x, spliced):
        edit, part, v = *edits[0], torch.tensor(edits[0][0].vector)
        size, unit = (edit.value or 0.0) * (x.norm() if edit.unit == "norm" else 1.0), v / v.norm()
        ops = {"add": size * (v if edit.unit == "raw" else unit), "project_out": -(x @ unit) * unit}
        return part * ops.get(edit.op, -(x @ unit - size).clamp_min(0) * unit)

    def latent(edit, name, j, z, norm):
        stats, c, (row, t) = saes[name].stats, edit.value or 0.0, edit.source or (0, 0)
        quantile = np.interp(c, [0, *QUANTILE_LEVELS, 1], [0, *stats.quantiles[j].tolist(), float(stats.max_act[j])])
        units = {"max": c * stats.max_act[j], "norm": c * norm / saes[name].W_dec[j].norm(), "quantile": quantile}
        c, swapped, kept = units.get(edit.unit, c), z[(sum(edit.latents) - j) % len(z)], z[j] * (j in edit.latents)
        ops = {"set": c, "add": z[j] + c, "scale": c * z[j], "min": max(z[j], c), "max": min(z[j], c), "swap": swapped}
        ops |= {"mean": stats.mean_act[j], "resample": zs[name, row, t % prompts[row]][j], "keep_only": kept}
        return ops.get(edit.op, 0.0)

    def block(name, edits, x, hit):  # of one SAE: the change of x; None: nothing touches it
        sae, z = saes[name], saes[name].encode(x)
        scale, written_out, solved = sae.scale(x) if sae.config.normalize != "none" else 1.0, 0.0 * z, []
        for edit, part in edits:
            many = range(sae.d_sae) if edit.op == "keep_only" else edit.latents
            change, meant = 0.0 * z, [j for j in many if z[j] > 0 or not edit.active_only]
            for j in meant:
                change[j] = part * (latent(edit, name, j, z, x.norm() / scale) - z[j])
            z, hit, back = z + change, hit or bool(meant), edit.mode == "readback"
            written_out = written_out + change * (not back)
            solved += edit.latents if back and meant else ()
        if program.splice or program.error in ("drop", "mean"):
            return sae.decode(z, x) + sae.stats.mean_error * (program.error == "mean") - x if hit else None
        s, y = sorted(set(solved)), x + scale * (written_out @ sae.W_dec)
        pre, got = sae.pre_acts(y)[s], sae.encode(y)[s]
        wanted = torch.where((z[s] == got) | ((z[s] == 0) & (pre < 0)), 0.0, z[s] - pre)
        y = y + torch.linalg.solve((sae.W_dec[s] @ sae.W_enc[:, s]).T, wanted) @ sae.W_dec[s]
        return y - x if hit else None

    def write(x, site, edits, at):
        x, groups = x.clone(), groupby(edits, lambda edit: edit.site if hasattr(edit, "latents") else object())
        for name, (row, i) in product(at, tokens):
            zs[name, row, i] = saes[name].encode(x[row, i]) * counts(row, i, name, x[row, i].norm())
        blocks = [(name, list(some)) for name, some in groups]
        blocks = [(name, []) for name in at if program.splice and name not in dict(blocks)] + blocks
        for row, i in tokens:
            old = new = x[row, i].clone()
            for name, some in blocks:
                seen, norm = old if program.parallel else new, old.norm()
                spliced = name in saes and program.splice and counts(row, i, name, norm)
                meant = [(edit, part) for edit in some if (part := share(edit, row, i, name, norm)) is not None]
                change = (block if name in saes else vector)(name, meant, seen, spliced) if meant or spliced else None
                new = new if change is None else new + change
                touched.update([(site, row, i)] * (change is not None))
            limit = getattr(program.norm, "limit", 1.0) * old.norm()
            capped = old + (new - old) * (limit / (new - old).norm().clamp_min(1e-30)).clamp_max(1.0)
            x[row, i] = {None: new, "preserve": new * (old.norm() / new.norm())}.get(program.norm, capped)
        return x

    with ExitStack() as stack:
        for site in {name.partition("#")[0] for name in [*saes, *(edit.site for edit in program.edits)]}:
            here = [edit for edit in program.edits if edit.site.partition("#")[0] == site]
            at = [name for name in saes if name.partition("#")[0] == site]
            stack.enter_context(written(lm, site, partial(write, site=site, edits=here, at=at)))
        return lm(input_ids=pad_sequence([*map(torch.tensor, rows)], batch_first=True), use_cache=False).logits, touched
