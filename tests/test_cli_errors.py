"""The command line at its edges: usage errors, lost output, empty names, places that cannot be written."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny

from edgekit.calibration import check_text, pieces, token_windows
from edgekit.engine import EngineOptions
from edgekit.engines.llama_cpp import open_model
from edgekit.errors import InputError
from edgekit.formats.gguf import read_header
from edgekit.model import resolve_model
from edgekit.plan import make_plan
from edgekit.recipe import find_recipe
from edgekit.store import Store, require_writable
from edgekit.target import CATALOG as TARGETS
from edgekit.target import find_target
from edgekit.tools import run_tool

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
        (("plan", "-t", "jetson", "--context", "q9", "--json"), "'q9' is not a valid integer", "edgekit plan"),
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


# --- places


@pytest.mark.parametrize("place", ["/proc/nope", "/proc/nope/deeper"])
def test_a_store_that_cannot_be_made(
    place: str, tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", place)
    result = tiny.edgekit("build", tiny_hf, "-t", "jetson", "--out", tmp_path / "dist")
    told(result, 5, f"a writable directory at {place}", "No such file or directory in /proc", "set EDGEKIT_CACHE")
    assert not list(tmp_path.iterdir())


def test_an_out_that_cannot_be_made_is_said_before_the_work(tiny_hf: Path, empty_store: Any) -> None:
    result = tiny.edgekit("build", tiny_hf, "-t", "jetson", "--out", "/proc/x")
    told(result, 5, "a writable directory at /proc/x", "choose another --out")
    assert [path.name for path in empty_store.root.iterdir()] == ["tools"]


def test_the_place_of_every_target_is_looked_at_before_the_first_is_built(
    tiny_hf: Path, empty_store: Any, tmp_path: Path
) -> None:
    theirs = tmp_path / "dist" / "raspberry-pi-5"
    theirs.mkdir(parents=True)
    (theirs / "thesis.tex").touch()
    result = tiny.edgekit("build", tiny_hf, "-t", "jetson", "-t", "pi", "--out", tmp_path / "dist", *tiny.QUICK)
    told(result, 2, "something else, which is left alone")
    assert [path.name for path in empty_store.root.iterdir()] == ["tools"]


def test_nothing_is_left_of_trying_a_place(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["ls", "verify", "gc"])
def test_a_store_that_is_a_file(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "file"))
    told(tiny.edgekit("cache", command), 5, f"a writable directory at {tmp_path / 'file'}", "set EDGEKIT_CACHE")


@pytest.mark.parametrize("place", ["file", "/proc/nope"])
def test_doctor_tries_the_store(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / place))
    result = tiny.edgekit("doctor", "--json")
    assert result.code == 5
    (store,) = [finding for finding in result.json["findings"] if finding["name"] == "store"]
    assert "is not writable" in store["found"]
    assert "EDGEKIT_CACHE" in store["fix"]
    assert not any(result.json["recipes"].values())


# --- bundles


@pytest.fixture
def bundle(bundles: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles.jetson, tmp_path / "bundle"))


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "model.gguf", "report.md"])
def test_a_missing_file_is_called_missing(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    told(tiny.edgekit("validate", bundle), 5, f"the file {bundle / name}", "no such file")


@pytest.mark.parametrize(
    ("out", "advice"),
    [("mine.yaml", "--out mine-2.yaml"), ("other.txt", "--out other.yaml"), ("a/b.yaml", "mkdir -p a")],
)
def test_a_profile_goes_where_the_advice_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: str, advice: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("mine")
    told(tiny.edgekit("targets", "probe", "--out", out), 2, f"next: {advice}")


def test_what_is_wrong_with_a_bundle_is_said_of_the_right_file(bundle: Path, tmp_path: Path) -> None:
    settings, manifest = bundle / "settings.json", bundle / "manifest.json"
    good = settings.read_text()
    settings.unlink()
    told(tiny.edgekit("run", bundle, "hi"), 2, f"{settings}: No such file")
    settings.write_text('{"engine": 3}')
    told(tiny.edgekit("run", bundle, "hi"), 2, f"{settings}: engine: ", "context_tokens: is required", "and 1 more")
    settings.write_text("{")
    told(tiny.edgekit("run", bundle, "hi"), 2, f"{settings}: Invalid JSON")
    settings.write_text(good)
    manifest.write_text("{}")
    told(tiny.edgekit("run", bundle, "hi"), 2, f"{manifest}: edgekit_version: is required", "and 6 more")
    manifest.unlink()
    told(tiny.edgekit("run", bundle, "hi"), 2, f"no manifest.json in {bundle}")
    # the directory that `edgekit build --out` was given: the bundle in it is named
    manifest.touch()
    (bundle / "report.json").touch()
    told(tiny.edgekit("run", bundle.parent, "hi"), 2, f"name one: {bundle}")
    told(tiny.edgekit("tco", bundle.parent, "-s", "factory-cell"), 2, f"name one: {bundle}")
    told(tiny.edgekit("run", settings, "hi"), 2, f"{settings}, a file")
    told(tiny.edgekit("run", tmp_path / "nowhere", "hi"), 2, f"no {tmp_path / 'nowhere'}")


def test_validate_shows_the_gates(bundles: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(bundles.store.root))
    done = tiny.edgekit("validate", bundle)
    assert done.code == 0, done.stderr
    assert done.stdout.count("gate passed: ") == 2
    assert "gate passed: kl_divergence_nats <= 0.3, found " in done.stdout
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "empty"))
    assert "gates: 2 not checked" in tiny.edgekit("validate", bundle).stdout


# --- everything that is wrong at once, and before the work


_ENGINES = "engines: [llama_cpp, onnxruntime]"


def test_a_target_names_only_engines_and_recipes_that_exist(tmp_path: Path) -> None:
    text = (TARGETS / "raspberry-pi-5.yaml").read_text().replace(_ENGINES, "engines: [llama_cp, tensort]")
    lines = text.replace("default_recipe: gguf-q4-0", "default_recipe: gguf-q40").splitlines()
    path = tmp_path / "board.yaml"
    path.write_text("\n".join(lines))
    row = {
        name: 1 + next(i for i, line in enumerate(lines) if line.startswith(name)) for name in ("engines", "default")
    }
    result = tiny.edgekit("plan", "--target", path)
    told(
        result,
        2,
        f"{path}:{row['engines']}: engines.0: unknown engine (did you mean 'llama_cpp'?)",
        f"{path}:{row['engines']}: engines.1: unknown engine",
        f"{path}:{row['default']}: default_recipe: unknown recipe (did you mean 'gguf-q4",
        "name: must be 'board'",
    )


def test_the_recipe_that_failed_is_not_the_advice(tiny_hf: Path) -> None:
    target = find_target("pi")
    elsewhere = target.model_copy(update={"engines": ("another",)})
    with pytest.raises(InputError) as caught:
        make_plan(resolve_model(str(tiny_hf)), find_recipe(target.default_recipe), elsewhere)
    assert caught.value.next_command == "edgekit recipes list"
    with pytest.raises(InputError) as caught:
        make_plan(resolve_model(str(tiny_hf)), find_recipe("gguf-q8"), elsewhere)
    assert caught.value.next_command == f"--recipe {target.default_recipe}"


def test_gates_are_checked_together_with_everything_else(write_recipe: Any) -> None:
    path = write_recipe(
        "name: mine\ndescription: x\nengine: llama_cp\nextra: 1\nstages:\n  - convert: {tipe: f16}\n"
        "gates:\n  - {measure: perplexitty, max: 1}\n  - {measure: perplexity, of: konvert, max: 1}\n"
    )
    told(
        tiny.edgekit("plan", "-t", "jetson", "--recipe", path),
        2,
        f"{path}:3: engine: unknown engine",
        f"{path}:4: extra: unknown field",
        f"{path}:6: stages.0.convert.tipe: unknown field",
        f"{path}:8: gates.0.measure: unknown measurement (did you mean 'perplexity'?)",
        f"{path}:9: gates.1.of: 'konvert' is not one of",
    )


@pytest.mark.parametrize(
    ("setting", "texts"),
    [
        ("imatrix.windows=100000000", ("tokens of calibration text in 'python-docs'", "fewer windows")),
        ("imatrix.window_tokens=1025", ("imatrix.window_tokens=1025", "--set imatrix.window_tokens=1024")),
        ("evaluation.windows=100000", ("tokens of evaluation text in 'python-docs'", "fewer windows")),
        ("evaluation.window_tokens=100000", ("the model's context", "--set evaluation.window_tokens=1024")),
        ("evaluation.window_tokens=2", ("evaluation.window_tokens", "greater than or equal to 3")),
        ("imatrix.text=generated imatrix.windows=100000000", ("tokens of calibration text in 'generated'",)),
    ],
)
def test_windows_that_cannot_be_are_refused_by_the_plan(setting: str, texts: tuple[str, ...], tiny_hf: Path) -> None:
    settings = [part for text in setting.split() for part in ("--set", text)]
    told(tiny.edgekit("plan", tiny_hf, "-t", "jetson", *settings), 2, *texts)


def test_a_text_may_hold_what_the_plan_lets_pass(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"document {index} says something of its own " * 60 for index in range(40)))
    size = sum(len(piece.encode()) for piece in pieces(str(path), "calibration"))
    check_text(str(path), "calibration", size)
    # a byte-level tokenizer makes a token of each byte
    assert token_windows(str(path), "calibration", 1, size, lambda text: list(text.encode()), None).size == size
    with pytest.raises(InputError, match="fewer windows"):
        check_text(str(path), "calibration", 2 * size)


# --- the licence


def test_the_licence_goes_on_into_the_file(warm_store: Store, tiny_hf: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_hf, tmp_path / "model"))
    (model / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    plan = tiny.plan_of(model, "gguf-q8", "gguf.type=F16")
    first = Path(shutil.copyfile(tiny.build_in(warm_store, plan).result.path / "model.gguf", tmp_path / "first.gguf"))
    assert resolve_model(str(first)).artifact.facts["licence"] == "mit"
    # an imported file has no model card
    again = tiny.build_in(warm_store, tiny.plan_of(first, "gguf-q8")).result.path / "model.gguf"
    assert resolve_model(str(again)).artifact.facts["licence"] == "mit"


def test_an_unknown_licence_stays_unknown(bundles: Any) -> None:
    assert "general.license" not in read_header(bundles.model).metadata


# --- tools


@pytest.mark.parametrize("group", [True, False])
def test_an_interrupt_during_the_conversion_is_called_one(
    group: bool, warm_store: Store, tiny_hf: Path, tmp_path: Path
) -> None:
    fake, marker = tmp_path / "llama.cpp", tmp_path / "started"
    fake.mkdir()
    # says when it was interrupted, and is slow to end
    (fake / "convert_hf_to_gguf.py").write_text(
        f"import os, pathlib, time\np = pathlib.Path({str(marker)!r})\np.write_text(str(os.getpid()))\n"
        f"try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    p.write_text('interrupted')\n    os._exit(1)\n"
    )
    command = [sys.executable, "-m", "edgekit", "build", str(tiny_hf), "-t", "jetson", *tiny.QUICK]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "dist")],
        env={**environment(), "EDGEKIT_LLAMA_CPP": str(fake)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (marker.exists() and marker.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    converter = int(marker.read_text())
    if group:
        os.killpg(process.pid, signal.SIGINT)  # what ctrl-C does
    else:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "interrupted: finished steps are kept" in errors
    assert marker.read_text() == str(converter)
    assert not psutil.pid_exists(converter)


def test_a_tool_gives_its_output_and_its_code() -> None:
    done = run_tool([sys.executable, "-c", "import sys; print('out'); sys.exit('err')"])
    assert (done.returncode, done.stdout, done.stderr) == (1, "out\n", "err\n")
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


# --- small things


def test_advice_names_what_can_be_chosen(tiny_hf: Path, tmp_path: Path) -> None:
    result = tiny.edgekit("plan", tiny_hf, "-t", "jetson", "--set", "gguf.type=Z9")
    told(result, 2, "not a file type of llama.cpp (one of F32, ", "Q4_K_M", "MXFP4_MOE")
    assert "token_embedding_type" not in result.stderr
    told(tiny.edgekit("build", tiny_hf, "-t", "jetson", "--device", "foo"), 2, "wanted a device (local", "found 'foo'")
    result = tiny.edgekit("plan", tmp_path, "-t", "jetson")
    told(result, 2, "name the directory that holds the model, or a hub id")
    assert "hf download" not in result.stderr


def test_measuring_is_told_and_steps_say_what_they_evaluate(
    bundles: Any, tiny_hf: Path, warm_store: Store, tmp_path: Path
) -> None:
    result = tiny.edgekit("build", tiny_hf, "-t", "jetson", *tiny.QUICK, "--out", tmp_path / "dist", "--json")
    assert re.search(r"^  measure +\d+\.\d s$", result.stderr, re.MULTILINE), result.stderr
    evaluated = [step["of"] for step in result.json["targets"][0]["steps"] if step["stage"] == "evaluate"]
    assert evaluated == ["convert", "bundle"]
