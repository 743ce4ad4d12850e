"""What quantization costs the demo models at bit-widths where it should cost little, paired on the same test pairs.

Short schedules keep this quick: the demo profile's longer ones can only do better.
"""

from functools import cache

import numpy as np
import pytest
import torch

from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.quantize import Resources, quantize
from fimaq_core.recipe import make_recipe
from tasks.classification.data import open_source
from tasks.classification.tags import DEMO_NAMES
from tasks.classification.task import TASK
from tasks.common.images import Images
from tasks.common.request import DataRequest, ModelRequest
from tasks.common.top_k import evaluate

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
def demo_images() -> Images:
    loaded = TASK.load(ModelRequest("demo_vit"))
    source = open_source(loaded, DataRequest(), "val")
    return Images(source.ids, source.targets, source.read, loaded.eval_transform, False)


def correct(model: torch.nn.Module) -> np.ndarray:
    source = open_source(TASK.load(ModelRequest("demo_vit")), DataRequest(), "val")
    return evaluate(model, demo_images(), source, torch.device("cpu"), 200, 0, lambda _: None).outcomes["correct"]


@cache
def full_precision(name: str) -> np.ndarray:
    return correct(TASK.load(ModelRequest(name)).model)


def loss_in_points(name: str, method: str, bits: int, seed: int) -> float:
    """Paired loss of top-1 against full precision, in points."""
    recipe = make_recipe(method, QUICK, {"w_bits": bits, "a_bits": bits, "seed": seed})
    loaded = TASK.load(ModelRequest(name))
    images = TASK.calibration(loaded, DataRequest(), recipe).images
    chain = TASK.build(loaded, recipe)
    quantize(chain, images, recipe, ClassifierDivergence(recipe.temperature), Resources(batch_size=128))
    return 100 * float(np.mean(full_precision(name).astype(float) - correct(chain).astype(float)))


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_rtn_at_8_bits(name: str) -> None:
    assert np.mean([loss_in_points(name, "rtn", 8, seed) for seed in (1, 2)]) < 0.5


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("name", DEMO_NAMES)
def test_fimaq_at_8_and_6_bits(name: str, bits: int) -> None:
    assert loss_in_points(name, "fimaq", bits, 1) < 0.5


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_fimaq_at_4_bits(name: str) -> None:
    assert loss_in_points(name, "fimaq", 4, 1) < 3.0
