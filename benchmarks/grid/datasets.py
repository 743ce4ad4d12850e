"""Sections that evaluate the models of a grid on other data sets, or on corrupted images."""

from collections.abc import Iterator

from benchmarks.grid.schema import Grid, GridError, TaskGrid
from fimaq_core.errors import DataError
from tasks.common.data.elsewhere import (
    CORRUPTIONS,
    IMAGENET_C,
    SEVERITIES,
    read_corruption,
    read_dataset,
)

HELP = (
    "Also evaluate the ImageNet classifiers of the profile, as they were quantized, on these data "
    "sets (comma list of NAME=FOLDER, see --dataset of the task), and all its classifiers on "
    "corrupted images (NAME:SEVERITY). Without corruption or severity: all of them, such as "
    f"{IMAGENET_C}=FOLDER (75 data sets), or fog (5)."
)
#: Number of the corruptions of ImageNet-C, without those for validation.
_OFFICIAL = 15


def with_datasets(grid: Grid, text: str) -> Grid:
    """Return a grid with one more section per classifier section and data set in ``text``.

    Args:
        text: comma list as in :data:`HELP`; empty for none.

    Raises:
        GridError: an entry is unknown, or no section has models for it.
    """
    tasks, extra = dict(grid.tasks), list(grid.extra)
    for entry in dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))):
        homes = [
            name
            for name, part in grid.tasks.items()
            if grid.task_of(name) == "classification" and not (part.on or part.corrupt)
            if part.data == "imagenet" or _is_corruption(entry)
        ]
        if not homes:
            raise GridError(f"Profile '{grid.name}' has no classifiers for '{entry}'.")
        for home in homes:
            for name, on, corrupt in _whole(entry):
                section = f"{home}-{name}".replace(":", "-")
                tasks[section] = _elsewhere(grid, home, on, corrupt)
                extra += [
                    one.model_copy(update={"task": section})
                    for one in grid.extra
                    if one.task == home
                ]
    return grid.model_copy(update={"tasks": tasks, "extra": tuple(extra)})


def _elsewhere(grid: Grid, home: str, on: str | None, corrupt: str | None) -> TaskGrid:
    """Return the section ``home`` on other data; its name in records is the data set's."""
    part = grid.tasks[home]
    title = part.dataset if on is None else read_dataset(on).title
    own = {"on": on, "corrupt": corrupt, "home": home, "task": grid.task_of(home), "export": ()}
    title = title if corrupt is None else f"{title}, {corrupt}"
    return part.model_copy(update={**own, "dataset": title})


def _is_corruption(entry: str) -> bool:
    return entry.partition(":")[0] in CORRUPTIONS


def _whole(entry: str) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield name, data set and corruption of each data set of an entry. Raises GridError."""
    name, equals, folder = entry.partition("=")
    start, _, rest = name.partition(":")
    try:
        if _is_corruption(entry):
            for corrupt in _severities(name):
                yield corrupt, None, corrupt
        elif start == IMAGENET_C:
            for one in [rest] if rest else CORRUPTIONS[:_OFFICIAL]:
                for corrupt in _severities(one):
                    part = f"{IMAGENET_C}:{corrupt}"
                    yield part, f"{part}{equals}{folder}", None
        else:
            yield read_dataset(entry).name, entry, None
    except DataError as error:
        raise GridError(str(error)) from error


def _severities(name: str) -> list[str]:
    whole = [name] if ":" in name else [f"{name}:{severity}" for severity in SEVERITIES]
    for one in whole:
        read_corruption(one)
    return whole
