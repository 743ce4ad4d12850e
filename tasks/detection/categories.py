"""Classes of a detector and categories of annotations, matched by name."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from fimaq_core.errors import DataError, suggest
from tasks.common.data.class_names import by_name
from tasks.common.data.images import counted, named
from tasks.common.task import LoadedModel
from tasks.detection.annotations import Coco, Entry

#: Classes of COCO 2017.
COCO_CLASSES = 80
#: Where class names come from: weights or demo model, COCO 2017, or the annotations by position.
Origin = Literal["model", "published", "annotations"]
_NAMING = (
    " If the weights are of other classes, give them their names, in the order of the outputs: "
    'torch.save({"state_dict": sd, "meta": {"dataset_meta": {"classes": names}}}, "named.pth"), '
    "where sd are the weights and names is a tuple of strings."
)


class Matched(NamedTuple):
    """Annotations matched with a detector: ``labels`` are category ids of its classes."""

    coco: Coco
    labels: tuple[int | None, ...]
    origin: Origin
    notes: tuple[str, ...]


def match_categories(coco: Coco, loaded: LoadedModel, what: str) -> Matched:
    """Find the category of each class of a detector, in the annotations called ``what``.

    A detector without class names, but with 80 classes, has those of COCO 2017; otherwise they are
    the categories in order, if need be without unused ones. Raises DataError for unknown objects.
    """
    names, origin = _class_names(loaded)
    categories = coco["categories"]
    if names is None:
        used = {entry["category_id"] for entry in coco["annotations"]}
        kept = [entry for entry in categories if entry["id"] in used]
        if len(categories) == loaded.classes:
            kept = categories
        elif len(kept) != loaded.classes:
            raise DataError(
                f"{what} has {len(categories)} categories ({len(kept)} of them with annotations), "
                f"{loaded.tag} has {loaded.classes} classes, whose names its weights do not say: "
                f"use data or weights that fit.{_NAMING}"
            )
        notes = [
            f"The weights name no classes: the {loaded.classes} categories are taken for them in the file's order"
        ]
        unused = [entry for entry in categories if entry not in kept]
        if unused:
            notes.append(
                f"Categories without annotations are left out, since only then their number fits: {_listed(unused)}"
            )
        ids = tuple(entry["id"] for entry in kept)
        return Matched({**coco, "categories": kept}, ids, origin, tuple(notes))
    found = by_name(names, [entry["name"] for entry in categories])
    unknown = [entry for position, entry in enumerate(categories) if position not in found]
    _check_unused(unknown, coco, loaded, names, what, origin)
    labels: list[int | None] = [None] * len(names)
    for position, label in found.items():
        labels[label] = categories[position]["id"]
    kept = [entry for entry in categories if entry not in unknown]
    absent = [name for name, number in zip(names, labels, strict=True) if number is None]
    pairs = [(categories[position]["name"], names[label]) for position, label in found.items()]
    other = [(mine, theirs) for mine, theirs in pairs if mine != theirs]
    notes = []
    if origin == "published":
        notes.append("The weights name no classes: their outputs are taken for those of COCO 2017")
    if other:
        notes.append(
            f"{len(other)} categories match classes but for case, spaces and underscores, such as "
            f"{other[0][0]!r} for {other[0][1]!r}"
        )
    if unknown:
        notes.append(
            f"Categories without annotations that the detector does not know are left out: {_listed(unknown)}"
        )
    if absent:
        notes.append(
            f"{what} has no category for {len(absent)} of {len(names)} classes, such as "
            f"{absent[0]!r}: AP is over the other {len(names) - len(absent)}, and detections of these "
            "classes do not count"
        )
    return Matched({**coco, "categories": kept}, tuple(labels), origin, tuple(notes))


def _class_names(loaded: LoadedModel) -> tuple[Sequence[str] | None, Origin]:
    # As mmdet keeps a model's class names.
    known = (getattr(loaded.model, "dataset_meta", None) or {}).get("classes")
    if known is not None:
        return known, "model"
    if loaded.data is None and loaded.classes == COCO_CLASSES:
        from tasks.detection import mm

        return mm.CocoDataset.METAINFO["classes"], "published"
    return None, "annotations"


def _check_unused(
    unknown: Sequence[Entry],
    coco: Coco,
    loaded: LoadedModel,
    names: Sequence[str],
    what: str,
    origin: Origin,
) -> None:
    """Refuse objects of categories that the detector does not know: it can find none of them."""
    counts = Counter(entry["category_id"] for entry in coco["annotations"])
    used = [entry for entry in unknown if counts[entry["id"]]]
    assumed = naming = ""
    if origin == "published":
        assumed = ", whose weights name none, so that those of COCO 2017 are assumed"
        naming = _NAMING
    if used:
        total = sum(counts[entry["id"]] for entry in used)
        raise DataError(
            f"{what} has {counted(total, 'annotation')} of categories that are no class of {loaded.tag}{assumed}: "
            f"{_listed(used)}. Use weights that know them, or leave these annotations out."
            f"{suggest(used[0]['name'], names)}{naming}"
        )
    if len(unknown) == len(coco["categories"]):
        raise DataError(
            f"{what} has no category that is a class of {loaded.tag}{assumed}: {_listed(unknown)}. "
            f"Use data or weights that fit.{naming}"
        )


def _listed(entries: Sequence[Entry]) -> str:
    return named([repr(entry["name"]) for entry in entries])
