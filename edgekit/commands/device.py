"""`edgekit device`: boards behind SSH, before they are measured on."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click
from rich.console import Console
from rich.table import Table

from edgekit.devices.qemu_aarch64 import ENGINE, QemuAarch64
from edgekit.devices.ssh import EXTRAS, Check, Ssh
from edgekit.errors import InputError

_ENGINE = click.option(
    "--engine", type=click.Choice(sorted(EXTRAS)), default="llama_cpp", show_default=True, help="Engine of the bundle."
)


@click.group(short_help="Look at a board behind SSH, and set it up.")
def device() -> None:
    """Look at a board behind SSH, and set it up for `edgekit validate --device ssh://...`."""


command = device


@device.command("check")
@click.argument("url")
@_ENGINE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def check_device(url: str, engine: str, as_json: bool) -> None:
    """Connect to ssh://[user@]host[:port] and say what is there.

    Python, engine, free memory and disk, who uses it now, power mode, clocks and temperatures. Nothing is installed
    or changed. A board that is in use is left alone: only who uses it is told.
    """
    found = Ssh(url).check(engine)
    rows = dict(_rows(found, engine))
    if as_json:
        click.echo(json.dumps({"device": found.address, **rows}, indent=2))
        return
    _show(rows)


@device.command("setup")
@click.argument("url")
@_ENGINE
@click.option("--yes", is_flag=True, help="Do not ask.")
def set_up_device(url: str, engine: str, yes: bool) -> None:
    """Install this edgekit with an engine on ssh://[user@]host[:port], or make qemu-aarch64.

    It goes as a wheel into an environment of its own, `~/.cache/edgekit/device/venv`, made with Python 3.11 or later
    of the board; the engine comes from the package index that pip uses there. Nothing else on the board changes.
    For qemu-aarch64, packages of apt's sources are unpacked into a directory here, and llama.cpp is compiled for it.
    """
    if url.partition(":")[0] == "qemu-aarch64":
        _set_up_emulation(QemuAarch64(url), engine, yes)
        return
    board = Ssh(url)
    what = f"install edgekit[{EXTRAS[engine]}] into ~/.cache/edgekit/device/venv on {board.address}"
    if not yes and not click.confirm(f"{what}?", err=True):
        raise InputError(f"a yes to {what}", "no", f"edgekit device setup {url} --yes")
    found = board.setup(engine, lambda line: click.echo(f"  {line}", err=True))
    _show(dict(_rows(found, engine)))


def _set_up_emulation(device: QemuAarch64, engine: str, yes: bool) -> None:
    if engine != ENGINE:
        raise InputError(f"--engine {ENGINE} for an emulated processor", engine, "leave --engine out")
    what = f"download packages for aarch64, compile llama.cpp for it (minutes), and put all into {device.root}"
    if not yes and not click.confirm(f"{what}?", err=True):
        raise InputError(f"a yes to {what}", "no", "edgekit device setup qemu-aarch64 --yes")
    system = device.setup(lambda line: click.echo(f"  {line}", err=True))
    _show({"machine": device.fingerprint().text, "llama_cpp": system})


def _show(rows: dict[str, object]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, value in rows.items():
        table.add_row(name.replace("_", " "), _text(name, value))
    Console(highlight=False, markup=False).print(table)


def _text(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / (1 << 30):.1f} GiB"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {text}" for key, text in value.items()) or "none told"
    return "none told" if value is None else str(value)


def _rows(found: Check, engine: str) -> Iterator[tuple[str, object]]:
    hello, told = found.hello, found.description
    yield "in_use_by", str(hello.holder) if hello.holder else "nobody"
    yield "system", f"{hello.system} on {hello.machine}"
    yield "python", found.python
    yield "memory_available_bytes", hello.memory_available_bytes
    yield "disk_free_bytes", hello.disk_free_bytes
    if told is None:
        return
    yield "machine", told.device
    yield f"engine_{engine}", told.build
    state = told.board
    yield "power_mode", state.power_mode
    yield "clocks_mhz", {name: round(clock.hz / 1e6) for name, clock in state.clocks.items()}
    yield "temperatures_c", state.temperatures_c
    yield "throttle_bits", None if state.throttle_bits is None else hex(state.throttle_bits)
    yield "accelerators", ", ".join(state.accelerators) or None
