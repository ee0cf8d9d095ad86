"""What test files share: a worker process, which starts TVM once, and another machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from hwmpq.measure import WorkerProcess

#: What a machine that runs kernels has beside Python.
NEEDED = (
    "numpy", "numpy.libs", "tvm", "tvm_ffi", "apache_tvm.libs", "apache_tvm_ffi.libs",
    "typing_extensions.py",
)  # fmt: skip
#: As ssh and sshd: a shell in another session, folder and environment gets the words as one line;
#: what is said passes through here, and is cut off when this is killed.
SSH = """#!{python} -I
import os, subprocess, sys, threading

def pump(source, sink):
    while data := os.read(source, 65536):
        while data:
            data = data[os.write(sink, data):]
    os.close(sink)

line = " ".join(sys.argv[sys.argv.index("board") + 1:])
env = dict(PATH=os.environ["PATH"], HOME={home!r}, TMPDIR={home!r}, PYTHONPATH={site!r})
env["TVM_USE_RUNTIME_LIB"] = "1"
pipe = subprocess.PIPE
there = subprocess.Popen(
    ["sh", "-c", line], cwd={home!r}, env=env, stdin=pipe, stdout=pipe, start_new_session=True
)
threading.Thread(target=pump, args=(0, there.stdin.fileno()), daemon=True).start()
pump(there.stdout.fileno(), 1)
code = there.wait()
os._exit(code if code >= 0 else 128 - code)
"""


#: Rounds of one block, at most: enough for an interval, and no more.
ROUNDS = 8


class Shared:
    """Stands for the class WorkerProcess in a module of the pipeline; the worker stays, and times
    only briefly."""

    def __init__(self, worker: WorkerProcess):
        self.worker = worker

    def __call__(self, prefix: Any = (), *, threads: int = 1) -> Shared:
        assert threads == 1 and not prefix
        return self

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, op: str, payload: Mapping[str, Any], *rest: Any) -> dict[str, Any]:
        if op == "time":
            rounds = min(payload["rounds"], ROUNDS)
            payload = {**payload, "rounds": rounds, "best_of": 1}
        return self.worker.call(op, payload, *rest)


@pytest.fixture(scope="session")
def worker() -> Iterator[WorkerProcess]:
    with WorkerProcess(threads=1) as process:
        yield process


@pytest.fixture(scope="module")
def shared_worker(worker: WorkerProcess) -> Iterator[None]:
    """Runs of the pipeline in this process measure in the worker of the tests, every plan once."""
    from hwmpq import pipeline
    from hwmpq.methods import trials
    from hwmpq.side_jobs import frontier
    from hwmpq.stages import cells

    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline, cells, frontier):
            patch.setattr(module, "WorkerProcess", Shared(worker))
        patch.setattr(trials, "TIMED", 1)
        yield


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the other machine: its home, its packages in `site`; `ssh` leads there."""
    home = tmp_path_factory.mktemp("board")
    site = home / "site"
    site.mkdir()
    for folder in map(Path, sys.path):
        for name in NEEDED:
            if (folder / name).exists() and not (site / name).exists():
                (site / name).symlink_to(folder / name)
    ssh = home / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH.format(python=sys.executable, home=str(home), site=str(site)))
    ssh.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
        yield home
