"""A teacher apart from the chain that is quantized: what of the tape and of the passes is whose."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import chain_of, images, quick, swin, vit
from torch import Tensor, nn

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.fisher.divergence import ClassifierDivergence, kl_divergence
from fimaq_core.layers import set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction import reconstruct as reconstruct_module
from fimaq_core.reconstruction.mlp import mlps, use_relu
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.reconstruct import reconstruct
from fimaq_core.reconstruction.tape import Placement, Storage, Tape
from fimaq_core.resources import Resources
from fimaq_core.samples import Samples

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
KL = ClassifierDivergence(20.0)
BUILDERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (lambda: vit(3), 32),
    "swin": (lambda: swin(40), 40),
}


def pair(recipe: Recipe, name: str = "vit") -> tuple[BlockChain, BlockChain, Tensor]:
    """A calibrated chain with ReLU and other MLP weights than the teacher; the teacher; images."""
    build, size = BUILDERS[name]
    teacher, chain, x = chain_of(build(), recipe), chain_of(build(), recipe), images(16, size)
    use_relu(chain)
    with torch.no_grad():
        for parameter in mlps(chain).parameters():
            parameter.mul_(1.2)
    calibrate(chain, x, recipe)
    set_quantized(chain, False)
    set_quantized(teacher, False)
    return chain, teacher, x


@torch.no_grad()
def block_inputs(chain: BlockChain, x: Tensor) -> list[Tensor]:
    """Inputs of each block, and the model's outputs at the end."""
    found = []
    for segment in chain:
        found.append(segment.before(x))
        x = segment.block(found[-1])
    return [*found, x]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
@pytest.mark.parametrize("name", BUILDERS)
def test_targets_and_inputs_are_the_teachers_and_the_prefix_is_the_chains(
    name: str, placement: Placement
) -> None:
    recipe = quick()
    chain, teacher, x = pair(recipe, name)
    expected = block_inputs(teacher, x)
    tape = Tape(chain, x, Storage(placement, CPU), with_prefix=True, batch_size=7, teacher=teacher)
    assert tape.prefix is tape.full
    seen = []
    for index in range(len(chain)):
        target = tape.compute_target().whole.clone()
        with torch.no_grad():
            assert same(target, teacher.segment(index).block(expected[index]))
        assert same(tape.full.whole, expected[index])
        assert tape.prefix is not None
        seen.append(tape.prefix.whole.clone())
        if index + 1 < len(chain):
            tape.advance()
    # Each block was left quantized: the chain is now the quantized model but for its last block.
    prefixes = block_inputs(chain, x)
    own = block_inputs(chain_of_full(chain), x)
    for index, prefix in enumerate(seen):
        assert same(prefix, prefixes[index])
        if index > 1:
            assert float((prefix - expected[index]).square().mean()) > 1e-4
            assert not torch.allclose(own[index], expected[index], atol=0.1)


def chain_of_full(chain: BlockChain) -> BlockChain:
    """A copy without quantizers."""
    copied = copy.deepcopy(chain)
    set_quantized(copied, False)
    return copied


def at_block(
    recipe: Recipe, index: int = 2
) -> tuple[BlockObjective, Tape, Callable[[Tensor], Tensor]]:
    """The objective at a block with a teacher, and the block as a pass runs it."""
    chain, teacher, x = pair(recipe)
    with torch.no_grad():
        reference = teacher(x)
    tape = Tape(chain, x, Storage("device", CPU), with_prefix=True, batch_size=8, teacher=teacher)
    for _ in range(index):
        tape.advance()
    tape.compute_target()
    objective = BlockObjective(chain, tape, recipe, reference, KL, [])
    block = chain.segment(index).block
    set_quantized(block, True)
    return objective, tape, block


def slope(model: BlockChain, tape: Tape, output: Tensor, reference: Tensor) -> Tensor:
    """Gradient of each sample's divergence at the block's output, through ``model``, (n, N)."""
    leaf = output.detach().clone().requires_grad_(True)
    value = kl_divergence(model.tail(tape.index + 1, leaf), reference, 20.0) * len(output)
    return torch.autograd.grad(value, leaf)[0].flatten(1)


def agree(found: Tensor, expected: Tensor, other: Tensor) -> None:
    """Check ``found`` against ``expected`` (equal) and the chain's own tail (different)."""
    scale = float(expected.abs().max())
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * scale)
    assert not torch.allclose(found, other, rtol=0.05, atol=0.05 * scale)


def test_fisher_passes_go_through_the_teachers_tail() -> None:
    """The block's output is the chain's, quantized; the rest, and the error, is the teacher's."""
    objective, tape, block = at_block(quick(loss="fisher_diag", fisher_k=1))
    objective.update(block)
    with torch.no_grad():
        output = block(tape.full.whole)
    reference = objective.reference.whole
    expected, other = (
        slope(model, tape, output, reference).abs().mean(0) for model in (tape.teacher, tape.chain)
    )
    assert objective.state.diagonal is not None
    agree(objective.state.diagonal, expected, other)
    assert tape.target is not None
    assert same(objective._errors[0], (output - tape.target.whole).abs().mean(0).flatten())


def test_the_least_squares_pass_goes_through_the_teachers_tail() -> None:
    objective, tape, block = at_block(quick(loss="least_squares"))
    objective.update(block)
    with torch.no_grad():
        output = block(tape.full.whole)
    assert tape.target is not None
    delta = (output - tape.target.whole).flatten(1)
    expected, other = (
        ((g := slope(model, tape, output, objective.reference.whole)) * delta).sum(0).clamp(min=0)
        / delta.square().sum(0)
        for model in (tape.teacher, tape.chain)
    )
    assert float(g.abs().max()) > 0
    assert objective.state.diagonal is not None
    agree(objective.state.diagonal, expected, other)


def test_brecqs_pass_takes_the_chains_prefix_through_the_teachers_block_and_tail() -> None:
    objective, tape, _ = at_block(quick(loss="fisher_brecq"))
    assert tape.prefix is not None
    found = []
    for model in (tape.teacher, tape.chain):
        set_quantized(model, False)
        with torch.no_grad():
            output = model.segment(tape.index).block(tape.prefix.whole)
        found.append(slope(model, tape, output, objective.reference.whole))
    assert objective.weights is not None
    agree(objective.weights.whole, *found)


@pytest.mark.parametrize("name", ["perturb", "perturb_mean"])
def test_perturbation_passes_go_through_the_teachers_tail(name: str) -> None:
    """In a transformer it is only rounding, but the same rounding."""
    objective, tape, _ = at_block(quick(loss=name))
    assert tape.target is not None
    found = []
    for model in (tape.teacher, tape.chain):
        parts = [
            (
                slope(model, tape, z + 1e-6, reference) - slope(model, tape, z - 1e-6, reference)
            ).abs()
            for z, reference in zip(
                tape.target.whole.split(8), objective.reference.whole.split(8), strict=True
            )
        ]
        found.append(torch.cat(parts))
    if name == "perturb":
        assert objective.weights is not None
        assert torch.equal(objective.weights.whole, found[0])
        assert not torch.equal(objective.weights.whole, found[1])
    else:
        assert objective.state.diagonal is not None
        assert torch.allclose(objective.state.diagonal, found[0].mean(0), rtol=1e-5, atol=0)
        assert not torch.allclose(objective.state.diagonal, found[1].mean(0), rtol=0.1, atol=0)


def test_predictions_are_the_teachers_from_the_block_on() -> None:
    objective, tape, _ = at_block(quick("pdquant"))
    assert objective.rest is not None
    assert tape.target is not None
    with torch.no_grad():
        assert same(objective.rest(tape.target.whole, None), objective.reference.whole)
        assert torch.equal(
            objective.rest(tape.target.whole, None), tape.teacher.tail(3, tape.target.whole)
        )
        assert not same(tape.chain.tail(3, tape.target.whole), objective.reference.whole)


@torch.no_grad()
def test_features_and_the_rest_behind_a_block_are_the_teachers() -> None:
    recipe = quick(loss="glf")
    chain, teacher, x = pair(recipe)
    tape = Tape(chain, x, Storage("device", CPU), with_prefix=True, batch_size=8, teacher=teacher)
    features = tape.features(Samples(x))
    for _ in range(2):
        tape.advance()
    target = tape.compute_target().whole
    objective = BlockObjective(chain, tape, recipe, features, KL, [])
    assert objective.rest is not None
    assert same(objective.rest(target, None, ()), features.whole)
    assert not same(chain_of_full(chain).rest(2, target, feature=True), features.whole)
    assert same(teacher.segment(4).block(features.whole), teacher(x))


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"method": "qdrop"}, {"method": "pdquant"}, {"method": "lsvit"}, {"loss": "perturb"},
        {"loss": "glf", "weight_learning": "straight-through"},
        {"loss": "perturb_mean"},
        {"loss": "fisher_brecq"}, {"method": "brecq", "reconstruct_parts": "blocks"},
    ],
    ids=str,
)  # fmt: skip
def test_a_teacher_equal_to_the_chain_changes_no_bit(changes: dict[str, Any]) -> None:
    recipe, x = quick(**changes, steps=4), images(16)
    chain = chain_of(vit(2), recipe)
    calibrate(chain, x, recipe)
    same_as_chain, alone = copy.deepcopy(chain), copy.deepcopy(chain)
    set_quantized(same_as_chain, False)
    log = reconstruct(
        chain, x, recipe, KL, resources=Resources(batch_size=8), teacher=same_as_chain
    )
    expected = reconstruct(alone, x, recipe, KL, resources=Resources(batch_size=8))
    assert (log.last_loss, log.fisher_passes, log.notes) == (
        expected.last_loss,
        expected.fisher_passes,
        expected.notes,
    )
    first, second = chain.state_dict(), alone.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_reconstruction_aims_at_the_teacher_and_leaves_it_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Targets of all blocks and the reference are the teacher's; nothing of it changes."""
    recipe = quick(steps=2)
    chain, teacher, x = pair(recipe)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    expected, seen = block_inputs(teacher, x), []
    original = reconstruct_module.optimise_block

    def look(segment: Segment, objective: BlockObjective, *args: Any) -> Tensor:
        seen.append(objective.target.whole.clone())
        assert same(objective.reference.whole, expected[-1])
        return original(segment, objective, *args)

    monkeypatch.setattr(reconstruct_module, "optimise_block", look)
    reconstruct(chain, x, recipe, KL, resources=Resources(batch_size=8), teacher=teacher)
    assert len(seen) == len(chain)
    for index, target in enumerate(seen):
        with torch.no_grad():
            assert same(target, teacher.segment(index).block(expected[index]))
    after = teacher.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(
        parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters()
    )


def test_reconstruction_brings_the_chain_nearer_to_the_teacher() -> None:
    recipe = quick("qdrop", steps=60, w_bits=3, a_bits=3)
    chain, teacher, x = pair(recipe)
    goal = block_inputs(teacher, x)[-1]
    calibrated = copy.deepcopy(chain)
    set_quantized(calibrated, True)
    reconstruct(chain, x, recipe, KL, resources=Resources(batch_size=8), teacher=teacher)
    before, after = (
        (block_inputs(model, x)[-1] - goal).square().mean() for model in (calibrated, chain)
    )
    assert float(after) < 0.8 * float(before)
