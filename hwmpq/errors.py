"""Every error the program raises on purpose, and the exit code each one means.

    HwmpqError                       code            exit
    ├── InputError                   error            2   bad argument, file, model, data
    │   ├── UnknownName              error            2   with the nearest known names
    │   ├── UnsupportedModel         error            2   every operator it cannot take, at once
    │   └── UnsafeFile               error            2   needs unpickling, leaves its folder
    ├── InfeasibleError              infeasible       3   names the best possible plan
    ├── DeviceError                  device           7   device or store lost, worker died
    │   └── StoreError               device           7   unreadable, locked or newer store
    └── InternalError                internal        70   a promise of the program itself was broken

An error says what is wrong, what it got, what is allowed and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HwmpqError(Exception):
    """Base of all deliberate errors.

    what: the thing that is wrong; got: the offending value, or a list of lines that begins with a
    line break; allowed: what would be accepted; next: the next step for the user.
    """

    code = "error"
    exit_code = 2

    def __init__(self, what: str, got: object = None, allowed: object = None, next: str = ""):
        self.what = what
        self.got = got
        self.allowed = allowed
        self.next = next
        super().__init__(self._text())

    def _text(self) -> str:
        text, got = self.what, _named(self.got)
        is_list = got.startswith("\n")
        if self.got is not None:
            text += f":{got}" if is_list else f": got {got}"
        if self.allowed is not None:
            allowed = self.allowed
            if isinstance(allowed, (list, tuple, set, frozenset)):
                allowed = ", ".join(map(str, allowed))
            text += f"; allowed: {allowed}"
        if self.next:
            text += f"\n{self.next}" if is_list else f". {self.next}"
        return text

    def to_json(self) -> dict[str, object]:
        """The `error` object of the contract: code, what, got, allowed, next."""
        allowed = self.allowed
        if isinstance(allowed, (tuple, set, frozenset)):
            allowed = sorted(map(str, allowed))
        got = None if self.got is None else _named(self.got)
        return {
            "code": self.code,
            "what": self.what,
            "got": got,
            "allowed": allowed,
            "next": self.next,
        }


def _named(got: object) -> str:
    """A list of names with commas between them, anything else as it is."""
    if isinstance(got, (list, tuple)) and got and all(isinstance(name, str) for name in got):
        return ", ".join(got)
    return str(got)


def in_words(error: Exception) -> str:
    """What is wrong with a file by the error that reading it led to: an entry that is not there, or
    the error's text."""
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)


class InputError(HwmpqError):
    """A bad argument, file, model or data set."""


class UnknownName(InputError):
    """A name that nothing answers to; carries the nearest known names."""

    def __init__(self, kind: str, name: str, known: Iterable[str], next: str = ""):
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"Nearest: {', '.join(near)}." if near else ""
        super().__init__(
            f"unknown {kind}", repr(name), names, " ".join(x for x in (hint, next) if x)
        )
        self.nearest = near


class UnsupportedModel(InputError):
    """The model holds operators that cannot be taken; all of them are listed with their lines."""


class UnsafeFile(InputError):
    """A file that must not be opened: it would be unpickled, or reaches outside its folder."""


class InfeasibleError(HwmpqError):
    """No assignment meets the budgets; the message names the fastest or smallest possible plan."""

    code = "infeasible"
    exit_code = 3


class DeviceError(HwmpqError):
    """The device or its worker was lost."""

    code = "device"
    exit_code = 7


class WorkerTimeout(DeviceError):
    """The worker was silent for longer than the deadline and was killed."""


class WorkerCrashed(DeviceError):
    """The worker died, and the next call starts another. cause: name of the signal, or 'exit status
    N'."""

    def __init__(self, cause: str, stderr: str):
        super().__init__("worker crashed", cause, next=stderr)
        self.cause = cause


class WorkerFailed(DeviceError):
    """The op raised an exception; the worker lives. kind: the exception's type name."""

    def __init__(self, op: str, kind: str, text: str, trace: str):
        super().__init__(f"{op} failed in the worker", f"{kind}: {text}", next=trace)
        self.kind = kind
        self.text = text


class StoreError(DeviceError):
    """The store cannot be read or written, or was made by a newer version."""

    code = "store"


class InternalError(HwmpqError):
    """A promise of the program itself was broken: please report it."""

    code = "internal"
    exit_code = 70
