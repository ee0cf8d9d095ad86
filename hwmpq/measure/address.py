"""Where a store is: a file of this machine, or a PostgreSQL database. No password is ever shown."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, quote_plus

import platformdirs
import sqlalchemy as sa

from hwmpq.errors import InputError

#: What may be given, in words.
FORMS = "a file, or postgresql+psycopg://USER@HOST/DATABASE"
_POSTGRES = ("postgresql+psycopg", "postgresql", "postgres")
_SECRET = ("password", "sslpassword")
_MOUNTS = Path("/proc/self/mountinfo")
#: File systems that several machines share, or whose memory maps differ between two programs.
_NETWORK = frozenset(
    "9p afs beegfs ceph cifs coda gfs2 glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2 orangefs pvfs2 "
    "smb3 smbfs vboxsf virtiofs".split()
)
_LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.unionfs-fuse", "fuse.ext2", "fuse.ntfs-3g"})


@dataclass(frozen=True)
class Address:
    """A store's place. str and repr leave passwords out; url: with them, for connecting only."""

    url: sa.URL = field(repr=False)

    @staticmethod
    def of(where: str | Path | None = None) -> Address:
        """A file, a URL, or None: $HWMPQ_STORE, else the user's data folder.

        Raises InputError for a URL that cannot be read or names another kind of database.
        """
        text = str(where or os.environ.get("HWMPQ_STORE") or default_path())
        if "://" not in text:
            return Address(_file_url(text))
        kind = text.partition("://")[0]
        hidden = f"{kind}://***"
        step = "Percent-encode @ : / and % in the user and password, or use ~/.pgpass."
        try:
            url = sa.make_url(text)
        except (sa.exc.ArgumentError, ValueError):  # whose text may hold the password
            raise InputError("address of a store", hidden, FORMS, step) from None
        if kind.partition("+")[0] == "sqlite":
            if not url.database or url.database == ":memory:":
                raise InputError("address of a store", f"{text}, which is kept nowhere", FORMS)
            return Address(_file_url(url.database))
        if kind not in _POSTGRES:
            raise InputError("address of a store", hidden, FORMS)
        if "@" in (url.host or "") or not url.database:
            raise InputError("address of a store", hidden, FORMS, step)
        return Address(url.set(drivername=_POSTGRES[0]))

    @property
    def file(self) -> Path | None:
        """The file of a SQLite store, which need not exist; None for a server."""
        return Path(str(self.url.database)) if self.url.drivername == "sqlite" else None

    def __str__(self) -> str:
        if self.file is not None:
            return str(self.file)
        return self.url.difference_update_query(_SECRET).render_as_string(hide_password=True)

    def without_secrets(self, text: str) -> str:
        """The text with every password of this address replaced by ***."""
        given = [self.url.query.get(name, "") for name in _SECRET]
        found = {str(item) for item in (self.url.password or "", *given) if item}
        spelled = {
            form for secret in found for form in (secret, quote(secret, ""), quote_plus(secret))
        }
        for secret in sorted(spelled, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


def default_path() -> Path:
    """The store in the user's data folder."""
    return Path(platformdirs.user_data_dir("hwmpq")) / "store.sqlite"


def network_file_system(path: Path) -> str | None:
    """Kind of the network file system that the path lies on; None on a local one.

    SQLite's write-ahead log lives in shared memory: two machines, each with its own, damage the
    file. Source: sqlite.org/wal.html, section 1. Where the system tells no mounts: None.
    """
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    place = path.resolve()
    kind, depth = "", -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split(" ")[4].encode().decode("unicode_escape"))
        if place.is_relative_to(point) and len(point.parts) >= depth:  # the last mount hides others
            kind, depth = after.split(" ")[0], len(point.parts)
    foreign = kind in _NETWORK or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)
    return kind if foreign else None


def _file_url(path: str) -> sa.URL:
    return sa.URL.create("sqlite", database=str(Path(path).expanduser().absolute()))
