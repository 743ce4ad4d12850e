"""Demo models of a task: architecture, trained weights, and metadata."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fimaq_core.errors import ModelError, suggest
from tasks.common.models.hub import demo_metadata
from tasks.common.models.weights import StoredWeights, load_state, read_weights
from tasks.common.request import ModelRequest


@dataclass(frozen=True)
class DemoSpec:
    """Architecture of a demo model; ``module`` is imported only when the model is built."""

    module: str
    cls: str  # name of the class
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class DemoModels:
    """Demo models of one task by name. Methods raise ModelError for an unknown name."""

    specs: dict[str, DemoSpec]
    folder: Path  # of the weights and their metadata

    @property
    def names(self) -> tuple[str, ...]:
        """All names in order."""
        return tuple(self.specs)

    def spec(self, name: str) -> DemoSpec:
        """Return the architecture of a demo model."""
        if name in self.specs:
            return self.specs[name]
        raise ModelError(f"Unknown demo model {name!r}.{suggest(name, self.specs)}")

    def build(self, name: str) -> nn.Module:
        """Build a demo model with random weights, in eval mode."""
        spec = self.spec(name)
        model: nn.Module = getattr(importlib.import_module(spec.module), spec.cls)(**spec.kwargs)
        return model.eval()

    def weights_path(self, name: str) -> Path:
        """Return the path of the trained weights (safetensors, float32) of a demo model."""
        self.spec(name)
        return self.folder / f"{name}.safetensors"

    def load(self, request: ModelRequest, weights: Path | None) -> tuple[nn.Module, StoredWeights]:
        """Return a model and its weights, from the file ``weights`` or else its trained weights.

        Raises ModelError: arguments, preprocessing or weights do not fit.
        """
        if request.model_args:
            raise ModelError("Demo models take no --model-args: their weights fix the structure.")
        if request.preprocessing:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in request.preprocessing)
            raise ModelError(f"Demo models take no {names}: their data are made for them.")
        model, path = self.build(request.name), weights or self.weights_path(request.name)
        stored = read_weights(path, request.weights_entry)
        load_state(model, stored.state, path.name)
        return model.eval(), stored

    def metadata(self, name: str) -> dict[str, Any]:
        """Return training settings, accuracies, versions and the sha256 of the weights."""
        return demo_metadata(self.weights_path(name).parent, name)
