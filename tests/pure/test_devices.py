"""Devices: the default, the user's file, its schema."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hwmpq import devices
from hwmpq.devices import Device
from hwmpq.errors import DeviceError, InputError, UnknownName


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "devices.toml"
    monkeypatch.setenv("HWMPQ_DEVICES", str(path))
    return path


def test_local_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HWMPQ_DEVICES")
    monkeypatch.setattr(devices.platformdirs, "user_config_path", lambda name: tmp_path / "none")
    local = devices.load()
    assert (local.name, local.transport, local.prefix, local.cores) == ("local", "local", (), ())
    assert (local.lock, local.start, local.remote) == ("", (), False)


def test_the_users_file(file: Path) -> None:
    file.write_text(
        "version = 1\n[devices.local]\ncores = [1]\n[devices.box]\n"
        'prefix = ["nice"]\nlock = "/tmp/box.lock"\ntarget = "x86-avx2"\n'
    )
    assert devices.load().cores == (1,)
    box = devices.load("box")
    assert (box.prefix, box.lock, box.target) == (("nice",), "/tmp/box.lock", "x86-avx2")
    assert box.start == ("env", "HWMPQ_TIMING_LOCK=/tmp/box.lock", "nice")


def test_command_lines(file: Path) -> None:
    """ssh and adb hand one line to a shell; an emulator gets the words as they are."""
    file.write_text(
        "version = 1\n"
        '[devices.s]\ntransport = "ssh"\naddress = "me@box"\ncores = [2, 3]\npython = "/a b/py"\n'
        '[devices.a]\ntransport = "adb"\n'
        '[devices.b]\ntransport = "adb"\naddress = "0123"\n'
        '[devices.e]\ntransport = "exec"\nprefix = ["qemu-aarch64", "-L", "/sys root"]\n'
        '[devices.r]\ntransport = "rpc"\naddress = "127.0.0.1:9091"\nprefix = ["nice"]\n'
    )
    words = ["-c", "a = 'x'; b"]
    line = """taskset -c 2,3 '/a b/py' -c 'a = '"'"'x'"'"'; b'"""
    assert devices.load("s").command(words)[-2:] == ["me@box", line]
    assert devices.load("s").command(words)[0] == "ssh"
    shell = ["shell", "-T", """python3 -c 'a = '"'"'x'"'"'; b'"""]
    assert devices.load("a").command(words) == ["adb", *shell]
    assert devices.load("b").command(words) == ["adb", "-s", "0123", *shell]
    emulated = ["qemu-aarch64", "-L", "/sys root", "python3", *words]
    assert devices.load("e").command(words) == emulated
    client = [sys.executable, "-P", "-m", "hwmpq.measure.rpc.client", "127.0.0.1:9091"]
    served = """nice python3 -c 'a = '"'"'x'"'"'; b'"""
    assert devices.load("r").command(words) == [*client, served]
    assert all(devices.load(name).remote for name in "saber")


def test_another_machine_is_refused(file: Path) -> None:
    file.write_text('version = 1\n[devices.local]\nfingerprint = "x86_64-8c-1f"\n')
    devices.load().recognize("x86_64-8c-1f")
    with pytest.raises(DeviceError, match=r"another machine: got x86_64-2c-0; allowed: x86_64-8c"):
        devices.load().recognize("x86_64-2c-0")
    Device("any").recognize("whatever")


def test_a_device_is_appended(file: Path) -> None:
    file.write_text("version = 1\n")
    board = Device("a", "ssh", address="me@b", cores=(1, 2), fingerprint='x"y')
    chip = Device("b", "exec", prefix=("qemu", "-cpu"), emulated=True)
    for device in (board, chip):
        devices.append(device)
    assert devices.load_all() == {"local": Device("local"), "a": board, "b": chip}


def test_seconds_of_an_emulator_are_refused() -> None:
    Device("local").check_times()
    with pytest.raises(InputError, match=r"times of an emulated device: got e; .*describe a board"):
        Device("e", "exec", prefix=("qemu",), emulated=True).check_times()


def test_unknown_device_names_the_nearest(file: Path) -> None:
    file.write_text("version = 1\n[devices.bench-box]\n")
    with pytest.raises(UnknownName, match=r"unknown device: got 'benchbox'.*Nearest: bench-box"):
        devices.load("benchbox")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version = 1\n[devices.b]\ncolour = 1", "device 'b' in .*: got colour: Unexpected"),
        ('version = 1\n[devices.b]\ntransport = "mail"', "transport: Input should be 'local'"),
        ('version = 1\n[devices.b]\ncores = ["1"]', "cores.0: Input should be a valid integer"),
        ('version = 1\n[devices.b]\ntransport = "ssh"', "address: for ssh needed"),
        ('version = 1\n[devices.b]\naddress = "x"', "address: for ssh needed"),
        ('version = 1\n[devices.b]\ntransport = "exec"', "prefix: needed"),
        (
            'version = 1\n[devices.b]\ntransport = "ssh"\naddress = "-oProxyCommand=x"',
            "not the name of a machine",
        ),
        ('version = 1\n[devices.b]\ntransport = "rpc"', "either the address of a server or"),
        ('version = 1\n[devices.b]\ntransport = "rpc"\naddress = "host"', "HOST:PORT"),
        (
            'version = 1\n[devices.b]\ntransport = "rpc"\naddress = "h:1"\ntracker = "h:2"',
            "either the address of a server or",
        ),
        (
            'version = 1\n[devices.b]\ntransport = "rpc"\ntracker = "h:2"',
            "not empty with a tracker",
        ),
        (
            'version = 1\n[devices.b]\ntransport = "rpc"\ntracker = "h:2"\nkey = "a b"',
            "key: letters, digits",
        ),
        ('version = 1\n[devices.b]\nkey = "k"', "tracker, key: for rpc only"),
        ('version = 1\n[devices.b]\nname = "c"', "The table names it"),
        ("version = 1\n[b]", "unknown key in device file .*: got b;"),
        ("version = 1\ndevices = 3", "NAME. tables"),
        ("version = 1\n[devices]\nb = 3", "NAME. tables"),
        ("version = 2", "allowed: version = 1"),
        ("[devices.b]", "no or another version"),
        ("version 1", "unreadable device file"),
    ],
)
def test_schema(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        devices.load()


def test_a_file_that_was_named_must_exist(file: Path) -> None:
    with pytest.raises(InputError, match="unreadable device file"):
        devices.load()
