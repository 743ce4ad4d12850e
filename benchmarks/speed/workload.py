"""Models to measure; a real-size model is cut down to one segment per structure."""

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


class Structure(NamedTuple):
    """Segments of equal kind, tensor shapes and input shape, which take the same time."""

    label: str  #: label of the first segment
    kind: str  #: patch_embed, block, merge or head
    count: int  #: number of segments in the model
    shape: tuple[int, ...]  #: shape of the input, without the batch


class Workload(NamedTuple):
    """A model to measure, and its images."""

    chain: BlockChain  #: all segments, or the first segment of each structure
    images: Tensor  #: (n, C, H, W)
    structures: tuple[Structure, ...]  #: all structures of the model, in order of appearance
    structure_of: tuple[int, ...]  #: for each segment of `chain`, the index of its structure
    order: tuple[int, ...]  #: for each segment of the model, the index in `chain` of an equal one

    @property
    def main(self) -> int:
        """Index of the structure with the most blocks."""
        blocks = [index for index, one in enumerate(self.structures) if one.kind == "block"]
        return max(blocks, key=lambda index: (self.structures[index].count, -index))


def whole_model(name: str, recipe: Recipe, device: torch.device) -> tuple[BlockChain, Tensor]:
    """Return the model as a chain, and ``recipe.calibration_images`` images (n, C, H, W).

    Demo models come with their weights and images. Other models get random weights and images,
    the same ones in every run.

    Raises:
        ModelError: the name is unknown, or the model belongs to no known family.
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


def load_workload(name: str, recipe: Recipe, device: torch.device) -> Workload:
    """Return a demo model whole, or another model cut down to one segment per structure."""
    return make_workload(*whole_model(name, recipe, device), thin=name not in DEMO_NAMES)


@torch.no_grad()
def make_workload(chain: BlockChain, images: Tensor, *, thin: bool) -> Workload:
    """Sort the segments of a chain by structure; keep one segment per structure if ``thin``."""
    keys, x = [], images[:1]
    for segment in chain:
        entry, block = segment.enter(x), segment.block
        x = block(entry)
        tensors = [*block.named_parameters(), *block.named_buffers()]
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors)
        keys.append((segment.kind, tuple(entry.shape[1:]), shapes))
    distinct = list(dict.fromkeys(keys))
    first = [keys.index(key) for key in distinct]
    structures = tuple(
        Structure(chain.segment(index).label, key[0], keys.count(key), key[1])
        for index, key in zip(first, distinct, strict=True)
    )
    structure_of, every = tuple(map(distinct.index, keys)), tuple(range(len(chain)))
    if not thin:
        return Workload(chain, images, structures, structure_of, every)
    kept = BlockChain([chain.segment(index) for index in first])
    return Workload(kept, images, structures, every[: len(first)], structure_of)
