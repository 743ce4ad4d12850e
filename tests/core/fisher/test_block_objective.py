"""The objective of a block: when Fisher passes run, and what each loss starts at."""

import pytest
import torch
from small_models import chain_of, images, quick, vit
from torch import Tensor

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.fisher import losses
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction import objective as objective_module
from fimaq_core.reconstruction.loss import Batch, LossState, block_loss
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.tape import Storage, Tape

SAMPLES = torch.arange(8)


def at_block(recipe: Recipe, index: int) -> tuple[BlockChain, Tape, Tensor]:
    """A calibrated ViT, its tape at a block, the model's full-precision outputs."""
    chain, x = chain_of(vit(2), recipe), images(16)
    calibrate(chain, x, recipe)
    set_quantized(chain, False)
    with torch.no_grad():
        reference = chain(x)
    tape = Tape(chain, x, Storage("device", torch.device("cpu")), with_prefix=True, batch_size=8)
    for _ in range(index):
        tape.advance()
    tape.compute_target()
    return chain, tape, reference


def make(recipe: Recipe, index: int = 2) -> tuple[BlockObjective, Tape]:
    chain, tape, reference = at_block(recipe, index)
    made = BlockObjective(chain, tape, recipe, reference, ClassifierDivergence(recipe.temperature), [])
    set_quantized(chain.segment(index).block, True)
    return made, tape


def before_step(objective: BlockObjective, number: int) -> None:
    """What a step begins with: a pass where one is due."""
    if number in objective.update_steps:
        objective.update(objective.chain.segment(objective.tape.index).block)


def loss_of(objective: BlockObjective, output: Tensor, samples: Tensor = SAMPLES) -> float:
    """Loss of the samples' output; what it starts at is kept as a step keeps it."""
    batch = Batch(*(None if part is None else part[samples] for part in objective.batch(mixed=False)))
    value, starts = block_loss(objective.kind, objective.part_weights(), output, batch, objective.state)
    objective.state.starts.copy_(starts)
    return float(value)


@torch.no_grad()
def loss(objective: BlockObjective, tape: Tape, noise: float = 0.0) -> float:
    """Loss of the first samples; ``noise`` changes the output."""
    output = objective.chain.segment(tape.index).block(tape.full[SAMPLES])
    return loss_of(objective, output + noise * torch.randn(output.shape, generator=torch.Generator().manual_seed(0)))


def due_steps(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> list[int]:
    """Steps before which a pass runs."""
    objective, tape = make(recipe)
    width = tape.full[0].numel()
    now, due = [0], []

    def count(*args: object) -> tuple[Tensor, Tensor]:
        due.append(now[0])
        return torch.rand(width), torch.rand(width)

    monkeypatch.setattr(objective_module, "mean_gradient_and_error", count)
    for step in range(recipe.steps):
        now[0] = step
        before_step(objective, step)
    assert objective.passes == len(due)
    return due


@pytest.mark.parametrize(
    ("mode", "steps", "k", "expected"),
    [
        ("q", 20, 5, [0, 4, 8, 12, 16]),
        ("q", 20, 1, [0]),
        ("q", 7, 3, [0, 2, 4]),
        ("q", 3, 5, [0, 1, 2]),
        ("qf", 20, 5, [0, 1, 2, 3, 4]),
        ("qf", 20, 1, [0]),
        ("qf", 3, 5, [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("name", ["fisher_dplr", "fisher_diag", "fisher_lr"])
def test_schedule_of_passes(
    monkeypatch: pytest.MonkeyPatch, mode: str, steps: int, k: int, expected: list[int], name: str
) -> None:
    assert due_steps(monkeypatch, quick(fisher_mode=mode, steps=steps, fisher_k=k, loss=name)) == expected


@pytest.mark.parametrize("name", ["mse", "mae"])
def test_no_passes_for_plain_errors(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert due_steps(monkeypatch, quick(loss=name)) == []


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"loss": "fisher_dplr"}, 2.0),
        ({"loss": "fisher_dplr", "fisher_p1": 0.7, "fisher_p2": 1.9}, 2.6),
        ({"loss": "fisher_dplr", "fisher_p1": 0.0, "fisher_p2": 1.0}, 1.0),
        ({"loss": "fisher_diag"}, 2.0),
        ({"loss": "fisher_lr"}, 2.0),
    ],
)
@pytest.mark.parametrize("mode", ["q", "qf"])
def test_starts_are_taken_anew_after_each_pass(changes: dict[str, object], start: float, mode: str) -> None:
    recipe = quick(fisher_k=3, steps=9, fisher_mode=mode, **changes)
    objective, tape = make(recipe)
    due = {"q": (0, 3, 6), "qf": (0, 1, 2)}[mode]
    for step in range(9):
        before_step(objective, step)
        if step in due:
            # Another output at every pass: only a start taken anew gives the same value again.
            assert loss(objective, tape, noise=0.1 * step) == pytest.approx(start, rel=1e-5)
        assert loss(objective, tape, noise=2.0) > 1.5 * start
    assert objective.passes == 3


@pytest.mark.parametrize(("name", "start"), [("mse", 1.0), ("mae", 1.0), ("fisher_brecq", 1.0)])
def test_other_losses_start_at_one_and_keep_their_start(name: str, start: float) -> None:
    objective, tape = make(quick(loss=name))
    before_step(objective, 0)
    assert loss(objective, tape) == pytest.approx(start, rel=1e-5)
    after = loss(objective, tape, noise=1.0)
    assert after > 1.2
    before_step(objective, 1)
    assert loss(objective, tape, noise=1.0) == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize("name", ["mse", "mae", "fisher_diag", "fisher_lr", "fisher_dplr", "fisher_brecq"])
def test_value_after_the_start_equals_the_formula(name: str) -> None:
    """Loss of a second output over that of the first, from the pass's own g and d."""
    objective, tape = make(quick(loss=name, fisher_k=1))
    before_step(objective, 0)
    loss(objective, tape)
    found = loss(objective, tape, noise=0.5)
    assert tape.target is not None
    chain, kind = objective.chain, name
    with torch.no_grad():
        output = chain.segment(tape.index).block(tape.full[SAMPLES])
    noisy = output + 0.5 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    first, second = ((out - tape.target[SAMPLES]).flatten(1) for out in (output, noisy))
    gradients = objective.weights if name == "fisher_brecq" else objective.state.diagonal

    def parts(delta: Tensor) -> list[Tensor]:
        if kind == "mse":
            return [losses.squared_error(delta)]
        if kind == "mae":
            return [losses.absolute_error(delta)]
        assert gradients is not None
        if kind == "fisher_brecq":
            return [losses.squared_gradient_loss(delta, gradients[SAMPLES])]
        if kind == "fisher_diag":
            return [2 * losses.diagonal_loss(delta, gradients)]
        if kind == "fisher_lr":
            return [2 * losses.rank_one_loss(delta, gradients)]
        root, _ = losses.inverse_gram_root(torch.stack(objective._errors))
        return [losses.low_rank_loss(delta, gradients[None], root), losses.diagonal_loss(delta, gradients)]

    factor = 2 if kind in ("fisher_diag", "fisher_lr") else 1
    expected = factor * sum(float(b / a) for a, b in zip(parts(first), parts(second), strict=True))
    assert found == pytest.approx(expected, rel=1e-4)


def test_brecq_gradient_is_taken_with_the_prefix_quantized_and_this_block_in_full_precision() -> None:
    recipe = quick(loss="fisher_brecq")
    chain, tape, reference = at_block(recipe, 2)
    set_quantized(chain.segment(2).block, True)
    objective = BlockObjective(chain, tape, recipe, reference, ClassifierDivergence(recipe.temperature), [])
    assert objective.kind == "fisher_brecq"
    assert tape.prefix is not None
    block = chain.segment(2).block
    set_quantized(block, False)
    output = block(tape.prefix).detach().requires_grad_(True)
    divergence = ClassifierDivergence(recipe.temperature)
    value = divergence(chain.tail(3, output), objective.reference) * output.shape[0]
    (expected,) = torch.autograd.grad(value, output)
    assert objective.weights is not None
    scale = float(expected.abs().max())
    assert torch.allclose(objective.weights, expected.flatten(1), rtol=1e-4, atol=1e-5 * scale)
    assert objective.passes == 1


def test_brecq_falls_back_at_the_first_block_and_says_so() -> None:
    recipe = quick(loss="fisher_brecq")
    objective, tape = make(recipe, index=0)
    assert objective.kind == "mse"
    assert len(objective.notes) == 1
    assert "patch_embed" in objective.notes[0]
    assert "squared error" in objective.notes[0]
    loss(objective, tape)
    plain, plain_tape = make(quick(loss="mse"), index=0)
    loss(plain, plain_tape)
    assert loss(objective, tape, noise=0.3) == pytest.approx(loss(plain, plain_tape, noise=0.3), rel=1e-6)


@pytest.mark.parametrize("name", ["fisher_dplr", "fisher_diag", "fisher_lr"])
def test_passes_fill_the_state_in_place(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Rows of G in order, their mean, and the root of the passes done; all where they were, whatever reads them."""
    objective, tape = make(quick(loss=name, fisher_k=3, fisher_mode="qf"))
    torch.manual_seed(0)
    width = tape.full[0].numel()
    passes = [(torch.rand(width), torch.rand(width)) for _ in range(3)]
    queue = iter(passes)
    monkeypatch.setattr(objective_module, "mean_gradient_and_error", lambda *_: next(queue))
    state = objective.state
    places = [tensor.data_ptr() for tensor in state if tensor is not None]
    assert len(places) == 4
    for step in range(3):
        before_step(objective, step)
        assert objective.state.gradients is not None
        assert objective.state.diagonal is not None
        assert objective.state.root is not None
        done = torch.stack([gradient for gradient, _ in passes[: step + 1]])
        assert torch.equal(objective.state.gradients[: step + 1], done)
        assert not objective.state.gradients[step + 1 :].any()
        assert torch.allclose(objective.state.diagonal, done.mean(0))
        expected = torch.zeros(3, 3)
        if name == "fisher_dplr":
            root, damped = losses.inverse_gram_root(torch.stack([error for _, error in passes[: step + 1]]))
            assert not damped
            expected[: step + 1, : step + 1] = root
        assert torch.equal(objective.state.root, expected)
        assert not objective.state.starts.any()
        loss(objective, tape)
        assert (objective.state.starts > 0).all()
    state = objective.state
    assert [tensor.data_ptr() for tensor in state if tensor is not None] == places


def test_a_start_of_zero_becomes_one() -> None:
    """Nothing is off at the first batch: the loss is 0, and a later one is not divided by 0."""
    target, kind = torch.zeros(2, 3), "fisher_dplr"
    batch = Batch(target, None, target)
    state = LossState(torch.zeros(2), torch.rand(2, 3), torch.rand(3), torch.rand(2, 2))
    value, starts = block_loss(kind, (1.0, 1.0), target, batch, state)
    assert float(value) == 0
    assert starts.tolist() == [1.0, 1.0]
    later, kept = block_loss(kind, (0.5, 2.0), target + 0.1, batch, state._replace(starts=starts))
    delta = torch.full((2, 3), 0.1)
    expected = 0.5 * losses.low_rank_loss(delta, state.gradients, state.root) + 2 * losses.diagonal_loss(delta, state.diagonal)
    assert float(later) == pytest.approx(float(expected), rel=1e-6)
    assert torch.equal(kept, starts)


def test_starts_have_no_gradient() -> None:
    """A part's gradient is that of the part over a constant, at the step that takes the start too."""
    output, target = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    value, starts = block_loss("mse", (1.0,), output, Batch(target, None, target), LossState(torch.zeros(1)))
    assert float(value.detach()) == 1
    assert not starts.requires_grad
    (found,) = torch.autograd.grad(value, output)
    assert torch.allclose(found, 2 * (output - target).detach() / 4 / starts, rtol=1e-5)


def test_singular_passes_are_noted_and_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, tape = make(quick(fisher_k=3, fisher_mode="qf"))
    width = tape.full[0].numel()
    same = torch.rand(width)
    monkeypatch.setattr(objective_module, "mean_gradient_and_error", lambda *_: (torch.rand(width), same))
    for step in range(3):
        before_step(objective, step)
        value = loss(objective, tape, noise=0.2)
        assert value == pytest.approx(2.0, rel=1e-4)
    assert any("damped" in note for note in objective.notes)


def test_nothing_quantized_gives_zero_and_no_nan() -> None:
    for name in ("mse", "fisher_dplr", "fisher_diag", "fisher_lr"):
        objective, tape = make(quick(loss=name, w_bits=32, a_bits=32))
        before_step(objective, 0)
        assert loss(objective, tape) == 0.0


def test_head_uses_the_plain_divergence() -> None:
    """KL at temperature 1, not divided by its start, whatever the recipe's loss."""
    objective, tape = make(quick(), index=3)
    before_step(objective, 0)
    assert objective.passes == 0
    with torch.no_grad():
        output = objective.chain.segment(3).block(tape.full[SAMPLES])
    assert tape.target is not None
    p, q = tape.target[SAMPLES].double().softmax(-1), output.double().softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert expected > 1e-6
    assert loss(objective, tape) == pytest.approx(expected, rel=1e-2)
