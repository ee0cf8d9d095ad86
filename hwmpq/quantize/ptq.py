"""The steps of post-training quantization, by name.

Of the menu, done by calibration before anything is chosen:
  equalize          factors moved between layers (`equalize`)
  bias              mean shifts of rounded weights taken back (`correct.shifted_biases`)
Of a plan, done once formats are chosen:
  adaround          up or down learned, layer by layer (`adaround`)
  adaround-blocks   the same, block by block
  affine            means and deviations of channels brought back (`correct.corrected`)
"""

from __future__ import annotations

from collections.abc import Sequence

from hwmpq.errors import UnknownName

OF_MENU = ("equalize", "bias")
#: In the order in which they are done, whatever the order they are asked in.
OF_PLAN = ("adaround", "adaround-blocks", "affine")


def check_steps(steps: Sequence[str]) -> None:
    """Raises UnknownName."""
    for step in steps:
        if step not in OF_MENU + OF_PLAN:
            raise UnknownName("step of --ptq", step, OF_MENU + OF_PLAN)
