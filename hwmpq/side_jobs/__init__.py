"""The jobs beside `quantize`, made of the same stages: look at a model, measure it, solve for it.

inspect_model      what there is, and what may run where: no data, no device
profile_model      seconds of every cell, into the store
bundle_model       the cells packed for a machine out of reach
import_times       seconds of cells from a table
sensitivity_model  loss of every cell, into the store
frontier_model     the whole curve, nothing compiled but the uniform artifacts
search_model       one plan from what the store knows; measures and writes nothing
compile_model      an artifact from an assignment
export_model       a file for another compiler or runtime from an assignment
sample_cells       seconds of shapes like those of the zoo, for a cost model
measured_networks  the cells of whole networks that the store has, to judge a cost model by
finetune_model     an assignment trained for what it rounds
search_by_training one plan by a method that trains
search_network     a network and its formats
check_target       the conformance of a target's kernels
evaluate_target    what a target does with some networks
probe_machine      a target file for this machine
"""

from hwmpq.side_jobs.compile import compile_model
from hwmpq.side_jobs.conformance import check_target
from hwmpq.side_jobs.elsewhere import bundle_model, import_times
from hwmpq.side_jobs.evaluate import evaluate_target
from hwmpq.side_jobs.export import export_model
from hwmpq.side_jobs.facts import profile_model, sensitivity_model
from hwmpq.side_jobs.finetune import finetune_model
from hwmpq.side_jobs.frontier import frontier_model
from hwmpq.side_jobs.inspect import inspect_model
from hwmpq.side_jobs.networks import measured_networks
from hwmpq.side_jobs.probe import probe_machine
from hwmpq.side_jobs.sample import sample_cells
from hwmpq.side_jobs.search import search_model
from hwmpq.side_jobs.search_network import search_network
from hwmpq.side_jobs.search_trained import search_by_training

__all__ = [
    "bundle_model",
    "check_target",
    "compile_model",
    "evaluate_target",
    "export_model",
    "finetune_model",
    "frontier_model",
    "import_times",
    "inspect_model",
    "measured_networks",
    "probe_machine",
    "profile_model",
    "sample_cells",
    "search_by_training",
    "search_model",
    "search_network",
    "sensitivity_model",
]
