"""Classes of a detector and categories of annotations, matched by name."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from fimaq_core.errors import DataError, suggest
from tasks.common.data.class_names import by_name
from tasks.common.data.images import counted, named
from tasks.common.task import LoadedModel
from tasks.detection.annotations import Coco, Entry

#: Number of classes of COCO 2017.
COCO_CLASSES = 80
#: Source of class names: weights or demo model, COCO 2017, or the annotations by position.
Origin = Literal["model", "published", "annotations"]
_NAMING = (
    " If the weights are of other classes, give them their names, in the order of the outputs: "
    'torch.save({"state_dict": sd, "meta": {"dataset_meta": {"classes": names}}}, "named.pth"), '
    "where sd are the weights and names is a tuple of strings."
)


class Matched(NamedTuple):
    """Annotations matched with a detector, as fields of ``DetectionSource``."""

    coco: Coco  # without unused categories
    labels: tuple[int | None, ...]  # category id of each class; None for a class without a category
    classes_from: Origin
    notes: tuple[str, ...]


def match_categories(coco: Coco, loaded: LoadedModel, what: str) -> Matched:
    """Find the category of each class of a detector, in the annotations called ``what``.

    Classes and categories of the same name belong together. A detector of 80 classes without names
    has the names of COCO 2017. Any other detector without names has the categories in order as its
    classes; categories without annotations are left out if only then the numbers agree. Raises
    DataError.
    """
    # mmdet keeps a model's class names here.
    names = (getattr(loaded.model, "dataset_meta", None) or {}).get("classes")
    if names is not None:
        return _by_name(coco, loaded, what, names)
    if loaded.data is not None or loaded.classes != COCO_CLASSES:
        return _by_position(coco, loaded, what)
    from tasks.detection import mm

    return _by_name(coco, loaded, what, mm.CocoDataset.METAINFO["classes"], published=True)


def _by_position(coco: Coco, loaded: LoadedModel, what: str) -> Matched:
    categories, count = coco["categories"], loaded.classes
    used = {entry["category_id"] for entry in coco["annotations"]}
    kept = [entry for entry in categories if entry["id"] in used]
    if len(categories) == count:
        kept = categories
    elif len(kept) != count:
        raise DataError(
            f"{what} has {len(categories)} categories ({len(kept)} of them with annotations), "
            f"{loaded.tag} has {count} classes, which its weights do not name: use data or weights "
            f"that fit.{_NAMING}"
        )
    notes = [
        f"The weights name no classes: the {count} categories, in the file's order, are taken for "
        "them"
    ]
    unused = [] if kept is categories else [one for one in categories if one["id"] not in used]
    if unused:
        notes.append(
            "Categories without annotations are left out, since only then their number fits: "
            f"{_listed(unused)}"
        )
    ids = tuple(entry["id"] for entry in kept)
    return Matched({**coco, "categories": kept}, ids, "annotations", tuple(notes))


def _by_name(
    coco: Coco, loaded: LoadedModel, what: str, names: Sequence[str], published: bool = False
) -> Matched:
    """Match by class ``names``; ``published``: the weights have none, so COCO 2017's are used."""
    categories = coco["categories"]
    found = by_name(names, [entry["name"] for entry in categories])
    unknown = [entry for position, entry in enumerate(categories) if position not in found]
    assumed = naming = ""
    if published:
        assumed = ", whose weights name none, so that those of COCO 2017 are assumed"
        naming = _NAMING
    counts = Counter(entry["category_id"] for entry in coco["annotations"])
    used = [entry for entry in unknown if counts[entry["id"]]]
    if used:
        total = counted(sum(counts[entry["id"]] for entry in used), "annotation")
        raise DataError(
            f"{what} has {total} of categories that are no class of {loaded.tag}{assumed}: "
            f"{_listed(used)}. Use weights that know them, or leave these annotations out."
            f"{suggest(used[0]['name'], names)}{naming}"
        )
    if not found:
        raise DataError(
            f"{what} has no category that is a class of {loaded.tag}{assumed}: {_listed(unknown)}. "
            f"Use data or weights that fit.{naming}"
        )
    pairs = [(categories[position]["name"], names[label]) for position, label in found.items()]
    other = [(mine, theirs) for mine, theirs in pairs if mine != theirs]
    ids = {label: categories[position]["id"] for position, label in found.items()}
    absent = [name for label, name in enumerate(names) if label not in ids]
    notes = []
    if published:
        notes.append("The weights name no classes: their outputs are taken for those of COCO 2017")
    if other:
        notes.append(
            f"{len(other)} categories match classes but for case, spaces and underscores, such as "
            f"{other[0][0]!r} for {other[0][1]!r}"
        )
    if unknown:
        notes.append(
            "Categories without annotations that the detector does not know are left out: "
            f"{_listed(unknown)}"
        )
    if absent:
        notes.append(
            f"{what} has no category for {len(absent)} of {len(names)} classes, such as "
            f"{absent[0]!r}: AP is over the other {len(ids)}, and detections of these classes do "
            "not count"
        )
    kept = [entry for position, entry in enumerate(categories) if position in found]
    labels = tuple(ids.get(label) for label in range(len(names)))
    origin: Origin = "published" if published else "model"
    return Matched({**coco, "categories": kept}, labels, origin, tuple(notes))


def _listed(entries: Sequence[Entry]) -> str:
    return named([repr(entry["name"]) for entry in entries])
