"""Training loop and settings shared by all demo models."""

import math
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks.common.demo.demo_models import DemoModels

Settings = dict[str, Any]
#: Function from the rows of a batch to the loss of the batch.
BatchLoss = Callable[[slice], Tensor]


def settings(**own: Any) -> Settings:
    """Return hyperparameters of AdamW with linear warmup and cosine decay, chosen on the val part.

    One epoch takes as many images as the train part has. ``weight_decay`` applies to weight
    matrices only.
    """
    shared = {"seed": 0, "epochs": 0, "batch_size": 64, "lr": 0.0}
    return shared | {"weight_decay": 0.05, "warmup_epochs": 3, "grad_clip": 1.0} | own


def start(demo: DemoModels, name: str, seed: int) -> Any:
    """Seed all generators and return the model with random weights."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return demo.build(name)


def widen(model: nn.Module) -> None:
    """Enlarge the initial weights; otherwise such narrow models would hardly start to learn."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


def fit(
    model: nn.Module,
    chosen: Settings,
    draw: Callable[[np.random.Generator], BatchLoss],
    *,
    count: int,
    exempt: tuple[str, ...],
    validate: Callable[[], object] = lambda: "",
) -> None:
    """Train by AdamW.

    Args:
        model: to train, in place.
        chosen: hyperparameters, see :func:`settings`.
        draw: draws the ``count`` images of an epoch; returns the function of their loss.
        count: number of images per epoch.
        exempt: parts of names of parameters without weight decay, beside vectors and scalars.
        validate: measures the model; its result is printed every fifth epoch.
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for key, parameter in model.named_parameters():
        free = parameter.ndim <= 1 or any(part in key for part in exempt)
        (keep if free else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": chosen["weight_decay"]},
        {"params": keep, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=chosen["lr"])
    epochs, size = chosen["epochs"], chosen["batch_size"]
    steps = count // size
    warmup, total = max(1, round(chosen["warmup_epochs"] * steps)), epochs * steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for epoch in range(epochs):
        started, losses = time.perf_counter(), 0.0
        loss_of = draw(np.random.default_rng([chosen["seed"], epoch]))
        model.train()
        for step in range(steps):
            loss = loss_of(slice(step * size, (step + 1) * size))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), chosen["grad_clip"])
            optimizer.step()
            scheduler.step()
            losses += loss.item()
        found = validate() if (epoch + 1) % 5 == 0 or epoch + 1 == epochs else ""
        spent = f"({time.perf_counter() - started:.1f} s)"
        print(f"epoch {epoch + 1}/{epochs} loss {losses / steps:.3f} {found} {spent}", flush=True)
