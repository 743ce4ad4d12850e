"""Peak memory of reconstructing a block in the whole model."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.speed.walk import start_tape
from benchmarks.speed.workload import whole_model
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.families import find_family
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import decide_roundings
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.block import BlockTrainer
from fimaq_core.reconstruction.objective import BlockObjective
from tasks.common.cell.environment import peak_memory, reset_peak_memory, resident_memory

#: Setting of glibc: freed memory of at least this size returns to the system at once. By default a
#: process may keep as much freed memory as it uses.
_EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}


def measure_peak(name: str, recipe: Recipe, device: torch.device) -> int:
    """Return the peak in bytes with ``recipe.calibration_images`` images on the tape.

    The measurement runs in a new process, since on the CPU only the peak since the start of the
    process is known. On CUDA the peak counts all tensors. On the CPU it counts resident memory
    without that of the libraries.
    """
    spawn, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    with patch.dict("os.environ", _EXACT_MALLOC), ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(_in_child, name, recipe, str(device), threads).result()


def _in_child(name: str, recipe: Recipe, device: str, threads: int) -> int:
    """Measure in this process, see :func:`measure_peak`."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    # A small run first: libraries allocate memory at first use, which does not belong to the model.
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    small = VisionTransformer(**shape, num_classes=10)
    images = torch.randn(32, 3, 32, 32, device=where)
    peak_of_block(find_family(small).build(small.eval(), recipe).to(where), images, recipe)
    chain, images = whole_model(name, recipe, where)
    reset_peak_memory(torch.device("cpu"))
    held = sum(tensor.nbytes for tensor in [*chain.parameters(), *chain.buffers(), images])
    return peak_of_block(chain, images, recipe, resident_memory() - held)


def peak_of_block(chain: BlockChain, images: Tensor, recipe: Recipe, before: int = 0) -> int:
    """Return the peak in bytes of three steps of the first block, with a Fisher pass.

    The engine is ``fused``, since with the others the compiler's memory would count too.
    ``before`` is subtracted on the CPU: resident bytes without the model and the images.
    """
    device = images.device
    minmax = {"range_search": "minmax", "range_images": 1}
    calibrate(chain, images[:1], recipe.model_copy(update=minmax))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    tape, reference = start_tape(chain, images, recipe)
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
