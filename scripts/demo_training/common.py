"""What the training of all demo models shares: seeds, optimizer, schedule and the files it writes."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from tasks.common.demo_models import DemoSpec

TAG = "digits-v1"


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters, chosen on the val part.

    Attributes:
        epochs: Passes over newly composed images, as many as the train part has.
        batch_size: Images per step.
        lr: Peak learning rate.
        weight_decay: AdamW's, for weight matrices only.
        warmup_epochs: Epochs of linear warmup before the cosine.
        grad_clip: Largest gradient norm.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.05
    warmup_epochs: int = 3
    grad_clip: float = 1.0


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def lr_factor(step: int, warmup: int, total: int) -> float:
    """Returns the share of the peak learning rate at a step: linear warmup, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class Stepper:
    """AdamW with its schedule and clipping; no weight decay on biases, norms, scales and embeddings."""

    def __init__(self, modules: nn.Module, exempt: set[str], recipe: Recipe, steps_per_epoch: int) -> None:
        """Builds optimizer and schedule.

        Args:
            modules: All that is trained.
            exempt: Names of further parameters without weight decay.
            recipe: Hyperparameters.
            steps_per_epoch: Steps of an epoch.
        """
        decay: list[nn.Parameter] = []
        keep: list[nn.Parameter] = []
        for name, parameter in modules.named_parameters():
            (keep if parameter.ndim <= 1 or name in exempt else decay).append(parameter)
        groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": keep, "weight_decay": 0.0}]
        self._parameters = list(modules.parameters())
        self._grad_clip = recipe.grad_clip
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: lr_factor(step, recipe.warmup_epochs * steps_per_epoch, recipe.epochs * steps_per_epoch),
        )

    def step(self, loss: torch.Tensor) -> None:
        """Steps down the gradient of a scalar loss."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, self._grad_clip)
        self._optimizer.step()
        self._scheduler.step()


def save(
    model: nn.Module,
    name: str,
    spec: DemoSpec,
    recipe: Recipe,
    seed: int,
    minutes: float,
    measured: dict[str, Any],
    fingerprints: dict[str, str],
    versions: dict[str, str],
    out: Path,
) -> None:
    """Writes the weights with their metadata.

    Args:
        model: The trained model.
        name: Name of the demo model.
        spec: How it is built.
        recipe: Hyperparameters it was trained with.
        seed: Seed it was trained with.
        minutes: How long training took.
        measured: Accuracies and numbers of samples.
        fingerprints: Part to fingerprint of the data.
        versions: Version of each further package.
        out: Folder of the ``.safetensors`` and ``.json`` files.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    metadata = {
        "model": name,
        "class": f"{spec.module}.{spec.cls}",
        "kwargs": spec.kwargs,
        "tag": TAG,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": seed,
        **asdict(recipe),
        **measured,
        "data_fingerprints": fingerprints,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "training_minutes": round(minutes, 1),
        "date": datetime.now(UTC).date().isoformat(),
        **versions,
        "torch": torch.__version__.split("+")[0],  # The build after the plus says nothing about the weights.
    }
    path.with_suffix(".json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
