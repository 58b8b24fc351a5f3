"""The real pipeline on tiny models, from a checkpoint to bundles in their place."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny

from edgekit.calibration import token_windows
from edgekit.errors import EdgekitError, InputError, ToolError
from edgekit.formats import gguf
from edgekit.huggingface import load_tokenizer
from edgekit.model import model_shape, resolve_model
from edgekit.stage import StageContext
from edgekit.stages import gguf as gguf_stage
from edgekit.stages.evaluate import read_evaluation
from edgekit.stages.gguf import FILE_TYPES
from edgekit.stages.imatrix import read_imatrix
from edgekit.store import Store

SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"


def steps(document: Any, target: int = 0) -> dict[str, str]:
    """Status by stage; of several evaluations the last."""
    return {step["stage"]: step["status"] for step in document["targets"][target]["steps"]}


def header_types(path: Path) -> dict[str, str]:
    return {t.name: t.type for t in gguf.read_header(path).tensors}


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


# --- what one build of two targets leaves


def test_a_second_target_executes_only_what_differs(
    bundles: Any, warm_store: Store, tiny_hf: Path, tmp_path: Path
) -> None:
    first, second = steps(bundles.document, 0), steps(bundles.document, 1)
    assert set(first.values()) == {"executed"}
    assert second == dict.fromkeys(first, "cached")
    asked = ("--target", "raspberry-pi-5", "--recipe", "gguf-q4-0", "--set", "gguf.feedback=false", "--json")
    other = tiny.edgekit("build", tiny_hf, *asked, *tiny.QUICK, "--out", tmp_path / "dist")
    assert steps(other.json) == {**dict.fromkeys(first, "cached"), "gguf": "executed", "evaluate": "executed"}
    documents = (bundles.document, other.json)
    keys = [{s["key"] for s in document["targets"][0]["steps"]} for document in documents]
    assert len(keys[0] & keys[1]) == len(keys[0]) - 2


def test_bundles_are_in_their_place_and_hold_only_what_the_manifest_says(bundles: Any) -> None:
    assert sorted(p.name for p in bundles.out.iterdir()) == ["jetson-orin-nano-super", "raspberry-pi-5"]
    for place in bundles.out.iterdir():
        manifest = json.loads((place / "manifest.json").read_text())
        listed = {name: entry["sha256"] for name, entry in {**manifest["files"], **manifest["measurements"]}.items()}
        found = hashes(place)
        del found["manifest.json"]
        assert found == listed
        assert {"model.gguf", "settings.json", "tokenizer/tokenizer.json"} <= set(manifest["files"])


def test_report_follows_its_published_schema(bundles: Any) -> None:
    schema = json.loads((SCHEMAS / "report.schema.json").read_text())
    report = json.loads((bundles.jetson / "report.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(report)
    assert {
        "weight_bytes",
        "bundle_bytes",
        "perplexity",
        "kl_divergence_nats",
        "top1_agreement",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "load_s",
        "peak_rss_bytes",
    } <= {m["name"] for m in report["measurements"]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({**report, "surprise": 1})


def test_conversion_to_f16_changes_nothing(bundles: Any) -> None:
    report = json.loads((bundles.jetson / "report.json").read_text())
    (value,) = (m["value"] for m in report["measurements"] if (m["of"], m["name"]) == ("convert", "kl_divergence_nats"))
    assert 0 <= value <= 1e-4


def test_predicted_weight_bytes_are_the_measured_ones(bundles: Any, tiny_hf: Path) -> None:
    planned = tiny.plan_of(tiny_hf).weight_bytes
    header = gguf.read_header(bundles.model)
    report = json.loads((bundles.jetson / "report.json").read_text())
    (said,) = (m["value"] for m in report["measurements"] if m["name"] == "weight_bytes")
    # a third way: the file's size without its header and padding
    assert planned == header.weight_bytes == said
    assert 0 <= bundles.model.stat().st_size - planned < 64 << 10


# --- again, elsewhere, and with the store emptied


def build(model: Path, out: Path, *more: str | Path) -> tiny.Result:
    asked = ("--target", "jetson", "--recipe", "gguf-q4", "--out", out, "--json")
    return tiny.edgekit("build", model, *asked, *tiny.QUICK, *more)


def test_second_run_executes_nothing(bundles: Any, warm_store: Store, tiny_hf: Path, tmp_path: Path) -> None:
    result = build(tiny_hf, tmp_path / "again")
    assert result.code == 0, result.stderr
    assert set(steps(result.json).values()) == {"cached"}
    assert result.json["targets"][0]["digest"] == bundles.document["targets"][0]["digest"]


def test_a_moved_model_is_the_same_model(warm_store: Store, tiny_hf: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(tiny_hf, moved)
    assert resolve_model(str(moved)).artifact.digest == resolve_model(str(tiny_hf)).artifact.digest
    built = tiny.build_in(warm_store, tiny.plan_of(moved))
    assert {step.status for step in built.steps} == {"cached"}


def test_an_emptied_store_gives_the_same_payload(
    bundles: Any, warm_store: Store, tiny_hf: Path, tmp_path: Path
) -> None:
    assert tiny.edgekit("cache", "gc", "--all").code == 0
    assert list(warm_store.objects()) == []
    result = build(tiny_hf, tmp_path / "dist")
    assert result.code == 0, result.stderr
    assert set(steps(result.json).values()) == {"executed"}
    assert result.json["targets"][0]["digest"] == bundles.document["targets"][0]["digest"]
    one, two = hashes(bundles.jetson), hashes(tmp_path / "dist" / "jetson-orin-nano-super")
    varying = {"manifest.json", "report.json", "report.md", "report.html"}
    assert {k: v for k, v in one.items() if k not in varying} == {k: v for k, v in two.items() if k not in varying}


def test_a_failed_gate_is_exit_3_with_bundle_and_report(
    warm_store: Store, tiny_hf: Path, tmp_path: Path, write_recipe: Any
) -> None:
    text = (Path(gguf_stage.__file__).parents[1] / "catalog" / "recipes" / "gguf-q4.yaml").read_text()
    recipe = write_recipe(text.replace("max: 0.3", "max: 1e-9").replace("name: gguf-q4", "name: mine"))
    result = build(tiny_hf, tmp_path / "dist", "--recipe", recipe)
    assert result.code == 3
    assert "kl_divergence_nats <= 1e-09" in result.stderr
    place = tmp_path / "dist" / "jetson-orin-nano-super"
    report = json.loads((place / "report.json").read_text())
    assert [g["passed"] for g in report["gates"]] == [True, False, True]
    assert (place / "manifest.json").is_file()
    # gates are no part of a step: nothing ran again
    assert set(steps(result.json).values()) == {"cached"}


# --- other inputs


def test_shards_give_the_same_model_file(bundles: Any, warm_store: Store, tmp_path: Path) -> None:
    sharded = tiny.write_checkpoint(tmp_path / "sharded", shard_bytes=1 << 20)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    built = tiny.build_in(warm_store, tiny.plan_of(sharded))
    one, two = gguf.read_header(built.result.path / "model.gguf"), gguf.read_header(bundles.model)
    assert {k: v for k, v in two.metadata.items() if one.metadata.get(k) != v} == {}
    assert data_of(built.result.path / "model.gguf") == data_of(bundles.model)


def data_of(path: Path) -> dict[str, bytes]:
    import gguf as reader

    return {t.name: bytes(t.data.tobytes()) for t in reader.GGUFReader(path).tensors}


def test_a_gguf_is_imported_and_checked_against_itself(warm_store: Store, tiny_gguf: Path, tiny_hf: Path) -> None:
    plan = tiny.plan_of(tiny_gguf)
    built = tiny.build_in(warm_store, plan)
    evaluations = {what: read_evaluation(artifact, what)[0] for what, artifact in built.evaluations}
    divergence = {w: next(m.value for m in ms if m.name == "kl_divergence_nats") for w, ms in evaluations.items()}
    assert set(divergence) == {"import", "convert", "bundle"}
    assert divergence["import"] < 1e-4
    assert divergence["convert"] < 1e-4
    assert "import" in {gate.of for gate in plan.gates}
    # f16 in, f16 kept: the imported checkpoint holds the publisher's numbers
    assert tensors_of(built.checkpoint.path) == tensors_of(tiny_hf)


def tensors_of(directory: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    return {
        name: value.astype(np.float32).tobytes()
        for path in directory.glob("*.safetensors")
        for name, value in load_file(path).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_every_kind_of_model(kind: str, warm_store: Store, tmp_path: Path) -> None:
    plan = tiny.plan_of(tiny.write_checkpoint(tmp_path / kind, kind))
    built = tiny.build_in(warm_store, plan)
    measured = {m.name: m.value for m in read_evaluation(dict(built.evaluations)["convert"], "convert")[0]}
    assert measured["kl_divergence_nats"] < 1e-4
    found = {t.name: (t.type, t.shape) for t in gguf.read_header(built.result.path / "model.gguf").tensors}
    assert {t.name: (t.type, t.shape) for t in plan.tensors} == found


# --- the quantizer: what is predicted is what comes out


@pytest.fixture(scope="module")
def matrices(bundles: Any, tiny_hf: Path, tiny_288: Path) -> dict[int, Any]:
    """The importance matrix of either model, by hidden size."""
    found = {}
    for hidden, model in ((256, tiny_hf), (288, tiny_288)):
        found[hidden] = find_imatrix(bundles.store, model)
    return found


def find_imatrix(store: Store, model: Path) -> Any:
    plan = tiny.plan_of(model)
    built = tiny.build_in(store, plan)
    index = next(i for i, step in enumerate(plan.steps) if step.stage.name == "imatrix")
    record = store.lookup(built.steps[index].key)
    assert record is not None
    return store.open(record.digest)


@pytest.mark.parametrize("hidden", [256, 288])
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_file_type_is_predicted_exactly(
    file_type: str,
    hidden: int,
    tiny_gguf: Path,
    tiny_gguf_288: Path,
    tiny_hf: Path,
    tiny_288: Path,
    matrices: dict[int, Any],
    tmp_path: Path,
) -> None:
    source, checkpoint = (tiny_gguf, tiny_hf) if hidden == 256 else (tiny_gguf_288, tiny_288)
    shape = model_shape(resolve_model(str(checkpoint)).artifact)
    params = gguf_stage.Params(type=file_type)
    weights = read_imatrix(matrices[hidden].path / "imatrix.gguf")
    target = tmp_path / "model.gguf"
    try:
        gguf_stage.quantize(source, target, params, weights)
    except (InputError, ToolError) as error:
        # refused: then the plan must refuse as well
        with pytest.raises(type(error)):
            gguf_stage.predict(shape.tensors, params, frozenset({"imatrix"}))
        return
    header = gguf.read_header(target)
    predicted, _ = gguf_stage.predict(shape.tensors, params, frozenset({"imatrix"}))
    assert {t.name: (t.shape, t.type) for t in predicted} == {t.name: (t.shape, t.type) for t in header.tensors}
    assert sum(gguf.tensor_bytes(t.type, t.shape) for t in predicted) == header.weight_bytes


def test_fallbacks_are_told(matrices: dict[int, Any], tiny_gguf_288: Path, tmp_path: Path) -> None:
    params = gguf_stage.Params(type="Q4_K_M")
    weights = read_imatrix(matrices[288].path / "imatrix.gguf")
    decision = gguf_stage.quantize(tiny_gguf_288, tmp_path / "model.gguf", params, weights)
    written = header_types(tmp_path / "model.gguf")
    assert decision.fallbacks
    for fallback in decision.fallbacks:
        assert written[fallback["tensor"]] == fallback["found"] != fallback["wanted"]


@pytest.mark.parametrize("file_type", ["IQ1_S", "IQ2_XXS", "IQ2_M", "IQ3_XS", "Q2_K_S"])
def test_types_that_need_a_matrix_say_so(file_type: str, tiny_gguf: Path, tiny_hf: Path, tmp_path: Path) -> None:
    tensors = model_shape(resolve_model(str(tiny_hf)).artifact).tensors
    model = _artifact(tiny_gguf, tmp_path)
    with pytest.raises(InputError, match="importance matrix"):
        gguf_stage.predict(tensors, gguf_stage.Params(type=file_type), frozenset())
    with pytest.raises(InputError, match="importance matrix"):
        gguf_stage.run.run(model, tmp_path, gguf_stage.Params(type=file_type), StageContext(store=Store(tmp_path)))


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_without_a_matrix_plan_and_quantizer_agree(
    file_type: str, tiny_gguf: Path, tiny_hf: Path, tmp_path: Path
) -> None:
    params = gguf_stage.Params(type=file_type)
    tensors = model_shape(resolve_model(str(tiny_hf)).artifact).tensors
    outcomes = []
    for attempt in (
        lambda: gguf_stage.run.run(_artifact(tiny_gguf, tmp_path), tmp_path, params, StageContext(Store(tmp_path))),
        lambda: gguf_stage.predict(tensors, params, frozenset()),
    ):
        try:
            attempt()
            outcomes.append("done")
        except EdgekitError as error:
            outcomes.append(type(error).__name__)
    assert outcomes[0] == outcomes[1]
    if outcomes[0] == "done":
        predicted, _ = gguf_stage.predict(tensors, params, frozenset())
        assert {t.name: t.type for t in predicted} == header_types(tmp_path / "model.gguf")


def _artifact(path: Path, scratch: Path) -> Any:
    from edgekit.artifact import seal

    directory = scratch / "source"
    if not directory.exists():
        directory.mkdir()
        shutil.copyfile(path, directory / "model.gguf")
    return seal(directory, "gguf", {"name": "tiny"})


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"type": "Q4_K_M", "output_type": "q8_0"}, {"output.weight": "q8_0"}),
        ({"type": "Q4_K_M", "token_embedding_type": "f16"}, {"token_embd.weight": "f16"}),
        (
            {"type": "Q4_K_M", "tensor_types": {"ffn_down": "q8_0"}},
            {"blk.0.ffn_down.weight": "q8_0", "blk.1.ffn_down.weight": "q8_0"},
        ),
        (
            {"type": "Q4_0", "tensor_types": {r"blk\.1\.attn_q": "q6_K"}},
            {"blk.0.attn_q.weight": "q4_0", "blk.1.attn_q.weight": "q6_K"},
        ),
        (
            {"type": "Q4_K_S", "pure": True},
            {"output.weight": "q4_K", "token_embd.weight": "q4_K", "blk.0.attn_v.weight": "q4_K"},
        ),
    ],
)
def test_overrides_take_effect_and_are_predicted(
    params: dict[str, Any], expected: dict[str, str], tiny_gguf: Path, tiny_hf: Path, tmp_path: Path
) -> None:
    chosen = gguf_stage.Params(**params)
    plain = gguf_stage.Params(type=params["type"])
    gguf_stage.quantize(tiny_gguf, tmp_path / "changed.gguf", chosen, None)
    gguf_stage.quantize(tiny_gguf, tmp_path / "plain.gguf", plain, None)
    changed, before = header_types(tmp_path / "changed.gguf"), header_types(tmp_path / "plain.gguf")
    assert {name: changed[name] for name in expected} == expected
    if not chosen.pure:
        assert {name for name in changed if changed[name] != before[name]} <= set(expected)
    assert changed != before
    predicted, _ = gguf_stage.predict(model_shape(resolve_model(str(tiny_hf)).artifact).tensors, chosen, frozenset())
    assert {t.name: t.type for t in predicted} == changed


def test_set_reaches_the_quantizer(warm_store: Store, tiny_hf: Path, tmp_path: Path) -> None:
    result = build(tiny_hf, tmp_path / "dist", "--set", "gguf.type=Q5_K_M")
    assert result.code == 0, result.stderr
    changed = steps(result.json)
    assert changed["gguf"] == "executed"
    assert changed["imatrix"] == changed["convert"] == changed["checkpoint"] == "cached"
    types = set(header_types(tmp_path / "dist" / "jetson-orin-nano-super" / "model.gguf").values())
    assert types == {"f32", "q5_K", "q6_K"}


def test_the_same_bytes_as_llama_cpp_itself(
    bundles: Any, tiny_gguf: Path, matrices: dict[int, Any], tmp_path: Path
) -> None:
    # llama.cpp's own API, called here from scratch with the same matrix
    import gguf as reader
    from llama_cpp import llama_cpp as api

    stored = {t.name: np.array(t.data) for t in reader.GGUFReader(matrices[256].path / "imatrix.gguf").tensors}
    names = sorted(name[: -len(".in_sum2")] for name in stored if name.endswith(".in_sum2"))
    means = [np.ascontiguousarray(stored[f"{n}.in_sum2"].ravel() / stored[f"{n}.counts"].item()) for n in names]
    table = (api.llama_model_imatrix_data * (len(names) + 1))()
    for i, (name, mean) in enumerate(zip(names, means, strict=True)):
        table[i].name = name.encode()
        table[i].data = mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        table[i].size = mean.size
    for ours, matrix in ((bundles.model, table), (None, None)):
        params = api.llama_model_quantize_default_params()
        params.ftype = api.LLAMA_FTYPE_MOSTLY_Q4_K_M
        params.imatrix = matrix
        theirs = tmp_path / f"{ours is None}.gguf"
        assert api.llama_model_quantize(str(tiny_gguf).encode(), str(theirs).encode(), ctypes.byref(params)) == 0
        # and without it the bytes differ: the matrix was really used
        assert (data_of(theirs) == data_of(bundles.model)) is (ours is not None)


# --- the importance matrix against an implementation of the model in numpy


def test_importance_matrix_is_the_sum_of_squared_inputs(matrices: dict[int, Any], tiny_hf: Path) -> None:
    from safetensors.numpy import load_file

    weights = {k: v.astype(np.float64) for k, v in load_file(tiny_hf / "model.safetensors").items()}
    tokenizer = load_tokenizer(tiny_hf)
    windows = token_windows(
        "python-docs", "calibration", 4, 128, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], 1
    )
    inputs: dict[str, Any] = {}
    for window in windows:
        for name, x in llama_inputs(weights, window, heads=4, kv_heads=2).items():
            inputs[name] = inputs.get(name, 0) + (x**2).sum(axis=0)
    found = read_imatrix(matrices[256].path / "imatrix.gguf")
    assert set(found) == set(inputs)
    for name, total in inputs.items():
        np.testing.assert_allclose(found[name], total / windows.size, rtol=2e-4, err_msg=name)


def llama_inputs(weights: dict[str, Any], tokens: Any, *, heads: int, kv_heads: int) -> dict[str, Any]:
    """Inputs of every matrix of a llama (arXiv:2302.13971), by GGUF name, in float64."""

    def norm(x: Any, name: str) -> Any:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * weights[name]

    def split(x: Any, count: int) -> Any:
        return x.reshape(len(x), count, -1).transpose(1, 0, 2)

    def rotate(x: Any) -> Any:
        half = x.shape[-1] // 2
        angle = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)

    seen = {}
    hidden = weights["model.embed_tokens.weight"][tokens]
    causal = np.triu(np.full((len(tokens), len(tokens)), -np.inf), k=1)
    for layer in range(2):
        base, short = f"model.layers.{layer}", f"blk.{layer}"
        x = norm(hidden, f"{base}.input_layernorm.weight")
        for part in "qkv":
            seen[f"{short}.attn_{part}.weight"] = x
        q, k, v = (x @ weights[f"{base}.self_attn.{part}_proj.weight"].T for part in "qkv")
        q, k, v = rotate(split(q, heads)), rotate(split(k, kv_heads)), split(v, kv_heads)
        k, v = (np.repeat(y, heads // kv_heads, axis=0) for y in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]) + causal
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (scores / scores.sum(axis=-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(tokens), -1)
        seen[f"{short}.attn_output.weight"] = mixed
        hidden = hidden + mixed @ weights[f"{base}.self_attn.o_proj.weight"].T
        x = norm(hidden, f"{base}.post_attention_layernorm.weight")
        seen[f"{short}.ffn_gate.weight"] = seen[f"{short}.ffn_up.weight"] = x
        gate, up = (x @ weights[f"{base}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = gate / (1 + np.exp(-gate)) * up
        seen[f"{short}.ffn_down.weight"] = x
        hidden = hidden + x @ weights[f"{base}.mlp.down_proj.weight"].T
    return seen


def test_importance_matrix_is_what_llama_cpps_tools_read(matrices: dict[int, Any]) -> None:
    # the keys of `llama-quantize --imatrix` (tools/quantize/quantize.cpp, load_imatrix)
    import gguf as reader

    file = reader.GGUFReader(matrices[256].path / "imatrix.gguf")
    fields = {name: field.contents() for name, field in file.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["python-docs"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (4, 128)
    sums = {t.name for t in file.tensors if t.name.endswith(".in_sum2")}
    counts = {t.name: np.array(t.data) for t in file.tensors if t.name.endswith(".counts")}
    assert len(sums) + len(counts) == len(file.tensors)
    assert {re.sub("in_sum2$", "counts", name) for name in sums} == set(counts)
    assert {int(value.item()) for value in counts.values()} == {4 * 128}
    assert all(t.tensor_type == reader.GGMLQuantizationType.F32 for t in file.tensors)
