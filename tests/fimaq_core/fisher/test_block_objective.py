"""The objective of a block: when Fisher passes run, and what each loss starts at."""

import pytest
import torch
from small_models import Measured, chain_of, images, quick, vit
from torch import Tensor

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.errors import NumericsError
from fimaq_core.fisher import losses
from fimaq_core.fisher.divergence import ClassifierDivergence, Divergence, kl_divergence
from fimaq_core.layers import set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction import objective as objective_module
from fimaq_core.reconstruction.loss import Batch, LossState, block_loss, prediction_loss
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.tape import Storage, Tape

pytestmark = pytest.mark.slow

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


def make(
    recipe: Recipe, index: int = 2, divergence: Divergence | None = None
) -> tuple[BlockObjective, Tape]:
    chain, tape, reference = at_block(recipe, index)
    made = BlockObjective(
        chain, tape, recipe, reference, divergence or ClassifierDivergence(recipe.temperature), []
    )
    set_quantized(chain.segment(index).block, True)
    return made, tape


def before_step(objective: BlockObjective, number: int) -> None:
    """Take a Fisher pass if the step begins with one."""
    if number in objective.update_steps:
        objective.update(objective.tape.chain.segment(objective.tape.index).block)


def value_of(objective: BlockObjective, output: Tensor, samples: Tensor = SAMPLES) -> Tensor:
    """Loss of the samples' output; its start values are kept, as by a step."""
    batch = objective.batch(mixed=False).map(lambda part: part[samples])
    weights, state, rest = objective.part_weights(), objective.state, objective.rest
    if rest is None:
        value, starts = block_loss(objective.kind, weights, output, batch, state)
    else:
        value, starts = prediction_loss(
            objective.kind, weights, output, batch, state.starts, rest, objective.divergence
        )
    state.starts.copy_(starts)
    return value


@torch.no_grad()
def loss(objective: BlockObjective, tape: Tape, noise: float = 0.0) -> float:
    """Loss of the first samples; ``noise`` changes the output."""
    output = objective.tape.chain.segment(tape.index).block(tape.full.whole[SAMPLES])
    return float(
        value_of(
            objective,
            output + noise * torch.randn(output.shape, generator=torch.Generator().manual_seed(0)),
        )
    )


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
    assert (
        due_steps(monkeypatch, quick(fisher_mode=mode, steps=steps, fisher_k=k, loss=name))
        == expected
    )


@pytest.mark.parametrize("name", ["mse", "mae", "mse_adalog", "prediction", "prediction_pdquant"])
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
def test_starts_are_taken_anew_after_each_pass(
    changes: dict[str, object], start: float, mode: str
) -> None:
    recipe = quick(fisher_k=3, steps=9, fisher_mode=mode, **changes)
    objective, tape = make(recipe)
    due = {"q": (0, 3, 6), "qf": (0, 1, 2)}[mode]
    for step in range(9):
        before_step(objective, step)
        if step in due:
            # Another output at every pass: only a new start value gives the same loss again.
            assert loss(objective, tape, noise=0.1 * step) == pytest.approx(start, rel=1e-5)
        assert loss(objective, tape, noise=2.0) > 1.5 * start
    assert objective.passes == 3


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("mse", 1.0), ("mae", 1.0), ("fisher_brecq", 1.0), ("prediction", 1.0), ("perturb", 2.0),
        ("perturb_mean", 2.0),
        ("least_squares", 2.0),
    ],
)  # fmt: skip
def test_other_losses_keep_their_start(name: str, start: float) -> None:
    objective, tape = make(quick(loss=name, fisher_k=3, fisher_mode="qf"))
    before_step(objective, 0)
    assert objective.kind == name
    assert loss(objective, tape) == pytest.approx(start, rel=1e-5)
    after = loss(objective, tape, noise=1.0)
    assert after > 1.2 * start
    before_step(objective, 1)
    assert loss(objective, tape, noise=1.0) == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "mse", "mae", "fisher_diag", "fisher_lr", "fisher_dplr", "fisher_brecq", "perturb",
        "perturb_mean", "least_squares",
        "prediction",
    ],
)  # fmt: skip
def test_value_after_the_start_equals_the_formula(name: str) -> None:
    """Loss of a second output over that of the first, from the pass's own g and d."""
    objective, tape = make(quick(loss=name, fisher_k=1))
    before_step(objective, 0)
    loss(objective, tape)
    found = loss(objective, tape, noise=0.5)
    assert tape.target is not None
    chain, kind = objective.tape.chain, name
    with torch.no_grad():
        output = chain.segment(tape.index).block(tape.full.whole[SAMPLES])
    noisy = output + 0.5 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    first, second = ((out - tape.target.whole[SAMPLES]).flatten(1) for out in (output, noisy))
    gradients = (
        objective.weights.whole if name in ("fisher_brecq", "perturb") else objective.state.diagonal
    )

    def parts(delta: Tensor) -> list[Tensor]:
        if kind == "prediction":
            logits = chain.tail(
                tape.index + 1, (tape.target.whole[SAMPLES].flatten(1) + delta).view_as(output)
            )
            divergence = kl_divergence(
                logits.double(), objective.reference.whole[SAMPLES].double(), 20.0
            )
            return [losses.squared_error(delta), divergence]
        if kind == "mse":
            return [losses.squared_error(delta)]
        if kind == "mae":
            return [losses.absolute_error(delta)]
        assert gradients is not None
        if kind == "fisher_brecq":
            return [losses.squared_gradient_loss(delta, gradients[SAMPLES])]
        if kind == "perturb":
            return [losses.diagonal_loss(delta, gradients[SAMPLES])]
        if kind == "least_squares":
            assert objective.state.gradients is not None
            return [losses.least_squares_loss(delta, gradients, objective.state.gradients[0])]
        if kind in ("fisher_diag", "perturb_mean"):
            return [2 * losses.diagonal_loss(delta, gradients)]
        if kind == "fisher_lr":
            return [2 * losses.rank_one_loss(delta, gradients)]
        root, _ = losses.inverse_gram_root(torch.stack(objective._errors))
        return [
            losses.low_rank_loss(delta, gradients[None], root),
            losses.diagonal_loss(delta, gradients),
        ]

    doubled = ("fisher_diag", "fisher_lr", "perturb", "perturb_mean", "least_squares")
    factor = 2 if kind in doubled else 0.5 if kind == "prediction" else 1
    expected = factor * sum(float(b / a) for a, b in zip(parts(first), parts(second), strict=True))
    assert found == pytest.approx(expected, rel=1e-4)


def test_brecq_gradient_is_taken_with_the_prefix_quantized_and_this_block_in_full_precision() -> (
    None
):
    recipe = quick(loss="fisher_brecq")
    chain, tape, reference = at_block(recipe, 2)
    set_quantized(chain.segment(2).block, True)
    objective = BlockObjective(
        chain, tape, recipe, reference, ClassifierDivergence(recipe.temperature), []
    )
    assert objective.kind == "fisher_brecq"
    assert tape.prefix is not None
    block = chain.segment(2).block
    set_quantized(block, False)
    output = block(tape.prefix.whole).detach().requires_grad_(True)
    divergence = ClassifierDivergence(recipe.temperature)
    value = divergence(chain.tail(3, output), objective.reference.whole) * output.shape[0]
    (expected,) = torch.autograd.grad(value, output)
    assert objective.weights is not None
    scale = float(expected.abs().max())
    assert torch.allclose(
        objective.weights.whole, expected.flatten(1), rtol=1e-4, atol=1e-5 * scale
    )
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
    assert loss(objective, tape, noise=0.3) == pytest.approx(
        loss(plain, plain_tape, noise=0.3), rel=1e-6
    )


@pytest.mark.parametrize("name", ["fisher_dplr", "fisher_diag", "fisher_lr"])
def test_passes_fill_the_state_in_place(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Rows of G in order, their mean, and the root of the passes done; tensors stay in place."""
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
            root, damped = losses.inverse_gram_root(
                torch.stack([error for _, error in passes[: step + 1]])
            )
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
    expected = 0.5 * losses.low_rank_loss(
        delta, state.gradients, state.root
    ) + 2 * losses.diagonal_loss(delta, state.diagonal)
    assert float(later) == pytest.approx(float(expected), rel=1e-6)
    assert torch.equal(kept, starts)


def test_starts_have_no_gradient() -> None:
    """A part's gradient is that of the part over a constant, also at the step that sets it."""
    output, target = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    value, starts = block_loss(
        "mse", (1.0,), output, Batch(target, None, target), LossState(torch.zeros(1))
    )
    assert float(value.detach()) == 1
    assert not starts.requires_grad
    (found,) = torch.autograd.grad(value, output)
    assert torch.allclose(found, 2 * (output - target).detach() / 4 / starts, rtol=1e-5)


def test_singular_passes_are_noted_and_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, tape = make(quick(fisher_k=3, fisher_mode="qf"))
    width = tape.full[0].numel()
    same = torch.rand(width)
    monkeypatch.setattr(
        objective_module, "mean_gradient_and_error", lambda *_: (torch.rand(width), same)
    )
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
        output = objective.tape.chain.segment(3).block(tape.full.whole[SAMPLES])
    assert tape.target is not None
    p, q = tape.target.whole[SAMPLES].double().softmax(-1), output.double().softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert expected > 1e-6
    assert loss(objective, tape) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "mse"}, {"loss": "mae"}, {"loss": "fisher_brecq"}, {"loss": "perturb_mean"},
        {"loss": "fisher_diag"}, {"loss": "least_squares"},
        {"loss": "prediction", "prediction_share": 0.2},
        {"loss": "fisher_dplr", "fisher_p1": 0.7, "fisher_p2": 1.9},
    ],
)  # fmt: skip
@pytest.mark.parametrize("index", [2, 3])
def test_loss_start_is_the_start_of_every_loss_also_of_the_heads(
    changes: dict[str, object], index: int
) -> None:
    """The loss is the own one times a constant."""
    values = []
    for start in (None, 3.0):
        objective, tape = make(quick(fisher_k=1, loss_start=start, **changes), index=index)
        before_step(objective, 0)
        values.append([loss(objective, tape), loss(objective, tape, noise=0.5)])
    (own, own_later), (first, later) = values
    assert first == pytest.approx(3.0, rel=1e-5)
    assert later / first == pytest.approx(own_later / own, rel=1e-4)


def test_aphq_vits_code_starts_all_losses_at_2() -> None:
    """Blocks and head of its QDrop; ViT blocks of its own method, as before."""
    for method, index in (("qdrop-aphq", 2), ("qdrop-aphq", 3), ("aphq", 2), ("aphq", 3)):
        objective, tape = make(quick(method, reconstruct_mlp=False), index=index)
        assert objective.part_weights() == (2.0,)
        assert loss(objective, tape) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("name", ["mse_adalog", "prediction_pdquant"])
def test_undivided_losses_do_not_know_their_start(name: str) -> None:
    objective, tape = make(quick(loss=name))
    block, rows = tape.chain.segment(tape.index).block, SAMPLES
    with torch.no_grad():
        output = block(tape.full.whole[rows])
    twice = output if name == "mse_adalog" else torch.cat([output, output])
    first, again = float(value_of(objective, twice)), float(value_of(objective, 3 * twice))
    assert bool((objective.state.starts == 1).all())
    fresh, _ = make(quick(loss=name))
    assert float(value_of(fresh, 3 * twice)) == again != first


@pytest.mark.parametrize("mode", ["q", "qf"])
def test_least_squares_takes_one_pass_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """One pass for any k and mode; h and u keep their place, and later steps keep them."""
    objective, tape = make(quick(loss="least_squares", fisher_k=4, fisher_mode=mode, steps=9))
    assert objective.update_steps == {0}
    assert objective.passes == 0
    torch.manual_seed(0)
    h, u = torch.rand(tape.full[0].numel()), torch.randn(tape.full[0].numel())
    monkeypatch.setattr(objective_module, "least_squares_hessian", lambda *_: (h, u))
    monkeypatch.setattr(
        objective_module, "mean_gradient_and_error", lambda *_: pytest.fail("FIMA-Q's pass")
    )
    state = objective.state
    assert state.gradients is not None
    assert state.diagonal is not None
    places = state.gradients.data_ptr(), state.diagonal.data_ptr()
    for step in range(9):
        before_step(objective, step)
        loss(objective, tape)
    assert objective.passes == 1
    assert torch.equal(state.diagonal, h)
    assert torch.equal(state.gradients, u[None])
    assert (state.gradients.data_ptr(), state.diagonal.data_ptr()) == places
    assert state.starts.shape == (1,)


def perturbed_gradients(objective: BlockObjective, tape: Tape, epsilon: float) -> Tensor:
    """``|g(z + ε) - g(z - ε)|`` at the block's full-precision output, by the tape's batches."""
    assert tape.target is not None
    found = []
    for z, reference in zip(
        tape.target.whole.split(tape.batch_size),
        objective.reference.whole.split(tape.batch_size),
        strict=True,
    ):
        sides = []
        for shifted in (z + epsilon, z - epsilon):
            leaf = shifted.requires_grad_(True)
            value = kl_divergence(
                objective.tape.chain.tail(tape.index + 1, leaf), reference, 20.0
            ) * len(z)
            sides.append(torch.autograd.grad(value, leaf)[0])
        found.append((sides[0] - sides[1]).abs().flatten(1))
    return torch.cat(found)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
def test_perturbation_hessian_of_each_sample_lies_where_the_tape_lies(
    monkeypatch: pytest.MonkeyPatch, epsilon: float
) -> None:
    made: list[Tensor] = []
    original = Storage.empty

    def watch(self: Storage, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made.append(original(self, shape, dtype))
        return made[-1]

    monkeypatch.setattr(Storage, "empty", watch)
    objective, tape = make(quick(loss="perturb", perturbation=epsilon))
    assert objective.weights.whole is made[-1]
    assert objective.passes == 1
    assert objective.update_steps == frozenset()
    assert objective.state.diagonal is None
    set_quantized(objective.tape.chain, False)
    expected = perturbed_gradients(objective, tape, epsilon)
    assert expected.shape == (16, tape.full[0].numel())
    assert int((expected > 0).any(1).sum()) > 12  # rounding alone, which a sample may be spared
    assert torch.equal(objective.weights.whole, expected)
    assert objective.batch(mixed=False).weights is objective.weights.whole


def test_mean_perturbation_hessian_is_the_mean_of_the_samples_own() -> None:
    own, tape = make(quick(loss="perturb"))
    mean, _ = make(quick(loss="perturb_mean"))
    assert own.weights is not None
    assert mean.weights is None
    assert mean.batch(mixed=False).weights is None
    assert mean.state.diagonal is not None
    assert mean.state.diagonal.shape == (tape.full[0].numel(),)
    assert torch.allclose(mean.state.diagonal, own.weights.whole.mean(0), rtol=1e-5, atol=0)
    assert mean.passes == 1
    assert mean.update_steps == frozenset()


@pytest.mark.parametrize("name", ["perturb", "perturb_mean"])
def test_a_perturbation_hessian_of_zero_falls_back_and_says_so(name: str) -> None:
    objective, tape = make(
        quick(loss=name), divergence=Measured(lambda outputs, reference: 0 * outputs.sum())
    )
    assert objective.kind == "mse"
    assert objective.weights is None
    assert objective.notes == [
        "blocks.1: the perturbation Hessian is zero; squared error used instead"
    ]
    assert loss(objective, tape) == pytest.approx(1.0, rel=1e-5)
    plain, plain_tape = make(quick(loss="mse"))
    loss(plain, plain_tape)
    assert loss(objective, tape, noise=0.3) == pytest.approx(
        loss(plain, plain_tape, noise=0.3), rel=1e-6
    )


@pytest.mark.parametrize("name", ["perturb", "perturb_mean"])
def test_a_perturbation_hessian_that_is_no_number_is_an_error(name: str) -> None:
    with pytest.raises(NumericsError, match=r"^blocks\.1: the perturbation Hessian is nan"):
        make(
            quick(loss=name),
            divergence=Measured(lambda outputs, reference: (outputs * torch.nan).sum()),
        )


@pytest.mark.parametrize("dtype", ["float32", "tf32"])
def test_perturbation_passes_compute_as_the_frozen_parts_do(dtype: str) -> None:
    allowed = set()

    def divergence(outputs: Tensor, reference: Tensor) -> Tensor:
        allowed.add(torch.backends.cuda.matmul.allow_tf32)
        return kl_divergence(outputs, reference)

    make(quick(loss="perturb", frozen_dtype=dtype), divergence=Measured(divergence))
    assert allowed == {dtype == "tf32"}


@pytest.mark.parametrize("name", ["perturb", "perturb_mean"])
def test_with_a_perturbation_hessian_the_head_has_twice_the_divergence_over_its_start(
    name: str,
) -> None:
    objective, tape = make(quick(loss=name), index=3)
    assert (objective.kind, objective.passes, objective.weights) == ("head_relative", 0, None)
    before_step(objective, 0)
    assert tape.target is not None
    target, generator = tape.target.whole[SAMPLES], torch.Generator().manual_seed(0)
    with torch.no_grad():
        output = objective.tape.chain.segment(3).block(tape.full.whole[SAMPLES])
    noisy = output + 0.5 * torch.randn(output.shape, generator=generator)
    assert loss(objective, tape) == pytest.approx(2.0, rel=1e-5)
    expected = 2 * float(
        kl_divergence(noisy.double(), target.double())
        / kl_divergence(output.double(), target.double())
    )
    assert expected > 3
    assert loss(objective, tape, noise=0.5) == pytest.approx(expected, rel=1e-3)


def whole_model_terms(
    objective: BlockObjective, tape: Tape, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared error and divergence with this block alone quantized, and their gradients."""
    chain, block, kept = objective.tape.chain, objective.tape.chain.segment(tape.index).block, []
    set_quantized(chain, False)
    with torch.no_grad():
        reference = chain(x)
        inputs = chain.segment(2).before(chain.segment(1)(chain.segment(0)(x)))
        target = block(inputs)
    set_quantized(block, True)

    def keep(module: object, args: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_(True))
        return kept[0]

    handle = block.register_forward_hook(keep)
    logits = chain(x)
    handle.remove()
    error = sum(((row - goal) ** 2).sum() for row, goal in zip(kept[0], target, strict=True)) / len(
        x
    )
    p, q = (reference.double() / 20).softmax(-1), (logits.double() / 20).softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1).mean()
    assert isinstance(error, Tensor)
    slopes = [
        torch.autograd.grad(term, kept[0], retain_graph=True)[0] for term in (error, divergence)
    ]
    return error.detach(), divergence.detach(), slopes[0], slopes[1]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_prediction_loss_goes_through_the_rest_in_full_precision(share: float) -> None:
    """Value and gradient after the start, with other start values in other blocks."""
    objective, tape = make(quick(loss="prediction", prediction_share=share, w_bits=3, a_bits=3))
    assert objective.passes == 0
    assert objective.part_weights() == pytest.approx((1 - share, share))
    x = images(16)[SAMPLES]
    error, divergence, error_slope, divergence_slope = whole_model_terms(objective, tape, x)
    starts = torch.tensor([0.5 * float(error), 0.25 * float(divergence)])
    objective.state.starts.copy_(starts)
    output = (
        objective.tape.chain.segment(tape.index)
        .block(tape.full.whole[SAMPLES])
        .detach()
        .requires_grad_(True)
    )
    value = value_of(objective, output)
    (slope,) = torch.autograd.grad(value, output)
    assert torch.equal(objective.state.starts, starts)
    assert float(value.detach()) == pytest.approx((1 - share) * 2 + share * 4, rel=1e-4)
    expected = (1 - share) * error_slope / starts[0] + share * divergence_slope / starts[1]
    assert torch.allclose(slope, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_divergence_smaller_than_rounding_errors_of_float32_has_its_own_start() -> None:
    """At 8 bits the patch embedding hardly moves the prediction: KL in float32 would be noise."""
    objective, tape = make(quick(loss="prediction", w_bits=8, a_bits=8), index=0)
    loss(objective, tape)
    with torch.no_grad():
        logits = objective.tape.chain.tail(
            1, objective.tape.chain.segment(0).block(tape.full.whole[SAMPLES])
        )
    reference = objective.reference.whole[SAMPLES]
    exact = float(kl_divergence(logits.double(), reference.double(), 20.0))
    assert 0 < exact < 1e-6
    assert abs(float(kl_divergence(logits, reference, 20.0)) / exact - 1) > 0.02
    assert float(objective.state.starts[1]) == pytest.approx(exact, rel=1e-4)


def test_prediction_share_of_zero_is_the_squared_error_and_of_one_the_divergence_alone() -> None:
    def course(name: str, share: float = 0.5) -> tuple[list[float], Tensor]:
        objective, tape = make(quick(loss=name, prediction_share=share))
        values = [loss(objective, tape, noise) for noise in (0.0, 0.2, 0.5)]
        output = (
            objective.tape.chain.segment(tape.index)
            .block(tape.full.whole[SAMPLES])
            .detach()
            .requires_grad_(True)
        )
        return values, torch.autograd.grad(value_of(objective, output), output)[0]

    plain, plain_slope = course("mse")
    none, none_slope = course("prediction", 0.0)
    assert none == pytest.approx(plain, rel=1e-6)
    assert torch.allclose(
        none_slope, plain_slope, rtol=1e-5, atol=1e-6 * float(plain_slope.abs().max())
    )
    both, _ = course("prediction", 0.5)
    alone, alone_slope = course("prediction", 1.0)
    assert [2 * value for value in both] == pytest.approx(
        [a + b for a, b in zip(none, alone, strict=True)], rel=1e-5
    )
    assert alone[2] > 1.2
    # The norms behind the block remove a shift of all channels: the divergence ignores it.
    assert float(alone_slope.mean(-1).abs().max()) < 1e-4 * float(alone_slope.abs().max())
    assert float(plain_slope.mean(-1).abs().max()) > 1e-2 * float(plain_slope.abs().max())
