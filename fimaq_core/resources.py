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
    """Settings of a run that the recipe leaves open.

    Example::

        quantize_chain(chain, images, recipe, divergence, Resources(placement="host"))
    """

    on_progress: OnProgress = silent  # receives progress
    placement: Placement = "device"  # of the tape
    batch_size: int = 32  # samples per forward pass of calibration, tape and Fisher passes
    engine: EngineChoice = "auto"  # the step engine
