"""The models that are measured, cut down to one block of every make where they are large."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Make:
    """Blocks that are alike: same kind, same tensors, same input.

    Attributes:
        label: of the first of them.
        kind: patch_embed, block, merge or head.
        count: how many the model has.
        shape: of their input, without the batch.
    """

    label: str
    kind: str
    count: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: short name.
        chain: all segments, or the first of each make (outputs of one make fit the next one's input).
        images: (n, C, H, W).
        makes: all makes of the model, in order of appearance.
        make_of: number of the make of each segment of ``chain``.
        order: for each segment of the whole model, the segment of ``chain`` that stands for it.
    """

    name: str
    chain: BlockChain
    images: Tensor
    makes: tuple[Make, ...]
    make_of: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def main(self) -> int:
        """Number of the most frequent make among the blocks."""
        blocks = [number for number, make in enumerate(self.makes) if make.kind == "block"]
        return max(blocks, key=lambda number: (self.makes[number].count, -number))


def load_subject(name: str, recipe: Recipe, device: torch.device) -> Subject:
    """The model ``name`` on ``device``, with ``recipe.calibration_images`` images.

    Demo models come whole, with their weights and their own images. Any other has random weights, random images, and one
    segment of each make.

    Raises:
        ModelError: unknown name, or a model of no known family.
    """
    chain, images = whole_model(name, recipe)
    return cut(name, chain.to(device), images.to(device), thin=name not in DEMO_NAMES)


def whole_model(name: str, recipe: Recipe) -> tuple[BlockChain, Tensor]:
    """All of the model as a chain, and images (n, C, H, W), on the CPU; see :func:`load_subject`."""
    if name in DEMO_NAMES:
        task = get_task("classification")
        loaded = task.load(ModelRequest(name))
        return task.chains(loaded, recipe)[""], task.calibration(loaded, DataRequest(None), recipe).images
    model, images = random_model(name, recipe.calibration_images)
    return chain_of(model, recipe), images


def random_model(name: str, count: int) -> tuple[nn.Module, Tensor]:
    """A timm model with random weights and ``count`` random images of its size, both the same every time."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(full_name(name), pretrained=False).eval()
    size = resolve_model_data_config(model)["input_size"]  # type: ignore[no-untyped-call]
    return model, torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def chain_of(model: nn.Module, recipe: Recipe) -> BlockChain:
    """``model`` as a chain, by the first family that knows it."""
    return find_family(model).build(model, recipe)


def cut(name: str, chain: BlockChain, images: Tensor, thin: bool) -> Subject:
    """Sort a chain's segments by make; keep one of each if ``thin``."""
    shapes = input_shapes(chain, images[:1])
    signatures = [_signature(segment, shape) for segment, shape in zip(chain, shapes, strict=True)]
    distinct = list(dict.fromkeys(signatures))
    first = [signatures.index(signature) for signature in distinct]
    makes = tuple(
        Make(chain.segment(index).label, chain.segment(index).kind, signatures.count(signature), shapes[index])
        for index, signature in zip(first, distinct, strict=True)
    )
    make_of = tuple(distinct.index(signature) for signature in signatures)
    if not thin:
        return Subject(name, chain, images, makes, make_of, tuple(range(len(chain))))
    kept = BlockChain([chain.segment(index) for index in first])
    return Subject(name, kept, images, makes, tuple(range(len(first))), make_of)


@torch.no_grad()
def input_shapes(chain: BlockChain, image: Tensor) -> list[tuple[int, ...]]:
    """Shape of each block's input for one image (1, C, H, W), without the batch."""
    shapes: list[tuple[int, ...]] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        shapes.append(tuple(args[0].shape[1:]))

    handles = [segment.block.register_forward_pre_hook(keep) for segment in chain]
    chain(image)
    for handle in handles:
        handle.remove()
    return shapes


def _signature(segment: Segment, shape: tuple[int, ...]) -> tuple[object, ...]:
    block = segment.block
    named = [*block.named_parameters(), *block.named_buffers()]
    return segment.kind, shape, tuple((name, tuple(tensor.shape)) for name, tensor in named)
