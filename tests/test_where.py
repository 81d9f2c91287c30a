"""Which tokens a regular expression, a role or BOS means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import BOS, EOS, PAD, build_lm, byte_tokenizer, tiny_sae
from transformers import AutoTokenizer

import saehook
from saehook.edits import steer
from saehook.errors import ArgumentError, NoEffectWarning
from saehook.hooked_model import HookedModel
from saehook.interventions import Program
from saehook.positions import Positions
from saehook.row_text import RowText, spans
from saehook.where import Where, matching, roles

SITE = "layers.1.resid_post"
SPECIAL = (BOS, EOS, PAD)
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if not loop.last or add_generation_prompt %}|{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi ho"}]


def chat_tokenizer() -> Any:
    tokenizer = byte_tokenizer(adds_bos=False)
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def bpe():
    return AutoTokenizer.from_pretrained(saehook.bundled("lm"))


@pytest.mark.parametrize(
    "text", ["def load(path):\n    return 1", "Müßig über Öl – naïve", "a  b\t\tc", "\U0001f600\U0001f600!"]
)
def test_the_spans_of_tokens_are_those_of_the_tokenizer(bpe, text):
    encoded = bpe(text, return_offsets_mapping=True, add_special_tokens=False)
    ids = encoded["input_ids"]
    decode = lambda ids: bpe.decode(ids, clean_up_tokenization_spaces=False)  # noqa: E731
    assert decode(ids) == text
    found = spans(ids, text, decode)
    assert "".join(text[a:b] for a, b in dict.fromkeys(found)) == text
    for (start, end), (a, b) in zip(found, encoded["offset_mapping"], strict=True):
        assert start <= a
        assert b <= end


def matched(pattern: str, text: str, tokenizer: Any, cuts: list[int]) -> str:
    """The characters of `text` whose bytes are selected, by a run that is cut into passes; the first 10 are the input."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    prompt = ids[:, :10]
    run = Positions(prompt, None, SPECIAL, decode=tokenizer.decode)
    run.check(matching(pattern))
    chosen, past = "", 0
    for end in [*cuts, ids.shape[1]]:
        view = run.view(past, ids[:, past:end])
        selected = view.select(matching(pattern), torch.ones(1, end - past, dtype=torch.bool))[0]
        chosen += "".join(c if s else "." for c, s in zip(text[past:end], selected.tolist(), strict=True))
        past = end
    return chosen


@pytest.mark.parametrize("cuts", [[], [10], [10, 11, 12, 13, 14, 15, 16, 17, 18, 19], [4, 10, 15]])
def test_a_generated_token_sees_the_text_up_to_itself_however_the_run_is_cut(cuts):
    tokenizer = byte_tokenizer(adds_bos=False)
    text = "ab ab1 abxab2 abab3"
    assert matched("ab", text, tokenizer, cuts) == "ab.ab..ab..b...b.b."
    assert matched(r"ab\d", text, tokenizer, cuts) == "...ab1......2.....3", (
        "of what is generated, only the end is known"
    )
    assert matched(r"^.", text, tokenizer, cuts) == "a" + "." * 18
    assert matched("zz", text, tokenizer, cuts) == "." * 19


def test_a_pattern_means_the_same_with_and_without_cache_and_in_a_batch():
    hooked = HookedModel(build_lm("llama"), byte_tokenizer()).attach(tiny_sae(site=SITE))
    edits = [steer(3, 4.0, where=matching("[a-m]+"))]
    prompts = ["hello world", "be"]
    alone = [hooked.generate(p, edits, max_new_tokens=8) for p in prompts]
    uncached = [hooked.generate(p, edits, max_new_tokens=8, use_cache=False) for p in prompts]
    batch = hooked.generate(prompts, edits, max_new_tokens=8)
    for one, two, three in zip(alone, uncached, batch, strict=True):
        assert one.ids.tolist() == two.ids.tolist() == three.ids.tolist()
        assert one.report.edits[0].tokens == two.report.edits[0].tokens
    assert alone[0].report.edits[0].tokens >= 5


def test_text_that_cannot_be_known_is_an_error():
    hooked = HookedModel(build_lm("llama"), byte_tokenizer()).attach(tiny_sae(site=SITE))
    with pytest.raises(ArgumentError, match="beams change places"):
        hooked.generate("hello", [steer(3, 4.0, where=matching("l"))], num_beams=2, max_new_tokens=2)
    inside = Where(pattern="l", generation=False)
    assert (
        hooked.generate("hello", [steer(3, 4.0, where=inside)], num_beams=2, max_new_tokens=2).report.edits[0].tokens
        == 4
    )
    with pytest.raises(ArgumentError, match=r"takes more than .* s on \d+ characters"):
        RowText(torch.tensor([[1]]), torch.tensor([[True]]), lambda ids: "a" * 64 + "b").prompt_mask("(a|a)+$")
    with pytest.raises(ArgumentError, match="is no regular expression"):
        matching("(")


def test_roles_are_those_of_the_chat_template():
    tokenizer = chat_tokenizer()
    hooked = HookedModel(build_lm("llama"), tokenizer).attach(tiny_sae(site=SITE))
    text = "[system]be|[user]hi ho|[assistant]"
    clean = hooked.latents(text)
    with torch.no_grad():
        for names, begin, end in ((("system",), 0, 10), (("user",), 10, 22), (("assistant",), 22, 34)):
            by_role = hooked(CHAT, [steer(3, 4.0, where=roles(*names))]).logits
            by_place = hooked(text, [steer(3, 4.0, where=Where(positions=(begin, end)))]).logits
            assert torch.equal(by_role, by_place)
    assert len(clean.ids) == len(text)
    opened = [*CHAT, {"role": "assistant", "content": "so"}]
    result = hooked.generate([CHAT, opened], [steer(3, 4.0, where=roles("assistant"))], max_new_tokens=3)
    assert result[0].report.edits[0].tokens == 12 + 14 + 2 * 2
    assert tokenizer.decode(result[1].ids[:-3]) == text + "so"


def test_roles_need_a_conversation_and_a_template():
    hooked = HookedModel(build_lm("llama"), byte_tokenizer()).attach(tiny_sae(site=SITE))
    with pytest.raises(ArgumentError, match="no chat template"):
        hooked(CHAT)
    with pytest.raises(ArgumentError, match="whose the tokens of row 0 are is not known"):
        hooked("hello", [steer(3, 1.0, where=roles("user"))])
    chat = HookedModel(build_lm("llama"), chat_tokenizer()).attach(tiny_sae(site=SITE))
    with pytest.raises(ArgumentError, match="is no message"):
        chat([{"role": "user"}])
    with pytest.warns(NoEffectWarning, match="selected no token"):
        chat(CHAT, [steer(3, 1.0, where=roles("tool"))])


def test_bos_and_no_other_special_token():
    hooked = HookedModel(build_lm("llama"), byte_tokenizer()).attach(tiny_sae(site=SITE))
    ids = [BOS, 40, EOS, 41]
    counts = {
        "bos": Where(bos=True),
        "special": Where(special=True),
        "none": Where(),
        "only": Where(bos=True, token_ids=(BOS,)),
    }
    found = {}
    for name, where in counts.items():
        program = Program(edits=[steer(3, 1.0, where=where)])
        found[name] = hooked.generate(ids, program, max_new_tokens=1).report.edits[0].tokens
    assert found == {"bos": 3, "special": 4, "none": 2, "only": 1}
