"""Measured models; large ones are cut down to one segment per make."""

from typing import NamedTuple

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.families import find_family
from fimaq_core.recipe import Recipe
from tasks.classification.tags import DEMO_NAMES, full_name
from tasks.common.registry import get_task
from tasks.common.request import DataRequest, ModelRequest


class Make(NamedTuple):
    """Segments of the same kind with the same tensors and the same input shape."""

    label: str  #: of the first of them
    kind: str  #: patch_embed, block, merge or head
    count: int  #: in the model
    shape: tuple[int, ...]  #: of their input, without the batch


class Subject(NamedTuple):
    """Model to measure."""

    chain: BlockChain  #: all segments, or the first one of each make
    images: Tensor  #: (n, C, H, W)
    makes: tuple[Make, ...]  #: all makes of the model, in order of appearance
    make_of: tuple[int, ...]  #: index of the make of each segment of ``chain``
    order: tuple[int, ...]  #: for each segment of the model, the one of ``chain`` like it

    @property
    def main(self) -> int:
        """Index of the most frequent make among the blocks."""
        blocks = [number for number, make in enumerate(self.makes) if make.kind == "block"]
        return max(blocks, key=lambda number: (self.makes[number].count, -number))


def whole_model(name: str, recipe: Recipe, device: torch.device) -> tuple[BlockChain, Tensor]:
    """Return the model as a chain, and ``recipe.calibration_images`` images (n, C, H, W).

    Demo models have their weights and images; others random weights and images, always the same.

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
    model: nn.Module = timm.create_model(full_name(name), pretrained=False).eval()
    size = resolve_model_data_config(model)["input_size"]  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(recipe.calibration_images, *size, generator=generator)
    return find_family(model).build(model, recipe).to(device), images.to(device)


def load_subject(name: str, recipe: Recipe, device: torch.device) -> Subject:
    """Return :func:`whole_model`, cut down to one segment per make if it is no demo model."""
    chain, images = whole_model(name, recipe, device)
    return cut(chain, images, thin=name not in DEMO_NAMES)


def cut(chain: BlockChain, images: Tensor, thin: bool) -> Subject:
    """Sort the segments of a chain by make; keep one segment per make if ``thin``."""
    shapes = _input_shapes(chain, images[:1])
    signatures = [_signature(one, shape) for one, shape in zip(chain, shapes, strict=True)]
    distinct = list(dict.fromkeys(signatures))
    first = [signatures.index(signature) for signature in distinct]
    makes = []
    for index, signature in zip(first, distinct, strict=True):
        segment, count = chain.segment(index), signatures.count(signature)
        makes.append(Make(segment.label, segment.kind, count, shapes[index]))
    make_of = tuple(distinct.index(signature) for signature in signatures)
    if not thin:
        return Subject(chain, images, tuple(makes), make_of, tuple(range(len(chain))))
    kept = BlockChain([chain.segment(index) for index in first])
    return Subject(kept, images, tuple(makes), tuple(range(len(first))), make_of)


@torch.no_grad()
def _input_shapes(chain: BlockChain, image: Tensor) -> list[tuple[int, ...]]:
    """Return the shape of each block's input for one image (1, C, H, W), without the batch."""
    shapes: list[tuple[int, ...]] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        shapes.append(tuple(args[0].shape[1:]))

    handles = [segment.block.register_forward_pre_hook(keep) for segment in chain]
    chain(image)
    for handle in handles:
        handle.remove()
    return shapes


def _signature(segment: Segment, shape: tuple[int, ...]) -> tuple[object, ...]:
    named = [*segment.block.named_parameters(), *segment.block.named_buffers()]
    return segment.kind, shape, tuple((name, tuple(tensor.shape)) for name, tensor in named)
