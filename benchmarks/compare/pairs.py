"""Records of two runs, paired by the fields that they must share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from benchmarks.results.outcomes import CompareError
from benchmarks.results.scores import read_records, scope_of
from tasks.common.record import ResultRecord, bits_name, read_record

#: Fields that all pairs share (with full precision the first three), and fields that tell the
#: records of a pair apart where a side has several of them.
_NAMES, _CHOICES = ("task", "data", "model", "bits", "scope"), ("method", "variant")


@dataclass(frozen=True)
class RecordFile:
    """A record and its file."""

    record: ResultRecord
    path: Path

    @cached_property
    def fields(self) -> dict[str, str]:
        """Fields by which records are paired."""
        record, data, scope = self.record, self.record.dataset, scope_of(self.record)
        return {
            "task": record.task,
            "data": f"{data.name} {data.split} ({data.fingerprint[:12]})",
            "model": record.model,
            "bits": "full precision" if self.full else bits_name(record.w_bit, record.a_bit),
            "scope": scope,
            "method": record.method,
            "variant": record.variant.removesuffix(f" [{scope}]"),
            "seed": str(record.seed),
        }

    @property
    def full(self) -> bool:
        """True for full precision."""
        return self.record.method == "fp"

    @property
    def label(self) -> str:
        """Name in messages."""
        of = self.fields
        name = f"{of['task']} {_subject(of)} {of['method']}"
        return name if self.full else f"{name} ({of['variant']}) {of['bits']} seed {of['seed']}"


def _subject(fields: Mapping[str, str]) -> str:
    return fields["model"] + (f" [{fields['scope']}]" if fields["scope"] else "")


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its path, its records, and messages on unreadable ones."""

    path: Path
    files: Sequence[RecordFile]
    problems: Sequence[str] = ()

    @property
    def full(self) -> bool:
        """True if all records are of full precision."""
        return all(file.full for file in self.files)

    def by(self, names: Sequence[str]) -> dict[tuple[str, ...], RecordFile]:
        """Return the records by some fields. Raises CompareError where two of them are equal."""
        found: dict[tuple[str, ...], RecordFile] = {}
        for file in self.files:
            other = found.setdefault(tuple(file.fields[name] for name in names), file)
            if other is not file:
                raise CompareError(
                    f"{self.path} holds several records of {other.label}, such as "
                    f"{other.path.parent} and {file.path.parent}: give the folder of one of them."
                )
        return found


@dataclass(frozen=True)
class Pair:
    """Records of the same measurement of two methods, by seed; ``key`` has the shared fields."""

    key: Mapping[str, str]
    a: dict[int | None, RecordFile]
    b: dict[int | None, RecordFile]

    @property
    def label(self) -> str:
        """Name in tables: model, scope, bits, and the fields that tell it from other pairs."""
        own = [self.key[name] for name in _CHOICES if name in self.key]
        return " ".join([_subject(self.key), *own, self.key["bits"]])


def read_side(path: Path) -> Side:
    """Read the record at ``path`` (``result.json`` or its folder) or all records below it.

    Raises CompareError if there is none, CheckpointError if the one record cannot be read. Of
    several records, unreadable ones are left out and named.
    """
    single = path / "result.json" if (path / "result.json").is_file() else path
    if single.is_file():
        return Side(path, [RecordFile(read_record(single), single)])
    if not path.is_dir():
        give = "give a cell's folder, its result.json, or a folder that holds some"
        raise CompareError(f"There is no {path}: {give}.")
    records, problems = read_records(path)
    if not records:
        nothing = f"There is no record below {path} that can be read."
        raise CompareError(" ".join([nothing, *problems]))
    return Side(path, [RecordFile(record, file) for file, record in records], problems)


def pair_up(a: Side, b: Side) -> list[Pair]:
    """Pair the records of two sides.

    A side of full precision alone is paired with everything of the same model on the other side.
    Raises CompareError if nothing has a partner, or a record has several.
    """
    if a.full and not b.full:
        return [Pair(pair.key, pair.b, pair.a) for pair in pair_up(b, a)]
    beside_full = b.full and not a.full
    if beside_full:  # the folder of a model also holds its full precision
        paths = {file.path.resolve() for file in b.files}
        a = replace(a, files=[file for file in a.files if file.path.resolve() not in paths])
    choices = [
        name
        for name in _CHOICES
        if any(len({f.fields[name] for f in s.files if not f.full}) > 1 for s in (a, b))
    ]
    fields = (*_NAMES, *choices, "seed")
    names = _NAMES[:3] if beside_full else fields
    partners = b.by(names)
    pairs: dict[tuple[str, ...], Pair] = {}
    for key, file in a.by(fields).items():
        partner = partners.get(key[: len(names)])
        if partner is None:
            continue
        if file.path.resolve() == partner.path.resolve():
            give = "give two runs, such as the folders of two methods"
            raise CompareError(f"{file.path} is on both sides: {give}.")
        shared = dict(zip(fields[:-1], key, strict=False))
        pair = pairs.setdefault(key[:-1], Pair(shared, {}, {}))
        pair.a[file.record.seed], pair.b[file.record.seed] = file, partner
    if not pairs:
        raise CompareError(_nothing_common(a, b, names))
    return list(pairs.values())


def alone(side: Side, pairs: Sequence[Pair]) -> list[RecordFile]:
    """Return the records of a side that have no partner."""
    files = (file for pair in pairs for own in (pair.a, pair.b) for file in own.values())
    used = {file.path.resolve() for file in files}
    return [file for file in side.files if file.path.resolve() not in used]


def _nothing_common(a: Side, b: Side, names: Sequence[str]) -> str:
    apart = []
    for name in names:
        values = [sorted({file.fields[name] or "none" for file in side.files}) for side in (a, b)]
        if not set(values[0]) & set(values[1]):
            more = [f" and {len(found) - 4} more" if len(found) > 4 else "" for found in values]
            listed = [", ".join(found[:4]) + rest for found, rest in zip(values, more, strict=True)]
            apart.append(f"{name} ({'; '.join(listed)})")
    why = "no record of one side agrees with one of the other in all of them"
    why = f"these differ in {', '.join(apart)}" if apart else why
    return f"Nothing to compare: records are paired that share {', '.join(names)}, and {why}."
