"""Step engines: they learn the same, and what compiled and captured steps rely on."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from closeness import assert_same_steps, distance
from small_models import chain_of, images, quick, swin, vit
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.errors import EngineError
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction import engines, flat
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.engines import COMPILE_STEPS, Engine, choose_engine, cpp_compiler
from fimaq_core.reconstruction.flat import WARM_UP, AllSamples, FedSamples, FlatStep, GraphStep
from fimaq_core.reconstruction.loss import Batch, LossState
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.reconstruct import expand_per_token
from fimaq_core.reconstruction.step import update
from fimaq_core.reconstruction.tape import Storage, Tape
from fimaq_core.samples import Samples

pytestmark = pytest.mark.slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
#: Model, image size, number of a block; the Swin's pads 10 x 10 tokens to windows of 4 and shifts.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "vit": (vit, 32, 2),
    "vit, first block": (vit, 32, 1),
    "vit, patch embedding": (vit, 32, 0),
    "vit, head": (vit, 32, 3),
    "swin": (lambda: swin(40), 40, 2),
}
#: The released learning rates, so that steps are as small as in a real run.
RELEASED: dict[str, object] = {"lr_alpha": 1e-3, "lr_scale": 4e-5, "w_bits": 3, "a_bits": 3}


@functools.cache
def calibrated(name: str, recipe: Recipe) -> tuple[BlockChain, Tensor, Tensor]:
    """A calibrated model, its images and full-precision outputs; to be copied."""
    build, size, _ = BLOCKS[name]
    chain, x = chain_of(build(), recipe), images(24, size)
    calibrate(chain, x, recipe)
    if recipe.per_token:
        expand_per_token(chain, x[:1])
    set_quantized(chain, False)
    with torch.no_grad():
        return chain, x, chain(x)


def trainer(engine: Engine, recipe: Recipe, name: str = "vit") -> BlockTrainer:
    """At a block of :data:`BLOCKS`."""
    chain, x, reference = copy.deepcopy(calibrated(name, recipe))
    index = BLOCKS[name][2]
    with_prefix = recipe.prefix_prob > 0 or recipe.loss == "fisher_brecq"
    tape = Tape(chain, x, Storage("device", CPU), with_prefix=with_prefix, batch_size=8)
    for _ in range(index):
        tape.advance()
    tape.compute_target()
    if recipe.loss == "glf":
        reference = tape.features(Samples(x)).whole
    objective = BlockObjective(chain, tape, recipe, reference, ClassifierDivergence(20.0), [])
    return BlockTrainer(chain.segment(index), objective, engine)


def flat_step(made: BlockTrainer) -> FlatStep:
    assert isinstance(made._step, FlatStep)
    return made._step


@dataclass
class Course:
    """Results of an optimisation.

    Attributes:
        losses: (steps,).
        start, alpha: rounding variables before and after.
        first_scales, scales: activation scales before and after.
    """

    losses: Tensor
    start: Tensor
    alpha: Tensor
    first_scales: Tensor
    scales: Tensor

    @property
    def changed(self) -> Tensor:
        """Where the decided rounding is not that of the start."""
        return (self.start >= 0) != (self.alpha >= 0)


def follow(made: BlockTrainer, steps: int) -> Course:
    """Do ``steps`` steps."""
    assert made.state.rounding is not None
    start, scales = made.state.rounding.alpha.clone(), made.state.scales.clone()
    losses = torch.stack([made.step(number).clone() for number in range(steps)])
    made._step.finish()
    return Course(
        losses, start, made.state.rounding.alpha.clone(), scales, made.state.scales.clone()
    )


def assert_same_learning(a: Course, b: Course, changes: int) -> None:
    """The same result but for flips; in the course at least ``changes`` roundings changed."""
    assert torch.equal(a.start, b.start)
    assert int(a.changed.sum()) >= changes
    agree = (a.alpha >= 0) == (b.alpha >= 0)
    assert float(agree.double().mean()) >= 0.999
    assert float(agree[a.changed | b.changed].double().mean()) >= 0.98
    # In so small a block a flip moves a batch's loss by up to some per cent, the variables hardly.
    assert distance(b.alpha - b.start, a.alpha - a.start) <= 0.02
    assert distance(b.scales - b.first_scales, a.scales - a.first_scales) <= 0.02
    assert float((a.losses / b.losses - 1).abs().median()) <= 1e-3
    assert float(b.losses[-50:].mean()) == pytest.approx(float(a.losses[-50:].mean()), rel=5e-3)


@functools.cache
def by_definition(name: str, method: str) -> Course:
    return follow(trainer("eager", quick(method, steps=200, **RELEASED), name), 200)


@pytest.mark.parametrize("method", ["fimaq", "qdrop"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_fused_learns_what_the_definition_learns(name: str, method: str) -> None:
    fused = follow(trainer("fused", quick(method, steps=200, **RELEASED), name), 200)
    assert_same_learning(by_definition(name, method), fused, changes=50)


@pytest.mark.skipif(
    cpp_compiler() is None, reason="torch.compile needs a C++ compiler, and none is found"
)
def test_compiled_learns_the_same_and_is_compiled_once_for_blocks_of_a_make() -> None:
    recipe = quick("fimaq", steps=200, **RELEASED)
    before = counters["stats"]["unique_graphs"]
    compiled = follow(trainer("compiled", recipe), 200)
    assert (
        counters["stats"]["unique_graphs"] == before + 2
    )  # loss and update, and none after the second Fisher pass
    assert_same_learning(by_definition("vit", "fimaq"), compiled, changes=50)
    name = "vit, first block"
    second, fused = (trainer(engine, recipe, name) for engine in ("compiled", "fused"))
    assert_same_steps(fused, [second], 4)
    assert counters["stats"]["unique_graphs"] == before + 2
    # At a rate far above the size of the scales, both project the same scales to their lower bound.
    fast = quick("fimaq", steps=200, **{**RELEASED, "lr_scale": 10.0})
    bounded, expected = (
        follow(trainer(engine, fast), 1).scales for engine in ("compiled", "fused")
    )
    assert counters["stats"]["unique_graphs"] == before + 2
    assert bool((bounded > 0).all())
    assert float(bounded.min()) < 0.1
    assert float(torch.isclose(bounded, expected, rtol=1e-4).double().mean()) > 0.99


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps made for compilation run as they are."""
    monkeypatch.setattr(flat, "_compiled", lambda function, *_: function)


NEW_LOSSES = ("perturb", "perturb_mean", "prediction", "least_squares")
NEW_LOSSES += ("mse_adalog", "prediction_pdquant", "glf")
#: Weights learned by straight-through gradients, at a rate that moves some codes in ten steps.
STRAIGHT: dict[str, object] = {"weight_learning": "straight-through", "lr_weight": 2e-2}
CASES: dict[str, tuple[str, str, dict[str, object]]] = {
    **{
        loss: ("vit", "fimaq", {"loss": loss})
        for loss in ("mse", "mae", "fisher_brecq", "fisher_diag", "fisher_lr")
    },
    "before each of the first steps": ("vit", "fimaq", {"fisher_mode": "qf", "fisher_k": 3}),
    "weights of parts": ("vit", "fimaq", {"fisher_p1": 0.3, "fisher_p2": 1.7}),
    "no dropping in passes": ("vit", "fimaq", {"fisher_drop": False}),
    "brecq": ("vit", "brecq", {}),
    "other shares": ("vit", "qdrop", {"prefix_prob": 0.25, "activation_prob": 0.75}),
    "prefix alone, nothing dropped": ("vit", "qdrop", {"prefix_prob": 1.0, "activation_prob": 1.0}),
    "everything dropped": ("vit", "qdrop", {"activation_prob": 0.0}),
    "scales not learned": ("vit", "qdrop", {"learn_scales": False}),
    "patch embedding": ("vit, patch embedding", "fimaq", {}),
    "head": ("vit, head", "fimaq", {}),
    "swin": ("swin", "fimaq", {}),
    **{loss: ("vit", "fimaq", {"loss": loss}) for loss in NEW_LOSSES},
    "prediction alone": ("vit", "pdquant", {"loss": "prediction", "prediction_share": 1.0}),
    "no mixed input": ("vit", "pdquant", {"prefix_prob": 0.0}),
    "the head's prediction": ("vit, head", "pdquant", {}),
    "another start": ("vit", "qdrop-aphq", {}),
    "twice the head's divergence over its start": ("vit, head", "fimaq", {"loss": "perturb_mean"}),
    "swin, prediction": ("swin", "pdquant", {}),
    "swin, least squares": ("swin", "lsvit", {}),
    "straight-through": ("vit", "qdrop", STRAIGHT),
    "glfq": ("swin", "fimaq", {"loss": "glf", **STRAIGHT}),
    "glfq's patch embedding": ("vit, patch embedding", "fimaq", {"loss": "glf", **STRAIGHT}),
    "glfq's head": ("vit, head", "fimaq", {"loss": "glf", **STRAIGHT}),
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("case", CASES)
def test_all_forms_take_the_same_steps(case: str) -> None:
    """Every loss and setting, over a few large steps with the regulariser on."""
    name, method, changes = CASES[case]
    recipe = quick(method, steps=10, lr_alpha=1e-2, lr_scale=1e-3, round_weight=0.1, **changes)
    fused, traced = (trainer(engine, recipe, name) for engine in ("fused", "compiled"))
    moved = assert_same_steps(trainer("eager", recipe, name), [fused, traced], 10)
    assert float(moved.median()) > 0.005


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("engine", ["eager", "fused", "compiled"])
def test_bfloat16_steps_on_every_engine(engine: Engine) -> None:
    """Products are rounded (the course is not the exact one), values and results are float32."""
    exact = follow(trainer(engine, quick("qdrop", steps=5)), 5)
    rough = follow(trainer(engine, quick("qdrop", steps=5, step_dtype="bfloat16")), 5)
    assert rough.losses.dtype == rough.alpha.dtype == rough.scales.dtype == torch.float32
    assert not torch.equal(exact.alpha, rough.alpha)
    assert torch.allclose(exact.losses, rough.losses, rtol=0.05)


def capture(
    step: Callable[[], Tensor], calls: list[Callable[[], Tensor]]
) -> tuple[Callable[[], None], Tensor]:
    """Stand in for the capture of a CUDA graph: a replay leaves the result in one place."""
    calls.append(step)
    result = torch.zeros(())
    return lambda: result.copy_(step()), result


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("loss", ["fisher_dplr", *NEW_LOSSES])
def test_graph_step_warms_up_captures_once_and_replays(loss: str) -> None:
    recipe, calls, single = quick("fimaq", steps=10, fisher_k=2, loss=loss), [], []
    made = trainer("graph", recipe)
    step = made._step
    assert isinstance(step, GraphStep)
    step.capture = lambda function: capture(function, calls)
    places = []

    def watch(number: int) -> Tensor:
        before = len(calls)
        loss = made.step(number)
        single.append(not calls)
        places.append(loss.data_ptr())
        assert len(calls) == (number >= WARM_UP)
        assert before == (number > WARM_UP)
        return loss

    assert made.state.rounding is not None
    losses = torch.stack([watch(number).clone() for number in range(10)])
    assert single == [True] * WARM_UP + [False] * (10 - WARM_UP)
    assert len(set(places[WARM_UP:])) == 1
    step.finish()
    same = follow(trainer("compiled", recipe), 10)
    assert torch.equal(losses, same.losses)
    assert torch.equal(made.state.rounding.alpha, same.alpha)
    assert torch.equal(made.state.scales, same.scales)
    assert int(step.counter) == 10


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("engine", ["fused", "compiled"])
@pytest.mark.parametrize("loss", ["fisher_dplr", "fisher_brecq", "least_squares", "prediction"])
def test_what_a_step_reads_and_writes_keeps_its_address(
    engine: Engine, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick("fimaq", steps=8, fisher_k=2, loss=loss)
    made = trainer(engine, recipe)
    step, block = flat_step(made), made.segment.block
    seen: list[list[int]] = []
    values: list[list[Tensor]] = []
    original = step._call

    def pointers(tensors: list[Tensor]) -> None:
        seen[-1].extend(tensor.data_ptr() for tensor in tensors)

    def watch(function: Callable[..., Any], *args: Any) -> Any:
        if function is not update:
            seen.append([])
            flat = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            pointers(flat + list(block.parameters()) + list(block.buffers()))
            return original(function, *args)
        kept = tree_leaves(args[0])
        pointers(kept)
        values.append([tensor.clone() for tensor in kept])
        return original(function, *args)

    monkeypatch.setattr(step, "_call", watch)
    for number in range(8):
        made.step(number)
    assert made.objective.passes == {"fisher_dplr": 2, "prediction": 0}.get(loss, 1)
    assert len(seen) == 8
    assert all(step_pointers == seen[0] for step_pointers in seen)
    # These change from step to step, in place.
    names = [
        "counter", "rates", "starts", "alpha", "offset", "gain", "soft", "scales", "floor", "m",
        "v", "m of s", "v of s",
    ]  # fmt: skip
    changed = {
        name
        for name, first, last in zip(names, values[0], values[-1], strict=True)
        if not torch.equal(first, last)
    }
    assert changed >= {"counter", "starts", "alpha", "soft", "scales", "m", "v", "m of s", "v of s"}
    assert not changed & {"rates", "offset", "gain", "floor"}


class NothingIsRead(TorchDispatchMode):
    """Refuses operations that wait for the device's numbers."""

    REFUSED = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "_unique2",
        "allclose",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.REFUSED:
            raise AssertionError(f"a number is read from the device: {name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("engine", ["fused", "compiled"])
@pytest.mark.parametrize(
    "case",
    [
        "mse", "fisher_brecq", "fisher_diag", "fisher_lr", "weights of parts", "head", "swin",
        *NEW_LOSSES,
        "twice the head's divergence over its start",
    ],
)  # fmt: skip
def test_no_step_reads_a_number_from_the_device(engine: Engine, case: str) -> None:
    name, method, changes = CASES[case]
    made = trainer(engine, quick(method, steps=8, fisher_k=1, **changes), name)
    made.step(0)
    step = flat_step(made)
    for read in (float, bool, lambda counter: torch.equal(counter, counter)):
        with NothingIsRead(), pytest.raises(AssertionError, match="a number is read"):
            read(step.counter)
    with NothingIsRead():
        for _ in range(4):
            loss = step.once()
    assert torch.isfinite(loss)
    assert int(step.counter) == 5


def test_feeder_brings_each_steps_batch_to_the_same_place() -> None:
    torch.manual_seed(0)
    sources = Batch(torch.randn(12, 3, 5), None, torch.randn(12, 7), side=torch.arange(12))
    samples = torch.stack([torch.randperm(12)[:4] for _ in range(7)])
    feeder = FedSamples(sources, samples, CPU, LossState(torch.zeros(1)))
    places = [part.data_ptr() for part in feeder.data.tensors]
    for number in (0, 1, 2, 3, 4, 5, 6, 2):
        feeder.load(number)
        assert feeder.data.prefix is None
        for source, part in zip(sources.tensors, feeder.data.tensors, strict=True):
            assert torch.equal(part, source[samples[number]])
        assert [part.data_ptr() for part in feeder.data.tensors] == places


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("engine", ["fused", "compiled", "graph"])
@pytest.mark.parametrize("loss", ["fisher_dplr", "fisher_brecq", *NEW_LOSSES])
def test_fed_steps_are_the_same_bit_for_bit(engine: Engine, loss: str) -> None:
    recipe = quick("fimaq", steps=8, fisher_k=2, loss=loss)
    expected = follow(trainer("compiled" if engine == "graph" else engine, recipe), 8)
    made = trainer(engine, recipe)
    step = flat_step(made)
    assert isinstance(step.present, AllSamples)
    step.present = FedSamples(step.present.data, made.schedule.samples, CPU, made.objective.state)
    if isinstance(step, GraphStep):
        step.capture = lambda function: capture(function, [])
    found = follow(made, 8)
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.alpha, expected.alpha)
    assert torch.equal(found.scales, expected.scales)


def compiler(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    monkeypatch.setattr(engines, "cpp_compiler", lambda: found)


def test_engine_chosen_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(monkeypatch, "g++")
    assert choose_engine("auto", CPU, COMPILE_STEPS - 1) == "fused"
    assert choose_engine("auto", CPU, COMPILE_STEPS) == "compiled"
    assert choose_engine("auto", CUDA, 1) == "graph"
    compiler(monkeypatch, None)
    assert choose_engine("auto", CPU, 10 * COMPILE_STEPS) == "fused"
    assert choose_engine("auto", CUDA, 10 * COMPILE_STEPS) == "graph"


def test_engine_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(monkeypatch, "g++")
    for engine in ("eager", "fused", "compiled"):
        for device in (CPU, CUDA):
            assert choose_engine(engine, device, 1) == engine
    assert choose_engine("graph", CUDA, 1) == "graph"


def test_engine_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(monkeypatch, "g++")
    with pytest.raises(
        EngineError,
        match=r"'graph' needs a CUDA device, not cpu: choose 'auto', 'compiled' or 'fused'",
    ):
        choose_engine("graph", CPU, 20_000)
    compiler(monkeypatch, None)
    with pytest.raises(
        EngineError, match=r"needs a C\+\+ compiler .*: install one or choose 'fused'"
    ):
        choose_engine("compiled", CPU, 20_000)
    for engine in ("eager", "fused"):
        assert choose_engine(engine, CPU, 1) == engine


def test_step_that_cannot_be_compiled_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise TorchDynamoException("no such operation\nand much more")

    monkeypatch.setattr(flat, "_compiled", lambda *_: broken)
    with pytest.raises(
        EngineError, match=r"^blocks\.1: .*\(no such operation\): use the step engine 'fused'"
    ):
        trainer("compiled", quick("qdrop")).step(0)


def test_more_makes_than_pytorch_allows_by_itself() -> None:
    """A Swin has a dozen structures of blocks; PyTorch compiles a function eight times."""
    with torch._dynamo.config.patch(
        recompile_limit=8
    ):  # pytest's own patch would leave the setting deleted
        flat._compiled.__wrapped__(flat.update, "cpu", 1)
        assert torch._dynamo.config.recompile_limit >= 100
    assert torch._dynamo.config.recompile_limit >= 8


def test_blocks_of_a_make_have_one_layout() -> None:
    recipe = quick()
    first, second = (trainer("fused", recipe, name) for name in ("vit, first block", "vit"))
    assert first.state.layout == second.state.layout
    assert hash(flat_step(first).plan) == hash(flat_step(second).plan)
    assert flat_step(first).plan == flat_step(second).plan
    assert first.state.layout != trainer("fused", recipe, "vit, head").state.layout
    assert first.state.layout.streams == 1 + 8


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("engine", ["eager", "fused", "compiled", "graph"])
@pytest.mark.parametrize("drop", [True, False])
def test_a_fisher_pass_computes_fused_and_gives_the_engine_its_form_back(
    engine: Engine, drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(engine, quick("fimaq", fisher_drop=drop, activation_prob=0.75))
    original, passes = made.objective.update, []

    def how() -> tuple[set[str | None], set[float]]:
        quantizers = made.state.quantizers
        return {quantizer.learning for quantizer in quantizers}, {
            quantizer.keep_probability for quantizer in quantizers
        }

    def watch(forward: Callable[[Tensor], Tensor]) -> None:
        passes.append(how())
        original(forward)

    monkeypatch.setattr(made.objective, "update", watch)
    made.step(0)
    assert passes == [({"fused"}, {0.75 if drop else 1.0})]
    assert how() == ({engines.STEPS[engine].form}, {0.75})


@pytest.mark.parametrize("engine", ["eager", "fused", "compiled", "graph"])
@pytest.mark.usefixtures("uncompiled")
def test_detaching_leaves_nothing_behind(engine: Engine) -> None:
    made = trainer(engine, quick("fimaq", lr_scale=1e-2, steps=2, fisher_k=1))
    state, block = made.state, made.segment.block
    names = set(block.state_dict())
    before = {name: value.clone() for name, value in block.state_dict().items()}
    assert all(layer.soft for layer in state.layers)
    assert {quantizer.learning for quantizer in state.quantizers} == {engines.STEPS[engine].form}
    assert {quantizer.keep_probability for quantizer in state.quantizers} == {0.5}
    for number in range(2):
        made.step(number)
    made._step.finish()
    state.detach()
    assert not any(layer.soft for layer in state.layers)
    assert {quantizer.learning for quantizer in state.quantizers} == {None}
    assert {quantizer.keep_probability for quantizer in state.quantizers} == {1.0}
    assert all(
        not parameter.requires_grad and parameter.grad is None for parameter in block.parameters()
    )
    assert set(block.state_dict()) == names
    learned = dict(zip((name for name, _ in state.layout.scales), state.quantizers, strict=True))
    pieces = state.scales.split([quantizer.scale.numel() for quantizer in state.quantizers])
    for name, piece in zip(learned, pieces, strict=True):
        assert torch.equal(learned[name].scale.flatten(), piece)
        assert learned[name].scale.data_ptr() != piece.data_ptr()
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in learned), name
