"""Trains the demo models of all tasks on images composed of digits and writes their weights and metadata.

    python scripts/train_demo.py --models demo_vit,demo_swin --epochs 30

Every epoch composes new images from the digits of the train part. Whatever is chosen (here: the number of epochs and
the learning rate) is chosen on the val part with ``--val-only``; the test part is read once, after training, for the
metadata.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

# Run as a script, only this file's folder is on the path; the packages are one level up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_training import detectors, pairs, scenes
from demo_training.common import save

from fimaq_core.errors import suggest

TRAINERS = {name: trainer for trainer in (pairs, scenes, detectors) for name in trainer.NAMES}


def main() -> None:
    """Parses the command line, then trains and saves the models one after the other."""
    parser = argparse.ArgumentParser(description="Train the demo models on images composed of digits.")
    parser.add_argument("--models", default=",".join(TRAINERS), help="comma-separated names (default: all)")
    # What is not given is the default of the model's own recipe.
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seed", type=int, default=0)
    # One by default: the committed weights were trained so, and sums depend on the number of threads.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of the files (default: where each task looks for them)")
    parser.add_argument("--val-only", action="store_true", help="print what val measures; no test part, no files")
    args = parser.parse_args()
    names = [name.strip() for name in args.models.split(",") if name.strip()]
    for name in names:  # A typo in the last name should not show after the first has been trained.
        if name not in TRAINERS:
            parser.error(f"Unknown demo model {name!r}.{suggest(name, TRAINERS)}")
    given = {key: value for key in ("epochs", "lr", "batch_size") if (value := getattr(args, key)) is not None}
    if args.threads < 1 or any(given.get(key, 1) < 1 for key in ("epochs", "batch_size")):
        parser.error("--epochs, --batch-size and --threads must be at least 1")

    torch.set_num_threads(args.threads)
    for name in names:
        trainer = TRAINERS[name]
        recipe = dataclasses.replace(trainer.RECIPES[name], **given)
        started = time.perf_counter()
        model = trainer.train(name, recipe, args.seed)
        minutes = (time.perf_counter() - started) / 60
        measured = trainer.measure(model, "val")
        if args.val_only:
            print(f"{name}: {trainer.describe(measured, 'val')} after {minutes:.1f} minutes")
            continue
        measured |= trainer.measure(model, "test")
        out = args.out or trainer.weights_path(name).parent
        spec, prints = trainer.spec_of(name), trainer.fingerprints()
        save(model, name, spec, recipe, args.seed, minutes, measured, prints, trainer.VERSIONS, out)
        shown = ", ".join(trainer.describe(measured, part) for part in ("val", "test"))
        print(f"{name}: {shown}, {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
