"""Pass 4: named constants become arguments of main, so that they can lie in a file of their own."""

from __future__ import annotations

import json
from typing import Any

from numpy.typing import NDArray

from hwmpq.lower.moved import constant_array, is_constant


def lift_parameters(module: Any) -> tuple[Any, dict[str, NDArray[Any]]]:
    """Pre: `lower_annotated` ran. Returns the module, whose main takes the parameters after the
    inputs in the order of the second result: name -> array."""
    import tvm
    from tvm import relax

    named = json.loads(str(module.attrs["hwmpq.parameters"]))
    main = module["main"]
    arrays: dict[str, NDArray[Any]] = {}
    variables: list[Any] = []

    def lifted(constant: Any, name: str) -> Any:
        unique = name
        while unique in arrays:
            unique += "'"
        arrays[unique] = constant_array(constant)
        hint = "".join(c if c.isalnum() else "_" for c in unique)
        variables.append(relax.Var(hint, constant.ty))
        return variables[-1]

    blocks = []
    for block in main.body.blocks:
        bindings = []
        for binding in block.bindings:
            names = iter(named.get(binding.var.name, ()))
            value = binding.value
            if binding.var.name in named:
                if is_constant(value):
                    value = lifted(value, next(names))
                else:
                    args = [
                        lifted(a, next(names)) if is_constant(a) else a
                        for a in value.args[1].fields
                    ]
                    value = relax.Call(
                        value.op, [value.args[0], relax.Tuple(args)], value.attrs, value.ty_args
                    )
            bindings.append(relax.VarBinding(binding.var, value))
        blocks.append(relax.DataflowBlock(bindings))
    body = relax.SeqExpr(blocks, main.body.body)
    function = relax.Function([*main.params, *variables], body, main.ret_ty).with_attr(
        "global_symbol", "main"
    )
    attrs = {k: v for k, v in module.attrs.items() if k != "hwmpq.parameters"}
    result = tvm.IRModule(dict(module.functions))
    result.update_func(result.get_global_var("main"), function)
    if attrs:
        result = result.with_attrs(attrs)
    return relax.transform.Normalize()(result), arrays
