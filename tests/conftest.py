"""What tests share: tiny models, a store that holds their finished steps, and llama.cpp's converter."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny

from edgekit.errors import ToolError
from edgekit.store import Store
from edgekit.tools import SDIST, SDIST_SHA256, converter_directory

# a shell's background job inherits SIGINT as ignored, and so would every process that a test interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[None]:
    """No test reads or writes the user's store, but for the fetched tools."""
    tools = _find_tools(Store.default(), _persistent_store(request))
    root = tmp_path_factory.mktemp("cache")
    if tools:
        (root / "tools").symlink_to(tools)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKIT_CACHE", str(root))
        yield


@pytest.fixture(scope="session")
def tools(request: pytest.FixtureRequest) -> Path:
    """A store's `tools` directory with llama.cpp's converter, fetched on the first run ever; skips without network."""
    if found := _find_tools(Store.default(), _persistent_store(request)):
        return found
    store = _persistent_store(request)
    try:
        converter_directory(store)
    except ToolError as error:
        pytest.skip(f"llama.cpp's converter: {error.found}")
    return store.root / "tools"


def _persistent_store(request: pytest.FixtureRequest) -> Store:
    return Store(Path(request.config.cache.mkdir("edgekit")))


def _find_tools(*stores: Store) -> Path | None:
    return next(((s.root / "tools").resolve() for s in stores if s.has_tool(SDIST, SDIST_SHA256)), None)


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers, hidden size 256, untied."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_288(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_hf with hidden size 288, which no k-quant divides, and tied embeddings."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-288", hidden=288, tied=True)


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_hf with tied embeddings."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-tied", tied=True)


@dataclass(frozen=True)
class Bundles:
    """What one `edgekit build` for two targets left."""

    out: Path
    store: Store
    """Any test may build in it."""
    as_built: Path
    """A copy that none builds in: what is cached there does not depend on the order of the tests."""
    document: Any

    @property
    def jetson(self) -> Path:
        return self.out / "jetson-orin-nano-super"

    @property
    def model(self) -> Path:
        return self.jetson / "model.gguf"


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path, tools: Path) -> Bundles:
    """The tiny model built for `jetson` and `raspberry-pi-5` by the real command in a process of its own."""
    base = tmp_path_factory.mktemp("bundles")
    store = make_store(base / "store", tools)
    command = [sys.executable, "-m", "edgekit", "build", str(tiny_hf), "--target", "jetson"]
    command += ["--target", "raspberry-pi-5", "--recipe", "gguf-q4", "--out", str(base / "dist")]
    command += ["--json", *tiny.QUICK]
    environment = {**os.environ, "EDGEKIT_CACHE": str(store.root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    as_built = shutil.copytree(store.root, base / "as-built", symlinks=True)
    return Bundles(base / "dist", store, as_built, json.loads(done.stdout))


@pytest.fixture(scope="session")
def tiny_gguf(bundles: Bundles, tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an f16 GGUF file."""
    return _converted(bundles.store, tiny_hf, tmp_path_factory.mktemp("gguf") / "tiny-f16.gguf")


@pytest.fixture(scope="session")
def tiny_gguf_288(bundles: Bundles, tiny_288: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of hidden size 288 as an f16 GGUF file."""
    return _converted(bundles.store, tiny_288, tmp_path_factory.mktemp("gguf") / "tiny-288-f16.gguf")


def _converted(store: Store, model: Path, path: Path) -> Path:
    built = tiny.build_in(store, tiny.plan_of(model, "gguf-q8", "gguf.type=F16"))
    shutil.copyfile(built.result.path / "model.gguf", path)
    return path


def make_store(root: Path, tools: Path) -> Store:
    """An empty store that has the converter."""
    root.mkdir(parents=True)
    (root / "tools").symlink_to(tools)
    return Store(root)


@pytest.fixture
def empty_store(tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, and $EDGEKIT_CACHE."""
    store = make_store(tmp_path / "store", tools)
    monkeypatch.setenv("EDGEKIT_CACHE", str(store.root))
    return store


@pytest.fixture
def warm_store(tmp_path: Path, bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy of the store as `bundles` left it, and $EDGEKIT_CACHE."""
    root = tmp_path / "warm"
    shutil.copytree(bundles.as_built, root, symlinks=True)
    monkeypatch.setenv("EDGEKIT_CACHE", str(root))
    return Store(root)


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe file that is called as it says."""

    def write(text: str, name: str = "mine") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return path

    return write


def pytest_sessionfinish(session: pytest.Session) -> None:
    """On CI a skipped test is a failure, but for what root may do and other users may not."""
    if not os.environ.get("CI"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reasons = {report.longrepr[2] for report in reporter.stats.get("skipped", ()) if isinstance(report.longrepr, tuple)}
    if missing := sorted(reason for reason in reasons if "root" not in reason):
        reporter.write_line(f"skipped, but CI should have run it: {'; '.join(missing)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
