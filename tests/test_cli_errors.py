"""The command line at its edges: usage errors, lost output, empty names, places that cannot be written."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from edgekit.engine import EngineOptions
from edgekit.engines.llama_cpp import open_model
from edgekit.errors import InputError

ROOT = Path(__file__).parent.parent


def told(result: tiny.Result, code: int, *texts: str) -> None:
    """One error in three parts."""
    assert result.code == code, result.stderr
    assert "a bug in edgekit" not in result.stderr
    assert result.stderr.count("error: wanted ") == 1
    assert "\n  next: " in result.stderr
    for text in texts:
        assert text in result.stderr


def give_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# --- usage


@pytest.mark.parametrize(
    ("arguments", "found", "help_of"),
    [
        (("build", "--json"), "missing option '--target'", "edgekit build"),
        (("run", "--json"), "missing argument 'BUNDLE'", "edgekit run"),
        (("plan", "-t", "jetson", "--kv-type", "q9", "--json"), "'q9' is not one of", "edgekit plan"),
        (("targets", "shwo", "--json"), "no such command 'shwo'", "edgekit targets"),
        (("biuld", "--json"), "did you mean 'build'", "edgekit"),
        (("run", "x", "hi", "--threads", "100000", "--json"), "100000 is not in the range", "edgekit run"),
        (("--nonsense", "--json"), "--nonsense", "edgekit"),
    ],
)
def test_a_usage_error_is_one_document_too(arguments: tuple[str, ...], found: str, help_of: str) -> None:
    result = tiny.edgekit(*arguments)
    told(result, 2, found, f"next: {help_of} --help")
    error = result.json["error"]
    assert set(error) == {"exit_code", "wanted", "found", "next"}
    assert (error["exit_code"], error["next"]) == (2, f"{help_of} --help")
    assert found in error["found"]


def test_a_group_without_a_command_shows_its_help() -> None:
    result = tiny.edgekit("cache")
    assert result.code == 2
    assert "verify" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("plan", "", "-t", "jetson"), "an empty name"),
        (("plan", "-t", "jetson", "--recipe", ""), "a recipe named ''"),
        (("plan", "-t", ""), "a target named ''"),
        (("build", "-t", "jetson", "--out", ""), "the path is empty"),
        (("build", "-t", "jetson", "--device", ""), "a device"),
        (("run", "", "hi"), "the path is empty"),
        (("validate", ""), "the path is empty"),
    ],
)
def test_an_empty_name_is_not_the_working_directory(arguments: tuple[str, ...], text: str) -> None:
    told(tiny.edgekit(*arguments), 2, text)


# --- output that nobody takes


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 5, "No space left on device"),
        (["targets", "list"], 5, "No space left on device"),
        (["targets", "list", "--json"], 5, "No space left on device"),
        (["biuld", "--json"], 2, "did you mean 'build'"),
    ],
)
def test_a_full_stdout_is_not_a_bug(arguments: list[str], code: int, text: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edgekit", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            check=False,
        )
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "a bug" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["targets", "list"], ["targets", "list", "--json"]])
def test_a_reader_that_goes_away_ends_it_quietly(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", *arguments],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    assert "| 141 |" in (ROOT / "docs" / "exit-codes.md").read_text()


# --- prompts


def test_a_newline_at_the_end_of_stdin_is_no_part_of_the_prompt(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for data in (b"Hello there", b"Hello there\n", b"Hello there\r\n", b"Hello there\n\n"):
        give_stdin(monkeypatch, data)
        counts[data] = tiny.edgekit("run", bundles.jetson, "--max-tokens", "4", "--json").json["prompt_tokens"]
    assert counts[b"Hello there"] == counts[b"Hello there\n"] == counts[b"Hello there\r\n"]
    assert counts[b"Hello there\n\n"] > counts[b"Hello there"]


def test_a_prompt_that_is_not_utf_8(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    give_stdin(monkeypatch, b"caf\xe9\n")
    told(tiny.edgekit("run", bundles.jetson), 2, "a prompt in UTF-8 on stdin", "byte 0xe9 at offset 3")
    told(tiny.edgekit("run", bundles.jetson, "caf\udce9"), 2, "UTF-8 in PROMPT", "character 3")
    told(tiny.edgekit("run", bundles.jetson, "hi", "--system", "\udce9"), 2, "UTF-8 in --system")


def test_stdin_that_is_closed(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    told(tiny.edgekit("run", bundles.jetson), 2, "wanted a prompt; found none")


def test_a_system_message_is_never_dropped(bundles: Any, tmp_path: Path) -> None:
    told(tiny.edgekit("run", bundles.jetson, "hi", "--raw", "--system", "x"), 2, "--system or --raw")
    plain = Path(shutil.copytree(bundles.jetson, tmp_path / "plain"))
    (plain / "tokenizer" / "chat_template.jinja").unlink()
    tiny.edit_json(plain / "tokenizer" / "tokenizer_config.json", chat_template=None)
    told(tiny.edgekit("run", plain, "hi", "--system", "x"), 2, "a chat template for --system")


def test_as_many_threads_as_ggml_takes(bundles: Any) -> None:
    with pytest.raises(InputError, match="at most 512 threads"):
        open_model(bundles.model, EngineOptions(threads=100_000))
