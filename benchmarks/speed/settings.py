"""What a run measures, by device and model."""

from dataclasses import dataclass

import torch

from fimaq_core.errors import EngineError, RecipeError
from fimaq_core.numerics import Arithmetic
from fimaq_core.recipe import Recipe, make_recipe
from fimaq_core.reconstruction.engines import FORMS, Engine, cpp_compiler
from tasks.classification.tags import DEMO_NAMES

#: Models by default, and seconds that a run may take.
MODELS = {"cpu": ("demo_vit", "vit_small"), "cuda": ("vit_small", "vit_base", "deit_tiny", "swin_small", "swin_base")}
BUDGET = {"cpu": 280.0, "cuda": 450.0}
#: Bits of the runs.
BITS = 3


@dataclass(frozen=True)
class Settings:
    """Sizes of one model's measurement.

    Attributes:
        engines: whose steps are timed, in order of their turns.
        steps: counted steps of each engine on one block of every make.
        images: on the tape.
        range_images: for calibration; a quarter of them is measured too.
        memory_images: on the tape where peak memory is measured; 0 leaves that out.
        direct: whether direct candidate search is timed beside the fast calibration.
        step_dtype, frozen_dtype: as in recipes.
    """

    engines: tuple[Engine, ...]
    steps: int
    images: int
    range_images: int
    memory_images: int
    direct: bool = False
    step_dtype: Arithmetic = "float32"
    frozen_dtype: Arithmetic = "float32"

    def recipe(self) -> Recipe:
        """FIMA-Q's own settings on these images.

        The rounding regulariser is on from the first step (in the protocol: the last four fifths of the steps), since the
        steps that are timed are the first ones.
        """
        changes = {
            "w_bits": BITS,
            "a_bits": BITS,
            "calibration_images": self.images,
            "range_images": self.range_images,
            "batch_size": min(32, self.images),
            "round_warmup": 0.0,
            "step_dtype": self.step_dtype,
            "frozen_dtype": self.frozen_dtype,
        }
        return make_recipe("fimaq", changes)


def protocol() -> Recipe:
    """The full protocol that times are extrapolated to."""
    return make_recipe("fimaq", {"w_bits": BITS, "a_bits": BITS})


def default_settings(model: str, device: torch.device) -> Settings:
    """Sizes that let the default models end in time: 5 minutes on two CPU cores, 8 minutes on a GPU."""
    if device.type == "cuda":
        return Settings(("eager", "fused", "compiled", "graph"), 300, 128, 128, 64, direct=model in DEMO_NAMES)
    if model in DEMO_NAMES:
        compiled: tuple[Engine, ...] = ("compiled",) if cpp_compiler() else ()
        return Settings(("eager", "fused", *compiled), 200, 256, 128, 256, direct=True)
    return Settings(("eager", "fused"), 5, 32, 8, 64)


def parse_engines(text: str, device: torch.device) -> tuple[Engine, ...] | None:
    """The engines of a comma list, or None for an empty one.

    Raises:
        EngineError: no such engine, or not on this device.
    """
    found: list[Engine] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in FORMS:
            raise EngineError(f"There is no engine '{name}': {', '.join(FORMS)} are there.")
        if name == "graph" and device.type != "cuda":
            raise EngineError("The engine 'graph' needs a CUDA device: leave it out, or give --device cuda.")
        found.append(next(engine for engine in FORMS if engine == name))
    return tuple(dict.fromkeys(found)) or None


def budget_shares(models: tuple[str, ...]) -> list[float]:
    """For each model, the fraction that it gets of the time left when its turn comes. Those with a direct search need more."""
    weights = [3.0 if model in DEMO_NAMES else 1.0 for model in models]
    return [weight / sum(weights[number:]) for number, weight in enumerate(weights)]


def parse_models(text: str, device: torch.device) -> tuple[str, ...]:
    """The models of a comma list, or the device's own.

    Raises:
        RecipeError: a list without a name.
    """
    if not text:
        return MODELS[device.type]
    models = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not models:
        raise RecipeError("--models names no model: give a comma list such as demo_vit,vit_small.")
    return models
