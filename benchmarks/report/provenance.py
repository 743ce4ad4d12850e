"""Where every number is from: what the records of a group say, once where seeds agree."""

from collections.abc import Callable, Sequence

from benchmarks.compare.published import changed_settings
from benchmarks.report.gather import Gathered
from benchmarks.report.groups import Group
from benchmarks.report.views import Fact, Origin
from benchmarks.results.scores import Measured, sample_counts, unique
from benchmarks.units import duration, size_text
from fimaq_core.errors import FimaqError
from tasks.common.record import ResultRecord, recipe_of


def origin(group: Group, metric: str, gathered: Gathered) -> Origin:
    """The provenance of ``group``, whose tables show ``metric``."""
    cell, records = group.cell, [item.record for item in group.items]
    score = group.score(metric)
    return Origin(
        id=group.id,
        title=f"{cell.subject} {group.method}" + ("" if cell.bits == "fp" else f" {cell.bits}"),
        score="" if score is None else f"{metric} {score.text}",
        subject=cell.subject,
        model=cell.model,
        method=group.method,
        bits=cell.bits,
        seeds=["value" if record.seed is None else f"seed {record.seed}" for record in records],
        metrics=[_metric_row(group, name) for name in unique(name for record in records for name in record.metrics)],
        facts=_facts(group.items, gathered),
        recipe=_recipes(records),
        notes=unique(f"{_of(record, records)}{note}" for record in records for note in record.notes),
    )


def _metric_row(group: Group, name: str) -> tuple[str, str, Sequence[str]]:
    score = group.score(name)
    found = [item.record.metrics.get(name) for item in group.items]
    values = ["–" if metric is None else f"{metric.value:.4f} ± {metric.stderr:.4f}" for metric in found]
    return name, "" if score is None else score.text, values


def _of(record: ResultRecord, records: Sequence[ResultRecord]) -> str:
    return f"seed {record.seed}: " if len(records) > 1 else ""


def _facts(items: Sequence[Measured], gathered: Gathered) -> list[tuple[str, list[Fact]]]:
    records = [item.record for item in items]

    def fact(name: str, of: Callable[[ResultRecord], object], code: bool = False) -> Fact:
        return Fact(name, [str(of(record)) for record in records], code)

    paths = ["–" if item.folder is None else gathered.relative(item.folder / "result.json") for item in items]
    parts = [
        ("Record", [
            Fact("file", paths, code=True),
            fact("finished", lambda r: r.finished),
            fact("fingerprint", lambda r: r.fingerprint or "none: written before records had one", code=True),
            fact("variant", lambda r: r.variant),
            fact("changed settings", _changes),
            fact("recipe digest", lambda r: r.recipe_digest or "–", code=True),
        ]),
        ("Weights", [
            fact("tag", lambda r: r.weights.tag),
            fact("source", lambda r: r.weights.source),
            fact("sha256", lambda r: r.weights.sha256, code=True),
        ]),
        ("Data", [
            fact("data set", lambda r: f"{r.dataset.name}, {r.dataset.split}"),
            fact("samples", lambda r: sample_counts(r.n, r.dataset.captions)),
            fact("classes", lambda r: r.dataset.classes or "–"),
            fact("fingerprint", lambda r: r.dataset.fingerprint, code=True),
            fact("damaged images left out", lambda r: len(r.skipped_images)),
        ]),
        ("Calibration", [
            fact("images", lambda r: "none" if r.calibration is None else len(r.calibration.ids)),
            fact("transform", lambda r: "–" if r.calibration is None else r.calibration.transform),
            fact("fingerprint", lambda r: "–" if r.calibration is None else r.calibration.fingerprint, code=True),
        ]),
        ("Run", [
            fact("wall time", _seconds),
            fact("peak memory", lambda r: size_text(r.peak_memory_bytes)),
            fact("device", lambda r: f"{r.environment.device}, {r.environment.threads} threads"),
            fact("step engine", lambda r: r.step_engine or "–"),
            fact("git revision", lambda r: r.environment.git_revision, code=True),
            fact("versions", lambda r: ", ".join(f"{name} {found}" for name, found in r.environment.versions.items())),
        ]),
    ]  # fmt: skip
    return parts


def _seconds(record: ResultRecord) -> str:
    stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in record.seconds.items())
    return f"{duration(sum(record.seconds.values()))} ({stages})"


def _changes(record: ResultRecord) -> str:
    """What is not the method's released setting and bears on the result, as far as this version knows the method."""
    try:
        recipe = recipe_of(record)
        changes = {} if recipe is None else changed_settings(recipe, record.task)
    except FimaqError:
        return "not known: this version does not have the recipe's method or settings"
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or "none"


def _recipes(records: Sequence[ResultRecord]) -> str:
    """All settings but the seed, a line each; of several recipes, one after the other."""
    texts = unique(
        "\n".join(f"{name}: {_plain(value)}" for name, value in record.recipe.items() if name != "seed")
        for record in records
        if record.recipe is not None
    )
    return "\n\n".join(texts)


def _plain(value: object) -> str:
    return "–" if value is None else "yes" if value is True else "no" if value is False else str(value)
