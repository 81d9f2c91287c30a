"""Models as users have them: loaded already, encoders, vision models, half precision, placed by accelerate, odd tokenizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import build_lm, byte_tokenizer, random_ids, tiny_sae
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

from saehook.config import TopK, TrainConfig
from saehook.corpus import Document
from saehook.edits import steer
from saehook.errors import ArgumentError
from saehook.harvest import Shuffled, activations_of
from saehook.hooked_model import HookedModel
from saehook.sites import KINDS
from saehook.tokenization import special_ids, windows
from saehook.trainer import Trainer
from saehook.training_run import train_saes
from saehook.where import roles, tokens

SITE = "layers.1.resid_post"
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CLS, SEP, PAD = 0, 1, 2
IDS = random_ids(6, seed=4)
TEXT = [Document(f"{i}.txt", f"story {i}: words and numbers 12345. " * 20) for i in range(6)]


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; `[CLS]` and `[SEP]`, and neither BOS nor EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"[CLS]": CLS, "[SEP]": SEP, "[PAD]": PAD} | {c: i + 3 for i, c in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", model_max_length=64
    )


def encoder(kind: str) -> Any:
    torch.manual_seed(1)
    options = {**SMALL, "vocab_size": 300, "max_position_embeddings": 64, "pad_token_id": PAD, "initializer_range": 0.3}
    if kind == "roberta":
        return RobertaForMaskedLM(RobertaConfig(**options)).eval()
    return (BertForMaskedLM if kind == "bert" else BertModel)(BertConfig(**options)).eval()


def vision() -> ViTForImageClassification:
    torch.manual_seed(1)
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8, initializer_range=0.3)).eval()


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "site": SITE,
            "activation": TopK(k=4),
            "d_sae": 64,
            "tokens": 512,
            "batch_tokens": 64,
            "buffer_tokens": 256,
            "calibration_tokens": 64,
            **changes,
        }
    )


# --- encoders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta", "bert without head"])
def test_an_encoder_is_read_and_edited_as_by_a_plain_hook(kind):
    lm = encoder(kind)
    model = HookedModel(lm, encoder_tokenizer())
    assert [site.name for site in model.sites()] == [f"layers.{i}.{kind}" for i in range(2) for kind in KINDS]
    hooked = model.attach({SITE: tiny_sae()})
    sae = hooked.saes[SITE]
    values = model.activations(IDS, "layers.*")
    for i in range(2):  # a post-norm block
        at = {kind: values[f"layers.{i}.{kind}"] for kind in KINDS}
        layer = lm.base_model.encoder.layer[i]
        with torch.no_grad():
            torch.testing.assert_close(
                layer.attention.output.LayerNorm(at["resid_pre"] + at["attn_out"]), at["resid_mid"]
            )
            torch.testing.assert_close(layer.output.LayerNorm(at["resid_mid"] + at["mlp_out"]), at["resid_post"])
            torch.testing.assert_close(layer.output.dense(at["mlp_act"]), at["mlp_out"])
    handle = lm.base_model.encoder.layer[1].register_forward_hook(
        lambda module, args, output: (
            (output[0] + 3 * sae.W_dec[5], *output[1:]) if isinstance(output, tuple) else output + 3 * sae.W_dec[5]
        )
    )
    with torch.no_grad():
        expected = lm(torch.tensor([IDS]))[0]
        handle.remove()
        torch.testing.assert_close(hooked(IDS, [steer(5, 3.0)])[0], expected, rtol=0, atol=3e-5)
        assert not torch.allclose(hooked(IDS)[0], expected, atol=1e-2)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_rows_of_an_encoder_do_not_depend_on_padding(kind):
    hooked = HookedModel(encoder(kind), encoder_tokenizer()).attach({SITE: tiny_sae()})
    other = random_ids(11, seed=5)
    with torch.no_grad():
        both = hooked([IDS, other], [steer(5, 3.0, where=tokens(0))])[0]
        alone = hooked(IDS, [steer(5, 3.0, where=tokens(0))])[0]
    torch.testing.assert_close(both[0, -len(IDS) :], alone[0], rtol=0, atol=3e-5)


def test_cls_and_sep_are_special_tokens_and_stand_around_each_window():
    tokenizer = encoder_tokenizer()
    assert special_ids(tokenizer) == (CLS, SEP, PAD)
    cut = windows(TEXT, tokenizer, 16)
    assert (cut.ids[:, 0] == CLS).all()
    assert (cut.ids[:, -1] == SEP).all()
    body = cut.ids[:, 1:-1].flatten().tolist()
    text = [i for document in TEXT for i in [SEP, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]]
    assert body == text[: len(body)]
    assert cut.rule == {"window": 16, "separator": "sep", "starts_with_bos": False}


def test_an_sae_is_trained_on_an_encoder(tmp_path):
    model = HookedModel(encoder("bert"), encoder_tokenizer())
    (trained,) = train_saes(model, [config()], TEXT, tmp_path, progress=False).saes
    hooked = model.attach(trained.sae)
    found = hooked.latents([CLS, *IDS, SEP])
    assert found.mask.tolist() == [False, *[True] * len(IDS), False]
    assert (found.acts > 0).sum(1).max() <= 4
    held_out = windows(TEXT, model.tokenizer, 16)
    for call in (
        lambda: model.loss(IDS),
        lambda: model.generate(IDS),
        lambda: train_saes(model, [config()], TEXT, tmp_path / "b", held_out=held_out, progress=False),
    ):
        with pytest.raises(ArgumentError, match="BertForMaskedLM predicts no next tokens"):
            call()


# --- vision ------------------------------------------------------------------------------------------------------------


def test_a_vision_model_is_read_edited_and_trained_on():
    lm = vision()
    model = HookedModel(lm, None)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    values = model.activations(images, "layers.*")
    assert values[SITE].shape == (3, 17, 32)
    for i in range(2):
        at = {kind: values[f"layers.{i}.{kind}"] for kind in KINDS}
        torch.testing.assert_close(at["resid_mid"], at["resid_pre"] + at["attn_out"])
        torch.testing.assert_close(at["resid_post"], at["resid_mid"] + at["mlp_out"])
    patches = activations_of(model, [SITE], iter(images))
    assert torch.equal(torch.cat([chunk[SITE] for chunk in patches]), values[SITE].flatten(0, 1))
    stream = (torch.randn(3, 32, 32) for _ in range(64))
    batches = Shuffled(activations_of(model, [SITE], stream), buffer_tokens=256, batch_tokens=64, seed=0)
    (sae,) = Trainer([config()], batches, d_in=32, progress=False).fit()
    hooked = model.attach(sae)
    with torch.no_grad():
        clean = model(images).logits
        moved = hooked(images, [steer(5, 30.0, where=tokens(0))]).logits
        moved_by = 30.0 * sae.W_dec[5] * (torch.arange(17) == 0)[:, None]

        def write(module: Any, args: Any, output: Any) -> Any:
            return output + moved_by

        handle = lm.vit.layers[1].register_forward_hook(write)
        expected = lm(images).logits
        handle.remove()
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(moved, clean, atol=1e-2)
    assert hooked.latents(images[0]).acts.shape == (17, 64)
    alone = hooked(images[0], [steer(5, 3.0)], splice=True).logits
    torch.testing.assert_close(hooked(images, [steer(5, 3.0)], splice=True).logits[:1], alone, rtol=0, atol=1e-4)
    for wrong in ("a picture", IDS, torch.zeros(3, 32), torch.zeros(3, 32, 32, dtype=torch.int64)):
        with pytest.raises(ArgumentError, match=r"takes images, and got a .*pixel_values"):
            model(wrong)


def test_a_text_model_still_needs_its_tokenizer():
    with pytest.raises(ArgumentError, match="needs its tokenizer"):
        HookedModel(build_lm("llama"), None)


# --- loading -----------------------------------------------------------------------------------------------------------


def test_what_a_folder_holds_is_loaded_as_what_it_is(tmp_path):
    encoder("bert").save_pretrained(tmp_path / "bert")
    encoder_tokenizer().save_pretrained(tmp_path / "bert")
    vision().save_pretrained(tmp_path / "vit")
    base = build_lm("llama").model
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    build_lm("gpt2").save_pretrained(tmp_path / "gpt2")
    kinds = {
        "bert": "BertForMaskedLM",
        "vit": "ViTForImageClassification",
        "base": "LlamaModel",
        "gpt2": "GPT2LMHeadModel",
    }
    for folder, kind in kinds.items():
        model = HookedModel.from_pretrained(tmp_path / folder, byte_tokenizer() if folder == "gpt2" else None)
        assert type(model.lm).__name__ == kind
        assert model.sites("layers.1.*")
    bert = HookedModel.from_pretrained(tmp_path / "bert")
    assert torch.equal(bert(IDS)[0], encoder("bert")(torch.tensor([IDS]))[0])


def test_a_model_without_head_has_the_same_sites():
    model = HookedModel(LlamaModel(build_lm("llama").config), byte_tokenizer())
    assert [s.path for s in model.sites("layers.2.{resid_post,attn_z}")] == ["layers.2", "layers.2.self_attn.o_proj"]
    hooked = model.attach({SITE: tiny_sae()})
    assert hooked(IDS, [steer(5, 3.0)])[0].shape == (1, len(IDS), 32)
    with pytest.raises(ArgumentError, match="LlamaModel predicts no next tokens"):
        hooked.generate(IDS)


def test_half_precision_is_read_edited_and_trained_on_in_its_dtype(tmp_path):
    lm = build_lm("llama", dtype=torch.bfloat16)
    model = HookedModel(lm, byte_tokenizer())
    hooked = model.attach({SITE: tiny_sae()})
    assert model.activations(IDS, SITE)[SITE].dtype == torch.bfloat16
    with torch.no_grad():
        moved, clean = hooked(IDS, [steer(5, 3.0)]).logits, model(IDS).logits
    assert moved.dtype == clean.dtype == torch.bfloat16
    assert not torch.equal(moved, clean)
    assert torch.equal(hooked(IDS).logits, clean)
    assert hooked.generate(IDS, [steer(5, 3.0)], max_new_tokens=3).new_ids.numel() == 3
    (trained,) = train_saes(model, [config()], TEXT, tmp_path, progress=False).saes
    assert trained.sae.dtype == torch.float32


def test_device_map_auto_with_layers_on_disk(tmp_path):
    build_lm("llama").save_pretrained(tmp_path / "lm")
    small = {"cpu": "130KB"}  # the model has 190
    model = HookedModel.from_pretrained(
        tmp_path / "lm", byte_tokenizer(), device_map="auto", max_memory=small, offload_folder=tmp_path / "disk"
    )
    assert set(model.lm.hf_device_map.values()) == {"cpu", "disk"}
    place = model.sites(SITE)[0].path
    assert next(model.lm.get_submodule(place).parameters()).device.type == "meta", "its weights are on the disk"
    assert model.device_at(place).type == "cpu"
    hooked = model.attach({SITE: tiny_sae()})
    plain = HookedModel(build_lm("llama"), byte_tokenizer()).attach({SITE: tiny_sae()})
    with torch.no_grad():
        for edits in ([], [steer(5, 3.0)]):
            assert torch.equal(hooked(IDS, edits).logits, plain(IDS, edits).logits)
    assert torch.equal(model.activations(IDS, SITE)[SITE], plain.model.activations(IDS, SITE)[SITE])
    chunk = next(activations_of(model, [SITE], iter([torch.tensor(IDS)])))
    assert chunk[SITE].shape == (len(IDS), 32)


# --- tokenizers and chats ----------------------------------------------------------------------------------------------


def test_a_tokenizer_without_bos(tmp_path):
    tokenizer = byte_tokenizer(adds_bos=False)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    model = HookedModel(build_lm("gpt2"), bare)
    assert bare.bos_token_id is None
    assert special_ids(bare) == (1,)
    cut = windows(TEXT, bare, 16)
    assert cut.rule == {"window": 16, "separator": "eos", "starts_with_bos": False}
    (trained,) = train_saes(model, [config()], TEXT, tmp_path, held_out=cut, progress=False).saes
    hooked = model.attach(trained.sae)
    rows = hooked.generate(["one", "another"], [steer(5, 1.0)], max_new_tokens=3)
    assert torch.equal(rows[0].ids, hooked.generate("one", [steer(5, 1.0)], max_new_tokens=3).ids)
    assert hooked.latents("one").mask.all()


def test_a_chat_model_is_edited_by_role():
    tokenizer = byte_tokenizer(adds_bos=False)
    chat = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template="{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    hooked = HookedModel(build_lm("llama"), chat).attach({SITE: tiny_sae()})
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "go"},
    ]
    report = hooked.report(talk, [steer(5, 3.0, where=roles("user"))])
    whole = hooked.report(talk, [steer(5, 3.0)])
    assert 0 < report.edits[0].tokens < whole.edits[0].tokens
    assert hooked.generate(talk[:1], [steer(5, 3.0)], max_new_tokens=3).new_ids.numel() == 3
