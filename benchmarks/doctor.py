"""``python -m benchmarks doctor``: what this machine can run, what is missing, what to do about it.

PyTorch may crash while it loads, so this module asks it in another process:
``python -m benchmarks.doctor`` prints what PyTorch finds as JSON.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

from benchmarks.cells import Adapter, Cell, Places, RunOptions
from benchmarks.costs import REFERENCE
from benchmarks.grid import GRIDS, Filters, expand, load_grid
from benchmarks.options import adapter, folder, places_options, profile_option, results_option
from benchmarks.preflight import weights_place
from benchmarks.units import size_text
from fimaq_core.errors import FimaqError
from tasks.common import registry
from tasks.common.machine import container_limits, processor
from tasks.common.record import ResultRecord, read_record
from tasks.common.request import Missing, describe_missing

LOCK = Path(__file__).resolve().parents[1] / "requirements" / "lock.txt"
SETUP = "make setup"
#: Free bytes below which a disk is worth a note.
LITTLE = 5e9
_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}
Records = Sequence[tuple[Path, ResultRecord]]


class Finding(NamedTuple):
    """Result of one check: ``note`` is worth knowing, ``problem`` prevents a run."""

    check: str
    state: Literal["ok", "note", "problem"]
    text: str
    fix: str = ""
    data: Mapping[str, Any] = {}


def guarded(check: str, examine: Callable[..., Iterable[Finding]], *given: Any) -> list[Finding]:
    """Return the findings of ``examine``; what it raises becomes a finding, after those before."""
    found: list[Finding] = []
    try:
        found.extend(examine(*given))
    except Exception as error:  # noqa: BLE001 a broken machine is what is examined
        text = f"{check} cannot be examined: {type(error).__name__}: {error}"
        found.append(Finding(check, "problem", text))
    return found


def unmet(requirements: Iterable[str]) -> list[str]:
    """Return the requirements that the installed packages do not meet."""
    from packaging.requirements import Requirement

    found = []
    for one in map(Requirement, requirements):
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            try:
                has = metadata.version(one.name)
            except metadata.PackageNotFoundError:
                has = None
            if not has or not one.specifier.contains(has, prereleases=True):
                found.append(f"{one.name} is {has or 'missing'}; wanted: {one.specifier or 'any'}")
    return found


def package_findings(lock: Path = LOCK) -> Iterator[Finding]:
    """Report Python, dependencies that are not met, and other differences from the lock file."""
    yield Finding("python", "ok", f"Python {platform.python_version()} ({sys.executable})")
    problems = unmet(["fimaq"]) or unmet(metadata.requires("fimaq") or ())
    yield from (Finding("package", "problem", text, SETUP) for text in problems)
    lines = lock.read_text(encoding="utf-8").splitlines() if lock.is_file() else []
    wanted = [line.partition(" #")[0] for line in lines if line[:1].isalnum()]
    others = unmet(wanted)
    text = f"{len(wanted) - len(others)} of {len(wanted)} packages are as in {lock.name}"
    if others:
        yield Finding("packages", "note", f"{text}: {', '.join(others)}", SETUP)
    else:
        yield Finding("packages", "ok", text)


def torch_facts() -> dict[str, Any]:
    """Return what PyTorch says of itself and of its devices."""
    import torch
    from torch.utils import collect_env as env

    driver = env.get_nvidia_driver_version(env.run)  # type: ignore[no-untyped-call]
    devices = []
    for index in range(torch.cuda.device_count()):
        found, error, free = torch.cuda.get_device_properties(index), "", 0
        try:
            torch.ones(1, device=f"cuda:{index}").add_(1).item()
            free = torch.cuda.mem_get_info(index)[0]
        except RuntimeError as problem:  # no kernels for it, no free memory, or in use by others
            error = str(problem).splitlines()[0]
        about = {"name": found.name, "memory": found.total_memory, "free": free, "error": error}
        devices.append({**about, "capability": f"{found.major}.{found.minor}"})
    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "devices": devices,
        "driver": driver,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def ask_torch(seconds: float = 180.0) -> tuple[dict[str, Any] | None, str]:
    """Return :func:`torch_facts` of another process, and why there are none."""
    command = [sys.executable, "-m", "benchmarks.doctor"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {seconds:.0f} s"
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1])), ""
    lines = done.stderr.strip().splitlines()
    return None, lines[-1] if lines else f"its process ended with {done.returncode}"


def torch_findings(facts: Mapping[str, Any] | None, problem: str) -> Iterator[Finding]:
    """Report PyTorch, then its GPUs."""
    if facts is None:
        yield Finding("torch", "problem", f"PyTorch does not load: {problem}", SETUP)
        return
    build = f"built for CUDA {facts['cuda_build']}" if facts["cuda_build"] else "built without CUDA"
    yield Finding("torch", "ok", f"PyTorch {facts['version']}, {build}", data=facts)
    for index, gpu in enumerate(facts["devices"]):
        text = f"cuda:{index}: {gpu['name']}, {size_text(gpu['memory'])} "
        text += f"({size_text(gpu['free'])} free), capability {gpu['capability']}"
        text += f", driver {facts['driver']}"
        if gpu["error"]:
            fix = "end other programs on it, or install a PyTorch that is built for it"
            text += f"; PyTorch cannot use it: {gpu['error']}"
            yield Finding("gpu", "note", text, fix, gpu)
        else:
            yield Finding("gpu", "ok", text, data=gpu)
    if not facts["devices"] and facts["driver"]:
        text = f"the driver {facts['driver']} is there, but PyTorch ({build}) sees no GPU"
        yield Finding("gpu", "note", text, "update the driver, or look at CUDA_VISIBLE_DEVICES")
    elif not facts["devices"]:
        yield Finding("gpu", "ok", "no CUDA device")


def machine_findings(level: str, limits: Mapping[str, float | None]) -> Iterator[Finding]:
    """Report processor (``level``: its vector instructions), memory and a container's limits."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    words = filter(None, [processor(), f"{cores} cores", level])
    yield Finding("cpu", "ok", ", ".join(words), data={"cores": cores})
    text = f"{size_text(memory.total)} of memory, {size_text(memory.available)} available"
    yield Finding("memory", "ok", text, data={"total": memory.total})
    share, count = limits["memory"] or memory.total, limits["cores"] or cores
    text = f"this container may use {size_text(share)} of memory and {count:g} cores"
    if share < memory.total or count < cores:
        fix = "give --jobs: not every library sees a container's limits"
        yield Finding("container", "note", text, fix, limits)
    else:
        yield Finding("container", "ok", text, data=limits)


def program_findings() -> Iterator[Finding]:
    """Look for programs that only parts of the project use."""
    compilers = (os.environ.get("CXX", ""), "g++", "clang++")
    browsers = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    for check, names, without, fix in (
        ("compiler", compilers, "on a CPU the engine 'fused' runs instead of 'compiled'",
         "install g++ or clang++"),
        ("ray", ("ray",), "grids run on this machine only", SETUP),
        ("browser", browsers, "tests of the report in a browser cannot run", "install chromium"),
    ):  # fmt: skip
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        found = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
        if found:
            yield Finding(check, "ok", f"{check}: {found}", data={"path": found})
        else:
            yield Finding(check, "note", f"no {check}: {without}", fix)


def disk_findings(results: Path) -> Iterator[Finding]:
    """Report the free space of each folder that runs write to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    temporary, hub = Path(tempfile.gettempdir()), Path(HF_HUB_CACHE)
    purposes = ("results", "temporary files", "weights from the hub")
    for purpose, path in zip(purposes, (results, temporary, hub), strict=True):
        free = shutil.disk_usage(_existing(path)).free
        text = f"{size_text(free)} free for {purpose} ({path})"
        if free < LITTLE:
            yield Finding("disk", "note", text, "free space there", {"free": free})
        else:
            yield Finding("disk", "ok", text, data={"free": free})


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def read_results(results: Path) -> tuple[list[tuple[Path, ResultRecord]], list[Finding]]:
    """Return the records with their files, and a finding per damaged one."""
    records: list[tuple[Path, ResultRecord]] = []
    damaged = []
    for path in sorted((results / "runs").rglob("result.json")):
        try:
            records.append((path, read_record(path)))
        except (FimaqError, OSError) as error:
            damaged.append(Finding("record", "note", str(error)))
    return records, damaged


def results_findings(results: Path, records: int, damaged: list[Finding]) -> Iterator[Finding]:
    """Report whether the results folder can be written, its records and its leases."""
    from tasks.common.lease import Observer

    place = _existing(results)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        text = f"the results folder {results} cannot be written: {error.strerror or error}"
        fix = f"make {place} a writable folder, or give another --results"
        yield Finding("results", "problem", text, fix)
        return
    words = "can be written" if results.is_dir() else "can be made"
    yield Finding("results", "ok", f"the results folder {results} {words}")
    yield Finding("records", "ok", f"{records} records can be read", data={"count": records})
    yield from damaged
    dead, observer = [], Observer()
    leases = sorted(results.rglob(".*.lease"))
    for path in (lease.with_name(lease.stem[1:]) for lease in leases):
        who = observer.holder(path)
        if who is None:
            dead.append(path)
        else:
            yield Finding("leases", "note", f"{path} is being made by {who}")
    if dead:
        text = f"{len(dead)} files were being made by processes that died: "
        fix = "run the same command again: what is finished is kept"
        yield Finding("leases", "note", text + ", ".join(map(str, dead[:5])), fix)
    elif not leases:
        yield Finding("leases", "ok", "nothing is being made, and nothing was interrupted")


def examine_profile(
    name: str,
    options: RunOptions,
    chosen: Adapter,
    records: Records = (),
    cuda: bool = False,
    memory: float | None = None,
) -> dict[str, Any]:
    """Examine a profile; whatever fails is a reason why it cannot run.

    Args:
        name: of the profile, or its file.
        options: results, data and weights.
        chosen: adapter whose preflight finds missing data and weights.
        records: measured here before.
        cuda: whether PyTorch sees a GPU.
        memory: bytes that may be used.

    Returns:
        ``name``, ``sections``, ``needs`` (memory and disk per model, the largest memory first),
        ``notes``, ``problem`` (empty for none) and ``can_run``.
    """
    sections: list[dict[str, Any]] = []
    needs: list[dict[str, Any]] = []
    notes, problem = [], ""
    try:
        grid = load_grid(name)
        cells = expand(grid, Filters(), options)
        for label in grid.tasks:
            sections.append(_section(label, [one for one in cells if one.section == label], chosen))
        needs = sorted(_needs(cells, records), key=lambda need: need["memory"], reverse=True)
        if grid.device == "auto" and not cuda:
            notes.append("no GPU is visible, and this profile takes very long without one")
        if grid.device.startswith("cuda") and not cuda:
            problem = f"its device is {grid.device}, and PyTorch sees no GPU"
        if needs and memory is not None and not cuda and needs[0]["memory"] > memory:
            notes.append(f"{needs[0]['text']}, and {size_text(memory)} may be used here")
    except FimaqError as error:
        problem = str(error)
    except Exception as error:  # noqa: BLE001 a broken package is a finding
        problem = f"it cannot be examined: {type(error).__name__}: {error}"
    can_run = not problem and not any(section["missing"] for section in sections)
    found = {"name": name, "sections": sections, "needs": needs, "notes": notes}
    return {**found, "problem": problem, "can_run": can_run}


def _section(label: str, cells: Sequence[Cell], chosen: Adapter) -> dict[str, Any]:
    """Return what is missing, commands that fetch it, and where the weights of each model are."""
    found: list[Missing] = []
    errors: list[str] = []
    fixes: list[str] = []
    weights: dict[str, str] = {}
    models = {cell.model: cell for cell in cells}
    for model, cell in models.items():
        try:
            lacking = chosen.preflight(cell.request)
        except FimaqError as error:
            errors.append(str(error))
            continue
        found += lacking
        place = weights_place(cell)
        weights[model] = place.repository or "here"
        if any(item.what.startswith("the weights") for item in lacking):
            weights[model] = "missing"
            fixes += [place.command] if place.command else []
    return {
        "name": label,
        "models": list(models),
        "cells": len({cell.key for cell in cells}),
        "missing": [*dict.fromkeys(errors), *(describe_missing(found) or "").splitlines()],
        "fixes": list(dict.fromkeys(fixes)),
        "weights": weights,
    }


def _needs(cells: Sequence[Cell], records: Records) -> Iterator[dict[str, Any]]:
    """Yield memory and disk of each model: from records, else from the committed measurements."""
    known = _committed()
    for cell in {(cell.task, cell.model): cell for cell in cells}.values():
        try:
            tag = registry.model_tag(cell.task, cell.request.model)
        except FimaqError:
            continue  # its weights are missing, which is said elsewhere
        names, disk = {(cell.task, tag), (cell.task, cell.model)}, None
        own = [(path, one) for path, one in records if (one.task, one.model) in names]
        if own:
            devices = ", ".join(dict.fromkeys(one.environment.device for _, one in own))
            memory, source = max(one.peak_memory_bytes for _, one in own), f"on {devices}"
            disk = max(_folder_size(path.parent) for path, _ in own)
        elif cell.model in known or tag.partition(".")[0] in known:
            memory, source = known.get(cell.model) or known[tag.partition(".")[0]]
        else:
            continue
        text = f"{cell.model} took {size_text(memory)} of memory"
        text += "" if disk is None else f", {size_text(disk)} of disk per cell"
        yield {"model": cell.model, "memory": memory, "disk": disk, "text": f"{text} ({source})"}


def _folder_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def _committed() -> dict[str, tuple[int, str]]:
    """Return peak bytes and source per model of the committed measurements."""
    speed, rehearsal = REFERENCE / "speed.json", REFERENCE / "rehearsal.json"
    found: dict[str, tuple[int, str]] = {}
    for row in json.loads(speed.read_text(encoding="utf-8")) if speed.is_file() else ():
        source = f"a block, {row['device']}; results/reference/speed.json"
        if row["peak_bytes"] is not None:
            found[row["model"]] = (row["peak_bytes"], source)
    rows = json.loads(rehearsal.read_text(encoding="utf-8"))["cells"] if rehearsal.is_file() else ()
    for row in sorted(rows, key=lambda row: int(row["peak_memory_bytes"])):
        source = f"estimated from a rehearsal on {row['device']}; results/reference/rehearsal.json"
        found[row["model"]] = (row["peak_memory_bytes"], source)
    return found


def examine(profile: str, options: RunOptions, chosen: Adapter) -> dict[str, Any]:
    """Run all checks and return what ``--json`` prints.

    Args:
        profile: asked for.
        options: results, data and weights.
        chosen: adapter whose preflight finds missing data and weights.
    """
    facts, problem = ask_torch()
    level, limits = (facts or {}).get("cpu_capability", ""), container_limits()
    records, damaged = read_results(options.results)
    torch = guarded("torch", torch_findings, facts, problem)
    machine = guarded("machine", machine_findings, level, limits)
    findings = {
        "python": guarded("packages", package_findings) + torch[:1],
        "devices": torch[1:] + machine + guarded("programs", program_findings),
        "disk": guarded("disk", disk_findings, options.results),
        "results": guarded("results", results_findings, options.results, len(records), damaged),
    }
    sizes = [one.data["total"] for one in machine if one.check == "memory"]
    memory = min([*sizes, *filter(None, [limits["memory"]])], default=None)
    cuda = bool(facts and facts["devices"])
    names = dict.fromkeys([profile, *sorted(path.stem for path in GRIDS.glob("*.yaml"))])
    profiles = [examine_profile(one, options, chosen, records, cuda, memory) for one in names]
    vital = [one.state for section in ("python", "results") for one in findings[section]]
    return {
        "schema": 1,
        "profile": profile,
        "can_run": profiles[0]["can_run"] and "problem" not in vital,
        "findings": {key: [one._asdict() for one in found] for key, found in findings.items()},
        "profiles": profiles,
    }


def lines(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines for people, each with its state (empty for headings)."""
    titles = ("Python and packages", "Devices and programs", "Disk", "Results")
    for title, found in zip(titles, report["findings"].values(), strict=True):
        yield "", title
        for one in found:
            yield from _entry(one["state"], one["text"], [f"fix: {one['fix']}"] * bool(one["fix"]))
    yield "", "Profiles"
    for place, profile in enumerate(report["profiles"]):
        state = "ok" if profile["can_run"] else "note" if place else "problem"
        yield from _entry(state, *_profile_text(profile, whole=place == 0))
    state, words = "ok", "can run."
    if not report["can_run"]:
        state, words = "problem", "cannot run: see what is marked PROBLEM."
    yield from (("", ""), (state, f"Profile {report['profile']} {words}"))


def _entry(state: str, text: str, details: Iterable[str]) -> Iterator[tuple[str, str]]:
    yield state, f"  {state.upper() if state == 'problem' else state:<8} {text}"
    yield from ((state, f"{' ' * 11}{detail}") for detail in details)


def _profile_text(profile: Mapping[str, Any], whole: bool) -> tuple[str, list[str]]:
    """Return the line about a profile, and details (``whole``: with all that is missing)."""
    name, sections = profile["name"], profile["sections"]
    if profile["problem"]:
        return f"{name}: cannot run: {profile['problem']}", []
    details: dict[str, list[str]] = {}
    text = f"{name}: can run ({sum(one['cells'] for one in sections)} cells)"
    blocked = [one["name"] for one in sections if one["missing"]]
    if blocked:
        rest = ",".join(one["name"] for one in sections if not one["missing"])
        text = f"{name}: cannot run: {', '.join(blocked)}"
        text += f"; can run: --tasks {rest}" if rest else ""
        text += "" if whole else f" (doctor --profile {name} says why)"
    for one in sections if whole else ():
        hub = sorted(set(one["weights"].values()) - {"here", "missing"})
        download = [f"To be downloaded by the run: weights of {', '.join(hub)}."] if hub else []
        for message in (*one["missing"], *download):
            details.setdefault(message, []).append(one["name"])
    shown = [f"{', '.join(names)}: {message}" for message, names in details.items()]
    fixes = dict.fromkeys(fix for one in sections if whole for fix in one["fixes"])
    shown += [f"fix: {fix}" for fix in fixes]
    if whole or profile["can_run"]:
        shown += [*profile["notes"], *(need["text"] for need in profile["needs"][:1])]
    return text, shown


@click.command()
@profile_option
@places_options
@click.option("--weights", default="", metavar="DIR", help="As for run.")
@results_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def doctor(profile: str, weights: str, results: Path, as_json: bool, **places: str) -> None:
    """Examine what this machine can run, and what is missing.

    Checks packages, devices, disks, data, weights and results. Nothing is run, downloaded or
    changed. Exit codes: 0 the profile can run, 1 it cannot.
    """
    data = Places(**{name: folder(text) for name, text in places.items()})
    report = examine(profile, RunOptions(results, data, folder(weights)), adapter())
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        for state, text in lines(report):
            click.echo(click.style(text, fg=_COLOURS.get(state), bold=not state))
    click.get_current_context().exit(0 if report["can_run"] else 1)


if __name__ == "__main__":
    print(json.dumps(torch_facts()))
