"""Figures of reconstructed blocks: computed directly, harmless to results, kept by checkpoints."""

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import chain_of, images, quick, swin, vit
from small_pyramid import Positions, by_hand, pyramid, varied
from staged import run_stage
from torch import Tensor

from fimaq_core.chain import BlockChain
from fimaq_core.checkpoint import Fingerprint, load_checkpoint, save_checkpoint
from fimaq_core.errors import CheckpointError
from fimaq_core.fisher import passes
from fimaq_core.fisher.divergence import ClassifierDivergence, Divergence
from fimaq_core.fisher.passes import Sweep
from fimaq_core.layers import set_quantized
from fimaq_core.pipeline import CALIBRATE, RECONSTRUCT, freeze, quantize_chain
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction import reconstruct as reconstruct_module
from fimaq_core.reconstruction.reconstruct import ReconstructionLog
from fimaq_core.reconstruction.sample_objective import SampleObjective
from fimaq_core.reconstruction.tape import Placement, Tape, mean_of, over, squared_sum
from fimaq_core.samples import Samples
from fimaq_core.store import Part, Resources

pytestmark = pytest.mark.slow

KL = ClassifierDivergence(20.0)
FEW: dict[str, Any] = {"mlp_batch": 8, "mlp_steps": 3}
ONE_BY_ONE: dict[str, Any] = {
    "calibration_images": 5,
    "range_images": 5,
    "batch_size": 1,
    "mlp_batch": 1,
    "mlp_steps": 3,
}


@torch.no_grad()
def block_outputs(chain: BlockChain, x: Tensor) -> dict[str, Tensor]:
    """Outputs of every block, by a plain forward of the whole model."""
    found: dict[str, Tensor] = {}
    handles = [
        segment.block.register_forward_hook(
            lambda _, __, out, label=segment.label: found.__setitem__(label, out)
        )
        for segment in chain
    ]
    chain(x)
    for handle in handles:
        handle.remove()
    return found


def direct_errors(float_chain: BlockChain, chain: BlockChain, x: Tensor) -> dict[str, float]:
    set_quantized(float_chain, False)
    set_quantized(chain, True)
    full, found = block_outputs(float_chain, x), block_outputs(chain, x)
    return {
        label: float((found[label] - f).double().square().sum() / f.double().square().sum())
        for label, f in full.items()
    }


CASES: dict[str, tuple[Recipe, Callable[[], torch.nn.Module], int]] = {
    "fimaq": (quick(), vit, 32),
    "swin": (quick(), lambda: swin(40), 40),
    "no mixed inputs": (quick("brecq"), vit, 32),
    "another teacher": (quick("aphq", **FEW), vit, 32),
    "two bits": (quick("qdrop", w_bits=2, a_bits=2), vit, 32),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_are_those_of_the_whole_model_up_to_the_block(case: str) -> None:
    recipe, build, size = CASES[case]
    chain, x = chain_of(build(), recipe), images(24, size)
    before = copy.deepcopy(chain)
    log = quantize_chain(chain, x, recipe, KL, Resources(batch_size=7))
    expected = direct_errors(before, chain, x)
    assert list(log.error) == list(log.last_loss) == list(expected)
    assert log.error == pytest.approx(expected, rel=1e-3)
    assert all(1e-5 < value < 2 for value in log.error.values())


@torch.no_grad()
@pytest.mark.parametrize("placement", ["device", "disk"])
def test_errors_over_images_of_varying_shapes_with_kept_outputs_and_a_predictor(
    placement: Placement,
) -> None:
    recipe, x = quick(**ONE_BY_ONE), varied()
    chain = pyramid(recipe)
    before = copy.deepcopy(chain)
    with torch.enable_grad():
        log = quantize_chain(chain, x, recipe, Positions(), Resources(placement=placement))
    set_quantized(before, False)
    full, found = [by_hand(before, image) for image in x], [by_hand(chain, image) for image in x]
    assert list(log.error) == [
        "embed",
        "blocks.0",
        "blocks.1",
        "neck",
    ]  # the predictor is left as calibrated
    for number, value in enumerate(log.error.values()):
        error = sum(
            float((q[number] - f[number]).square().sum()) for q, f in zip(found, full, strict=True)
        )
        assert value == pytest.approx(
            error / sum(float(f[number].square().sum()) for f in full), rel=1e-3
        )


def state_after(
    recipe: Recipe, build: Callable[[], BlockChain], x: Tensor | Samples, divergence: Divergence
) -> dict[str, Tensor]:
    chain = build()
    quantize_chain(chain, x, recipe, divergence, Resources(batch_size=8))
    return chain.state_dict()


@pytest.mark.parametrize("case", ["fimaq", "brecq", "fisher_brecq", "varying"])
def test_measuring_changes_no_bit(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = (
        quick(**ONE_BY_ONE) if case == "varying" else quick("brecq") if case == "brecq" else quick()
    )
    recipe = quick(loss="fisher_brecq") if case == "fisher_brecq" else recipe
    varying = case == "varying"
    run = functools.partial(
        state_after,
        recipe,
        lambda: pyramid(recipe) if varying else chain_of(vit(), recipe),
        varied() if varying else images(24),
        Positions() if varying else KL,
    )
    measured = run()
    with monkeypatch.context() as patch:
        patch.setattr(Tape, "measure", lambda self, keep=True: 0.0)
        # As before there were figures: the quantized outputs only if something needs them.
        with_prefix = recipe.prefix_prob > 0 or recipe.loss == "fisher_brecq"
        original = Tape.__init__
        patch.setattr(
            Tape,
            "__init__",
            lambda self, *args, **named: original(
                self, *args, **{**named, "with_prefix": with_prefix}
            ),
        )
        without = run()
    assert measured.keys() == without.keys()
    assert all(torch.equal(measured[name], without[name]) for name in measured)


WEIGHTED = {
    "fisher_diag",
    "fisher_dplr",
    "fisher_brecq",
    "perturb",
    "perturb_mean",
    "least_squares",
}


@pytest.mark.parametrize("loss", ["mse", "prediction", "fisher_lr", *sorted(WEIGHTED)])
def test_fisher_means_are_of_the_weights_in_the_loss(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, made = quick(loss=loss), []
    original = reconstruct_module.BlockObjective
    monkeypatch.setattr(
        reconstruct_module, "BlockObjective", lambda *args: made.append(original(*args)) or made[-1]
    )
    chain = chain_of(vit(), recipe)
    log = quantize_chain(chain, images(24), recipe, KL, Resources(batch_size=7))
    expected = {}
    for objective in made:
        if objective.kind == loss and loss in WEIGHTED:
            weights = (
                objective.state.diagonal if objective.weights is None else objective.weights.whole
            )
            expected[objective.label] = float(
                (weights.square() if loss == "fisher_brecq" else weights).double().mean()
            )
    assert log.fisher == pytest.approx(expected)
    # The head's loss compares classes; the first block has no squared gradient.
    named = ["patch_embed", "blocks.0", "blocks.1"][loss == "fisher_brecq" :]
    assert list(log.fisher) == (named if loss in WEIGHTED else [])
    assert all(value > 0 for value in log.fisher.values())


@pytest.mark.parametrize("loss", ["mse", *sorted(WEIGHTED - {"perturb_mean"})])
def test_fisher_means_of_varying_shapes_are_taken_before_samples_are_scaled(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, raw = quick(loss=loss, fisher_k=2, **ONE_BY_ONE), dict[str, list[float]]()

    def spied(name: str, take: Callable[..., float]) -> None:
        original = getattr(SampleObjective, name)

        def run(self: SampleObjective, *args: Any) -> Any:
            raw.setdefault(self.label, []).append(take(*args))
            return original(self, *args)

        monkeypatch.setattr(SampleObjective, name, run)

    spied("_stack", lambda own, gradient, error: float(gradient.double().mean()))
    spied(
        "_fit",
        lambda own, g, d: float(
            (g.double() * d / d.double().square().clamp(min=1e-300)).clamp(min=0).mean()
        ),
    )
    hessians: list[float] = []
    sweep, perturb = Sweep.gradients, passes.perturbation_hessian

    def seen_perturb(*args: Any) -> Tensor:
        hessians.append(float((found := perturb(*args)).double().mean()))
        return found

    def seen_sweep(*args: Any) -> Any:
        for rows, output, gradient in sweep(*args):
            hessians.append(float(gradient.double().square().mean()))
            yield rows, output, gradient

    monkeypatch.setattr(passes, "perturbation_hessian", seen_perturb)
    if loss == "fisher_brecq":
        monkeypatch.setattr(Sweep, "gradients", seen_sweep)
    log = quantize_chain(pyramid(recipe), varied(), recipe, Positions())
    labels = ["embed", "blocks.0", "blocks.1"]
    if loss in ("perturb", "fisher_brecq"):
        raw = {label: hessians[5 * number : 5 * number + 5] for number, label in enumerate(labels)}
        assert len(hessians) == 15
    if loss == "fisher_brecq":
        labels = labels[1:]
    if loss == "mse":
        assert log.fisher == {}
        return
    assert list(log.fisher) == labels
    for label in labels:
        assert log.fisher[label] == pytest.approx(sum(raw[label]) / len(raw[label]), rel=1e-5)
        assert log.fisher[label] > 0


def test_sums_are_exact_where_float32_is_not() -> None:
    values = torch.full((3, 2_500_000), 1.0)
    values[0, 0] = 3e4
    assert float(squared_sum(values)) == 7_499_999 + 9e8
    assert mean_of(Samples(values), 2, squared=True) == (7_499_999 + 9e8) / 7_500_000
    assert mean_of(Samples(torch.tensor([[1.0, 2.0], [3.0, 6.0]])), 1) == 3.0
    assert over(0.0, 0.0) == 0.0
    assert over(10.0, 4.0) == 2.5
    assert over(1.0, 0.0) == math.inf


def test_figures_that_are_no_numbers_become_notes() -> None:
    log = ReconstructionLog()
    log.keep("blocks.0", float("inf"), float("nan"))
    log.keep("blocks.1", 0.5, None)
    assert (log.error, log.fisher) == ({"blocks.1": 0.5}, {})
    assert log.notes == ["blocks.0: its output error is inf", "blocks.0: its Fisher weight is nan"]


def mark(recipe: Recipe) -> Fingerprint:
    return Fingerprint(
        weights="w" * 64, calibration="c" * 64, recipe=recipe.model_dump(mode="json")
    )


def resumed(folder: Path, recipe: Recipe) -> tuple[BlockChain, ReconstructionLog]:
    chain, x = chain_of(vit(), recipe), images(24)
    part = Part(chain, x, recipe, KL, mark(recipe))
    run_stage(CALIBRATE, part, folder / "ranges.safetensors")
    run_stage(RECONSTRUCT, part, pieces=folder)
    return chain, part.log


def test_a_resumed_run_has_the_figures_of_the_undisturbed_one(tmp_path: Path) -> None:
    recipe = quick()
    _, undisturbed = resumed(tmp_path, recipe)
    for index in (1, 3):
        (tmp_path / f"block-{index:03d}.safetensors").unlink()
    _, log = resumed(tmp_path, recipe)
    assert (log.error, log.fisher) == (undisturbed.error, undisturbed.fisher)
    assert set(log.error) == {"patch_embed", "blocks.0", "blocks.1", "head"}


def rewrite_facts(
    path: Path, chain: BlockChain, recipe: Recipe, change: Callable[[dict[str, Any]], None]
) -> None:
    """Replace the facts in the checkpoint of a block."""
    index = int(path.stem[-3:])
    facts = load_checkpoint(path, chain.segment(index).block, mark(recipe)).facts
    change(facts)
    save_checkpoint(path, chain.segment(index).block.state_dict(), mark(recipe), facts)


def test_blocks_from_before_the_figures_are_taken_as_they_are(tmp_path: Path) -> None:
    recipe = quick()
    chain, full = resumed(tmp_path, recipe)

    def older(facts: dict[str, Any]) -> None:
        del facts["error"], facts["fisher"]

    rewrite_facts(tmp_path / "block-001.safetensors", chain, recipe, older)
    _, log = resumed(tmp_path, recipe)
    assert log.error == {label: value for label, value in full.error.items() if label != "blocks.0"}
    assert log.last_loss == full.last_loss


@pytest.mark.parametrize(
    "change",
    [
        {"error": "1"},
        {"last_loss": None},
        {"engine": "warp"},
        {"notes": [[]]},
        {"surprise": 1},
        {"fisher_passes": -1},
    ],
)
def test_facts_of_a_block_are_not_trusted(tmp_path: Path, change: dict[str, Any]) -> None:
    recipe = quick(steps=1)
    chain, _ = resumed(tmp_path, recipe)
    rewrite_facts(
        tmp_path / "block-001.safetensors", chain, recipe, lambda facts: facts.update(change)
    )
    with pytest.raises(
        CheckpointError,
        match=rf"block-001.* does not say what was reconstructed \({next(iter(change))}",
    ):
        resumed(tmp_path, recipe)


def test_facts_of_a_block_are_finite(tmp_path: Path) -> None:
    recipe = quick(steps=1)
    chain, _ = resumed(tmp_path, recipe)
    path = tmp_path / "block-001.safetensors"
    rewrite_facts(path, chain, recipe, lambda facts: facts.update(error=float("nan")))
    with pytest.raises(CheckpointError, match=r"block-001.*the facts in its header are no JSON"):
        resumed(tmp_path, recipe)


def test_a_whole_reconstruction_keeps_its_log_and_older_ones_load(tmp_path: Path) -> None:
    recipe, x, path = quick(), images(24), tmp_path / "whole.safetensors"

    def again() -> tuple[BlockChain, ReconstructionLog, bool]:
        chain = chain_of(vit(), recipe)
        part = Part(chain, x, recipe, KL, mark(recipe))
        run_stage(CALIBRATE, part)
        loaded = run_stage(RECONSTRUCT, part, path)
        return chain, part.log, loaded

    _, first, loaded = again()
    assert not loaded
    chain, log, loaded = again()
    assert loaded
    assert log == first
    assert set(log.error) == set(log.last_loss)
    freeze(chain)
    facts = load_checkpoint(path, chain, mark(recipe)).facts
    for change, message in (
        ({"error": None, "fisher": None}, None),
        ({"last_loss": 5}, "last_loss"),
        ({"notes": "x"}, "notes"),
    ):
        kept = {
            name: value for name, value in {**facts["log"], **change}.items() if value is not None
        }
        save_checkpoint(
            path, chain.state_dict(), mark(recipe), json.loads(json.dumps({**facts, "log": kept}))
        )
        if message is None:
            _, older, loaded = again()
            assert loaded
            assert (older.error, older.fisher, older.last_loss) == ({}, {}, first.last_loss)
        else:
            with pytest.raises(CheckpointError, match=message):
                again()
