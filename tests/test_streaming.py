"""Streaming gives what `generate` gives, token by token, and can be ended at any token."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from app_fixtures import SITES, tiny
from transformers import StoppingCriteria

from saehook import ablate, steer, tokens
from saehook.errors import ArgumentError, ContextLengthError, LatentError, NoEffectWarning
from saehook.streaming import Streamed, stream

PROMPT = "hello, world"
EDITS = (steer(3, 4.0, site=SITES[0]), ablate([1, 2], site=SITES[1]))
OPPOSITE = (steer(3, -4.0, site=SITES[0]),)
SAMPLED = {"do_sample": True, "temperature": 0.9, "max_new_tokens": 24, "seed": 5}
LONG = {"do_sample": False, "max_new_tokens": 450}


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "saehook-stream"]


def last(parts) -> Streamed:
    *_, final = parts
    return final


@pytest.mark.parametrize("program", [{}, {"edits": EDITS}, {"edits": EDITS, "error": "drop"}, {"splice": True}])
def test_stream_equals_generate(program):
    parts = list(stream(tiny(), PROMPT, **program, **SAMPLED))
    expected = tiny().generate(PROMPT, **program, **SAMPLED)
    final = parts[-1]
    assert final.generation is not None
    assert torch.equal(final.generation.ids, expected.ids)
    assert final.generation.report == expected.report
    assert final.text == final.generation.text == expected.text
    assert final.new_ids == tuple(expected.new_ids.tolist())
    assert len(parts) > 5, "the text should come in pieces"
    assert all(part.generation is None for part in parts[:-1])
    for earlier, later in zip(parts, parts[1:], strict=False):
        assert later.new_ids[: len(earlier.new_ids)] == earlier.new_ids
        assert later.text.startswith(earlier.text)


def test_clean_model_streams():
    parts = list(stream(tiny().model, PROMPT, **SAMPLED))
    assert parts[-1].text == tiny().generate(PROMPT, **SAMPLED).text


def test_a_character_is_held_back_until_its_bytes_are_there():
    ids = tiny().tokenizer("é")["input_ids"]
    assert len(ids) == 2
    force = iter([ids[0], ids[1]])

    def processor(input_ids, scores):
        scores = torch.full_like(scores, -1e9)
        scores[:, next(force)] = 0
        time.sleep(0.05)  # so that the reader sees the two tokens one by one
        return scores

    parts = list(stream(tiny(), PROMPT, max_new_tokens=2, logits_processor=[processor]))
    assert parts[0].text == ""
    assert len(parts[0].new_ids) == 1
    assert parts[-1].text == "é"


def test_closing_ends_the_model_at_once():
    parts = stream(tiny(), PROMPT, edits=EDITS, **LONG)
    next(parts)
    began = time.perf_counter()
    parts.close()
    assert time.perf_counter() - began < 1.0
    assert not workers()
    again = last(stream(tiny(), PROMPT, **SAMPLED))
    assert again.text == tiny().generate(PROMPT, **SAMPLED).text, "an edit of the ended run is left over"


def test_stop_keeps_what_is_there():
    stop = threading.Event()
    seen = []
    for part in stream(tiny(), PROMPT, edits=EDITS, stop=stop, **LONG):
        seen.append(part)
        stop.set()
    final = seen[-1]
    assert final.generation is not None
    assert 1 <= len(final.new_ids) < 450
    assert final.generation.report.edits[0].tokens >= len(PROMPT)
    assert not workers()


def test_a_stream_that_waits_for_the_model_can_be_ended():
    stop = threading.Event()
    first = stream(tiny(), PROMPT, **LONG)
    next(first)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: list(stream(tiny(), PROMPT, stop=stop, **LONG)))
        stop.set()
        assert waiting.result(timeout=5) == []
    first.close()
    assert not workers()


def test_two_opposite_streams_equal_their_solo_outputs():
    programs = [EDITS, OPPOSITE, ()] * 2
    solo = [tiny().generate(PROMPT, edits=edits, **SAMPLED).text for edits in programs]
    assert len(set(solo)) == 3
    with ThreadPoolExecutor(len(programs)) as pool:
        runs = [pool.submit(lambda e=e: last(stream(tiny(), PROMPT, edits=e, **SAMPLED)).text) for e in programs]
        assert [run.result(timeout=30) for run in runs] == solo


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"edits": [steer(96, 1.0, site=SITES[0])]}, LatentError, r"latent 96 is outside 0\.\.95"),
        ({"edits": [ablate(1, site=SITES[0], where=tokens(40))]}, ArgumentError, "token 40 is outside the 12 tokens"),
        ({"max_new_tokens": 1000}, ContextLengthError, "12 prompt tokens and 1000 new ones"),
        ({"streamer": object()}, ArgumentError, "its own streamer"),
    ],
)
def test_errors_are_raised_in_the_reader(arguments, error, message):
    with pytest.raises(error, match=message):
        list(stream(tiny(), PROMPT, **arguments))
    assert not workers()


def test_several_rows_are_refused():
    with pytest.raises(ArgumentError, match="one row"):
        next(iter(stream(tiny(), ["a", "b"])))


def test_an_exception_in_the_model_frees_it():
    class Broken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise OSError("broken in the worker")

    with pytest.raises(OSError, match="broken in the worker"):
        list(stream(tiny(), PROMPT, edits=EDITS, stopping_criteria=[Broken()]))
    assert not workers()
    assert last(stream(tiny(), PROMPT, **SAMPLED)).text == tiny().generate(PROMPT, **SAMPLED).text


def test_an_edit_without_effect_is_noted_not_warned():
    edits = [ablate(95, site=SITES[0]), steer(3, 0.0, site=SITES[0])]
    final = last(stream(tiny(), PROMPT, edits=edits, **SAMPLED))
    assert final.generation is not None
    assert any("edit 2" in note for note in final.generation.report.notes())
    with pytest.warns(NoEffectWarning):
        tiny().generate(PROMPT, edits=edits, **SAMPLED)
