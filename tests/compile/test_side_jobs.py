"""The jobs beside quantize: zoo:digits_cnn looked at and compiled; a small network measured once,
then solved and explained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hwmpq.cli
from hwmpq import side_jobs
from hwmpq.artifact import read_manifest
from hwmpq.errors import InputError, UnknownName, UnsupportedModel
from hwmpq.formats import QuantizedWeight
from hwmpq.measure.peaks import Level
from hwmpq.measure.store import Store
from hwmpq.pipeline import Options
from hwmpq.quantizers import Quantizers
from hwmpq.report import KINDS, evaluation
from hwmpq.search import solve
from hwmpq.search.evaluate import evaluate, index_of
from hwmpq.search.problem_file import read_problem
from hwmpq.side_jobs import frontier
from hwmpq.side_jobs.search import marginals
from hwmpq.stages import roofline
from hwmpq.stages.job import Silent, open_job
from hwmpq.stages.latency import profile
from hwmpq.stages.menu import make_menu
from hwmpq.types import Problem, Transition

pytestmark = pytest.mark.usefixtures("shared_worker")
DIGITS = ["stem", "conv1", "depthwise", "pointwise", "conv2", "fc"]
DIGITS_PARAMETERS = 55386
LAYERS = ["conv", "depthwise", "fc"]
PARAMETERS = 8 * 9 + 8 + 8 * 9 + 8 + 8 * 10 + 10
FORMATS = ["fp32", "w8a8"]
CRASHED = "crashed: SIGKILL in step 'check'"


class Notes(Silent):
    """Progress that keeps what was noted."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def note(self, text: str) -> None:
        self.taken.append(text)


class Small(nn.Module):
    """On 16×16 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.conv(x))))
        return self.fc(x.mean((2, 3)))


def small() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    store = tmp_path_factory.mktemp("side") / "store.sqlite"
    return Options(
        f"{__name__}:small", input_shape=(1, 1, 16, 16), target="x86-avx2",
        calib_data="digits#train", formats=tuple(FORMATS), store=str(store), calib=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> Options:
    return Options("zoo:digits_cnn", target="x86-avx2", calib_data="digits#train", calib=32)


@pytest.fixture(scope="module")
def profiled(options: Options) -> dict[str, Any]:
    return side_jobs.profile_model(replace(options, calib_data=None))


@pytest.fixture(scope="module")
def losses(options: Options) -> dict[str, Any]:
    return side_jobs.sensitivity_model(options, None, "output-error")


# inspect


def test_inspect_of_a_target_that_is_not_here() -> None:
    found = side_jobs.inspect_model(Options("zoo:digits_cnn", target="x86-amx"))
    assert [layer["name"] for layer in found["layers"]] == DIGITS
    assert found["target"] == "x86-amx" and found["parameters"] == DIGITS_PARAMETERS
    assert found["macs"] == sum(layer["macs"] for layer in found["layers"]) > 5e6
    stem = found["layers"][0]
    assert stem["op"] == "conv2d" and stem["nbytes"] == 4 * (32 * 9 + 32)
    assert {"fp32", "w8a8", "w4a8", "bf16"} <= {*stem["formats"]}
    assert {node["op"] for node in found["glue"]} >= {"mean"}
    assert found["inputs"][0]["shape"] == [1, 1, 16, 16]
    assert found["outputs"][0]["shape"] == [1, 10]


def test_inspect_says_why_not() -> None:
    found = side_jobs.inspect_model(Options("zoo:digits_cnn", formats=("fp32", "e4m3", "w4a8.g64")))
    for layer in found["layers"]:
        assert layer["formats"] == ["fp32"]
        assert set(layer["why_not"]) == {"e4m3", "w4a8.g64"} and all(layer["why_not"].values())


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erf(torch.sin(self.conv(x)))


def strange() -> Strange:
    return Strange()


def test_inspect_lists_all_operators_it_cannot_take() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        side_jobs.inspect_model(Options(f"{__name__}:strange", input_shape=(1, 1, 8, 8)))
    assert "erf" in str(caught.value) and "sin" in str(caught.value)


# profile, sensitivity


def test_profile_measures_once(options: Options, profiled: dict[str, Any]) -> None:
    assert profiled["layers"] == LAYERS and profiled["formats"] == FORMATS
    assert all(0 < s < 1 for row in profiled["latency_s"].values() for s in row.values())
    assert all(set(row) == set(FORMATS) for row in profiled["latency_s"].values())
    assert profiled["new_timings"] > 6 and not profiled["failures"]
    again = side_jobs.profile_model(replace(options, calib_data=None))
    assert again["new_timings"] == 0 and again["latency_s"] == profiled["latency_s"]


def test_cells_of_a_network_for_the_judgement_of_a_cost_model(
    options: Options, profiled: dict[str, Any]
) -> None:
    [net] = side_jobs.measured_networks([options.model], replace(options, calib_data=None))
    assert [set(layer) for layer in net.layers] == [set(FORMATS)] * 3
    assert (net.family, net.blocks) == ("", (0, 1, 2))
    assert net.layers[0]["fp32"].latency_s == profiled["latency_s"][LAYERS[0]]["fp32"]


def test_a_failure_that_may_pass_is_tried_again(
    options: Options, profiled: dict[str, Any], tmp_path: Path
) -> None:
    """A crash is measured again, once per run and with a notice; wrong numbers stay."""
    place = str(tmp_path / "store.sqlite")
    shutil.copy(str(options.store), place)
    with Store.open(place) as store:
        one, other, *_ = (row for row in store.rows() if row.measurement.format == "w8a8")
        for row, error in ((one, CRASHED), (other, "wrong numbers: 3 of 10")):
            failed = replace(row.measurement, samples_s=(), error=error)
            store.put(failed, row.target, row.fingerprint, row.toolchain)
    notes = Notes()
    given = replace(options, calib_data=None, store=place)
    again = side_jobs.profile_model(given, notes)
    assert again["new_timings"] == 1
    assert [*again["failures"].values()] == ["wrong numbers: 3 of 10"]
    assert "1 cells that crashed or timed out before are measured again" in notes.taken
    notes.taken.clear()
    assert side_jobs.profile_model(given, notes)["new_timings"] == 0 and not notes.taken


def test_a_failure_stands_where_nothing_is_measured(
    options: Options, profiled: dict[str, Any], tmp_path: Path
) -> None:
    place = str(tmp_path / "store.sqlite")
    shutil.copy(str(options.store), place)
    with Store.open(place) as store:
        row = store.rows()[0]
        store.put(replace(row.measurement, samples_s=(), error=CRASHED), row.target)
    job = open_job(replace(options, store=place), Silent())
    with job.store:
        facts = profile(job, make_menu(job.network, job.target, options.formats), measure=False)
    assert [*facts.unknown.values()] == [CRASHED] and facts.new_timings == 0


def test_sensitivity(options: Options, losses: dict[str, Any]) -> None:
    assert losses["layers"] == LAYERS and losses["estimator"] == "output-error"
    assert all(row[0] == 0 and 0 < row[1] < 1 for row in losses["loss"])
    elsewhere = side_jobs.sensitivity_model(replace(options, target="x86-amx"))
    assert elsewhere["loss"] == losses["loss"]  # kept: the target is no part of it
    assert all(row[0] == 0 and 0 < row[1] < 1 for row in losses["loss_error"])
    assert 0 < losses["layer_runs"] <= losses["layer_runs_without_reuse"]


def test_a_loss_is_part_of_what_is_kept(options: Options) -> None:
    usual, chosen = (
        side_jobs.sensitivity_model(replace(options, sensitivity=name, loss=loss))
        for name, loss in (("measured", ""), (None, "kl"))
    )
    assert (usual["estimator"], usual["metric"]) == ("measured", "cross-entropy")
    assert (chosen["estimator"], chosen["metric"]) == ("measured", "kl")
    assert chosen["loss"] != usual["loss"]
    with pytest.raises(InputError, match="none: it does not look at a loss"):
        side_jobs.sensitivity_model(replace(options, sensitivity="output-error", loss="kl"))


def test_an_unknown_estimator(options: Options) -> None:
    with pytest.raises(UnknownName, match="output-error"):
        side_jobs.sensitivity_model(options, None, "output-eror")


# search


def test_search_solves_from_the_store_alone(
    options: Options, profiled: dict[str, Any], losses: dict[str, Any]
) -> None:
    smallest = side_jobs.search_model(replace(options, latency="fastest"))
    assert smallest["status"] == "optimal" and smallest["minimize"] == "latency_s"
    found = side_jobs.search_model(replace(options, latency="9x", max_size="0.9x"), explain=True)
    assert found["status"] == "optimal" and set(found["assignment"]) == {*LAYERS}
    assert smallest["latency_s"] <= found["latency_s"] <= found["budget"]["latency_s"]
    assert found["nbytes"] <= found["budget"]["nbytes"] < 0.9 * 4 * PARAMETERS + 1
    by_name = dict(zip(LAYERS, losses["loss"], strict=True))
    plan = {n: by_name[n][FORMATS.index(f)] for n, f in found["assignment"].items()}
    assert found["loss"] == pytest.approx(sum(plan.values()))
    for row in found["rows"]:
        assert row["format"] == found["assignment"][row["name"]]
        assert row["options"] == profiled["latency_s"][row["name"]]
        (other,) = set(FORMATS) - {row["format"]}
        change = by_name[row["name"]][FORMATS.index(other)] - plan[row["name"]]
        assert row["marginal"][other]["loss"] == pytest.approx(change)
        (step,) = row["steps"]
        assert step["fmt"] == other
        assert step["cost"] is None or step["cost"] >= -1e-12
    assert set(found["prices"]) == {"latency_s", "nbytes"}
    assert all(price["more"] >= 0 for price in found["prices"].values())


def test_search_with_a_drop(
    options: Options, profiled: dict[str, Any], losses: dict[str, Any]
) -> None:
    found = side_jobs.search_model(replace(options, max_drop=1.0))
    assert found["status"] in ("optimal", "accuracy")
    assert (found["drop"] > 1.0) == (found["status"] == "accuracy")


def test_search_of_the_impossible(
    options: Options, profiled: dict[str, Any], losses: dict[str, Any]
) -> None:
    found = side_jobs.search_model(replace(options, latency="1ns"))
    assert found["status"] == "infeasible" and found["least"]["latency_s"] > 1e-7
    assert "fastest plan" in found["error"]["next"] and "assignment" not in found
    assert found["conflict"]["groups"] == (("latency_s",),)
    assert found["conflict"]["relaxed"]["latency_s"] == pytest.approx(found["least"]["latency_s"])


def test_search_within_bit_operations_and_its_problem_file(
    options: Options, profiled: dict[str, Any], losses: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "problem.json"
    found = side_jobs.search_model(replace(options, max_bops="0.5x"), save=file)
    assert found["status"] == "optimal" and 0 < found["bops"] <= found["budget"]["bops"]
    assert found["bops"] > 0.06 * found["budget"]["bops"] / 0.5, "some layer stays fp32"
    again = solve(read_problem(file))
    assert again.choice == found["assignment"] and again.objective == found["objective"]
    with pytest.raises(InputError, match="cannot write the problem file"):
        side_jobs.search_model(replace(options, max_bops="0.5x"), save=tmp_path / "no" / "p.json")


def test_search_needs_budgets_and_facts(
    options: Options, losses: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no budget"):
        side_jobs.search_model(options)
    empty = replace(options, store=str(tmp_path / "empty.sqlite"), latency="0.9x")
    with pytest.raises(InputError, match="hwmpq sensitivity"):
        side_jobs.search_model(empty)
    side_jobs.sensitivity_model(empty)
    with pytest.raises(InputError, match="hwmpq profile"):
        side_jobs.search_model(empty)
    with Store.open(empty.store) as store:
        assert not store.rows() and store.fact("overhead", "") is None


def test_marginals_move_tied_layers_together() -> None:
    cost = np.array([[0.0, 2.0], [3.0, np.inf]])
    problem = Problem(
        ("a", "b", "c"), ("fp32", "w8a8"), loss=np.array([[0.0, 1.0]] * 3),
        latency_s=np.array([[5.0, 1.0]] * 3), nbytes=np.ones((3, 2)), bops=np.ones((3, 2)),
        transitions=(Transition("b", "c", cost),), ties=(("a", "b"),),
    )  # fmt: skip
    choice = {"a": "fp32", "b": "fp32", "c": "w8a8"}
    found = marginals(problem, choice)
    assert found["a"] == {} == found["b"]  # with c in w8a8 nobody knows what b in w8a8 costs
    assert found["c"]["fp32"] == {"loss": -1.0, "latency_s": 2.0, "nbytes": 0.0, "bops": 0.0}
    choice["c"] = "fp32"
    change = marginals(problem, choice)["b"]["w8a8"]
    assert change["loss"] == 2.0 and change["latency_s"] == 3.0 - 8.0
    whole = evaluate(problem, index_of(problem, choice)).of("latency_s")
    assert float(whole) == 15.0


# frontier


def test_frontier(
    options: Options, profiled: dict[str, Any], losses: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(frontier, "JUDGED", 2)
    found = side_jobs.frontier_model(options)
    plans = found["frontier"]
    assert plans and found["new_timings"] == 0  # one, where w8a8 is not faster on this machine
    assert plans == sorted(plans, key=lambda plan: plan["latency_s"])
    assert all(a["loss"] > b["loss"] for a, b in pairwise(plans))
    assert plans[-1]["loss"] == 0 and plans[-1]["assignment"] == dict.fromkeys(LAYERS, "fp32")
    assert ["accuracy" in plan for plan in plans].count(True) == min(2, len(plans))
    assert plans[-1]["drop"] == 0 and found["accuracy"]["n"] > 100
    assert set(found["baselines"]) == {"fp32", "w8a8"}
    searched = side_jobs.search_model(replace(options, latency="0.9999s"))
    assert searched["overhead_s"] == found["overhead_s"]


# compile


def test_compile_from_a_file_and_again_from_its_quantizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = dict.fromkeys(reversed(DIGITS), "fp32") | {"conv2": "w8a8"}
    Path("plan.json").write_text(json.dumps(plan))
    line = "compile zoo:digits_cnn --assignment plan.json --target x86-avx2 --json --out"
    assert hwmpq.cli.main([*line.split(), "one", "--calib-data", "digits#train"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["parity"]["top1_agreement"] == 100 and found["parity"]["samples"] == 4
    assert list(found["assignment"]) == DIGITS and found["assignment"] == plan
    assert found["kernels"]["conv2"]["kernel"] and found["artifact"] == "one"
    assert found["nbytes"]["weights"] < 0.6 * 4 * DIGITS_PARAMETERS
    assert hwmpq.cli.main([*line.split(), "two", "--quantizers", "one/quantizers.safetensors"]) == 0
    one, two = (read_manifest(tmp_path / name) for name in ("one", "two"))
    same = "parameters.safetensors"
    assert one["files"][same] == two["files"][same]


def test_compile_refuses_quantizers_of_another_model(options: Options, tmp_path: Path) -> None:
    codes = np.zeros((8, 1, 3, 3), np.float32)
    weights = {(name, "fp32"): QuantizedWeight(codes, None) for name in LAYERS}
    Quantizers(weights=weights).save(tmp_path / "q.safetensors")
    with pytest.raises(InputError, match="weights of layer 'fc'"):
        side_jobs.compile_model(
            replace(options, out=str(tmp_path / "made")), dict.fromkeys(LAYERS, "fp32"),
            str(tmp_path / "q.safetensors"),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv2": None, "fc": None}, "lacks 2 of 6 layers: conv2, fc"),
        ({"conv3": "fp32"}, "unknown layer in the assignment: got 'conv3'.*Nearest: conv2"),
        ({"conv2": "e4m3", "fc": "e5m2"}, "2 layers cannot run.*conv2 in e4m3: .*fc in e5m2: "),
        ({"conv2": "w8a9"}, "unknown format"),
    ],
)
def test_compile_refuses_an_assignment(
    digits: Options, tmp_path: Path, change: dict[str, str | None], words: str
) -> None:
    given = dict.fromkeys(DIGITS, "fp32") | change
    plan = {name: fmt for name, fmt in given.items() if fmt is not None}
    with pytest.raises(InputError, match=words):
        side_jobs.compile_model(replace(digits, out=str(tmp_path / "made")), plan)
    assert not (tmp_path / "made").exists()


def test_compile_spares_other_folders(options: Options, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="holds something else"):
        side_jobs.compile_model(replace(options, out=str(tmp_path)), dict.fromkeys(LAYERS, "fp32"))


# evaluate


def test_evaluate(
    options: Options, profiled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "read_bandwidths", lambda target: (Level("memory", 1, 1e13),))
    monkeypatch.setattr(roofline, "peak_macs_per_s", lambda *given: 1e13)
    asked, kept = replace(options, calib_data=None), []
    dry = side_jobs.evaluate_target(replace(asked, dry_run=True), [options.model])
    assert dry["networks"][0]["cells"] == 0 < dry["forecast_s"]
    found = side_jobs.evaluate_target(asked, [options.model], keep=kept.append)
    assert kept == [found]
    [network] = found["networks"]
    assert {(c["layer"], c["format"]) for c in network["cells"]} == {*product(LAYERS, FORMATS)}
    assert {c["measured_s"] for c in network["cells"]} <= {
        s for times in profiled["latency_s"].values() for s in times.values()
    }
    times = {name: plan["measured_s"] for name, plan in network["plans"].items()}
    assert {"fp32", "w8a8", "fastest mix"} == {*times}
    assert network["gain"]["over_fp32"] == times["fp32"] / times["fastest mix"]
    assert all(0 < c["roof"]["of_roof"] < 1 for c in network["cells"])

    def again(*given: Any) -> None:
        raise AssertionError("timed again")

    monkeypatch.setattr("hwmpq.side_jobs.evaluate.time_artifacts", again)
    monkeypatch.setattr(roofline, "peak_macs_per_s", again)
    resumed = side_jobs.evaluate_target(asked, [options.model])
    assert resumed["networks"] == found["networks"]
    network["cells"][0]["layer"] = network["failures"]["x"] = "<script>"
    hidden = evaluation.anonymized(found)
    assert "conv" not in hidden["networks"][0]["plans"]["fp32"]["assignment"]
    for kind in KINDS:
        for told, name in ((found, "all"), (hidden, "hidden")):
            evaluation.write(told, tmp_path / f"{name}.{kind}")
    assert evaluation.read(tmp_path / "all.json")["networks"] == found["networks"]
    page = (tmp_path / "all.html").read_text()
    assert "times as fast as fp32" in page and "&lt;script&gt;" in page
    assert (
        found["fingerprint"] in page
        and found["fingerprint"] not in (tmp_path / "hidden.html").read_text()
    )
