"""What a model does with text, with or without SAEs attached: forward pass, loss, generation. No nnsight here."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saehook.edit_plan import EditPlan
from saehook.errors import ArgumentError, ContextLengthError, NoEffectWarning
from saehook.full_report import beside, check_kind, full_report
from saehook.interventions import AnyEdit, Program
from saehook.kernels.device import send
from saehook.model_input import image_batch, predicts_next_tokens, takes_text
from saehook.positions import UNKNOWN_ID, Positions
from saehook.results import Generation, Report
from saehook.sampling_noise import RandomState, RowNoise, with_noise
from saehook.tokenization import Batch, special_ids, to_batch

DEFAULT_NEW_TOKENS = 20
_OF_ONE_RUN = ("streamer", "stopping_criteria", "max_time")
"""Arguments of Hugging Face's `generate` that belong to the run that the caller sees."""


class Runs:
    """Shared by the clean model and the one with SAEs attached; they say in `_call` how something runs."""

    lm: Any
    """The Hugging Face model, unchanged."""
    tokenizer: Any
    """Its tokenizer."""
    _vocab_size: int

    def _call(
        self,
        call: Callable[[], Any],
        program: Program,
        positions: Positions,
        watch: Callable[[EditPlan], None] | None = None,
    ) -> tuple[Any, Report]:
        """`call()` with the program in force, and the report of what it did; `watch` gets the plan before it runs."""
        raise NotImplementedError

    @property
    def context(self) -> int | None:
        """Most tokens that the model takes, or None where its config does not say."""
        config = self.lm.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        """Where the model takes its input.

        Raises:
            ArgumentError: the model has no weights.
        """
        if self.lm.device.type != "meta":
            return self.lm.device
        if getattr(self.lm, "hf_device_map", None):  # offloaded: accelerate fetches the weights when they are needed
            hooks = [getattr(module, "_hf_hook", None) for module in self.lm.modules()]
            places = [getattr(hook, "execution_device", None) for hook in hooks]
            return torch.device(next(place for place in places if place is not None))
        raise ArgumentError(
            "the model's weights are on the device 'meta', which holds sizes and no numbers. Load them: "
            "HookedModel.from_pretrained(path), with device_map='auto' where they do not fit."
        )

    def device_at(self, path: str) -> torch.device:
        """Where the module of that path computes, of a model that is spread over devices (`device_map`)."""
        if getattr(self.lm, "hf_device_map", None):
            for end in range(len(parts := path.split(".")), 0, -1):
                module = self.lm.get_submodule(".".join(parts[:end]))
                place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
                if place is not None:
                    return torch.device(place)
        return self.device

    def _batch(self, x: Any, attention_mask: Tensor | None = None) -> Batch:
        if not takes_text(self.lm):
            return image_batch(self.lm, x, self.device)
        batch = to_batch(x, self.tokenizer, vocab_size=self._vocab_size, attention_mask=attention_mask)
        longest = int(batch.attention_mask.sum(1).max())
        if self.context is not None and longest > self.context:
            raise ContextLengthError(
                f"the input has {longest} tokens, and the model takes {self.context}. Shorten it or split it into windows."
            )
        return batch

    def _arguments(self, batch: Batch, *, masked: bool) -> dict[str, Tensor]:
        """Arguments of the model's forward: the mask and positions only where something is padded (or `masked`)."""
        if batch.inputs is not None:
            return dict(batch.inputs)
        arguments = {"input_ids": send(batch.ids, self.device)}
        if batch.padded or masked:
            mask = send(batch.attention_mask, self.device)
            arguments["attention_mask"] = mask
            takes_positions = "position_ids" in inspect.signature(self.lm.forward).parameters
            if batch.padded and takes_positions and not _counts_from_ids(self.lm):
                arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        return arguments

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def check_causal(self, what: str) -> None:
        """Raises ArgumentError for a model that predicts no next tokens, and so has no such thing as `what`."""
        if not predicts_next_tokens(self.lm):
            raise ArgumentError(
                f"{type(self.lm).__name__} predicts no next tokens, so it has no {what}. It can be called, read, edited and "
                "trained on; for the rest load one with a causal head: AutoModelForCausalLM."
            )

    def _positions(self, batch: Batch, program: Program, expansion: int = 1, *, reorders: bool = False) -> Positions:
        positions = Positions(
            send(batch.ids, self.device),
            send(batch.attention_mask, self.device),
            special_ids(self.tokenizer),
            expansion,
            bos=getattr(self.tokenizer, "bos_token_id", None),
            roles=batch.roles,
            decode=self._decode if self.tokenizer is not None else None,
            reorders=reorders,
        )
        for edit in program.edits:
            positions.check_edit(edit)  # what a row lacks is an error before anything runs
        return positions

    def __call__(
        self,
        x: Any,
        edits: Program | AnyEdit | Iterable[AnyEdit] = (),
        splice: bool = False,
        error: str | None = None,
        attention_mask: Tensor | None = None,
        **forward: Any,
    ) -> Any:
        """One forward pass: the Hugging Face model's own output object, in the caller's grad mode.

        Args:
            x: text, a list of ids, a 1-D tensor, a conversation (`[{"role": ..., "content": ...}, ...]`, by the
                tokenizer's chat template); or a list of those, or a 2-D tensor. Rows are padded on the left.
            edits: edits, or a `Program`; see `saehook.interventions`. Each names its site where several SAEs are attached.
            splice: put every attached SAE's reconstruction in, edits included.
            error: `keep` (default) or `drop` the reconstruction error on edited tokens.
            attention_mask: for a 2-D `x` that is padded already.
            forward: handed to the model's forward. `x` is what stands behind the tokens of `past_key_values=cache`.

        Raises:
            ArgumentError: edits of rows into which several texts are packed, or of tokens that a given cache holds.
        """
        program = Program.of(edits, splice, error)
        if doubled := {"input_ids", "inputs_embeds"} & forward.keys():
            raise ArgumentError(f"the input is given twice, as x and as {', '.join(doubled)}. Give it once, as x.")
        batch = self._batch(x, attention_mask)
        if program.edits or program.splice:
            _check_unpacked(batch, forward.get("position_ids"))
        cached = _cached_tokens(forward)
        arguments = self._arguments(batch, masked=attention_mask is not None and not cached) | forward
        batch = _behind(batch, cached)
        self._check_cache(batch, program, forward)
        output, report = self._call(lambda: self.lm(**arguments), program, self._positions(batch, program))
        _warn_of(report)
        return output

    def loss(
        self, x: Any, edits: Program | AnyEdit | Iterable[AnyEdit] = (), splice: bool = False, error: str | None = None
    ) -> float:
        """Mean cross-entropy in nats over every next token of every row, as Hugging Face's `labels=` gives it."""
        self.check_causal("loss over them")
        program = Program.of(edits, splice, error)
        batch = self._batch(x)
        mask = batch.attention_mask
        labels = torch.where(mask.bool(), batch.ids, -100)
        # The first token of a padded row has no predecessor: padding must not be asked to predict it.
        labels[mask.cumsum(-1) <= 1] = -100
        if not (labels != -100).any():
            raise ArgumentError("a single token predicts nothing, so there is no loss. Give at least two tokens.")
        arguments = self._arguments(batch, masked=False)
        with torch.no_grad():
            output, report = self._call(
                lambda: self.lm(**arguments, labels=labels.to(self.device), use_cache=False),
                program,
                self._positions(batch, program),
            )
        _warn_of(report)
        return float(output.loss)

    def report(
        self, x: Any, edits: Program | AnyEdit | Iterable[AnyEdit] = (), splice: bool = False, error: str | None = None
    ) -> Report:
        """What edits do to a text: the full report of a forward pass (`saehook.full_report`). Arguments as for a call."""
        program = Program.of(edits, splice, error)
        batch = self._batch(x)
        report = full_report(self, program, batch, batch.ids, [0] * len(batch.ids))
        _warn_of(report)
        return report

    def generate(
        self,
        x: Any,
        edits: Program | AnyEdit | Iterable[AnyEdit] = (),
        splice: bool = False,
        error: str | None = None,
        seed: int | None = None,
        report: str | None = None,
        **hf: Any,
    ) -> Any:
        """Continue a text: a `Generation`, or a list of them for a batch or `num_return_sequences` > 1.

        Sampled only if `hf` or the model's generation config say so. With `seed` each row is drawn with noise of its own
        (`saehook.sampling_noise`): row 0 of a batch as alone; the caller's random state is left alone. `hf` goes to the
        model's `generate` (`max_new_tokens`, `do_sample`, `temperature`, `num_beams`, `streamer`, ...).

        With `report="full"` the text is the same, and its report also says what latents did, the KL of the next tokens, and
        where the text leaves the unedited one (`saehook.full_report`); it takes a generation without the edits and two forward
        passes more.

        Raises:
            ArgumentError: a seed or a number of new tokens that is no whole number; rows that are padded or packed already;
                edits of tokens that a given `past_key_values` holds, which begins the prompt; an unknown report, or a full one
                of a run that begins with a KV cache.
            ContextLengthError: prompt and new tokens together are more than the model takes.
        """
        result = self.generate_quietly(x, Program.of(edits, splice, error), seed, report, **hf)
        _warn_of((result if isinstance(result, Generation) else result[0]).report)
        return result

    @staticmethod
    def _check_trace(arguments: dict[str, Any]) -> None:
        """Raises ArgumentError for what a trace cannot do and Hugging Face models take without a word."""
        if ours := sorted({"edits", "splice", "error", "report"} & arguments.keys()):
            raise ArgumentError(
                f"a trace takes no {', '.join(ours)}: its block writes into latents and error itself. Give it to a call: "
                "hooked(text, edits=...), hooked.generate(text, edits=...)."
            )

    def _generation_settings(self, hf: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model's `generate`, with a number of new tokens and a padding token."""
        hf = dict(hf)
        settings = hf.get("generation_config") or self.lm.generation_config
        if "max_new_tokens" not in hf and "max_length" not in hf and "generation_config" not in hf:
            hf["max_new_tokens"] = getattr(self.lm.generation_config, "max_new_tokens", None) or DEFAULT_NEW_TOKENS
        if "pad_token_id" not in hf and settings.pad_token_id is None:
            hf["pad_token_id"] = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        return hf

    def generate_quietly(self, x: Any, program: Program, seed: int | None, report: str | None = None, **hf: Any) -> Any:
        """`generate` without warnings: what edits did not do stands in the report only."""
        check_kind(report)
        self.check_causal("continuation of a text")
        if report is not None and hf.get("past_key_values") is not None:
            raise ArgumentError(
                "report='full' gives the text to the model again from its start, and this run begins with past_key_values. "
                "Leave one of them out."
            )
        batch = self._batch(x)
        self._check_unpadded(x, hf)
        self._check_cache(batch, program, hf)
        random = RandomState(seed, self.device)
        output, found = self._generate(batch, program, random, hf)
        sequences = _sequences(output)
        rows = self._generations(batch, sequences, hf, [found] * len(sequences))
        if report is not None:
            given = [max(0, len(row.new_ids) - 1) for row in rows]  # the last new token went into no pass
            found = full_report(self, program, batch, sequences[:, :-1], given, found)
            free = {name: value for name, value in hf.items() if name not in _OF_ONE_RUN}
            output, unedited = self._generate(batch, Program(), random, free)
            sequences = _sequences(output)
            found = beside(found, rows, self._generations(batch, sequences, hf, [unedited] * len(sequences)))
            rows = [replace(row, report=found) for row in rows]
        return rows[0] if batch.single and len(rows) == 1 else rows

    def _generate(
        self, batch: Batch, program: Program, random: RandomState, hf: dict[str, Any], *, same_noise: bool = False
    ) -> tuple[Any, Report]:
        """What the model's `generate` gives for a batch, and the report; fills in what `hf` leaves open. `same_noise`: all
        rows of a seeded run draw as the first one."""
        hf.update(self._generation_settings(hf))
        settings = hf.get("generation_config") or self.lm.generation_config
        length = batch.ids.shape[1]
        if hf.get("max_new_tokens") is not None:
            new = hf["max_new_tokens"]
        elif hf.get("max_length") is not None:
            new = hf["max_length"] - length
        else:
            new = settings.max_new_tokens or (settings.max_length or 0) - length
        if not isinstance(new, int) or new < 1:
            raise ArgumentError(
                f"{new!r} new tokens are asked for after a prompt of {length}; a whole number of at least 1 is expected."
            )
        if self.context is not None and length + new > self.context:
            raise ContextLengthError(
                f"{length} prompt tokens and {new} new ones are more than the {self.context} tokens the model takes. "
                "Shorten the prompt, or lower max_new_tokens."
            )
        beams = hf.get("num_beams") or settings.num_beams or 1
        returned = hf.get("num_return_sequences") or settings.num_return_sequences or 1
        ids, mask = send(batch.ids, self.device), send(batch.attention_mask, self.device)
        arguments = hf
        if random.seed is not None and beams == 1:
            noise = RowNoise(random.seed, length, returned, same_noise)
            arguments = with_noise(hf, noise, self.lm.generation_config)

        def call() -> Any:  # runs under the model's lock, so no other run draws from this random state
            with random.open():
                return self.lm.generate(input_ids=ids, attention_mask=mask, **arguments)

        positions = self._positions(batch, program, beams if beams > 1 else returned, reorders=beams > 1)
        with torch.no_grad():
            return self._call(call, program, positions)

    def _generations(
        self, batch: Batch, sequences: Tensor, hf: dict[str, Any], reports: Sequence[Report]
    ) -> list[Generation]:
        """The rows that `_generate` gave, [rows, length + new] on the CPU, each without its padding."""
        settings = hf.get("generation_config") or self.lm.generation_config
        eos = hf.get("eos_token_id", settings.eos_token_id)
        returned = len(sequences) // len(batch.ids)
        return [
            self._generation(row, batch.attention_mask[i // returned], batch.ids.shape[1], eos, report)
            for i, (row, report) in enumerate(zip(sequences, reports, strict=True))
        ]

    def _check_unpadded(self, x: Any, hf: dict[str, Any]) -> None:
        """Raises ArgumentError where rows to be continued are padded or packed by the caller."""
        if given := {"input_ids", "inputs_embeds", "attention_mask", "position_ids"} & hf.keys():
            raise ArgumentError(
                f"generate() got {', '.join(sorted(given))}, which say how rows are padded or packed; it pads rows itself. Give "
                "a list of rows, each one text without padding."
            )
        pad = self.tokenizer.pad_token_id
        if (
            isinstance(x, Tensor)
            and x.ndim == 2
            and pad not in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        ):
            for row, ids in enumerate(x):
                if pad in (int(ids[0]), int(ids[-1])):
                    raise ArgumentError(
                        f"row {row} begins or ends with the padding token {pad}, which would be read as text. Give a list of "
                        "rows without padding."
                    )

    def _check_cache(self, batch: Batch, program: Program, arguments: dict[str, Any]) -> None:
        """Raises ArgumentError where edits mean tokens that a KV cache given with the arguments holds, or it holds them all."""
        cached, length = _cached_tokens(arguments), batch.ids.shape[1]
        if cached >= length:
            raise ArgumentError(
                f"past_key_values holds {cached} tokens, and the prompt has {length}. Give the whole prompt, the cached tokens "
                "included, and at least one more."
            )
        if cached:
            self._positions(batch, program).check_cached(program, cached)

    def _generation(self, row: Tensor, mask: Tensor, length: int, eos: Any, report: Report) -> Generation:
        """One row without the padding on its left and behind its EOS."""
        new = row[length:]
        ends = torch.isin(new, torch.tensor(eos if isinstance(eos, list) else [eos])) if eos is not None else None
        if ends is not None and ends.any():
            new = new[: int(ends.nonzero()[0]) + 1]
        ids = torch.cat([row[:length][mask.bool()], new])
        return Generation(ids, new, self.tokenizer.decode(new.tolist(), skip_special_tokens=True), report)


def _cached_tokens(arguments: dict[str, Any]) -> int:
    """Positions of the KV cache among the arguments of a model, 0 without one."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _behind(batch: Batch, cached: int) -> Batch:
    """The rows with that many tokens before them whose ids are not known.

    Raises:
        ArgumentError: the rows are padded, so that they do not begin where the cache ends.
    """
    if not cached:
        return batch
    if batch.padded:
        raise ArgumentError("rows behind a KV cache are padded, so they would not follow it. Give rows of one length.")
    ids = torch.nn.functional.pad(batch.ids, (cached, 0), value=UNKNOWN_ID)
    return Batch(ids, torch.ones_like(ids), batch.single)


def _check_unpacked(batch: Batch, position_ids: Tensor | None) -> None:
    """Raises ArgumentError where positions begin again within a row, as of several texts one behind the other."""
    if position_ids is None:
        return
    both = (batch.attention_mask[:, 1:] * batch.attention_mask[:, :-1]).bool()
    if (both & (position_ids.cpu().expand_as(batch.ids).diff() < 1)).any():
        raise ArgumentError(
            "position_ids begin again within a row: several texts packed into one. Edits count and remember tokens by row, so "
            "give each text as a row of its own."
        )


def _counts_from_ids(lm: Any) -> bool:
    """Whether a model counts positions from the ids that are no padding, from an offset of its own (RoBERTa)."""
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in lm.modules())


def _sequences(output: Any) -> Tensor:
    """The rows of ids that `generate` gave, on the CPU."""
    return (output if isinstance(output, Tensor) else output.sequences).cpu()


def _warn_of(report: Report) -> None:
    for note in report.notes():
        warnings.warn(note, NoEffectWarning, stacklevel=3)


@contextlib.contextmanager
def frozen(lm: nn.Module) -> Iterator[None]:
    """No gradients for the model's own parameters: nothing is recorded below the site then."""
    learning = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
