"""The problem file: what is written is read back, and everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwmpq import search
from hwmpq.errors import InputError, UnsafeFile
from hwmpq.search.problem_file import read_problem, solution_to_json, write_problem
from hwmpq.types import Problem, Solution, Transition

CELLS = [[0.0, 0.5], [0.0, -0.25]]


def document(**change: Any) -> dict[str, Any]:
    """A valid file; a change to None drops the key."""
    data: dict[str, Any] = {
        "version": 1,
        "layers": ["a", "b"],
        "formats": ["fp32", "w8a8"],
        "loss": CELLS,
        "latency_s": [[2e-3, 1e-3], [4e-3, 1e-3]],
        "nbytes": [[400, 100], [800, 200]],
        "budgets": {"latency_s": 4e-3},
        **change,
    }
    return {key: value for key, value in data.items() if value is not None}


def read(folder: Path, text: str | None = None, **change: Any) -> Problem:
    path = folder / "problem.json"
    path.write_text(json.dumps(document(**change)) if text is None else text)
    return read_problem(path)


def test_reads_and_solves(tmp_path: Path) -> None:
    move = {"from": "a", "to": "b", "latency_s": [[0, 1e-4], [1e-4, 0]]}
    problem = read(
        tmp_path,
        transitions=[move],
        fixed_latency_s=1e-4,
        legal=[[1, 1], [True, True]],
        ties=[["a", "b"]],
        minimize="nbytes",
        budgets={"loss": 0.3},
    )
    answer = solution_to_json(search.solve(problem))
    assert answer["choice"] == {"a": "w8a8", "b": "w8a8"} and answer["status"] == "optimal"
    assert answer["nbytes"] == 300.0 and answer["latency_s"] == pytest.approx(2.1e-3)
    keys = "status choice objective raw_objective bound gap latency_s nbytes bops seconds"
    assert list(answer) == keys.split()
    assert answer["bops"] is None and answer["raw_objective"] is None
    json.dumps(answer, allow_nan=False)


def test_answer_of_an_infeasible_problem(tmp_path: Path) -> None:
    found = search.solve(read(tmp_path, budgets={"latency_s": 1e-3}))
    answer = solution_to_json(found)
    assert answer["status"] == "infeasible" and answer["choice"] == {}
    assert found.least == {"latency_s": pytest.approx(2e-3)}
    assert json.loads(json.dumps(answer, allow_nan=False))["objective"] is None
    assert set(solution_to_json(Solution("timeout", {}))) == set(answer)


def test_round_trip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    problem = Problem(
        ("a", "b", "c"),
        ("x", "y"),
        loss=rng.normal(size=(3, 2)) * 1e-7,
        latency_s=rng.uniform(size=(3, 2)),
        bops=rng.uniform(1e6, 1e12, (3, 2)),
        legal=np.array([[1, 1], [0, 1], [1, 1]], bool),
        pair_loss=root @ root.T,
        transitions=(Transition("a", "c", rng.uniform(size=(2, 2))),),
        fixed_latency_s=0.125,
        ties=(("a", "c"),),
        minimize="bops",
        budgets={"loss": -1e-9, "latency_s": 3.0},
    )
    path = tmp_path / "p.json"
    write_problem(problem, path)
    back = read_problem(path)
    for name in ("loss", "latency_s", "bops", "legal", "pair_loss"):
        np.testing.assert_array_equal(getattr(back, name), getattr(problem, name))
    np.testing.assert_array_equal(back.transitions[0].latency_s, problem.transitions[0].latency_s)
    assert back.nbytes is None and back.budgets == problem.budgets
    for name in ("layers", "formats", "fixed_latency_s", "ties", "minimize"):
        assert getattr(back, name) == getattr(problem, name)


def test_a_cell_without_a_number_is_written_as_illegal(tmp_path: Path) -> None:
    problem = Problem(("a", "b"), ("x", "y"), loss=np.array([[0.0, np.nan], [np.inf, 1.0]]))
    write_problem(problem, tmp_path / "p.json")
    back = read_problem(tmp_path / "p.json")
    assert back.legal is not None and back.legal.tolist() == [[True, False], [False, True]]
    assert search.solve(back).choice == search.solve(problem).choice == {"a": "x", "b": "y"}
    moves = (Transition("a", "b", np.full((2, 2), np.nan)),)
    gone = Problem(("a", "b"), ("x", "y"), np.zeros((2, 2)), np.zeros((2, 2)), transitions=moves)
    with pytest.raises(InputError, match="transition 'a' -> 'b' has a non-finite value"):
        write_problem(gone, tmp_path / "q.json")


MOVE = {"from": "a", "to": "b", "latency_s": CELLS}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"speed": 1}, r"unknown key in problem file: got speed; allowed: bops, budgets"),
    ({"version": 2}, r"version of the problem file: got 2; allowed: 1. Upgrade hwmpq"),
    ({"version": None}, r"version of the problem file: got none; allowed: 1"),
    ({"version": True}, r"version of the problem file: got True"),
    ({"layers": None}, r"layers is missing; allowed: a list of names"),
    ({"formats": "fp32"}, r'formats: got "fp32"; allowed: a list of names'),
    ({"layers": ["a", 1]}, r"a name in layers: got 1; allowed: a string"),
    ({"layers": ["a", "a"]}, r"layers has a name twice: got a"),
    ({"formats": ["x", "x"]}, r"formats has a name twice: got x"),
    ({"loss": [[0.0, 1.0]]}, r"shape of loss: got \[1, 2\]; allowed: \[2, 2\]"),
    ({"loss": [[0.0, 1.0], [0.0]]}, r"loss has rows of different lengths; allowed: a full"),
    ({"loss": [[0, "1"], [0, 0]]}, r"loss holds something that is no number"),
    ({"loss": [[0, None], [0, 0]]}, r"loss holds something that is no number"),
    ({"loss": [[0, True], [0, 0]]}, r"loss holds something that is no number"),
    ({"loss": 3}, r"loss: got 3; allowed: a list of rows"),
    ({"loss": None}, r"the minimised quantity loss is absent"),
    ({"latency_s": [[1, -1e-9], [1, 1]]}, r"latency_s has a negative value: got -1e-09; all"),
    ({"nbytes": [[1, -1], [1, 1]]}, r"nbytes has a negative value"),
    ({"latency_s": None}, r"the budgeted quantity latency_s is absent. Give latency_s or drop"),
    ({"legal": [[1, 2], [1, 1]]}, r"legal holds something else; allowed: true, false, 1, 0"),
    ({"legal": [[1], [1, 1]]}, r"legal has rows of different lengths"),
    ({"minimize": 1}, r"minimize: got 1; allowed: a string"),
    ({"minimize": "joy"}, r"minimize: got 'joy'; allowed: loss, latency_s, nbytes, bops"),
    ({"budgets": {"joy": 1}}, r"unknown key in budgets: got joy"),
    ({"budgets": {"loss": "1"}}, r'budget loss: got "1"; allowed: a number'),
    ({"budgets": []}, r"budgets: got \[\]; allowed: an object"),
    ({"fixed_latency_s": -1}, r"fixed_latency_s has a negative value"),
    ({"ties": [["a", "c"]]}, r"ties names an unknown layer: got 'c'"),
    ({"ties": ["a"]}, r'ties: got "a"; allowed: a list of names'),
    ({"transitions": [{**MOVE, "latency_s": [[0, 0], [0, 1e-3]], "to": "z"}]}, r"got 'z'"),
    ({"transitions": [{**MOVE, "bytes": 1}]}, r"unknown key in transition: got bytes"),
    ({"transitions": [{"from": "a", "to": "b"}]}, r"a transition without latency_s"),
    ({"transitions": [MOVE]}, r"transition 'a' -> 'b' has a negative value: got -0.25"),
    ({"transitions": [{**MOVE, "latency_s": [[0, 0]]}]}, r"shape of transition 'a' -> 'b'"),
    ({"pair_loss": "pairs.npy"}, r"pair_loss: got \"pairs.npy\"; allowed: an object"),
    ({"pair_loss": {"matrix": "pairs.npy", "x": 1}}, r"unknown key in pair_loss: got x"),
    ({"pair_loss": {}}, r"pair_loss.matrix: got null; allowed: a file name"),
    ({"pair_loss": {"matrix": "gone.npy"}}, r"cannot read pair_loss.matrix"),
]


@pytest.mark.parametrize(("change", "text"), BAD, ids=[text[:40] for _, text in BAD])
def test_refusals(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        read(tmp_path, **change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "problem.json is not JSON"),
        ("[1]", r"the problem file: got \[1\]; allowed: an object"),
        ("[" * 100_000, "problem.json is not JSON"),
        ('{"version": 1, "version": 1}', "a key stands twice in the problem file: got version"),
        (json.dumps(document(loss=[[0, float("nan")], [0, 0]])), "number in the problem file: got"),
        (json.dumps(document()).replace("0.5", "1e999"), "loss has a non-finite value; allowed"),
        (json.dumps(document()).replace("0.004", "-Infinity"), "got -Infinity; allowed: finite"),
        (json.dumps(document()).replace("0.5", "1" + "0" * 400), "loss holds something that is no"),
        (json.dumps(document(budgets={"loss": 10**400})), "budget loss"),
    ],
)
def test_refused_texts(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the problem file"):
        read_problem(tmp_path / "none.json")


def save(path: Path, matrix: Any) -> None:
    np.save(path, matrix, allow_pickle=True)


def test_pairs_are_read_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save(tmp_path / "sub" / "pairs.npy", np.eye(4))
    problem = read(tmp_path, pair_loss={"matrix": "sub/pairs.npy"})
    np.testing.assert_array_equal(problem.pair_loss, np.eye(4))


@pytest.mark.parametrize("name", ["../pairs.npy", "/etc/passwd", "sub/../../p.npy", "C:\\p", "l"])
def test_pairs_never_leave_the_folder(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    save(tmp_path / "pairs.npy", np.eye(4))
    (inner / "l").symlink_to(tmp_path / "pairs.npy")
    with pytest.raises(UnsafeFile, match=r"pair_loss.matrix leaves the folder of the problem file"):
        read(inner, pair_loss={"matrix": name})


@pytest.mark.parametrize(
    ("matrix", "text"),
    [
        (np.array([{}], object), "pair_loss.matrix is no plain .npy array"),
        (np.eye(3), r"shape of pair_loss: got \[3, 3\]; allowed: \[4, 4\]"),
        (np.triu(np.ones((4, 4))), r"pair_loss is not symmetric"),
        (np.full((4, 4), np.inf), "pair_loss has a non-finite value"),
        (np.full((4, 4), "x"), "pair_loss holds something that is no number"),
    ],
)
def test_bad_pairs(tmp_path: Path, matrix: Any, text: str) -> None:
    save(tmp_path / "pairs.npy", matrix)
    with pytest.raises(InputError, match=text):
        read(tmp_path, pair_loss={"matrix": "pairs.npy"})


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\x93NUMPY\x01\x00"])
def test_pairs_that_are_no_npy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pairs.npy").write_bytes(content)
    with pytest.raises(UnsafeFile, match=r"pair_loss.matrix is no plain .npy array"):
        read(tmp_path, pair_loss={"matrix": "pairs.npy"})


def test_a_header_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "pairs.npy", np.zeros((4, 4)))
    content = (tmp_path / "pairs.npy").read_bytes()
    (tmp_path / "pairs.npy").write_bytes(content.replace(b"(4, 4), }      ", b"(4, 4000000), }"))
    with pytest.raises(UnsafeFile, match=r"pair_loss.matrix is no plain .npy array"):
        read(tmp_path, pair_loss={"matrix": "pairs.npy"})
