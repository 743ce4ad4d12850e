"""One block's optimisation: tables of its steps, batches, input mixing, a step's gradient."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import chain_of, images, quick, vit
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import set_quantized
from fimaq_core.quantizers.dropping import draw_keys, eager_mask
from fimaq_core.quantizers.rounding import rounding_penalty
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.engines import Engine
from fimaq_core.reconstruction.flat import FlatStep
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.schedule import (
    Schedule,
    block_generator,
    cosine_rates,
    draw_batches,
    regulariser_exponent,
)
from fimaq_core.reconstruction.step import _adam, mixed, update
from fimaq_core.reconstruction.tape import Storage, Tape
from fimaq_core.reconstruction.textbook import TextbookStep
from fimaq_core.samples import Samples

CPU = torch.device("cpu")
ENGINES: tuple[Engine, ...] = ("eager", "fused")


def trainer(recipe: Recipe, index: int = 2, engine: Engine = "fused") -> tuple[BlockTrainer, Tape]:
    """At block ``index`` of a calibrated ViT."""
    chain, x = chain_of(vit(2), recipe), images(24)
    calibrate(chain, x, recipe)
    set_quantized(chain, False)
    with torch.no_grad():
        reference = chain(x)
    with_prefix = recipe.prefix_prob > 0 or recipe.method == "pdquant"
    tape = Tape(chain, x, Storage("device", CPU), with_prefix=with_prefix, batch_size=8)
    for _ in range(index):
        tape.advance()
    tape.compute_target()
    divergence = ClassifierDivergence(recipe.temperature)
    objective = BlockObjective(chain, tape, recipe, reference, divergence, [])
    return BlockTrainer(chain.segment(index), objective, engine), tape


def schedule(recipe: Recipe, seed: int = 0) -> Schedule:
    samples = Samples(torch.empty(24, 1))
    return Schedule.build(recipe, samples, 5, torch.Generator().manual_seed(seed))


def test_regulariser_is_off_and_then_falls_linearly() -> None:
    """Off for the first fifth of the steps, then β from 20 to 2; the table says the same."""
    recipe = quick("qdrop", steps=1000)
    betas = [regulariser_exponent(recipe, number) for number in range(1000)]
    assert betas[:199] == [None] * 199
    assert betas[199] == pytest.approx(20.0)
    assert betas[599] == pytest.approx(11.0)
    assert betas[999] == pytest.approx(2.0)
    steps = [b - a for a, b in itertools.pairwise(betas[199:])]  # type: ignore[operator]
    assert steps == pytest.approx([-18 / 800] * 800)
    rates = schedule(recipe).rates
    assert rates[:, 0].tolist() == pytest.approx([0.0] * 199 + [0.01] * 801)
    assert rates[199:, 1].tolist() == pytest.approx(betas[199:], rel=1e-6)
    assert (rates[:199, 1] >= 1).all()  # a finite gradient, times 0
    without = quick("qdrop", round_weight=0.0, steps=1000)
    assert regulariser_exponent(without, 999) is None
    assert not schedule(without).rates[:, 0].any()


def test_scale_rate_falls_by_a_cosine_to_zero_and_that_of_alpha_stays() -> None:
    """Step sizes are rates over Adam's first bias correction; the second stands beside them."""
    recipe = quick("qdrop", steps=10, lr_alpha=0.02, lr_scale=1e-3)
    cosine = [1e-3 * (1 + math.cos(math.pi * number / 10)) / 2 for number in range(10)]
    assert cosine_rates(1e-3, 10) == pytest.approx(cosine)
    rates = schedule(recipe).rates
    for number, (_, _, size_alpha, size_scale, inverse) in enumerate(rates.tolist()):
        first, second = 1 - 0.9 ** (number + 1), 1 - 0.999 ** (number + 1)
        assert size_alpha == pytest.approx(0.02 / first, rel=1e-6)
        assert size_scale == pytest.approx(cosine[number] / first, rel=1e-6)
        assert inverse == pytest.approx(1 / math.sqrt(second), rel=1e-6)


@pytest.mark.parametrize("cosine", [False, True])
def test_update_equals_the_optimizer(cosine: bool) -> None:
    """PyTorch's Adam, and its cosine schedule for the scales, over the first and later steps."""
    recipe = quick("qdrop", steps=60, lr_alpha=0.02, lr_scale=1e-2)
    generator = torch.Generator().manual_seed(1)
    variable = torch.randn(500, generator=generator)
    reference = variable.clone().requires_grad_(True)
    adam = torch.optim.Adam([reference], lr=recipe.lr_scale if cosine else recipe.lr_alpha)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=60)
    moments = torch.zeros_like(variable), torch.zeros_like(variable)
    strength = 10.0 ** torch.randint(-9, 3, (500,), generator=generator)
    for row in schedule(recipe).rates:
        reference.grad = torch.randn(500, generator=generator) * strength
        _adam(variable, reference.grad, moments, row[3 if cosine else 2], row[4])
        adam.step()
        if cosine:
            scheduler.step()
        assert torch.allclose(variable, reference.detach(), rtol=0, atol=2e-6)
    assert float((variable - reference.detach()).abs().max()) < 0.001 * float(adam.defaults["lr"])


def test_batches_are_drawn_without_repetition_from_all_images() -> None:
    samples = schedule(quick("qdrop", batch_size=8, steps=30)).samples
    assert samples.shape == (30, 8)
    seen: set[int] = set()
    for batch in samples.tolist():
        assert len(set(batch)) == 8
        seen |= set(batch)
    assert seen == set(range(24))
    assert len({tuple(batch) for batch in samples.tolist()}) == 30


def test_batches_are_uniform() -> None:
    """Every image, and every pair of images, comes as often as any other."""
    steps, size, count = 6000, 3, 8
    samples = draw_batches(steps, size, count, torch.Generator().manual_seed(3))
    chosen = torch.zeros(steps, count).scatter_(1, samples, 1.0)
    together = chosen.t() @ chosen / steps
    p, pair = size / count, size * (size - 1) / (count * (count - 1))
    for i in range(count):
        for j in range(count):
            expected = p if i == j else pair
            assert abs(float(together[i, j]) - expected) < 4.5 * math.sqrt(
                expected * (1 - expected) / steps
            )
    first = torch.bincount(samples[:, 0], minlength=count) / steps
    assert (first.sub(1 / count).abs() > 0).any()


def test_many_batches_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw_batches(37, 4, 16, torch.Generator().manual_seed(0))
    monkeypatch.setattr("fimaq_core.reconstruction.schedule._DRAWS", 160)
    parts = draw_batches(37, 4, 16, torch.Generator().manual_seed(0))
    assert parts.shape == whole.shape
    assert all(len(set(row)) == 4 and set(row) <= set(range(16)) for row in parts.tolist())
    assert len({tuple(row) for row in parts.tolist()}) == 37


def test_tables_follow_their_generator() -> None:
    recipe = quick("qdrop")
    first, again, other = schedule(recipe, 1), schedule(recipe, 1), schedule(recipe, 2)
    assert torch.equal(first.samples, again.samples)
    assert torch.equal(first.keys, again.keys)
    assert not torch.equal(first.samples, other.samples)
    assert not torch.equal(first.keys, other.keys)
    assert first.keys.shape == (6, 5, 2)
    assert len({tuple(key) for key in first.keys.view(-1, 2).tolist()}) == 30


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("threshold", [0, 64, 128, 256])
def test_inputs_are_mixed_element_by_element(traced: bool, threshold: int) -> None:
    torch.manual_seed(0)
    full, prefix = torch.randn(24, 17, 33), torch.randn(24, 17, 33)
    key = draw_keys(1, torch.Generator().manual_seed(2))[0]
    found = mixed(full, prefix, key, threshold, traced)
    expected = torch.where(eager_mask(full, key, threshold, torch.bool), prefix, full)
    assert torch.equal(found, expected)
    share = float((found == prefix).double().mean())
    p = threshold / 256
    assert abs(share - p) <= 4.5 * math.sqrt(p * (1 - p) / full.numel())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_a_step_mixes_its_batch_by_the_first_stream(engine: Engine, probability: float) -> None:
    made, tape = trainer(quick("qdrop", prefix_prob=probability), engine=engine)
    inputs: list[Tensor] = []
    made.segment.block.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].detach().clone())
    )
    for number in range(3):
        made.step(number)
    assert len(inputs) == 3
    for number, found in enumerate(inputs):
        batch, key = made.schedule.samples[number], made.schedule.keys[number, 0]
        full = tape.full.whole[batch]
        if probability == 0:
            assert tape.prefix is None
            assert torch.equal(found, full)
            continue
        assert tape.prefix is not None
        prefix = tape.prefix.whole[batch]
        differ = full != prefix
        assert differ.double().mean() > 0.9
        mask = eager_mask(full, key, int(256 * probability), torch.bool)
        assert torch.equal(found, torch.where(mask, prefix, full))
        share = float((found == prefix)[differ].double().mean())
        assert abs(share - probability) <= 4.5 * 0.5 / math.sqrt(int(differ.sum()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_pdquant_predicts_from_unmixed_inputs_with_dropping_drawn_anew(
    engine: Engine, probability: float
) -> None:
    made, tape = trainer(quick("pdquant", prefix_prob=probability), engine=engine)
    inputs: list[Tensor] = []
    made.segment.block.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].detach().clone())
    )
    quantizer, dropped = made.state.quantizers[0], []
    quantizer.register_forward_hook(
        lambda _, args, out: dropped.append((out == args[0]).detach().chunk(2))
    )
    made.step(0)
    assert tape.prefix is not None
    rows, key = made.schedule.samples[0], made.schedule.keys[0, 0]
    full, prefix = tape.full.whole[rows], tape.prefix.whole[rows]
    mask = eager_mask(full, key, int(256 * probability), torch.bool)
    assert torch.equal(inputs[0], torch.cat([torch.where(mask, prefix, full), prefix]))
    ((first, second),) = dropped
    assert 0.4 < float((first == second).double().mean()) < 0.6


@pytest.mark.parametrize("engine", ENGINES)
def test_first_block_has_nothing_to_mix(engine: Engine) -> None:
    made, tape = trainer(quick("qdrop"), index=0, engine=engine)
    assert tape.prefix is tape.full
    inputs: list[Tensor] = []
    made.segment.block.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].detach().clone())
    )
    made.step(0)
    assert torch.equal(inputs[0], tape.full.whole[made.schedule.samples[0]])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "tf32"])
def test_tf32_is_allowed_in_steps_alone(engine: Engine, dtype: str) -> None:
    """A Fisher pass's frozen parts have their own setting; the outer setting comes back."""
    made, _ = trainer(quick("fimaq", step_dtype=dtype, fisher_k=1), engine=engine)
    allowed: list[bool] = []
    made.segment.block.register_forward_pre_hook(
        lambda *_: allowed.append(torch.backends.cuda.matmul.allow_tf32)
    )
    before = torch.backends.cuda.matmul.allow_tf32
    made.step(0)
    assert allowed == [before] * 3 + [dtype == "tf32"]  # three batches of the Fisher pass
    assert torch.backends.cuda.matmul.allow_tf32 == before


def gradients_of_step(
    made: BlockTrainer, number: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Do step ``number`` and return the whole gradient in α and that in the scales, flat."""
    step = made._step
    if isinstance(step, TextbookStep):
        made.step(number)
        parts = [[leaf.grad for leaf in leaves] for leaves in (step.variables, step.scales)]
        flat = [torch.cat([grad.flatten() for grad in part if grad is not None]) for part in parts]
        return flat[0], flat[1]
    assert isinstance(step, FlatStep)
    found: list[Tensor] = []

    call = step._call

    def look(function: Callable[..., Any], *args: Any) -> Any:
        if function is not update:
            return call(function, *args)
        own, _, grad_soft, grad_scales = args
        weight, beta = own.rates[own.counter[0], :2]
        found.extend((own.vectors.gradient(grad_soft, weight, beta), grad_scales))
        return None

    monkeypatch.setattr(step, "_call", look)
    step.counter.fill_(number)
    made.step(number)
    return found[0], found[1]


def released_loss(
    method: str, made: BlockTrainer, tape: Tape, number: int, given: dict[str, Tensor]
) -> Tensor:
    """The loss of a step's batch as the released code of ``method`` writes it."""
    rows, key = made.schedule.samples[number], made.schedule.keys[number, 0]
    assert tape.target is not None
    full, target = tape.full.whole[rows], tape.target.whole[rows]
    if method == "qdrop":
        error = (functional_call(made.segment.block, given, (full,)) - target).pow(2).sum(1).mean()
        return error / error.detach()
    if method == "adalog-recon":
        output = functional_call(made.segment.block, given, (full,))
        if made.segment.kind == "head":
            p = target.softmax(-1)
            return functional.kl_div(output.log_softmax(-1), p, reduction="batchmean")
        return (output - target).abs().pow(2).sum(1).mean() / 10
    assert tape.prefix is not None
    prefix = tape.prefix.whole[rows]
    drop_inp = torch.where(eager_mask(full, key, 128, torch.bool), prefix, full)
    out_all = functional_call(made.segment.block, given, (torch.cat((drop_inp, prefix)),))
    out_drop, out_quant = out_all[:24], out_all[24:]
    logits = (
        out_quant if made.segment.kind == "head" else tape.chain.tail(tape.index + 1, out_quant)
    )
    reference = made.objective.reference.whole[rows]
    pd_loss = functional.kl_div(
        functional.log_softmax(logits / 4, dim=1),
        functional.softmax(reference / 4, dim=1),
        reduction="batchmean",
    )
    return (out_drop - target).abs().pow(2).sum(1).mean() + pd_loss / 0.1


@pytest.mark.parametrize("number", [0, 90])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("method", "index"),
    [("qdrop", 2), ("adalog-recon", 2), ("adalog-recon", 3), ("pdquant", 2), ("pdquant", 3)],
)
def test_gradient_of_a_step(
    method: str, index: int, number: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block loss plus, once it is on, 0.01 of the regulariser, by the plain definition."""
    recipe = quick(
        method,
        steps=100,
        activation_prob=1.0,
        prefix_prob=0.5 if method == "pdquant" else 0.0,
        batch_size=24,
        lr_alpha=1e-12,
        lr_scale=1e-12,
    )
    made, tape = trainer(recipe, index, engine)
    state = made.state
    assert state.rounding is not None
    state.rounding.alpha.add_(torch.linspace(-0.3, 0.3, state.rounding.alpha.numel()))
    state.soft.copy_(state.rounding.soft())
    if isinstance(made._step, TextbookStep):
        for leaf, value in zip(
            made._step.variables, state.rounding.split(state.rounding.alpha), strict=True
        ):
            leaf.detach().copy_(value)
    found, found_scales = gradients_of_step(made, number, monkeypatch)
    assert state.rounding.alpha.numel() == found.numel()

    alpha = state.rounding.alpha.detach().clone().requires_grad_(True)
    scales = [
        quantizer.scale.detach().clone().requires_grad_(True) for quantizer in state.quantizers
    ]
    h = (1.2 * torch.sigmoid(alpha) - 0.1).clamp(0, 1)
    weights = {}
    for (name, _), layer, piece in zip(
        state.layout.weights,
        state.layers,
        h.split([layer.weight.numel() for layer in state.layers]),
        strict=True,
    ):
        quantizer = layer.weight_quantizer
        codes = (
            torch.floor(layer.weight / quantizer.scale)
            + piece.view_as(layer.weight)
            + quantizer.zero_point
        )
        weights[name] = quantizer.scale * (
            codes.clamp(0, quantizer.levels - 1) - quantizer.zero_point
        )
    given = weights | {
        name: scale for (name, _), scale in zip(state.layout.scales, scales, strict=True)
    }
    loss = released_loss(method, made, tape, number, given)
    if number:
        beta = regulariser_exponent(recipe, number)
        assert beta is not None
        loss = loss + 0.01 * rounding_penalty(h, beta)
    expected, *expected_scales = torch.autograd.grad(loss, [alpha, *scales])
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert (found != 0).double().mean() > 0.5
    flat = torch.cat([grad.flatten() for grad in expected_scales])
    assert torch.allclose(found_scales, flat, rtol=1e-3, atol=1e-4 * float(flat.abs().max()))


@pytest.mark.parametrize("engine", ENGINES)
def test_finishing_leaves_training(engine: Engine) -> None:
    made, tape = trainer(quick("qdrop", lr_scale=1e-2), engine=engine)
    state = made.state
    before = [quantizer.scale.clone() for quantizer in state.quantizers]
    weights = [layer.weight.clone() for layer in state.layers]
    for number in range(3):
        made.step(number)
        # In the block itself nothing changes before the end.
        assert all(
            torch.equal(q.scale, old) for q, old in zip(state.quantizers, before, strict=True)
        )
    made.finish()
    for layer, weight in zip(state.layers, weights, strict=True):
        assert not layer.soft
        assert layer.weight_quantizer.codes.numel() == layer.weight.numel()
        assert torch.equal(layer.weight, weight)
    pieces = state.scales.split([quantizer.scale.numel() for quantizer in state.quantizers])
    for quantizer, piece, old in zip(state.quantizers, pieces, before, strict=True):
        assert quantizer.learning is None
        assert quantizer.keep_probability == 1.0
        assert torch.equal(quantizer.scale.flatten(), piece)
        assert quantizer.scale.shape == old.shape
        assert not torch.equal(quantizer.scale, old)
        assert not quantizer.key.any()
    for parameter in made.segment.block.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
    block, x = made.segment.block, tape.full.whole
    with torch.no_grad():
        assert torch.equal(block(x), block(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_scales_that_are_not_learned_stay(engine: Engine) -> None:
    made, _ = trainer(quick("qdrop", learn_scales=False, lr_scale=1e-2), engine=engine)
    before = [quantizer.scale.clone() for quantizer in made.state.quantizers]
    assert made.state.rounding is not None
    alpha = made.state.rounding.alpha.clone()
    for number in range(3):
        made.step(number)
    made.finish()
    assert all(
        torch.equal(q.scale, old) for q, old in zip(made.state.quantizers, before, strict=True)
    )
    assert not torch.equal(made.state.rounding.alpha, alpha)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bits", [(32, 4), (4, 32), (32, 32)])
def test_weights_or_activations_alone(engine: Engine, bits: tuple[int, int]) -> None:
    made, _ = trainer(quick("fimaq", w_bits=bits[0], a_bits=bits[1]), engine=engine)
    assert (made.state.rounding is None) == (bits[0] == 32)
    scales = made.state.scales.clone()
    assert bool(scales.numel()) == (bits[1] == 4)
    for number in range(4):
        loss = made.step(number)
    assert torch.isfinite(loss)
    made.finish()
    assert torch.equal(made.state.scales, scales) == (bits[1] == 32)


def test_generators_of_blocks_differ() -> None:
    draws = {
        tuple(torch.randint(0, 1000, (8,), generator=block_generator(seed, label)).tolist())
        for seed in (0, 1)
        for label in ("blocks.0", "blocks.1")
    }
    assert len(draws) == 4


def test_head_bits_of_32_leave_its_input_alone() -> None:
    recipe = quick("qdrop", head_bits=32)
    made, _ = trainer(recipe, index=3)
    assert made.state.quantizers == []
    assert len(made.state.layers) == 1
    made.step(0)
