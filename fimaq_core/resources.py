"""Settings of a run beside the recipe. Results of all choices agree within rounding."""

from dataclasses import dataclass
from typing import Literal

from fimaq_core.progress import OnProgress, silent

#: Step engines, see :mod:`fimaq_core.reconstruction.engines`.
Engine = Literal["eager", "fused", "compiled", "graph"]
EngineChoice = Literal["auto", "eager", "fused", "compiled", "graph"]
#: Place of the tape: the computing device, host memory or temporary files.
Placement = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Resources:
    """Settings of a run that do not belong to the recipe.

    Example::

        quantize_chain(chain, images, recipe, divergence, Resources(placement="host"))
    """

    on_progress: OnProgress = silent  # receives progress
    placement: Placement = "device"  # of the tape
    batch_size: int = 32  # samples per forward pass of calibration, tape and Fisher passes
    engine: EngineChoice = "auto"  # the step engine
