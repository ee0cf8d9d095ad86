"""Which formats a layer may take: kernels, --formats, --pin, --tie."""

from __future__ import annotations

from typing import Any

import pytest

from hwmpq import targets
from hwmpq.errors import InputError, UnknownName
from hwmpq.stages.menu import DEFAULT, Menu, make_menu, uniform
from hwmpq.types import Layer, Network, Workload

CONV = dict(
    n=1, cin=3, h=8, w=8, cout=8, kh=3, kw=3, sh=1, sw=1, pt=1, pl=1, pb=1, pr=1, dh=1, dw=1,
    groups=1,
)  # fmt: skip
NETWORK = Network(
    (
        Layer("stem", Workload.make("conv2d", **CONV)),
        Layer("block.qk", Workload.make("matmul", b=2, m=4, k=8, n=4, trans_b=1)),
        Layer("head", Workload.make("linear", m=1, k=9, n=5)),
    )
)


@pytest.fixture(params=["x86-avx2", "x86-avx512-vnni"])
def menu_of(request: pytest.FixtureRequest) -> Any:
    target = targets.load(request.param)
    return lambda **words: make_menu(NETWORK, target, **words)


def legal(menu: Menu, layer: str) -> list[str]:
    row = menu.legal[NETWORK.names.index(layer)]
    return [name for name, able in zip(menu.formats, row, strict=True) if able]


def test_default(menu_of: Any) -> None:
    menu = menu_of()
    assert menu.formats == DEFAULT
    assert legal(menu, "stem") == list(menu.formats)
    assert legal(menu, "block.qk") == ["fp32", "bf16", "w8a8"]
    assert menu.ties == ()


def test_every_refusal_has_a_reason(menu_of: Any) -> None:
    menu = menu_of(formats=["w4a8", "w8a8"], pins=["stem=w2a8"], ties=[])
    for layer in NETWORK.names:
        for name in menu.formats:
            assert (name in legal(menu, layer)) != bool(menu.reasons[layer].get(name))


def test_formats_leave_fp32_only_where_nothing_else_runs(menu_of: Any) -> None:
    menu = menu_of(formats=["w4a8"])
    assert legal(menu, "stem") == legal(menu, "head") == ["w4a8"]
    assert legal(menu, "block.qk") == ["fp32"]
    assert menu.reasons["stem"]["fp32"] == "not among --formats"
    assert legal(menu_of(formats=["fp32", "w4a8"]), "stem") == ["fp32", "w4a8"]


def test_pins(menu_of: Any) -> None:
    menu = menu_of(pins=["*m=w8a8|fp32", "head=w2a8"])
    assert legal(menu, "stem") == ["fp32", "w8a8"]
    assert legal(menu, "head") == ["w2a8"]
    assert legal(menu, "block.qk") == ["fp32", "bf16", "w8a8"]
    assert menu.reasons["head"]["fp32"] == "pinned by 'head=w2a8'"


def test_a_pin_may_name_fp32_and_formats_beyond_the_menu(menu_of: Any) -> None:
    menu = menu_of(formats=["w8a8"], pins=["stem=fp32", "head=w4a8|w8a8"])
    assert legal(menu, "stem") == ["fp32"]
    assert legal(menu, "head") == ["w8a8", "w4a8"]
    # w4a8 was pinned for the head and asked for nowhere else
    menu = menu_of(formats=["w8a8"], pins=["head=w4a8|w8a8"])
    assert legal(menu, "stem") == ["w8a8"]
    assert menu.reasons["stem"]["w4a8"] == "only where --pin names it"


def test_ties(menu_of: Any) -> None:
    assert menu_of(ties=["*e*"]).ties == (("stem", "head"),)
    assert menu_of(ties=["head"]).ties == ()


def test_uniform(menu_of: Any) -> None:
    menu = menu_of(formats=["w4a8", "w8a8"])
    assert uniform(menu, NETWORK, "fp32") == (dict.fromkeys(NETWORK.names, "fp32"), [])
    assignment, others = uniform(menu, NETWORK, "w4a8")
    assert assignment == {"stem": "w4a8", "block.qk": "w8a8", "head": "w4a8"}
    assert others == ["block.qk"]


@pytest.mark.parametrize(
    ("words", "kind", "text"),
    [
        ({"formats": ["w8a9"]}, UnknownName, r"unknown .*format.*'w8a9'.*Nearest: .*w8a8"),
        ({"pins": ["stem=w8a9"]}, UnknownName, r"'w8a9'.*Nearest: .*w8a8"),
        ({"pins": ["sten=w8a8"]}, UnknownName, r"pattern of --pin.*'sten'.*Nearest: stem"),
        ({"ties": ["heat*"]}, UnknownName, r"pattern of --tie.*'heat\*'.*Nearest: head"),
        ({"pins": ["stem"]}, InputError, "--pin: got 'stem'; allowed: GLOB=FORMAT"),
        ({"pins": ["=w8a8"]}, InputError, "--pin: got '=w8a8'"),
        ({"pins": ["stem="]}, InputError, "--pin: got 'stem='"),
        ({"pins": ["block.qk=w4a8"]}, InputError, "layer 'block.qk' cannot run in it.*matmul"),
        ({"pins": ["stem=fp32", "*=w8a8"]}, InputError, "'stem' cannot run.*pinned by 'stem=fp32'"),
        ({"formats": ["w8a8"], "pins": ["stem=fp32"], "ties": ["*e*"]}, InputError,
         "tied layers have no format in common: got stem, head"),
    ],
)  # fmt: skip
def test_refusals(menu_of: Any, words: dict[str, list[str]], kind: type, text: str) -> None:
    with pytest.raises(kind, match=text) as caught:
        menu_of(**words)
    assert caught.value.exit_code == 2


def test_a_format_that_no_layer_can_run(menu_of: Any) -> None:
    only = Network(NETWORK.layers[1:2])
    with pytest.raises(InputError, match=r"no layer can run in w4a8 on x86-avx2.*a matmul of"):
        make_menu(only, targets.load("x86-avx2"), ["w4a8"])
