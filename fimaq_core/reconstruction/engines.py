"""Step engines: the ways to run an optimisation step.

All four draw the same batches and masks and agree within rounding:

* ``eager`` is the definition: plain operations, autograd, ``torch.optim.Adam``.
* ``fused`` has hand-written backward passes and flat vectors of variables, without a compiler.
* ``compiled`` is ``fused`` through ``torch.compile``.
* ``graph`` replays the compiled step as one CUDA graph, so the device never waits for Python.
"""

import functools

import torch

from fimaq_core.errors import EngineError
from fimaq_core.reconstruction.flat import CompiledStep, FlatStep, GraphStep
from fimaq_core.reconstruction.step import StepEngine
from fimaq_core.reconstruction.textbook import TextbookStep
from fimaq_core.resources import Engine, EngineChoice

#: Class of each step engine.
STEPS: dict[Engine, type[StepEngine]] = {
    "eager": TextbookStep,
    "fused": FlatStep,
    "compiled": CompiledStep,
    "graph": GraphStep,
}

#: Steps per block from which compilation saves time on a CPU: it takes about 30 s and saves 5 to
#: 10 ms per step.
COMPILE_STEPS = 4000


def choose_engine(
    choice: EngineChoice, device: torch.device, steps: int, varying: bool = False
) -> Engine:
    """Return the step engine to use.

    On CUDA ``auto`` chooses ``graph``, or ``compiled`` for samples of varying shapes, since a graph
    has fixed shapes. Elsewhere ``auto`` chooses ``compiled`` for long optimisations (from
    :data:`COMPILE_STEPS` steps) if there is a C++ compiler, else ``fused``.

    Raises:
        EngineError: the chosen step engine cannot run here.
    """
    problem = ""
    if choice == "graph" and device.type != "cuda":
        problem = f"needs a CUDA device, not {device.type}: choose 'auto', 'compiled' or 'fused'"
    elif choice == "graph" and varying:
        problem = "takes samples of one shape, and these vary: choose 'auto', 'compiled' or 'fused'"
    elif choice == "compiled" and device.type == "cpu" and not cpp_compiler():
        problem = "needs a C++ compiler (g++ or clang++): install one or choose 'fused'"
    if problem:
        raise EngineError(f"The step engine '{choice}' {problem}.")
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "compiled" if varying else "graph"
    return "compiled" if steps >= COMPILE_STEPS and cpp_compiler() else "fused"


@functools.cache
def cpp_compiler() -> str | None:
    """Return the C++ compiler that ``torch.compile`` would use on this machine, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except (InvalidCxxCompiler, OSError):
        return None
