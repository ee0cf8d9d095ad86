"""`target check` as a job: interrupted, with processes that end, told case by case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hwmpq import targets
from hwmpq.side_jobs import conformance as module
from hwmpq.side_jobs.conformance import check_target
from hwmpq.stages.job import Silent

HOST = targets.native().name


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path / "hwmpq"


class Interrupted(Silent):
    """Ctrl-C once some cases are done."""

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
        def advance(count: int) -> None:
            if count:
                raise KeyboardInterrupt

        yield advance


def test_an_interrupted_check_goes_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 2)
    with pytest.raises(KeyboardInterrupt):
        check_target(HOST, False, 4, Interrupted())
    (kept,) = cache.iterdir()
    kept.write_text(kept.read_text() + '[[5, "cut o')
    other = check_target(HOST, False, 1, Silent())
    assert other["resumed"] == 0 and kept.exists()
    found = check_target(HOST, False, 4, Silent())
    assert found["resumed"] == 2 and found["cases"] == 4 and found["failures"] == []
    assert sum(found["kernels"].values()) == 4
    assert not kept.exists()


def test_a_case_that_takes_too_long_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEADLINE_S", 0.001)
    found = check_target(HOST, False, 2, Silent())
    assert found["status"] == "accuracy"
    assert ["no answer" in f["wrong"] or "timed out" in f["wrong"] for f in found["failures"]] == [
        True, True
    ]  # fmt: skip
