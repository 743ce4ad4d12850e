"""Joint finishing: what it trains, on which objective, and that it never ends worse."""

import copy
from pathlib import Path

import pytest
import torch
from small_models import Measured, chain_of, images, quick, swin, vit
from small_pyramid import Positions, pyramid, varied
from staged import run_stage
from torch import Tensor, nn
from torch.nn import functional as F

from fimaq_core import load, quantize
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.checkpoint import Fingerprint, read_header
from fimaq_core.errors import CheckpointError, NumericsError, RecipeError
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import QuantLinear, WeightLayer, quant_layers, set_quantized
from fimaq_core.pipeline import CALIBRATE, FINISH, freeze, quantize_chain
from fimaq_core.quantizers.activation import ActivationQuantizer
from fimaq_core.quantizers.affine import WeightQuantizer
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.finish import (
    FinishObjective,
    finish,
    output_and_feature,
    trained_tensors,
)
from fimaq_core.reconstruction.state import SCALE_FLOOR
from fimaq_core.samples import Samples
from fimaq_core.store import Part

X, HELD = images(24), 8
D = ClassifierDivergence(20.0)
FEW = {"finish_steps": 12, "finish_batch": 8, "finish_held_out": HELD, "w_bits": 3, "a_bits": 3}
FEW |= {"range_candidates": 16, "finish_lr": 2e-3, "finish_lr_scale": 2e-4}


def calibrated(method: str = "rtn", **changes: object) -> tuple[BlockChain, Recipe]:
    """Return a quantized chain before finishing, with decided codes, and the recipe."""
    recipe = quick(method, **{**FEW, **changes})
    chain = chain_of(vit(), recipe)
    quantize_chain(chain, Samples(X), recipe.unfinished(), D)
    return chain, recipe


def by_hand(chain: BlockChain, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(f || q) and the squared error of the head's inputs, with a plain hook each."""
    seen: list[Tensor] = []
    heads = chain.segment(len(chain) - 1).block, model.get_submodule("head")
    hooks = [one.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for one in heads]
    found = chain(x).log_softmax(1)
    with torch.no_grad():
        wanted = model(x).softmax(1)
    for hook in hooks:
        hook.remove()
    kl = (wanted * (wanted.log() - found)).sum(1).mean()
    return kl, F.mse_loss(seen[0], seen[1])


def state_of(chain: BlockChain) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in chain.state_dict().items()}


@pytest.mark.parametrize("method", ["rtn", "fimaq", "erq", "adalog"])
def test_the_objective_on_held_out_images_falls(method: str) -> None:
    chain, recipe = calibrated(method)
    before = state_of(chain)
    with torch.no_grad():
        start = by_hand(chain, vit(), X[-HELD:])
        found = finish(chain, X, recipe, D)
        end = by_hand(chain, vit(), X[-HELD:])
    value = sum(float(now / then) for now, then in zip(end, start, strict=True))
    assert found.start == pytest.approx(2)
    assert found.best == pytest.approx(value, rel=1e-3)
    assert found.best < 2
    assert 0 < found.step <= found.steps == 12
    after = chain.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert not [name for name in changed if name.endswith(("codes", "zero_point", "step"))]
    assert not [name for name in changed if "weight_quantizer" in name]
    # The float weights stay too: norms, biases and activation scales are the rest.
    weights = [name for name, one in chain.named_parameters() if one.ndim > 1]
    assert not changed & {name for name in weights if not name.endswith("scale")}
    assert {"segments.1.block.norm1.weight", "segments.1.block.norm1.bias"} <= changed
    assert "segments.1.block.attn.qkv.input_quantizer.scale" in changed
    # ERQ refits biases, and AdaLog folds a shift into them: the quantized form has its own.
    for name, own in (("attn.qkv", method == "erq"), ("mlp.fc2", method in ("erq", "adalog"))):
        assert (f"segments.1.block.{name}.quantized_bias" in changed) == own
        assert (f"segments.1.block.{name}.bias" in changed) != own
    assert not any(value.requires_grad for value in chain.parameters())
    assert all(one.learning is None for one in chain.modules() if hasattr(one, "learning"))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("rtn", {"rotate": "hadamard", "finish_lr": 1e-3}),
        ("gptq", {}),
        ("glfq", {"reconstruct_mlp": False, "steps": 2}),
    ],
)
def test_other_parts_go_before(method: str, changes: dict[str, object]) -> None:
    chain, recipe = calibrated(method, **changes)
    before = state_of(chain)
    assert finish(chain, X, recipe, D).best < 2
    after, names = chain.state_dict(), [name for name in before if name.endswith("codes")]
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert not torch.equal(after["segments.3.block.bias"], before["segments.3.block.bias"])


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_the_start_is_kept_if_no_step_is_better(rate: float) -> None:
    chain, recipe = calibrated(finish_lr=rate, finish_lr_scale=rate, finish_weight_scales=True)
    before = state_of(chain)
    found = finish(chain, X, recipe, D)
    assert (found.step, found.best) == (0, found.start)
    assert found.sentence().endswith("2.000 -> 2.000 at step 0 of 12")
    after = chain.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_feature_of_a_swin_is_the_pooled_one() -> None:
    """The loss ``glf`` has the same feature."""
    model, x = swin(40), images(2, size=40)
    chain = chain_of(swin(40), quick("rtn"))
    with torch.no_grad():
        output, feature = output_and_feature(chain, x)
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert torch.allclose(feature, pooled, atol=1e-5)
        assert torch.equal(feature, chain.tail(0, x, feature=True))
        assert torch.allclose(output, model(x), atol=1e-5)


@pytest.mark.parametrize("method", ["rtn", "adalog"])
def test_the_gradient_is_that_of_the_definition(method: str) -> None:
    chain, _ = calibrated(method)
    rows = torch.tensor([3, 0, 11, 6])
    objective = FinishObjective(chain, Samples(X), D)
    objective.begin(range(16, 24), 8)
    variables = [one.requires_grad_() for group in trained_tensors(chain, True) for one in group]
    for module in chain.modules():
        if isinstance(module, ActivationQuantizer) and not isinstance(module, WeightQuantizer):
            module.learning = "fused"
    found = torch.autograd.grad(objective.value(objective.terms(rows)), variables)
    for module in chain.modules():
        if isinstance(module, ActivationQuantizer) and not isinstance(module, WeightQuantizer):
            module.learning = "textbook"
    parts = by_hand(chain, vit(), X[rows])
    loss = sum(part / float(start) for part, start in zip(parts, objective.starts, strict=True))
    wanted = torch.autograd.grad(loss, variables)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    assert sum(float(one.abs().sum()) > 0 for one in found) > 30


def test_constant_weights_are_those_of_the_codes() -> None:
    chain, recipe = calibrated()
    with torch.no_grad():
        expected = chain(X)
    layers = [layer for _, layer in quant_layers(chain) if isinstance(layer, WeightLayer)]
    weights = [layer.weight for layer in layers]
    finish(chain, X, recipe.model_copy(update={"finish_lr": 1e3}), D)
    assert all(layer.weight is old for layer, old in zip(layers, weights, strict=True))
    assert not any(layer.soft for layer in layers)
    with torch.no_grad():
        assert torch.equal(chain(X), expected)


def test_scales_of_weights_are_trained_on_request(tmp_path: Path) -> None:
    settings = {"steps": 3, "calibration_images": 24, "range_images": 8, "range_candidates": 16}
    own = {**settings, **FEW, "finish_weight_scales": True}
    model = vit()
    found = quantize(model, X, method="rtn", progress=False, **own)
    plain = quantize(model, X, method="rtn", progress=False, **{**own, "finish_steps": 0})
    theirs = plain.state_dict()
    for name, value in found.state_dict().items():
        if name.endswith("weight_quantizer.scale"):
            assert not torch.equal(value, theirs[name])
        if name.endswith("codes"):
            assert torch.equal(value, theirs[name])
    assert found.notes[-1].startswith("finishing: held-out objective 2.000 -> ")
    found.save(tmp_path / "q.safetensors")
    again = load(tmp_path / "q.safetensors", model)
    with torch.no_grad():
        assert torch.equal(again(X), found(X))
    assert again.notes == found.notes


def test_scales_stay_above_their_bound() -> None:
    chain, recipe = calibrated(finish_lr_scale=10.0, finish_lr=1e-12)
    low: list[bool] = []
    _, scales = trained_tensors(chain, False)
    floors = [SCALE_FLOOR * scale.detach().clone() for scale in scales]

    def look(*_: object) -> None:
        low.extend(bool((one < least).any()) for one, least in zip(scales, floors, strict=True))

    chain.segment(0).block.register_forward_hook(look)
    finish(chain, X, recipe, D)
    assert low
    assert not any(low)


def test_batches_of_a_divergence_that_compares_samples() -> None:
    sizes: list[int] = []

    def distance(outputs: Tensor, reference: Tensor) -> Tensor:
        sizes.append(len(outputs))
        return (outputs - reference).square().sum()

    chain, recipe = calibrated()
    finish(chain, X, recipe, Measured(distance, batch=3))
    assert sizes.count(2) == 13  # the last two of eight held-out images: at the start and 12 times
    assert set(sizes) == {2, 3}


def test_images_of_varying_sizes_and_predictors() -> None:
    recipe = quick("rtn", **{**FEW, "finish_held_out": 2, "calibration_images": 5})
    chain, samples = pyramid(recipe), varied()
    quantize_chain(chain, samples, recipe.unfinished(), Positions())
    before, predictor = state_of(chain), chain.segment(len(chain) - 1)
    assert predictor.kind == "predictor"
    found = finish(chain, samples, recipe, Positions())
    assert found.best < found.start == pytest.approx(2)
    names = {name for name, _ in chain.named_parameters()}
    after = chain.state_dict()
    changed = {name for name in names if not torch.equal(after[name], before[name])}
    assert changed
    assert not [name for name in changed if name.startswith(f"segments.{len(chain) - 1}.")]
    alone = BlockChain([Segment("head", "predictor", predictor.block)])
    assert not FINISH.wanted(Part(alone, samples, recipe, Positions()))


def test_a_stage_with_a_file(tmp_path: Path) -> None:
    recipe, file = quick("rtn", **FEW), tmp_path / "finished.safetensors"
    mark = Fingerprint(weights="w", calibration="c", recipe=recipe)

    def part() -> Part:
        made = Part(chain_of(vit(), recipe), Samples(X), recipe, D, mark)
        run_stage(CALIBRATE, made, tmp_path / "ranges.safetensors")
        freeze(made.chain)
        return made

    first, second = part(), part()
    assert not run_stage(FINISH, first, file)
    assert run_stage(FINISH, second, file)
    assert first.log == second.log
    assert first.finishing == second.finishing
    with torch.no_grad():
        assert torch.equal(first.chain(X), second.chain(X))
    assert read_header(file)[1]["stage"] == "finished"
    with pytest.raises(CheckpointError, match="its stage is 'finished', here 'calibrated'"):
        run_stage(CALIBRATE, part(), file)
    (tmp_path / "ranges.safetensors").replace(file)
    with pytest.raises(CheckpointError, match="its stage is 'calibrated', here 'finished'"):
        run_stage(FINISH, second, file)


def test_too_few_images_get_one_message() -> None:
    chain, recipe = calibrated()
    with pytest.raises(RecipeError, match="15 calibration images are fewer than twice the 8"):
        finish(chain, X[:15], recipe, D)
    with pytest.raises(RecipeError, match="trains on 16 images, fewer than a batch of 17"):
        finish(chain, X, recipe.model_copy(update={"finish_batch": 17}), D)


def test_broken_outputs_are_not_finished() -> None:
    chain, recipe = calibrated()
    chain.segment(1).block.norm1.weight.data[0] = float("nan")
    teacher = chain_of(vit(), recipe)
    with pytest.raises(NumericsError, match="NaN or infinite"):
        finish(chain, X, recipe, D, teacher=teacher)


def test_numbers_are_lowered_to_the_given_images() -> None:
    few = {**FEW, "finish_held_out": 64, "finish_batch": 32, "range_images": 8}
    found = quantize(vit(), X[:7], method="rtn", progress=False, **few)
    assert (found.recipe.finish_held_out, found.recipe.finish_batch) == (3, 4)
    assert "finish_held_out 3 instead of 64, finish_batch 4 instead of 32" in found.notes[0]
    plain = quantize(vit(), X[:7], method="rtn", progress=False, range_images=8)
    assert plain.recipe == plain.recipe.unfinished()


def test_the_teacher_is_the_model_before_its_mlps_changed() -> None:
    recipe = quick("rtn", **FEW, reconstruct_mlp=True, mlp_steps=3, mlp_batch=8)
    model, chain = vit(), chain_of(vit(), recipe)
    log = quantize_chain(chain, Samples(X), recipe, D)
    assert log.notes[-1].startswith("finishing: ")
    teacher = chain_of(copy.deepcopy(model), recipe)
    set_quantized(teacher, False)
    objective = FinishObjective(chain, Samples(X), D, teacher=teacher)
    assert torch.allclose(objective.reference.whole, model(X), atol=1e-5)


def test_nothing_to_improve_changes_nothing() -> None:
    chain, recipe = calibrated("rtn", w_bits=32, a_bits=32)
    before = state_of(chain)
    found = finish(chain, X, recipe, D)
    assert (found.start, found.step) == (0, 0)
    after = chain.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert isinstance(chain.segment(3).block, QuantLinear)
