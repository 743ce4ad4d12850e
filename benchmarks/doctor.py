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
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import psutil  # type: ignore[import-untyped, unused-ignore]

from benchmarks.console import size_text
from benchmarks.costs.sources import REFERENCE, Costs, cost_row, other_rows
from benchmarks.grid import options as given
from benchmarks.grid.cell import Adapter, RunOptions, finished_record
from benchmarks.grid.expand import GRIDS, Filters, expand, load_grid
from benchmarks.grid.preflight import missing, weights_place
from fimaq_core.errors import FimaqError
from tasks.common.cell.machine import container_limits, processor
from tasks.common.record import read_record

LOCK = Path(__file__).resolve().parents[1] / "requirements" / "lock.txt"
SETUP = "make setup"
#: Free bytes below which a disk is worth a note.
LITTLE = 5e9
_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


class Finding(NamedTuple):
    """Result of one check: ``note`` is worth knowing, ``problem`` prevents a run."""

    state: Literal["ok", "note", "problem"]
    text: str
    fix: str = ""


def guarded(check: str, examine: Callable[..., Iterable[Finding]], *given: Any) -> list[Finding]:
    """Return the findings of ``examine``; what it raises becomes a finding, after those before."""
    found: list[Finding] = []
    try:
        found.extend(examine(*given))
    except Exception as error:  # noqa: BLE001 a broken machine is what is examined
        text = f"{check} cannot be examined: {type(error).__name__}: {error}"
        found.append(Finding("problem", text))
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
    yield Finding("ok", f"Python {platform.python_version()} ({sys.executable})")
    for text in unmet(["fimaq"]) or unmet(metadata.requires("fimaq") or ()):
        yield Finding("problem", text, SETUP)
    lines = lock.read_text(encoding="utf-8").splitlines() if lock.is_file() else []
    wanted = [line.partition(" #")[0] for line in lines if line[:1].isalnum()]
    others = unmet(wanted)
    text = f"{len(wanted) - len(others)} of {len(wanted)} packages are as in {lock.name}"
    more = f": {', '.join(others)}" if others else ""
    yield Finding("note" if others else "ok", text + more, SETUP if others else "")


def torch_findings() -> Iterator[Finding]:
    """Report PyTorch and its GPUs."""
    import torch
    from torch.utils import collect_env as env

    driver = env.get_nvidia_driver_version(env.run)  # type: ignore[no-untyped-call]
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    level = torch.backends.cpu.get_cpu_capability()
    yield Finding("ok", f"PyTorch {torch.__version__}, {build}, {level} on the CPU")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"cuda:{index}: {gpu.name}, {size_text(gpu.total_memory)}, "
        text += f"capability {gpu.major}.{gpu.minor}, driver {driver}"
        try:
            torch.ones(1, device=f"cuda:{index}").add_(1).item()
            free = torch.cuda.mem_get_info(index)[0]
            yield Finding("ok", f"{text}, {size_text(free)} free")
        except RuntimeError as error:  # no kernels for it, no free memory, or in use by others
            text += f"; PyTorch cannot use it: {str(error).splitlines()[0]}"
            fix = "end other programs on it, or install a PyTorch that is built for it"
            yield Finding("note", text, fix)
    if driver and not torch.cuda.device_count():
        text = f"the driver {driver} is there, but PyTorch ({build}) sees no GPU"
        yield Finding("note", text, "update the driver, or look at CUDA_VISIBLE_DEVICES")


def ask_torch(seconds: float = 180.0) -> list[Finding]:
    """Return :func:`torch_findings` of another process, or why there are none."""
    command = [sys.executable, "-m", "benchmarks.doctor"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        why = f"no answer within {seconds:.0f} s"
    else:
        if done.returncode == 0:
            return [Finding(*each) for each in json.loads(done.stdout.splitlines()[-1])]
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else f"its process ended with {done.returncode}"
    return [Finding("problem", f"PyTorch does not load: {why}", SETUP)]


def machine_findings(limits: Mapping[str, float | None]) -> Iterator[Finding]:
    """Report processor and memory, a container's limits, and programs that few parts use."""
    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    text = f"{size_text(memory.total)} of memory, {size_text(memory.available)} available"
    yield Finding("ok", f"{processor()}, {cores} cores, {text}")
    share, count = limits["memory"] or memory.total, limits["cores"] or cores
    if share < memory.total or count < cores:
        text = f"this container may use {size_text(share)} of memory and {count:g} cores"
        yield Finding("note", text, "give --jobs: not every library sees a container's limits")
    compilers = (os.environ.get("CXX", ""), "g++", "clang++")
    browsers = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for what, names, without, fix in (
        ("compiler", compilers, "on a CPU the engine 'fused' runs instead of 'compiled'",
         "install g++ or clang++"),
        ("ray", ("ray",), "grids run on this machine only", SETUP),
        ("browser", browsers, "tests of the report in a browser cannot run", "install chromium"),
    ):  # fmt: skip
        found = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
        if found:
            yield Finding("ok", f"{what}: {found}")
        else:
            yield Finding("note", f"no {what}: {without}", fix)


def disk_findings(results: Path) -> Iterator[Finding]:
    """Report the free space of each folder that runs write to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for purpose, path in (
        ("results", results),
        ("temporary files", Path(tempfile.gettempdir())),
        ("weights from the hub", Path(HF_HUB_CACHE)),
    ):
        free = shutil.disk_usage(_existing(path)).free
        text = f"{size_text(free)} free for {purpose} ({path})"
        yield Finding("note", text, "free space there") if free < LITTLE else Finding("ok", text)


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def results_findings(results: Path) -> Iterator[Finding]:
    """Report whether the results folder can be written, its records and its leases."""
    from tasks.common.cell.lease import Observer

    place = _existing(results)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        text = f"the results folder {results} cannot be written: {error.strerror or error}"
        fix = f"make {place} a writable folder, or give another --results"
        yield Finding("problem", text, fix)
        return
    words = "can be written" if results.is_dir() else "can be made"
    yield Finding("ok", f"the results folder {results} {words}")
    count = 0
    for path in sorted((results / "runs").rglob("result.json")):
        try:
            read_record(path)
            count += 1
        except (FimaqError, OSError) as error:
            yield Finding("note", str(error))
    yield Finding("ok", f"{count} records can be read")
    observer = Observer()
    for lease in sorted(results.rglob(".*.lease")):
        path = lease.with_name(lease.stem[1:])
        who = observer.holder(path)
        if who is None:
            text = f"{path} was being made by a process that died"
            yield Finding("note", text, "run the same command again: what is finished is kept")
        else:
            yield Finding("note", f"{path} is being made by {who}")


def profile_findings(
    name: str, options: RunOptions, chosen: Adapter, cuda: bool, memory: float | None = None
) -> Iterator[Finding]:
    """Report whether a profile can run, what is missing, and its largest memory.

    ``cuda``: whether PyTorch sees a GPU. ``memory``: bytes that may be used; None for a profile
    that the user did not ask for: of such a profile one note is enough.
    """
    bad: Literal["note", "problem"] = "note" if memory is None else "problem"
    try:
        grid = load_grid(name)
        cells = expand(grid, Filters(), options)
        each = {label: [cell for cell in cells if cell.section == label] for label in grid.tasks}
        lacking = {label: missing(mine, chosen) for label, mine in each.items()}
    except FimaqError as error:
        yield Finding(bad, f"{name}: cannot run: {error}")
        return
    except Exception as error:  # noqa: BLE001 a broken package is a finding
        text = f"{name}: cannot run: it cannot be examined: {type(error).__name__}: {error}"
        yield Finding(bad, text)
        return
    blocked = [label for label in lacking if lacking[label]]
    if blocked:
        rest = ",".join(label for label in lacking if label not in blocked)
        text = f"{name}: cannot run: {', '.join(blocked)}"
        text += f"; can run: --tasks {rest}" if rest else ""
        yield Finding(bad, text, "" if memory else f"doctor --profile {name} says why")
    elif grid.device.startswith("cuda") and not cuda:
        text = f"{name}: cannot run: its device is {grid.device}, and PyTorch sees no GPU"
        yield Finding(bad, text)
    else:
        yield Finding("ok", f"{name}: can run ({len(cells)} cells)")
    if memory is None:
        return
    messages = dict.fromkeys(message for found in lacking.values() for message in found)
    for message in messages:
        labels = ", ".join(label for label in lacking if message in lacking[label])
        yield Finding(bad, f"{labels}: {message}")
    for cell in {cell.model: cell for cell in cells}.values():
        found = lacking[cell.section]
        if not found or any("the weights" in message for message in found):
            command = weights_place(cell).command
            if command:
                yield Finding("note", f"the weights of {cell.model} are at a hub", command)
    if grid.device == "auto" and not cuda:
        yield Finding("note", "no GPU is visible, and this profile takes very long without one")
    records = ((cell, finished_record(cell, chosen)) for cell in cells)
    done = [(cell, cost_row(cell, record)) for cell, record in records if record is not None]
    costs = Costs(done, other_rows([grid.name], options.results, REFERENCE)[0], cells)
    known = [(cost.memory, cell.label, cost) for cell in cells if (cost := costs.of(cell))]
    most, label, cost = max(known, key=lambda one: one[0] or 0, default=(None, "", None))
    if most and cost:
        text = f"{label} takes {size_text(most)} of memory ({cost.memory_note or cost.origin})"
        little = most > memory and not cuda
        text += f", and {size_text(memory)} may be used here" if little else ""
        yield Finding("note" if little else "ok", text)


def examine(profile: str, options: RunOptions, chosen: Adapter) -> dict[str, Any]:
    """Run all checks on the machine and on all profiles; return what ``--json`` prints."""
    torch, limits = ask_torch(), container_limits()
    memory = limits["memory"] or psutil.virtual_memory().total
    cuda = any(one.text.startswith("cuda:") for one in torch)
    others = sorted({path.stem for path in GRIDS.glob("*.yaml")} - {profile})
    few = [one for name in others for one in profile_findings(name, options, chosen, cuda)]
    findings = {
        "Python and packages": guarded("packages", package_findings) + torch[:1],
        "Devices and programs": torch[1:] + guarded("machine", machine_findings, limits),
        "Disk": guarded("disk", disk_findings, options.results),
        "Results": guarded("results", results_findings, options.results),
        "Profile": guarded("profile", profile_findings, profile, options, chosen, cuda, memory),
        "Other profiles": few,
    }
    vital = [*findings["Python and packages"], *findings["Results"], *findings["Profile"]]
    return {
        "schema": 2,
        "profile": profile,
        "can_run": not any(one.state == "problem" for one in vital),
        "findings": {key: [one._asdict() for one in found] for key, found in findings.items()},
    }


def show(report: Mapping[str, Any]) -> None:
    """Print a report for people."""
    for title, found in report["findings"].items():
        click.secho(title, bold=True)
        for one in found:
            state = one["state"]
            mark = state.upper() if state == "problem" else state
            click.secho(f"  {mark:<8} {one['text']}", fg=_COLOURS[state])
            if one["fix"]:
                click.secho(f"{' ' * 11}fix: {one['fix']}", fg=_COLOURS[state])
    words = "can run." if report["can_run"] else "cannot run: see what is marked PROBLEM."
    colour = _COLOURS["ok" if report["can_run"] else "problem"]
    click.secho(f"\nProfile {report['profile']} {words}", fg=colour)


@click.command()
@given.profile_option
@given.places_options
@click.option("--weights", default="", metavar="DIR", help="As for run.")
@given.results_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def doctor(profile: str, weights: str, results: Path, as_json: bool, **texts: str) -> None:
    """Examine what this machine can run, and what is missing.

    Checks packages, devices, disks, data, weights and results. Nothing is run, downloaded or
    changed. Exit codes: 0 the profile can run, 1 it cannot.
    """
    options = RunOptions(results, given.places(texts), given.folder(weights))
    report = examine(profile, options, given.adapter())
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        show(report)
    click.get_current_context().exit(0 if report["can_run"] else 1)


if __name__ == "__main__":
    print(json.dumps(list(torch_findings())))
