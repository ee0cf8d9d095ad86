"""Lowering: annotated Relax modules through the passes, beside what has no annotation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax
from tvm.ir.transform import Sequential

from hwmpq import lower, targets
from hwmpq.errors import InputError, UnknownName
from hwmpq.formats import format_named
from hwmpq.frontend.relax_import import annotate
from hwmpq.frontend.relax_module import relax_module
from hwmpq.frontend.torch_export import trace
from hwmpq.graph import Graph
from hwmpq.kernels import candidates
from hwmpq.lower.annotations import read
from hwmpq.quantize.calibrate import calibrate
from hwmpq.quantize.simulate import Simulator
from hwmpq.quantizers import Quantizers

torch.set_num_threads(1)
TARGET = targets.native()
MENU = ("fp32", "w8a8", "w4a8", "bf16")


class Small(nn.Module):
    """Convolutions, a depthwise one, a residual, a pool, a concat, attention and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.deep = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.side = nn.Conv2d(8, 5, 1)
        self.qkv = nn.Linear(13, 24)
        self.head = nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.point(torch.relu(self.deep(x))) + x)
        y = torch.cat([y, self.side(x)], 1)
        y = nn.functional.max_pool2d(y, 2)
        y = y.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(y).reshape(1, -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(nn.functional.gelu(z.transpose(1, 2).reshape(1, -1, 8)).mean(1))


class Case:
    """The small model, traced and calibrated."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Small().eval()
        self.images = torch.randn(6, 3, 11, 13)
        self.graph: Graph = trace(self.model, (self.images[:1],))
        self.quantizers: Quantizers = calibrate(self.graph, [self.images], MENU)
        self.module: Any = relax_module(self.graph)
        self._built: dict[str, lower.Built] = {}

    def uniform(self, fmt: str) -> dict[str, str]:
        legal = format_named("w8a8") if fmt == "w4a8" else format_named(fmt)
        return {n.name: legal.name if n.op == "matmul" else fmt for n in self.graph.layers}

    def built(self, fmt: str) -> lower.Built:
        """The uniform network, compiled once for all tests."""
        if fmt not in self._built:
            self._built[fmt] = lower.build(self.module, self.uniform(fmt), self.quantizers, TARGET)
        return self._built[fmt]

    def simulated(self, assignment: Mapping[str, str], x: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = Simulator(self.graph, assignment, self.quantizers)(x)[0].numpy()
        return found


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def run(built: lower.Built, *inputs: Any) -> Any:
    vm = relax.VirtualMachine(built.executable, tvm.cpu())
    arrays = [tvm.runtime.tensor(np.asarray(a)) for a in (*inputs, *built.parameters.values())]
    result = vm["main"](*arrays)
    return result.numpy() if hasattr(result, "numpy") else [r.numpy() for r in result]


def rebuilt(module: Any, change: Callable[[relax.BlockBuilder, dict[str, Any]], Any]) -> Any:
    """The module with its calls emitted again one by one.

    change(builder, values) is called after every call with the values by node name so far; it may
    emit bindings and replace values. The one it gives back at last is the output.
    """
    builder = relax.BlockBuilder()
    functions = {}
    for variable, function in module.functions.items():
        if variable.name_hint != "main":
            functions[variable] = builder.add_func(function, variable.name_hint)
    main = module["main"]
    params = [relax.Var(p.name, p.ty) for p in main.params]
    seen: dict[Any, Any] = dict(zip(main.params, params, strict=True))
    names: dict[Any, str] = {}
    values: dict[str, Any] = {}
    result: Any = None
    with builder.function("main", params):
        with builder.dataflow():
            for block in main.body.blocks:
                for binding in block.bindings:
                    call = binding.value
                    if not isinstance(call, relax.Call):
                        continue
                    name = str(module[call.op].attrs["hwmpq.name"])
                    args = [values[names[a]] if a in names else seen.get(a, a) for a in call.args]
                    values[name] = builder.emit(relax.Call(functions[call.op], args))
                    names[binding.var] = name
                    changed = change(builder, values)
                    result = values[name] if changed is None else changed
            out = builder.emit_output(result)
        builder.emit_func_output(out)
    return builder.get().with_attr("hwmpq.inputs", module.attrs["hwmpq.inputs"])


@pytest.mark.parametrize("fmt", MENU)
def test_the_artifact_is_the_simulator(case: Case, fmt: str) -> None:
    assignment, built = case.uniform(fmt), case.built(fmt)
    for x in case.images.split(1):
        found, want = run(built, x.numpy()), case.simulated(assignment, x)
        assert np.abs(found - want).max() <= 2e-2 * np.abs(want).max()
        assert found.argmax() == want.argmax()
        if fmt == "fp32":
            np.testing.assert_allclose(found, case.model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_float_everywhere_equals_torch_when_nothing_is_lowered_by_us(case: Case) -> None:
    """The bodies of the annotated functions are right by themselves."""
    executable = relax.build(case.module, tvm.target.Target(dict(TARGET.tvm)))
    x = case.images[:1]
    found = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x.numpy()))
    np.testing.assert_allclose(found.numpy(), case.model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def lowered_among(case: Case, between: tuple[str, ...]) -> tuple[Any, Any]:
    """The network in w8a8 and its parameters, with TVM's own passes before and between ours."""
    others = [getattr(relax.transform, name)() for name in between]
    formats = lower.assign_formats(case.uniform("w8a8"))
    lowering = lower.lower_annotated(case.quantizers, TARGET)
    return lower.lift_parameters(Sequential([*others, formats, *others, lowering])(case.module))


@pytest.mark.parametrize("other", [
    "CanonicalizeBindings", "FoldConstant", "DeadCodeElimination", "EliminateCommonSubexpr",
    "Normalize", "ToNonDataflow",
])  # fmt: skip
def test_names_survive_other_passes(case: Case, other: str) -> None:
    after = getattr(relax.transform, other)()(case.module)
    assert [n.name for n in read(after).graph.nodes] == [n.name for n in case.graph.nodes]
    _, parameters = lowered_among(case, (other,))
    plain = case.built("w8a8").parameters
    assert list(parameters) == list(plain)
    assert all(np.array_equal(parameters[n], plain[n]) for n in parameters)


@pytest.mark.parametrize("between", [
    ("FoldConstant", "EliminateCommonSubexpr", "CanonicalizeBindings", "DeadCodeElimination"),
    ("Normalize", "ToNonDataflow"),
], ids="+".join)  # fmt: skip
def test_other_passes_do_not_change_the_network(case: Case, between: tuple[str, ...]) -> None:
    lowered, parameters = lowered_among(case, between)
    plain = case.built("w8a8")
    executable, peak = lower.compile_module(lowered, TARGET)
    built = lower.Built(executable, parameters, lowered, plain.calls, peak)
    x = case.images[:1].numpy()
    assert np.array_equal(run(built, x), run(plain, x))


def test_passes_read_what_the_frontend_wrote(case: Case) -> None:
    found = read(case.module).graph
    assert (found.inputs, found.outputs) == (case.graph.inputs, case.graph.outputs)
    for mine, theirs in zip(found.nodes, case.graph.nodes, strict=True):
        assert (mine.name, mine.op, mine.inputs) == (theirs.name, theirs.op, theirs.inputs)
        assert dict(mine.params) == dict(theirs.params)
        assert found.tensors[mine.name] == tuple(case.graph.tensors[mine.name])
    assert all(np.array_equal(found.constants[n], case.graph.constants[n]) for n in found.constants)


# -- what has no annotation ------------------------------------------------------------------------


def test_an_unannotated_operator_is_left_alone(case: Case) -> None:
    def change(builder: Any, values: dict[str, Any]) -> Any:
        if list(values)[-1] == "stem":
            values["stem"] = builder.emit(relax.op.multiply(
                relax.op.exp(relax.op.negative(values["stem"])), relax.const(0.5)
            ))  # fmt: skip
        return None

    x = case.images[:1]
    module = rebuilt(case.module, change)
    built = lower.build(module, case.uniform("fp32"), case.quantizers, TARGET)
    with torch.no_grad():
        y = torch.exp(-torch.relu(case.model.stem(x))) * 0.5
        want = _from_stem(case.model, y)
    np.testing.assert_allclose(run(built, x.numpy()), want.numpy(), rtol=1e-4, atol=1e-5)
    assignment = {**case.uniform("w8a8"), "deep": "bf16", "point": "fp32", "side": "bf16"}
    mixed = lower.build(module, assignment, case.quantizers, TARGET)
    assert "stem" in mixed.calls and "R.exp" in mixed.lowered.script()
    found = run(mixed, x.numpy())
    assert np.abs(found - want.numpy()).max() < 0.1 * np.abs(want.numpy()).max()
    # a foreign tensor was never calibrated
    with pytest.raises(InputError, match=r"tensor 'lv.*' has no quantizer for u8"):
        lower.build(module, case.uniform("w8a8"), case.quantizers, TARGET)


def _from_stem(model: Small, x: torch.Tensor) -> torch.Tensor:
    """`Small.forward` behind its first activation."""
    whole = Small()
    whole.load_state_dict(model.state_dict())
    whole.stem = nn.Identity()  # type: ignore[assignment]
    return whole.eval()(x)


def test_a_function_of_the_user_is_called(case: Case) -> None:
    from tvm.script import tirx as T

    size = int(np.prod(case.graph.tensors["stem"]))

    @T.prim_func(s_tir=True)
    def shifted(x: T.Buffer((size,), "float32"), y: T.Buffer((size,), "float32")):
        T.func_attr({"global_symbol": "shifted", "tirx.noalias": True})
        for i in range(size):
            y[i] = x[i] + T.float32(0.25)

    def change(builder: Any, values: dict[str, Any]) -> Any:
        if list(values)[-1] == "stem":
            function = builder.add_func(shifted, "shifted")
            shape = case.graph.tensors["stem"]
            flat = builder.emit(relax.op.reshape(values["stem"], (size,)))
            more = builder.emit(
                relax.call_tir(function, [flat], relax.TensorType((size,), "float32"))
            )
            values["stem"] = builder.emit(relax.op.reshape(more, shape))
        return None

    built = lower.build(rebuilt(case.module, change), case.uniform("fp32"), case.quantizers, TARGET)
    x = case.images[:1]
    with torch.no_grad():
        want = _from_stem(case.model, torch.relu(case.model.stem(x)) + 0.25)
    np.testing.assert_allclose(run(built, x.numpy()), want.numpy(), rtol=1e-4, atol=1e-5)


def test_operators_of_several_tensors_and_outputs(case: Case) -> None:
    """A tuple operand, another element type, several outputs."""

    def change(builder: Any, values: dict[str, Any]) -> Any:
        if list(values)[-1] != case.graph.outputs[0]:
            return None
        y = values[case.graph.outputs[0]]
        twice = builder.emit(relax.op.concat([y, relax.op.negative(y)], axis=1))
        best = builder.emit(relax.op.argmax(twice, axis=1))
        return relax.Tuple([y, twice, best])

    assignment = case.uniform("w8a8")
    built = lower.build(rebuilt(case.module, change), assignment, case.quantizers, TARGET)
    plain = case.built("w8a8")
    x = case.images[:1].numpy()
    y, twice, best = run(built, x)
    assert np.array_equal(y, run(plain, x))
    assert np.array_equal(twice, np.concatenate([y, -y], 1)) and best.dtype == np.int64
    assert best.item() == twice.argmax()


def test_tuples_are_refused_by_name(case: Case) -> None:
    """A call of several results; a tuple that is bound to a variable before it is read."""

    def halved(builder: Any, values: dict[str, Any]) -> Any:
        if list(values)[-1] == "stem":
            halves = builder.emit(relax.op.split(values["stem"], 2, axis=1), name_hint="halves")
            values["stem"] = builder.emit(relax.op.concat([halves[1], halves[0]], axis=1))
        return None

    def paired(builder: Any, values: dict[str, Any]) -> Any:
        if list(values)[-1] == "stem":
            half = builder.emit(relax.op.strided_slice(values["stem"], [1], [0], [4]))
            pair = builder.emit(relax.Tuple([half, half]), name_hint="pair")
            values["stem"] = builder.emit(relax.op.concat(pair, axis=1), name_hint="twice")
        return None

    for change, text in (
        (halved, r"tensor 'halves' of the Relax module: got .*a tensor of constant shape"),
        (
            paired,
            r"variable 'pair' that 'twice' of the Relax module reads: got .*a tensor; a tuple",
        ),
    ):
        module = rebuilt(case.module, change)
        with pytest.raises(InputError, match=text):
            lower.build(module, case.uniform("fp32"), case.quantizers, TARGET)


# -- what is emitted -------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", MENU)
def test_steps_are_what_is_emitted(case: Case, fmt: str) -> None:
    assignment, built = case.uniform(fmt), case.built(fmt)
    formats = {name: format_named(f) for name, f in assignment.items()}
    schedule = lower.steps(case.graph, formats, TARGET)
    from hwmpq.kernels import glue

    said = []
    for step in schedule.steps:
        if step.call is None or (isinstance(step.call, glue.GlueCall) and glue.is_view(step.call)):
            continue
        ref = step.writes
        label = f"{ref.tensor}.{ref.encoding}.{ref.layout}" if step.is_encode else ref.tensor
        said.append(label)
    assert tuple(said) == built.calls
    calls = [
        b.value for block in built.lowered["main"].body.blocks for b in block.bindings
        if isinstance(b.value, relax.Call) and b.value.op.same_as(tvm.ir.Op.get("relax.call_tir"))
    ]  # fmt: skip
    assert len(calls) == len(said)
    assert all(c.args[0].name_hint.startswith("hwmpq_") for c in calls)


def test_integers_stay_integers_between_layers(case: Case) -> None:
    formats = {name: format_named("w8a8") for name in case.uniform("w8a8")}
    schedule = lower.steps(case.graph, formats, TARGET)
    stored = schedule.plan.stored
    assert {stored[n] for n in ("stem", "deep", "side")} == {"u8"}
    encoded = [s.writes.tensor for s in schedule.steps if s.is_encode]
    assert encoded[0] == case.graph.inputs[0] and "stem" not in encoded


def test_equal_layers_share_a_kernel_and_names_do_not_collide() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.Linear(8, 8)})
            self.a_b = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a_b(torch.relu(self.a["b"](x)))

    torch.manual_seed(1)
    model, x = Twins().eval(), torch.randn(1, 8)
    graph = trace(model, (x,))
    assert {n.name for n in graph.layers} == {"a.b", "a_b"}
    quantizers = calibrate(graph, [x], ["fp32"])
    built = lower.build(relax_module(graph), {"a.b": "fp32", "a_b": "fp32"}, quantizers, TARGET)
    np.testing.assert_allclose(
        run(built, x.numpy()), model(x).detach().numpy(), rtol=1e-5, atol=1e-6
    )
    assert [n for n in built.parameters if n.endswith(".weight")] == ["a.b.weight", "a_b.weight"]


def test_two_readers_get_their_own_encoding(case: Case) -> None:
    assignment = {**case.uniform("w8a8"), "side": "bf16"}
    built = lower.build(case.module, assignment, case.quantizers, TARGET)
    assert any(c.startswith("stem.u8") for c in built.calls)  # stored in bf16, read in both
    x = case.images[:1]
    want = case.simulated(assignment, x)
    assert np.abs(run(built, x.numpy()) - want).max() <= 1e-2 * np.abs(want).max()


def test_a_kernel_can_be_chosen(case: Case) -> None:
    assignment = case.uniform("w4a8")
    node = case.graph.node("point")
    from hwmpq.graph import workload_of

    found = candidates(workload_of(node, case.graph), format_named("w4a8"), TARGET.features)
    if len(found) < 2:
        pytest.skip(f"{TARGET.name} has one kernel for w4a8")
    x = case.images[:1].numpy()
    default = case.built("w4a8")
    for kernel in found[1:3]:
        chosen = lower.build(
            case.module, assignment, case.quantizers, TARGET, kernels={"point": kernel.name}
        )
        assert kernel.name.replace(".", "_") in chosen.lowered.script()
        assert np.array_equal(run(chosen, x), run(default, x))


# -- refusals --------------------------------------------------------------------------------------


def test_what_is_refused(case: Case) -> None:
    def build(changes: Mapping[str, str], **more: Any) -> lower.Built:
        given = {k: v for k, v in {**case.uniform("w8a8"), **changes}.items() if v}
        return lower.build(case.module, given, case.quantizers, TARGET, **more)

    with pytest.raises(InputError, match="assignment and layers differ: got stem; allowed: stem"):
        build({"stem": ""})
    with pytest.raises(InputError, match="assignment and layers differ: got foreign;"):
        build({"foreign": "w8a8"})
    with pytest.raises(UnknownName, match="unknown format: got 'w9a9'"):
        build({"stem": "w9a9"})
    with pytest.raises(InputError, match=r"has no rounded weights for w2a8.*Calibrate again"):
        build({"stem": "w2a8"})
    with pytest.raises(
        InputError, match=r"no such kernel for conv2d in w8a8: got conv2d\.none\.s8"
    ):
        build({}, kernels={"stem": "conv2d.none.s8"})
    with pytest.raises(InputError, match="kernels chosen for unknown layers: got stam"):
        build({}, kernels={"stam": "conv2d.none.s8"})


def test_a_format_without_kernel_names_layer_and_reason(case: Case) -> None:
    matmul = next(n.name for n in case.graph.layers if n.op == "matmul")
    quantizers = calibrate(case.graph, [case.images], (*MENU, "w4a4"))
    text = rf"layer '{matmul}' cannot run in w4a4 on {TARGET.name}: got .*floats and w8a8"
    with pytest.raises(InputError, match=text) as caught:
        lower.build(case.module, {**case.uniform("w8a8"), matmul: "w4a4"}, quantizers, TARGET)
    assert "hwmpq inspect" in str(caught.value)


def test_errors_keep_their_type_in_a_sequential(case: Case) -> None:
    passes = Sequential([lower.assign_formats({})])
    with pytest.raises(InputError, match="assignment and layers differ: got av, deep"):
        passes(case.module)
    passes = Sequential([lower.assign_formats(dict.fromkeys(case.uniform("fp32"), "fp23"))])
    with pytest.raises(InputError, match=r"unknown format: got 'fp23'.*Nearest: fp32"):
        passes(case.module)
    lowering = lower.lower_annotated(Quantizers(), TARGET)
    passes = Sequential([lower.assign_formats(case.uniform("w8a8")), lowering])
    with pytest.raises(InputError, match="has no quantizer for u8"):
        passes(case.module)


@pytest.mark.parametrize("make", [lambda: lower.assign_formats({}), annotate])
def test_a_module_without_main_or_with_open_shapes(make: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match="Relax module without a function 'main'"):
        make()(tvm.IRModule({}))
    builder = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((n, 3), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.exp(x))
        builder.emit_func_output(out)
    with pytest.raises(InputError, match=r"tensor 'x' of the Relax module.*constant shape"):
        make()(builder.get())
