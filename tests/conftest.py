"""What every test gets: one thread, a store and settings of its own, and the shared data folder
where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

for _name in ("OMP", "OPENBLAS", "MKL", "TVM"):  # read when the libraries are loaded
    os.environ[f"{_name}_NUM_THREADS"] = "1"

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees or changes the user's store, devices or targets."""
    devices = tmp_path / "hwmpq-devices.toml"
    devices.write_text("version = 1\n")
    monkeypatch.setenv("HWMPQ_STORE", f"sqlite:///{tmp_path / 'hwmpq-store.db'}")
    monkeypatch.setenv("HWMPQ_DEVICES", str(devices))
    monkeypatch.delenv("HWMPQ_TARGET_PATH", raising=False)
    # unset here and, whatever a command that ran in this process asked of TVM, afterwards
    monkeypatch.setenv("TVM_USE_RUNTIME_LIB", "")
    monkeypatch.delenv("TVM_USE_RUNTIME_LIB")


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder that holds pyproject.toml."""
    return CHECKOUT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets and trained weights: `data` in HWMPQ_SHARED or in a folder `shared`
    beside the checkout."""
    shared = Path(os.environ.get("HWMPQ_SHARED", CHECKOUT.parent / "shared"))
    if not (shared / "data").is_dir():
        pytest.skip(f"no data folder {shared / 'data'}: set HWMPQ_SHARED")
    return shared / "data"
