"""Trains the demo models of the classification task on the digit pairs and writes their weights and metadata.

    python scripts/train_demo.py --models demo_vit,demo_swin --epochs 30

Every epoch composes new pairs from the digits of the train part. Whatever is chosen (here: the number of epochs and
the learning rate) is chosen on the val part with ``--val-only``; the test part is read once, after training, for the
metadata.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

# Run as a script, only this file's folder is on the path; the packages are one level up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.classification.demo import digits
from tasks.classification.demo.augment import RandomDigitWarp
from tasks.classification.demo.models import (
    DEMO_MODELS,
    build_demo_model,
    demo_spec,
    demo_weights_path,
)

TAG = "digits-v1"


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters, chosen on the val part.

    Attributes:
        epochs: Passes over 8,192 newly composed pairs.
        batch_size: Pairs per step.
        lr: Peak learning rate.
        weight_decay: AdamW's, for weight matrices only.
        warmup_epochs: Epochs of linear warmup before the cosine.
        label_smoothing: Smoothing of the cross entropy.
        grad_clip: Largest gradient norm.
    """

    epochs: int = 30
    batch_size: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 3
    label_smoothing: float = 0.05
    grad_clip: float = 1.0


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def to_input(pixels: torch.Tensor) -> torch.Tensor:
    """Normalises float32 images in [0, 1] exactly like `digits.eval_transform`."""
    return (pixels - digits.PIXEL_MEAN) / digits.PIXEL_STD


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Builds AdamW without weight decay on biases, norms and what the model itself exempts (embeddings)."""
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_embedding = name in exempt or "relative_position_bias" in name
        (keep if parameter.ndim <= 1 or is_embedding else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr)


def lr_factor(step: int, warmup: int, total: int) -> float:
    """Returns the share of the peak learning rate at a step: linear warmup, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def initialise(model: nn.Module) -> None:
    """Replaces the initial weights that suit wide models: with timm's 0.02 these narrow ones hardly start to learn."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    position = getattr(model, "pos_embed", None)
    if position is not None:
        # The label depends on which side a digit is on, so positions must be seen from the first step.
        nn.init.normal_(position, std=0.3)


def loss_of(output: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Computes the loss: the mean cross entropy of the pair, of its left digit and of its right digit.

    The digits' logits are marginals of the pair's, so the model has no further outputs; but while a model still
    confuses most pairs, a digit it does know is rewarded at once, which saves many epochs.

    Args:
        output: Logits of shape ``(b, 100)``, or one such tensor per head (the distilled model in training).
        labels: int64 of shape ``(b,)``.
        smoothing: Label smoothing.

    Returns:
        The loss, averaged over the heads.
    """
    losses: list[torch.Tensor] = []
    for logits in output if isinstance(output, tuple) else (output,):
        table = logits.unflatten(1, (10, 10))  # (b, left, right)
        losses.append(F.cross_entropy(logits, labels, label_smoothing=smoothing))
        losses.append(F.cross_entropy(table.logsumexp(2), labels // 10, label_smoothing=smoothing))
        losses.append(F.cross_entropy(table.logsumexp(1), labels % 10, label_smoothing=smoothing))
    return torch.stack(losses).mean()


@torch.inference_mode()
def accuracy(model: nn.Module, part: str) -> tuple[float, int]:
    """Measures top-1 accuracy.

    Args:
        model: The model; left in eval mode.
        part: Part of the digit pairs.

    Returns:
        The accuracy in percent and the number of pairs.
    """
    model.eval()
    data = digits.DigitPairs(part)
    images = torch.from_numpy(data.pixels)[:, None].float() / 255
    predictions = torch.cat([model(to_input(batch)).argmax(dim=1) for batch in images.split(250)])
    hits = int((predictions == torch.tensor(data.targets)).sum())
    return 100 * hits / len(data), len(data)


def train(name: str, recipe: Recipe, seed: int) -> nn.Module:
    """Trains one model from scratch.

    Args:
        name: Name of the demo model.
        recipe: Hyperparameters.
        seed: Seed of the initial weights, the composed pairs and the augmentation.

    Returns:
        The trained model, in eval mode.
    """
    seed_everything(seed)
    model = build_demo_model(name)
    initialise(model)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    augment = RandomDigitWarp()
    pairs_per_epoch = len(digits.DigitPairs("train"))
    steps_per_epoch = pairs_per_epoch // recipe.batch_size
    optimizer = make_optimizer(model, recipe)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: lr_factor(step, recipe.warmup_epochs * steps_per_epoch, recipe.epochs * steps_per_epoch),
    )
    for epoch in range(recipe.epochs):
        started = time.perf_counter()
        plan = digits.draw_pairs("train", pairs_per_epoch, np.random.default_rng([seed, epoch]))
        images = torch.from_numpy(digits.compose_pairs(plan))[:, None]
        labels = torch.from_numpy(plan.targets)
        model.train()
        total_loss = 0.0
        for step in range(steps_per_epoch):  # The plan's order is random already.
            batch = slice(step * recipe.batch_size, (step + 1) * recipe.batch_size)
            inputs = to_input(augment(images[batch].float() / 255))
            loss = loss_of(model(inputs), labels[batch], recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
            optimizer.step()
            scheduler.step()
            total_loss += loss.item()
        line = f"{name} epoch {epoch + 1}/{recipe.epochs} loss {total_loss / steps_per_epoch:.3f}"
        if (epoch + 1) % 5 == 0 or epoch + 1 == recipe.epochs:
            line += f" val {accuracy(model, 'val')[0]:.2f} %"
        print(f"{line} ({time.perf_counter() - started:.1f} s)", flush=True)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(False)
    return model.eval()


def save(model: nn.Module, name: str, recipe: Recipe, seed: int, minutes: float, out: Path) -> dict[str, Any]:
    """Measures val and test accuracy and writes the weights with their metadata.

    Args:
        model: The trained model.
        name: Name of the demo model.
        recipe: Hyperparameters it was trained with.
        seed: Seed it was trained with.
        minutes: How long training took.
        out: Folder of the ``.safetensors`` and ``.json`` files.

    Returns:
        The metadata.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    val_accuracy, val_count = accuracy(model, "val")
    test_accuracy, test_count = accuracy(model, "test")
    spec = demo_spec(name)
    metadata = {
        "model": name,
        "class": f"{spec.module}.{spec.cls}",
        "kwargs": spec.kwargs,
        "tag": TAG,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": seed,
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "warmup_epochs": recipe.warmup_epochs,
        "label_smoothing": recipe.label_smoothing,
        "val_accuracy": round(val_accuracy, 4),
        "val_count": val_count,
        "test_accuracy": round(test_accuracy, 4),
        "test_count": test_count,
        "data_fingerprints": {part: digits.DigitPairs(part).fingerprint for part in digits.PARTS},
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "training_minutes": round(minutes, 1),
        "date": datetime.now(UTC).date().isoformat(),
        "timm": timm.__version__,
        "torch": torch.__version__.split("+")[0],  # The build after the plus says nothing about the weights.
    }
    path.with_suffix(".json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return metadata


def main() -> None:
    """Parses the command line, then trains and saves the models one after the other."""
    parser = argparse.ArgumentParser(description="Train the demo models on the digit pairs.")
    parser.add_argument("--models", default=",".join(DEMO_MODELS), help="comma-separated names")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--seed", type=int, default=0)
    # One by default: the committed weights were trained so, and sums depend on the number of threads.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=demo_weights_path(DEMO_MODELS[0]).parent)
    parser.add_argument("--val-only", action="store_true", help="print val accuracy; no test accuracy, no files")
    args = parser.parse_args()
    names = [name.strip() for name in args.models.split(",") if name.strip()]
    try:
        for name in names:
            demo_spec(name)  # A typo in the last name should not show after the first has been trained.
    except ValueError as error:
        parser.error(str(error))
    if args.epochs < 1 or args.batch_size < 1 or args.threads < 1:
        parser.error("--epochs, --batch-size and --threads must be at least 1")

    torch.set_num_threads(args.threads)
    recipe = Recipe(epochs=args.epochs, lr=args.lr, batch_size=args.batch_size)
    for name in names:
        started = time.perf_counter()
        model = train(name, recipe, args.seed)
        minutes = (time.perf_counter() - started) / 60
        if args.val_only:
            print(f"{name}: val {accuracy(model, 'val')[0]:.2f} % after {minutes:.1f} minutes")
            continue
        metadata = save(model, name, recipe, args.seed, minutes, args.out)
        print(f"{name}: val {metadata['val_accuracy']} %, test {metadata['test_accuracy']} %, {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
