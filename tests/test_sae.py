"""The autoencoder itself."""

from __future__ import annotations

import copy

import pytest
import reference_hooks as reference
import torch
from builders import ACTIVATIONS, identity_sae, tiny_sae

from saehook.activation_fns import batch_topk, jumprelu, topk
from saehook.config import BatchTopK, JumpReLU, ReLU, SAEConfig, TopK
from saehook.errors import ArgumentError, LatentError, MissingStatError, ShapeError
from saehook.sae import QUANTILE_LEVELS, SAE

VARIANTS = [(a, n, s) for a in ACTIVATIONS for n in ("none", "layer_norm") for s in (True, False)]


def x(*shape: int) -> torch.Tensor:
    return 2.0 * torch.randn(*(shape or (12,)), 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("activation", "normalize", "subtract_b_dec"), VARIANTS)
def test_encode_and_decode_are_the_formula(activation, normalize, subtract_b_dec):
    sae = tiny_sae(activation=activation, normalize=normalize, subtract_b_dec=subtract_b_dec)
    acts = sae.encode(x())
    expected = torch.stack([reference.encode(sae, token) for token in x()])
    torch.testing.assert_close(acts, expected, rtol=1e-5, atol=1e-5)
    assert 0 < float((acts != 0).float().mean()) < 1
    decoded = torch.stack([reference.decode(sae, z, token) for z, token in zip(expected, x(), strict=True)])
    torch.testing.assert_close(sae(x()).x_hat, decoded, rtol=1e-4, atol=1e-5)
    out = sae(x())
    assert torch.equal(out.acts, acts)
    assert torch.equal(out.pre_acts, sae.pre_acts(x()))


@pytest.mark.parametrize(("activation", "normalize", "subtract_b_dec"), VARIANTS)
def test_a_token_alone_is_the_same_as_in_a_batch(activation, normalize, subtract_b_dec):
    sae = tiny_sae(activation=activation, normalize=normalize, subtract_b_dec=subtract_b_dec)
    batch = x(4, 5)
    acts = sae.encode(batch)
    assert acts.shape == (4, 5, 48)
    for i in range(4):
        for j in range(5):
            alone = sae.encode(batch[i, j])
            assert alone.shape == (48,)
            torch.testing.assert_close(alone, acts[i, j], rtol=1e-5, atol=1e-6)
            assert torch.equal(alone != 0, acts[i, j] != 0)
    if normalize == "none":  # torch warns of the standard deviation of nothing
        assert sae.encode(batch[:0]).shape == (0, 5, 48)
        assert sae(batch[:, :0]).x_hat.shape == (4, 0, 32)


def test_the_identity_sae_is_exact():
    assert torch.equal(identity_sae()(x()).x_hat, x())


def test_topk_keeps_exactly_k_of_a_tie():
    pre = torch.tensor([[1.0, 2.0, 2.0, 2.0, -1.0], [-1.0, -2.0, -3.0, 0.5, -5.0]])
    acts = topk(pre, 2)
    assert acts.count_nonzero(-1).tolist() == [2, 1], "negative pre-activations never fire"
    assert acts[0].max() == 2.0


def test_jumprelu_fires_strictly_above_its_threshold():
    pre = torch.tensor([0.5, 0.5001, -0.2, 0.3, 0.0])
    assert jumprelu(pre, torch.tensor(0.5)).tolist() == [0.0, pre[1].item(), 0.0, 0.0, 0.0]
    assert jumprelu(pre, torch.tensor([0.0, 1.0, -1.0, 0.2, -1.0])).tolist() == [0.5, 0.0, 0.0, pre[3].item(), 0.0]


def test_the_batch_rule_keeps_the_largest_of_the_batch():
    pre = torch.tensor([[5.0, 4.0, 3.0], [1.0, -1.0, 0.5]])
    assert batch_topk(pre, 1).tolist() == [[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    assert batch_topk(pre, 3).tolist() == [[5.0, 4.0, 3.0], [1.0, 0.0, 0.5]]


# --- threshold -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "move", [lambda s: s.to(torch.bfloat16), lambda s: s.bfloat16(), lambda s: s.half(), lambda s: s.double()]
)
@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_the_threshold_stays_float32_with_all_its_digits(activation, move):
    sae = tiny_sae(activation=activation)
    assert sae.threshold is not None
    before = sae.threshold.detach().clone()
    moved = move(copy.deepcopy(sae))
    assert moved.W_enc.dtype != torch.float32
    assert moved.threshold.dtype == torch.float32
    assert torch.equal(moved.threshold, before)
    assert isinstance(moved.threshold, torch.nn.Parameter)
    assert moved.encode(x()).dtype == moved.dtype
    frozen = copy.deepcopy(sae)
    assert frozen.threshold is not None
    frozen.threshold.requires_grad_(False)
    moved = move(frozen)
    assert not moved.threshold.requires_grad
    assert torch.equal(moved.float().threshold, before)


def test_a_threshold_follows_its_sae_to_a_device():
    sae = tiny_sae(activation="jumprelu").to("meta", torch.bfloat16)
    assert sae.threshold is not None
    assert sae.threshold.is_meta
    assert sae.threshold.dtype == torch.float32
    assert sae.device.type == "meta"


def test_setting_the_threshold():
    sae = tiny_sae(activation="batchtopk")
    sae.set_threshold(0.25)
    assert sae.threshold is not None
    assert sae.threshold.tolist() == [0.25] * 48
    sae.set_threshold(torch.linspace(0, 1, 48))
    assert sae.threshold[-1] == 1.0
    assert "threshold" in dict(sae.named_parameters())
    for activation in ("relu", "topk"):
        with pytest.raises(ArgumentError, match="no threshold"):
            tiny_sae(activation=activation).set_threshold(0.1)


def test_a_batchtopk_without_threshold_has_no_rule():
    sae = SAE(SAEConfig(d_in=32, d_sae=48, activation=BatchTopK(k=4)))
    assert sae.threshold is None
    for use in (sae.encode, sae):
        with pytest.raises(MissingStatError, match="BatchTopK without threshold"):
            use(x())
    assert sae.pre_acts(x()).shape == (12, 48)
    jump = SAE(SAEConfig(d_in=32, d_sae=48, activation=JumpReLU()))
    assert jump.threshold is not None
    assert torch.isfinite(jump.encode(x())).all()


# --- shapes and arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_wrong_widths_are_refused(activation):
    sae = tiny_sae(activation=activation, site="layers.1.mlp_out")
    for use in (sae.encode, sae.pre_acts, sae):
        with pytest.raises(ShapeError, match=r"d_in = 32, but got \(3, 31\).*layers\.1\.mlp_out"):
            use(torch.zeros(3, 31))
    with pytest.raises(ShapeError, match=r"d_sae = 48 latents.*\(3, 47\)"):
        sae.decode(torch.zeros(3, 47))


def test_a_layer_norm_sae_needs_x_to_decode():
    sae = tiny_sae(normalize="layer_norm")
    acts = sae.encode(x())
    with pytest.raises(ArgumentError, match=r"decode\(acts, x=x\)"):
        sae.decode(acts)
    assert torch.equal(sae.decode(acts, x()), sae(x()).x_hat)
    plain = tiny_sae()
    assert torch.equal(plain.decode(plain.encode(x())), plain(x()).x_hat)


def test_the_scale_is_that_of_the_token():
    sae = tiny_sae(normalize="layer_norm")
    scale = sae.scale(x())
    assert scale is not None
    torch.testing.assert_close(scale[:, 0], x().std(-1))
    assert tiny_sae().scale(x()) is None
    acts = sae.encode(x())
    moved = acts.clone()
    moved[:, 5] += 1.0
    difference = sae.decode(moved, x()) - sae.decode(acts, x())
    torch.testing.assert_close(difference, scale * sae.W_dec[5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.encode(3.0 * x() + 1.0), acts, rtol=1e-3, atol=1e-4)


def test_inputs_of_other_dtypes():
    sae = tiny_sae()
    for dtype in (torch.bfloat16, torch.float64):
        assert sae.encode(x().to(dtype)).dtype == torch.float32
        assert torch.equal(sae.encode(x().to(dtype)), sae.encode(x().to(dtype).float()))
    assert tiny_sae(dtype=torch.bfloat16).encode(x()).dtype == torch.bfloat16


def test_latents_are_checked():
    sae = tiny_sae(site="layers.1.mlp_out")
    sae.check_latents((0, 47))
    for latent in (-1, 48, 10**400):
        with pytest.raises(LatentError, match=r"outside 0\.\.47.*layers\.1\.mlp_out"):
            sae.check_latents((3, latent))


def test_maxima():
    sae = tiny_sae()
    assert sae.stats is not None
    assert torch.equal(sae.max_act((5, 3)), sae.stats.max_act[[5, 3]])
    sae.stats.max_act[3] = 0.0
    with pytest.raises(MissingStatError, match="latent 3 never fired on the 1,000 tokens"):
        sae.max_act((5, 3))
    sae.stats = None
    with pytest.raises(MissingStatError, match="no statistics"):
        sae.max_act((5,))


def test_quantiles_are_linear_between_the_recorded_levels():
    sae = tiny_sae()
    assert sae.stats is not None
    assert sae.stats.quantiles is not None
    latents = (5, 3, 40)
    recorded = sae.stats.quantiles[list(latents)]
    for i, level in enumerate(QUANTILE_LEVELS):
        assert torch.equal(sae.quantile_act(latents, level), recorded[:, i])
    assert torch.equal(sae.quantile_act(latents, 0), torch.zeros(3))
    assert torch.equal(sae.quantile_act(latents, 1), sae.max_act(latents))
    torch.testing.assert_close(sae.quantile_act(latents, 0.02), recorded[:, 0] * 0.4)
    torch.testing.assert_close(sae.quantile_act(latents, 0.3), 0.8 * recorded[:, 2] + 0.2 * recorded[:, 3])
    torch.testing.assert_close(sae.quantile_act(latents, 0.995), (recorded[:, -1] + sae.max_act(latents)) / 2)
    assert sae.quantile_act((), 0.5).shape == (0,)
    for level in (-0.1, 1.001, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match=f"level of a quantile is {level}"):
            sae.quantile_act(latents, level)
    sae.stats.max_act[3] = 0.0
    with pytest.raises(MissingStatError, match=r"latent 3 never fired on the 1,000 tokens.*unit='quantile'"):
        sae.quantile_act(latents, 0.5)
    sae.stats.quantiles = None
    with pytest.raises(MissingStatError, match=r"from before quantiles.*saehook stats"):
        sae.quantile_act((5,), 0.5)
    sae.stats = None
    with pytest.raises(MissingStatError, match=r"'quantile' needs .* no statistics"):
        sae.quantile_act((5,), 0.5)


def test_the_mean_error():
    sae = tiny_sae()
    assert sae.stats is not None
    assert sae.mean_error() is sae.stats.mean_error
    sae.stats.mean_error = None
    with pytest.raises(MissingStatError, match=r"from before the error.*saehook stats"):
        sae.mean_error()
    sae.stats = None
    with pytest.raises(MissingStatError, match=r"'mean' needs .* no statistics"):
        sae.mean_error()


def test_a_new_sae():
    generator = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_in=8, d_sae=24, activation=TopK(k=2)), site="layers.0.mlp_out", generator=generator)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    again = SAE(sae.config, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.W_enc, again.W_enc)
    assert (sae.d_in, sae.d_sae, sae.site, sae.dtype) == (8, 24, "layers.0.mlp_out", torch.float32)
    assert "TopK(k=2)" in repr(sae)
    assert SAE(sae.config, dtype=torch.bfloat16).W_dec.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"d_in": 0}, "d_in is 0"),
        ({"d_sae": -3}, "d_sae is -3"),
        ({"d_in": 2.0}, "d_in is 2.0"),
        ({"d_in": True}, "d_in is True"),
        ({"activation": "relu"}, "'relu'"),
        ({"activation": TopK(k=9)}, "k = 9 is larger than d_sae = 8"),
        ({"normalize": "rms"}, "'rms'"),
    ],
)
def test_configurations_that_cannot_be_meant(fields, match):
    with pytest.raises(ArgumentError, match=match):
        SAEConfig(**{"d_in": 4, "d_sae": 8, "activation": ReLU(), **fields})
    with pytest.raises(ArgumentError, match="k is 0"):
        TopK(k=0)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradients_reach_every_parameter_that_fires(activation):
    sae = tiny_sae(activation=activation, dtype=torch.float64)
    inputs = x(3).double().requires_grad_()
    sae(inputs).x_hat.square().sum().backward()
    assert inputs.grad is not None
    assert torch.isfinite(inputs.grad).all()
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        gradient = getattr(sae, name).grad
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
