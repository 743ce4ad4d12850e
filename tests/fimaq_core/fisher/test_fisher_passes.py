"""Results of a Fisher pass: F·Δ to first order, and means that do not depend on the batches."""

import itertools
from dataclasses import replace

import pytest
import torch
from small_models import chain_of, images, quick, vit
from torch import Tensor, nn

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.fisher.passes import Sweep, mean_gradient_and_error
from fimaq_core.layers import set_quantized
from fimaq_core.samples import Samples

CPU = torch.device("cpu")


def softmax_classifier(width: int = 9, classes: int = 6) -> tuple[BlockChain, Tensor, Tensor]:
    """A block that does nothing, then logits W z + c."""
    torch.manual_seed(4)
    head = nn.Linear(width, classes)
    with torch.no_grad():
        head.weight.copy_(torch.randn(classes, width))
        head.bias.copy_(torch.randn(classes))
    chain = BlockChain([Segment("block", "block", nn.Identity()), Segment("head", "head", head)])
    return chain, head.weight.double(), head.bias.double()


def fisher(z: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> Tensor:
    """``Wᵀ (diag(p) - p pᵀ) W / T²`` of each sample, in float64."""
    p = ((z @ weight.t() + bias) / temperature).softmax(-1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return weight.t() @ middle @ weight / temperature**2


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_is_the_fisher_matrix_times_the_error(temperature: float) -> None:
    """The gradient is F·Δ to first order: half of Δ leaves a quarter of the difference."""
    chain, weight, bias = softmax_classifier()
    z = torch.randn(40, 9, dtype=torch.float64)
    direction = torch.randn(40, 9, dtype=torch.float64)
    matrix = fisher(z, weight, bias, temperature)
    reference = (z @ weight.t() + bias).float()
    divergence = ClassifierDivergence(temperature)
    left, size = [], []
    for step in (0.1, 0.05, 0.025):
        delta = step * temperature * direction
        sweep = Sweep(chain, 0, Samples(reference), divergence, CPU, 16).gradients(
            (z + delta).float()
        )
        found = torch.cat([gradient for _, _, gradient in sweep]).double()
        expected = torch.einsum("bij,bj->bi", matrix, delta)
        left.append(float((found - expected).norm()))
        size.append(float(expected.norm()))
    assert left[2] < 0.1 * size[2]
    for larger, smaller in itertools.pairwise(left):
        assert 3.3 < larger / smaller < 4.7


def test_one_pass_gives_mean_absolute_gradient_and_error() -> None:
    chain, weight, bias = softmax_classifier()
    z = torch.randn(13, 9, dtype=torch.float64)
    delta = 0.3 * torch.randn(13, 9, dtype=torch.float64)
    reference = (z @ weight.t() + bias).float()
    sweep = Sweep(chain, 0, Samples(reference), ClassifierDivergence(2.0), CPU, 4)
    gradient, error = mean_gradient_and_error(sweep, (z + delta).float(), z.float())
    q = (((z + delta) @ weight.t() + bias) / 2).softmax(-1)
    p = ((z @ weight.t() + bias) / 2).softmax(-1)
    exact = (q - p) @ weight / 2  # the gradient of the divergence, in closed form
    assert torch.allclose(gradient.double(), exact.abs().mean(0), rtol=1e-4, atol=1e-7)
    assert torch.allclose(error.double(), delta.abs().mean(0), rtol=1e-4)


def prepared() -> tuple[BlockChain, Tensor, Tensor, Tensor]:
    """A ViT with only block 2 quantized; its input, full-precision output, and the model's."""
    chain, x = chain_of(vit(3), quick()), images(33)
    calibrate(chain, x, quick())
    set_quantized(chain, False)
    with torch.no_grad():
        inputs = chain.segment(2).before(chain.segment(1)(chain.segment(0)(x)))
        target = chain.segment(2).block(inputs)
        reference = chain.tail(3, target)
    set_quantized(chain.segment(2).block, True)
    return chain, inputs, target, reference


@pytest.mark.parametrize("batch", [1, 7, 33, 64])
def test_means_do_not_depend_on_the_batch_size(batch: int) -> None:
    chain, inputs, target, reference = prepared()
    divergence = ClassifierDivergence(20.0)
    sweep = Sweep(chain, 2, Samples(reference), divergence, CPU)
    gradient, error = mean_gradient_and_error(sweep, inputs, target)
    again, error_again = mean_gradient_and_error(replace(sweep, batch_size=batch), inputs, target)
    assert gradient.shape == error.shape == (target[0].numel(),)
    assert float(gradient.max()) > 0
    assert torch.allclose(gradient, again, rtol=1e-4, atol=1e-5 * float(gradient.max()))
    assert torch.allclose(error, error_again, rtol=1e-5, atol=1e-6)


def test_the_rest_of_the_model_gets_no_gradients() -> None:
    chain, inputs, target, reference = prepared()
    sweep = Sweep(chain, 2, Samples(reference), ClassifierDivergence(20.0), CPU)
    mean_gradient_and_error(sweep, inputs, target)
    assert all(parameter.grad is None for parameter in chain.parameters())
