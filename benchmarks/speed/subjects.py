"""Measured models; real-size models are cut down to one segment per make."""

from typing import NamedTuple

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor

from fimaq_core.chain import BlockChain
from fimaq_core.families import find_family
from fimaq_core.recipe import Recipe
from tasks.classification.tags import DEMO_NAMES, full_name
from tasks.common.registry import get_task
from tasks.common.request import DataRequest, ModelRequest


class Make(NamedTuple):
    """Segments of equal kind, tensor shapes and input shape."""

    label: str  #: label of the first segment
    kind: str  #: patch_embed, block, merge or head
    count: int  #: number of segments in the model
    shape: tuple[int, ...]  #: shape of the input, without the batch


class Subject(NamedTuple):
    """Model to measure."""

    chain: BlockChain  #: all segments, or the first segment of each make
    images: Tensor  #: (n, C, H, W)
    makes: tuple[Make, ...]  #: all makes of the model, in order of appearance
    make_of: tuple[int, ...]  #: index of the make of each segment of ``chain``
    order: tuple[int, ...]  #: for each segment of the model, the index in ``chain`` of its like

    @property
    def main(self) -> int:
        """Index of the make with the most blocks."""
        blocks = [number for number, make in enumerate(self.makes) if make.kind == "block"]
        return max(blocks, key=lambda number: (self.makes[number].count, -number))


def whole_model(name: str, recipe: Recipe, device: torch.device) -> tuple[BlockChain, Tensor]:
    """Return the model as a chain, and ``recipe.calibration_images`` images (n, C, H, W).

    Demo models have their weights and images; other models have random weights and images, always
    the same ones.

    Raises:
        ModelError: an unknown name, or a model of no known family.
    """
    if name in DEMO_NAMES:
        task = get_task("classification")
        loaded = task.load(ModelRequest(name))
        images = task.calibration(loaded, DataRequest(None), recipe).images
        assert isinstance(images, Tensor)
        return task.chains(loaded, recipe)[""].to(device), images.to(device)
    torch.manual_seed(0)
    model = timm.create_model(full_name(name), pretrained=False).eval()
    size = resolve_model_data_config(model)["input_size"]  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(recipe.calibration_images, *size, generator=generator)
    return find_family(model).build(model, recipe).to(device), images.to(device)


def load_subject(name: str, recipe: Recipe, device: torch.device) -> Subject:
    """Return :func:`whole_model`, cut down to one segment per make unless it is a demo model."""
    return cut(*whole_model(name, recipe, device), thin=name not in DEMO_NAMES)


@torch.no_grad()
def cut(chain: BlockChain, images: Tensor, *, thin: bool) -> Subject:
    """Sort the segments of a chain by make; keep one segment per make if ``thin``."""
    shapes, keys, x = [], [], images[:1]
    for segment in chain:
        entry = segment.enter(x)
        x, shape, block = segment.block(entry), tuple(entry.shape[1:]), segment.block
        tensors = [*block.named_parameters(), *block.named_buffers()]
        keys.append((segment.kind, shape, *((name, tuple(t.shape)) for name, t in tensors)))
        shapes.append(shape)
    distinct = list(dict.fromkeys(keys))
    first = [keys.index(key) for key in distinct]
    makes = []
    for index in first:
        segment, count = chain.segment(index), keys.count(keys[index])
        makes.append(Make(segment.label, segment.kind, count, shapes[index]))
    make_of, every = tuple(distinct.index(key) for key in keys), tuple(range(len(chain)))
    if not thin:
        return Subject(chain, images, tuple(makes), make_of, every)
    kept = BlockChain([chain.segment(index) for index in first])
    return Subject(kept, images, tuple(makes), every[: len(first)], make_of)
