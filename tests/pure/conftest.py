"""A new store in each database. PostgreSQL, where it is installed, is started once per session."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hwmpq.measure.store import Store


def programs() -> Path | None:
    """The folder of initdb and pg_ctl; Debian keeps it off the PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    on_path = shutil.which("initdb")
    folders += [Path(on_path).resolve().parent] if on_path else []
    return next((folder for folder in folders if (folder / "pg_ctl").exists()), None)


@dataclass(frozen=True)
class Server:
    """A server on a socket in `folder`, without TCP."""

    folder: Path
    programs: Path

    def run(self, program: str, *arguments: str) -> None:
        """As an unprivileged user: PostgreSQL refuses to run as root."""
        other: dict[str, Any] = {}
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            other = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        command = [str(self.programs / program), *arguments]
        done = subprocess.run(
            command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, timeout=60, **other,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off"
        data, log = str(self.folder / "data"), str(self.folder / "log")
        # the log takes the server's stderr, which would keep ours open for ever
        self.run("pg_ctl", "-D", data, "-o", options, "-l", log, "-w", "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def database(self) -> str:
        """URL of a new, empty database."""
        name = f"t{uuid.uuid4().hex}"
        self.run("createdb", "-h", str(self.folder), "-U", "hwmpq", "-S", "file_copy", name)
        return f"postgresql+psycopg://hwmpq@/{name}?host={self.folder}"

    def drop(self, url: str) -> None:
        name = url.partition("@/")[2].partition("?")[0]
        self.run("dropdb", "-h", str(self.folder), "-U", "hwmpq", "--force", name)


@pytest.fixture(scope="session")
def new_server() -> Iterator[Callable[[], Server]]:
    """Starts a server; all are stopped at the end."""
    found = programs()
    started: list[Server] = []

    def start() -> Server:
        if found is None:
            pytest.skip("PostgreSQL (Debian's package postgresql) is not installed")
        pytest.importorskip("psycopg", reason="psycopg is not installed")
        folder = Path(tempfile.mkdtemp(prefix="hwmpq-pg-"))  # short: a socket's path is limited
        folder.chmod(0o777)
        server = Server(folder, found)
        started.append(server)
        data = str(folder / "data")
        server.run("initdb", "-D", data, "-U", "hwmpq", "-A", "trust", "-N", "--locale=C.UTF-8")
        server.start()
        return server

    yield start
    for server in started:
        if (server.folder / "data" / "postmaster.pid").exists():
            server.stop()
        shutil.rmtree(server.folder)


@pytest.fixture(scope="session")
def postgres(new_server: Callable[[], Server]) -> Server:
    """The server that the tests share; each takes a database of its own."""
    return new_server()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store.sqlite"


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, path: Path) -> Iterator[str]:
    """Address of a new store."""
    if request.param == "sqlite":
        yield str(path)
        return
    server = request.getfixturevalue("postgres")
    url = server.database()
    yield url
    server.drop(url)


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    with Store.open(place) as opened:
        yield opened
