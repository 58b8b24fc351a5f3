"""Builds killed at any moment, with their whole process group: what they leave is complete, and the next goes on."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from conftest import make_store

from edgekit.bundle import open_bundle
from edgekit.store import Store

pytestmark = pytest.mark.slow

CONTEXT = multiprocessing.get_context("forkserver")
# every process starts with these imported: the kills fall into work, not into imports
CONTEXT.set_forkserver_preload(["torch", "transformers", "llama_cpp", "edgekit.cli", "conftest"])
SETTINGS = ("evaluation.windows=2", "evaluation.window_tokens=64", "imatrix.windows=2", "imatrix.window_tokens=64")
TARGET = "jetson-orin-nano-super"


def _build(arguments: list[str], cache: str, log: str) -> None:
    os.setsid()
    os.environ["EDGEKIT_CACHE"] = cache
    sys.argv = ["edgekit", *arguments]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    from edgekit.cli import main

    main()


class Builds:
    """Starts builds of one model; each store lies beside its outputs."""

    def __init__(self, model: Path, base: Path) -> None:
        self.model = model
        self.base = base

    def start(self, store: Store, out: Path) -> ForkServerProcess:
        arguments = ["build", str(self.model), "--target", "jetson", "--out", str(out)]
        for setting in SETTINGS:
            arguments += ["--set", setting]
        process = CONTEXT.Process(target=_build, args=(arguments, str(store.root), str(self.base / f"{out.name}.log")))
        process.start()
        return process

    def finish(self, store: Store, out: Path) -> str:
        """Build undisturbed and return the bundle's digest."""
        return self.wait(self.start(store, out), out)

    def wait(self, process: ForkServerProcess, out: Path) -> str:
        process.join(240)
        assert process.exitcode == 0, (self.base / f"{out.name}.log").read_text()
        bundle = open_bundle(out / TARGET)
        bundle.verify()
        return bundle.manifest.digest


def kill(process: ForkServerProcess, delay_s: float) -> bool:
    """Kill the process group after a while; False when it was done before."""
    process.join(delay_s)
    if process.exitcode is not None:
        return False
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(30)
    return True


def check(store: Store, out: Path) -> None:
    """What a killed build left: only complete objects, only true records, and a whole bundle or none."""
    for directory in (store.root / "objects").glob("*"):
        store.open(directory.name)
    assert store.verify() == []
    for record in (store.root / "steps").glob("[!.]*.json"):
        found = store.lookup(record.stem)
        assert found is not None
        assert store.has(found.digest)
    if (out / TARGET).exists():
        open_bundle(out / TARGET).verify()


@pytest.fixture(scope="module")
def builds(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tiny_hf, tmp_path_factory.mktemp("crash"))


@pytest.fixture(scope="module")
def undisturbed(builds: Builds, tools: Path) -> tuple[str, float]:
    """Digest and duration of a build that nobody disturbs."""
    CONTEXT.Process(target=time.monotonic).start()  # the server imports before the clock starts
    digest = builds.finish(make_store(builds.base / "warm-up", tools), builds.base / "dist-warm-up")
    started = time.monotonic()
    assert builds.finish(make_store(builds.base / "calm", tools), builds.base / "dist-calm") == digest
    return digest, time.monotonic() - started


def test_killed_again_and_again_the_same_build_ends(
    builds: Builds, undisturbed: tuple[str, float], tools: Path
) -> None:
    digest, duration_s = undisturbed
    moments = random.Random(7)
    kills = rounds = 0
    store = out = None
    while kills < 20:
        if store is None:
            rounds += 1
            store = make_store(builds.base / f"killed-{rounds}", tools)
            out = builds.base / f"dist-killed-{rounds}"
        assert out is not None
        # later kills of one store find less left to do
        if kill(builds.start(store, out), moments.uniform(0.05, 0.6 * duration_s)):
            kills += 1
            check(store, out)
        else:
            assert open_bundle(out / TARGET).manifest.digest == digest
            store = None
    if store is not None and out is not None:
        assert builds.finish(store, out) == digest
        assert [p.name for p in out.iterdir()] == [TARGET]
        # nothing of the killed builds is left in the store, bar what collecting removes
        store.collect()
        left = {p.name for part in ("tmp", "steps", "roots") for p in (store.root / part).iterdir()}
        assert not {name for name in left if name.startswith(".")}
        assert not list((store.root / "tmp").iterdir())
        assert builds.finish(store, out) == digest


def test_killed_while_the_bundle_is_put_in_its_place(
    builds: Builds, undisturbed: tuple[str, float], tools: Path
) -> None:
    # what a kill between the two renames leaves: the old bundle under another name
    store, out = Store(builds.base / "calm"), builds.base / "dist-calm"
    gone = 2**22 - 1
    (out / TARGET).rename(out / f".{TARGET}.old-{gone}")
    (out / f".{TARGET}.part-{gone}").mkdir()
    (out / f".{TARGET}.part-{gone}" / "model.gguf").write_bytes(b"half")
    assert builds.finish(store, out) == undisturbed[0]
    assert [p.name for p in out.iterdir()] == [TARGET]


def test_two_builds_at_once_share_a_store(builds: Builds, undisturbed: tuple[str, float], tools: Path) -> None:
    store = make_store(builds.base / "shared", tools)
    outs = [builds.base / "dist-one", builds.base / "dist-two"]
    processes = [builds.start(store, out) for out in outs]
    digests = {builds.wait(process, out) for process, out in zip(processes, outs, strict=True)}
    assert digests == {undisturbed[0]}
    assert store.verify() == []
    # and between them they executed every step once
    executed: dict[str, int] = {}
    for out in outs:
        report: Any = json.loads((out / TARGET / "report.json").read_text())
        for step in report["steps"]:
            executed[step["key"]] = executed.get(step["key"], 0) + (step["status"] == "executed")
    assert set(executed.values()) == {1}


def test_an_interrupt_is_said_in_one_line_and_goes_on(
    builds: Builds, undisturbed: tuple[str, float], tools: Path
) -> None:
    digest, duration_s = undisturbed
    store, out = make_store(builds.base / "interrupted", tools), builds.base / "dist-interrupted"
    for share in (0.2, 0.5, 0.8):
        process = builds.start(store, out)
        process.join(share * duration_s)
        if process.exitcode is None:
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGINT)  # what ctrl-C sends: to the whole group
            process.join(30)
        text = (builds.base / f"{out.name}.log").read_text()
        assert "Traceback" not in text
        if process.exitcode == 130:
            assert "interrupted" in text
            assert not list(out.glob("*")) + list(out.glob(".*")) or (out / TARGET).exists()
        else:
            assert process.exitcode == 0, text
        check(store, out)
    assert builds.finish(store, out) == digest
