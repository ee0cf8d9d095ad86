"""Using an artifact: run, verify, inspect. numpy and the TVM runtime are enough."""

from __future__ import annotations

import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq import toolchain
from hwmpq.cli.accuracy import Samples
from hwmpq.cli.output import VERSION, Answer
from hwmpq.errors import InputError, UnsafeFile
from hwmpq.report import words

Array = NDArray[Any]
#: Fewest golden samples, in %, with the same best class.
AGREEMENT = 99.5
#: Largest difference of an output, as a share of the largest golden output: floats are summed in
#: another order here, and a code behind them may fall on its neighbour.
_TOLERANCE = 0.05


def run_artifact(artifact: str, source: Path, output: Path) -> Answer:
    """Run on arrays from a file, write the outputs to a file."""
    if output.suffix not in (".npy", ".npz"):
        raise InputError("output file", output, "NAME.npy or NAME.npz")
    given = _read(source)
    loaded = _load(artifact)
    names = [entry["name"] for entry in loaded.manifest["outputs"]]
    if isinstance(given, dict):
        results = loaded.named(given)
    else:
        found = loaded(given)
        results = dict(zip(names, found if isinstance(found, list) else [found], strict=True))
    if output.suffix == ".npy" and len(results) > 1:
        raise InputError("an .npy file holds one output", ", ".join(results), "NAME.npz")
    try:
        if output.suffix == ".npy":
            np.save(output, results[names[0]], allow_pickle=False)
        else:
            np.savez(output, allow_pickle=False, **results)
    except OSError as error:
        raise InputError("cannot write the output", f"{output} ({error.strerror})") from None
    outputs = {k: {"shape": list(v.shape), "dtype": str(v.dtype)} for k, v in results.items()}
    told = ", ".join(f"{k} {v['dtype']} {v['shape']}" for k, v in outputs.items())
    return Answer({"version": VERSION, "output": str(output), "outputs": outputs},
                  f"{output}: {told}")  # fmt: skip


def verify_artifact(
    artifact: str, data: str | None = None, limit: int | None = None, emulated: bool = False
) -> Answer:
    """Replay the golden samples; with data also the accuracy. Exit code 5 if they differ."""
    from hwmpq.artifact import replay

    loaded = _load(artifact, emulated)
    found = replay(loaded)
    passed = found.exact or (
        found.top1_agreement >= AGREEMENT and found.max_abs <= _TOLERANCE * _largest(loaded)
    )
    told: dict[str, Any] = {
        "version": VERSION, "artifact": str(artifact), "status": "met" if passed else "accuracy",
        "parity": {
            "passed": passed, "exact": found.exact, "top1_agreement": found.top1_agreement,
            "max_abs": found.max_abs, "first_difference": found.first_difference or None,
            "samples": found.samples,
        },
    }  # fmt: skip
    lines = [
        f"{found.samples} golden samples: "
        + ("every bit is equal" if found.exact else f"largest difference {found.max_abs:.3g}")
    ]
    if found.first_difference:
        lines.append(f"first tensor that differs, if only in rounding: {found.first_difference}")
    lines.append("Verified." if passed else "NOT what was built: do not use this artifact.")
    if data is not None:
        samples = Samples.of(loaded.manifest, data, limit)
        accuracy = samples.accuracy(samples.classes(loaded.run_samples))
        told["accuracy"] = {**accuracy, "built_with": loaded.manifest.get("accuracy")}
        if accuracy["top1"] is None:
            lines.append(f"{accuracy['n']} samples ran; no labels, so no accuracy")
        else:
            lines.append(f"top-1 accuracy {accuracy['top1']:.2f} % of {accuracy['n']} samples")
    return Answer(told, "\n".join(lines), 0 if passed else 5)


def inspect_artifact(artifact: str) -> Answer:
    """What the manifest says; nothing native is loaded."""
    from hwmpq.artifact import read_manifest

    m = read_manifest(Path(artifact))
    head: dict[str, Any] = {
        key: m[key] for key in ("target", "threads", "versions", "inputs", "outputs") if key in m
    }
    lines = [
        f"artifact for {m['target']['name']}, {m.get('threads', 1)} thread(s), "
        + ", ".join(f"{k} {v}" for k, v in m.get("versions", {}).items())
    ]
    for kind in ("inputs", "outputs"):
        lines += [f"{kind[:-1]}: {e['name']} {e['dtype']} {e['shape']}" for e in m[kind]]
    if measured := words.part(m, "latency_s", "measured"):
        lines.append(f"measured when built: {words.seconds(measured)}")
    if words.part(m, "accuracy", "deployed") is not None:
        lines.append(
            f"{m['accuracy'].get('metric')} when built: "
            f"{words.percent(m['accuracy']['deployed'])}, of the float model "
            f"{words.percent(m['accuracy'].get('float'))}"
        )
    width = max(map(len, m["assignment"]), default=0)
    for layer, fmt in m["assignment"].items():
        kernel = m.get("kernels", {}).get(layer, {})
        how = f"{kernel.get('kernel', '')}  {kernel.get('execution', '')}"
        lines.append(f"  {layer:<{width}}  {fmt:<10}  {how}".rstrip())
    names = ("assignment", "kernels", "latency_s", "accuracy", "nbytes", "files")
    told = {"version": VERSION, "kind": m["kind"], **head, **{k: m[k] for k in names if k in m}}
    return Answer(told, "\n".join(lines))


def require(key: Path | None) -> None:
    """Take only artifacts signed with the key, here and in child processes."""
    from hwmpq.artifact import signature

    if key is not None:
        signature.require(key)


def make_keys(key: Path) -> Answer:
    """A new key pair: `key`, and beside it the public one."""
    from hwmpq.artifact import signature

    public = signature.keygen(key)
    text = f"{key}: to sign; keep it secret\n{public}: for --require-signature"
    return Answer({"version": VERSION, "private": str(key), "public": str(public)}, text)


def sign_artifact(artifact: str, key: Path) -> Answer:
    """Sign an artifact that is whole."""
    from hwmpq.artifact import sign

    place = sign(Path(artifact), key)
    return Answer({"version": VERSION, "signature": str(place)}, f"signed: {place}")


def is_artifact(path: str) -> bool:
    """Whether a command's MODEL|ARTIFACT names a folder."""
    return not re.match(r"zoo:", path) and Path(path).is_dir()


def runtime_only() -> None:
    """Let TVM load its small runtime library; without effect once TVM is loaded."""
    if "tvm" not in sys.modules:
        os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")


def _load(artifact: str, emulated: bool = False) -> Any:
    """emulated: one for a GPU, on this CPU."""
    runtime_only()
    from hwmpq.artifact import load

    machine = None
    if emulated:
        from hwmpq.kernels.cuda.emulate import Emulator

        machine = Emulator()
    try:
        with toolchain.without_torch():
            return load(artifact, machine=machine)
    except ImportError as error:
        raise InputError("the TVM runtime cannot be loaded", error, "apache-tvm",
                         "Run: pip install apache-tvm") from error  # fmt: skip


def _largest(loaded: Any) -> float:
    """The largest magnitude among the golden outputs."""
    arrays, _ = loaded.golden()
    outputs = [array for name, array in arrays.items() if ".output." in name]
    return max((float(np.abs(array).max(initial=0.0)) for array in outputs), default=0.0)


def _read(path: Path) -> Array | dict[str, Array]:
    """One array (.npy) or arrays by input name (.npz), none of them unpickled."""
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        return {name: found[name] for name in found.files}
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError("cannot read the input", f"{path} ({error})", ".npy or .npz") from None
    except ValueError as error:
        if "pickle" in str(error):
            raise UnsafeFile("input would have to be unpickled", path, "arrays of numbers",
                             "Save arrays of numbers with numpy.save.") from None  # fmt: skip
        raise InputError("cannot read the input", f"{path} ({error})", ".npy or .npz") from None
