"""Accuracy that quantization costs the demo models where it should cost little, on equal pairs.

Short schedules keep this quick: the demo profile's longer ones can only do better.
"""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.pipeline import quantize_chain
from fimaq_core.recipe import make_recipe
from fimaq_core.store import Resources
from tasks.classification.data import open_source
from tasks.classification.tags import DEMO_NAMES
from tasks.classification.task import TASK
from tasks.common.request import DataRequest, ModelRequest

pytestmark = pytest.mark.slow

QUICK = {
    "steps": 30,
    "lr_alpha": 0.05,
    "lr_scale": 5e-4,
    "calibration_images": 192,
    "calibration_transform": "eval",
    "range_images": 16,
    "range_rounds": 1,
    "fisher_k": 2,
}


@cache
def whole_test_part() -> tuple[Tensor, np.ndarray]:
    """All test images (N, 1, 32, 64) and their labels (N,): the same for every demo model."""
    loaded = TASK.load(ModelRequest("demo_vit"))
    source = open_source(loaded, DataRequest(), "val")
    images = [loaded.eval_transform(source.read(index)) for index in range(len(source.ids))]
    return torch.stack(images), np.array(source.targets)


@cache
def calibration_images(seed: int) -> Tensor:
    """Calibration images of a seed: the same for every demo model and every number of bits."""
    recipe = make_recipe("fimaq", QUICK, {"seed": seed})
    return TASK.calibration(TASK.load(ModelRequest("demo_vit")), DataRequest(), recipe).images


@torch.no_grad()
def correct(model: nn.Module) -> np.ndarray:
    images, labels = whole_test_part()
    return torch.cat([model(batch).argmax(1) for batch in images.split(200)]).numpy() == labels


@cache
def full_precision(name: str) -> np.ndarray:
    return correct(TASK.load(ModelRequest(name)).model)


def loss_in_points(name: str, method: str, bits: int, seed: int) -> float:
    """Paired loss of top-1 against full precision, in points."""
    recipe = make_recipe(method, QUICK, {"w_bits": bits, "a_bits": bits, "seed": seed})
    chain = TASK.build(TASK.load(ModelRequest(name)), recipe)
    divergence = ClassifierDivergence(recipe.temperature)
    quantize_chain(chain, calibration_images(seed), recipe, divergence, Resources(batch_size=128))
    return 100 * float(np.mean(full_precision(name).astype(float) - correct(chain).astype(float)))


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_rtn_at_8_bits(name: str) -> None:
    assert loss_in_points(name, "rtn", 8, 1) < 0.5


def test_fimaq_at_6_bits() -> None:
    """One model: round-to-nearest at 8 bits and FIMA-Q at 4 bits cover all of them."""
    assert loss_in_points("demo_vit", "fimaq", 6, 1) < 0.5


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_fimaq_at_4_bits(name: str) -> None:
    assert loss_in_points(name, "fimaq", 4, 1) < 3.0
