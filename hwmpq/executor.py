"""Independent items mapped over workers: processes of this machine, or actors of a Ray cluster.

An item is a call of a public function of this package by name, dict in, dict out. Two words of it
name folders: "reads", a list of those that are the same for many items, and of which a worker may
keep what it made; "folder", where the item may leave files for the caller. Ray carries both;
processes share our disk. Items share nothing, and only the caller keeps results: a worker that is
lost costs time, as another one gets its item, and changes nothing else.

Ray pickles what its processes say to each other, so a cluster is to be trusted like this machine.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from hwmpq.errors import DeviceError, InputError, WorkerCrashed, WorkerFailed, WorkerTimeout

#: Workers that may crash over one item before that counts as the item's fault.
TRIES = 3
#: What --executor may be.
WORDS = ("serial", "processes", "processes:N", "ray", "ray://HOST:PORT")

Payload = Mapping[str, Any]
#: Answers a request {"op", "payload"} with {"result": ...} or {"failed": {type, text, trace}}.
Answer = Callable[[Payload, Callable[[Payload], None]], dict[str, Any]]


class Worker(Protocol):
    """Who takes calls, one at a time; `hwmpq.measure.WorkerProcess` is one."""

    def call(self, op: str, payload: Payload, deadline_s: float) -> dict[str, Any]:
        """Raises WorkerTimeout, WorkerCrashed, WorkerFailed."""
        ...

    def close(self) -> None: ...


#: Why an item has no answer.
Failure = WorkerTimeout | WorkerCrashed | WorkerFailed


class Pool:
    """Several workers. tries: workers that may crash over one item before that counts as the
    item's fault; end: what is to be ended with them."""

    def __init__(
        self, workers: Sequence[Worker], tries: int = TRIES, end: Callable[[], None] = lambda: None
    ):
        self.workers = tuple(workers)
        self._tries = tries
        self._end = end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self.workers:
            worker.close()
        self._end()

    def map(
        self, function: str, payloads: Sequence[Payload], deadline_s: float
    ) -> Iterator[tuple[int, dict[str, Any] | Failure]]:
        """(number of the payload, what `function` answered or why it did not), as they are done.

        function: 'hwmpq.module:name'. deadline_s: longest time of one item.
        """
        idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            idle.put(worker)
        unwanted = threading.Event()

        def one(payload: Payload, tries: int) -> dict[str, Any] | Failure:
            worker = idle.get()
            try:
                request = {"function": function, "payload": payload}
                return worker.call("call", request, deadline_s)
            except (WorkerTimeout, WorkerFailed) as error:
                return error
            except WorkerCrashed as error:
                if tries == 1 or unwanted.is_set():
                    return error
            finally:
                idle.put(worker)
            return one(payload, tries - 1)

        with ThreadPoolExecutor(len(self.workers)) as threads:
            items = {threads.submit(one, p, self._tries): i for i, p in enumerate(payloads)}
            try:
                for item in as_completed(items):
                    yield items[item], item.result()
            except BaseException:  # the caller left, or was interrupted: so does the work
                unwanted.set()
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in self.workers:
                    worker.close()
                raise


def check(word: str) -> None:
    """Raises InputError for a word of --executor that means nothing."""
    if not re.fullmatch(r"serial|processes(:[1-9]\d*)?|ray(://.+)?", word):
        raise InputError("--executor", repr(word), WORDS)


def open_pool(word: str, start: Callable[[], Worker], answer: Answer) -> Pool | None:
    """The workers that a word of --executor means; None for 'serial': the caller works itself.

    start: makes a process of this machine; answer: what a Ray actor does with a request. As many
    processes as this one may use cores where N is not given; one actor per CPU of the cluster.
    Raises InputError, DeviceError where the cluster cannot be reached.
    """
    check(word)
    kind, _, count = word.partition(":")
    if kind == "serial":
        return None
    if kind == "processes":
        return Pool([start() for _ in range(int(count or len(os.sched_getaffinity(0))))])
    return _ray_pool(word, answer)


def _ray_pool(word: str, answer: Answer) -> Pool:
    try:
        import ray
    except ImportError:
        raise InputError(
            "--executor ray", "Ray is not installed", next="Run: pip install 'hwmpq[ray]'"
        ) from None
    own = not ray.is_initialized()
    if own:
        try:
            # 'ray' alone: the cluster that RAY_ADDRESS or Ray's own file names, else one made here
            ray.init(
                None if word == "ray" else word,
                log_to_driver=False, logging_level="ERROR", include_dashboard=False,
            )  # fmt: skip
        except Exception as error:  # a node that does not start in time raises just that
            raise DeviceError(
                "cannot reach or start the Ray cluster",
                f"{word}: {error}",
                next="See `ray status`.",
            ) from None

    @cache
    def sent(folder: str) -> Any:
        """A folder's files in Ray's object store, once for all actors."""
        return ray.put(_packed(Path(folder)))

    count = max(int(ray.cluster_resources().get("CPU", 1)), 1)
    return Pool(
        [_RayWorker(ray, answer, sent) for _ in range(count)],
        end=ray.shutdown if own else lambda: None,
    )


class _RayWorker:
    """One actor on one CPU, started at the first call and again after it was lost."""

    def __init__(self, ray: Any, answer: Answer, sent: Callable[[str], Any]):
        self._ray, self._answer, self._sent = ray, answer, sent
        self._actor: Any = None

    def call(self, op: str, payload: Payload, deadline_s: float) -> dict[str, Any]:
        if self._actor is None:
            self._actor = self._ray.remote(num_cpus=1)(_Actor).remote(self._answer)
        given = payload["payload"]
        reads = {folder: [self._sent(folder)] for folder in given.get("reads", ())}
        try:
            ticket = self._actor.call.remote({"op": op, "payload": payload}, reads)
            reply, files = self._ray.get(ticket, timeout=deadline_s)
        except self._ray.exceptions.GetTimeoutError:
            self.close()
            raise WorkerTimeout(f"no answer to {op!r}", f"{deadline_s:g} s") from None
        except self._ray.exceptions.RayError as error:
            self.close()
            raise WorkerCrashed(type(error).__name__, str(error)) from None
        if "failed" in reply:
            failure = reply["failed"]
            raise WorkerFailed(op, failure["type"], failure["text"], failure["trace"])
        for name, content in files.items():
            path = Path(given["folder"]) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        result: dict[str, Any] = reply["result"]
        return result

    def close(self) -> None:
        if self._actor is not None:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(self._actor)
            self._actor = None


class _Actor:
    """Answers requests in a process of a Ray cluster, whose disk need not be ours."""

    def __init__(self, answer: Answer):
        self._answer = answer
        self._place = _folder_for_life()
        self._given: dict[str, str] = {}

    def call(
        self, request: dict[str, Any], reads: Mapping[str, list[Any]]
    ) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The answer, and the files that were left in the item's folder. reads: folder -> one
        reference to its files, which are fetched once."""
        given = dict(request["payload"]["payload"])
        if reads:
            given["reads"] = [self._folder(name, files) for name, [files] in reads.items()]
        here = tempfile.mkdtemp(dir=self._place)
        try:
            there = given.get("folder")
            given["folder"] = here
            item = {**request, "payload": {**request["payload"], "payload": given}}
            reply = self._answer(item, lambda _: None)
            if there is not None and "result" in reply:
                reply["result"] = _moved(reply["result"], here, there)
            return reply, {} if there is None else _packed(Path(here))
        finally:
            shutil.rmtree(here)

    def _folder(self, name: str, files: Any) -> str:
        import ray

        if name not in self._given:
            path = Path(tempfile.mkdtemp(dir=self._place))
            for file, content in ray.get(files).items():
                (path / file).write_bytes(content)
            self._given[name] = str(path)
        return self._given[name]


def _folder_for_life() -> str:
    """A folder that is removed when this process ends, even by SIGKILL.

    A shell waits for the end of a pipe that this process alone keeps open; it is in the background,
    no child of this one, as Ray kills the children of its actors with them.
    """
    folder = tempfile.mkdtemp(prefix="hwmpq-")
    command = ["sh", "-c", 'exec 3<&0; (cat <&3; rm -rf "$0") &', folder]
    quiet = subprocess.DEVNULL
    reads, _ = os.pipe()
    with os.fdopen(reads) as end:
        subprocess.run(
            command, stdin=end, stdout=quiet, stderr=quiet, start_new_session=True, check=True
        )
    return folder


def _packed(folder: Path) -> dict[str, bytes]:
    """Path below the folder -> content, of all files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _moved(result: Payload, here: str, there: str) -> dict[str, Any]:
    """The answer with paths in the actor's folder written as paths in the caller's."""
    return {
        key: there + value.removeprefix(here)
        if isinstance(value, str) and value.startswith(here)
        else value
        for key, value in result.items()
    }
