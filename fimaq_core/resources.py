"""Where and how a quantization runs. Step engines and placements agree within rounding."""

from dataclasses import dataclass
from typing import Literal

from fimaq_core.progress import OnProgress, silent

#: How an optimisation step runs, see :mod:`fimaq_core.reconstruction.engines`.
Engine = Literal["eager", "fused", "compiled", "graph"]
EngineChoice = Literal["auto", "eager", "fused", "compiled", "graph"]
#: Where the tape lies: on the computing device, in host memory, or in temporary files.
Placement = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Resources:
    """How to run, as far as the recipe does not say it.

    Example::

        quantize_chain(chain, images, recipe, divergence, Resources(placement="host"))

    Attributes:
        on_progress: receives progress.
        placement: of the tape.
        batch_size: samples per forward pass of calibration, tape and Fisher passes.
        engine: the step engine.
    """

    on_progress: OnProgress = silent
    placement: Placement = "device"
    batch_size: int = 32
    engine: EngineChoice = "auto"
