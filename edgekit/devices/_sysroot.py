"""A directory with Python, edgekit's packages and llama.cpp for aarch64, made on a Debian system of another kind."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from edgekit.errors import ToolError

ARCHITECTURE = "armv8.2-a+dotprod+fp16"
"""What llama.cpp is compiled for: what the boards of the catalog with Cortex-A76, A78AE and later have in common."""
COMPILER = "aarch64-linux-gnu-"
PACKAGES = ("python3", "libstdc++6", "libgomp1")
_LLAMA = "llama-cpp-python"
_TOOLS = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "cmake": "cmake",
    f"{COMPILER}gcc": "gcc-aarch64-linux-gnu",
    f"{COMPILER}g++": "g++-aarch64-linux-gnu",
}

Progress = Callable[[str], None]


def fill_root(root: Path, progress: Progress) -> None:
    """Fill `root`, which appears whole or not at all; nothing else on this machine changes.

    Debian's packages come from the sources that apt is configured with, checked by its keys, and are unpacked only.
    What edgekit needs comes as wheels in the versions that are installed here; llama.cpp is compiled from the release
    that is installed here.

    Raises:
        ToolError: a program is missing, or one of them failed.
    """
    for program, package in _TOOLS.items():
        if shutil.which(program) is None:
            raise ToolError(f"the program {program}", "none", f"apt-get install {package}")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".setup-", dir=root.parent) as name:
        work, new = Path(name), Path(name, "root")
        _unpack_debian(work / "apt", new, progress)
        version = (new / "usr/bin/python3").readlink().name.removeprefix("python")
        site = new / "usr/lib/python3/dist-packages"
        _install_wheels(site, version, progress)
        _compile_llama(work / "llama", site, progress)
        if root.exists():
            root.rename(work / "old")
        new.rename(root)


def _unpack_debian(state: Path, root: Path, progress: Progress) -> None:
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True)
    (state / "status").touch()  # nothing is installed there yet
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
    }
    apt = ["apt-get", "-qq", *(part for name, value in settings.items() for part in ("-o", f"{name}={value}"))]
    _run([*apt, "update"], progress)
    _run([*apt, "--yes", "--no-install-recommends", "--download-only", "install", *PACKAGES], progress)
    for package in sorted((state / "archives").glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(package), str(root)], progress)


def _install_wheels(site: Path, version: str, progress: Progress) -> None:
    names = {name for of in ("edgekit", _LLAMA) for name in _requirements(of)}
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in sorted(names)]
    platforms = [f"--platform=manylinux{kind}_aarch64" for kind in ("2014", "_2_28")]
    how = [f"--target={site}", *platforms, f"--python-version={version}", "--only-binary=:all:"]
    _run([*_pip("install"), *how, *wanted], progress)


def _requirements(distribution: str) -> list[str]:
    """Names of what a distribution needs without any extra."""
    needed = (text for text in importlib.metadata.requires(distribution) or () if "extra ==" not in text)
    return [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in needed]


def _compile_llama(work: Path, site: Path, progress: Progress) -> None:
    version = importlib.metadata.version(_LLAMA)
    fetch = ["--no-deps", f"--no-binary={_LLAMA}", f"--dest={work}"]
    _run([*_pip("download"), *fetch, f"{_LLAMA}=={version}"], progress)
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(work, filter="data")
    (source,) = (path for path in work.iterdir() if path.is_dir())
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_C_COMPILER": f"{COMPILER}gcc",
        "CMAKE_CXX_COMPILER": f"{COMPILER}g++",
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
        "CMAKE_INSTALL_RPATH": "$ORIGIN",
        "BUILD_SHARED_LIBS": "ON",
        "GGML_NATIVE": "OFF",
        "GGML_CPU_ARM_ARCH": ARCHITECTURE,
        "LLAMA_BUILD_COMMON": "OFF",
    }
    build = work / "build"
    given = [f"-D{name}={value}" for name, value in settings.items()]
    _run(["cmake", "-S", str(source / "vendor/llama.cpp"), "-B", str(build), *given], progress)
    _run(["cmake", "--build", str(build), "--target", "llama", "--parallel", str(os.cpu_count() or 1)], progress)
    shutil.copytree(source / "llama_cpp", site / "llama_cpp")
    libraries = site / "llama_cpp/lib"
    libraries.mkdir(exist_ok=True)
    for library in (build / "bin").glob("*.so*"):
        shutil.copy2(library, libraries, follow_symlinks=False)
    described = site / f"llama_cpp_python-{version}.dist-info"
    described.mkdir()
    shutil.copy2(source / "PKG-INFO", described / "METADATA")


def _pip(command: str) -> list[str]:
    return [sys.executable, "-m", "pip", command, "--disable-pip-version-check"]


def _run(command: list[str], progress: Progress) -> None:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    last = ""
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            progress(line.rstrip())
    if process.returncode != 0:
        what = " ".join(map(os.path.basename, command[:4]))
        raise ToolError(f"{what} to work", last or f"exit code {process.returncode}", "see what it printed above")
