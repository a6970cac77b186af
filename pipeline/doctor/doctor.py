"""The command `blip2 doctor`: one line per check, with a remedy for what is not ok."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pipeline.doctor.accelerator import check_device, check_speed, check_torch
from pipeline.doctor.machine import (
    check_memory,
    check_open_files,
    check_python,
    check_shared_memory,
    check_temporary_disk,
)
from pipeline.doctor.model import check_cache_disk, check_hub, check_model
from pipeline.doctor.packages import check_hidden_packages, check_image_formats, check_what_is_sent
from pipeline.doctor.ray_start import check_ray
from pipeline.doctor.stores import check_input, check_output
from pipeline.exit_status import ExitStatus, errors_to_exit_status
from pipeline.finding import Finding
from pipeline.progress import Console, write_json
from pipeline.run.hub_commit import is_on_hub
from pipeline.settings.doctor_settings import DoctorSettings


@errors_to_exit_status
def doctor(settings: DoctorSettings) -> int:
    """Print what each check has found; exit with 1 if one fails."""
    console = Console()
    findings = []
    for finding in examine(settings):
        findings.append(finding)
        if not settings.json:
            console.finding(finding)
    if settings.json:
        write_json(json.dumps([finding.to_dict() for finding in findings], indent=1))
    has_failed = any(finding.verdict == "fail" for finding in findings)
    return ExitStatus.FAILED if has_failed else ExitStatus.DONE


def examine(settings: DoctorSettings) -> Iterator[Finding]:
    """Yield the finding of each check."""
    yield check_python()
    yield check_memory()
    yield check_shared_memory()
    yield check_open_files()
    yield check_temporary_disk()
    yield check_torch()
    yield check_device()
    yield check_speed()
    yield check_ray()
    yield check_hidden_packages(Path.cwd())
    yield check_image_formats()
    needs_hub = settings.model is not None and is_on_hub(settings.model)
    yield check_hub(needs_hub)
    yield check_cache_disk(needs_hub)
    yield check_what_is_sent()
    if settings.model is not None:
        yield check_model(settings.model, settings.revision)
    if settings.input:
        yield check_input(settings.input)
    if settings.output is not None:
        yield check_output(settings.output)
