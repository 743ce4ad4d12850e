"""Small grids of tests: axes, sections with scopes, and one COCO folder for two sections."""

from pathlib import Path
from typing import Any

import yaml

from benchmarks.grid.cell import Cell, Places, RunOptions
from benchmarks.grid.expand import expand, parse_filters
from benchmarks.grid.schema import parse_grid

AXES = {
    "loss": {"mse": {"loss": "mse"}, "dplr": {}},
    "k": {"1": {"fisher_k": 1}, "5": {"fisher_k": 5}, "15": {"fisher_k": 15}},
}
AXES_GRID: dict[str, Any] = yaml.safe_load(
    """
name: ab
tasks: {classification: {dataset: digit-pairs, models: [demo_vit, demo_swin]}}
methods: [fp, fimaq]
bits: [w3a3]
seeds: [1, 2]
variant: demo
overrides: {steps: 250}
threads: 1
"""
) | {"axes": AXES}
SECTIONS_GRID: dict[str, Any] = yaml.safe_load(
    """
name: s
tasks:
  classification: {dataset: digit-pairs, models: [demo_vit]}
  coco:
    task: retrieval
    dataset: MS-COCO
    data: coco
    models: [clip_b]
    available: [clip_l]
    methods: [fp, rtn, fimaq]
    bits: [w4a4]
    seeds: [1, 2]
    scopes: [both, vision]
    overrides: {steps: 9}
  zero-shot:
    task: retrieval
    dataset: ImageNet-1k val
    data: imagenet
    evaluation: zero-shot
    models: [clip_b]
    scopes: [vision]
methods: [fp, rtn, qdrop]
bits: [w3a3]
seeds: [7]
variant: x
overrides: {steps: 5, batch_size: 8}
threads: 1
"""
)
ONE_FOLDER: dict[str, Any] = yaml.safe_load(
    """
name: one
methods: [fp]
bits: [w4a4]
seeds: [1]
tasks:
  classification: {dataset: digit-pairs, models: [demo_vit]}
  captions: {task: retrieval, dataset: MS-COCO, data: coco, models: [clip_vit_b32]}
  detection: {dataset: COCO 2017, data: coco, models: [mask_rcnn_swin_tiny]}
"""
)
PLACES = Places(imagenet=Path("/imagenet"), coco=Path("/coco"))


def cells_of(
    grid: dict[str, Any], options: RunOptions = RunOptions(data=PLACES), **filters: str
) -> list[Cell]:
    """The cells of a grid's content that filters leave."""
    parsed = parse_grid(grid)
    return expand(parsed, parse_filters(parsed, **filters), options)
