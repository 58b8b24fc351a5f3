"""aarch64 code under QEMU: the same agent, the same figures as far as instructions allow, and no word about speed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from edgekit.cli import cli
from edgekit.devices import Job, JobResult, describe_machine, device_names, local, open_device, qemu_aarch64
from edgekit.devices._sysroot import fill_root
from edgekit.engine import EngineOptions, Entry
from edgekit.engines import llama_cpp
from edgekit.errors import GateFailed, InputError, ToolError
from edgekit.measure.divergence import write_reference
from edgekit.measurement import Measurement
from edgekit.report.write import read_report
from edgekit.store import Store
from edgekit.target import find_target

OPTIONS = EngineOptions(context_tokens=128, threads=1)
TOKENS = 24


def job(model: Path, **measure: object) -> Job:
    return Job.model_validate(
        {
            "engine": "llama_cpp",
            "model": str(model),
            "measure": measure,
            "options": {"context_tokens": 128, "threads": 1},
        }
    )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, list[Job]]:
    """A device whose jobs do not run: they are kept, and answered with one figure."""
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/python3").touch()
    asked: list[Job] = []

    def run(self: local.Local, job: Job, **_: object) -> JobResult:
        asked.append(job)
        assert self.python[1:5] == ("-cpu", "cortex-a76", "-L", str(tmp_path))
        (package,) = Path(self.environment["PYTHONPATH"]).iterdir()
        assert (package / "devices/agent.py").is_file()
        figure = Measurement(name="perplexity", value=2, unit="ratio", kind="measured", device="AMD EPYC")
        return JobResult(device="AMD EPYC", build={}, measurements=(figure,), samples={})

    monkeypatch.setattr(qemu_aarch64.QemuAarch64, "_qemu", "qemu-aarch64-static")
    monkeypatch.setattr(local.Local, "run", run)
    return f"qemu-aarch64://{tmp_path}", asked


def test_speed_is_left_out_and_the_note_says_so(device: tuple[str, list[Job]]) -> None:
    url, asked = device
    divergence = {"reference": "/reference"}
    result = open_device(f"{url}?windows=3").run(job(Path("m.gguf"), latency={}, divergence=divergence))
    (sent,) = asked
    assert sent.measure.latency is None
    assert sent.measure.divergence is not None
    assert (sent.measure.divergence.windows, sent.measure.divergence.reference) == (3, "/reference")
    assert result.board is not None
    assert result.board.flags[0].startswith("speed, memory and energy were not measured")
    assert "3 windows" in result.board.flags[1]
    told = open_device(url).fingerprint()
    assert {result.device, *(m.device for m in result.measurements)} == {told.text}
    assert told.text.startswith("cortex-a76 (aarch64) emulated by QEMU ")
    assert told.text.endswith(describe_machine().text)
    assert told.facts["machine"] == "aarch64"


def test_what_emulation_cannot_answer_is_refused(device: tuple[str, list[Job]]) -> None:
    emulated = open_device(device[0])
    with pytest.raises(InputError, match="leave --task out"):
        emulated.run(job(Path("m.gguf"), answers={"bundle": "/b", "questions": [{"prompt": "1"}]}))
    with pytest.raises(InputError, match="onnxruntime"):
        emulated.run(job(Path("m.gguf")).model_copy(update={"engine": "onnxruntime"}))
    with pytest.raises(InputError, match="a device that exists"):
        emulated.probe()
    assert device[1] == []


def test_a_report_claims_no_speed(
    device: tuple[str, list[Job]], bundles: Any, tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(bundles.store.root))
    monkeypatch.setattr(local.Local, "run", lambda self, job, **_: JobResult(device="here", build={}, samples={}))
    arguments = ["build", tiny_hf, "--target", "jetson", "--out", tmp_path / "dist", "--device", device[0], *tiny.QUICK]
    done = CliRunner().invoke(cli, [*map(str, arguments)], standalone_mode=False)
    assert done.exception is None or isinstance(done.exception, GateFailed), done.output
    report = read_report(tmp_path / "dist" / find_target("jetson").name)
    assert report.device is not None
    assert report.device.fingerprint.startswith("cortex-a76 (aarch64) emulated")
    assert report.device.samples == {}
    assert report.host["fingerprint"] == describe_machine().text
    kinds = {(m.name, m.kind) for m in report.measurements}
    assert ("decode_tokens_per_s", "predicted") in kinds
    assert not {("decode_tokens_per_s", "measured"), ("peak_rss_bytes", "measured")} & kinds
    assert any(note.startswith("Speed, memory and energy were not measured") for note in report.notes)
    assert not any("taken for" in note for note in report.notes)


@pytest.mark.parametrize(
    "url", ["qemu-aarch64:", "qemu-aarch64://host", "qemu-aarch64://?windows=0", "qemu-aarch64://?w=1", "qemu_aarch64"]
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(InputError):
        open_device(url)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "qemu-aarch64" in device_names()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="apt-get install qemu-user-static"):
        open_device("qemu-aarch64").run(job(Path("m.gguf")))
    with pytest.raises(ToolError, match="apt-get install apt"):
        fill_root(tmp_path / "root", lambda line: None)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(qemu_aarch64.QemuAarch64, "_qemu", "qemu-aarch64-static")
    with pytest.raises(ToolError, match="edgekit device setup qemu-aarch64"):
        open_device(f"qemu-aarch64://{tmp_path}").run(job(Path("m.gguf")))


def test_setup_asks_first(tmp_path: Path) -> None:
    url = f"qemu-aarch64://{tmp_path}/root"
    with pytest.raises(InputError, match="a yes"):
        CliRunner().invoke(cli, ["device", "setup", url], input="n\n", catch_exceptions=False, standalone_mode=False)
    with pytest.raises(InputError, match="--engine llama_cpp"):
        CliRunner().invoke(
            cli, ["device", "setup", url, "--engine", "onnxruntime"], catch_exceptions=False, standalone_mode=False
        )
    assert list(tmp_path.iterdir()) == []


def test_a_setup_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("dpkg-deb", "cmake", "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++"):
        (programs / name).symlink_to(shutil.which("true") or "")
    (programs / "apt-get").write_text("#!/bin/sh\necho got $2 $3\necho no such mirror >&2\nexit 100\n")
    for path in programs.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    lines: list[str] = []
    (tmp_path / "root").mkdir()
    (tmp_path / "root/mine").touch()
    with pytest.raises(ToolError, match="no such mirror"):
        fill_root(tmp_path / "root", lines.append)
    assert lines == ["got -o APT::Architecture=arm64", "no such mirror"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["programs", "root"]
    assert (tmp_path / "root/mine").exists()


@pytest.fixture
def root() -> Path:
    """The directory of the emulated system."""
    found = qemu_aarch64.QemuAarch64("qemu-aarch64").root
    if not (shutil.which("qemu-aarch64-static") and (found / "usr/bin/python3").exists()):
        pytest.skip(f"no aarch64 system in {found}: edgekit device setup qemu-aarch64")
    return found


@pytest.mark.slow
def test_bundles_for_boards_are_as_accurate_as_aarch64_code(root: Path, empty_store: Store, tmp_path: Path) -> None:
    boards = ("jetson-orin-nano-super", "raspberry-pi-5")
    arguments = ["build", *(part for name in boards for part in ("--target", name)), "--out", tmp_path]
    arguments += ["--device", f"qemu-aarch64://{root}?windows=2"]
    few = ("evaluation.windows=2", "evaluation.window_tokens=64", "gguf.windows=4")
    arguments += [part for setting in few for part in ("--set", setting)]
    done = CliRunner().invoke(cli, [*map(str, arguments)], standalone_mode=False)
    assert done.exception is None or isinstance(done.exception, GateFailed), done.output
    for name in boards:
        report = read_report(tmp_path / name)
        found = {m.of: m for m in report.measurements if m.name == "kl_divergence_nats"}
        assert "(aarch64) emulated" in (found["device"].device or "")
        # the same two windows of the same bundle: the instructions and the size of the batches differ
        assert found["device"].value == pytest.approx(found["bundle"].value, rel=0.1)
        held = [gate.of for gate in report.gates if gate.name == "kl_divergence_nats"]
        assert held.count("device") == held.count("bundle") > 0
        assert not [m for m in report.measurements if m.name == "decode_tokens_per_s" and m.kind == "measured"]


@pytest.mark.slow
def test_aarch64_code_computes_what_x86_code_does(root: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    device = qemu_aarch64.QemuAarch64(f"qemu-aarch64://{root}?windows=2")
    with llama_cpp.open_model(tiny_gguf, OPTIONS) as engine:
        tokens = np.random.default_rng(0).integers(3, engine.vocabulary_size, (3, TOKENS), dtype=np.int32)

        def logits(window: int) -> np.ndarray:
            sequence = engine.start()
            found = engine.step([Entry(sequence, int(token), wants_logits=True) for token in tokens[window]]).logits
            engine.release(sequence)
            return found

        write_reference(tmp_path, tokens, logits)
    asked = job(tiny_gguf, latency={}, divergence={"reference": str(tmp_path)})
    result = device.run(asked, timeout_s=300)
    assert "NEON = 1" in result.build["system"]
    assert "DOTPROD = 1" in result.build["system"]
    assert "AVX" not in result.build["system"]
    figures = {m.name: m for m in result.measurements}
    assert set(figures) == {
        "kl_divergence_nats", "kl_divergence_median_nats", "kl_divergence_p99_nats", "kl_divergence_max_nats",
        "top1_agreement", "perplexity", "source_perplexity", "perplexity_ratio",
    }  # fmt: skip
    # the reference is this machine's own computation of the same file: only the instructions differ
    assert figures["kl_divergence_nats"].value < 1e-3
    assert figures["perplexity_ratio"].value == pytest.approx(1, abs=0.01)
    assert figures["kl_divergence_nats"].note == f"{2 * (TOKENS - 1 - TOKENS // 2)} positions in 2 windows"
    assert len(result.divergence_per_window) == 2
    assert json.loads(result.model_dump_json())["samples"] == {}
    # the same compared here: what is left is rounding, and less than emulation's
    same = open_device("local").run(
        asked.model_copy(update={"measure": asked.measure.model_copy(update={"latency": None})})
    )
    assert {m.name: m for m in same.measurements}["kl_divergence_nats"].value < 1e-6
