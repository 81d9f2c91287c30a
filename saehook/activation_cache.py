"""The activations of a training run on disk: a second run, with SAEs of another size or k, needs no language model pass.

Each site has a folder named by a hash of all that its activations depend on (`cache_key`). In it lie
`shard-00000.safetensors`, `shard-00001.safetensors`, ...: of the tokens that count, number t is row t % shard_tokens of shard
t // shard_tokens, in bfloat16. A shard with fewer rows, maybe none, is the end of the text.

There is no index that could contradict the shards: key, place and checksum stand in each header, and a file that differs
in any byte from what belongs at its place is made again, alone. The checksum is a CRC-32: it misses one accident in four
billion, and takes half the time of a cryptographic hash (one core, a mapped shard of 128 MiB: CRC-32 3.4 GB/s, SHA-256 1.6,
BLAKE2b 0.8), so that every read can afford it.

What is served is what is stored: a shard is whole on disk before its first token is served. So the run that fills the
cache sees the same bfloat16 numbers as those that read it, bit for bit, whatever the dtype of the language model; and a
run that stops somewhere leaves whole shards. The price is at most one shard of tokens that it did not need.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saehook.errors import ArgumentError, FileError, FormatError
from saehook.files import atomically
from saehook.harvest import activations_of, tokens_per_forward
from saehook.hooked_model import HookedModel
from saehook.kernels.device import send
from saehook.tokenization import keep_mask, special_ids

SCHEMA = 1
SHARD_TOKENS = 16_384
"""A shard is this many tokens of one site: 128 MiB at width 4096. Two shards of all sites lie in memory at a time."""
NEARBY = 4
"""So many shards the language model rather computes for nothing than read the text again up to the next that is missing.
Without it two runs that fill one cache at the same time, each finding some of the other's shards, would only read text."""
TENSOR = "activations"
STALE_SECONDS = 3600
"""A partial file this old was left by a writer that was killed; writing a shard takes seconds."""

Chunks = Iterator[dict[str, Tensor]]
Make = Callable[[int], Chunks]


def cache_key(
    *,
    lm: str,
    revision: str | None,
    weights: str,
    site: str,
    text_sha256: str,
    order: str,
    tokenizer_sha256: str,
    window: int,
    mask_rule: str,
) -> str:
    """The name of a site's activations: a sha256 over all that decides them, as hexadecimal.

    `weights` is the `weights_fingerprint`, so that a fine-tuned model of the same name has keys of its own; `text_sha256`
    the `corpus.text_hash`; `order` what decides in which order the documents are read and whether they begin again; `window`
    the tokens in a window; `mask_rule` which tokens count as far as their ids decide it: outliers are stored, too,
    since what is an outlier at one site of a run is left out at all of them.
    """
    facts = dict(locals())  # the arguments, all of them
    return hashlib.sha256(json.dumps({"schema": SCHEMA, **facts}, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(lm: Any) -> str:
    """A sha256 over the config and every parameter and buffer of a Hugging Face model, as hexadecimal.

    All values count, not a sample of them: a change of a few rows would be missed by one, and its activations would
    silently be those of the old model. One or two seconds per GB, which is small beside the pass that the cache saves.

    Raises:
        ArgumentError: weights that are not in memory.
    """
    config = json.loads(lm.config.to_json_string(use_diff=False))
    known_by = {name for name in config if name.startswith("_")} | {"transformers_version"}  # where it came from
    facts = [type(lm).__name__, {name: value for name, value in config.items() if name not in known_by}]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, x in itertools.chain(lm.named_parameters(), lm.named_buffers()):
        if x.is_meta:
            raise ArgumentError(
                f"the weights of {name} are not in memory, so they cannot be told from others. Load the whole model, "
                "or train without an activation cache."
            )
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\0".encode())
        digest.update(_bytes(x.detach().cpu()))
    return digest.hexdigest()


def lm_pass(
    model: HookedModel, sites: Sequence[str], windows: Callable[[], Iterator[Tensor]], skip_first_tokens: int = 0
) -> Make:
    """What `ActivationCache.chunks` makes missing activations with: the language model on text.

    Whole forward passes are skipped, so that each row is computed beside the same other rows, to the same bits, as in
    a pass from the start; of the skipped text only the tokenisation is paid.

    Args:
        windows: begins the text anew at each call; ids, [window] int64 each, to the very end of the text.
    """
    special = special_ids(model.tokenizer)

    def make(skip: int) -> Chunks:
        rest = iter(windows())
        for first in rest:
            batch = [first, *itertools.islice(rest, max(1, tokens_per_forward(model.device) // len(first)) - 1)]
            kept = int(keep_mask(torch.stack(batch), None, special, skip_first_tokens).sum())
            if kept <= skip:
                skip -= kept
                continue
            for chunk in activations_of(model, sites, itertools.chain(batch, rest), skip_first_tokens):
                yield {site: x[skip:] for site, x in chunk.items()}
                skip -= min(skip, len(chunk[sites[0]]))

    return make


class ActivationCache:
    """Activations of several sites for one text, as far as they were ever made. Any number of processes may share it."""

    def __init__(self, folder: str | Path, keys: Mapping[str, str], *, shard_tokens: int = SHARD_TOKENS) -> None:
        """`keys`: the `cache_key` of each site. All users of a folder give the same `shard_tokens`.

        Raises:
            ArgumentError: no site, or shards without tokens.
        """
        if not keys or shard_tokens < 1:
            raise ArgumentError(
                f"an activation cache of {len(keys)} sites in shards of {shard_tokens} tokens holds nothing. Give at "
                "least one of each."
            )
        self.keys = dict(keys)
        self.shard_tokens = shard_tokens
        self.folders = {site: Path(folder) / f"{site.replace(':', '.')}-{key[:16]}" for site, key in keys.items()}

    def chunks(self, make: Make, *, device: str | torch.device = "cpu") -> Chunks:
        """`{site: [n, width]}` in the order of the text, bfloat16 on `device`, a shard at a time, each as it is asked for.

        Stored shards are mapped into memory; a change of the tensors does not reach the file. Where a site lacks a
        shard, or has a damaged one, `make(skip)` gives all sites from the token that counts with number `skip` to the
        end of the text, as `harvest.activations_of` does; of what it gives only the missing is written and served.

        Warns (UserWarning) of each damaged shard.

        Raises:
            FileError: a shard that cannot be written (a full disk leaves the earlier ones, and no part) or read.
            FormatError: the sites have different numbers of tokens.
        """
        self._remove_stale_partials()
        source: Chunks | None = None
        at = 0  # the shard that `source` gives next
        for number in itertools.count():
            stored = {site: self._read(site, number) for site in self.keys}
            shard = {site: x for site, x in stored.items() if x is not None}
            if missing := [site for site in self.keys if site not in shard]:
                if source is None or number - at > NEARBY:
                    source, at = (
                        _regrouped(make(number * self.shard_tokens), list(self.keys), self.shard_tokens),
                        number,
                    )
                for _ in range(number - at):
                    next(source)
                made, at = next(source), number + 1
                shard |= {site: made[site] for site in missing}
            tokens = len(shard[next(iter(self.keys))])
            if any(len(x) != tokens for x in shard.values()):
                raise FormatError(
                    f"shard {number} has "
                    + ", ".join(f"{len(x)} tokens in {self.folders[site]}" for site, x in shard.items())
                    + ": they were not made from one text, though their keys say so. Delete these folders."
                )
            for site in missing:
                self._write(site, number, shard[site])
            if tokens:
                yield {site: send(shard[site], torch.device(device)) for site in self.keys}
            if tokens < self.shard_tokens:
                return

    def _path(self, site: str, number: int) -> Path:
        return self.folders[site] / f"shard-{number:05d}.safetensors"

    def _header(self, site: str, number: int, shape: Sequence[int], checksum: str) -> bytes:
        """The start of a shard's file, as the safetensors format has it. A file that starts otherwise is damaged."""
        place = f"{number}, of {self.shard_tokens} tokens"
        facts = {"key": self.keys[site], "shard": place, "crc32": checksum}
        tensor = {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, 2 * math.prod(shape)]}
        text = json.dumps({"__metadata__": facts, TENSOR: tensor}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _read(self, site: str, number: int) -> Tensor | None:
        """A stored shard, mapped; None where there is none, or, with a warning, where it is damaged."""
        path = self._path(site, number)
        try:
            with path.open("rb") as file, safe_open(path, framework="pt") as tensors:  # holds sizes against the file's
                checksum = (tensors.metadata() or {}).get("crc32", "")
                header = self._header(site, number, tensors.get_slice(TENSOR).get_shape(), checksum)
                if file.read(len(header)) != header:
                    raise SafetensorError("its header is not that of this shard")
                x = tensors.get_tensor(TENSOR)
            if _crc32(x) != checksum:
                raise SafetensorError("its checksum differs")
            return x
        except FileNotFoundError:
            return None
        except SafetensorError as problem:
            warnings.warn(f"{path} is damaged ({problem}); the language model makes it again.", stacklevel=3)
            return None
        except OSError as error:
            raise FileError(f"cannot read {path}: {error}. Check its permissions, or delete it.") from None

    def _write(self, site: str, number: int, x: Tensor) -> None:
        # Not save_file: its errors are not OSError, and the header is to be the one that a reader expects.
        with atomically(self._path(site, number)) as partial, partial.open("wb") as file:
            file.write(self._header(site, number, x.shape, _crc32(x)))
            file.write(_bytes(x))

    def _remove_stale_partials(self) -> None:
        for folder in self.folders.values():
            for partial in folder.glob(".shard-*"):
                with contextlib.suppress(OSError):  # its writer may finish at this moment
                    if time.time() - partial.stat().st_mtime > STALE_SECONDS:
                        partial.unlink()


def _regrouped(chunks: Chunks, sites: Sequence[str], size: int) -> Chunks:
    """The same rows, in bfloat16 on the CPU, `size` at a time; at the end fewer than that, maybe none, and then none."""
    rows = {site: torch.empty(0, 0, dtype=torch.bfloat16) for site in sites}
    filled = size  # a new set of rows is made when there is something for it
    for chunk in chunks:
        start, n = 0, len(chunk[sites[0]])
        while start < n:
            if filled == size:
                rows = {site: torch.empty(size, chunk[site].shape[1], dtype=torch.bfloat16) for site in sites}
                filled = 0
            count = min(n - start, size - filled)
            for site in sites:
                rows[site][filled : filled + count] = chunk[site][start : start + count]
            start, filled = start + count, filled + count
            if filled == size:
                yield rows
    while True:
        yield {site: x[: filled % size] for site, x in rows.items()}
        filled = 0


def _bytes(x: Tensor) -> Any:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    return x.contiguous().reshape(-1).view(torch.uint8).numpy()


def _crc32(x: Tensor) -> str:
    return f"{zlib.crc32(_bytes(x)):08x}"
