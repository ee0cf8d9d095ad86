"""devices, devices setup, serve, tracker: who can be timed on; offering this machine to others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hwmpq.cli.command import Json, Seed, command
from hwmpq.cli.output import VERSION, Answer, perform
from hwmpq.cli.progress import reporter
from hwmpq.cli.serving import (
    SERVER_PORT,
    SESSION_S,
    TRACKER_PORT,
    run_tracker,
    serve_machine,
)
from hwmpq.errors import HwmpqError

if TYPE_CHECKING:
    from hwmpq.devices import Device

group = typer.Typer(rich_help_panel="This machine")


@group.callback(invoke_without_command=True)
def _devices(context: typer.Context, seed: Seed = 0, as_json: Json = False) -> None:
    """This machine, and the devices described in devices.toml: who can be reached, who is busy.

    Example: hwmpq devices
    """
    if context.invoked_subcommand is None:
        raise typer.Exit(perform(devices, as_json))


def devices() -> Answer:
    """Every device with its state."""
    from concurrent.futures import ThreadPoolExecutor

    from hwmpq import devices as known
    from hwmpq import targets as all_targets
    from hwmpq.measure import fingerprint
    from hwmpq.measure.environment import hardware

    here = {
        **hardware(), "fingerprint": fingerprint(), "features": sorted(all_targets.host_features())
    }  # fmt: skip
    found = list(known.load_all().values())
    with ThreadPoolExecutor(8) as pool:
        states = list(pool.map(_state, found))
    rows: list[dict[str, Any]] = [
        {
            "name": d.name, "transport": d.transport, "address": d.address or d.tracker,
            "target": d.target or "native", "cores": list(d.cores), "prefix": list(d.prefix),
            **state,
        }
        for d, state in zip(found, states, strict=True)
    ]  # fmt: skip

    def show(console: Any) -> None:
        from hwmpq.cli.tables import table

        console.print(f"this machine: {here['model']}, {here['cores']} cores", markup=False)
        console.print(f"  fingerprint {here['fingerprint']}", markup=False)
        console.print(f"  features {' '.join(here['features'])}", markup=False)
        cells = [
            [
                r["name"], f"{r['transport']} {r['address']}", r["target"],
                " ".join(map(str, r["cores"])) or "any", r["state"],
            ]
            for r in rows
        ]  # fmt: skip
        console.print(table(["device", "reached by", "target", "cores", "state"], cells))
        console.print(f"described in {known.path()}", markup=False)

    told = {"version": VERSION, "here": here, "devices": rows, "file": str(known.path())}
    return Answer(told, show)


def _state(device: Device) -> dict[str, Any]:
    """free, busy (somebody times there), or why it cannot be used; and who it is."""
    from hwmpq.measure.onsite import describe
    from hwmpq.measure.reach import reach

    try:
        if device.remote:
            with reach(device, patience_s=0.0) as worker:
                found = worker.describe()
        else:
            found = describe({})
            device.recognize(found["fingerprint"])
    except HwmpqError as error:
        return {"state": f"not usable: {error}", "fingerprint": None}
    state = "busy" if found["busy"] else "free"
    return {"state": state, "fingerprint": found["fingerprint"]}


Host = Annotated[str, typer.Option("--host", help="Address of this machine to listen on.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-network",
        help="Listen where others reach it, although each of them can then run programs here.",
    ),
]


def serve(
    key: Annotated[
        str, typer.Option("--key", help="What clients ask for: the `key` of their devices.toml.")
    ],
    tracker: Annotated[
        str, typer.Option("--tracker", metavar="HOST:PORT", help="Offer it there; else alone.")
    ] = "",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 = any that is free.")] = SERVER_PORT,
    session_limit: Annotated[
        float, typer.Option("--session-limit", metavar="SECONDS", help="The longest session.")
    ] = SESSION_S,
    trust_network: Trust = False,
) -> Answer:
    """Offer this machine for timing, as a server of TVM's RPC, until interrupted.

    Each session is a process of its own, so a kernel that crashes ends nothing else. RPC has no
    passwords and no encryption: whoever reaches the port can run programs here with your rights.
    So it listens on the loopback address only; clients come through an ssh tunnel.

    Example: hwmpq devices serve --key rpi5 --tracker 127.0.0.1:9190
    """
    return serve_machine(key, tracker, host, port, session_limit, trust_network)


def setup(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the new device.")],
    target: Annotated[
        str, typer.Option("--target", help="What it is: a target that begins with arm-.")
    ] = "arm-cortex-a76",
) -> Answer:
    """Describe an emulated ARM chip as a device, and fetch what it needs into your cache.

    QEMU's user mode runs the artifacts of its target there: right numbers, and a clear end at an
    instruction that the chip lacks; seconds there mean nothing and are refused.

    Example: hwmpq devices setup arm-emulated --target arm-cortex-a76
    """
    from hwmpq import devices as known
    from hwmpq import targets as all_targets
    from hwmpq.measure.emulated import set_up
    from hwmpq.measure.reach import reach

    with reporter().stage(f"set up {name}", None):
        found = set_up(name, all_targets.load(target), reporter().note)
        with reach(found) as worker:
            features = worker.describe()["features"]
    told = {"version": VERSION, "device": found.name, "target": found.target,
            "features": features, "file": str(known.path())}  # fmt: skip
    lines = [f"{found.name}: {found.target} emulated, with {' '.join(features)}"]
    return Answer(told, "\n".join([*lines, f"described in {known.path()}"]))


def tracker(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 = any that is free.")] = TRACKER_PORT,
    trust_network: Trust = False,
) -> Answer:
    """Run TVM's tracker, at which servers offer themselves and clients lease them.

    It keeps no secrets: whoever reaches it can lease every server. Needs pip install 'hwmpq[rpc]'.

    Example: hwmpq devices tracker --port 9190
    """
    return run_tracker(host, port, trust_network)


command(group)(setup)
command(group)(serve)
command(group)(tracker)
