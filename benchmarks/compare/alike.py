"""Facts on which a score depends, and the reasons why two scores are not alike."""

import hashlib
import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import pandas as pd

from benchmarks.grid.names import Names, load_names
from benchmarks.published.table import csv_rows
from fimaq_core.errors import FimaqError
from fimaq_core.recipe import METHODS, Recipe
from tasks.common import registry
from tasks.common.record import ResultRecord, bits_name, contradictions, recipe_of

#: Kinds of evidence with which a published number gets a verdict.
STRONG = ("primary", "cited")
#: Points by which the full precision of a model may differ from the published one. More than this
#: means other weights, other images or another preprocessing.
FULL_PRECISION_MARGIN = 1.0

#: Facts that name a cell, beside its recipe.
CELL = ("task", "model", "method", "bits", "variant")
#: Start of the names of facts from a recipe.
RECIPE = "recipe's "
#: Facts that all records of a model share where methods are compared.
SHARED = (
    "weights", "weights entry", "model arguments", "preprocessing", "exif", "class order",
    "categories", "calibration data",
)  # fmt: skip
#: Versions in records that may move a score, but as little as a seed does.
_LIBRARIES = (
    "fimaq", "torch", "torchvision", "timm", "open_clip_torch", "transformers", "numpy",
)  # fmt: skip
#: Facts that are only noted where methods are compared. A list may be the images of the other run.
NOTED = ("calibration list", "device", *_LIBRARIES)


def facts(record: ResultRecord) -> dict[str, str | None]:
    """Return all facts on which a score depends, except the seed.

    A fact is None if it does not apply or if an older record does not hold it.
    """
    data, weights, own, where = (
        record.dataset, record.weights, record.calibration, record.environment,
    )  # fmt: skip
    exported = record.exported
    found: dict[str, str | None] = {
        "task": record.task,
        "model": record.model,
        "method": record.method,
        "bits": bits_name(record.w_bit, record.a_bit),
        "variant": record.variant,
        "data": f"{data.name} {data.split}, {data.count} images, {data.fingerprint}",
        "samples": str(record.n),
        "exif": data.exif or "by annotated sizes",
        "class order": data.class_order,
        "categories": data.class_categories and ", ".join(map(str, data.class_categories)),
        "weights": f"{weights.tag} {weights.sha256}",
        "weights entry": weights.entry,
        "model arguments": json.dumps(record.model_args, sort_keys=True) if record.identity else "",
        "preprocessing": record.preprocessing and record.preprocessing.text(),
        "export": exported and f"{exported.weights}{', signed' if exported.signed else ''}",
        "device": "cpu" if where.device.startswith("cpu") else "cuda",
        **{name: where.versions.get(name) for name in _LIBRARIES},
    }
    if own is not None:
        listed = None if own.listed is None else "none"
        if own.listed:
            listed = hashlib.sha256("\n".join(own.ids).encode()).hexdigest()
        found |= {
            "calibration data": own.split and f"{own.dataset or 'files'} {own.split}",
            "calibration list": listed,
            "calibration images": str(len(own.ids)),
            "calibration transform": own.transform,
            "calibration batch": str(own.batch),
        }
    # A field that an older recipe lacks has its default, which is the older behaviour.
    usual = {name: field.default for name, field in Recipe.model_fields.items()}
    recipe = {} if record.recipe is None else {**usual, **record.recipe}
    found |= {f"{RECIPE}{name}": str(value) for name, value in recipe.items() if name != "seed"}
    return {name: value or None for name, value in found.items()}


def differing(records: Iterable[ResultRecord], names: Sequence[str] = ()) -> str:
    """Return the facts, with their values, in which records differ; empty if they are alike.

    ``names`` are the facts to look at, by default all. Unknown facts differ from none.
    """
    found = [facts(record) for record in records]
    apart = []
    for name in names or dict.fromkeys(name for one in found for name in one):
        values = sorted({value for one in found if (value := one.get(name)) is not None})
        if len(values) > 1:
            apart.append(f"{name} ({'; '.join(map(_short, values))})")
    return ", ".join(apart)


def _short(value: str) -> str:
    """Return a fact with 12 digits of each hash, cut off after 80 characters."""
    text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1", value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def has_effect(recipe: Recipe, name: str) -> bool:
    """Return True if the setting ``name`` influences the results of a recipe."""
    if name in ("reconstruct", "reconstruct_mlp", "refit", "start", "finish_steps"):
        return True
    parts = {"mlp_": recipe.reconstruct_mlp, "finish_": recipe.finish_steps > 0}
    parts["start_"] = recipe.start != "nearest"
    straight = recipe.weight_learning == "straight-through"
    parts |= {
        "lr_weight": recipe.reconstruct and straight,
        "lr_alpha": recipe.reconstruct and not straight,
    }
    for prefix, wanted in parts.items():
        if name.startswith(prefix):
            return wanted
    extra = Recipe.model_fields[name].json_schema_extra
    group = extra.get("group") if isinstance(extra, dict) else None
    if group == "reconstruction":
        return recipe.reconstruct
    return group != "loss" or recipe.reconstruct or recipe.reconstruct_mlp


def changed_settings(recipe: Recipe, task: str) -> dict[str, object]:
    """Return the settings that differ from the released ones of ``task`` and have an effect."""
    changes = recipe.changes(registry.defaults(task))
    return {name: value for name, value in changes.items() if has_effect(recipe, name)}


def changes_of(record: ResultRecord) -> dict[str, object]:
    """Return the changed settings of a record; none if its recipe is not of this version."""
    try:
        recipe = recipe_of(record)
        return {} if recipe is None else changed_settings(recipe, record.task)
    except FimaqError:
        return {}


@cache
def published_rows() -> pd.DataFrame:
    """Return the published accuracies, with those of the ablations that ``names.yaml`` lists.

    Bits are 0 where the source does not state them.
    """
    found = [
        {**row, "task": task, "dataset": dataset}
        for study, (task, dataset) in load_names().ablations.items()
        for row in csv_rows("ablation")
        if row["study"] == study
    ]
    table = pd.DataFrame(csv_rows("accuracy") + found).fillna("")
    for column in ("w_bit", "a_bit"):
        table[column] = pd.to_numeric(table[column]).fillna(0).astype(int)
    return table.assign(value=table["value"].astype(float))


def mismatch(
    record: ResultRecord, metric: str, *, names: Names, changes: Mapping[str, object]
) -> str | None:
    """Return the reason why a record compares with no published number; None if it may.

    ``changes`` are the recipe fields that the published method changes in the record's method.
    """
    why = _other_data(record, names) or _other_model(record, names) or contradiction(record)
    if not why and record.method != "fp":
        why = (
            _export(record)
            or _other_full_precision(record, metric)
            or _other_recipe(record, changes)
            or _other_calibration(record, names)
        )
    # Records of other people may have texts of any length.
    return why and textwrap.shorten(why, 400, placeholder=" ...")


def _other_data(record: ResultRecord, names: Names) -> str | None:
    data, sets = record.dataset, names.published_on(record.task, record.dataset.name)
    if not sets:
        where = f"{data.name} ({data.split}, {data.count} samples)"
        return f"measured on {where}, on which nothing is published"
    wanted = sets[0][2]
    if wanted.count is None:
        return "the source does not state how many samples it used"
    if (data.split, data.count, record.n) != (wanted.split, wanted.count, wanted.count):
        return (
            f"measured on a part of {data.name} ({data.split}, {record.n} samples); "
            f"published numbers use {wanted.split} with {wanted.count}"
        )
    if record.skipped_images:
        return f"{len(record.skipped_images)} damaged images were left out"
    if data.exif is not None:
        return f"the user chose to {data.exif} EXIF orientations (--exif)"
    if data.class_order == "file":
        return "the labels follow a file of the user (--class-order)"
    return None


def _other_model(record: ResultRecord, names: Names) -> str | None:
    models, weights, made = names.models_for(record.model), record.weights, record.preprocessing
    if not models:
        return f"no published name is mapped to the model {record.model}"
    if weights.tag != models[0].tag:
        return f"weights {weights.tag}; published numbers use {models[0].tag}"
    if len(weights.entries) > 1:
        listed = ", ".join(weights.entries)
        return f"weights of the entry '{weights.entry}' of a file with several ({listed})"
    if record.model_args:
        return f"the model was built with arguments: {json.dumps(record.model_args)}"
    wanted = names.preprocessing.get(models[0].preprocessing or "")
    if wanted and made is not None and made.text() != wanted:
        return f"preprocessing {made.text()}; published numbers use {wanted}"
    return None


def contradiction(record: ResultRecord) -> str | None:
    """Return a message if a record contradicts its own recipe, or has a recipe that is unknown."""
    try:
        recipe_of(record)
    except FimaqError:
        return "the record's recipe is not one of this version"
    problem = next(contradictions(record), None)
    return f"the record contradicts itself: {problem}" if problem else None


def _export(record: ResultRecord) -> str | None:
    if record.exported is None:
        return None
    return "measured on an export to ONNX; published numbers are of simulated quantization"


def _other_recipe(record: ResultRecord, published: Mapping[str, object]) -> str | None:
    if record.method not in METHODS:
        return f"the method '{record.method}' and its released settings are not known here"
    changes = changes_of(record)
    listed = ", ".join(f"{name} {value}" for name, value in changes.items()) or "none"
    same = changes == published
    return None if same else f"settings changed from the released ones: {listed}"


def _other_calibration(record: ResultRecord, names: Names) -> str | None:
    own, recipe = record.calibration, recipe_of(record)
    if own is None or recipe is None:
        return "the record has no calibration images"
    if own.listed:
        return "the user listed the calibration images (--calibration-list)"
    if own.split is None:
        return (
            "the record does not say where its calibration images come from, as it is of an older "
            "version: measure the cell again"
        )
    place = (own.dataset, own.split)
    wanted = names.published_on(record.task, record.dataset.name)[0][2].calibration
    if place != (wanted.name, wanted.split):
        return (
            f"calibrated on {own.dataset} (part {own.split}); published numbers use "
            f"{wanted.name} (part {wanted.split})"
        )
    for name, mine, said in (
        ("images", len(set(own.ids)), recipe.calibration_images),
        ("transform", own.transform, recipe.calibration_transform),
    ):
        if mine != said:
            return f"calibration {name} {mine}, but the recipe says {said}"
    return None


def _other_full_precision(record: ResultRecord, metric: str) -> str | None:
    """Return the reason why a model is not the published one, by its score in full precision."""
    published = _full_precision(record.task, record.dataset.name, record.model, metric)
    if not published:
        return None
    if metric not in record.fp_metrics:
        return f"the record lacks {metric} in full precision, which would show the right weights"
    mine = record.fp_metrics[metric].value
    value = min(published, key=lambda value: abs(value - mine))
    if abs(value - mine) <= FULL_PRECISION_MARGIN:
        return None
    return (
        f"full precision has {metric} {mine:.2f} here and {value:.2f} where it is published, more "
        f"than {FULL_PRECISION_MARGIN:g} point apart: other weights, images or preprocessing"
    )


@cache
def _full_precision(task: str, dataset: str, model: str, metric: str) -> list[float]:
    """Return the published scores of a model in full precision, with strong evidence if any."""
    names, rows = load_names(), published_rows()
    own = names.models_for(model)
    models = [name for name, entry in names.models.items() if entry in own]
    rows = rows[(rows["method"] == "FP") & (rows["variant"] == "") & rows["model"].isin(models)]
    found = pd.concat([
        rows[rows["task"].eq(theirs) & rows["dataset"].eq(name) & rows["metric"].isin(
            [published for published, mine in entry.metrics.items() if mine == metric]
        )]
        for theirs, name, entry in names.published_on(task, dataset)
    ])  # fmt: skip
    strong = found[found["evidence"].isin(STRONG)]
    return (found if strong.empty else strong)["value"].tolist()
