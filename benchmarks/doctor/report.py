"""All checks together, and what they print."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import Adapter, RunOptions
from benchmarks.doctor import devices, disks, packages, profiles
from benchmarks.doctor.findings import Finding, guarded
from benchmarks.doctor.profiles import Profile

#: Of the JSON.
SCHEMA = 1
#: Sections whose problems keep every profile from running.
_VITAL = ("python", "results")


@dataclass(frozen=True)
class Report:
    """Findings by section, and the profiles, the one asked for first."""

    findings: dict[str, list[Finding]]
    profiles: list[Profile]

    @property
    def can_run(self) -> bool:
        """Whether the profile asked for can."""
        vital = [finding for section in _VITAL for finding in self.findings[section]]
        return self.profiles[0].can_run and not any(finding.state == "problem" for finding in vital)


def examine(
    profile: str, options: RunOptions, adapter: Adapter, lock: Path = packages.LOCK, project: Path = packages.PROJECT
) -> Report:
    """Run all checks.

    Args:
        profile: asked for.
        options: results, data and weights.
        adapter: asked what is missing.
        lock, project: what is wanted of packages.
    """
    facts, problem = devices.torch_facts()
    findings = {
        "python": [
            *guarded("python", lambda: packages.python_findings(project)),
            *guarded("packages", lambda: packages.package_findings(lock, project)),
            *guarded("torch", lambda: (one for one in devices.torch_findings(facts, problem) if one.check == "torch")),
        ],
        "devices": [
            *guarded("gpu", lambda: (one for one in devices.torch_findings(facts, problem) if one.check != "torch")),
            *guarded("machine", lambda: devices.machine_findings(facts)),
            *guarded("programs", devices.program_findings),
        ],
        "disk": guarded("disk", lambda: disks.disk_findings(disks.places(options.results))),
    }  # fmt: skip
    records, damaged = disks.read_results(options.results)
    findings["results"] = guarded("results", lambda: disks.results_findings(options.results, len(records), damaged))
    usable = _usable_memory(findings["devices"])
    cuda = bool(facts and facts["cuda"])
    found = [profiles.examine(name, options, adapter, records, cuda, usable) for name in profiles.names(profile)]
    return Report(findings, found)


def _usable_memory(found: list[Finding]) -> float | None:
    values = [
        one.data.get(key) for one in found for check, key in (("memory", "total"), ("container", "memory")) if one.check == check
    ]
    return min((float(value) for value in values if value is not None), default=None)


def json_text(report: Report) -> str:
    """Return everything as JSON."""
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "profile": report.profiles[0].name,
        "can_run": report.can_run,
        "findings": {section: [asdict(finding) for finding in found] for section, found in report.findings.items()},
        "profiles": [{**asdict(profile), "can_run": profile.can_run} for profile in report.profiles],
    }
    return json.dumps(content, indent=1)


_TITLES = {"python": "Python and packages", "devices": "Devices and programs", "disk": "Disk", "results": "Results"}
_MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}
_INDENT = " " * 11


def lines(report: Report) -> list[tuple[str, str]]:
    """Return the report's lines with their states (empty: a heading)."""
    found: list[tuple[str, str]] = []
    for section, findings in report.findings.items():
        found.append(("", _TITLES[section]))
        for finding in findings:
            found += _entry(finding.state, finding.text, [finding.fix] if finding.fix else [])
    found.append(("", "Profiles"))
    for place, profile in enumerate(report.profiles):
        state = "ok" if profile.can_run else "problem" if place == 0 else "note"
        found += _profile_lines(profile, state, whole=place == 0)
    verdict = "can run" if report.can_run else "cannot run: see what is marked PROBLEM"
    found += [("", ""), ("ok" if report.can_run else "problem", f"Profile {report.profiles[0].name} {verdict}.")]
    return found


def _profile_lines(profile: Profile, state: str, whole: bool) -> list[tuple[str, str]]:
    """Lines on a profile; of one that was not asked for and cannot run only that."""
    if profile.problem:
        return _entry(state, f"{profile.name}: cannot run: {profile.problem}", [])
    if profile.can_run:
        found = _entry(state, f"{profile.name}: can run ({sum(section.cells for section in profile.sections)} cells)", [])
    else:
        blocked = [section.name for section in profile.sections if section.missing]
        rest = [section.name for section in profile.sections if not section.missing]
        part = f"; can run: --tasks {','.join(rest)}" if rest else ""
        more = "" if whole else f" (doctor --profile {profile.name} says why)"
        found = _entry(state, f"{profile.name}: cannot run: {', '.join(blocked)}{part}{more}", [])
    details: dict[str, list[str]] = {}
    for section in profile.sections if whole else ():
        for message in section.missing:
            details.setdefault(message, []).append(section.name)
        fetched = sorted({place for place in section.weights.values() if place not in ("here", "missing")})
        if fetched:
            details.setdefault(f"To be downloaded by the run: weights of {', '.join(fetched)}.", []).append(section.name)
    for message, names in details.items():
        several = f"{', '.join(names)}: " if len(profile.sections) > 1 else ""
        found.append((state, f"{_INDENT}{several}{message}"))
    fixes = dict.fromkeys(fix for section in profile.sections if whole for fix in section.fixes)
    found += [(state, f"{_INDENT}fix: {fix}") for fix in fixes]
    if whole or profile.can_run:
        found += [("note", f"{_INDENT}{note}") for note in profile.notes]
        most = max(profile.needs, key=lambda need: need.memory, default=None)
        found += [] if most is None else [(state, f"{_INDENT}{most.text}")]
    return found


def _entry(state: str, text: str, fixes: list[str]) -> list[tuple[str, str]]:
    return [(state, f"  {_MARKS[state]:<8} {text}"), *((state, f"{_INDENT}fix: {fix}") for fix in fixes)]
