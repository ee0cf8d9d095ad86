"""A bundle of cells that runs on a machine out of reach, its result, and tables of times."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwmpq import side_jobs
from hwmpq.errors import HwmpqError, InputError
from hwmpq.measure import runner
from hwmpq.measure.bundle import read_result
from hwmpq.measure.store import Store
from hwmpq.pipeline import Options
from hwmpq.stages import bundle, imported
from hwmpq.stages.job import Silent, open_job
from hwmpq.stages.latency import NOT_STORED, profile
from hwmpq.stages.menu import make_menu


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    store = tmp_path_factory.mktemp("store") / "s.sqlite"
    formats = ("fp32", "w8a8")
    return Options("test_bundle:net", target="x86-avx2", formats=formats, store=str(store))


def net() -> Any:
    """A network whose names must not travel."""
    import torch

    torch.manual_seed(0)
    layers = {"secretconv": torch.nn.Conv2d(1, 8, 3), "secretact": torch.nn.ReLU()}
    return torch.nn.Sequential(*layers.values(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4))


@pytest.fixture(scope="module")
def packed(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "out.tar.gz"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        made = side_jobs.bundle_model(replace(options, input_shape=(1, 1, 8, 8)), path)
    assert made["cells"] >= 4 and made["failures"] == {}
    return path


def unpacked(packed: Path, folder: Path) -> Path:
    with tarfile.open(packed) as tar:
        tar.extractall(folder, filter="data")
    return folder


def run_there(board: Path, folder: Path, *words: str, stop_after: int = 0) -> tuple[int, str]:
    """Run the bundle on the other machine; stop_after: kill it after so many lines."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(board / "site")}
    env |= {"TVM_USE_RUNTIME_LIB": "1", "TMPDIR": str(board), "HOME": str(board)}
    command = [str(Path(sys.executable).resolve()), str(folder / "runner.py"), *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=board
    ) as process:
        assert process.stdout is not None
        if stop_after:
            lines = [process.stdout.readline() for _ in range(stop_after)]
            process.kill()
            return process.wait(), "".join(lines)
        text = process.stdout.read()
    return process.returncode, text


@pytest.fixture(scope="module")
def result(board: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that was killed after its first block and started again."""
    folder = unpacked(packed, tmp_path_factory.mktemp("unpacked"))
    run_there(board, folder, stop_after=1)
    first = json.loads((folder / "result.json").read_text())["timings"]
    code, text = run_there(board, folder)
    assert code == 0, text
    last = json.loads((folder / "result.json").read_text())["timings"]
    assert 0 < len(first) < len(last)
    assert {key: last[key] for key in first} == first  # gone on, not begun again
    assert f"{len(last)} cells" in text and "block 1 " not in text
    return folder / "result.json"


def test_a_bundle_names_nobody(packed: Path) -> None:
    ours = ("secretconv", "test_bundle", "net", "0.weight", tempfile.gettempdir(), str(Path.home()))
    with tarfile.open(packed) as tar:
        for entry in tar:
            assert entry.isfile() and (entry.uid, entry.mtime, entry.uname) == (0, 0, "")
            file = tar.extractfile(entry)
            assert file is not None
            data = file.read()
            if not entry.name.startswith(("hwmpq/", "runner.py")):  # the program itself
                found = [word for word in ours if re.search(rb"\b%b\b" % word.encode(), data)]
                assert not found, entry.name
            if entry.name == "bundle.json":
                told = data.decode()
                assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", told)
                assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", told)


def test_a_result_is_what_local_timing_gives(
    result: Path, options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    options = replace(options, input_shape=(1, 1, 8, 8), store=str(tmp_path / "a.sqlite"))
    with Store.open(options.store) as store:
        taken = bundle.take_in(store, result)
        assert {o.name for o in store.origins()} == {taken.origin}
        rows = {row.measurement.key: row for row in store.rows()}
        assert {row.origin for row in rows.values()} == {taken.origin}
        assert all(row.measurement.samples_s for row in rows.values())
    job = open_job(options, Silent())
    with job.store:
        menu = make_menu(job.network, job.target, options.formats, ())
        facts = profile(job, menu, measure=False)
        assert facts.new_timings == 0 and not facts.unknown and facts.glue
        assert {m.key for m in facts.layers.values()} == set(rows)
        assert all(m.source == "measured" for m in facts.layers.values())
        job.store.remove_origin(taken.origin)
        assert set(profile(job, menu, measure=False).unknown.values()) == {NOT_STORED}


def damaged(result: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    value = json.loads(result.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return path


def first_time(value: float) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        next(iter(data["timings"].values()))["samples_s"][0] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (first_time(float("nan")), "not a finite number"),
        (first_time(float("inf")), "not a finite number"),
        (first_time(1e-12), "allowed: 1e-09 to 600 s"),
        (first_time(-1.0), "positive seconds"),
        (first_time(1e9), "allowed: 1e-09 to 600 s"),
        (lambda d: d["manifest"].update(target="other"), "not that of the bundle"),
        (lambda d: d.update(fingerprint="../../etc"), "fingerprint"),
        (lambda d: d.update(more=1), "unknown key"),
        (lambda d: d.update(timings={"x": {}}), "damaged result"),
    ],
)
def test_a_damaged_result_is_refused(
    result: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    path = damaged(result, tmp_path / "r.json", change)
    with Store.open(tmp_path / "s.sqlite") as store:
        with pytest.raises(InputError, match=words):
            bundle.take_in(store, path)
        assert store.rows() == []


def test_links_and_long_files_are_refused(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(result)
    with pytest.raises(HwmpqError, match="a link"):
        read_result(link)
    monkeypatch.setattr(runner, "LIMIT_BYTES", 100)
    with pytest.raises(InputError, match="too long"):
        read_result(result)


def test_a_bundle_checks_itself(packed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = unpacked(packed, tmp_path / "b")
    manifest = runner.open_bundle(folder)[0]
    library = folder / next(name for name in manifest["files"] if name.endswith("library.so"))
    data = library.read_bytes()
    library.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match="damaged file"):
        runner.open_bundle(folder)
    library.unlink()
    with pytest.raises(InputError, match="a file of"):
        runner.open_bundle(folder)
    outside = tmp_path / "outside.so"
    outside.write_bytes(data)
    library.symlink_to(outside)
    with pytest.raises(HwmpqError, match="leads out"):
        runner.open_bundle(folder)
    for name in ("../outside.so", "/etc/passwd", "cells/../../outside.so"):
        manifest["files"] = {name: [len(data), hashlib.sha256(data).hexdigest()]}
        (folder / "bundle.json").write_text(json.dumps(manifest))
        with pytest.raises(HwmpqError, match="leads out"):
            runner.open_bundle(folder)


def test_a_result_of_another_machine_is_not_gone_on_with(
    result: Path, board: Path, tmp_path: Path, packed: Path
) -> None:
    folder = unpacked(packed, tmp_path / "b")
    damaged(result, folder / "result.json", lambda d: d.update(fingerprint="other"))
    code, text = run_there(board, folder)
    assert code == 2 and "has another fingerprint" in text and "Name another result" in text


# tables


def table_of(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["workload,format,latency_s", *lines, ""]))
    return path


def test_an_imported_table_fills_what_was_not_measured(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    options = replace(options, input_shape=(1, 1, 8, 8), store=str(tmp_path / "a.sqlite"))
    job = open_job(options, Silent())
    with job.store:
        workloads = [layer.workload for layer in job.network.layers]
        assert [imported.workload_of(imported.text_of(w)) for w in workloads] == workloads
        lines = [f"{imported.text_of(w)},w8a8,{1e-5 * (i + 1)}" for i, w in enumerate(workloads)]
        taken = side_jobs.import_times(options, table_of(tmp_path / "t.csv", *lines))
        assert taken["rows"] == taken["matched"] == len(workloads)
        menu = make_menu(job.network, job.target, options.formats, ())
        before = profile(job, menu, measure=False)
        after = imported.fill_in(job, before)
        found = after.cell(workloads[1], "w8a8")
        assert before.layers == {} and found is not None
        assert (found.source, found.latency_s) == ("imported", 2e-5)
        assert after.cell(workloads[1], "fp32") is None
        assert job.store.measurements(source="measured") == []  # what training reads
        job.store.remove_origin(taken["origin"])
        assert imported.fill_in(job, before).layers == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("linear m=1 k=8 n=8 relu,w8a8,nan", "line 2"),
        ("linear m=1 k=8 n=8 relu,w8a8,-1", "line 2"),
        ("linear m=1 k=8 n=8 relu,w8a8,1e99", "line 2"),
        ("linear m=1 k=8 relu,w8a8,1e-5", "line 2"),
        ("softmax m=1 k=8,w8a8,1e-5", "line 2"),
        ("linear m=1 k=8 n=8 relu,int8,1e-5", "line 2: unknown format: got .int8"),
        ("linear m=1 k=8 n=8,w8a8,1e-5\nlinear m=1 k=8 n=8,w8a8,2e-5", "line 3.*second time"),
    ],
)
def test_bad_tables(line: str, words: str, tmp_path: Path) -> None:
    path = table_of(tmp_path / "t.csv", line)
    with pytest.raises(InputError, match=words):
        imported.read_table(path.read_bytes(), path, "x86-avx2")
