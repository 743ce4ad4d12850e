"""Peak memory of reconstructing a block in the whole model, beside a formula for it."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import QuantMatMul, quant_layers, set_quantized
from fimaq_core.layers.layers import decide_rounding
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.reconstruct import expand_per_token
from fimaq_core.reconstruction.tape import Storage, Tape
from tasks.common.environment import peak_memory, reset_peak_memory, resident_memory

#: glibc's setting of the size from which memory is taken from, and given back to, the system directly.
_MALLOC = "MALLOC_MMAP_THRESHOLD_"
#: Flat vectors as long as a block's rounded weights: α, offset, gain, base, soft weights, two moments, gradient.
VARIABLES = 8
#: Tensors of images x block input or output that live during a block's steps (inputs of both kinds, target) and while the
#: tape goes on to the next block.
TAPE, TAPE_ADVANCING = 3, 5


@dataclass(frozen=True)
class Footprint:
    """Bytes that the formula is made of.

    Attributes:
        weights: parameters and buffers of the whole model.
        images: calibration images, and the model's outputs for them.
        rounded: one flat vector over the block's rounded weights.
        tape: one tensor of images x block output.
        step: what a step's forward saves for its backward.
        tail: what the segments behind the block save in a Fisher pass, for a batch.
    """

    weights: int
    images: int
    rounded: int
    tape: int
    step: int
    tail: int


def memory_formula(part: Footprint) -> int:
    """Peak bytes: model, images, variables, tape, and the largest of a step, a Fisher pass and the tape's going on."""
    held = part.weights + part.images + VARIABLES * part.rounded + TAPE * part.tape
    return held + max(part.step, part.tail, (TAPE_ADVANCING - TAPE) * part.tape)


@dataclass(frozen=True)
class Peak:
    """Measured peak and what the formula says.

    Attributes:
        peak_bytes: CUDA: of all tensors. CPU: resident memory of the process without its libraries.
        formula_bytes: :func:`memory_formula`.
        footprint: its parts.
        images: on the tape.
    """

    peak_bytes: int
    formula_bytes: int
    footprint: Footprint
    images: int


def measure_peak(name: str, recipe: Recipe, device: str, threads: int) -> Peak:
    """:func:`peak_of_block` in a process of its own: a CPU process only knows its own peak.

    Args:
        name: of the model.
        recipe: of the run; ``calibration_images`` are on the tape.
        device: torch's name of it.
        threads: CPU threads.
    """
    with _exact_malloc(), ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_in_child, name, recipe, device, threads).result()


@contextmanager
def _exact_malloc() -> Iterator[None]:
    """Processes started inside give freed tensors back at once, so that their resident memory is what lives.

    By default glibc keeps much of it for later (up to as much again); CUDA's count leaves that out as well.
    """
    before = os.environ.get(_MALLOC)
    os.environ[_MALLOC] = str(2**17)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_MALLOC]
        else:
            os.environ[_MALLOC] = before


def _in_child(name: str, recipe: Recipe, device: str, threads: int) -> Peak:
    from benchmarks.speed.subjects import chain_of, whole_model

    torch.set_num_threads(threads)
    where = torch.device(device)
    # A first run in small brings in what libraries load and set up on first use: it belongs to no model.
    small = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10).eval()
    peak_of_block(chain_of(small, recipe).to(where), torch.randn(32, 3, 32, 32, device=where), recipe, where)
    chain, images = whole_model(name, recipe)
    chain, images = chain.to(where), images.to(where)
    reset_peak_memory(torch.device("cpu"))
    held = sum(tensor.nbytes for tensor in [*chain.parameters(), *chain.buffers(), images])
    return peak_of_block(chain, images, recipe, where, resident_memory() - held)


def peak_of_block(chain: BlockChain, images: Tensor, recipe: Recipe, device: torch.device, before: int = 0) -> Peak:
    """Reconstruct the first block behind the patch embedding for three steps, with one Fisher pass through all of the rest.

    Args:
        chain: not calibrated.
        images: (n, C, H, W) for the tape.
        recipe: the engine is ``fused``: it needs no compiler, whose own memory would be counted.
        device: of all.
        before: resident bytes without model and images.
    """
    calibrate(chain, images[:1], recipe.model_copy(update={"range_search": "minmax", "range_images": 1}))
    if recipe.per_token:
        expand_per_token(chain, images[:1])
    set_quantized(chain, False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad():
        # Its values do not matter here.
        reference = chain(images[:1]).repeat(len(images), 1)
    tape = Tape(chain, images, Storage("device", device), with_prefix=True, frozen_dtype=recipe.frozen_dtype)
    tape.compute_target()
    for _, layer in quant_layers(chain.segment(0).block):
        if not isinstance(layer, QuantMatMul):
            decide_rounding(layer)
    tape.advance()
    tape.compute_target()
    objective = BlockObjective(chain, tape, recipe, reference, ClassifierDivergence(recipe.temperature), [])
    trainer = BlockTrainer(chain.segment(1), tape, objective, recipe, recipe.seed, "fused")
    for number in range(3):
        trainer.step(number)
    peak = peak_memory(device) - (0 if device.type == "cuda" else before)
    # Afterwards, since counting holds on to nothing but takes a moment.
    known = [*chain.parameters(), *chain.buffers(), images, trainer.state.soft, tape.full]
    assert tape.target is not None
    part = tape.target[: recipe.batch_size].detach().requires_grad_(True)
    footprint = Footprint(
        sum(tensor.nbytes for tensor in [*chain.parameters(), *chain.buffers()]),
        images.nbytes + reference.nbytes,
        trainer.state.soft.nbytes,
        max(tape.full.nbytes, tape.target.nbytes),
        saved_bytes(lambda: trainer.step(3), known),
        saved_bytes(lambda: chain.tail(2, part), [*known, part]),
    )
    return Peak(peak, memory_formula(footprint), footprint, len(images))


def saved_bytes(work: Callable[[], object], known: list[Tensor]) -> int:
    """Bytes that ``work`` saves for its backward pass, each storage once, those of ``known`` tensors not."""
    passed = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in passed:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(found.values())
