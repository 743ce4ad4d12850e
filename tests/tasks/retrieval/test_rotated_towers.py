"""Rotated towers of open_clip: the same embeddings, and what cannot be rotated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_clip import END, SIGLIP_TEXT, both, clip, embeddings, timm_clip, token_ids
from small_models import images, quick

from fimaq_core.errors import ModelError
from tasks.retrieval.towers import build_towers

pytestmark = pytest.mark.slow

ROTATED = quick(rotate="hadamard")
MODELS: dict[str, Callable[[], Any]] = {
    "norm before the blocks": lambda: clip(quick_gelu=True),
    "mean, norm last": lambda: clip(
        {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        {"pool_type": "eos", "eos_id": END},
    ),
    "mean, norm first": lambda: clip({"pool_type": "avg"}, {"pool_type": "first"}),
    "layer scale": lambda: clip({"ls_init_value": 0.1}, {"ls_init_value": 0.1}, custom=True),
    "as SigLIP": lambda: timm_clip("test_vit3", "map", "none", SIGLIP_TEXT),
    "timm, projection": lambda: timm_clip("test_vit", "token", "linear"),
    "timm, MLP": lambda: timm_clip("test_vit2", "avg", "mlp"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("in_float64")
def test_rotated_towers_give_the_models_embeddings(name: str) -> None:
    model, given = MODELS[name]().double(), {"vision": images(3), "text": token_ids(3)}
    expected = embeddings(model, given["vision"], given["text"])
    for tower, chain in both(model, ROTATED).items():
        with torch.no_grad():
            found = chain(given[tower])
        wanted = expected[tower]
        assert float((found - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())


@pytest.mark.parametrize(
    ("model", "tower", "message"),
    [
        (lambda: timm_clip("test_vit2", "avg", "none"), "vision", "a norm at its end"),
        (
            lambda: clip(text={"proj_type": "none", "pool_type": "last"}, custom=True),
            "text",
            "no projection of the texts",
        ),
    ],
)
def test_towers_without_a_layer_behind_the_last_norm_are_refused(
    model: Callable[[], Any], tower: str, message: str
) -> None:
    with pytest.raises(ModelError, match=f"A model with {message}.* cannot be rotated"):
        build_towers(model(), ROTATED, [tower])
