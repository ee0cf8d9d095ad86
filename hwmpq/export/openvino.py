"""OpenVINO's own form of a Q/DQ model: `write`; needs the packages onnx and openvino.

OpenVINO reads the ONNX file and keeps what rounds as FakeQuantize and Convert. NNCF's settings are
not used: they know no formats per layer beside its own integers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


def write(model: Any, path: Path) -> None:
    """An onnx.ModelProto as `path` (.xml), and its weights beside it (.bin)."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(model.SerializeToString())
        openvino.save_model(openvino.convert_model(file), path, compress_to_fp16=False)
