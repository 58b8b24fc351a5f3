from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from edgekit.bundle import open_bundle
from edgekit.chat import render_chat
from edgekit.decode import Options, Session, find_strategy
from edgekit.engine import EngineOptions, Entry
from edgekit.engines.llama_cpp import open_model
from edgekit.errors import InputError


@pytest.fixture
def bundle(bundles: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles.jetson, tmp_path / "bundle"))


# --- edgekit run


def test_run_streams_what_its_json_holds(bundle: Path) -> None:
    spoken = tiny.edgekit("run", bundle, "Hello there", "--max-tokens", "12")
    told = tiny.edgekit("run", bundle, "Hello there", "--max-tokens", "12", "--json")
    assert (spoken.code, told.code) == (0, 0)
    assert spoken.stdout == told.json["text"] + "\n"
    assert told.json["tokens"] <= 12
    assert told.json["strategy"] == "greedy"


def test_run_reads_stdin_and_raw_leaves_the_template_out(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello there")))
    piped = tiny.edgekit("run", bundle, "--max-tokens", "8", "--json").json
    given = tiny.edgekit("run", bundle, "Hello there", "--max-tokens", "8", "--json").json
    assert piped["text"] == given["text"]
    raw = tiny.edgekit("run", bundle, "Hello there", "--max-tokens", "8", "--raw", "--json").json
    assert raw["prompt_tokens"] < given["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--strategy", "greddy", "hi"), "did you mean 'greedy'?"),
        ((" ",), "wanted a prompt"),
        (("word " * 9000,), "a prompt shorter than the context"),
    ],
)
def test_bad_prompts_are_one_error(bundle: Path, arguments: tuple[str, ...], text: str) -> None:
    result = tiny.edgekit("run", bundle, *arguments)
    assert result.code == 2
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_greedy_is_the_argmax_of_one_forward_pass(bundles: Any) -> None:
    with open_model(bundles.model, EngineOptions(context_tokens=64, sequences=2, threads=1)) as engine:
        prompt = engine.tokenize("Hello there", special=True)
        session = Session(engine, prompt, Options(max_tokens=10))
        (*_, answer) = find_strategy("greedy")(session)
        tokens = list(answer.tokens)
        session.close()

        sequence = engine.start()
        logits = engine.step([Entry(sequence, token) for token in (prompt + tokens)[:-1]]).logits
    assert tokens == list(np.argmax(logits[len(prompt) - 1 :], axis=1))


def test_the_half_for_the_device_runs_without_build_libraries(bundle: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'gguf', 'accelerate', 'safetensors'): sys.modules[name] = None\n"
        f"sys.argv = ['edgekit', 'run', {str(bundle)!r}, 'hi', '--max-tokens', '3']\n"
        "from edgekit.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- edgekit validate


def test_validate_measures_again_and_checks_the_gates(bundles: Any, bundle: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(bundles.store.root))
    done = tiny.edgekit("validate", bundle, "--json")
    assert done.code == 0, done.stderr
    names = {m["name"] for m in done.json["measurements"]}
    assert {"decode_tokens_per_s", "peak_rss_bytes", "kl_divergence_nats"} <= names
    report = json.loads((bundle / "report.json").read_text())
    built = {m["name"]: m["value"] for m in report["measurements"] if m["of"] == "bundle" and m["kind"] == "measured"}
    again = {m["name"]: m["value"] for m in done.json["measurements"]}
    assert again["kl_divergence_nats"] == pytest.approx(built["kl_divergence_nats"], rel=1e-3)
    assert len(done.json["gates"]) == 2


def test_validate_without_the_store_says_that_accuracy_is_not_measured(bundle: Path, empty_store: Any) -> None:
    done = tiny.edgekit("validate", bundle)
    assert done.code == 0
    assert "accuracy: not measured" in done.stdout


@pytest.mark.parametrize("name", ["model.gguf", "tokenizer/tokenizer_config.json", "report.json", "README.md"])
def test_validate_finds_a_flipped_byte_in_any_file(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    done = tiny.edgekit("validate", bundle)
    assert done.code == 5
    assert name in done.stderr


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_settings_that_point_outside_is_refused(bundle: Path, name: str) -> None:
    tiny.edit_json(bundle / "settings.json", model=name)
    for command in ("run", "validate"):
        done = tiny.edgekit(command, bundle, *(["hi"] if command == "run" else []))
        assert done.code == 2
        assert "do not use this bundle" in done.stderr


def test_a_directory_that_is_no_bundle_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a bundle directory"):
        open_bundle(tmp_path)


# --- chat templates


def write_template(directory: Path, source: str) -> Path:
    (directory / "chat_template.jinja").write_text(source)
    (directory / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    return directory


def test_the_template_renders_as_transformers_renders_it(tiny_hf: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?\nTell me <b>all</b>."}]
    theirs = AutoTokenizer.from_pretrained(tiny_hf).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert render_chat(tiny_hf, messages) == theirs


def test_special_tokens_come_from_the_tokenizer(tmp_path: Path) -> None:
    write_template(tmp_path, "{{ bos_token }}{{ messages[0].content | tojson }}{{ eos_token }}")
    assert render_chat(tmp_path, [{"role": "user", "content": "é"}]) == '<s>"é"</s>'


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    assert render_chat(tmp_path, [{"role": "user", "content": "hi"}]) is None


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
    ],
)
def test_a_hostile_or_broken_template_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError, match="a conversation that the chat template takes"):
        render_chat(write_template(tmp_path, source), [{"role": "user", "content": "hi"}])
