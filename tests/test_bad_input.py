"""What users get wrong: each mistake has its exit code, says wanted, found and next, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import EdgekitError, InputError
from edgekit.recipe import CATALOG, find_recipe
from edgekit.target import CATALOG as TARGETS
from edgekit.target import find_target

BUILD = ("--target", "jetson", *tiny.QUICK)


@pytest.fixture(autouse=True)
def place(empty_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store and an empty working directory."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


def refused(result: tiny.Result, code: int, *texts: str) -> None:
    """The error has its code and its three parts, and nothing was written."""
    assert result.code == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "a bug in edgekit" not in result.stderr
    error = result.stderr[result.stderr.index("error: ") :]
    assert re.match(r"error: wanted .+; found .+\n  next: \S+", error, re.DOTALL), error
    for text in texts:
        assert text in error, error
    out = Path("dist")
    assert not out.exists() or not list(out.iterdir()), list(out.rglob("*"))
    assert not list(Path(os.environ["EDGEKIT_CACHE"]).glob("tmp/*"))


# --- names


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("--target", "jetsn"), ("'jetsn'", "did you mean 'jetson'?")),
        (("--target", "zzz"), ("'zzz'", "edgekit targets list")),
        (("--target", "jetson", "--recipe", "gguf-q5"), ("'gguf-q5'", "did you mean 'gguf-q", "edgekit recipes list")),
        (("--target", "jetson", "--recipe", "nowhere.yaml"), ("nowhere.yaml", "No such file")),
        (("--target", "jetson", "--set", "gguff.type=Q4_0"), ("'gguff'", "did you mean 'gguf'?", "recipes show")),
        (("--target", "jetson", "--set", "gguf.tipe=Q4_0"), ("gguf.tipe", "did you mean 'type'?")),
        (("--target", "jetson", "--set", "gguf.type=Q4_KM"), ("'Q4_KM'", "did you mean 'Q4_K_M'?")),
        (("--target", "jetson", "--set", "gguf.type"), ("STAGE.PARAM=VALUE", "'gguf.type'")),
        (("--target", "jetson", "--set", "gguf.tensor_types={'(': q4_0}"), ("not a regular expression",)),
        (("--target", "jetson", "--set", "gguf.output_type=q9"), ("'q9'",)),
        (("--target", "jetson", "--set", "imatrix.windows=-1"), ("imatrix.windows", "greater than 0")),
        (("--target", "jetson", "--set", "imatrix.windows=[1"), ("imatrix.windows",)),
        (("--target", "jetson", "--set", "imatrix.text=nosuch"), ("'nosuch'", "python-docs")),
        (("--target", "jetson", "--set", "evaluation.text=python-doc"), ("did you mean 'python-docs'?",)),
        (("--target", "jetson", "--device", "locl"), ("did you mean 'local'?",)),
    ],
)
def test_wrong_names(arguments: tuple[str, ...], texts: tuple[str, ...], tiny_hf: Path, warm_store: Any) -> None:
    refused(tiny.edgekit("build", tiny_hf, *arguments), 2, *texts)


@pytest.mark.parametrize(
    ("model", "texts"),
    [
        ("./nowhere", ("no file or directory at nowhere",)),
        ("nowhere.gguf", ("no file or directory",)),
        ("not a model", ("'not a model'", "builtin:smollm2-135m")),
        ("builtin:smollm", ("did you mean 'builtin:smollm2-135m'?",)),
        ("/dev/null", ("/dev/null",)),
    ],
)
def test_wrong_models(model: str, texts: tuple[str, ...]) -> None:
    refused(tiny.edgekit("build", model, *BUILD), 2, *texts)


# --- damaged, incomplete and unsafe checkpoints


def truncate(path: Path, share: float = 0.5) -> None:
    with path.open("r+b") as stream:
        stream.truncate(int(path.stat().st_size * share))


def pickle_only(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def long_header(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


Damage = Callable[[Path], Any]
DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ("safetensors",)),
    "truncated weights": (lambda m: truncate(m / "model.safetensors"), ("model.safetensors", "bytes")),
    "truncated header": (lambda m: truncate(m / "model.safetensors", 1e-5), ("model.safetensors",)),
    "garbage weights": (lambda m: (m / "model.safetensors").write_bytes(b"garbage" * 99), ("model.safetensors",)),
    "a header of exabytes": (long_header, ("header of at most",)),
    "git lfs pointer": (
        lambda m: (m / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        ("Git LFS pointer", "git lfs pull"),
    ),
    "pickle only": (pickle_only, ("safetensors", "pytorch_model.bin")),
    "remote code": (
        lambda m: tiny.edit_json(m / "config.json", auto_map={"AutoConfig": "evil.Config"}),
        ("auto_map", "checkpoint.trust_remote_code=true"),
    ),
    "no config": (lambda m: (m / "config.json").unlink(), ("config.json",)),
    "config is no json": (lambda m: (m / "config.json").write_text("{"), ("valid JSON", "config.json")),
    "config is a list": (lambda m: (m / "config.json").write_text("[]"), ("a JSON object",)),
    "config nests too deeply": (lambda m: (m / "config.json").write_text("[" * 100_000), ("config.json",)),
    "unsupported": (
        lambda m: tiny.edit_json(m / "config.json", architectures=["LlamaForCausalLMs"]),
        ("supported architecture", "did you mean 'LlamaForCausalLM'?"),
    ),
    "a vision model": (lambda m: tiny.edit_json(m / "config.json", architectures=["ViTModel"]), ("ViTModel",)),
    "architectures is a number": (lambda m: tiny.edit_json(m / "config.json", architectures=3), ("architecture",)),
    "architectures holds a list": (lambda m: tiny.edit_json(m / "config.json", architectures=[[1]]), ("architecture",)),
    "no layers": (lambda m: tiny.edit_json(m / "config.json", num_hidden_layers=0), ("num_hidden_layers",)),
    "layers is text": (lambda m: tiny.edit_json(m / "config.json", num_hidden_layers="2"), ("num_hidden_layers",)),
    "too many layers": (lambda m: tiny.edit_json(m / "config.json", num_hidden_layers=3), ("missing",)),
    "another width": (lambda m: tiny.edit_json(m / "config.json", hidden_size=128), ("transformers",)),
    "another vocabulary": (lambda m: tiny.edit_json(m / "config.json", vocab_size=500), ("transformers",)),
    "no tokenizer": (
        lambda m: [p.unlink() for p in m.glob("tokenizer*")],
        ("a tokenizer", "tokenizer.json, tokenizer.model or vocab.json"),
    ),
    "damaged tokenizer": (lambda m: (m / "tokenizer.json").write_text('{"x": 1}'), ("tokenizer",)),
    "broken chat template": (
        lambda m: (m / "chat_template.jinja").write_text("{% for x in %}"),
        ("chat template",),
    ),
    "deaf chat template": (lambda m: (m / "chat_template.jinja").write_text("hi"), ("keeps the message",)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(name: str, tiny_hf: Path, tmp_path: Path) -> None:
    damage, texts = DAMAGES[name]
    model = tmp_path / "model"
    shutil.copytree(tiny_hf, model)
    damage(model)
    refused(tiny.edgekit("build", model, *BUILD), 2, *texts)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda m: sorted(m.glob("*.safetensors"))[1].unlink(), "model-00002"),
        (lambda m: truncate(sorted(m.glob("*.safetensors"))[0]), "model-00001"),
        (lambda m: (m / "model.safetensors.index.json").write_text("{"), "index.json"),
        (lambda m: tiny.edit_json(m / "model.safetensors.index.json", weight_map={"a": "../../etc/passwd"}), "passwd"),
    ],
)
def test_damaged_shards(damage: Damage, text: str, tmp_path: Path) -> None:
    model = tiny.write_checkpoint(tmp_path / "model", shard_bytes=1 << 20)
    damage(model)
    refused(tiny.edgekit("build", model, *BUILD), 2, text)


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.001, 0.01, 0.5, 0.999])
def test_truncated_gguf(share: float, tiny_gguf: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    shutil.copyfile(tiny_gguf, model)
    truncate(model, share)
    refused(tiny.edgekit("build", model, *BUILD), 2, "model.gguf")


@pytest.mark.parametrize("content", [b"garbage", b"GGUF", b"GGUF" + b"\xff" * 99, bytes(4096), b"GGML" + bytes(99)])
def test_garbage_gguf(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    refused(tiny.edgekit("build", tmp_path / "model.gguf", *BUILD), 2, "model.gguf")


def test_a_nan_in_the_weights(tiny_hf: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_hf, model)
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-200_000:-199_998] = b"\xff\x7f"
    path.write_bytes(content)
    result = tiny.edgekit("build", model, *BUILD)
    assert result.code in (2, 5), result.stderr
    refused(result, result.code)


# --- text


@pytest.mark.parametrize("name", ["imatrix", "evaluation"])
@pytest.mark.parametrize(
    ("content", "text"),
    [(b"", "found none"), (b"too short", "text in"), (b"\xff\xfe bytes", "UTF-8"), (b" \n \n", "found none")],
)
def test_bad_texts(name: str, content: bytes, text: str, tiny_hf: Path, tmp_path: Path, warm_store: Any) -> None:
    path = tmp_path / f"{name}-{len(content)}.txt"
    path.write_bytes(content)
    refused(tiny.edgekit("build", tiny_hf, *BUILD, "--set", f"{name}.text={path}"), 2, text, path.name)


def test_bad_lines(tiny_hf: Path, tmp_path: Path, warm_store: Any) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n{"txt": "two"}\n')
    refused(tiny.edgekit("build", tiny_hf, *BUILD, "--set", f"evaluation.text={path}"), 2, "text.jsonl:2")


# --- recipes


RECIPE = (CATALOG / "gguf-q4.yaml").read_text().replace("name: gguf-q4", "name: mine")


@pytest.mark.parametrize(
    ("old", "new", "texts"),
    [
        ("engine: llama_cpp", "engine: [", ("mine.yaml:6",)),
        (
            "engine: llama_cpp",
            "engin: llama_cpp",
            ("mine.yaml:4: engin: unknown field (did you mean 'engine'?)", "engine: is required"),
        ),
        ("engine: llama_cpp", "engine: llama_cp", ("mine.yaml:4: engine", "did you mean 'llama_cpp'?")),
        ("engine: llama_cpp", "engine: llama_cpp\nengine: llama_cpp", ("mine.yaml:5: engine: given twice",)),
        ("- gguf:", "- guff:", ("mine.yaml:8", "unknown stage (did you mean 'gguf'?)")),
        ("{type: Q4_K_M}", "{typ: Q4_K_M}", ("mine.yaml:8", "did you mean 'type'?")),
        ("{type: Q4_K_M}", "{type: Q4_K_X}", ("mine.yaml:8", "not a file type")),
        ("{type: Q4_K_M}", "Q4_K_M", ("mine.yaml:8",)),
        ("name: mine", "name: yours", ("must be the file's name, 'mine'",)),
        ("max: 0.3", "max: much", ("mine.yaml:12", "gates.1.max")),
        ("max: 0.3", "max: 0.3, min: 0.1", ("exactly one of max, min",)),
        ("of: convert", "of: konvert", ("'konvert' is not one of", "did you mean 'convert'?")),
        ("  - convert: {type: f16}\n  - imatrix", "  - imatrix", ("'convert' is not one of",)),
        ("  - gguf: {type: Q4_K_M}\n", "", ()),
        ("measure: perplexity", "measure: perplexitty", ("did you mean 'perplexity'",)),
        ("of: convert, measure: kl_divergence_nats", "of: convert, measure: load_s", ("unknown measurement",)),
        ("  - imatrix: {text: python-docs}", "  - imatrix: {text: python-dcos}", ("did you mean 'python-docs'",)),
        ("  - imatrix: {text: python-docs}\n  - gguf", "  - gguf: {}\n  - imatrix: {}\n  - gguf", ()),
        ("  - gguf:", "  - imatrix: {}\n  - gguf:", ()),
    ],
)
def test_bad_recipes(old: str, new: str, texts: tuple[str, ...], tiny_hf: Path, write_recipe: Any) -> None:
    assert old in RECIPE
    path = write_recipe(RECIPE.replace(old, new))
    result = tiny.edgekit("plan", tiny_hf, "--target", "jetson", "--recipe", path)
    if texts:
        refused(result, 2, *texts)
    else:
        assert result.code == 0


def _leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from _leaves(child, (*at, key))


PARSED = yaml.safe_load(RECIPE)
ODD: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(sorted(_leaves(PARSED), key=str)), value=ODD, key=st.none() | st.text(max_size=8))
def test_recipes_with_any_value_anywhere(place: tuple[Any, ...], value: Any, key: str | None, tmp_path: Path) -> None:
    document = yaml.safe_load(RECIPE)
    if place:
        *parents, last = place
        holder = document
        for part in parents:
            holder = holder[part]
        if key is not None and isinstance(holder, dict):
            holder[key] = holder.pop(last)
        else:
            holder[last] = value
    else:
        document = value
    _refuse_or_load(yaml.safe_dump(document, allow_unicode=True), tmp_path)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.integers(0, len(RECIPE)),
    length=st.integers(0, 12),
    text=st.text(max_size=6)
    | st.sampled_from(
        [
            "\t",
            "&a",
            "*a",
            "!!python/object:os.system",
            "{",
            "]",
            "- ",
            ": ",
            "\x00",
            "<<: ",
            "!!binary x",
            "---\n",
            "\ufeff",
        ]
    ),
)
def test_recipes_with_any_text_anywhere(cut: int, length: int, text: str, tmp_path: Path) -> None:
    _refuse_or_load(RECIPE[:cut] + text + RECIPE[cut + length :], tmp_path)


def _refuse_or_load(text: str, directory: Path) -> None:
    path = directory / "mine.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(InputError):
        recipe = find_recipe(str(path))
        json.dumps(recipe.describe())


# --- places


def test_out_holds_something_else(tiny_hf: Path, place: Path) -> None:
    theirs = place / "dist" / "jetson-orin-nano-super"
    theirs.mkdir(parents=True)
    (theirs / "thesis.tex").write_text("years of work")
    started = time.monotonic()
    result = tiny.edgekit("build", tiny_hf, *BUILD)
    assert (result.code, [p.name for p in theirs.iterdir()]) == (2, ["thesis.tex"])
    assert "something else, which is left alone" in result.stderr
    assert "choose another --out" in result.stderr
    # said before the work, not after it
    assert time.monotonic() - started < 5
    assert not list(Path(os.environ["EDGEKIT_CACHE"]).glob("objects/*"))


def test_out_is_a_file(tiny_hf: Path, place: Path) -> None:
    (place / "out").write_text("mine")
    for out in ("out", "out/below"):
        refused(tiny.edgekit("build", tiny_hf, *BUILD, "--out", out), 5, "writable directory", "choose another --out")
    assert (place / "out").read_text() == "mine"
    assert not list(Path(os.environ["EDGEKIT_CACHE"]).glob("objects/*"))


def test_a_file_where_the_bundle_goes(tiny_hf: Path, place: Path) -> None:
    (place / "dist").mkdir()
    (place / "dist" / "jetson-orin-nano-super").write_text("mine")
    result = tiny.edgekit("build", tiny_hf, *BUILD)
    assert result.code == 2
    assert (place / "dist" / "jetson-orin-nano-super").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_out_is_not_writable(tiny_hf: Path, place: Path) -> None:
    (place / "dist").mkdir(mode=0o500)
    refused(tiny.edgekit("build", tiny_hf, *BUILD), 5, "writable directory")


def test_the_store_is_a_file(tiny_hf: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "cache").touch()
    monkeypatch.setenv("EDGEKIT_CACHE", str(place / "cache"))
    refused(tiny.edgekit("build", tiny_hf, *BUILD), 5, "writable directory")


# --- what is not here


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    from huggingface_hub import hf_api

    monkeypatch.setattr(hf_api.api, "endpoint", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    result = tiny.edgekit("build", "no-such-org/no-such-model", *BUILD)
    refused(result, 5, "no-such-org/no-such-model", "no answer from the hub", "builtin:smollm2-135m")
    assert time.monotonic() - started < 20


# --- too large


def small_target(directory: Path, usable_mib: float) -> Path:
    text = (TARGETS / "raspberry-pi-5.yaml").read_text()
    document = yaml.safe_load(text)
    document |= {"name": "small", "aliases": []}
    document["memory"]["usable_bytes"]["value"] = int(usable_mib * (1 << 20))
    path = directory / "small.yaml"
    path.write_text(yaml.safe_dump(document))
    find_target(str(path))
    return path


@pytest.mark.parametrize("usable_mib", [3.6, 4.2, 4.6, 5.0])
def test_does_not_fit_and_what_would(usable_mib: float, tiny_hf: Path, place: Path, tmp_path: Path) -> None:
    target = small_target(tmp_path, usable_mib)
    result = tiny.edgekit("plan", tiny_hf, "--target", target, "--recipe", "gguf-q8", "--kv-type", "f16")
    refused(result, 4, "MiB of usable memory on small", "MiB needed (weights")
    advice = result.stderr.rpartition("next: ")[2].strip()
    options = [part.split() for part in advice.split("; or ")]
    if "choose a smaller model" in advice:
        return
    for option in options:
        again = tiny.edgekit("plan", tiny_hf, "--target", target, "--recipe", "gguf-q8", *option)
        assert again.code == 0, (option, again.stderr)


def test_a_context_longer_than_the_models_is_not_cut_in_silence(tiny_hf: Path) -> None:
    result = tiny.edgekit("plan", tiny_hf, "--target", "jetson", "--context", "9999999")
    refused(result, 2, "the model's context", "--context 9999999")


def test_far_too_large(tiny_hf: Path, tmp_path: Path) -> None:
    target = small_target(tmp_path, 0.01)
    refused(tiny.edgekit("build", tiny_hf, "--target", target), 4, "choose a smaller model or a larger target")


# --- as a document


def test_errors_are_json_where_json_was_asked_for(tiny_hf: Path) -> None:
    result = tiny.edgekit("build", tiny_hf, "--target", "jetsn", "--json")
    assert result.code == 2
    assert set(result.json["error"]) == {"exit_code", "wanted", "found", "next"}
    assert result.json["error"]["exit_code"] == 2


def test_every_error_has_a_code_of_its_own() -> None:
    def tree(kind: type[EdgekitError]) -> Iterator[type[EdgekitError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from tree(child)

    assert {kind.exit_code for kind in tree(EdgekitError)} == {1, 2, 3, 4, 5}
