"""Peak memory of reconstructing a block in the whole model."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.speed.subjects import whole_model
from benchmarks.speed.walk import begin
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.families import find_family
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import decide_roundings
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.objective import BlockObjective
from tasks.common.cell.environment import peak_memory, reset_peak_memory, resident_memory

#: Setting of glibc: the size from which freed memory returns to the system at once. By default the
#: process may keep as much freed memory as it uses.
_EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}


def measure_peak(name: str, recipe: Recipe, device: torch.device) -> int:
    """Return the peak in bytes with ``recipe.calibration_images`` images on the tape.

    A process of its own measures the peak, since a process on the CPU knows only its own peak. On
    CUDA it is the peak of all tensors, on the CPU of resident memory without libraries.
    """
    spawn, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    with patch.dict("os.environ", _EXACT_MALLOC), ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(_in_child, name, recipe, str(device), threads).result()


def _in_child(name: str, recipe: Recipe, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    where = torch.device(device)
    # A small run first: libraries allocate memory on first use, which belongs to no model.
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    small = VisionTransformer(**shape, num_classes=10)
    images = torch.randn(32, 3, 32, 32, device=where)
    peak_of_block(find_family(small).build(small.eval(), recipe).to(where), images, recipe)
    chain, images = whole_model(name, recipe, where)
    reset_peak_memory(torch.device("cpu"))
    held = sum(tensor.nbytes for tensor in [*chain.parameters(), *chain.buffers(), images])
    return peak_of_block(chain, images, recipe, resident_memory() - held)


def peak_of_block(chain: BlockChain, images: Tensor, recipe: Recipe, before: int = 0) -> int:
    """Return the peak of three steps of the block behind the patch embedding, with a Fisher pass.

    The engine is ``fused``: a compiler's own memory would count. ``before`` are resident bytes
    without model and images.
    """
    device = images.device
    minmax = {"range_search": "minmax", "range_images": 1}
    calibrate(chain, images[:1], recipe.model_copy(update=minmax))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    tape, reference = begin(chain, images, recipe)
    tape.compute_target()
    decide_roundings(chain.segment(0).block)
    tape.advance()
    tape.compute_target()
    divergence = ClassifierDivergence(recipe.temperature)
    objective = BlockObjective(chain, tape, recipe, reference, divergence, [])
    trainer = BlockTrainer(chain.segment(1), objective, "fused")
    for number in range(3):
        trainer.step(number)
    return peak_memory(device) - (0 if device.type == "cuda" else before)
