"""Towers of CLIP models from a notebook: one call per tower, the model stays as it is."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fimaq_core import load
from fimaq_core.checkpoint import state_sha256
from fimaq_core.errors import CheckpointError, DataError, ModelError
from fimaq_core.pipeline import quantize_chain
from fimaq_core.recipe import make_recipe
from fimaq_core.samples import Samples
from tasks.common.request import DataRequest, ModelRequest
from tasks.retrieval.api import TextTower, VisionTower, quantize_tower
from tasks.retrieval.task import TASK

FEW = {
    "calibration_images": 24,
    "range_images": 16,
    "range_rounds": 1,
    "range_candidates": 32,
    "steps": 4,
    "batch_size": 8,
    "fisher_k": 2,
    "lr_alpha": 0.05,
    "divergence_batch": 12,
    "progress": False,
}


@pytest.fixture(scope="module")
def pairs() -> tuple[nn.Module, Tensor, Tensor]:
    """The demo model, 24 images (24, 3, 48, 48) and the token ids (24, L) of their captions."""
    loaded = TASK.load(ModelRequest("demo_clip"))
    recipe = make_recipe("fimaq", {"calibration_images": 24, "calibration_transform": "eval"})
    inputs = TASK.calibration(loaded, DataRequest(), recipe).inputs
    vision, text = (Samples.of(inputs[name]).whole for name in ("vision", "text"))
    return loaded.model, vision, text


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_tower_in_one_call(
    tower: str, pairs: tuple[nn.Module, Tensor, Tensor], tmp_path: Path
) -> None:
    model, images, ids = pairs
    before, modules = state_sha256(model), [type(part) for part in model.modules()]
    q = quantize_tower(model, images, ids, tower=tower, w_bits=6, a_bits=6, **FEW)
    assert state_sha256(model) == before
    assert [type(part) for part in model.modules()] == modules
    mine, other = (VisionTower, TextTower) if tower == "vision" else (TextTower, VisionTower)
    inputs = images if tower == "vision" else ids
    with torch.no_grad():
        full, found = mine(model)(inputs), q(inputs)
    assert not torch.equal(full, found)
    assert nn.functional.cosine_similarity(full, found).min() > 0.9
    assert q.log.fisher_passes.keys() == q.log.error.keys()
    q.save(tmp_path / "q.safetensors")
    again = load(tmp_path / "q.safetensors", mine(model))
    assert torch.equal(again(inputs), found)
    with pytest.raises(CheckpointError, match=r"of another model .*Tower.*Give the float model"):
        load(tmp_path / "q.safetensors", other(model))


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_tower_learns_what_the_task_learns(
    tower: str, pairs: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, images, ids = pairs
    settings = {name: value for name, value in FEW.items() if name != "progress"}
    recipe = make_recipe("fimaq", settings, {"scope": tower, "calibration_transform": "eval"})
    loaded = TASK.load(ModelRequest("demo_clip"))
    data = TASK.calibration(loaded, DataRequest(), recipe)
    divergence = TASK.divergences(loaded, data, recipe, torch.device("cpu"), 32)[tower]
    chain, inputs = TASK.chains(loaded, recipe)[tower], Samples.of(data.inputs[tower])
    log = quantize_chain(chain, inputs, recipe, divergence)
    q = quantize_tower(model, images, ids, tower=tower, **FEW)
    assert q.log.last_loss == pytest.approx(log.last_loss, rel=1e-4)
    assert torch.allclose(q(inputs.whole), chain(inputs.whole), rtol=1e-3, atol=1e-3)


def test_wrong_input_is_one_message(pairs: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, ids = pairs
    with pytest.raises(DataError, match="24 images and 23 captions"):
        quantize_tower(model, images, ids[1:], **FEW)
    with pytest.raises(ModelError, match=r"no tower 'visoin'.*vision"):
        quantize_tower(model, images, ids, tower="visoin", **FEW)
    with pytest.raises(ModelError, match="Linear is not supported"):
        quantize_tower(nn.Linear(2, 2), images, ids, **FEW)
    with pytest.raises(DataError, match="does not take images of shape"):
        quantize_tower(model, images[:, :, :-1], ids, **FEW)
