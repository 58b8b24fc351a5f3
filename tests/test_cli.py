from __future__ import annotations

import importlib
import json
import os
import pkgutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import tiny
from click.testing import CliRunner

import edgekit.commands
from edgekit.cli import COMMANDS, cli
from edgekit.errors import DoesNotFit, EdgekitError, GateFailed, InputError, ToolError

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "llama_cpp", "gguf", "numpy", "pydantic", "huggingface_hub", "onnxruntime")


def edgekit_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgekit", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def leaves(command: click.Command, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], click.Command]]:
    if not isinstance(command, click.Group):
        return [(path, command)]
    context = click.Context(command)
    found = [((*path, name), command.get_command(context, name)) for name in command.list_commands(context)]
    return [leaf for child_path, child in found for leaf in leaves(child, child_path)]


def test_help_names_every_module_of_commands_with_its_own_summary():
    modules = {m.name for m in pkgutil.iter_modules(edgekit.commands.__path__) if not m.name.startswith("_")}
    assert modules == set(COMMANDS)
    for name in modules:
        assert importlib.import_module(f"edgekit.commands.{name}").command.short_help == COMMANDS[name]


@pytest.mark.parametrize(
    ("path", "command"), leaves(cli, ()), ids=lambda value: "-".join(value) if isinstance(value, tuple) else ""
)
def test_every_command_and_option_has_help(path, command):
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{path}: {parameter.name}"
    result = CliRunner().invoke(cli, [*path, "--help"])
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 100


def test_help_imports_nothing_heavy():
    code = """
import sys
from edgekit.cli import cli
try:
    cli(['--help'])
except SystemExit:
    print(sorted(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "build" in done.stdout
    assert [name for name in HEAVY if f"'{name}'" in done.stderr] == []


@pytest.mark.parametrize(
    "module",
    [
        "engine",
        "engines.llama_cpp",
        "artifact",
        "decode",
        "decode.greedy",
        "devices.agent",
        "measure.latency",
        "measure.divergence",
        "formats.gguf",
        "bundle",
        "commands.run",
        "tasks",
        "verifier",
        "measure.strategies",
    ],
)
def test_the_half_that_runs_on_a_device_imports_no_build_library(module):
    build = ("torch", "transformers", "gguf", "llama_cpp")
    code = f"import sys, edgekit.{module}\nprint([name for name in {build} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_nearly_as_fast_as_importing_click():
    def seconds(*command: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        return time.perf_counter() - start

    pairs = [(seconds("-m", "edgekit", "--help"), seconds("-c", "import click")) for _ in range(7)]
    assert statistics.median(ours / theirs for ours, theirs in pairs) <= 3


def test_version():
    assert CliRunner().invoke(cli, ["--version"]).output == f"edgekit, version {edgekit.__version__}\n"


def test_exit_codes_are_the_documented_ones():
    assert {c.__name__: c.exit_code for c in (EdgekitError, InputError, GateFailed, DoesNotFit, ToolError)} == {
        "EdgekitError": 1,
        "InputError": 2,
        "GateFailed": 3,
        "DoesNotFit": 4,
        "ToolError": 5,
    }
    page = (ROOT / "docs" / "exit-codes.md").read_text()
    for code in (0, 1, 2, 3, 4, 5, 130, 141):
        assert f"| {code} |" in page


def test_a_misspelt_command_is_suggested():
    done = edgekit_process("biuld")
    assert done.returncode == 2
    assert "did you mean 'build'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_with_json_is_one_document_on_stdout():
    done = edgekit_process("build", "--target", "jetsn", "--json")
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == 2
    assert "jetson" in error["found"]


def test_doctor_names_what_is_missing_and_the_command_that_fixes_it(monkeypatch):
    assert tiny.edgekit("doctor").code == 0
    monkeypatch.setattr("edgekit.tools._distribution_version", lambda name: None if name == "torch" else "1.0")
    done = tiny.edgekit("doctor")
    assert done.code == 5
    assert "fix: pip install 'edgekit[build]'" in done.stdout
    assert "recipe gguf-q4: cannot run" in done.stdout
    document = tiny.edgekit("doctor", "--json").json
    assert document["targets"]["jetson-orin-nano-super"] is False


def test_a_bug_of_ours_is_one_line_and_exit_code_1(monkeypatch, capsys):
    from edgekit import cli as module

    def broken(**_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(module.cli, "main", broken)
    monkeypatch.delenv("EDGEKIT_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 1
    assert "ZeroDivisionError: oops" in capsys.readouterr().err


def test_generated_pages_are_current():
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_recipes_list_and_show():
    runner = CliRunner()
    listed = runner.invoke(cli, ["recipes", "list", "--json"])
    names = [recipe["name"] for recipe in json.loads(listed.output)]
    assert {"gguf-q8", "gguf-q4", "gguf-q4-0", "gguf-smallest"} <= set(names)
    for name in names:
        shown = runner.invoke(cli, ["recipes", "show", name])
        assert shown.exit_code == 0
        assert name in shown.output
    assert runner.invoke(cli, ["recipes", "list"]).exit_code == 0


def test_the_project_names_no_place_it_was_made_in():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    words = ("/" + "work/", "py" + "pi.org", "../" + "shared")
    for name in tracked:
        text = (ROOT / name).read_text(errors="ignore")
        assert not [word for word in words if word in text], name
