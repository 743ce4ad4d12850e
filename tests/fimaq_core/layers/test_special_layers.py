"""Layers with an input quantizer for softmax or GELU: values, folded shifts, saving, training."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from closeness import assert_same_steps
from small_models import chain_of, images, quick, vit
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import (
    QuantLinear,
    QuantMatMul,
    decide_rounding,
    fold_shift,
    quant_layers,
    set_quantized,
)
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import fake_quantize
from fimaq_core.quantizers.logarithm import (
    GELU_SHIFT,
    adalog_fake_quantize,
    adalog_tables,
    log_fake_quantize,
)
from fimaq_core.quantizers.special import AdaLogQuantizer, LogQuantizer, TwinQuantizer
from fimaq_core.quantizers.twin import twin_gelu, twin_softmax
from fimaq_core.recipe import OFF, Kind, Recipe
from fimaq_core.reconstruction import flat
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.engines import Engine
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.reconstruct import expand_per_token
from fimaq_core.reconstruction.tape import Storage, Tape

LOGARITHMIC: tuple[Kind, ...] = ("log2", "logsqrt2", "adalog")
SPECIAL: tuple[Kind, ...] = (*LOGARITHMIC, "twin")
Q = 29
both_biases = pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])


def set_up(quantizer: ActivationQuantizer, scale: Tensor) -> None:
    """Give a scale, and AdaLog a base that is not its first."""
    quantizer.set_scale(scale)
    if isinstance(quantizer, AdaLogQuantizer) and not quantizer.off:
        quantizer.set_base(Q)


def by_hand(kind: Kind, x: Tensor, scale: Tensor, levels: int, source: str) -> Tensor:
    """The quantizer as a composition of pure functions, with its shift subtracted again."""
    if kind == "twin":
        return (twin_softmax if source == "softmax" else twin_gelu)(x, scale, levels)
    shift = GELU_SHIFT if source == "gelu" else 0.0
    if kind == "adalog":
        return (
            adalog_fake_quantize(x + shift, scale, *adalog_tables(Q, levels), Q / 37, levels)
            - shift
        )
    return log_fake_quantize(x + shift, scale, 1.0 if kind == "log2" else 0.5, levels) - shift


def linear(kind: Kind, biased: bool = True, bits: int = 4) -> tuple[QuantLinear, Tensor]:
    """A linear layer with its ranges, and outputs of a GELU."""
    torch.manual_seed(3)
    layer = QuantLinear.from_float(nn.Linear(12, 7, bias=biased), bits, bits, kind).requires_grad_(
        False
    )
    span = layer.weight.amax(1, keepdim=True) - layer.weight.amin(1, keepdim=True)
    scale = span / (2**bits - 1)
    layer.weight_quantizer.set_range(scale, -(layer.weight.amin(1, keepdim=True) / scale).round())
    x = F.gelu(torch.randn(5, 9, 12) * 1.5)
    top = float(x.max())
    set_up(
        layer.input_quantizer,
        torch.tensor([top / 2 ** (bits - 1) if kind == "twin" else 0.9 * (top + GELU_SHIFT)]),
    )
    return layer, x


def product(
    kind: Kind, bits: int = 3, softmax_bits: int | None = None
) -> tuple[QuantMatMul, Tensor, Tensor]:
    """An attention product with its ranges, a softmax's outputs, and the right operand."""
    torch.manual_seed(4)
    a, b = (torch.randn(3, 2, 7, 6) * 2).softmax(-1), torch.randn(3, 2, 6, 5)
    layer = QuantMatMul(bits, softmax_bits, kind)
    set_up(layer.a_quantizer, torch.full((1, 1, 1, 1), 0.25 if kind == "twin" else 0.9))
    layer.b_quantizer.set_range(
        torch.tensor([0.4, 0.6]).view(1, 2, 1, 1), torch.full((1, 2, 1, 1), float(2 ** (bits - 1)))
    )
    return layer, a, b


@both_biases
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", SPECIAL)
def test_linear_equals_the_functions_by_hand(kind: Kind, bits: int, biased: bool) -> None:
    layer, x = linear(kind, biased, bits)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.quantized = True
    levels = 2**bits
    weight = fake_quantize(
        layer.weight, layer.weight_quantizer.scale, layer.weight_quantizer.zero_point, levels
    )
    x_hat = by_hand(kind, x, layer.input_quantizer.scale, levels, "gelu")
    expected = F.linear(x_hat, weight, layer.bias)
    assert torch.equal(layer(x), expected)
    assert (x_hat - x).abs().max() > 1e-3
    decide_rounding(layer)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("softmax_bits", [None, 2, 8])
@pytest.mark.parametrize("kind", SPECIAL)
def test_product_equals_the_functions_by_hand(
    kind: Kind, softmax_bits: int | None, transposed: bool
) -> None:
    """The right operand may be transposed in memory; the left one has its own bits."""
    layer, a, b = product(kind, 3, softmax_bits)
    if transposed:
        b = b.mT.contiguous().mT
        assert b.stride(-1) > b.stride(-2)
    assert torch.equal(layer(a, b), a @ b)
    layer.quantized = True
    a_hat = by_hand(kind, a, layer.a_quantizer.scale, 2 ** (softmax_bits or 3), "softmax")
    b_hat = fake_quantize(b, layer.b_quantizer.scale, layer.b_quantizer.zero_point, 8)
    assert torch.allclose(layer(a, b), a_hat @ b_hat, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(a_hat @ b_hat, a @ b_hat, atol=1e-3)


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_quantizers_that_are_off(kind: Kind) -> None:
    layer, a, b = product(kind, 3, OFF)
    layer.quantized = True
    assert torch.equal(layer(a, b), a @ layer.b_quantizer(b))
    off = QuantLinear.from_float(nn.Linear(6, 4), OFF, OFF, kind)
    off.quantized = True
    x = torch.randn(3, 6)
    fold_shift(off)
    assert torch.equal(off(x), F.linear(x, off.weight, off.bias))


@both_biases
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("kind", LOGARITHMIC)
def test_folding_a_shift_leaves_the_output_alone(kind: Kind, bits: int, biased: bool) -> None:
    layer, x = linear(kind, biased, bits)
    plain = layer(x)
    layer.quantized = True
    decide_rounding(layer)
    before = layer(x)
    parameters = copy.deepcopy(dict(layer.named_parameters()))
    fold_shift(layer)
    after = layer(x)
    assert torch.allclose(after, before, atol=1e-5)
    # What the quantizer gives is now not negative: a code's point.
    assert layer.input_quantizer(x).min() >= 0
    bias = torch.zeros(7) if layer.bias is None else layer.bias
    expected = bias - GELU_SHIFT * layer.weight_quantizer.quantized(layer.weight).sum(1)
    assert torch.allclose(layer.quantized_bias, expected, atol=1e-6)
    assert (layer.quantized_bias - bias).abs().max() > 0.01
    fold_shift(layer)
    assert torch.equal(layer(x), after)
    for name, value in layer.named_parameters():
        assert torch.equal(value, parameters[name])
    layer.quantized = False
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("kind", LOGARITHMIC)
def test_a_folded_shift_joins_the_bias_that_a_refit_left(kind: Kind) -> None:
    layer, x = linear(kind)
    layer.quantized = True
    decide_rounding(layer)
    layer.quantized_bias = torch.linspace(-1, 1, 7)
    before = layer(x)
    fold_shift(layer)
    assert torch.allclose(layer(x), before, atol=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "twin"])
def test_nothing_else_is_folded(kind: Kind) -> None:
    layer, x = linear("twin")
    if kind == "uniform":
        layer = QuantLinear.from_float(nn.Linear(12, 7), OFF, 4)
        layer.input_quantizer.set_range(torch.tensor([0.3]), torch.tensor([3.0]))
    layer.quantized = True
    before = layer(x)
    fold_shift(layer)
    assert layer.quantized_bias.numel() == 0
    assert torch.equal(layer(x), before)


def test_softmax_outputs_have_no_shift() -> None:
    for kind in LOGARITHMIC:
        layer, a, _ = product(kind)
        assert isinstance(layer.a_quantizer, LogQuantizer)
        assert layer.a_quantizer.shift == 0
        assert layer.a_quantizer(torch.zeros_like(a)).eq(0).all()


@both_biases
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", SPECIAL)
def test_states_carry_ranges_and_the_folded_shift(kind: Kind, folded: bool, biased: bool) -> None:
    layer, x = linear(kind, biased)
    layer.quantized = True
    decide_rounding(layer)
    if folded:
        fold_shift(layer)
    # What it is loaded into has been folded itself, or not: neither may stay.
    used, _ = linear(kind, biased)
    set_up(used.input_quantizer, torch.tensor([0.1]))
    decide_rounding(used)
    fold_shift(used)
    new = QuantLinear.from_float(nn.Linear(12, 7, biased), 4, 4, kind)
    for other in (used, new):
        other.load_state_dict(layer.state_dict())
        other.quantized = True
        assert torch.equal(other(x), layer(x))
        assert set(other.state_dict()) == set(layer.state_dict())
        before = other.quantized_bias.clone()
        fold_shift(other)
        assert torch.equal(other.quantized_bias, before) == (folded or kind == "twin")
        assert torch.allclose(other(x), layer(x), atol=1e-5)


def test_the_quantized_forms_bias_is_used_in_that_form_alone() -> None:
    for build in (lambda: nn.Linear(12, 7), lambda: nn.Linear(12, 7, bias=False)):
        layer = QuantLinear.from_float(build(), OFF, OFF).requires_grad_(False)
        x = torch.randn(4, 12)
        layer.quantized_bias = torch.arange(7.0)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.quantized = True
        assert torch.equal(layer(x), F.linear(x, layer.weight, torch.arange(7.0)))


@pytest.mark.parametrize("kind", SPECIAL)
def test_scales_per_token_leave_special_quantizers_alone(kind: Kind) -> None:
    recipe = quick("fimaq", softmax_quantizer=kind, gelu_quantizer=kind)
    chain = chain_of(vit(1), recipe)
    calibrate(chain, images(8), recipe)
    expand_per_token(chain, images(1))
    for name, layer in quant_layers(chain.segment(1).block):
        if isinstance(layer, QuantMatMul):
            value = name == "attn.attention_value"
            assert layer.a_quantizer.scale.shape == ((1, 1, 1, 1) if value else (1, 2, 17, 1))
            assert layer.b_quantizer.scale.shape == (1, 2, 1, 16 if value else 17)
        elif isinstance(layer, QuantLinear):
            assert layer.input_quantizer.scale.shape == ((1,) if name == "mlp.fc2" else (1, 17, 1))


@functools.cache
def calibrated(recipe: Recipe) -> tuple[BlockChain, Tensor, Tensor]:
    """A calibrated model, its images and full-precision outputs; to be copied."""
    chain, x = chain_of(vit(1), recipe), images(24)
    calibrate(chain, x, recipe)
    set_quantized(chain, False)
    with torch.no_grad():
        return chain, x, chain(x)


def trainer(engine: Engine, recipe: Recipe) -> BlockTrainer:
    """A trainer of the transformer block."""
    chain, x, reference = copy.deepcopy(calibrated(recipe))
    tape = Tape(
        chain,
        x,
        Storage("device", torch.device("cpu")),
        with_prefix=recipe.prefix_prob > 0,
        batch_size=8,
    )
    tape.advance()
    tape.compute_target()
    objective = BlockObjective(chain, tape, recipe, reference, ClassifierDivergence(20.0), [])
    return BlockTrainer(chain.segment(1), objective, engine)


@pytest.mark.parametrize("method", ["qdrop", "brecq"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_engines_learn_special_quantizers_alike(
    kind: Kind, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The definition, the fused form and the form for compilation agree; the loss falls."""
    monkeypatch.setattr(flat, "_compiled", lambda function, *_: function)
    recipe = quick(
        method,
        softmax_quantizer=kind,
        gelu_quantizer=kind,
        steps=12,
        w_bits=3,
        a_bits=3,
        lr_alpha=1e-2,
        lr_scale=1e-3,
    )
    eager, fused, traced = (trainer(engine, recipe) for engine in ("eager", "fused", "compiled"))
    scale = eager.segment.block.get_parameter("mlp.fc2.input_quantizer.scale").clone()
    assert_same_steps(eager, [fused, traced], recipe.steps)
    eager.finish()
    moved = eager.segment.block.get_parameter("mlp.fc2.input_quantizer.scale") / scale
    assert moved.sub(1).abs().max() > 1e-3


@pytest.mark.parametrize("kind", SPECIAL)
def test_reconstruction_with_special_quantizers_lowers_the_loss(kind: Kind) -> None:
    recipe = quick(
        "brecq",
        softmax_quantizer=kind,
        gelu_quantizer=kind,
        steps=60,
        w_bits=3,
        a_bits=4,
        batch_size=24,
    )
    made = trainer("fused", recipe)
    losses = torch.stack([made.step(number).clone() for number in range(recipe.steps)])
    assert losses[0] == pytest.approx(1.0)
    assert losses[-10:].mean() < 0.9


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("make", [linear, product])
def test_a_dropped_input_is_left_in_full_precision(
    kind: Kind, make: Callable[[Kind], tuple[nn.Module, Tensor]]
) -> None:
    """During learning, an element is quantized with the given probability."""
    layer, x = make(kind)[:2]
    quantizer = layer.input_quantizer if isinstance(layer, QuantLinear) else layer.a_quantizer
    assert isinstance(quantizer, LogQuantizer | TwinQuantizer)
    whole = quantizer(x)
    quantizer.learning = "fused"
    learned = quantizer(x)
    # AdaLog's tables round what learning takes as it is.
    assert torch.allclose(
        learned, whole, atol=0.05 * float(whole.abs().max()) if kind == "adalog" else 1e-6
    )
    quantizer.keep_probability = 0.0
    assert torch.allclose(quantizer(x), x, atol=1e-6)
    quantizer.keep_probability = 0.5
    mixed = quantizer(x)
    kept = (mixed - learned).abs() < 1e-6
    assert ((mixed - x).abs() < 1e-6).logical_or(kept).all()
    assert 0.3 < float(kept[(learned - x).abs() > 1e-5].double().mean()) < 0.7
