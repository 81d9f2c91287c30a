"""Latents found by token and by text, compared with the definitions."""

from __future__ import annotations

import pytest
import torch
from app_fixtures import SITES, tiny

from saehook.errors import ArgumentError
from saehook.latent_search import latents_for_token, latents_here_not_there


def test_latents_that_raise_a_token():
    found = latents_for_token(tiny(), "e", SITES[0], n=5)
    sae = tiny().saes[SITES[0]]
    row = tiny().lm.lm_head.weight[tiny().tokenizer("e")["input_ids"][0]].detach()
    cosines = torch.nn.functional.cosine_similarity(sae.W_dec, row[None], dim=-1)
    assert [one.latent for one in found] == cosines.topk(5).indices.tolist()
    assert [one.cosine for one in found] == pytest.approx(cosines.topk(5).values.tolist(), abs=1e-6)
    assert [one.logit for one in found] == pytest.approx(
        [float(sae.W_dec[one.latent] @ row) for one in found], abs=1e-5
    )
    with pytest.raises(ArgumentError, match="'ab' is 2 tokens"):
        latents_for_token(tiny(), "ab", SITES[0])


def test_latents_that_fire_here_and_not_there():
    found = latents_here_not_there(tiny(), "hello, world", ["abc", "xyz"], SITES[0], n=7)
    here = tiny().latents("hello, world", SITES[0]).acts
    there = torch.cat([row.acts for row in tiny().latents(["abc", "xyz"], SITES[0])])
    more = here.mean(0) - there.mean(0)
    assert [one.latent for one in found] == more.topk(7).indices.tolist()
    assert [one.difference for one in found] == pytest.approx(more.topk(7).values.tolist(), abs=1e-6)
    assert [one.largest for one in found] == [float(here[:, one.latent].max()) for one in found]
    same = latents_here_not_there(tiny(), "abc", "abc", SITES[0])
    assert same == []
