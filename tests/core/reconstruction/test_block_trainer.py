"""One block's optimisation: schedules, batches, input mixing, and what a step's gradient is."""

import itertools
import math

import pytest
import torch
from small_models import chain_of, images, quick, vit
from torch import Tensor

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import set_quantized
from fimaq_core.quantizers.rounding import rounding_penalty
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import BlockTrainer, block_generator
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.tape import Storage, Tape

CPU = torch.device("cpu")


def trainer(recipe: Recipe, index: int = 2) -> BlockTrainer:
    """At block ``index`` of a calibrated ViT."""
    chain, x = chain_of(vit(2), recipe), images(24)
    calibrate(chain, x, recipe)
    set_quantized(chain, False)
    with torch.no_grad():
        reference = chain(x)
    tape = Tape(chain, x, Storage("device", CPU), with_prefix=recipe.prefix_prob > 0, batch_size=8)
    for _ in range(index):
        tape.advance()
    tape.compute_target()
    objective = BlockObjective(chain, tape, recipe, reference, ClassifierDivergence(20.0), [])
    return BlockTrainer(chain.segment(index), tape, objective, recipe, block_generator(recipe.seed, "x", CPU))


def test_regulariser_is_off_and_then_falls_linearly() -> None:
    """Off for the first fifth of the steps, then β from 20 to 2."""
    made = trainer(quick("qdrop", steps=1000))
    assert [made.beta(number) for number in range(199)] == [None] * 199
    assert made.beta(199) == pytest.approx(20.0)
    assert made.beta(599) == pytest.approx(11.0)
    assert made.beta(999) == pytest.approx(2.0)
    values = [made.beta(number) for number in range(199, 1000)]
    steps = [b - a for a, b in itertools.pairwise(values)]  # type: ignore[operator]
    assert steps == pytest.approx([-18 / 800] * 800)
    assert trainer(quick("qdrop", round_weight=0.0)).beta(5) is None


def test_scale_rate_falls_by_a_cosine_to_zero_and_that_of_alpha_stays() -> None:
    made = trainer(quick("qdrop", steps=10, lr_alpha=0.02, lr_scale=1e-3))
    alpha, scales = made.optimizers
    for number in range(10):
        assert alpha.param_groups[0]["lr"] == 0.02
        assert scales.param_groups[0]["lr"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * number / 10)) / 2)
        made.step(number)
    assert scales.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_batches_are_drawn_without_repetition_from_all_images() -> None:
    made = trainer(quick("qdrop", batch_size=8))
    seen: set[int] = set()
    for _ in range(30):
        batch = made._samples().tolist()
        assert len(batch) == len(set(batch)) == 8
        seen |= set(batch)
    assert seen == set(range(24))


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_inputs_are_mixed_element_by_element(probability: float) -> None:
    made = trainer(quick("qdrop", prefix_prob=probability))
    samples = torch.arange(24)
    mixed, full, prefix = made._inputs(samples), made.tape.full, made.tape.prefix
    if probability == 0:
        assert prefix is None
        assert torch.equal(mixed, full)
        return
    assert prefix is not None
    if probability == 1:
        assert torch.equal(mixed, prefix)
        return
    differ = full != prefix
    assert differ.double().mean() > 0.9
    assert ((mixed == full) | (mixed == prefix)).all()
    share = (mixed == prefix)[differ].double().mean()
    assert abs(float(share) - 0.5) < 4.5 * 0.5 / math.sqrt(int(differ.sum()))


@pytest.mark.parametrize("number", [0, 90])
def test_gradient_of_a_step(number: float) -> None:
    """Block loss plus, once it is on, 0.01 of the regulariser; found again from the plain definition."""
    recipe = quick("qdrop", steps=100, activation_prob=1.0, prefix_prob=0.0, batch_size=24, lr_alpha=1e-12, lr_scale=1e-12)
    made = trainer(recipe)
    assert made.rounding is not None
    with torch.no_grad():
        made.rounding.alpha.add_(torch.linspace(-0.3, 0.3, made.rounding.alpha.numel()))
    made.step(int(number))
    found = made.rounding.alpha.grad
    assert found is not None

    alpha = made.rounding.alpha.detach().clone().requires_grad_(True)
    h = (1.2 * torch.sigmoid(alpha) - 0.1).clamp(0, 1)
    pieces = h.split([layer.weight.numel() for layer in made.layers])
    for layer, piece in zip(made.layers, pieces, strict=True):
        quantizer = layer.weight_quantizer
        codes = torch.floor(layer.weight / quantizer.scale) + piece.view_as(layer.weight) + quantizer.zero_point
        layer.weight_override = quantizer.scale * (codes.clamp(0, quantizer.levels - 1) - quantizer.zero_point)
    assert made.tape.target is not None
    output = made.segment.block(made.tape.full)
    error = (output - made.tape.target).flatten(1).square().sum(1).mean()
    loss: Tensor = error / error.detach()
    if number:
        beta = made.beta(int(number))
        assert beta is not None
        loss = loss + 0.01 * rounding_penalty(h, beta)
    (expected,) = torch.autograd.grad(loss, alpha)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert (found != 0).double().mean() > 0.5


def test_finishing_leaves_training() -> None:
    made = trainer(quick("qdrop"))
    made.step(0)
    made.finish()
    for layer in made.layers:
        assert layer.weight_override is None
        assert layer.weight_quantizer.codes.numel() == layer.weight.numel()
    for quantizer in made.activations:
        assert not quantizer.training_scale
        assert not quantizer.scale.requires_grad
    block, x = made.segment.block, made.tape.full
    with torch.no_grad():
        assert torch.equal(block(x), block(x))


def test_head_bits_of_32_leave_its_input_alone() -> None:
    recipe = quick("qdrop", head_bits=32)
    made = trainer(recipe, index=3)
    assert made.activations == []
    assert len(made.layers) == 1
    made.step(0)
