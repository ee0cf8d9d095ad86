"""The float model that an artifact is compared with: in another runtime, at its batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from hwmpq.errors import UnknownName

if TYPE_CHECKING:
    from hwmpq.measure import Cell
    from hwmpq.peers.rival import Rival

Array = NDArray[Any]


@dataclass(frozen=True)
class Against:
    """runtime: one of `peers.NAMES`; model, weights: as for `load_model`."""

    runtime: str
    model: str
    weights: Path | None = None

    def opponents(
        self, manifest: Mapping[str, Any], sizes: Sequence[int], threads: int, folder: Path
    ) -> list[Opponent]:
        """One for each batch size; its files, where the runtime reads such, lie in the folder.

        Raises InputError, UnknownName."""
        from hwmpq.frontend.model import load_model
        from hwmpq.peers import NAMES, need
        from hwmpq.peers.rival import Rival, write_files

        if self.runtime not in NAMES:
            raise UnknownName("program for --against", self.runtime, NAMES)
        need(self.runtime)
        found = []
        for size in sizes:
            shape = (size, *manifest["inputs"][0]["shape"][1:])
            files: Mapping[str, Path] = {}
            if self.runtime != "torch":
                graph = load_model(self.model, self.weights, shape).graph()
                (folder / str(size)).mkdir()
                files = write_files(graph, folder / str(size))
            weights = None if self.weights is None else str(self.weights)
            rival = Rival(self.model, weights, shape, files)
            found.append(Opponent(self.runtime, rival, size, threads))
        return found


@dataclass(frozen=True)
class Opponent:
    """The float model in a runtime, for batches of a size."""

    runtime: str
    rival: Rival
    size: int
    threads: int

    def cell(self) -> Cell:
        """What times it. Raises InputError."""
        from hwmpq.measure import Cell

        function, settings = self.rival.program(self.runtime, threads=self.threads)
        key = f"{self.runtime}, batch {self.size}"
        return Cell(key, "program", function=function, settings=settings)

    def outputs(self) -> Callable[[Array], Array]:
        """Loads it: what gives its first output for any number of samples. Raises InputError."""
        from hwmpq.artifact.run import in_batches

        run = self.rival.outputs(self.runtime, self.threads)
        return lambda images: in_batches(run, [self.size], images)
