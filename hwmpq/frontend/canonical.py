"""The rewrites that bring a draft into its one form: passes over all nodes, run once, in order.

What stands in one place here is done nowhere else: folding, fusing and naming.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmpq.frontend.builder import Steps, shape_after
from hwmpq.frontend.draft import Draft
from hwmpq.graph import Node

_WITH_WEIGHTS = ("conv2d", "linear")


def canonicalize(draft: Draft) -> None:
    """Run all passes on the draft, in place."""
    passes: list[Callable[[Draft], None]] = [
        Draft.drop_dead,
        absorb_transposes,
        merge_rearranges,
        fold_squeeze,
        fold_pads,
        fold_biases,
        fold_batch_norms,
        fold_scales,
        Draft.drop_dead,
        fuse_residuals,
        fuse_activations,
        name_matmuls,
    ]
    for step in passes:
        step(draft)


def _each(draft: Draft, *ops: str) -> list[Node]:
    """A snapshot of the nodes of some operators; look a node up again before changing it."""
    return [node for node in draft.nodes.values() if node.op in ops]


def absorb_transposes(draft: Draft) -> None:
    """matmul(a, transpose(b)) reads b itself, with trans_b turned."""
    for node in _each(draft, "matmul"):
        source = draft.nodes.get(node.inputs[1])
        if source is None or source.op != "rearrange":
            continue
        rank = len(draft.tensors[source.name])
        swap = [*range(rank - 2), rank - 1, rank - 2]
        if source.attrs["steps"] == [["permute", swap]]:
            inputs = (node.inputs[0], source.inputs[0])
            draft.change(node.name, inputs=inputs, attrs={"trans_b": not node.attrs["trans_b"]})


def simplify(shape: tuple[int, ...], steps: Steps) -> Steps:
    """The same element moves in fewer steps; [] when nothing moves. shape: before the steps."""
    result: Steps = []
    shapes = [shape]
    for step in steps:
        if result and step[0] == result[-1][0] and step[0] in ("reshape", "permute"):
            before = result.pop()[1]
            shapes.pop()
            if step[0] == "permute":
                step = ["permute", [before[axis] for axis in step[1]]]
        if not _is_identity(shapes[-1], step):
            result.append(step)
            shapes.append(shape_after(shapes[-1], [step]))
    return result


def _is_identity(shape: tuple[int, ...], step: list[Any]) -> bool:
    if step[0] == "permute":
        return list(step[1]) == list(range(len(shape)))
    if step[0] == "slice":
        return tuple(step[2:]) == (0, shape[step[1]], 1)
    return tuple(step[1]) == shape


def merge_rearranges(draft: Draft) -> None:
    """A rearrange that only rearranges read is merged into each of them; identities go."""
    for node in _each(draft, "rearrange"):
        node = draft.nodes[node.name]
        source = node.inputs[0]
        steps = simplify(draft.tensors[source], node.attrs["steps"])
        readers = draft.readers(node.name)
        if not steps:
            draft.bypass(node.name, source)
        elif (
            readers
            and all(reader.op == "rearrange" for reader in readers)
            and node.name not in draft.outputs
        ):
            for reader in readers:
                merged = [*steps, *reader.attrs["steps"]]
                draft.change(reader.name, inputs=(source,), attrs={"steps": merged})
            del draft.nodes[node.name], draft.tensors[node.name]
        else:
            draft.change(node.name, attrs={"steps": steps})


def fold_squeeze(draft: Draft) -> None:
    """mean with keepdim whose only reader drops these axes: mean without keepdim."""
    for node in _each(draft, "mean"):
        readers = draft.readers(node.name)
        if not node.attrs["keepdim"] or draft.uses(node.name) != 1 or not readers:
            continue
        shape, view = draft.tensors[node.name], readers[0]
        axes = node.attrs["axes"]
        flat = [size for axis, size in enumerate(shape) if axis not in axes]
        if view.op == "rearrange" and view.attrs["steps"] == [["reshape", flat]]:
            draft.change(node.name, attrs={"keepdim": False})
            draft.bypass(view.name, node.name)
            draft.tensors[node.name] = tuple(flat)


def fold_pads(draft: Draft) -> None:
    """Zero padding of height and width moves into the convolution behind it."""
    for node in _each(draft, "conv2d"):
        source = draft.nodes.get(node.inputs[0])
        if source is None or source.op != "pad":
            continue
        *outer, (top, bottom), (left, right) = source.attrs["pads"]
        if any(amount != (0, 0) for amount in outer):
            continue
        t, le, bo, r = node.attrs["padding"]
        padding = (t + top, le + left, bo + bottom, r + right)
        draft.change(node.name, inputs=source.inputs, attrs={"padding": padding})


def fold_biases(draft: Draft) -> None:
    """A constant per channel added right behind a layer without bias becomes its bias, where
    neither the sum without it nor the weight has another reader."""
    for node in _each(draft, "add"):
        layer = draft.nodes.get(node.inputs[0])
        if layer is None or layer.op not in _WITH_WEIGHTS or "b" not in node.params:
            continue
        weight, value = layer.params["weight"], draft.constants[node.params["b"]]
        channels = len(draft.constants[weight])
        wanted = (channels, 1, 1) if layer.op == "conv2d" else (channels,)
        alone = draft.uses(layer.name) == 1 and len(draft.param_readers(weight)) == 1
        if "bias" in layer.params or not alone or value.shape not in (wanted, (1, *wanted)):
            continue
        name = f"{weight.removesuffix('.weight')}.bias"
        bias = draft.constant(name, value.reshape(channels))
        draft.change(layer.name, params={**layer.params, "bias": bias})
        draft.bypass(node.name, layer.name)


def fold_batch_norms(draft: Draft) -> None:
    """BatchNorm goes into the convolution or linear before it, else becomes batch_affine.

    Folding is refused where the layer has other readers, and where a weight is shared with a layer
    whose BatchNorm differs: the tie between them must stay.
    """
    pairs = {node.name: _foldable(draft, node) for node in _each(draft, "batch_norm")}
    keys = {
        layer.name: _fold_key(layer, draft.nodes[norm])
        for norm, layer in pairs.items()
        if layer is not None
    }
    for name, layer in pairs.items():
        sharers = draft.param_readers(layer.params["weight"]) if layer else []
        if layer and all(keys.get(item.name) == keys[layer.name] for item in sharers):
            continue
        pairs[name] = None
    folded: dict[Any, dict[str, str]] = {}
    for name, layer in pairs.items():
        norm = draft.nodes[name]
        scale, shift = _affine(draft, norm)
        if layer is None:
            prefix = draft.paths[name] or name
            params = {
                "scale": draft.constant(f"{prefix}.scale", scale.astype(np.float32)),
                "shift": draft.constant(f"{prefix}.shift", shift.astype(np.float32)),
            }
            draft.nodes[name] = replace(norm, op="batch_affine", attrs={}, params=params)
            continue
        key = keys[layer.name]
        if key not in folded:
            folded[key] = _fold(draft, layer, scale, shift)
        draft.change(layer.name, params=folded[key])
        draft.bypass(name, layer.name)


def _foldable(draft: Draft, norm: Node) -> Node | None:
    layer = draft.nodes.get(norm.inputs[0])
    if layer is None or layer.op not in _WITH_WEIGHTS or draft.uses(layer.name) != 1:
        return None
    rank = len(draft.tensors[layer.name])
    return layer if rank == (4 if layer.op == "conv2d" else 2) else None


def _fold_key(layer: Node, norm: Node) -> tuple[Any, ...]:
    return (*layer.params.items(), *norm.params.items(), norm.attrs["eps"])


def _affine(draft: Draft, norm: Node) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """scale, shift: [C] float64 with batch_norm(x) = scale·x + shift."""
    value = {role: draft.constants[c].astype(np.float64) for role, c in norm.params.items()}
    scale = value.get("weight", 1.0) / np.sqrt(value["var"] + norm.attrs["eps"])
    return scale, value.get("bias", 0.0) - value["mean"] * scale


def _fold(
    draft: Draft, layer: Node, scale: NDArray[np.float64], shift: NDArray[np.float64]
) -> dict[str, str]:
    """Overwrite the layer's weight and bias by the folded ones; returns its params."""
    weight = layer.params["weight"]
    bias = layer.params.get("bias", f"{weight.removesuffix('.weight')}.bias")
    old = draft.constants[weight].astype(np.float64)
    offset = draft.constants[bias].astype(np.float64) if "bias" in layer.params else 0.0
    new = old * scale.reshape(-1, *[1] * (old.ndim - 1))
    draft.constants[weight] = new.astype(np.float32)
    draft.constants[bias] = (offset * scale + shift).astype(np.float32)
    return {"weight": weight, "bias": bias}


def fold_scales(draft: Draft) -> None:
    """A single number times a matmul's result, or times one of its operands, becomes `scale`."""
    for node in _each(draft, "mul"):
        if "b" not in node.params or draft.constants[node.params["b"]].size != 1:
            continue
        factor = float(draft.constants[node.params["b"]].reshape(-1)[0])
        (source,) = node.inputs
        before, readers = draft.nodes.get(source), draft.readers(node.name)
        if before is not None and before.op == "matmul" and draft.uses(source) == 1:
            draft.change(source, attrs={"scale": before.attrs["scale"] * factor})
        elif draft.uses(node.name) == 1 and readers and readers[0].op == "matmul":
            scale = readers[0].attrs["scale"] * factor
            draft.change(readers[0].name, attrs={"scale": scale})
        else:
            continue
        draft.bypass(node.name, source)


def fuse_residuals(draft: Draft) -> None:
    """add(layer, other): the layer adds `other` itself, and stands where the add stood."""
    for node in _each(draft, "add"):
        operands = draft.nodes[node.name].inputs
        order = {name: i for i, name in enumerate(draft.nodes)}
        able = [name for name in operands if _takes_residual(draft, name)]
        shapes = {draft.tensors[name] for name in operands}
        if len(operands) != 2 or len(shapes) != 1 or not able:
            continue
        chosen = max(able, key=order.__getitem__)
        (other,) = (name for name in operands if name != chosen)
        layer = draft.nodes[chosen]
        attrs = {**layer.attrs, "residual": True}
        fused = replace(layer, inputs=(*layer.inputs, other), attrs=attrs)
        draft.take_place(node.name, fused)


def _takes_residual(draft: Draft, name: str) -> bool:
    node = draft.nodes.get(name)
    plain = node is not None and node.op in _WITH_WEIGHTS and not node.attrs["residual"]
    return plain and draft.uses(name) == 1


def fuse_activations(draft: Draft) -> None:
    """relu or clamp right behind a layer that nothing else reads becomes its `act`."""
    for node in _each(draft, "relu", "clamp"):
        (source,) = draft.nodes[node.name].inputs
        layer = draft.nodes.get(source)
        if layer is None or layer.op not in _WITH_WEIGHTS or layer.attrs["act"]:
            continue
        if draft.uses(source) == 1:
            bounds = {f"act_{key}": value for key, value in node.attrs.items()}
            draft.change(source, attrs={"act": node.op, **bounds})
            draft.bypass(node.name, source)


def name_matmuls(draft: Draft) -> None:
    """`<path>.qk` feeds a softmax, `<path>.av` reads one; others are `<path>.matmul_<i>`."""
    roles: dict[str, str] = {}
    for node in _each(draft, "softmax"):
        source = _upstream(draft, node.inputs[0], "matmul")
        if source:
            roles[source] = "qk"
    for node in _each(draft, "matmul"):
        if _upstream(draft, node.inputs[0], "softmax"):
            roles.setdefault(node.name, "av")
    count: dict[str, int] = {}
    for node in _each(draft, "matmul"):
        path = draft.paths[node.name]
        role = roles.get(node.name)
        if role is None:
            role = f"matmul_{count.get(path, 0)}"
            count[path] = count.get(path, 0) + 1
        wish = f"{path}.{role}" if path else role
        draft.rename(node.name, draft.layer_name(wish))


def _upstream(draft: Draft, tensor: str, op: str) -> str | None:
    """The nearest `op` above a tensor, through scales, masks and views."""
    node = draft.nodes.get(tensor)
    if node is None:
        return None
    if node.op == op:
        return node.name
    if node.op not in ("add", "mul", "clamp", "rearrange"):
        return None
    found = (_upstream(draft, name, op) for name in node.inputs)
    return next((name for name in found if name), None)
