"""Train the demo models of all tasks on images composed of digits; write weights and metadata.

    python scripts/train_demo.py --models demo_vit,demo_swin --epochs 30

Choose epochs and learning rate on the val part, by ``--val-only``. The test part is read only once,
after training, for the metadata.
"""

import hashlib
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
from safetensors.torch import save_file
from torch import nn

# Python looks in the script's folder only; the packages are one level up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_training import classification, deepfake, detection, retrieval

from fimaq_core.errors import suggest
from tasks.common.cli import numbers
from tasks.common.demo.digits import PARTS

TASKS = (classification, retrieval, detection, deepfake)
TRAINERS = {name: trainer for trainer in TASKS for name in trainer.DEMO.names}


def save(
    model: nn.Module, name: str, trainer: ModuleType, out: Path, facts: dict[str, Any]
) -> None:
    """Write the weights to ``<name>.safetensors`` and ``facts`` about them to ``<name>.json``."""
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


@click.command()
@click.option("--models", default=",".join(TRAINERS), help="Comma-separated names (default: all).")
@click.option("--epochs", type=numbers.COUNT, help="Default: the model's own.")
@click.option(
    "--lr", type=numbers.FiniteRange(0, 1e30, min_open=True), help="Default: the model's own."
)
@click.option("--batch-size", type=numbers.COUNT, help="Default: the model's own.")
@click.option("--seed", type=numbers.COUNT_OR_NONE, default=0)
# The committed weights were trained by one thread; the order of sums depends on the threads.
@click.option("--threads", type=numbers.THREADS, default=1)
@click.option("--out", type=click.Path(path_type=Path), help="Folder (default: each task's own).")
@click.option("--val-only", is_flag=True, help="Measure the val part only; write no files.")
def main(models: str, threads: int, out: Path | None, val_only: bool, **settings: Any) -> None:
    """Train and save demo models, one after the other."""
    names = [name.strip() for name in models.split(",") if name.strip()]
    for name in names:  # before hours of training
        if name not in TRAINERS:
            raise click.UsageError(f"Unknown demo model {name!r}.{suggest(name, TRAINERS)}")
    given = {key: value for key, value in settings.items() if value is not None}
    torch.set_num_threads(threads)
    for name in names:
        print(f"training {name}", flush=True)
        trainer = TRAINERS[name]
        chosen, started = trainer.SETTINGS[name] | given, time.perf_counter()
        model = trainer.train(name, chosen)
        minutes = round((time.perf_counter() - started) / 60, 1)
        measured = trainer.measure(model, "val")
        if not val_only:
            measured |= trainer.measure(model, "test")
            facts = {**chosen, **measured, "training_minutes": minutes}
            save(model, name, trainer, out or trainer.DEMO.weights_path(name).parent, facts)
        print(f"{name}: {measured}, {minutes} minutes")


if __name__ == "__main__":
    main()
