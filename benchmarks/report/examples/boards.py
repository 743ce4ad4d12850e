"""Boards: what methods predicted for the same samples, side by side, a board for each subject and bits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report.charts.shapes import COLOURS
from benchmarks.report.examples.drawings import drawing
from benchmarks.report.gather import Gathered, Problem, inside
from benchmarks.report.groups import Column, Group, columns_of, find
from benchmarks.report.views import Answer, Board, Drawing, ExampleRow
from benchmarks.results.scores import FULL, Measured
from fimaq_core.errors import CheckpointError, FimaqError
from tasks.common.examples import CaptionSample, ClassSample, ObjectSample, read_examples

#: Of a data set's fingerprint and a sample, the id of the picture on the page; None where there is none.
PictureId = Callable[[str, str], str]


Sample = ClassSample | CaptionSample | ObjectSample


@dataclass(frozen=True)
class Told:
    """The examples of a cell: by sample."""

    item: Measured
    samples: dict[str, Sample]


def read_all(groups: Sequence[Group], gathered: Gathered) -> dict[str, Told]:
    """The examples of each group's first seed that has some, by the group's id; files that cannot be read become problems."""
    found: dict[str, Told] = {}
    for group in groups:
        for item in group.items:
            name = item.record.examples
            if item.folder is None or name is None:
                continue
            try:
                samples = _read(item.folder, name)
            except FimaqError as error:
                message = str(error).replace(f"{gathered.results}/", "")
                gathered.problems.append(Problem(f"{gathered.relative(item.folder)}/{name}", message))
                continue
            found[group.id] = Told(item, {sample.sample: sample for sample in samples})
            break
    return found


def _read(folder: Path, name: str) -> Sequence[Sample]:
    """The samples in a file that lies in ``folder`` itself. Raises CheckpointError."""
    if inside(folder, name) is None:
        raise CheckpointError("It leads out of the record's own folder, so it is not read.")
    return read_examples(folder, name).samples


def make_boards(groups: Sequence[Group], told: Mapping[str, Told], picture: PictureId) -> list[Board]:
    """A board for every subject and bits where a quantized cell has examples: full precision first, then the methods."""
    colours = _class_colours(told)
    boards = []
    for column in columns_of([group.cell for group in groups]):
        here = find(groups, column)
        methods = [name for name, group in here.items() if group.id in told and (name == "fp" or group.cell.bits != FULL)]
        if any(name != "fp" for name in methods):
            boards.append(_board(column, methods, [told[here[name].id] for name in methods], picture, colours))
    return boards


def _class_colours(told: Mapping[str, Told]) -> dict[str, int]:
    """A colour for each class of objects, the same in all boards of a section."""
    samples = [sample for one in told.values() for sample in one.samples.values() if isinstance(sample, ObjectSample)]
    names = sorted({found.name for sample in samples for found in [*sample.truth, *sample.found]})
    return {name: index % COLOURS for index, name in enumerate(names)}


def _board(column: Column, methods: Sequence[str], told: Sequence[Told], picture: PictureId, colours: Mapping[str, int]) -> Board:
    fingerprint = told[0].item.record.dataset.fingerprint
    kinds = {type(sample).__name__ for one in told for sample in one.samples.values()}
    samples = dict.fromkeys(name for one in told for name in one.samples)
    rows, same = [], [0] * len(told)
    for name in samples:
        found = [one.samples.get(name) for one in told]
        first = next(sample for sample in found if sample is not None)
        cells = [None if sample is None or type(sample) is not type(first) else _cell(sample, colours) for sample in found]
        for index, cell in enumerate(cells):
            if isinstance(cell, Answer) and isinstance(cells[0], Answer) and cell.text == cells[0].text:
                same[index] += 1
        width, height = first.size if isinstance(first, ObjectSample) else (0, 0)
        rows.append(
            ExampleRow(name, picture(fingerprint, name), width, height, _truth(first), _truth_drawing(first, colours), cells)
        )
    full = "fp" in methods and methods[0] == "fp" and "ObjectSample" not in kinds
    agreement = ["" if index == 0 else f"{same[index]} of {len(rows)}" for index in range(len(methods))]
    return Board(column.subject, column.model, column.bits, _kind(kinds), methods, rows, agreement if full else ())


def _kind(kinds: set[str]) -> str:
    return "detection" if "ObjectSample" in kinds else "retrieval" if "CaptionSample" in kinds else "classification"


def _truth(sample: Sample) -> list[str]:
    if isinstance(sample, ClassSample):
        return [sample.truth]
    return list(sample.truth) if isinstance(sample, CaptionSample) else []


def _truth_drawing(sample: Sample, colours: Mapping[str, int]) -> Drawing | None:
    return drawing(sample, sample.truth, colours, "truth") if isinstance(sample, ObjectSample) else None


def _cell(sample: Sample, colours: Mapping[str, int]) -> Answer | Drawing | None:
    if isinstance(sample, ObjectSample):
        return drawing(sample, sample.found, colours, "found")
    if isinstance(sample, CaptionSample):
        if not sample.top:
            return None
        first, *others = sample.top
        rest = [f"{'right' if caption.correct else 'wrong'}: {caption.caption} ({caption.score:.2f})" for caption in others]
        return Answer(first.caption, f"{first.score:.2f}", first.correct, rest)
    if not sample.top:
        return None
    guess, *more = sample.top
    return Answer(guess.name, _percent(guess.share), guess.name == sample.truth, [f"{g.name} {_percent(g.share)}" for g in more])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
