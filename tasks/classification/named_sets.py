"""Data sets for ImageNet classifiers that are told by name: layout, checks and right answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageOps

from fimaq_core.errors import DataError
from tasks.common.data.class_names import WORDNET_ID
from tasks.common.data.class_order import NATURAL, TEXT
from tasks.common.data.elsewhere import IMAGENET_C, OBJECTNET, REAL, folder_of, read_dataset
from tasks.common.data.files import counted, named, parse_json, read_text
from tasks.common.data.folders import Source, class_folders, list_classes
from tasks.common.data.imagenet import wordnet_ids
from tasks.common.request import DataRequest
from tasks.common.task import LoadedModel

#: Pattern of the file names of ImageNet's part ``val``; ReaL labels are listed by their number.
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
#: Pixels of the red border that the authors of ObjectNet ask to cut off.
_BORDER = 2


@dataclass(frozen=True)
class Layout:
    """Facts that the folder of a data set must agree with."""

    classes: Sequence[str]  # names of the class folders by label
    images: int
    part: str = "."  # folder of the class folders
    order: str = TEXT  # name of the order of ``classes``
    each: int | None = None  # images per class; None: not equal
    others: bool = False  # True: the part has other class folders too
    within: str = ""  # text in the name of the data set's folder


def open_named(loaded: LoadedModel, data: DataRequest) -> Source:
    """Open the data set that ``data`` names.

    Sources: Recht et al. 2019 (V2), Hendrycks et al. 2021 (A), 2021 (R), Hendrycks and Dietterich
    2019 (C), Wang et al. 2019 (Sketch), Beyer et al. 2020 (ReaL), Barbu et al. 2019 (ObjectNet).
    As in the code of their authors, A and R compare only the outputs of their 200 classes; an
    answer for ReaL and ObjectNet is right if it is one of the image's classes, out of all 1,000.

    Raises DataError: the folder is not this data set, or the model is no ImageNet classifier.
    """
    found, folder = read_dataset(data.dataset or ""), folder_of(data)
    wnids, known = wordnet_ids(), loaded.class_names or ()
    if loaded.head is None and loaded.classes != len(wnids):
        raise DataError(
            f"{found.title} is for classifiers of ImageNet-1k, and {loaded.tag} has "
            f"{loaded.classes} classes: leave --dataset out."
        )
    if all(map(WORDNET_ID.fullmatch, known)) and known not in ((), wnids):
        raise DataError(
            f"{found.title} needs a model with the classes in ImageNet's order, and the class "
            f"names in the weights file of {loaded.tag} are in another order."
        )
    if found.name == OBJECTNET:
        return _objectnet(folder, found.title)
    subset = found.name.removeprefix("imagenet-")
    outputs = None
    if subset in ("a", "r"):
        classes = _of_timm(f"imagenet_{subset}_synsets.txt").split()
        layout = Layout(sorted(classes), 7_500 if subset == "a" else 30_000)
        outputs = [wnids.index(name) for name in layout.classes]
    elif subset.startswith("v2-"):
        numbers, variant = list(map(str, range(1000))), subset.removeprefix("v2-")
        layout = Layout(numbers, 10_000, order=NATURAL, each=10, within=variant)
    elif subset == "sketch":
        layout = Layout(wnids, 50_889)
    elif found.name == REAL:
        layout = Layout(wnids, 50_000, "val", each=50)
    else:
        part = found.name.removeprefix(f"{IMAGENET_C}:").replace(":", "/")
        layout = Layout(wnids, 50_000, part, each=50)
    source = checked(folder, layout, found.title)
    if found.name == REAL:
        source = with_real_labels(source, real_labels())
    elif layout.order == NATURAL:  # folders are labels, and people read names
        source = replace(source, class_names=wnids)
    return replace(source, outputs=outputs)


def checked(folder: Path, layout: Layout, title: str) -> Source:
    """Open ``folder`` as the data set ``title``. Raises DataError: it disagrees with ``layout``."""
    where = folder / layout.part

    def refuse(problem: str) -> DataError:
        return DataError(f"{where} is not {title}: {problem}. Give the folder of that data set.")

    if not where.is_dir():
        raise refuse("there is no such folder")
    if layout.within not in folder.resolve().name.lower():
        raise refuse(f"the name of the folder must have '{layout.within}' in it, as in the archive")
    there = set(class_folders(where))
    lacking = sorted(set(layout.classes) - there)
    surplus = [] if layout.others else sorted(there - set(layout.classes))
    for names, what in ((lacking, "it lacks"), (surplus, "it also has")):
        if names:
            raise refuse(f"{what} {counted(len(names), 'class folder')}, such as {names[0]!r}")
    source = list_classes(folder, layout.part, layout.classes, layout.order)
    counts = [0] * len(layout.classes)
    for label in source.targets:
        counts[label] += 1
    if len(source.ids) != layout.images:
        raise refuse(f"it has {counted(len(source.ids), 'image')}, and not {layout.images:,}")
    if layout.each is not None and set(counts) != {layout.each}:
        odd = next(label for label, count in enumerate(counts) if count != layout.each)
        has = f"has {counted(counts[odd], 'image')}, and not {layout.each}"
        raise refuse(f"the class folder {layout.classes[odd]!r} {has}")
    split = layout.part if layout.part == "val" else "test"
    return replace(source, name=title, split=split)


@cache
def real_labels() -> list[list[int]]:
    """Return the ReaL labels of each image of ImageNet's part ``val`` by number (timm's copy)."""
    labels: list[list[int]] = parse_json(_of_timm("imagenet_real_labels.json"), "ReaL labels")
    return labels


def with_real_labels(source: Source, labels: Sequence[list[int]]) -> Source:
    """Return the images of ImageNet's part ``val`` with other labels; those without are left out.

    ``labels`` are the right labels of ``ILSVRC2012_val_00000001`` and so on. Raises DataError: the
    files do not have these names.
    """
    matches = [_VAL_NAME.fullmatch(Path(name).stem) for name in source.ids]
    numbers = [int(match[1]) for match in matches if match is not None]
    if sorted(numbers) != list(range(1, len(labels) + 1)):
        raise DataError(
            "ReaL labels belong to the file names of ImageNet's part val, ILSVRC2012_val_00000001 "
            f"to ILSVRC2012_val_{len(labels):08d}, and the images of {source.name} have others, "
            f"such as {source.ids[0]}."
        )
    kept = [place for place, number in enumerate(numbers) if labels[number - 1]]
    answers = [labels[numbers[place] - 1] for place in kept]
    return replace(
        source,
        ids=[source.ids[place] for place in kept],
        targets=[own[0] for own in answers],
        read=lambda index: source.read(kept[index]),
        answers=answers,
        label_notes=[
            f"{counted(len(numbers) - len(kept), 'image')} without a ReaL label, left out"
        ],
    )


def _objectnet(folder: Path, title: str) -> Source:
    """Open the images of ObjectNet whose class is in ImageNet too, without their border."""
    classes = objectnet_classes(folder / "mappings")
    source = checked(folder, Layout(sorted(classes), 18_574, "images", others=True), title)
    answers = [classes[source.class_names[label]] for label in source.targets]

    def read(index: int) -> Image.Image:
        return ImageOps.crop(source.read(index), _BORDER)

    return replace(
        source,
        targets=[own[0] for own in answers],
        classes=len(wordnet_ids()),
        read=read,
        class_names=wordnet_ids(),
        answers=answers,
    )


def objectnet_classes(folder: Path) -> dict[str, list[int]]:
    """Return the ImageNet labels of each class folder of ObjectNet that has some.

    ``folder`` holds the mappings that come with ObjectNet. Raises DataError.
    """
    from timm.data import ImageNetInfo

    info, maps = ImageNetInfo("imagenet-1k"), []
    words = {info.index_to_description(label): label for label in range(len(wordnet_ids()))}
    for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"):
        content = parse_json(read_text(folder / name), str(folder / name))
        if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
            raise DataError(f"{folder / name} is no JSON object of texts.")
        maps.append(content)
    folders = {label: name for name, label in maps[0].items()}
    found = {label: text.split("; ") for label, text in maps[1].items()}
    lacking = [label for label in found if label not in folders]
    lacking += [word for own in found.values() for word in own if word not in words]
    if lacking or not found:
        unknown = named(lacking) or "no class"
        raise DataError(f"{folder} holds no mappings of ObjectNet to ImageNet: {unknown}.")
    return {folders[label]: [words[word] for word in own] for label, own in found.items()}


def _of_timm(name: str) -> str:
    return files("timm.data").joinpath("_info", name).read_text(encoding="utf-8")
