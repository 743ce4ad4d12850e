"""Divergence that quantizing one operand alone causes, in closed form and on small models."""

import copy
from collections.abc import Callable

import pytest
import torch
from small_models import Measured, chain_of, images, quick, swin, vit
from torch import Tensor, nn

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.fisher.divergence import ClassifierDivergence, Divergence
from fimaq_core.layers import QuantLinear
from fimaq_core.mixed_bits import places, quantizers_of
from fimaq_core.pipeline import freeze
from fimaq_core.recipe import OFF
from fimaq_core.samples import Samples
from fimaq_core.sensitivity import agreement, sensitivities


def squared(outputs: Tensor, reference: Tensor) -> Tensor:
    return (outputs - reference).square().sum(1).mean()


def toy(outputs: int = 1) -> tuple[BlockChain, Tensor, Tensor, Tensor]:
    """Two linear layers in two segments, calibrated; their weights, and their input (12, 5)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=generator)
    layers = [nn.Linear(5, 4, bias=False), nn.Linear(4, outputs, bias=False)]
    for layer in layers:
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
    segments = [
        Segment(name, "block", QuantLinear.from_float(layer, 3, 3))
        for name, layer in zip(("first", "second"), layers, strict=True)
    ]
    chain = BlockChain(segments)
    calibrate(chain, x, quick("rtn"))
    first, second = (layer.weight.detach() for layer in layers)
    return chain, first, second, x


def errors_of(chain: BlockChain, first: Tensor, second: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Change of the output (n, outputs) for each operand, written out by hand."""
    one, two = (segment.block for segment in chain)
    hidden = x @ first.T
    return {
        "first.w": x @ (one.weight_quantizer.quantized(first) - first).T @ second.T,
        "first.a": (one.input_quantizer(x) - x) @ first.T @ second.T,
        "second.w": hidden @ (two.weight_quantizer.quantized(second) - second).T,
        "second.a": (two.input_quantizer(hidden) - hidden) @ second.T,
    }


def test_both_forms_equal_the_formula_of_a_linear_model() -> None:
    """For D = |y - y'|² both forms are the mean of |J δ|²; with one output for any direction."""
    chain, first, second, x = toy()
    rows = sensitivities(chain, x, Measured(squared), images=10, directions=1, batch_size=4)
    expected = errors_of(chain, first, second, x[:10])
    assert [f"{row.layer}.{row.operand}" for row in rows] == list(expected)
    for row, change in zip(rows, expected.values(), strict=True):
        assert row.exact == pytest.approx(float(change.square().sum(1).mean()), rel=1e-4)
        assert row.gradient == pytest.approx(row.exact, rel=1e-4)
    assert [row.values for row in rows] == [20, 5, 4, 4]
    assert {row.bits for row in rows} == {3}
    assert agreement(rows) == pytest.approx(1)


def test_the_gradient_form_is_right_on_average_over_directions() -> None:
    chain, first, second, x = toy(outputs=3)
    rows = sensitivities(chain, x, Measured(squared), directions=400)
    for row, change in zip(rows, errors_of(chain, first, second, x).values(), strict=True):
        assert row.exact == pytest.approx(float(change.square().sum(1).mean()), rel=1e-4)
        assert row.gradient == pytest.approx(row.exact, rel=0.1)


@pytest.mark.parametrize(("make", "size", "every"), [(vit, 32, 7), (swin, 40, 30)])
def test_the_exact_form_equals_a_copy_with_all_other_quantizers_off(
    make: Callable[[], nn.Module], size: int, every: int
) -> None:
    chain, x = chain_of(make(), quick("rtn")), images(6, size)
    divergence = ClassifierDivergence(1.0)
    calibrate(chain, x, quick("rtn"))
    rows = sensitivities(chain, x, divergence, directions=8, batch_size=4)
    assert all(place.layer.quantized for place in places(chain))
    float_chain = copy.deepcopy(chain)
    for place in places(float_chain):
        place.layer.quantized = False
    for row in rows[::every]:
        alone = copy.deepcopy(chain)
        for place in places(alone):
            for operand, quantizer in quantizers_of(place.layer).items():
                if (place.name, operand) != (row.layer, row.operand):
                    quantizer.bits = OFF
        expected = float(divergence(alone(x), float_chain(x)))
        assert row.exact == pytest.approx(expected, rel=1e-3, abs=1e-8)
    assert agreement(rows) > 0.8


def test_folded_shifts_of_inputs_do_not_count_as_errors() -> None:
    recipe = quick("fimaq", gelu_quantizer="adalog", range_candidates=16)
    chain, x, divergence = chain_of(vit(), recipe), images(8), ClassifierDivergence(1.0)
    calibrate(chain, x, recipe)
    before = sensitivities(chain, x, divergence, directions=0)
    freeze(chain)
    after = sensitivities(chain, x, divergence, directions=0)
    assert [row.layer for row in after] == [row.layer for row in before]
    for old, new in zip(before, after, strict=True):
        assert new.exact == pytest.approx(old.exact, rel=1e-3, abs=1e-8)
        assert new.gradient is None


class Paired(Divergence):
    """Squared error of sums over pairs of consecutive samples; it needs all outputs first."""

    batch = 2

    def reference(self, outputs: Samples) -> Samples:
        assert len(outputs) == 12
        return outputs

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return (outputs - reference).sum(0).square().sum() / len(outputs)


def test_a_divergence_that_compares_samples_has_its_own_batches() -> None:
    chain, first, second, x = toy()
    rows = sensitivities(chain, x, Paired(), images=8, directions=0)
    for row, change in zip(rows, errors_of(chain, first, second, x[:8]).values(), strict=True):
        pairs = change.view(4, 2, 1).sum(1).square().sum() / 8
        assert row.exact == pytest.approx(float(pairs), rel=1e-4)
