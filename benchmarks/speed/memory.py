"""Peak memory of reconstructing a block in the whole model, beside a formula for it."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.speed.subjects import chain_of, whole_model
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import QuantMatMul, decide_rounding, quant_layers, set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.reconstruct import expand_per_token
from fimaq_core.reconstruction.tape import Storage, Tape
from tasks.common.environment import peak_memory, reset_peak_memory, resident_memory

#: Setting of glibc: the size from which it takes memory from the system and gives it back directly.
#: By default freed memory may stay with the process, up to as much again.
_EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
#: Flat vectors as long as a block's rounded weights: α, offset, gain, base, soft weights, two
#: moments, gradient.
VARIABLES = 8
#: Tensors of images x block input or output during a block's steps (inputs of both kinds, target),
#: and while the tape advances to the next block.
TAPE, TAPE_ADVANCING = 3, 5


def memory_formula(
    weights: float,
    images: float,
    rounded: float,
    tape: float,
    step: float,
    tail: float,
) -> float:
    """Return the peak bytes: all that is held, and the largest of step, Fisher pass and tape.

    Args:
        weights: bytes of parameters and buffers of the whole model.
        images: of the calibration images, and of the model's outputs for them.
        rounded: of one flat vector over the block's rounded weights.
        tape: of one tensor of images x block output.
        step: saved by a step's forward for its backward.
        tail: saved by the segments behind the block in a Fisher pass, for a batch.
    """
    held = weights + images + VARIABLES * rounded + TAPE * tape
    return held + max(step, tail, (TAPE_ADVANCING - TAPE) * tape)


def measure_peak(name: str, recipe: Recipe, device: str, threads: int) -> dict[str, float]:
    """Return the peak in a process of its own: a process on the CPU only knows its own peak.

    Args:
        name: of the model.
        recipe: of the run; its ``calibration_images`` are on the tape.
        device: torch's name of it.
        threads: CPU threads.

    Returns:
        ``images``, ``peak_bytes``, ``formula_bytes``, ``ratio``, and the formula's parts in bytes.
        The peak on CUDA is that of all tensors, on the CPU that of the process's resident memory
        without its libraries.
    """
    spawn = multiprocessing.get_context("spawn")
    with patch.dict("os.environ", _EXACT_MALLOC), ProcessPoolExecutor(1, spawn) as pool:
        peak, parts = pool.submit(_in_child, name, recipe, device, threads).result()
    formula = memory_formula(**parts)
    found = {"images": recipe.calibration_images, "peak_bytes": peak, "formula_bytes": formula}
    sizes = {f"{part}_bytes": size for part, size in parts.items()}
    return {**found, "ratio": peak / formula, **sizes}


def _in_child(name: str, recipe: Recipe, device: str, threads: int) -> tuple[int, dict[str, float]]:
    torch.set_num_threads(threads)
    where = torch.device(device)
    # A first small run loads what libraries set up on first use: it belongs to no model.
    small = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=10,
    )
    images = torch.randn(32, 3, 32, 32, device=where)
    peak_of_block(chain_of(small.eval(), recipe).to(where), images, recipe)
    chain, images = whole_model(name, recipe, where)
    reset_peak_memory(torch.device("cpu"))
    held = sum(tensor.nbytes for tensor in [*chain.parameters(), *chain.buffers(), images])
    return peak_of_block(chain, images, recipe, resident_memory() - held)


def peak_of_block(
    chain: BlockChain,
    images: Tensor,
    recipe: Recipe,
    before: int = 0,
) -> tuple[int, dict[str, float]]:
    """Reconstruct the block behind the patch embedding for three steps, with one Fisher pass.

    The engine is ``fused``: it needs no compiler, whose own memory would count.

    Args:
        chain: not calibrated.
        images: (n, C, H, W) for the tape.
        recipe: of the run.
        before: resident bytes without model and images.

    Returns:
        Peak bytes, and the parts of :func:`memory_formula`.
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
    trainer = BlockTrainer(chain.segment(1), tape, objective, recipe, recipe.seed, "fused")
    for number in range(3):
        trainer.step(number)
    peak = peak_memory(device) - (0 if device.type == "cuda" else before)
    model = [*chain.parameters(), *chain.buffers()]
    assert tape.target is not None
    known = [*model, images, trainer.state.soft, tape.full.whole]
    part = tape.target[: recipe.batch_size].detach().requires_grad_(True)
    return peak, {
        "weights": sum(tensor.nbytes for tensor in model),
        "images": images.nbytes + reference.nbytes,
        "rounded": trainer.state.soft.nbytes,
        "tape": max(tape.full.nbytes, tape.target.nbytes),
        "step": saved_bytes(lambda: trainer.step(3), known),
        "tail": saved_bytes(lambda: chain.tail(2, part), [*known, part]),
    }


def saved_bytes(work: Callable[[], object], known: list[Tensor]) -> int:
    """Return the bytes that ``work`` saves for its backward pass, each storage once.

    Args:
        work: a forward pass.
        known: tensors that do not count.
    """
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
