"""Random weights of real architectures, as files that load as published weights do."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.grid.cell import Cell
from fimaq_core.files import replaced_whole

#: Factor of a detector's classification weights, so that random ones find objects whose masks are
#: then predicted too.
_CERTAIN = 50.0


def make_weights(folder: Path, cells: Iterable[Cell]) -> None:
    """Write random weights of the models of ``cells``, ``<model.tag>.safetensors``, where missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, name in dict.fromkeys((cell.task, cell.model) for cell in cells):
        catalogue = importlib.import_module(f"tasks.{task}.tags").CATALOGUE
        if name in catalogue.demo_names:
            continue
        full_name = catalogue.full_name(name)
        path = folder / f"{full_name}.safetensors"
        if not path.is_file():
            torch.manual_seed(0)
            state = _build(task, full_name).state_dict()
            tensors = {key: value.clone().contiguous() for key, value in state.items()}
            with replaced_whole(path) as temporary:
                save_file(tensors, temporary)


def _build(task: str, full_name: str) -> nn.Module:
    architecture = full_name.partition(".")[0]
    model: Any
    if task == "retrieval":
        import open_clip  # type: ignore[import-untyped, unused-ignore]

        model = open_clip.create_model(architecture, pretrained=None)
    elif task == "detection":
        from tasks.detection.configs import build, published_config

        model = build(published_config(architecture))
        heads = model.roi_head.bbox_head
        each: Any = heads if isinstance(heads, nn.ModuleList) else [heads]
        for head in each:
            head.fc_cls.weight.data.mul_(_CERTAIN)
    else:
        import timm

        model = timm.create_model(architecture, pretrained=False)
    return cast(nn.Module, model)
