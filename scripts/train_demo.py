"""Train the demo models of all tasks on images composed of digits; write weights and metadata.

    python scripts/train_demo.py --models demo_vit,demo_swin --epochs 30

Choose epochs and learning rate on the val part with ``--val-only``; the test part is read once,
after training, for the metadata.
"""

import argparse
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

# A script's path has only its own folder; the packages are one level up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_training import classification, detection, retrieval

from fimaq_core.errors import suggest
from tasks.common.demo.digits import PARTS

TASKS = (classification, retrieval, detection)
TRAINERS = {name: trainer for trainer in TASKS for name in trainer.DEMO.names}


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
        "torch": torch.__version__.split("+")[0],  # without the build
    }
    path.with_suffix(".json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line, then train and save the models one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default=",".join(TRAINERS), help="comma-separated names")
    parser.add_argument("--epochs", type=int, help="default: the model's own")
    parser.add_argument("--lr", type=float, help="default: the model's own")
    parser.add_argument("--batch-size", type=int, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=0)
    # The committed weights were trained by one thread; sums depend on the number of threads.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder (default: where each task looks)")
    parser.add_argument("--val-only", action="store_true", help="no test part, no files")
    args = parser.parse_args()
    names = [name.strip() for name in args.models.split(",") if name.strip()]
    for name in names:  # before hours of training
        if name not in TRAINERS:
            parser.error(f"Unknown demo model {name!r}.{suggest(name, TRAINERS)}")
    wanted = {key: getattr(args, key) for key in ("seed", "epochs", "lr", "batch_size")}
    given = {key: value for key, value in wanted.items() if value is not None}
    if args.threads < 1 or any(given.get(key, 1) < 1 for key in ("epochs", "batch_size")):
        parser.error("--epochs, --batch-size and --threads must be at least 1")

    torch.set_num_threads(args.threads)
    for name in names:
        print(f"training {name}", flush=True)
        trainer = TRAINERS[name]
        settings, started = trainer.SETTINGS[name] | given, time.perf_counter()
        model = trainer.train(name, settings)
        minutes = round((time.perf_counter() - started) / 60, 1)
        measured = trainer.measure(model, "val")
        if not args.val_only:
            measured |= trainer.measure(model, "test")
            facts = {**settings, **measured, "training_minutes": minutes}
            save(model, name, trainer, args.out or trainer.DEMO.weights_path(name).parent, facts)
        print(f"{name}: {measured}, {minutes} minutes")


if __name__ == "__main__":
    main()
