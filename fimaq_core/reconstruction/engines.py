"""Ways to run an optimisation step.

All four draw the same batches and masks and agree within rounding. ``eager`` is the definition:
plain operations, autograd, ``torch.optim.Adam``. ``fused`` needs no compiler: hand-written backward
passes, one flat vector of variables. ``compiled`` is that through ``torch.compile``. ``graph``
replays the compiled step as one CUDA graph, so the device never waits for Python.
"""

import functools
from typing import Literal

import torch

from fimaq_core.errors import EngineError
from fimaq_core.quantizers.activation import Form
from fimaq_core.reconstruction.flat import CompiledStep, FlatStep, GraphStep
from fimaq_core.reconstruction.step import StepEngine
from fimaq_core.reconstruction.textbook import TextbookStep

Engine = Literal["eager", "fused", "compiled", "graph"]
EngineChoice = Literal["auto", "eager", "fused", "compiled", "graph"]
#: The step of each engine.
STEPS: dict[Engine, type[StepEngine]] = {
    "eager": TextbookStep,
    "fused": FlatStep,
    "compiled": CompiledStep,
    "graph": GraphStep,
}
#: How activation quantizers compute under each engine.
FORMS: dict[Engine, Form] = {engine: step.form for engine, step in STEPS.items()}

#: Steps a block from which compiling pays on a CPU: it takes about 30 s and saves 5 to 10 ms a step.
COMPILE_STEPS = 4000


def choose_engine(
    choice: EngineChoice, device: torch.device, steps: int, varying: bool = False
) -> Engine:
    """The engine to use.

    ``auto`` takes ``graph`` on CUDA (``compiled`` for samples of varying shapes, since a graph has
    one shape), and elsewhere ``compiled`` for long optimisations (:data:`COMPILE_STEPS`) where a C++
    compiler is found, else ``fused``.

    Raises:
        EngineError: the engine asked for cannot run here.
    """
    if choice == "graph" and device.type != "cuda":
        raise EngineError(
            f"The engine 'graph' needs a CUDA device, not {device.type}: choose 'auto', 'compiled' or 'fused'."
        )
    if choice == "graph" and varying:
        raise EngineError(
            "The engine 'graph' takes samples of one shape, and these vary: choose 'auto', 'compiled' or 'fused'."
        )
    if choice == "compiled" and device.type == "cpu" and not cpp_compiler():
        raise EngineError(
            "The engine 'compiled' needs a C++ compiler (g++ or clang++): install one or choose 'fused'."
        )
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "compiled" if varying else "graph"
    return "compiled" if steps >= COMPILE_STEPS and cpp_compiler() else "fused"


@functools.cache
def cpp_compiler() -> str | None:
    """The C++ compiler that ``torch.compile`` would use on this machine, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except (InvalidCxxCompiler, OSError):
        return None
