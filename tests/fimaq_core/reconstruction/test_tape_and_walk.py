"""The walk over a chain: how often blocks run, the tape's content, reproducible bits."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import chain_of, deit, images, quick, swin, vit
from torch import Tensor, nn

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.errors import NumericsError, RecipeError
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import QuantConv2d, QuantMatMul, quant_layers, set_quantized
from fimaq_core.pipeline import freeze, quantize_chain
from fimaq_core.quantizers import activation
from fimaq_core.recipe import UNDIVIDED, Recipe
from fimaq_core.reconstruction import objective as objective_module
from fimaq_core.reconstruction import reconstruct as reconstruct_module
from fimaq_core.reconstruction import step as step_module
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.reconstruct import expand_per_token, reconstruct
from fimaq_core.reconstruction.tape import Storage, Tape
from fimaq_core.store import Resources

pytestmark = pytest.mark.slow

KL = ClassifierDivergence(20.0)


@torch.no_grad()
def logits(chain: BlockChain, x: Tensor) -> Tensor:
    return chain(x)


def quantized(
    recipe: Recipe, build: Callable[[], nn.Module] = vit, size: int = 32, **resources: Any
) -> BlockChain:
    chain = chain_of(build(), recipe)
    quantize_chain(chain, images(24, size), recipe, KL, Resources(batch_size=8, **resources))
    return chain


def same_state(a: BlockChain, b: BlockChain) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def count_block_forwards(
    monkeypatch: pytest.MonkeyPatch, depth: int, recipe: Recipe
) -> dict[str, Counter[str]]:
    """Count forwards of each segment's block: in training, the walk and Fisher passes."""
    counts: dict[str, Counter[str]] = {"train": Counter(), "walk": Counter(), "fisher": Counter()}
    phase = ["walk"]

    def within(module: Any, name: str, label: str) -> None:
        original = getattr(module, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            before, phase[0] = phase[0], label
            try:
                return original(*args, **kwargs)
            finally:
                phase[0] = before

        monkeypatch.setattr(module, name, run)

    with monkeypatch.context() as monkeypatch:
        within(reconstruct_module, "optimise_block", "train")
        within(objective_module, "mean_gradient_and_error", "fisher")
        chain = chain_of(vit(depth), recipe)
        for segment in chain:
            segment.block.register_forward_pre_hook(
                lambda _, __, label=segment.label: counts[phase[0]].__setitem__(
                    label, counts[phase[0]][label] + 1
                )
            )
        quantize_chain(chain, images(24), recipe, KL, Resources(batch_size=8))
    return counts


def test_block_forwards_grow_linearly_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = quick(steps=6, fisher_k=2)
    batches = 3
    # Calibration, the number of tokens, the model's outputs, and the block in both forms.
    walk = 1 + 1 + batches + batches + batches
    totals, fisher = {}, {}
    for depth in (4, 8):
        counts = count_block_forwards(monkeypatch, depth, recipe)
        labels = ["patch_embed", *(f"blocks.{i}" for i in range(depth)), "head"]
        assert counts["train"] == dict.fromkeys(labels, recipe.steps)
        assert counts["walk"] == dict.fromkeys(labels, walk)
        totals[depth] = counts["train"].total() + counts["walk"].total()
        # Before block i come the passes of the i blocks before it; each but the head has its own.
        assert counts["fisher"] == {
            label: recipe.fisher_k * batches * (number + (label != "head"))
            for number, label in enumerate(labels)
        }
        segments = depth + 2
        tails = sum(segments - index for index in range(segments - 1))
        fisher[depth] = counts["fisher"].total()
        assert fisher[depth] == recipe.fisher_k * batches * tails
    assert totals[8] - totals[4] == 4 * (walk + recipe.steps)
    assert fisher[8] > 2 * fisher[4]


def test_methods_without_fisher_information_make_no_tail_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = count_block_forwards(monkeypatch, 2, quick("brecq"))
    assert counts["fisher"].total() == 0
    # Without per-token scales nothing counts tokens. The prefix runs only for the errors.
    assert counts["walk"]["blocks.0"] == 1 + 3 + 3 + 3


BUILDERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (vit, 32),
    "deit": (deit, 32),
    "swin": (lambda: swin(40), 40),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_tape_equals_whole_model_passes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Inputs and targets of every block, in full precision and behind the quantized prefix."""
    build, size = BUILDERS[name]
    recipe, x = quick(), images(24, size)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    original = reconstruct_module.optimise_block

    def look(segment: Segment, objective: BlockObjective, *args: Any) -> Tensor:
        tape = objective.tape
        assert tape.prefix is not None
        assert tape.target is not None
        seen.append((tape.full.whole.clone(), tape.prefix.whole.clone(), tape.target.whole.clone()))
        return original(segment, objective, *args)

    monkeypatch.setattr(reconstruct_module, "optimise_block", look)
    chain = chain_of(build(), recipe)
    with torch.no_grad():
        expected_output = chain(x)
    calibrate(chain, x, recipe)
    reconstruct(chain, x, recipe, KL, resources=Resources(batch_size=7))
    assert len(seen) == len(chain)

    def block_inputs(quantized_before: int) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and outputs of all blocks in one pass with the model's first blocks quantized."""
        inputs, outputs, handles = [], [], []

        def keep(_: object, args: tuple[Tensor, ...], out: Tensor) -> None:
            inputs.append(args[0].clone())
            outputs.append(out.clone())

        for index, segment in enumerate(chain):
            set_quantized(segment, index < quantized_before)
            handles.append(segment.block.register_forward_hook(keep))
        with torch.no_grad():
            chain(x)
        for handle in handles:
            handle.remove()
        return inputs, outputs

    full_inputs, full_outputs = block_inputs(0)
    assert torch.allclose(full_outputs[-1], expected_output, atol=1e-4)
    for index, (full, prefix, target) in enumerate(seen):
        assert torch.allclose(full, full_inputs[index], rtol=1e-5, atol=1e-5)
        assert torch.allclose(target, full_outputs[index], rtol=1e-5, atol=1e-5)
        expected = block_inputs(index)[0][index]
        assert torch.allclose(prefix, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(prefix, full) == (index == 0)


def test_tape_keeps_no_prefix_where_nobody_asks() -> None:
    recipe = quick("brecq")
    chain, x = chain_of(vit(1), recipe), images(8)
    calibrate(chain, x, recipe)
    tape = Tape(chain, x, Storage("device", torch.device("cpu")), with_prefix=False)
    tape.advance()
    assert tape.prefix is None


@pytest.mark.parametrize("method", ["fimaq", "brecq"])
def test_placements_give_the_same_bits(method: str) -> None:
    recipe = quick(method)
    device = quantized(recipe)
    for placement in ("host", "disk"):
        assert same_state(device, quantized(recipe, placement=placement))


def test_brecq_gradients_may_live_on_disk() -> None:
    recipe = quick(loss="fisher_brecq")
    assert same_state(quantized(recipe), quantized(recipe, placement="disk"))


@pytest.mark.parametrize("name", BUILDERS)
def test_same_seed_same_bits(name: str) -> None:
    build, size = BUILDERS[name]
    first = quantized(quick(), build, size)
    torch.manual_seed(99)  # the global state must not matter
    second = quantized(quick(), build, size)
    assert same_state(first, second)
    x = images(5, size, seed=3)
    assert torch.equal(logits(first, x), logits(second, x))


def test_another_seed_another_result() -> None:
    first, second = quantized(quick()), quantized(quick(seed=1))
    assert not torch.equal(logits(first, images(5)), logits(second, images(5)))


def test_off_leaves_the_outputs_alone() -> None:
    recipe = quick(w_bits=32, a_bits=32)
    model = vit(2)
    x = images(6)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        chain = chain_of(model, recipe)
        before = chain(x)
    quantize_chain(chain, images(24), recipe, KL, Resources(batch_size=8))
    assert torch.equal(logits(chain, x), before)
    assert torch.allclose(before, expected, atol=1e-5)


@pytest.mark.parametrize("bits", [(4, 32), (32, 4)])
def test_weights_or_activations_alone(bits: tuple[int, int]) -> None:
    recipe = quick(w_bits=bits[0], a_bits=bits[1])
    chain = quantized(recipe)
    for name, layer in quant_layers(chain):
        if not isinstance(layer, QuantMatMul):
            assert bool(layer.weight_quantizer.codes.numel()) == (bits[0] == 4), name
    reference = chain_of(vit(), quick(w_bits=32, a_bits=32))
    x = images(6)
    difference = (logits(chain, x) - logits(reference, x)).abs().mean()
    assert 1e-4 < float(difference) < 1


def test_scales_per_token() -> None:
    """One scale per token position for linear inputs; per head and row (a) or column (b)."""
    recipe = quick()
    cases: list[tuple[Callable[[], nn.Module], int, dict[str, Any]]] = [
        (vit, 32, {"mlp": (17,), "attention": 17, "head width": 16}),
        (lambda: swin(40), 40, {"mlp": (100, 25), "attention": 16, "head width": 8}),
    ]
    for build, size, tokens in cases:
        chain, x = chain_of(build(), recipe), images(8, size)
        calibrate(chain, x, recipe)
        before = logits(chain, x)
        expand_per_token(chain, x[:1])
        assert torch.equal(logits(chain, x), before)
        for name, layer in quant_layers(chain):
            if isinstance(layer, QuantMatMul):
                a, b = layer.a_quantizer, layer.b_quantizer
                count = tokens["attention"]
                columns = count if name.endswith("query_key") else tokens["head width"]
                assert a.scale.shape[2:] == (count, 1), name
                assert b.scale.shape[2:] == (1, columns), name
                assert a.zero_point.shape[2:] == b.zero_point.shape[2:] == (1, 1), name
            elif name.endswith(("fc1", "fc2")):
                assert layer.input_quantizer.scale.shape[1] in tokens["mlp"], name
            elif name.endswith(("qkv", "proj")) and not isinstance(layer, QuantConv2d):
                assert layer.input_quantizer.scale.shape == (1, tokens["attention"], 1), name
                assert layer.input_quantizer.zero_point.numel() == 1
            elif not isinstance(layer, QuantConv2d):  # patch merging, head
                assert layer.input_quantizer.scale.numel() == 1, name
        shapes = [tuple(q.shape) for q in chain.state_dict().values()]
        expand_per_token(chain, x[:1])
        assert shapes == [tuple(q.shape) for q in chain.state_dict().values()]


def test_learned_values_are_what_the_method_may_change() -> None:
    """Reconstruction decides codes and activation scales; all other tensors stay."""
    recipe = quick(steps=12)
    chain, x = chain_of(vit(2), recipe), images(24)
    calibrate(chain, x, recipe)
    expand_per_token(chain, x[:1])
    before = {name: value.clone() for name, value in chain.state_dict().items()}
    reconstruct(chain, x, recipe, KL, resources=Resources(batch_size=8))
    freeze(chain)
    flipped = 0
    for name, value in chain.state_dict().items():
        if name.endswith("input_quantizer.scale") or name.endswith(
            ("a_quantizer.scale", "b_quantizer.scale")
        ):
            assert value.numel() == 0 or not torch.equal(value, before[name]), name
            assert (value > 0).all(), name
        elif not name.endswith("codes"):
            assert torch.equal(value, before[name]), name
    for name, layer in quant_layers(chain):
        if isinstance(layer, QuantMatMul):
            continue
        quantizer = layer.weight_quantizer
        ratio = layer.weight.flatten(1) / quantizer.scale
        low = (ratio.floor() + quantizer.zero_point).clamp(0, quantizer.levels - 1)
        high = (ratio.floor() + 1 + quantizer.zero_point).clamp(0, quantizer.levels - 1)
        codes = quantizer.codes.float()
        assert ((codes == low) | (codes == high)).all(), name
        nearest = (ratio.round() + quantizer.zero_point).clamp(0, quantizer.levels - 1)
        flipped += int((codes != nearest).sum())
    assert flipped > 20


def test_baselines_keep_one_scale_a_tensor() -> None:
    for method in ("brecq", "qdrop"):
        for name, layer in quant_layers(quantized(quick(method))):
            if isinstance(layer, QuantMatMul):
                assert layer.a_quantizer.scale.shape == (1, 2, 1, 1), name
            elif not isinstance(layer, QuantConv2d):
                assert layer.input_quantizer.scale.numel() == 1, name


class MaskWatch:
    """Note threshold and key of every mask of the fused form, and True for Fisher passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[int, tuple[int, ...]]] = []
        self.passes: list[tuple[int, tuple[int, ...]]] = []
        self._present = self.steps
        for module in (activation, step_module):
            monkeypatch.setattr(module, "eager_mask", self._watch(module.eager_mask))
        original = objective_module.mean_gradient_and_error

        def within(*args: Any) -> tuple[Tensor, Tensor]:
            self._present = self.passes
            result = original(*args)
            self._present = self.steps
            return result

        monkeypatch.setattr(objective_module, "mean_gradient_and_error", within)

    def _watch(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def draw(like: Tensor, key: Tensor, threshold: int, *args: Any) -> Tensor:
            self._present.append((threshold, tuple(key.tolist())))
            return original(like, key, threshold, *args)

        return draw


def test_brecq_neither_mixes_nor_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = MaskWatch(monkeypatch)
    quantized(quick("brecq"))
    assert watch.steps == watch.passes == []
    quantized(quick("qdrop"))
    assert {threshold for threshold, _ in watch.steps} == {128}
    quantized(quick("qdrop", prefix_prob=0.25, activation_prob=0.75))
    assert {threshold for threshold, _ in watch.steps} == {64, 128, 192}


@pytest.mark.parametrize("drop", [True, False])
def test_fisher_passes_may_run_without_dropping(
    drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = MaskWatch(monkeypatch)
    quantized(quick(fisher_drop=drop))
    assert {threshold for threshold, _ in watch.steps} == {128}
    assert {threshold for threshold, _ in watch.passes} == ({128} if drop else set())


def test_every_mask_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over blocks, steps, quantizers, Fisher passes and their batches."""
    recipe = quick(steps=4, fisher_k=2)
    watch = MaskWatch(monkeypatch)
    chain = quantized(recipe)
    quantizers = 8  # in a block of the ViT: four linear layers and two products
    assert len(watch.passes) == 2 * recipe.fisher_k * 3 * quantizers
    # Blocks mix their input (but the first segment) and the head has one quantizer.
    assert len(watch.steps) == recipe.steps * (2 * (quantizers + 1) + 2)
    assert len(chain) == 4
    keys = [key for _, key in watch.steps + watch.passes]
    assert len(set(keys)) == len(keys)


LOSSES = [
    ("mse", "q"), ("mae", "q"), ("fisher_brecq", "q"), ("fisher_diag", "q"), ("fisher_diag", "qf"),
    ("fisher_lr", "q"),
    ("fisher_lr", "qf"), ("fisher_dplr", "q"), ("fisher_dplr", "qf"), ("perturb", "q"),
    ("perturb_mean", "q"),
    ("prediction", "q"), ("least_squares", "q"), ("least_squares", "qf"),
    ("mse_adalog", "q"), ("prediction_pdquant", "q"),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "mode"), LOSSES)
def test_every_loss_goes_down(monkeypatch: pytest.MonkeyPatch, loss: str, mode: str) -> None:
    """Whole batches, no dropping, no regulariser: the loss falls until a Fisher pass resets it."""
    recipe = quick(
        loss=loss, fisher_mode=mode, steps=48, batch_size=24, activation_prob=1.0,
        prefix_prob=0.0, round_weight=0.0, lr_alpha=0.01, lr_scale=1e-3, w_bits=3, a_bits=3,
    )  # fmt: skip
    course: dict[str, list[float]] = {}
    original = reconstruct_module.optimise_block

    def follow(segment: Segment, *args: Any) -> Tensor:
        values = course[segment.label] = []
        return original(segment, *args[:-1], lambda _, value: values.append(float(value)))

    monkeypatch.setattr(reconstruct_module, "optimise_block", follow)
    chain, x = chain_of(vit(2), recipe), images(24)
    calibrate(chain, x, recipe)
    log = reconstruct(chain, x, recipe, KL, resources=Resources(batch_size=8))
    assert list(course) == list(log.last_loss) == ["patch_embed", "blocks.0", "blocks.1", "head"]
    start = {"mse": 1, "mae": 1, "fisher_brecq": 1, "prediction": 1}.get(loss, 2)
    passes = {
        "mse": 0,
        "mae": 0,
        "prediction": 0,
        "mse_adalog": 0,
        "prediction_pdquant": 0,
        "fisher_diag": 2,
        "fisher_lr": 2,
        "fisher_dplr": 2,
    }.get(loss, 1)
    anew = (
        {"q": 24, "qf": 1}[mode] if passes == 2 else 0
    )  # the step before which the second and last pass ran
    for label in ("blocks.0", "blocks.1"):
        values = course[label]
        if loss in UNDIVIDED:
            start = values[0]
        assert len(values) == 48
        assert log.last_loss[label] == values[-1]
        assert values[0] == pytest.approx(start, rel=1e-5)
        assert values[anew] == pytest.approx(start, rel=1e-5)
        assert values[23] < 0.97 * start, (label, values)
    assert course["head"][-1] < 0.97 * course["head"][0]
    assert log.fisher_passes == {
        "patch_embed": passes, "blocks.0": passes, "blocks.1": passes, "head": 0,
    }  # fmt: skip


def test_reconstruction_beats_calibration_alone() -> None:
    """On its images the reconstructed model is nearer to full precision than a calibrated one."""
    recipe = quick(steps=200, w_bits=3, a_bits=3, lr_alpha=0.02)
    x = images(24)
    reference = logits(chain_of(vit(2), recipe), x)
    calibrated = chain_of(vit(2), recipe)
    calibrate(calibrated, x, recipe)
    reconstructed = quantized(recipe)
    before = (logits(calibrated, x) - reference).square().mean()
    after = (logits(reconstructed, x) - reference).square().mean()
    assert float(after) < 0.8 * float(before)


def test_bfloat16_for_the_frozen_parts() -> None:
    plain, x = quantized(quick()), images(24)
    half = quantized(quick(frozen_dtype="bfloat16"))
    reference = logits(chain_of(vit(), quick()), x)
    assert all(value.dtype != torch.bfloat16 for value in half.state_dict().values())
    assert not same_state(plain, half)
    error = (logits(plain, x) - reference).square().mean()
    error_half = (logits(half, x) - reference).square().mean()
    assert float(error_half) < 1.5 * float(error)
    # Closer to each other than two results with independent errors would be.
    assert float((logits(half, x) - logits(plain, x)).square().mean()) < float(error + error_half)


def test_bad_settings_are_explained() -> None:
    recipe = quick(batch_size=25)
    chain = chain_of(vit(1), recipe)
    calibrate(chain, images(8), recipe)
    with pytest.raises(RecipeError, match=r"24 calibration images are fewer than a batch of 25"):
        reconstruct(chain, images(24), recipe, KL)
    recipe = quick("qdrop", lr_scale=1e38)
    chain = chain_of(vit(1), recipe)
    calibrate(chain, images(8), recipe)
    with pytest.raises(NumericsError, match="lower"):
        reconstruct(chain, images(24), recipe, KL)


def test_progress_runs_to_its_end() -> None:
    seen = []
    quantized(quick(), on_progress=seen.append)
    calibration = [event for event in seen if event.stage == "calibrate"]
    steps = [event for event in seen if event.stage == "reconstruct"]
    for events in (calibration, steps):
        assert [event.done for event in events] == sorted(event.done for event in events)
        assert events[-1].done == events[-1].total
    assert steps[-1].total == 4 * 6
    assert {event.block for event in steps} >= {"patch_embed", "blocks.0", "blocks.1", "head"}
