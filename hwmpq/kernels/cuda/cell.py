"""One kernel of a GPU as files that `hwmpq.measure` can time: machine code, and its launch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hwmpq.kernels.cuda import compiler, source
from hwmpq.launches import Launches
from hwmpq.targets import Target


def export(
    function: Any, target: Target, arrays: Sequence[NDArray[Any]], folder: Path
) -> dict[str, str]:
    """Write cell.cubin and cell.json. arrays: what the kernel is called on, the result last.

    Answers the fields of `measure.Cell` "library" and "launches". Raises InputError without NVRTC.
    """
    code = source.build({"main": function}, target)
    (kernel,) = source.kernels_of(code)
    numbers = tuple(range(len(arrays)))
    launch = source.launch(function, kernel, numbers)
    nbytes = tuple(array.nbytes for array in arrays)
    whole = Launches(str(target.tvm["arch"]), nbytes, numbers[:-1], (), numbers[-1:], (launch,))
    library, launches = folder / "cell.cubin", folder / "cell.json"
    library.write_bytes(compiler.compiled(code, target).cubin)
    launches.write_text(json.dumps(whole.to_json()))
    return {"library": str(library), "launches": str(launches)}
