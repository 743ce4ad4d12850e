"""Peak memory of reconstructing a block in the whole model, beside a formula for it."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple
from unittest.mock import patch

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.speed.subjects import whole_model
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.families import find_family
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import QuantMatMul, decide_rounding, quant_layers, set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.reconstruct import expand_per_token
from fimaq_core.reconstruction.tape import Storage, Tape
from tasks.common.cell.environment import peak_memory, reset_peak_memory, resident_memory

#: Setting of glibc: the size from which it takes memory from the system and gives it back directly.
#: By default freed memory may stay with the process, up to as much again.
_EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
#: Flat vectors as long as a block's rounded weights: α, offset, gain, base, soft weights, two
#: moments, gradient.
VARIABLES = 8
#: Tensors of images x block input or output during a block's steps (inputs of both kinds, target),
#: and while the tape advances to the next block.
TAPE, TAPE_ADVANCING = 3, 5


class Parts(NamedTuple):
    """Bytes of what is in memory while a block is reconstructed."""

    weights: float  #: parameters and buffers of the whole model
    images: float  #: calibration images, and the model's outputs for them
    rounded: float  #: one flat vector over the block's rounded weights
    tape: float  #: one tensor of images x block output
    step: float  #: saved by a step's forward for its backward
    tail: float  #: saved by the segments behind the block in a Fisher pass, for a batch

    def peak(self) -> float:
        """Return all that is held, and the largest of step, Fisher pass and tape."""
        held = self.weights + self.images + VARIABLES * self.rounded + TAPE * self.tape
        return held + max(self.step, self.tail, (TAPE_ADVANCING - TAPE) * self.tape)


def measure_peak(name: str, recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Return the peak, measured in a process of its own, beside the formula and its parts.

    A process on the CPU only knows its own peak. The peak on CUDA is that of all tensors, on the
    CPU that of resident memory without libraries. ``recipe.calibration_images`` are on the tape.
    """
    spawn, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    with patch.dict("os.environ", _EXACT_MALLOC), ProcessPoolExecutor(1, spawn) as pool:
        peak, parts = pool.submit(_in_child, name, recipe, str(device), threads).result()
    found = {"images": recipe.calibration_images, "peak_bytes": peak, "formula_bytes": parts.peak()}
    sizes = {f"{part}_bytes": size for part, size in parts._asdict().items()}
    return {**found, "ratio": peak / parts.peak(), **sizes}


def _in_child(name: str, recipe: Recipe, device: str, threads: int) -> tuple[int, Parts]:
    torch.set_num_threads(threads)
    where = torch.device(device)
    # A first small run loads what libraries set up on first use: it belongs to no model.
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    small = VisionTransformer(**shape, num_classes=10)
    images = torch.randn(32, 3, 32, 32, device=where)
    peak_of_block(find_family(small).build(small.eval(), recipe).to(where), images, recipe)
    chain, images = whole_model(name, recipe, where)
    reset_peak_memory(torch.device("cpu"))
    held = sum(tensor.nbytes for tensor in [*chain.parameters(), *chain.buffers(), images])
    return peak_of_block(chain, images, recipe, resident_memory() - held)


def peak_of_block(
    chain: BlockChain, images: Tensor, recipe: Recipe, before: int = 0
) -> tuple[int, Parts]:
    """Reconstruct the block behind the patch embedding for three steps, with one Fisher pass.

    The engine is ``fused``: it needs no compiler, whose own memory would count. ``before`` are
    resident bytes without model and images.
    """
    device = images.device
    minmax = {"range_search": "minmax", "range_images": 1}
    calibrate(chain, images[:1], recipe.model_copy(update=minmax))
    if recipe.per_token:
        expand_per_token(chain, images[:1])
    set_quantized(chain, False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad():  # the values of the reference do not matter here
        reference = chain(images[:1]).repeat(len(images), 1)
    storage, dtype = Storage("device", device), recipe.frozen_dtype
    tape = Tape(chain, images, storage, with_prefix=True, frozen_dtype=dtype)
    tape.compute_target()
    for _, layer in quant_layers(chain.segment(0).block):
        if not isinstance(layer, QuantMatMul):
            decide_rounding(layer)
    tape.advance()
    tape.compute_target()
    divergence = ClassifierDivergence(recipe.temperature)
    objective = BlockObjective(chain, tape, recipe, reference, divergence, [])
    trainer = BlockTrainer(chain.segment(1), objective, "fused")
    for number in range(3):
        trainer.step(number)
    peak = peak_memory(device) - (0 if device.type == "cuda" else before)
    model = [*chain.parameters(), *chain.buffers()]
    assert tape.target is not None
    known = [*model, images, trainer.state.soft, tape.full.whole]
    part = tape.target[: recipe.batch_size].detach().requires_grad_(True)
    return peak, Parts(
        weights=sum(tensor.nbytes for tensor in model),
        images=images.nbytes + reference.nbytes,
        rounded=trainer.state.soft.nbytes,
        tape=max(tape.full.nbytes, tape.target.nbytes),
        step=saved_bytes(lambda: trainer.step(3), known),
        tail=saved_bytes(lambda: chain.tail(2, part), [*known, part]),
    )


def saved_bytes(work: Callable[[], object], known: list[Tensor]) -> int:
    """Return the bytes that a forward pass saves for backward, without ``known`` tensors."""
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
