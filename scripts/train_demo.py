"""Train the demo models of all tasks on images composed of digits; write weights and metadata.

    python scripts/train_demo.py --models demo_vit,demo_swin --epochs 30

Whatever is chosen (epochs, learning rate) is chosen on the val part with ``--val-only``; the test
part is read once, after training, for the metadata.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

# Run as a script, only this file's folder is on the path; the packages are one level up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_training import detectors, pairs, scenes

from fimaq_core.errors import suggest
from tasks.common.demo.digits import PARTS

TRAINERS = {name: trainer for trainer in (pairs, scenes, detectors) for name in trainer.DEMO.names}


def save(
    model: nn.Module, name: str, trainer: ModuleType, out: Path, facts: dict[str, Any]
) -> None:
    """Write the weights as ``<name>.safetensors`` and ``facts`` about them as ``<name>.json``."""
    out.mkdir(parents=True, exist_ok=True)
    path, spec = out / f"{name}.safetensors", trainer.DEMO.spec(name)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    metadata = {
        "model": name,
        "class": f"{spec.module}.{spec.cls}",
        "kwargs": spec.kwargs,
        "tag": "digits-v1",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **facts,
        "data_fingerprints": {part: trainer.fingerprint(part) for part in PARTS},
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "date": datetime.now(UTC).date().isoformat(),
        **trainer.VERSIONS,
        "torch": torch.__version__.split("+")[
            0
        ],  # The build after the plus says nothing about the weights.
    }
    path.with_suffix(".json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line, then train and save the models one after the other."""
    parser = argparse.ArgumentParser(
        description="Train the demo models on images composed of digits."
    )
    parser.add_argument(
        "--models", default=",".join(TRAINERS), help="comma-separated names (default: all)"
    )
    # What is not given is the default of the model's own recipe.
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seed", type=int, default=0)
    # One by default: the committed weights were trained so, and sums depend on the number of threads.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, help="folder of the files (default: where each task looks for them)"
    )
    parser.add_argument(
        "--val-only", action="store_true", help="print what val measures; no test part, no files"
    )
    args = parser.parse_args()
    names = [name.strip() for name in args.models.split(",") if name.strip()]
    for name in names:  # A typo in the last name should not show after the first has been trained.
        if name not in TRAINERS:
            parser.error(f"Unknown demo model {name!r}.{suggest(name, TRAINERS)}")
    given = {
        key: value
        for key in ("epochs", "lr", "batch_size")
        if (value := getattr(args, key)) is not None
    }
    if args.threads < 1 or any(given.get(key, 1) < 1 for key in ("epochs", "batch_size")):
        parser.error("--epochs, --batch-size and --threads must be at least 1")

    torch.set_num_threads(args.threads)
    for name in names:
        trainer = TRAINERS[name]
        recipe = dataclasses.replace(trainer.RECIPES[name], **given)
        started = time.perf_counter()
        model = trainer.train(name, recipe, args.seed)
        minutes = round((time.perf_counter() - started) / 60, 1)
        measured = trainer.measure(model, "val")
        if not args.val_only:
            measured |= trainer.measure(model, "test")
            facts = {"seed": args.seed, **dataclasses.asdict(recipe), **measured}
            facts["training_minutes"] = minutes
            save(model, name, trainer, args.out or trainer.DEMO.weights_path(name).parent, facts)
        print(f"{name}: {measured}, {minutes} minutes")


if __name__ == "__main__":
    main()
