"""MLP reconstruction: its training data, its changes, and its resuming."""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import distance
from small_models import Measured, chain_of, images, quick, swin, vit
from staged import run_stage
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, MlpPart, Segment
from fimaq_core.checkpoint import Fingerprint, read_header
from fimaq_core.errors import CheckpointError, ModelError, NumericsError, RecipeError
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.fisher.passes import Tail, perturbation_hessian
from fimaq_core.layers import quant_layers, set_quantized
from fimaq_core.pipeline import CALIBRATE, MLPS, STAGES, load_mlps, quantize_chain
from fimaq_core.progress import Progress
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction import mlp as mlp_module
from fimaq_core.reconstruction.mlp import (
    mlp_loss,
    mlps,
    positive_quantile,
    reconstruct_mlps,
    use_relu,
)
from fimaq_core.reconstruction.schedule import block_generator, draw_batches
from fimaq_core.store import Part, Resources

pytestmark = pytest.mark.slow

KL = ClassifierDivergence(20.0)
PART = MlpPart("mlp")
#: Enough to see a difference.
SHORT: dict[str, object] = {
    "reconstruct_mlp": True,
    "mlp_steps": 12,
    "mlp_batch": 8,
    "mlp_lr": 1e-3,
}


def short(**changes: object) -> Recipe:
    return quick(**{**SHORT, **changes})


def reconstructed(
    recipe: Recipe, build: Callable[[], nn.Module] = vit, size: int = 32, **how: Any
) -> tuple[BlockChain, BlockChain]:
    """A chain with reconstructed MLPs, and the teacher."""
    chain = chain_of(build(), recipe)
    teacher = reconstruct_mlps(
        chain, images(16, size), recipe, KL, resources=Resources(**{"batch_size": 8, **how})
    )
    return chain, teacher


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Which modules.


@pytest.mark.parametrize(
    ("build", "size"), [(vit, 32), (lambda: swin(40), 40)], ids=["vit", "swin"]
)
def test_relu_takes_the_place_of_the_mlps_activations_alone(
    build: Callable[[], nn.Module], size: int
) -> None:
    chain = chain_of(build(), quick())
    before = dict(chain.named_modules())
    parameters = {name: value.clone() for name, value in chain.state_dict().items()}
    use_relu(chain)
    after = dict(chain.named_modules())
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] is not after[name]}
    assert changed == {name for name, module in before.items() if isinstance(module, nn.GELU)}
    assert len(changed) == len(mlps(chain)) == sum(segment.kind == "block" for segment in chain)
    assert all(type(after[name]) is nn.ReLU for name in changed)
    assert all(torch.equal(value, parameters[name]) for name, value in chain.state_dict().items())


def test_other_activations_and_models_without_mlps_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"^blocks\.0\.mlp: MLP reconstruction replaces GELU, not SiLU\.$"
    ):
        use_relu(chain_of(vit(act_layer=nn.SiLU), quick()))
    chain = chain_of(vit(), quick())
    use_relu(chain)
    with pytest.raises(ModelError, match="not ReLU"):
        use_relu(chain)
    with pytest.raises(ModelError, match="family names no MLP"):
        use_relu(BlockChain([Segment("block", "block", nn.Linear(3, 3))]))


def test_an_mlp_with_a_norm_inside_is_not_one_of_them() -> None:
    """An MLP that does not compute ``fc2(act(fc1(x)))``."""
    chain = chain_of(vit(scale_mlp_norm=True), quick())
    assert len(mlps(chain)) == 0
    with pytest.raises(ModelError, match="no MLP"):
        reconstruct_mlps(chain, images(16), short(), KL)


def test_too_few_images() -> None:
    with pytest.raises(
        RecipeError, match="16 calibration images are fewer than a batch of 17: lower mlp_batch"
    ):
        reconstructed(short(mlp_batch=17))


# What an MLP is trained on.


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.77, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 100, 1001])
def test_positive_quantile(share: float, count: int) -> None:
    values = normal(count, seed=count) + 0.5
    values[0] = 0.3
    expected = np.quantile(values[values > 0].numpy(), share, method="inverted_cdf")
    for pieces in ([values], values.split(3)):
        assert positive_quantile(lambda pieces=pieces: pieces, share) == float(expected)


def test_positive_quantile_of_few_values() -> None:
    def found(*values: float, share: float = 0.99) -> float:
        return positive_quantile(lambda: [torch.tensor([values])], share)

    assert found(-1.0, 0.0, -0.0, math.nan) == 0
    assert found(2.0, -1.0, 0.0, share=1e-12) == 2
    assert found(*[0.5] * 9, 0.5000001, share=0.9) == 0.5
    assert found(1e-45, 1e-40, math.inf, share=0.5) == pytest.approx(1e-40, rel=1e-4)
    assert found(1e-45, 1e-40, math.inf, share=1.0) == math.inf


def test_positive_quantile_is_of_all_values_and_keeps_one_piece() -> None:
    """More than 2^24 values, the last ones far larger; memory is that of a piece."""
    pieces = [float(k + 1) + torch.arange(2**20) / 2**20 for k in range(18)]
    everything = torch.cat(pieces)
    assert len(everything) > 2**24
    expected = float(everything.kthvalue(round(0.99 * len(everything) + 0.5)).values)
    alive: list[weakref.ref[Tensor]] = []

    def one_by_one() -> Iterator[Tensor]:
        for piece in pieces:
            assert sum(reference() is not None for reference in alive) <= 1
            copied = piece.clone()
            alive.append(weakref.ref(copied))
            yield copied

    assert positive_quantile(one_by_one, 0.99) == expected > 18


def small_mlp(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """An MLP with ReLU, inputs, targets, a Hessian of a sample's shape."""
    mlp = nn.Module()
    torch.manual_seed(1)
    mlp.fc1, mlp.act, mlp.fc2 = nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)
    x, target, hessian = normal(4, 2, 3), normal(4, 2, 3, seed=1), normal(2, 3, seed=2).square()
    return mlp.to(dtype), x.to(dtype), target.to(dtype), hessian.to(dtype)


@pytest.mark.parametrize("weighted", [True, False])
def test_loss_equals_a_loop(weighted: bool) -> None:
    mlp, x, target, hessian = small_mlp()
    w1, b1, w2, b2 = (parameter.detach().numpy() for parameter in mlp.parameters())
    limit, total, clamped = 0.4, 0.0, 0
    for b in range(4):
        for t in range(2):
            hidden = np.maximum(w1 @ x[b, t].numpy() + b1, 0)
            clamped += int((hidden > limit).sum())
            plain, low = w2 @ hidden + b2, w2 @ np.minimum(hidden, limit) + b2
            for c in range(3):
                h = float(hessian[t, c]) if weighted else 1.0
                total += (
                    h * (plain[c] - float(target[b, t, c])) ** 2
                    + 2 * h * (low[c] - float(target[b, t, c])) ** 2
                )
    assert clamped > 3
    found = float(mlp_loss(mlp, PART, x, target, hessian if weighted else None, limit).detach())
    assert found == pytest.approx(total / 24, rel=1e-12)


@pytest.mark.parametrize("weighted", [True, False])
def test_gradient_equals_finite_differences(weighted: bool) -> None:
    mlp, x, target, hessian = small_mlp()

    def value() -> Tensor:
        return mlp_loss(mlp, PART, x, target, hessian if weighted else None, 0.4)

    gradients = torch.autograd.grad(value(), list(mlp.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(mlp.parameters(), gradients, strict=True):
            for place in range(parameter.numel()):
                old = float(parameter.view(-1)[place])
                sides = []
                for step in (1e-6, -1e-6):
                    parameter.view(-1)[place] = old + step
                    sides.append(float(value()))
                parameter.view(-1)[place] = old
                assert float(gradient.view(-1)[place]) == pytest.approx(
                    (sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-8
                )


class Mlp(nn.Module):
    """``fc2(act(fc1(x)))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = (
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class PlainBlock(nn.Module):
    """A residual block that ends with an MLP, without norms: its Hessian is no rounding noise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.mlp = nn.Linear(width, width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x).tanh()
        out: Tensor = x + self.mlp(x)
        return out


def plain_chain() -> tuple[BlockChain, Tensor]:
    """Two such blocks and a head, and inputs (16, 3, 6)."""
    torch.manual_seed(2)
    blocks = [Segment(f"blocks.{i}", "block", PlainBlock(6), mlps=(PART,)) for i in range(2)]
    head = Segment("head", "head", nn.Sequential(nn.Flatten(), nn.Linear(18, 5)))
    return BlockChain([*blocks, head]), normal(16, 3, 6, seed=4)


def gathered(
    monkeypatch: pytest.MonkeyPatch, chain: BlockChain, x: Tensor, recipe: Recipe, batch: int
) -> list[Any]:
    """Training data of each MLP."""
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(mlp_module, "_train", lambda mlp, part, lesson, *_: seen.append(lesson))
        reconstruct_mlps(chain, x, recipe, KL, resources=Resources(batch_size=batch))
    whole = [
        [part and part.whole for part in (one.inputs, one.targets, one.hessian)] for one in seen
    ]
    return [
        replace(one, inputs=x, targets=y, hessian=h)
        for one, (x, y, h) in zip(seen, whole, strict=True)
    ]


def test_inputs_targets_and_limit_are_those_of_the_model_with_gelu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, x = short(mlp_percentile=0.9), images(16)
    original, kept = chain_of(vit(), recipe), []
    for index in (1, 2):
        mlp = original.segment(index).block.mlp
        mlp.register_forward_hook(lambda module, args, out: kept.append((args[0], out)))
        mlp.fc2.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        original(x)
    (hidden1, (in1, out1), hidden2, (in2, out2)) = kept
    seen = gathered(monkeypatch, chain_of(vit(), recipe), x, recipe, 5)
    for samples, hidden, inputs, outputs in zip(
        seen, (hidden1, hidden2), (in1, in2), (out1, out2), strict=True
    ):
        assert torch.allclose(samples.inputs, inputs, atol=1e-5)
        assert torch.allclose(samples.targets, outputs, atol=1e-5)
        values = hidden.numpy()
        assert samples.limit == pytest.approx(
            float(np.quantile(values[values > 0], 0.9, method="inverted_cdf")), rel=1e-4
        )
        assert samples.hessian is not None
        assert samples.hessian.shape == inputs.shape[1:]
        assert float(samples.hessian.square().mean()) == pytest.approx(1, rel=1e-4)
    assert all(
        samples.hessian is None
        for samples in gathered(monkeypatch, chain_of(vit(), recipe), x, short(mlp_loss="mse"), 5)
    )


@pytest.mark.parametrize("batch", [3, 16])
def test_hessian_at_the_mlps_output_is_that_at_the_blocks(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """The MLP's output is added last, so both Hessians are equal; mean over images, scaled."""
    chain, x = plain_chain()
    teacher = copy.deepcopy(chain)
    seen = gathered(monkeypatch, chain, x, short(perturbation=0.1, mlp_lr=1.0), batch)
    with torch.no_grad():
        reference = teacher(x)
    for index, samples in enumerate(seen):
        with torch.no_grad():
            z = teacher.segment(0)(x) if index == 0 else teacher.segment(1)(teacher.segment(0)(x))
        double = copy.deepcopy(teacher).double()

        def rest(output: Tensor, index: int = index, double: BlockChain = double) -> Tensor:
            return double.tail(index + 1, output)

        tail = Tail(rest, reference.double(), KL)
        exact = perturbation_hessian(tail, z.double(), 0.1).mean(0)
        expected = exact / exact.square().mean().sqrt()
        assert float(expected.max() / expected.min()) > 2
        assert samples.hessian is not None
        assert torch.allclose(samples.hessian.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrong", [0.0, math.nan])
def test_a_hessian_that_weights_nothing_is_an_error(wrong: float) -> None:
    chain, x = plain_chain()
    message = r"^blocks\.0\.mlp: the perturbation Hessian is " + (
        "zero; use mlp_loss mse" if wrong == 0 else "not finite"
    )
    with pytest.raises(NumericsError, match=message):
        reconstruct_mlps(
            chain, x, short(), Measured(lambda outputs, reference: (wrong * outputs).sum())
        )


# Training.


@torch.no_grad()
def mlp_inputs(chain: BlockChain, x: Tensor) -> list[Tensor]:
    """Inputs of the MLPs of a ViT."""
    found: list[Tensor] = []
    handles = [
        mlp.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        for mlp in mlps(chain)
    ]
    chain(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("loss", ["perturb_mean", "mse"])
def test_training_lowers_the_loss_and_the_error_to_gelu(loss: str) -> None:
    """Errors of ReLU with the old and the new weights, on images of the training and others.

    Behind the last block only the class token is looked at, so a Hessian weights no other.
    """
    losses: dict[str, list[float]] = {}

    def on_progress(event: Progress) -> None:
        if event.loss is not None:
            losses.setdefault(event.block, []).append(event.loss)

    chain, teacher = reconstructed(
        short(mlp_steps=200, mlp_lr=5e-3, mlp_batch=16, mlp_loss=loss), on_progress=on_progress
    )
    assert list(losses) == ["blocks.0.mlp", "blocks.1.mlp"]
    for values in losses.values():
        assert len(values) == 4
        assert values[-1] < 0.9 * values[0]
    for x, share in ((images(16), 0.5), (images(16, seed=5), 0.7)):
        seen = mlp_inputs(teacher, x)
        for number, (mlp, gelu) in enumerate(zip(mlps(chain), mlps(teacher), strict=True)):
            relu = copy.deepcopy(gelu)
            relu.act = nn.ReLU()
            inputs = seen[number][:, :1] if number == 1 and loss == "perturb_mean" else seen[number]
            with torch.no_grad():
                before, after = (
                    (module(inputs) - gelu(inputs)).square().mean() for module in (relu, mlp)
                )
            assert float(after) < share * float(before), number


@pytest.mark.parametrize("loss", ["perturb_mean", "mse"])
def test_course_of_one_mlp_equals_a_plain_loop(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam with PyTorch's cosine over batches drawn for the MLP's name; and the loss goes down."""
    recipe = short(mlp_steps=40, mlp_lr=5e-3, perturbation=0.1, mlp_loss=loss)
    chain, x = plain_chain()
    (samples, _) = gathered(monkeypatch, copy.deepcopy(chain), x, recipe, 8)
    expected = copy.deepcopy(chain.segment(0).block.mlp).requires_grad_(True)
    expected.act = nn.ReLU()
    draws = draw_batches(40, 8, 16, block_generator(recipe.seed, "blocks.0.mlp/mlp"))
    optimizer = torch.optim.Adam(expected.parameters(), lr=5e-3)
    values = []
    with torch.no_grad():
        everything = [
            float(
                mlp_loss(
                    expected, PART, samples.inputs, samples.targets, samples.hessian, samples.limit
                )
            )
        ]
    for step, rows in enumerate(draws):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 + math.cos(math.pi * step / 40)) / 2
        value = mlp_loss(
            expected,
            PART,
            samples.inputs[rows],
            samples.targets[rows],
            samples.hessian,
            samples.limit,
        )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    seen: list[float | None] = []
    reconstruct_mlps(
        chain,
        x,
        recipe,
        KL,
        resources=Resources(lambda event: seen.append(event.loss), "device", 8),
    )
    start = plain_chain()[0].segment(0).block.mlp
    for name, parameter in chain.segment(0).block.mlp.named_parameters():
        before = start.get_parameter(name)
        assert distance(parameter - before, expected.get_parameter(name) - before) < 1e-3, name
    assert any(loss == pytest.approx(values[-1], rel=1e-3) for loss in seen if loss is not None)
    with torch.no_grad():
        everything.append(
            float(
                mlp_loss(
                    expected, PART, samples.inputs, samples.targets, samples.hessian, samples.limit
                )
            )
        )
    assert everything[1] < 0.7 * everything[0]


@pytest.mark.parametrize(
    ("build", "size"), [(vit, 32), (lambda: swin(40), 40)], ids=["vit", "swin"]
)
def test_only_the_mlps_linear_layers_change_and_the_teacher_is_the_model_as_it_was(
    build: Callable[[], nn.Module], size: int
) -> None:
    recipe, x = short(), images(5, size, seed=8)
    original = chain_of(build(), recipe)
    chain, teacher = reconstructed(recipe, build, size)
    assert same_state(teacher, original)
    with torch.no_grad():
        assert torch.equal(teacher(x), original(x))
        assert not torch.allclose(chain(x), original(x), atol=1e-3)
    before, wanted = original.state_dict(), []
    for segment in chain:
        for part in segment.mlps:
            wanted += [
                f"{segment.label}.{part.name}.{layer}.{kind}"
                for layer in ("fc1", "fc2")
                for kind in ("weight", "bias")
            ]
    changed = []
    for number, segment in enumerate(chain):
        for name, value in segment.block.state_dict().items():
            if not torch.equal(value, before[f"segments.{number}.block.{name}"]):
                changed.append(f"{segment.label}.{name}")
        for name, value in segment.before.state_dict().items():
            assert torch.equal(value, before[f"segments.{number}.before.{name}"])
    assert changed == wanted
    for model in (chain, teacher):
        assert all(
            not parameter.requires_grad and parameter.grad is None
            for parameter in model.parameters()
        )
        assert not any(layer.quantized for _, layer in quant_layers(model))
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
        assert not model.training


def test_same_seed_same_bits_and_another_seed_another_result() -> None:
    first, _ = reconstructed(short())
    torch.manual_seed(99)  # the global state must not matter
    second, _ = reconstructed(short())
    other, _ = reconstructed(short(seed=1))
    assert same_state(first, second)
    assert not same_state(first, other)
    weights = [chain.segment(1).block.mlp.fc1.weight for chain in (first, other)]
    assert not torch.allclose(weights[0], weights[1], atol=1e-4)


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_placements_give_the_same_bits(placement: str) -> None:
    assert same_state(reconstructed(short())[0], reconstructed(short(), placement=placement)[0])


@pytest.mark.parametrize("batch", [1, 7, 16])
def test_result_does_not_depend_on_the_passes_batch(batch: int) -> None:
    """But for rounding; where the Hessian is more than rounding."""
    recipe = short(perturbation=0.1)
    (first, x), (second, _) = plain_chain(), plain_chain()
    reconstruct_mlps(first, x, recipe, KL, resources=Resources(batch_size=8))
    reconstruct_mlps(second, x, recipe, KL, resources=Resources(batch_size=batch))
    assert_moved_alike(first, second, plain_chain()[0])
    plain = short(mlp_loss="mse")
    first, second = reconstructed(plain)[0], reconstructed(plain, batch_size=batch)[0]
    assert_moved_alike(first, second, chain_of(vit(), plain))


def assert_moved_alike(first: BlockChain, second: BlockChain, start: BlockChain) -> None:
    """Every parameter of the MLPs has moved, in both chains to the same place but for rounding."""
    learned = {name: value for name, value in mlps(first).named_parameters() if value.numel()}
    assert len(learned) == 2 * 4
    for name, parameter in learned.items():
        before = mlps(start).get_parameter(name)
        assert float((parameter - before).abs().max()) > 1e-3, name
        assert distance(mlps(second).get_parameter(name) - before, parameter - before) < 1e-3, name


def test_a_loss_that_is_no_number_names_the_mlp() -> None:
    with pytest.raises(
        NumericsError,
        match=r"^blocks\.0\.mlp: the MLP's loss is (nan|inf); lower mlp_lr \(now 1e\+30\)\.$",
    ):
        reconstructed(short(mlp_lr=1e30))


def test_progress_runs_to_its_end() -> None:
    seen: list[Progress] = []
    reconstructed(short(mlp_steps=60), on_progress=seen.append)
    assert {event.stage for event in seen} == {"reconstruct MLPs"}
    assert [event.done for event in seen] == [0, 50, 60, 60, 110, 120, 120]
    assert {event.total for event in seen} == {120}


# Checkpoints.


def fingerprint(
    recipe: Recipe, weights: str = "w" * 64, calibration: str = "c" * 64
) -> Fingerprint:
    return Fingerprint(weights=weights, calibration=calibration, recipe=recipe)


class Broken(Exception):
    """Stands for a run that was stopped."""


def kept(
    recipe: Recipe, path: Path, stop_in: str | None = None
) -> tuple[BlockChain, BlockChain, bool]:
    """Chain, teacher, True if loaded; ``stop_in`` names the MLP in which the run is interrupted."""

    def on_progress(event: Progress) -> None:
        if stop_in is not None and event.block == stop_in:
            raise Broken

    chain = chain_of(vit(3), recipe)
    resources = Resources(on_progress, batch_size=8)
    part = Part(chain, images(16), recipe, KL, fingerprint(recipe), facts={"model": "small"})
    loaded = run_stage(MLPS, part, path, resources=resources)
    assert part.teacher is not None
    return chain, part.teacher, loaded


def test_stopped_and_resumed_equals_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = short()
    expected, teacher, loaded = kept(recipe, tmp_path / "undisturbed.safetensors")
    assert not loaded
    for stop_in, done in (("blocks.0.mlp", 0), ("blocks.2.mlp", 2)):
        path = tmp_path / stop_in / "mlps.safetensors"
        with pytest.raises(Broken):
            kept(recipe, path, stop_in)
        folder = path.with_name("mlps.mlps")
        assert sorted(file.name for file in folder.glob("*")) == [
            f"mlp-{index:03d}.safetensors" for index in range(done)
        ]
        assert not path.exists()
        trained: list[str] = []
        original = mlp_module._train

        def count(
            *args: Any, trained: list[str] = trained, original: Callable[..., None] = original
        ) -> None:
            trained.append(args[2].label)
            original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(mlp_module, "_train", count)
            resumed, again, loaded = kept(recipe, path)
        assert trained == [f"blocks.{index}.mlp" for index in range(done, 3)]
        assert not loaded
        assert same_state(resumed, expected)
        assert same_state(again, teacher)
        assert [file.name for file in path.parent.iterdir()] == ["mlps.safetensors"]
        assert (
            path.read_bytes()[-1000:] == (tmp_path / "undisturbed.safetensors").read_bytes()[-1000:]
        )


def test_finished_mlps_are_loaded_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every recipe with the same MLP settings; the teacher is the model with GELU again."""
    recipe, path, x = short(), tmp_path / "mlps.safetensors", images(4, seed=8)
    chain, teacher, _ = kept(recipe, path)
    assert read_header(path)[1] == {"model": "small", "stage": "mlp"}
    monkeypatch.setattr(
        "fimaq_core.pipeline.reconstruct_mlps", lambda *_, **__: pytest.fail("reconstructed again")
    )
    for other in (recipe, short(w_bits=3, a_bits=8, steps=99, loss="mse", range_search="minmax")):
        again, same, loaded = kept(other, path)
        assert loaded
        assert same_state(same, chain_of(vit(3), other))
        with torch.no_grad():
            assert torch.equal(again(x), chain(x))
            assert torch.equal(same(x), teacher(x))
            assert not torch.equal(again(x), same(x))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 1}, r"another recipe: seed \(3407, here 1\)"),
        ({"mlp_steps": 13}, r"another recipe: mlp_steps \(12, here 13\)"),
        ({"mlp_loss": "mse"}, r"mlp_loss \('perturb_mean', here 'mse'\)"),
        ({"perturbation": 0.1}, "perturbation"),
        ({"temperature": 1.0}, "temperature"),
        ({"calibration_images": 16}, "calibration_images"),
    ],
    ids=str,
)
def test_mlps_of_another_run_are_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    """The finished file, and an MLP of a stopped run."""
    recipe = short()
    path, stopped = tmp_path / "mlps.safetensors", tmp_path / "stopped.safetensors"
    kept(recipe, path)
    with pytest.raises(Broken):
        kept(recipe, stopped, "blocks.1.mlp")
    for file in (path, stopped):
        with pytest.raises(
            CheckpointError, match=f"does not belong to this run: it was made with .*{reason}"
        ) as caught:
            kept(short(**changes), file)
        assert str(tmp_path) in str(caught.value)


def test_mlps_of_other_weights_and_images_are_refused(tmp_path: Path) -> None:
    recipe, path = short(), tmp_path / "mlps.safetensors"
    kept(recipe, path)
    chain = chain_of(vit(3), recipe)
    with pytest.raises(CheckpointError, match="other weights"):
        load_mlps(chain, path, fingerprint(recipe, weights="x" * 64))
    with pytest.raises(CheckpointError, match="other calibration images"):
        load_mlps(chain_of(vit(3), recipe), path, fingerprint(recipe, calibration="d" * 64))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_mlps(chain_of(vit(2), recipe), path, None)
    load_mlps(chain_of(vit(3), recipe), path, None)


def test_checkpoints_of_other_stages_hold_no_mlps(tmp_path: Path) -> None:
    recipe, path = quick(), tmp_path / "ranges.safetensors"
    run_stage(
        CALIBRATE, Part(chain_of(vit(), recipe), images(8), recipe, KL, fingerprint(recipe)), path
    )
    chain = chain_of(vit(), recipe)
    with pytest.raises(
        CheckpointError, match=r"holds no reconstructed MLPs but a checkpoint of stage 'calibrated'"
    ) as caught:
        load_mlps(chain, path, fingerprint(recipe))
    assert str(path) in str(caught.value)
    assert any(isinstance(module, nn.GELU) for module in chain.modules())
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        load_mlps(chain, tmp_path / "none.safetensors", None)


def test_another_process_may_have_cleared_the_finished_mlps_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells of other bits share the MLPs, and may come to the end at the same time."""
    path, original = tmp_path / "mlps.safetensors", Path.unlink

    def twice(self: Path, missing_ok: bool = False) -> None:
        if self.name.startswith("mlp-"):
            (self.parent / "of another process").touch()
            original(self)
        original(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", twice)
    kept(short(), path)
    assert path.is_file()


# The whole.


def test_quantize_does_all_stages(tmp_path: Path) -> None:
    """All stages at once equal the stages one by one; reconstruction aims at the GELU model."""
    recipe, x = quick("aphq", **{**SHORT, "steps": 4}), images(24)
    whole = chain_of(vit(), recipe)
    log = quantize_chain(whole, x, recipe, KL, Resources(batch_size=8))
    assert log.fisher_passes == {"patch_embed": 1, "blocks.0": 1, "blocks.1": 1, "head": 0}
    assert log.last_loss["head"] > 0.05  # relative to its start

    staged, mark = chain_of(vit(), recipe), fingerprint(recipe)
    teacher = None
    for loaded in (False, True):  # the second time from the files
        staged = chain_of(vit(), recipe)
        part = Part(staged, x, recipe, KL, mark)
        for stage in STAGES:
            if not stage.wanted(part):
                continue
            done = run_stage(
                stage, part, tmp_path / f"{stage.kind}.safetensors" if stage.kind else None
            )
            assert done == (loaded and stage.kind != "")
        assert same_state(staged, whole)
        teacher = part.teacher
    assert teacher is not None
    original = chain_of(vit(), recipe)
    set_quantized(original, False)
    with torch.no_grad():
        goal = original(x)
        assert torch.equal(teacher(x), goal)
        error = (staged(x) - goal).square().mean()
        plain = chain_of(vit(), recipe)
        use_relu(plain)
        run_stage(CALIBRATE, Part(plain, x, recipe, KL))
        assert float(error) < 0.7 * float((plain(x) - goal).square().mean())
