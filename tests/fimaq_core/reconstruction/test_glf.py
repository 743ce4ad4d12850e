"""GLF-Q: its loss at the penultimate feature, and steps of straight-through weights by hand."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from small_models import Measured, chain_of, deit, images, quick, swin, vit
from torch import Tensor, nn
from torch.func import functional_call

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain, Kind, Segment
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.fisher.losses import takes_passes
from fimaq_core.layers import set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.engines import Engine
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.tape import Placement, Storage, Tape
from fimaq_core.samples import Samples

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ENGINES: tuple[Engine, ...] = ("eager", "fused")
STRAIGHT = {"weight_learning": "straight-through"}


@functools.cache
def calibrated() -> tuple[BlockChain, nn.Module, Tensor]:
    """A calibrated ViT, to be copied; the same float model of timm; images."""
    recipe, x = quick("qdrop", w_bits=3, a_bits=3), images(24)
    chain = chain_of(vit(2), recipe)
    calibrate(chain, x, recipe)
    set_quantized(chain, False)
    return chain, vit(2), x


def trainer(recipe: Recipe, index: int = 2, engine: Engine = "fused") -> BlockTrainer:
    """At segment ``index`` of the ViT; segment 0 is the patch embedding."""
    chain, _, x = calibrated()
    chain = copy.deepcopy(chain)
    tape = Tape(chain, x, Storage("device", CPU), with_prefix=True, batch_size=8)
    features = tape.features(Samples(x))
    for _ in range(index):
        tape.advance()
    tape.compute_target()
    divergence = ClassifierDivergence(recipe.temperature)
    objective = BlockObjective(chain, tape, recipe, features, divergence, [])
    return BlockTrainer(chain.segment(index), objective, engine)


def everything(**changes: object) -> Recipe:
    """Batches of all images, nothing dropped, inputs not mixed."""
    all_of: dict[str, object] = {"batch_size": 24, "activation_prob": 1.0, "prefix_prob": 0.0}
    return quick("glfq", **{**all_of, "steps": 20, "w_bits": 3, "a_bits": 3, **changes})


def feature_of(model: nn.Module, image: Tensor, number: int, output: Tensor) -> Tensor:
    """timm's own feature before the classifier, with the output of a block replaced."""
    handle = model.blocks[number].register_forward_hook(lambda *_: output)
    feature: Tensor = model.forward_head(model.forward_features(image), pre_logits=True)
    handle.remove()
    return feature


def parts_of(made: BlockTrainer, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors of block 1's output and of the feature, in a loop over the samples."""
    _, model, x = calibrated()
    tape, state = made.objective.tape, made.state
    tensors = state.layout.tensors(soft, state.scales.detach(), made.schedule.keys[0])
    near, far = [], []
    assert tape.target is not None
    for number, image in enumerate(x):
        output = functional_call(made.segment.block, tensors, (tape.full[number],))
        expected = model.forward_head(model.forward_features(image[None]), pre_logits=True)
        near.append((output - tape.target[number]).square().sum())
        far.append((feature_of(model, image[None], 1, output) - expected).square().sum())
    return torch.stack(near).mean(), torch.stack(far).mean()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weight", [2.0, 0.0])
def test_two_steps_by_hand(engine: Engine, weight: float) -> None:
    """Loss, gradient and Adam's first move of the weights; the second loss is over the first."""
    made = trainer(everything(glf_weight=weight, lr_weight=1e-3), engine=engine)
    state = made.state
    assert state.rounding is not None
    soft, before = state.soft.clone().requires_grad_(True), state.rounding.vectors[0].clone()
    first = parts_of(made, soft)
    total = weight * first[0] / first[0].detach() + first[1] / first[1].detach()
    (slope,) = torch.autograd.grad(total, soft)
    off = torch.tensor(0.0)
    slope = state.rounding.vectors.gradient(slope, off, off)
    assert float(made.step(0)) == pytest.approx(weight + 1, rel=1e-5)
    assert made.objective.state.starts.tolist() == pytest.approx(
        [float(part.detach()) for part in first], rel=1e-3
    )
    made._step.finish()
    moved = state.rounding.vectors[0] - before
    large = slope.abs() > 1e-3 * slope.abs().max()
    assert float(large.double().mean()) > 0.5
    assert torch.allclose(moved[large], -1e-3 * slope[large].sign(), rtol=1e-3, atol=1e-6)
    assert not moved[slope == 0].any()
    with torch.no_grad():
        second = parts_of(made, state.soft)
    expected = weight * second[0] / first[0] + second[1] / first[1]
    assert float(made.step(1)) == pytest.approx(float(expected.detach()), rel=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_codes_are_those_of_the_learned_weights_and_the_float_weights_stay(engine: Engine) -> None:
    """At a rate of almost 0 the codes are rounded to nearest; at a larger one some change."""
    changed = []
    for rate in (1e-30, 1e-2):
        made = trainer(everything(lr_weight=rate, lr_scale=1e-30), engine=engine)
        layers = made.state.layers
        weights = [layer.weight.clone() for layer in layers]
        for number in range(3):
            made.step(number)
        made.finish()
        differ = 0
        for layer, weight in zip(layers, weights, strict=True):
            assert torch.equal(layer.weight, weight)
            own = layer.weight_quantizer
            nearest = (torch.round(weight.flatten(1) / own.scale) + own.zero_point).clamp(0, 7)
            assert own.codes.shape == nearest.shape
            differ += int((own.codes != nearest).sum())
        changed.append(differ)
    assert changed[0] == 0
    assert changed[1] > 100


@pytest.mark.parametrize("learning", ["straight-through", "rounding"])
def test_the_loss_falls(learning: str) -> None:
    rates = {"lr_weight": 3e-3, "lr_alpha": 0.05, "round_weight": 0.0}
    made = trainer(everything(steps=40, weight_learning=learning, **rates))
    assert made.objective.kind == "glf"
    losses = [float(made.step(number)) for number in range(40)]
    assert losses[0] == pytest.approx(3.0, rel=1e-5)
    assert losses[-1] < 0.7 * losses[0]


def test_rate_of_the_weights_falls_by_a_cosine_to_zero() -> None:
    recipe = everything(lr_weight=1e-3, lr_scale=2e-3)
    sizes = trainer(recipe).schedule.rates[:, 2:4]
    assert torch.allclose(2 * sizes[:, 0], sizes[:, 1], rtol=1e-6)
    assert float(sizes[0, 0]) == pytest.approx(1e-2)  # over the first bias correction, 0.1


def test_kinds_of_losses() -> None:
    """A head keeps its divergence, a projection behind the feature has the squared error."""
    assert not takes_passes("glf")
    assert trainer(everything(), index=0).objective.kind == "glf"
    head = trainer(everything(), index=3).objective
    assert (head.kind, head.rest) == ("head", None)
    chain, recipe = line("block", "block", "projection"), everything()
    tape = Tape(chain, torch.ones(4, 3), Storage("device", CPU), with_prefix=True)
    kinds = []
    for _ in chain:
        tape.compute_target()
        divergence = Measured(lambda outputs, reference: (outputs - reference).sum())
        objective = BlockObjective(chain, tape, recipe, torch.ones(4, 3), divergence, [])
        kinds.append(objective.kind)
        if tape.index < 2:
            tape.advance()
    assert kinds == ["glf", "glf", "mse"]


def line(*kinds: Kind) -> BlockChain:
    """Segments of single linear layers."""
    torch.manual_seed(0)
    named = enumerate(kinds)
    return BlockChain([Segment(str(number), kind, nn.Linear(3, 3)) for number, kind in named])


@pytest.mark.parametrize(
    ("kinds", "end"),
    [
        (("block", "head"), 1), (("block", "projection", "projection"), 2),
        (("block", "block"), 2), (("block", "neck", "predictor", "predictor"), 2),
    ],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_the_feature_ends_before_the_last_projection_or_the_first_predictor(
    kinds: tuple[Kind, ...], end: int
) -> None:
    chain, x = line(*kinds), torch.randn(2, 3)
    assert chain.feature_end == end
    expected = x
    for segment in list(chain)[:end]:
        expected = segment.block(expected)
    assert torch.equal(chain.tail(0, x, feature=True), expected)


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
@pytest.mark.parametrize("name", ["vit", "deit", "swin"])
@torch.no_grad()
def test_features_are_timms_own(name: str, placement: Placement) -> None:
    """The pooled features of a Swin and of a ViT; the two tokens of a DeiT, which timm averages."""
    builders: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "vit": (lambda: vit(2, global_pool="avg"), 32), "deit": (deit, 32), "swin": (swin, 40),
    }  # fmt: skip
    build, size = builders[name]
    x, model, chain = images(5, size), build(), chain_of(build(), quick())
    tape = Tape(chain, x, Storage(placement, CPU), with_prefix=True, batch_size=2)
    found = tape.features(Samples(x)).whole
    if name == "deit":
        found = found.mean(1)
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
