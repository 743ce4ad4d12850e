"""Reconstruction of images of varying sizes: tape, Fisher information, engines, resuming."""

import gc
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from closeness import assert_same_steps
from small_models import quick
from small_pyramid import SIZES, Positions, by_hand, pyramid, varied
from staged import run_stage
from torch import Tensor

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.checkpoint import Fingerprint
from fimaq_core.errors import EngineError, RecipeError
from fimaq_core.fisher.passes import Tail, divergence_gradient
from fimaq_core.layers import set_quantized
from fimaq_core.pipeline import RECONSTRUCT, quantize_chain
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction import mlp as mlp_module
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.engines import Engine, choose_engine
from fimaq_core.reconstruction.loss import block_loss
from fimaq_core.reconstruction.mlp import mlp_loss, reconstruct_mlps
from fimaq_core.reconstruction.reconstruct import expand_per_token, reconstruct
from fimaq_core.reconstruction.sample_objective import SampleObjective
from fimaq_core.reconstruction.tape import Placement, Storage, Tape
from fimaq_core.samples import Samples
from fimaq_core.store import Part, Resources

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
D = Positions()


def one_by_one(method: str = "fimaq", **changes: object) -> Recipe:
    few: dict[str, object] = {
        "calibration_images": 5,
        "range_images": 5,
        "batch_size": 1,
        "mlp_batch": 1,
        "steps": 12,
    }
    return quick(method, **{**few, **changes})


def calibrated(recipe: Recipe, seed: int = 0) -> tuple[BlockChain, Samples]:
    chain, images = pyramid(recipe, seed), varied()
    calibrate(chain, images, recipe)
    return chain, images


@torch.no_grad()
def walked(
    recipe: Recipe, index: int, placement: Placement = "device"
) -> tuple[BlockChain, Samples, Tape]:
    chain, images = calibrated(recipe)
    tape = Tape(chain, images, Storage(placement, CPU), with_prefix=True)
    for _ in range(index):
        tape.advance()
    tape.compute_target()
    return chain, images, tape


def same(found: object, expected: list[Tensor]) -> bool:
    assert isinstance(found, Samples)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
@torch.no_grad()
def test_the_tape_walks_image_by_image(placement: Placement) -> None:
    recipe = one_by_one()
    chain, images, tape = walked(recipe, 3, placement)
    set_quantized(chain, False)
    full = [by_hand(chain, image) for image in images]
    set_quantized(chain, True)
    quantized = [by_hand(chain, image) for image in images]
    first, second = chain.segment(1).keep, chain.segment(2).keep
    assert first is not None
    assert second is not None
    for tensors, outputs in ((tape.full, full), (tape.prefix, quantized)):
        assert same(tensors, [torch.cat([first(out[1]), second(out[2])], 1) for out in outputs])
    for beside, outputs in ((tape.beside, full), (tape.beside_prefix, quantized)):
        assert beside.side is None
        assert len(beside.kept) == 2
        assert same(beside.kept[1], [second(out[2]) for out in outputs])
    assert same(tape.target, [out[3] for out in full])


@torch.no_grad()
def test_the_chain_is_its_blocks_in_a_row() -> None:
    chain, images = calibrated(one_by_one())
    for image in images:
        assert torch.equal(chain(image), by_hand(chain, image)[-1])
        outputs = by_hand(chain, image)
        first = chain.segment(1).keep
        assert first is not None
        assert torch.equal(chain.rest(2, outputs[2], None, (first(outputs[1]),)), outputs[-1])


def objective_at(
    recipe: Recipe, index: int
) -> tuple[SampleObjective, BlockChain, Samples, Samples]:
    chain, images, tape = walked(recipe, index)
    set_quantized(chain, False)
    with torch.no_grad():
        reference = Samples([chain(image) for image in images])
    if recipe.loss == "glf":
        reference = tape.features(images)
    objective = SampleObjective(chain, tape, recipe, reference, D, [])
    return objective, chain, images, reference


def gradient_by_hand(chain: BlockChain, image: Tensor, output: Tensor, reference: Tensor) -> Tensor:
    """Gradient of the divergence at the output of block 1, the rest in full precision."""
    first, second = chain.segment(1).keep, chain.segment(2).keep
    assert first is not None
    assert second is not None

    def rest(z: Tensor) -> Tensor:
        last = chain.segment(2).block(z)
        return chain.segment(4).block(
            chain.segment(3).block(torch.cat([first(z), second(last)], 1))
        )

    return divergence_gradient(Tail(rest, reference, D), output)


@pytest.mark.parametrize("loss", ["fisher_dplr", "fisher_diag", "fisher_lr"])
def test_every_image_has_its_own_fisher_information(loss: str) -> None:
    recipe = one_by_one(loss=loss)
    objective, chain, images, reference = objective_at(recipe, 1)
    tape = objective.tape
    outputs: list[list[Tensor]] = []
    for seed, scale in ((7, 0.03), (8, 0.05)):
        generator = torch.Generator().manual_seed(seed)
        rows = [
            tape.target[i] + scale * torch.randn(tape.target[i].shape, generator=generator)
            for i in range(5)
        ]
        outputs.append(rows)
        objective.update(lambda x, rows=rows: rows[next(i for i in range(5) if tape.full[i] is x)])
    for index, image in enumerate(images):
        g, d = [], []
        for rows in outputs:
            gradient = gradient_by_hand(chain, image, rows[index], reference[index]).abs().flatten()
            error = (rows[index] - tape.target[index]).abs().flatten()
            g.append(gradient / gradient.mean())
            d.append(error / error.mean())
        batch, state = objective.sample(index, mixed=False)
        output = tape.target[index] + 0.1
        found, starts = block_loss(objective.kind, objective.part_weights(), output, batch, state)
        delta = torch.full_like(g[0], 0.1)
        size, mean_g = len(delta), torch.stack(g).mean(0)
        low = (mean_g @ delta / size) ** 2
        if loss == "fisher_dplr":
            stacked, a = torch.stack(d).double(), torch.stack(g).double() @ delta.double()
            low = (a @ torch.linalg.inv(stacked @ stacked.T) @ a / size).float()
        expected = {"fisher_diag": [(delta**2 * mean_g).mean()], "fisher_lr": [low]}.get(
            loss, [low, (delta**2 * mean_g).mean()]
        )
        assert torch.allclose(starts, torch.stack(expected), rtol=2e-3)
        assert float(found) == pytest.approx(2.0)


def test_hessians_are_each_images_own_with_mean_one() -> None:
    for loss in ("perturb", "perturb_mean"):
        objective, chain, images, reference = objective_at(
            one_by_one(loss=loss, perturbation=1e-2), 1
        )
        assert objective.kind == "perturb"
        assert objective.weights is not None
        for index, image in enumerate(images):
            target = objective.tape.target[index]
            above, below = (
                gradient_by_hand(chain, image, target + shift, reference[index])
                for shift in (1e-2, -1e-2)
            )
            expected = (above - below).abs()
            assert torch.allclose(
                objective.weights[index],
                (expected / expected.mean()).view(1, -1),
                rtol=1e-4,
                atol=1e-6,
            )


def test_squared_gradients_are_taken_behind_the_quantized_prefix() -> None:
    objective, chain, images, reference = objective_at(one_by_one(loss="fisher_brecq"), 1)
    assert objective.weights is not None
    for index, image in enumerate(images):
        set_quantized(chain.segment(0).block, True)
        output = chain.segment(1).block(chain.segment(0).block(image)).detach()
        set_quantized(chain.segment(0).block, False)
        expected = gradient_by_hand(chain, image, output, reference[index])
        expected = expected / expected.square().mean().sqrt()
        assert torch.allclose(objective.weights[index], expected.view(1, -1), rtol=1e-4, atol=1e-5)


def test_least_squares_of_one_image() -> None:
    objective, chain, images, reference = objective_at(one_by_one(loss="least_squares"), 1)
    tape = objective.tape
    rows = [
        target + 0.05 * torch.randn(target.shape, generator=torch.Generator().manual_seed(3))
        for target in tape.target
    ]
    objective.update(lambda x: rows[next(i for i in range(5) if tape.full[i] is x)])
    for index, image in enumerate(images):
        g = gradient_by_hand(chain, image, rows[index], reference[index]).flatten().double()
        delta = (rows[index] - tape.target[index]).flatten().double()
        h = (g / delta).clamp(min=0)
        expected = 0.5 * (h * delta**2).sum() + 0.5 * (
            g @ delta
        )  # u is g over the root of its product with delta
        batch, state = objective.sample(index, mixed=False)
        _, starts = block_loss("least_squares", (2.0,), rows[index], batch, state)
        assert float(starts) == pytest.approx(float(expected / h.sum()), rel=1e-3)


def test_a_neck_has_the_squared_error() -> None:
    objective, *_ = objective_at(one_by_one(), 3)
    assert (objective.kind, objective.part_weights()) == ("mse", (1.0,))
    assert not objective.update_steps
    # APHQ-ViT's code for detectors starts it at 2, as its other losses.
    objective, *_ = objective_at(one_by_one("aphq", reconstruct_mlp=False), 3)
    assert (objective.kind, objective.part_weights()) == ("mse", (2.0,))


@torch.no_grad()
def test_the_feature_of_a_detector_is_the_necks_output() -> None:
    """Computed at the start, and again through the rest behind a block with its kept tensors."""
    objective, chain, images, _ = objective_at(one_by_one(loss="glf"), 2)
    expected = [by_hand(chain, image)[3] for image in images]
    assert same(objective.reference, expected)
    assert objective.rest is not None
    for number in range(len(images)):
        batch, _ = objective.sample(number, mixed=False)
        assert batch.reference is not None
        assert len(batch.kept) == 1
        found = objective.rest(batch.target, batch.side, batch.kept)
        assert torch.allclose(found, batch.reference, atol=1e-6)


def trainer(engine: Engine, recipe: Recipe) -> BlockTrainer:
    objective, chain, *_ = objective_at(recipe, 1)
    return BlockTrainer(chain.segment(1), objective, engine)


@pytest.mark.parametrize(
    "loss",
    ["fisher_dplr", "mse", "perturb", "prediction", "mse_adalog", "prediction_pdquant", "glf"],
)
def test_engines_agree(loss: str) -> None:
    learning = "straight-through" if loss == "glf" else "rounding"
    recipe = one_by_one(loss=loss, weight_learning=learning)
    assert_same_steps(trainer("eager", recipe), [trainer("fused", recipe)], recipe.steps)


def test_images_come_in_their_order() -> None:
    samples = trainer("fused", one_by_one()).schedule.samples
    assert samples[:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_a_compiled_step_is_compiled_once_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    from fimaq_core.reconstruction import flat

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled: dict[object, object] = {}

    def traced(function: object, device_type: str, threads: int) -> object:
        return compiled.setdefault(
            function, torch.compile(function, backend=counter, fullgraph=True, dynamic=False)
        )  # type: ignore[call-overload]

    monkeypatch.setattr(flat, "_compiled", traced)
    recipe = one_by_one()
    assert_same_steps(trainer("fused", recipe), [trainer("compiled", recipe)], recipe.steps)
    assert len(set(SIZES)) == 4
    # the loss (one graph without and one with start values) and the update
    assert counter.frame_count <= 3


def test_only_windows_have_scales_of_their_own() -> None:
    recipe = one_by_one()
    chain, images = calibrated(recipe)
    expand_per_token(chain, images[0])
    block = chain.segment(1).block
    assert block.get_submodule("qk.input_quantizer").scale.shape == (1, 2, 1)
    assert block.get_submodule("product.a_quantizer").scale.shape == (1, 1, 2, 1)
    assert block.get_submodule("mlp.fc1.input_quantizer").scale.numel() == 1


@pytest.mark.parametrize("method", ["rtn", "brecq", "qdrop", "aphq", "fimaq", "lsvit"])
def test_methods_run_and_predictors_stay_as_calibrated(method: str) -> None:
    recipe = one_by_one(method, mlp_steps=4)
    chain = pyramid(recipe)
    log = quantize_chain(chain, varied(), recipe, D)
    assert list(log.last_loss) == (
        ["embed", "blocks.0", "blocks.1", "neck"] if recipe.reconstruct else []
    )
    probe = varied(5, seed=9)
    full = pyramid(recipe)
    with torch.no_grad():
        errors = [
            float((chain(image) - full(image)).square().mean() / full(image).square().mean())
            for image in probe
        ]
    assert 0 < max(errors) < 0.6
    predict = chain.segment(4).block.get_submodule("conv")
    nearest = (
        torch.round(predict.weight.flatten(1) / predict.weight_quantizer.scale)
        + predict.weight_quantizer.zero_point
    )
    assert torch.equal(predict.weight_quantizer.codes.flatten(1).float(), nearest.clamp(0, 15))


def test_reconstruction_goes_on_from_finished_blocks(tmp_path: Path) -> None:
    recipe = one_by_one()
    mark = Fingerprint(weights="w", calibration="c", recipe=recipe)

    def run(stop_at: str | None) -> BlockChain:
        chain, images = calibrated(recipe)

        def on_progress(event: object) -> None:
            if stop_at is not None and getattr(event, "block", "") == stop_at:
                raise KeyboardInterrupt

        part = Part(chain, images, recipe, D, mark)
        run_stage(
            RECONSTRUCT,
            part,
            pieces=tmp_path / str(stop_at),
            resources=Resources(on_progress=on_progress),
        )
        return chain

    with pytest.raises(KeyboardInterrupt):
        run("blocks.1")
    assert len(list((tmp_path / "blocks.1").iterdir())) == 2
    (tmp_path / "blocks.1").rename(tmp_path / "None")
    resumed = run(None).state_dict()
    chain, images = calibrated(recipe)
    reconstruct(chain, images, recipe, D)
    for name, value in chain.state_dict().items():
        assert torch.equal(value, resumed[name]), name


def test_fisher_information_of_a_block_is_gone_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[weakref.ref[SampleObjective]] = []
    original = SampleObjective.__init__

    def watched(self: SampleObjective, *args: object) -> None:
        gc.collect()
        assert all(other() is None for other in made)
        made.append(weakref.ref(self))
        original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(SampleObjective, "__init__", watched)
    recipe = one_by_one(steps=2)
    chain, images = calibrated(recipe)
    reconstruct(chain, images, recipe, D)
    assert len(made) == 4


def test_the_clamping_quantile_is_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden values of the first MLP are those of the images alone, whole, in every pass."""
    recipe = one_by_one("aphq", mlp_steps=1)
    seen: list[Tensor] = []
    original = mlp_module.positive_quantile

    def watched(pieces: Callable[[], Iterable[Tensor]], share: float) -> float:
        first, second = (torch.cat([piece.flatten() for piece in pieces()]) for _ in range(2))
        assert torch.equal(first, second)
        seen.append(first)
        return original(pieces, share)

    monkeypatch.setattr(mlp_module, "positive_quantile", watched)
    images = varied()
    alone = []
    for image in images:
        reconstruct_mlps(pyramid(recipe), Samples([image]), recipe, D)
        alone.append(seen[0])
        seen.clear()
    reconstruct_mlps(pyramid(recipe), images, recipe, D)
    assert torch.equal(seen[0], torch.cat(alone))


def test_mlps_are_trained_image_by_image_with_their_own_hessians() -> None:
    recipe = one_by_one("aphq", mlp_steps=7, mlp_lr=1e-2, perturbation=1e-2)
    chain, images = pyramid(recipe), varied()
    teacher = reconstruct_mlps(chain, images, recipe, D)
    # the first MLP again, by plain operations
    again = pyramid(recipe)
    inputs, targets, hessians, hidden = [], [], [], []
    block = teacher.segment(1).block
    mlp = block.get_submodule("mlp")
    for image in images:
        with torch.no_grad():
            x = teacher.segment(0).block(image)
            q, k = block.qk(block.norm1(x).reshape(-1, 2, 8)).chunk(2, -1)
            middle = x + ((q @ k.mT).softmax(-1) @ k).view(x.shape)
            inputs.append(block.norm2(middle))
            targets.append(mlp(inputs[-1]))
            hidden.append(mlp.act(mlp.fc1(inputs[-1])).flatten())
            reference = teacher(image)

        def gradient(
            z: Tensor, image: Tensor = image, middle: Tensor = middle, reference: Tensor = reference
        ) -> Tensor:
            leaf = z.requires_grad_(True)
            first, second = teacher.segment(1).keep, teacher.segment(2).keep
            assert first is not None
            assert second is not None
            one = middle + leaf
            two = teacher.segment(2).block(one)
            out = teacher.segment(4).block(
                teacher.segment(3).block(torch.cat([first(one), second(two)], 1))
            )
            return torch.autograd.grad(D(out, reference), leaf)[0]

        own = (gradient(targets[-1] + 1e-2) - gradient(targets[-1] - 1e-2)).abs()
        hessians.append(own / own.mean())
    values = torch.cat(hidden)
    positive = values[values > 0].sort().values
    limit = float(positive[-(-int(recipe.mlp_percentile * 1000) * len(positive) // 1000) - 1])
    (part,) = again.segment(1).mlps
    student = again.segment(1).block.get_submodule("mlp")
    student.act = torch.nn.ReLU()
    parameters = [student.fc1.weight, student.fc1.bias, student.fc2.weight, student.fc2.bias]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
    for number in range(7):
        index = number % 5
        optimizer.zero_grad()
        mlp_loss(student, part, inputs[index], targets[index], hessians[index], limit).backward()
        optimizer.step()
        schedule.step()
    found = chain.segment(1).block.get_submodule("mlp")
    for mine, other in zip(
        parameters,
        (found.fc1.weight, found.fc1.bias, found.fc2.weight, found.fc2.bias),
        strict=True,
    ):
        assert torch.allclose(mine, other, atol=2e-3)
        assert torch.allclose(mine, other, rtol=0.05, atol=5e-4)


def test_what_does_not_go_with_varying_sizes_is_refused() -> None:
    chain, images = calibrated(one_by_one())
    with pytest.raises(RecipeError, match="one at a time: set batch_size 1"):
        reconstruct(chain, images, one_by_one(batch_size=2), D)
    with pytest.raises(RecipeError, match="mlp_batch 1"):
        reconstruct_mlps(pyramid(one_by_one()), images, one_by_one("aphq", mlp_batch=2), D)
    with pytest.raises(EngineError, match="these vary"):
        choose_engine("graph", torch.device("cuda"), 10, varying=True)
    assert choose_engine("auto", torch.device("cuda"), 10, varying=True) == "compiled"
