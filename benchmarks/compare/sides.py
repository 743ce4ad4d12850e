"""Records of two runs, paired by what they must share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.results.outcomes import CompareError
from benchmarks.results.scores import read_records
from tasks.common.record import ResultRecord, bits_name, read_record

#: Fields that all pairs share (with full precision the first three), and those that tell the
#: records of a pair apart where a side has several of them.
_NAMES, _CHOICES = ("task", "data", "model", "bits", "scope"), ("method", "variant")


@dataclass(frozen=True)
class Run:
    """A record and its file."""

    record: ResultRecord
    path: Path

    @cached_property
    def fields(self) -> dict[str, str]:
        """Fields by which records are paired."""
        record, data = self.record, self.record.dataset
        scope = str((record.recipe or {}).get("scope") or "")
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
        """Name for people."""
        of = self.fields
        name = f"{of['task']} {of['model']}{_mark(of)} {of['method']}"
        return name if self.full else f"{name} ({of['variant']}) {of['bits']} seed {of['seed']}"


def _mark(fields: Mapping[str, str]) -> str:
    return f" [{fields['scope']}]" if fields["scope"] else ""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its path, its records, and messages on unreadable ones."""

    path: Path
    runs: Sequence[Run]
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class Pair:
    """Records of the same measurement of two methods, by seed; ``key`` has the shared fields."""

    key: Mapping[str, str]
    a: dict[int | None, Run]
    b: dict[int | None, Run]

    @property
    def label(self) -> str:
        """Name for people: model, scope, bits, and what tells it from other pairs."""
        own = [self.key[name] for name in _CHOICES if name in self.key]
        return " ".join([f"{self.key['model']}{_mark(self.key)}", *own, self.key["bits"]])


@dataclass(frozen=True)
class Pairing:
    """Pairs of records of two sides, and the records without a partner."""

    first: Side
    second: Side
    pairs: Sequence[Pair]
    alone_a: Sequence[Run]
    alone_b: Sequence[Run]


def read_side(path: Path) -> Side:
    """Read the record at ``path`` (``result.json`` or its folder) or all records below it.

    Raises:
        CompareError: there is none.
        CheckpointError: the one record cannot be read. Of several those are left out and named.
    """
    single = path / "result.json" if (path / "result.json").is_file() else path
    if single.is_file():
        return Side(path, [Run(read_record(single), single)])
    if not path.is_dir():
        give = "give a cell's folder, its result.json, or a folder that holds some"
        raise CompareError(f"There is no {path}: {give}.")
    records, problems = read_records(path)
    if not records:
        nothing = f"There is no record below {path} that can be read."
        raise CompareError(" ".join([nothing, *problems]))
    return Side(path, [Run(record, file) for file, record in records], problems)


def pair_up(first: Side, second: Side) -> Pairing:
    """Pair the records of two sides; full precision alone is paired with all else of its model.

    Raises:
        CompareError: nothing has a partner, or something has several.
    """
    a, b = first.runs, second.runs
    full_a, full_b = (all(run.full for run in runs) for runs in (a, b))
    swap, beside_full = full_a and not full_b, full_a != full_b
    if beside_full:  # a model's folder holds its full precision too, which is no partner of itself
        paths = {run.path.resolve() for run in (a if swap else b)}
        rest = [run for run in (b if swap else a) if run.path.resolve() not in paths]
        a, b = (a, rest) if swap else (rest, b)
    choices = [
        name for name in _CHOICES for runs in (a, b)
        if len({run.fields[name] for run in runs if not run.full}) > 1
    ]  # fmt: skip
    fields = (*_NAMES, *dict.fromkeys(choices), "seed")
    names = _NAMES[:3] if beside_full else fields
    by_a = _by_fields(first, a, names if full_a else fields)
    by_b = _by_fields(second, b, names if full_b else fields)
    many, partners = (by_b, by_a) if swap else (by_a, by_b)
    pairs: dict[tuple[str, ...], Pair] = {}
    for key, run in many.items():
        if (partner := partners.get(key[: len(names)])) is None:
            continue
        if run.path.resolve() == partner.path.resolve():
            give = "give two runs, such as the folders of two methods"
            raise CompareError(f"{run.path} is on both sides: {give}.")
        pair = pairs.setdefault(
            key[:-1], Pair(dict(zip(fields[:-1], key[:-1], strict=True)), {}, {})
        )
        mine, other = (partner, run) if swap else (run, partner)
        pair.a[run.record.seed], pair.b[run.record.seed] = mine, other
    if not pairs:
        raise CompareError(_nothing_common(a, b, names))
    used = {run.path for pair in pairs.values() for run in (*pair.a.values(), *pair.b.values())}
    alone_a, alone_b = ([run for run in runs if run.path not in used] for runs in (a, b))
    return Pairing(first, second, list(pairs.values()), alone_a, alone_b)


def _by_fields(side: Side, runs: Sequence[Run], names: Sequence[str]) -> dict[tuple[str, ...], Run]:
    found: dict[tuple[str, ...], Run] = {}
    for run in runs:
        other = found.setdefault(tuple(run.fields[name] for name in names), run)
        if other is not run:
            raise CompareError(
                f"{side.path} holds several records of {other.label}, such as {other.path.parent} "
                f"and {run.path.parent}: give the folder of one of them."
            )
    return found


def _nothing_common(a: Sequence[Run], b: Sequence[Run], names: Sequence[str]) -> str:
    apart = []
    for name in names:
        values = [sorted({run.fields[name] or "none" for run in runs}) for runs in (a, b)]
        if not set(values[0]) & set(values[1]):
            more = [f" and {len(found) - 4} more" if len(found) > 4 else "" for found in values]
            listed = [", ".join(found[:4]) + rest for found, rest in zip(values, more, strict=True)]
            apart.append(f"{name} ({'; '.join(listed)})")
    why = "no record of one side agrees with one of the other in all of them"
    why = f"these differ in {', '.join(apart)}" if apart else why
    return f"Nothing to compare: records are paired that share {', '.join(names)}, and {why}."
