"""Closed-form roundings along chains of all kinds, and learned rounding that starts from them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from small_models import chain_of, images, quick, swin, vit
from small_pyramid import Positions, pyramid, varied
from torch import Tensor, nn

from fimaq_core import load, quantize
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.calibration.closed_form import LayerMoments, round_layer
from fimaq_core.chain import BlockChain
from fimaq_core.errors import NumericsError
from fimaq_core.fisher.divergence import ClassifierDivergence, Divergence
from fimaq_core.layers import WeightLayer, quant_layers, set_quantized
from fimaq_core.pipeline import quantize_chain
from fimaq_core.quantizers.rounding import soft_rounding
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.log import ReconstructionLog
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.schedule import regulariser_exponent
from fimaq_core.reconstruction.starts import round_block, round_closed_form
from fimaq_core.reconstruction.tape import Storage, Tape
from fimaq_core.resources import Resources
from fimaq_core.samples import Samples

STARTS = ("gptq", "gptaq")
#: One step that changes nothing: the codes at the end are those at the start.
STILL: dict[str, object] = {
    "steps": 1, "lr_alpha": 1e-9, "learn_scales": False, "loss": "mse", "per_token": False
}  # fmt: skip


class Model(NamedTuple):
    chain: Callable[[Recipe], BlockChain]
    images: Samples
    divergence: Divergence
    changes: dict[str, object]


MODELS = {
    "vit": Model(
        lambda recipe: chain_of(vit(2), recipe), Samples(images(8)), ClassifierDivergence(20.0), {}
    ),
    "swin": Model(
        lambda recipe: chain_of(swin(40), recipe),
        Samples(images(8, 40)),
        ClassifierDivergence(20.0),
        {},
    ),
    "pyramid": Model(pyramid, varied(3), Positions(), {"batch_size": 1}),
}
starts = pytest.mark.parametrize("start", STARTS)
models = pytest.mark.parametrize(
    ("name", "start"),
    [(name, start) for name in MODELS for start in STARTS if (name, start) != ("swin", "gptq")],
)


@functools.cache
def finished(name: str, method: str, **changes: object) -> tuple[BlockChain, ReconstructionLog]:
    model = MODELS[name]
    few: dict[str, object] = {"calibration_images": 8, "w_bits": 3, "a_bits": 4}
    recipe = quick(method, **few, **model.changes, **changes)
    chain = model.chain(recipe)
    log = quantize_chain(chain, model.images, recipe, model.divergence, Resources(batch_size=8))
    return chain, log


def weight_layers(chain: BlockChain) -> dict[str, WeightLayer]:
    return {name: layer for name, layer in quant_layers(chain) if isinstance(layer, WeightLayer)}


def codes_of(chain: BlockChain) -> dict[str, Tensor]:
    return {name: layer.weight_quantizer.codes for name, layer in weight_layers(chain).items()}


def assert_same_codes(found: BlockChain, expected: BlockChain) -> None:
    theirs = codes_of(expected)
    for name, codes in codes_of(found).items():
        assert codes.numel()
        assert torch.equal(codes, theirs[name]), name


@torch.no_grad()
def inputs_of(chain: BlockChain, samples: Samples, on: bool) -> dict[str, list[Tensor]]:
    """Inputs of all calls of every layer in plain runs of the whole chain."""
    seen: dict[str, list[Tensor]] = {name: [] for name in weight_layers(chain)}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, args: seen[name].append(args[0])

    handles = [
        layer.register_forward_pre_hook(hook(name)) for name, layer in weight_layers(chain).items()
    ]
    set_quantized(chain, on)
    for part in samples.batches(8):
        chain(part)
    for handle in handles:
        handle.remove()
    return seen


@models
def test_codes_follow_from_the_finished_chain(name: str, start: str) -> None:
    """The codes of a layer change only later layers, so plain runs show each layer's inputs."""
    chain, _ = finished(name, start)
    samples = MODELS[name].images
    hats, plains = (inputs_of(chain, samples, on) for on in (True, False))
    changed = 0
    for key, layer in weight_layers(chain).items():
        moments = LayerMoments(layer)
        for hat, plain in zip(hats[key], plains[key], strict=True):
            moments.add(hat, plain if start == "gptaq" else None)
        found, quantizer = layer.weight_quantizer.codes, layer.weight_quantizer
        expected = round_layer(moments, 0.01, asymmetric=start == "gptaq").codes
        assert torch.equal(found.float(), expected)
        rounded = (layer.weight.flatten(1) / quantizer.scale).round() + quantizer.zero_point
        changed += int((rounded.clamp(0, quantizer.levels - 1) != found).sum())
    assert changed > 0.05 * sum(codes.numel() for codes in codes_of(chain).values())


@models
def test_a_reconstruction_that_learns_nothing_keeps_the_codes_of_its_start(
    name: str, start: str
) -> None:
    """Also in parts that are not reconstructed: embedding, head, predictor."""
    expected, _ = finished(name, start)
    changes = {"start": start, "reconstruct_parts": "blocks" if name == "swin" else "all"}
    chain, log = finished(name, "qdrop", **STILL, **changes)
    assert log.last_loss
    assert_same_codes(chain, expected)


@torch.no_grad()
def block_errors(chain: BlockChain, samples: Samples) -> list[float]:
    tape = Tape(chain, samples, Storage("device", torch.device("cpu")), with_prefix=True)
    errors = []
    for index in range(len(chain)):
        errors.append(tape.measure())
        if index + 1 < len(chain):
            tape.advance()
    return errors


def test_errors_behind_all_blocks_are_below_those_of_rounding_to_nearest() -> None:
    samples = Samples(images(64))
    recipe = quick("gptq", w_bits=3, a_bits=6)
    chain = chain_of(vit(2), recipe)
    calibrate(chain, samples, recipe)
    set_quantized(chain, False)
    errors = {"nearest": block_errors(chain, samples)}
    for start in STARTS:
        changed = recipe.model_copy(update={"start": start})
        round_closed_form(chain, samples, changed, resources=Resources(), notes=[])
        set_quantized(chain, False)
        errors[start] = block_errors(chain, samples)
    for start in STARTS:
        assert all(a < b for a, b in zip(errors[start], errors["nearest"], strict=True))
    assert errors["gptaq"][-1] < 0.7 * errors["nearest"][-1]


def trainer(recipe: Recipe) -> BlockTrainer:
    """At the first block of a calibrated ViT."""
    chain, samples = chain_of(vit(1), recipe), Samples(images(8))
    calibrate(chain, samples, recipe)
    set_quantized(chain, False)
    tape = Tape(chain, samples, Storage("device", torch.device("cpu")), with_prefix=True)
    tape.advance()
    tape.compute_target()
    reference = torch.zeros(8, 10)
    objective = BlockObjective(chain, tape, recipe, reference, ClassifierDivergence(20.0), [])
    return BlockTrainer(chain.segment(1), objective)


def test_learned_rounding_starts_at_the_two_neighbours_of_the_compensated_weight() -> None:
    """h is 0.9 or 0.1 on the side of the code; the other choice is the weight's other neighbour."""
    run = trainer(quick("qdrop", start="gptq", w_bits=3))
    rounding = run.state.rounding
    assert rounding is not None
    h = soft_rounding(rounding.alpha)
    assert torch.allclose((h - 0.5).abs(), torch.tensor(0.4), atol=1e-6)
    run.state.detach()
    compensated = round_block(run.objective.tape, run.recipe, notes=[])
    for layer, base, up, codes, weight in zip(
        run.state.layers,
        rounding.split(rounding.base),
        rounding.split(h > 0.5),
        rounding.codes(),
        compensated,
        strict=True,
    ):
        quantizer = layer.weight_quantizer
        assert torch.equal(codes, quantizer.codes.float())
        ratio = weight.flatten(1) / quantizer.scale + quantizer.zero_point
        inside = (ratio > 0) & (ratio < quantizer.levels - 1)
        low = base.flatten(1)[inside]
        assert bool((low <= ratio[inside] + 1e-4).all())
        assert bool((low + 1 >= ratio[inside] - 1e-4).all())
        assert torch.equal(low + up.flatten(1)[inside], codes[inside])


def test_the_regulariser_acts_from_the_first_step() -> None:
    recipe = quick("qdrop", start="gptaq", steps=100)
    betas = [regulariser_exponent(recipe, number) for number in range(100)]
    assert betas[0] == pytest.approx(20 - 0.18)
    assert betas[-1] == pytest.approx(2.0)
    assert (trainer(recipe).schedule.rates[:, 0] > 0).all()


def test_near_singular_inputs_leave_a_note() -> None:
    _, log = finished("vit", "gptq", start_damp=1e-25)
    assert log.notes
    assert all("near singular, so start_damp was" in note for note in log.notes)


def test_images_that_are_not_finite_are_named_with_the_layer() -> None:
    """Ranges come from the first images only, and calibration checks only these."""
    recipe, x = quick("gptq", range_images=4), images(8)
    x[-1, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"^patch_embed.*: its inputs are NaN or infinite"):
        quantize_chain(chain_of(vit(1), recipe), Samples(x), recipe, ClassifierDivergence(20.0))


def own_module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.GELU()),
        nn.Sequential(nn.Flatten(2), nn.Linear(64, 16), nn.GELU(), nn.Flatten()),
        nn.Linear(128, 5),
    )


@starts
def test_quantize_takes_the_methods_for_a_module_of_ones_own(start: str, tmp_path: Path) -> None:
    model, x = own_module(), images(16)
    blocks, head = list(model)[:2], model[2]
    q = quantize(
        model, x, method=start, w_bits=4, a_bits=6, blocks=blocks, head=head, progress=False
    )
    assert not q.recipe.reconstruct
    assert all(codes.numel() for codes in codes_of(q.chain).values())
    with torch.no_grad():
        assert (q(x) - model(x)).norm() < 0.5 * model(x).norm()
    q.save(tmp_path / "q.safetensors")
    again = load(tmp_path / "q.safetensors", model, blocks=blocks, head=head)
    with torch.no_grad():
        assert torch.equal(again(x), q(x))
