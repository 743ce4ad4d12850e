"""Shared by the training of all demo models: hyperparameters, initial weights and the loop."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters, chosen on the val part: AdamW with linear warmup and cosine.

    An epoch is a pass over as many images as the train part has; ``weight_decay`` is for weight
    matrices only.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.05
    warmup_epochs: float = 3
    grad_clip: float = 1.0


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def widen(model: nn.Module) -> None:
    """Enlarge initial weights: these narrow models would hardly start to learn."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


def fit(
    name: str,
    recipe: Recipe,
    model: nn.Module,
    exempt: tuple[str, ...],
    steps: int,
    batches: Callable[[int], Callable[[slice], Tensor]],
    validate: Callable[[], object] | None = None,
) -> None:
    """Train by AdamW; biases, norms, scales and ``exempt`` parts of names do not decay.

    ``steps`` are those of an epoch; ``batches`` maps an epoch's number to a function from a batch's
    slice to its loss; ``validate`` measures the model for the printed lines, every fifth epoch.
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for key, parameter in model.named_parameters():
        free = parameter.ndim <= 1 or any(part in key for part in exempt)
        (keep if free else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": recipe.weight_decay},
        {"params": keep, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    warmup, total = max(1, round(recipe.warmup_epochs * steps)), recipe.epochs * steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for epoch in range(recipe.epochs):
        started, losses = time.perf_counter(), 0.0
        loss_of = batches(epoch)
        model.train()
        for step in range(steps):
            loss = loss_of(slice(step * recipe.batch_size, (step + 1) * recipe.batch_size))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
            optimizer.step()
            scheduler.step()
            losses += loss.item()
        line = f"{name} epoch {epoch + 1}/{recipe.epochs} loss {losses / steps:.3f}"
        if validate is not None and ((epoch + 1) % 5 == 0 or epoch + 1 == recipe.epochs):
            line += f" {validate()}"
        print(f"{line} ({time.perf_counter() - started:.1f} s)", flush=True)
