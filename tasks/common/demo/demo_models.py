"""The demo models of a task: how they are built, where their weights are and what is recorded about them."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fimaq_core.errors import ModelError, suggest
from tasks.common.models.weights import StoredWeights, load_state, read_weights
from tasks.common.request import ModelRequest


@dataclass(frozen=True)
class DemoSpec:
    """How to build a demo model: the module that defines its class, imported only then, the class's name and arguments."""

    module: str
    cls: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class DemoModels:
    """The demo models of one task. Methods take the name of a model and raise ModelError for an unknown one.

    Attributes:
        specs: by name.
        folder: of the weights and their metadata.
    """

    specs: dict[str, DemoSpec]
    folder: Path

    @property
    def names(self) -> tuple[str, ...]:
        """All names in order."""
        return tuple(self.specs)

    def spec(self, name: str) -> DemoSpec:
        """Look up how a demo model is built."""
        if name in self.specs:
            return self.specs[name]
        raise ModelError(f"Unknown demo model {name!r}.{suggest(name, self.specs)}")

    def build(self, name: str) -> nn.Module:
        """Build a demo model with random weights, in eval mode."""
        spec = self.spec(name)
        model: nn.Module = getattr(importlib.import_module(spec.module), spec.cls)(**spec.kwargs)
        return model.eval()

    def weights_path(self, name: str) -> Path:
        """Return where the trained weights (safetensors, float32) of a demo model are."""
        self.spec(name)
        return self.folder / f"{name}.safetensors"

    def load(self, request: ModelRequest, weights: Path | None) -> tuple[nn.Module, StoredWeights]:
        """Build the model that is asked for with its weights, or those of another file; return also what was read.

        Raises:
            ModelError: arguments for the constructor or the preprocessing, or weights that do not fit.
            NumericsError: NaN in the weights.
        """
        if request.model_args:
            raise ModelError(
                "Demo models take no --model-args: their structure is fixed by their weights."
            )
        if request.preprocessing:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in request.preprocessing)
            raise ModelError(f"Demo models take no {names}: their data are made for them.")
        model, path = self.build(request.name), weights or self.weights_path(request.name)
        stored = read_weights(path, request.weights_entry)
        load_state(model, stored.state, path.name)
        return model.eval(), stored

    def metadata(self, name: str) -> dict[str, Any]:
        """Read training settings, accuracies, versions and sha256 of the weights. Raises FileNotFoundError."""
        path = self.weights_path(name).with_suffix(".json")
        if not path.is_file():
            raise FileNotFoundError(
                f"no metadata for {name}: train it with `python scripts/train_demo.py --models {name}`"
            )
        return json.loads(path.read_text(encoding="utf-8"))
