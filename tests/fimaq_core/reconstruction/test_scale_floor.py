"""Learned activation scales stay positive at any rate, on every engine and quantizer."""

import copy
from pathlib import Path

import pytest
import torch
from small_models import chain_of, images, quick, swin, vit
from staged import run_stage
from test_step_engines import Course, capture, follow, trainer
from torch import Tensor

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.checkpoint import Fingerprint
from fimaq_core.errors import NumericsError
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.pipeline import RECONSTRUCT
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction import flat
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.engines import Engine
from fimaq_core.reconstruction.flat import GraphStep
from fimaq_core.reconstruction.reconstruct import expand_per_token, reconstruct
from fimaq_core.reconstruction.state import NEAR_FLOOR, SCALE_FLOOR, active_quantizers
from fimaq_core.resources import Resources
from fimaq_core.store import Part

KL = ClassifierDivergence(20.0)
#: A rate far above the size of the scales: the first step takes every falling scale below zero.
TOO_FAST = 10.0
#: Quantizers of softmax and GELU outputs.
QUANTIZERS: dict[str, dict[str, object]] = {
    "uniform": {},
    **{
        kind: {"softmax_quantizer": kind, "gelu_quantizer": kind, "reparameterize": False}
        for kind in ("log2", "logsqrt2", "adalog", "twin")
    },
}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps made for compilation run as they are."""
    monkeypatch.setattr(flat, "_compiled", lambda function, *_: function)


def made(engine: Engine, recipe: Recipe) -> BlockTrainer:
    """A trainer; a captured step needs no GPU here."""
    found = trainer(engine, recipe)
    if isinstance(found._step, GraphStep):
        found._step.capture = lambda step: capture(step, [])
    return found


def at_floor(course: Course) -> Tensor:
    return course.scales <= SCALE_FLOOR * course.first_scales


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_scales_stop_at_their_lower_bound_on_every_engine(quantizer: str) -> None:
    """After a step far below zero, the engines agree on scales at the bound, and on all values."""
    recipe = quick("fimaq", lr_scale=TOO_FAST, **QUANTIZERS[quantizer])
    expected = follow(made("eager", recipe), 1)
    assert 0.1 < float(at_floor(expected).double().mean()) < 0.9
    assert torch.equal(
        expected.scales[at_floor(expected)],
        (SCALE_FLOOR * expected.first_scales)[at_floor(expected)],
    )
    for engine in ("fused", "compiled", "graph"):
        found = follow(made(engine, recipe), 1)
        same = torch.isclose(found.scales, expected.scales, rtol=1e-4)
        assert (
            float(same.double().mean()) > 0.99
        )  # the sign of a gradient near zero is left to rounding


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("engine", ["eager", "fused", "compiled", "graph"])
def test_scales_are_positive_after_every_step(engine: Engine) -> None:
    """Also those of captured steps; scales that are at the bound can leave it."""
    one = made(engine, quick("fimaq", steps=12, lr_scale=0.3))
    bound, lowest = SCALE_FLOOR * one.state.scales.clone(), []
    for number in range(12):
        one.step(number)
        one._step.finish()
        assert bool((one.state.scales >= bound).all())
        lowest.append(one.state.scales <= bound)
    seen, near = torch.stack(lowest), one.state.scales < 2 * bound
    assert bool(seen.any())
    assert bool((seen.any(0) & ~seen[-1]).any())
    assert one.finish() == int(near.sum())


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_where_the_bound_does_not_bind_it_changes_nothing(engine: Engine) -> None:
    recipe = quick("fimaq", steps=10, lr_scale=1e-3)
    bounded, free = trainer(engine, recipe), trainer(engine, recipe)
    free.state.floor.fill_(-torch.inf)
    for floor in getattr(free._step, "floors", []):
        floor.fill_(-torch.inf)
    a, b = follow(bounded, 10), follow(free, 10)
    assert torch.equal(a.scales, b.scales)
    assert torch.equal(a.alpha, b.alpha)
    assert bounded.finish() == 0


def scales_of(chain: BlockChain) -> dict[str, Tensor]:
    return {
        f"{segment.label}.{name}": quantizer.scale.detach().clone()
        for segment in chain
        for name, quantizer in active_quantizers(segment)
    }


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_run_with_too_large_a_rate_finishes_and_says_so(quantizer: str) -> None:
    """The count in the note is found again in the scales themselves."""
    recipe, x = quick("fimaq", lr_scale=1.0, **QUANTIZERS[quantizer]), images(24)
    chain = chain_of(vit(), recipe)
    calibrate(chain, x, recipe)
    before = copy.deepcopy(chain)
    expand_per_token(before, x[:1])
    first = scales_of(before)
    log = reconstruct(chain, x, recipe, KL, resources=Resources(batch_size=8))
    last = scales_of(chain)
    assert all(bool((last[name] >= SCALE_FLOOR * first[name]).all()) for name in first)
    count = sum(int((last[name] < NEAR_FLOOR * first[name]).sum()) for name in first)
    assert count > 0
    assert sum(log.near_floor.values()) == count
    assert f"the bound is 0.01): {count} (" in log.sentences()[-1]
    with torch.no_grad():
        assert bool(torch.isfinite(chain(x)).all())


def test_a_run_without_scales_at_the_bound_says_nothing() -> None:
    recipe, x = quick("qdrop"), images(24, 40)
    chain = chain_of(swin(40), recipe)
    calibrate(chain, x, recipe)
    log = reconstruct(chain, x, recipe, KL, resources=Resources(batch_size=8))
    assert log.near_floor == {}
    assert log.sentences() == log.notes


def test_a_resumed_run_has_the_counts_of_the_undisturbed_one(tmp_path: Path) -> None:
    recipe, x = quick("fimaq", lr_scale=1.0, steps=1), images(24)
    mark = Fingerprint(
        weights="w" * 64, calibration="c" * 64, recipe=recipe.model_dump(mode="json")
    )

    def run() -> dict[str, int]:
        chain = chain_of(vit(), recipe)
        calibrate(chain, x, recipe)
        part = Part(chain, x, recipe, KL, mark)
        run_stage(RECONSTRUCT, part, pieces=tmp_path)
        return part.log.near_floor

    undisturbed = run()
    assert len(undisturbed) > 1
    (tmp_path / "block-001.safetensors").unlink()
    assert run() == undisturbed


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_a_scale_that_is_no_number_is_refused(engine: Engine) -> None:
    one = trainer(engine, quick("qdrop"))
    one.step(0)
    one._step.finish()
    (one._step.scales[0] if engine == "eager" else one.state.scales).detach().view(-1)[0] = (
        torch.nan
    )
    with pytest.raises(
        NumericsError, match="a learned activation scale is NaN or infinite: lower lr_scale"
    ):
        one.finish()
