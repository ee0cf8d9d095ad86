"""Times that come from elsewhere: a bundle for a machine out of reach, a table from a vendor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hwmpq.stages.bundle import make_bundle
from hwmpq.stages.imported import import_table
from hwmpq.stages.job import Options, Progress, Silent, open_job
from hwmpq.stages.menu import make_menu


def bundle_model(options: Options, path: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Compile every cell of a model into a bundle; nothing runs, and the target may be another."""
    job = open_job(options, progress or Silent(), here=False)
    with job.store:
        menu = make_menu(job.network, job.target, options.formats, options.pins)
        made = make_bundle(job, menu, path)
    return {"version": 1, "target": job.target.name, "file": str(path), **made}


def import_times(options: Options, path: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Keep a table of times for the target, as `stages.imported` explains."""
    job = open_job(options, progress or Silent(), here=False)
    with job.store:
        taken = import_table(job, path)
    return {"version": 1, "target": job.target.name, "file": str(path), **taken}
