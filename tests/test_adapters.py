"""Adapters of every method, trained here: merged equals unmerged, precomputed equals PEFT, and nothing gets by."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import pytest
import tiny

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from edgekit.adapter import MERGED, PREPENDED, Adapter, check_adapter, read_adapter, resolve_adapter, side_adapters
from edgekit.artifact import Artifact, Manifest, describe_files, relative_files
from edgekit.decode import Options, Session, find_strategy
from edgekit.engine import Engine, EngineOptions, Entry
from edgekit.engines import llama_cpp
from edgekit.errors import InputError, ToolError
from edgekit.formats import llama_state
from edgekit.huggingface import load_model
from edgekit.model import ModelShape, Source, model_shape, resolve_model
from edgekit.prefix import Prefixed, load_prefix, read_prefix, write_prefix
from edgekit.stage import Facts, StageContext, find_stage
from edgekit.stages import merge as merging
from edgekit.store import Store

TOKENS = list(range(5, 45))
PROMPT = "The planner reads the header of a checkpoint and says"
CONTEXT = 128


def answer_greedily(engine: Engine, tokens: list[int], count: int) -> list[int]:
    """Up to `count` greedy tokens; the engine's sequences are free again afterwards."""
    session = Session(engine, tokens, Options(max_tokens=count))
    (*_, answer) = find_strategy("greedy")(session)
    session.close()
    return list(answer.tokens)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than a tiny model is worth."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in float32: nothing is lost in its files."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("adapters") / "tiny", dtype="float32")


@pytest.fixture(scope="module")
def trained(base: Path) -> Callable[..., Path]:
    """Train an adapter once; further arguments change its configuration."""

    def train(method: str, name: str = "", **changes: Any) -> Path:
        place = base.parent / f"{method}{name}"
        if place.exists():
            return place
        options = {key: changes.pop(key) for key in ("steps", "rate", "rows", "quantization", "seed") if key in changes}
        with adapters.quiet():
            return adapters.train(base, place, adapters.config_of(method, **changes), **options)

    return train


@pytest.fixture
def copy(trained: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a trained adapter with other settings in its configuration."""

    def make(method: str = "lora", **changes: Any) -> Path:
        place = tmp_path / "adapter"
        shutil.copytree(trained(method), place)
        if changes:
            tiny.edit_json(place / "adapter_config.json", **changes)
        return place

    return make


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    """Documents that begin as the text that adapters are trained on."""
    path = base.parent / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{tiny.TEXT}{number}"}) + "\n" for number in range(8)))
    return path


@pytest.fixture(scope="module")
def merge(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Facts]]:
    """Run the stage; returns the checkpoint and its facts."""
    stage = find_stage("merge")

    def run(
        *places: Path | str, weights: tuple[float, ...] = (), onto: str = "auto", model: Path = base, **more: int
    ) -> Any:
        out = tmp_path_factory.mktemp("merged")
        side = {f"adapter.{i}": resolve_adapter(str(place)).artifact for i, place in enumerate(places)}
        values = {"text": str(text), "windows": 2, "window_tokens": 48, "weights": weights, "onto": onto, **more}
        context = StageContext(Store(out / "none"), side)
        return out, stage.run(checkpoint(model), out, stage.params.model_validate(values), context)

    return run


def checkpoint(path: Path) -> Artifact:
    source = resolve_model(str(path)).artifact
    facts = {**source.facts, "trust_remote_code": False, "layers": 2}
    return Artifact(path, Manifest(kind="checkpoint", files=source.manifest.files, facts=facts))


def logits(network: Any, tokens: list[int] = TOKENS) -> Any:
    import torch

    with torch.inference_mode(), adapters.quiet():
        return network(input_ids=torch.tensor([tokens])).logits[0, -len(tokens) :].double()


def with_adapter(base: Path, *places: Path) -> Any:
    """The model as PEFT itself opens it: all but the last adapter merged, the last one not."""
    import peft

    with adapters.quiet():
        network = load_model(base)
        for place in places[:-1]:
            network = peft.PeftModel.from_pretrained(network, str(place)).merge_and_unload()
        return peft.PeftModel.from_pretrained(network, str(places[-1])).eval()


def parameters(path: Path) -> dict[str, Any]:
    return dict(load_model(path).state_dict())


def figures(facts: Facts) -> dict[str, float]:
    """The figures that a stage hands to the report."""
    return {figure["name"]: figure["value"] for figure in facts["measurements"]}


def test_every_method_is_tried() -> None:
    assert set(adapters.MERGEABLE) == set(MERGED)
    assert set(adapters.PROMPTS) == set(PREPENDED)


SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("lora", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "dora-embedding": ("dora", {"target_modules": ["embed_tokens", "v_proj"]}),
    "saved": ("lora", {"modules_to_save": ["lm_head", "model.norm"]}),
    "tokens": ("lora", {"trainable_token_indices": [7, 11, 30]}),
    "patterns": ("lora", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}),
    "regex": ("lora", {"target_modules": r".*layers\.1\..*(q_proj|o_proj)"}),
    "unsaved": ("vera", {"save_projection": False}),
    "projection": ("lora", {"layers_to_transform": [1]}),
}


@pytest.mark.parametrize("method", [*adapters.MERGEABLE, *SPECIAL])
def test_merged_equals_base_and_adapter(
    method: str, base: Path, trained: Callable[..., Path], merge: Callable[..., Any]
) -> None:
    kind, changes = SPECIAL.get(method, (method, {}))
    place = trained(kind, f"-{method}" if changes else "", **changes)
    adapter = resolve_adapter(str(place))
    notes = check_adapter(adapter, *planned(base))
    out, facts = merge(place)
    wanted = logits(with_adapter(base, place))
    assert float((logits(load_model(out)) - wanted).abs().max()) < 1.3e-4
    assert float((logits(load_model(base)) - wanted).abs().max()) > 0.05
    assert figures(facts)["max_logit_difference"] < 1.3e-4
    assert figures(facts)["logit_change"] > 0.05
    assert figures(facts)["rounding_logit_difference"] == 0
    assert facts["architecture"] == "llama"
    assert [told["method"] for told in facts["adapters"]] == [kind]
    assert adapter.artifact.facts["rank"] in {"ia3": [None], "oft": [None], "vera": [16], "adalora": range(1, 7)}.get(
        kind, [4]
    )
    assert bool(notes) == (method == "unsaved")
    assert sorted(relative_files(out)) == sorted(checkpoint(base).manifest.files)


def planned(path: Path) -> tuple[Source, ModelShape]:
    source = resolve_model(str(path))
    return source, model_shape(source.artifact)


def test_merging_is_deterministic(trained: Callable[..., Path], merge: Callable[..., Any]) -> None:
    first, second = (merge(trained("dora")) for _ in range(2))
    assert first[1] == second[1]
    names = sorted(relative_files(first[0]))
    assert describe_files(first[0], names) == describe_files(second[0], names)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "vera"])
def test_a_weight_scales_what_the_adapter_adds(
    method: str, base: Path, trained: Callable[..., Path], merge: Callable[..., Any]
) -> None:
    place = trained(method)
    out, facts = merge(place, weights=(-0.5,))
    plain, whole, scaled = parameters(base), parameters(merge(place)[0]), parameters(out)
    for name, value in scaled.items():
        expected = plain[name] - 0.5 * (whole[name] - plain[name])
        assert float((value - expected).abs().max()) < 1e-6, name
    assert facts["adapters"][0]["weight"] == -0.5
    if method == "lora":  # PEFT's own scale means the same
        model = with_adapter(base, place)
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(-0.5)
        assert float((logits(model) - logits(load_model(out))).abs().max()) < 1.3e-4


def test_adapters_are_merged_one_after_the_other(
    base: Path, trained: Callable[..., Path], merge: Callable[..., Any]
) -> None:
    # DoRA divides by the norm of what it finds: the order matters
    first, second = trained("lora"), trained("dora", "-2", seed=2)
    out, facts = merge(first, second)
    wanted = logits(with_adapter(base, first, second))
    assert float((logits(load_model(out)) - wanted).abs().max()) < 1.3e-4
    assert float((logits(with_adapter(base, second, first)) - wanted).abs().max()) > 1e-3
    assert [told["method"] for told in facts["adapters"]] == ["lora", "dora"]
    with pytest.raises(InputError, match="one weight per adapter"):
        merge(first, weights=(1.0, 1.0))


def test_weights_are_stored_in_the_types_of_the_base(
    tiny_hf: Path, trained: Callable[..., Path], merge: Callable[..., Any]
) -> None:
    out, facts = merge(trained("lora"), model=tiny_hf)
    assert 1e-4 < figures(facts)["rounding_logit_difference"] < 0.05
    import torch
    from safetensors.torch import load_file

    before, after = (load_file(path / "model.safetensors") for path in (tiny_hf, out))
    assert before.keys() == after.keys()
    assert {value.dtype for value in after.values()} == {torch.float16}
    changed = {name.rpartition(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == set(adapters.LINEARS)


def test_an_overflow_of_the_stored_type_is_an_error(
    tiny_hf: Path, trained: Callable[..., Path], merge: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match="fit float16"):
        merge(trained("lora"), weights=(3e7,), model=tiny_hf)


def test_a_wrong_merge_is_an_error(
    trained: Callable[..., Path], merge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_fold", lambda model, weight: model.unload())
    with pytest.raises(ToolError, match="merged logits within"):
        merge(trained("lora"))


# QLoRA


def nf4(double_quant: bool = True) -> Any:
    import torch
    import transformers

    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def qlora(trained: Callable[..., Path]) -> Path:
    return trained("lora", "-nf4", target_modules="all-linear", r=8, steps=30, rate=0.005, rows=8, quantization=nf4())


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_is_what_transformers_gives_back(base: Path, double_quant: bool) -> None:
    import torch
    import transformers

    with adapters.quiet():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, quantization_config=nf4(double_quant)
        ).dequantize()
    ours = load_model(base)
    merging.quantize_nf4(ours, double_quant=double_quant)
    wanted = theirs.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in ours.state_dict().items())


def test_an_adapter_of_a_quantized_base_goes_onto_that_base(
    base: Path, qlora: Path, merge: Callable[..., Any], tmp_path: Path
) -> None:
    import peft
    import torch
    import transformers

    # nothing in the files says it, so it goes onto the original, and the report tells
    _, unsure = merge(qlora, windows=1)
    assert unsure["onto"] == "original"
    assert figures(unsure)["loss_nf4_nats"] < 0.9 * figures(unsure)["loss_original_nats"]
    assert any("merge.onto=nf4" in note for note in unsure["notes"])

    told = shutil.copytree(qlora, tmp_path / "told")
    tiny.edit_json(told / "adapter_config.json", base_model_name_or_path="somebody/tiny-bnb-4bit")
    out, facts = merge(told, windows=1)
    assert facts["onto"] == "nf4"
    assert figures(facts)["loss_nf4_nats"] == pytest.approx(figures(unsure)["loss_nf4_nats"], rel=0.05)
    assert not any("merge.onto" in note for note in facts["notes"])
    with adapters.quiet():
        live = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=nf4())
        live = peft.PeftModel.from_pretrained(live, str(qlora)).eval()
    for module in live.modules():
        # some processors would compute in bfloat16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert float((logits(load_model(out)) - logits(live)).abs().max()) < 1e-3
    wrong, _ = merge(told, onto="original")
    assert float((logits(load_model(wrong)) - logits(live)).abs().max()) > 0.05


CARD = "---\nlibrary_name: peft\n---\n- load_in_8bit: False\n- load_in_4bit: True\n- bnb_4bit_quant_type: {}\n{}"


@pytest.mark.parametrize(
    ("config", "card", "expected"),
    [
        ({}, "", ("unknown", False)),
        ({}, CARD.format("nf4", "- bnb_4bit_use_double_quant: True\n"), ("nf4", True)),
        ({}, CARD.format("nf4", ""), ("nf4", False)),
        ({}, CARD.format("fp4", ""), ("fp4", False)),
        ({}, "- load_in_8bit: True\n- load_in_4bit: False\n", ("int8", False)),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "", ("nf4", False)),
        ({"base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit"}, "", ("nf4", True)),
        ({"base_model_name_or_path": "meta/llama-3-8b"}, "", ("unknown", False)),
    ],
)
def test_what_an_adapter_was_trained_on(
    copy: Callable[..., Path], config: dict[str, Any], card: str, expected: tuple[str, bool]
) -> None:
    place = copy(**config)
    (place / "README.md").write_text(card)
    facts = resolve_adapter(str(place)).artifact.facts
    assert (facts["trained_on"], facts["double_quant"]) == expected


def test_loha_has_no_quantized_layers(trained: Callable[..., Path]) -> None:
    assert resolve_adapter(str(trained("loha"))).artifact.facts["trained_on"] == "full"


# what is refused before anything is computed


def test_resolving_is_pure(trained: Callable[..., Path], copy: Callable[..., Path]) -> None:
    adapter = resolve_adapter(f"{trained('lora')}=0.5")
    assert adapter.weight == 0.5
    assert adapter.artifact.kind == "adapter"
    place = copy()
    (place / "adapter_model.bin").write_bytes(b"never read")
    again = resolve_adapter(str(place))
    assert again.artifact.digest == adapter.artifact.digest
    assert again.weight == 1
    renamed = place.rename(place.with_name("a=b"))
    assert resolve_adapter(str(renamed)).weight == 1
    many = {f"adapter.{i}": Artifact(Path(str(i)), adapter.artifact.manifest) for i in (10, 2, 0)}
    assert [a.path.name for a in side_adapters({**many, "checkpoint": adapter.artifact})] == ["0", "2", "10"]


@pytest.mark.parametrize("weight", ["", "much", "nan", "inf", "0"])
def test_bad_weights(trained: Callable[..., Path], weight: str) -> None:
    with pytest.raises(InputError, match="finite weight"):
        resolve_adapter(f"{trained('lora')}={weight}")


@pytest.mark.parametrize(("method", "name"), [("oft", ""), ("prompt", ""), ("lora", "-saved"), ("lora", "-tokens")])
def test_weights_without_a_meaning(trained: Callable[..., Path], method: str, name: str) -> None:
    place = trained(method, name, **SPECIAL[name[1:]][1] if name else {})
    with pytest.raises(InputError, match="no meaning"):
        resolve_adapter(f"{place}=0.5")


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"peft_type": "BOTTLENECK"}, "non-linearity"),
    "no kind": ({"peft_type": ["LORA"]}, "known kind"),
    "typo": ({"peft_type": "LORAA"}, "did you mean 'LORA'"),
    "module": ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config"),
    "activated": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "unknown": ({"brand_new_option": True}, "brand_new_option"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changed the base's weights"),
    "regex": ({"alpha_pattern": {"((a+)+)+$": 1}}, "alpha_pattern"),
    "alpha": ({"lora_alpha": "8; rm"}, "lora_alpha"),
    "rank": ({"r": 1 << 40}, "usable r"),
    "bias": ({"bias": {"a": 1}}, "usable bias"),
    "saved": ({"modules_to_save": ["(.*)*"]}, "modules_to_save"),
    "tokens": ({"trainable_token_indices": [-1]}, "trainable_token_indices"),
    "dora": ({"use_dora": True}, "lora_magnitude_vector"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configurations(name: str, base: Path, copy: Callable[..., Path]) -> None:
    changes, told = BAD_CONFIGS[name]
    with pytest.raises(InputError, match=told.replace("(", r"\(")):
        check_adapter(resolve_adapter(str(copy(**changes))), *planned(base))


def test_bad_files(copy: Callable[..., Path], tmp_path: Path) -> None:
    place = copy()
    weights, config = place / "adapter_model.safetensors", place / "adapter_config.json"
    with pytest.raises(InputError, match="no directory"):
        resolve_adapter(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="which is a file"):
        resolve_adapter(str(weights))
    good = weights.read_bytes()
    weights.write_bytes(good[:-8])
    with pytest.raises(InputError, match="whole safetensors file"):
        resolve_adapter(str(place))
    weights.unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        resolve_adapter(str(place))
    (place / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="run code when loaded"):
        resolve_adapter(str(place))
    weights.write_bytes(good)
    for broken in ("{", "[]", '{"a": ' * 100_000):
        config.write_text(broken)
        with pytest.raises(InputError, match="JSON"):
            resolve_adapter(str(place))
    config.unlink()
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        resolve_adapter(str(place))


def rewrite(place: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Adapter:
    from safetensors.torch import load_file, save_file

    weights = place / "adapter_model.safetensors"
    save_file({name: value.contiguous() for name, value in change(load_file(weights)).items()}, weights)
    return resolve_adapter(str(place))


LAYER = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("method", adapters.MERGEABLE)
def test_the_first_tensor_that_does_not_fit_is_named(
    method: str, trained: Callable[..., Path], tmp_path: Path, tiny_288: Path
) -> None:
    adapter = resolve_adapter(str(trained(method)))
    with pytest.raises(InputError, match=r"model\.layers\.\d\.\w+\.\w+\.[\w.]+ of shape .*found shape"):
        check_adapter(adapter, *planned(tiny_288))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_must_fit(method: str, trained: Callable[..., Path], tiny_288: Path) -> None:
    with pytest.raises(InputError, match=r"prompt_embeddings of shape \(5, "):
        check_adapter(resolve_adapter(str(trained(method))), *planned(tiny_288))


def test_modules_that_the_model_lacks(base: Path, copy: Callable[..., Path]) -> None:
    adapter = rewrite(copy(), lambda t: {name.replace("layers.1", "layers.7"): value for name, value in t.items()})
    with pytest.raises(InputError, match=r"none: model\.layers\.7"):
        check_adapter(adapter, *planned(base))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: {n: v for n, v in t.items() if n != f"{LAYER}.lora_B.weight"}, r"no lora_B\.weight"),
        (lambda t: {**t, f"{LAYER}.lora_magnitude_vector": t[f"{LAYER}.lora_B.weight"][:, 0]}, "as well"),
        (lambda t: {**t, "other.weight": t[f"{LAYER}.lora_A.weight"] * 1}, "'other.weight'"),
        (lambda t: {**t, f"{LAYER}.lora_C.weight": t[f"{LAYER}.lora_A.weight"] * 1}, "lora_C"),
        (lambda t: {f"{_PRE}model.norm.weight": next(iter(t.values()))[0]}, "tensors for modules"),
    ],
)
def test_tensors_that_make_no_adapter(base: Path, copy: Callable[..., Path], change: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_adapter(rewrite(copy(), change), *planned(base))


_PRE = "base_model.model."


def test_a_tied_head_is_left_alone(tiny_288: Path, tmp_path: Path) -> None:
    config = adapters.config_of("lora", target_modules=["embed_tokens", "q_proj"])
    adapter = resolve_adapter(str(adapters.train(tiny_288, tmp_path / "tied", config, steps=1)))
    with pytest.raises(InputError, match="tied head"):
        check_adapter(adapter, *planned(tiny_288))


def test_single_tokens_of_a_tied_model(tiny_288: Path, tmp_path: Path, merge: Callable[..., Any]) -> None:
    config = adapters.config_of("lora", trainable_token_indices=[7, 11])
    place = adapters.train(tiny_288, tmp_path / "tokens", config)
    check_adapter(resolve_adapter(str(place)), *planned(tiny_288))
    out, _ = merge(place, model=tiny_288)
    merged = load_model(out)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    wanted = logits(with_adapter(tiny_288, place))
    assert float((logits(merged) - wanted).abs().max()) < 0.02  # float16
    assert float((logits(load_model(tiny_288)) - wanted).abs().max()) > 0.05


def test_another_base_is_a_note(base: Path, copy: Callable[..., Path]) -> None:
    place = copy()
    for name in ("somewhere/tiny", "somebody/Tiny-unsloth-bnb-4bit", str(base), ""):
        tiny.edit_json(place / "adapter_config.json", base_model_name_or_path=name)
        assert check_adapter(resolve_adapter(str(place)), *planned(base)) == ()
    tiny.edit_json(place / "adapter_config.json", base_model_name_or_path="meta-llama/Llama-3.2-1B")
    (note,) = check_adapter(resolve_adapter(str(place)), *planned(base))
    assert "trained on 'meta-llama/Llama-3.2-1B'" in note


def test_an_adapter_that_changed_since_it_was_planned(
    base: Path, copy: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    adapter = resolve_adapter(str(copy()))
    tiny.edit_json(adapter.artifact.path / "adapter_config.json", lora_alpha=80)
    stage = find_stage("merge")
    with pytest.raises(InputError, match="other content than before"):
        stage.run(
            checkpoint(base),
            tmp_path,
            stage.params.model_validate({"text": str(text)}),
            StageContext(Store(tmp_path / "none"), {"adapter.0": adapter.artifact}),
        )


def test_weights_that_are_no_numbers_are_the_adapters_fault(
    copy: Callable[..., Path], merge: Callable[..., tuple[Path, Facts]]
) -> None:
    place = copy()
    rewrite(place, lambda tensors: {name: tensor * float("nan") for name, tensor in tensors.items()})
    with pytest.raises(InputError, match=r"finite weights in .*safetensors.*NaN or infinity in base_model"):
        merge(place)


# what stands before the text


def convert(base: Path, tools: Path, out: Path) -> Artifact:
    """A tiny model as an f32 GGUF file."""
    stage = find_stage("convert")
    facts = stage.run(
        checkpoint(base), out, stage.params.model_validate({"type": "f32"}), StageContext(Store(tools.parent))
    )
    return Artifact(out, Manifest(kind="gguf", files=describe_files(out, ["model.gguf"]), facts=facts))


@pytest.fixture(scope="module")
def gguf(base: Path, tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return convert(base, tools, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def prefix(gguf: Artifact, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Facts]]:
    stage = find_stage("prefix")

    def run(*places: Path, **params: Any) -> tuple[Path, Facts]:
        out = tmp_path_factory.mktemp("prefix")
        side = {f"adapter.{i}": resolve_adapter(str(place)).artifact for i, place in enumerate(places)}
        context = StageContext(Store(out / "none"), {**side, "checkpoint": checkpoint(base)})
        facts = stage.run(gguf, out, stage.params.model_validate(params), context)
        return out / "prefix.state", facts

    return run


@pytest.fixture(scope="module")
def engine(gguf: Artifact) -> Iterator[llama_cpp.LlamaCpp]:
    options = EngineOptions(context_tokens=CONTEXT, sequences=4, threads=1)
    with llama_cpp.open_model(gguf.path / "model.gguf", options) as opened:
        yield opened


def digest(gguf: Artifact) -> str:
    return gguf.manifest.files["model.gguf"].sha256


def score(engine: Engine, tokens: list[int]) -> Any:
    import torch

    sequence = engine.start()
    rows = engine.step([Entry(sequence, token) for token in tokens]).logits
    engine.release(sequence)
    return torch.from_numpy(rows).double()


def kld(wanted: Any, found: Any) -> float:
    wanted, found = wanted.log_softmax(-1), found.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("method", [*adapters.PROMPTS, "projected"])
def test_virtual_tokens_are_those_of_peft(
    method: str,
    base: Path,
    gguf: Artifact,
    engine: llama_cpp.LlamaCpp,
    trained: Callable[..., Path],
    prefix: Callable[..., Any],
) -> None:
    import torch

    place = trained(method)
    assert check_adapter(resolve_adapter(str(place)), *planned(base)) == ()
    path, facts = prefix(place)
    assert (facts["virtual"], facts["tokens"]) == (adapters.VIRTUAL_TOKENS, 0)
    theirs = with_adapter(base, place)
    tokens = engine.tokenize(PROMPT, special=True)
    loaded = load_prefix(engine, path, model_sha256=digest(gguf), kv_type="f16")
    assert not loaded.computed
    ours = Prefixed(engine, loaded)
    wanted = logits(theirs, tokens)
    assert kld(wanted, score(ours, tokens)) < 1e-5
    assert kld(wanted, score(engine, tokens)) > 0.05
    with torch.inference_mode(), adapters.quiet():
        answer = theirs.generate(
            input_ids=torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )[0, len(tokens) :].tolist()
    assert answer_greedily(ours, tokens, 12) == [token for token in answer if token not in engine.end_tokens][:12]
    engine.release(loaded.sequence)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method"), [("qwen3", "prefix"), ("gemma2", "prompt"), ("gemma3_text", "prompt")])
def test_virtual_tokens_of_other_architectures(kind: str, method: str, tools: Path, tmp_path: Path) -> None:
    # qwen3 turns halves, not neighbours; llama.cpp's gemma2 scales input embeddings, gemma3 does not
    base = tiny.write_checkpoint(tmp_path / "tiny", kind, dtype="float32")
    (tmp_path / "gguf").mkdir()
    gguf = convert(base, tools, tmp_path / "gguf")
    stage = find_stage("prefix")

    def run(method: str) -> Path:
        place = adapters.train(base, tmp_path / method, adapters.config_of(method))
        adapter = resolve_adapter(str(place))
        check_adapter(adapter, *planned(base))
        (out := tmp_path / f"{method}-out").mkdir()
        side = {"adapter.0": adapter.artifact, "checkpoint": checkpoint(base)}
        stage.run(gguf, out, stage.params(), StageContext(Store(out), side))
        return out / "prefix.state"

    path = run(method)
    with llama_cpp.open_model(gguf.path / "model.gguf", EngineOptions(CONTEXT, sequences=2, threads=1)) as engine:
        loaded = load_prefix(engine, path, model_sha256=digest(gguf), kv_type="f16")
        wanted = logits(with_adapter(base, tmp_path / method))
        assert kld(wanted, score(Prefixed(engine, loaded), TOKENS)) < 3e-5
    if kind.startswith("gemma"):
        with pytest.raises(InputError, match="sliding windows"):
            run("prefix")


def test_a_system_prompt_costs_nothing_again(
    base: Path, gguf: Artifact, engine: llama_cpp.LlamaCpp, prefix: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit.chat import render_chat

    system = "You are a helpful owl."
    path, facts = prefix(system=system)
    assert facts["virtual"] == 0
    loaded = load_prefix(engine, path, model_sha256=digest(gguf), kv_type="f16")
    ours = Prefixed(engine, loaded)
    stepped: list[int] = []
    real = engine.step
    monkeypatch.setattr(engine, "step", lambda entries, **more: stepped.append(len(entries)) or real(entries, **more))
    for message in ("Why?", "a", "1", "<|system|>"):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": message}]
        tokens = engine.tokenize(str(render_chat(base, messages)), special=True)
        assert tuple(tokens[: len(loaded.tokens)]) == loaded.tokens
        plain = answer_greedily(engine, tokens, 8)
        stepped.clear()
        assert answer_greedily(ours, tokens, 8) == plain
        assert stepped[0] == len(tokens) - len(loaded.tokens)
    assert len(loaded.tokens) > 10
    # another prompt keeps what it shares and computes the rest
    other = [*loaded.tokens[:6], 9, 8, 7]
    assert kld(score(engine, other), score(ours, other)) < 1e-9
    # the prefix alone: its last token is asked for logits
    assert kld(score(engine, list(loaded.tokens)), score(ours, list(loaded.tokens))) < 1e-9
    engine.release(loaded.sequence)


def test_virtual_tokens_before_a_system_prompt(
    base: Path, gguf: Artifact, engine: llama_cpp.LlamaCpp, trained: Callable[..., Path], prefix: Callable[..., Any]
) -> None:
    import torch

    for method in ("prompt", "prefix"):
        path, facts = prefix(trained(method), system="Be brief.")
        loaded = load_prefix(engine, path, model_sha256=digest(gguf), kv_type="f16")
        assert facts["positions"] == engine.length(loaded.sequence) == len(loaded.tokens) + adapters.VIRTUAL_TOKENS
        tokens = [*loaded.tokens, 40, 41, 42]
        ours = Prefixed(engine, loaded)
        sequence = ours.start()
        ours.step([Entry(sequence, token, wants_logits=False) for token in tokens[:-1]])
        copy = ours.fork(sequence)
        found = ours.step([Entry(copy, tokens[-1])]).logits
        assert ours.length(copy) == len(tokens)
        wanted = logits(with_adapter(base, trained(method)), tokens)[-1:]
        assert kld(wanted, torch.from_numpy(found).double()) < 1e-5
        for name in (sequence, copy):
            ours.release(name)
        engine.release(loaded.sequence)


def test_forks_and_rewinds_of_prefixed_sequences(
    gguf: Artifact, engine: llama_cpp.LlamaCpp, prefix: Callable[..., Any]
) -> None:
    path, _ = prefix(system="You are a helpful owl.")
    loaded = load_prefix(engine, path, model_sha256=digest(gguf), kv_type="f16")
    ours = Prefixed(engine, loaded)
    assert ours.capabilities.sequences == engine.capabilities.sequences - 1
    assert (ours.vocabulary_size, ours.end_tokens) == (engine.vocabulary_size, engine.end_tokens)
    assert ours.tokenize("a") == engine.tokenize("a")
    assert ours.detokenize([40]) == engine.detokenize([40])
    tokens = [*loaded.tokens, 30, 31, 32]
    wanted = score(engine, tokens)
    sequence = ours.start()
    assert ours.length(sequence) == 0
    ours.step([Entry(sequence, token, wants_logits=False) for token in tokens[:4]])
    assert ours.length(sequence) == 4
    ours.truncate(sequence, 2)
    ours.step([Entry(sequence, token, wants_logits=False) for token in tokens[2:-1]])
    ours.truncate(sequence, 3)
    rows = ours.step([Entry(sequence, token) for token in tokens[3:]]).logits
    assert float(np.abs(rows - wanted.numpy()[3:]).max()) < 1e-4
    for call in (lambda: ours.truncate(sequence, 99), lambda: ours.length(77), lambda: ours.release(77)):
        with pytest.raises(InputError):
            call()
    ours.release(sequence)
    engine.release(loaded.sequence)
    lonely = EngineOptions(context_tokens=8, threads=1)
    with llama_cpp.open_model(gguf.path / "model.gguf", lonely) as small, pytest.raises(InputError, match="to spare"):
        Prefixed(small, loaded)


def test_a_state_that_does_not_fit_is_computed_again(
    gguf: Artifact, trained: Callable[..., Path], prefix: Callable[..., Any]
) -> None:
    options = EngineOptions(context_tokens=32, sequences=2, threads=1, kv_type="q8_0")
    with llama_cpp.open_model(gguf.path / "model.gguf", options) as other:
        for places, more in (((trained("prompt"),), {}), ((), {"system": "Be brief."})):
            path, facts = prefix(*places, **more)
            loaded = load_prefix(other, path, model_sha256=digest(gguf), kv_type="q8_0")
            assert loaded.computed
            assert other.length(loaded.sequence) == facts["positions"]
            other.release(loaded.sequence)
        matching, _ = prefix(trained("prompt"), kv_type="q8_0")
        assert not load_prefix(other, matching, model_sha256=digest(gguf), kv_type="q8_0").computed
        with pytest.raises(InputError, match="q8_0 KV cache"):
            load_prefix(other, prefix(trained("prefix"))[0], model_sha256=digest(gguf), kv_type="q8_0")
    with pytest.raises(InputError, match="f16 KV cache for prefix tuning"):
        prefix(trained("prefix"), kv_type="q8_0")


def test_prefixes_that_cannot_be(
    gguf: Artifact, engine: llama_cpp.LlamaCpp, trained: Callable[..., Path], prefix: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="neither"):
        prefix()
    with pytest.raises(InputError, match="neither"):
        prefix(trained("lora"))
    with pytest.raises(InputError, match="one adapter of virtual tokens"):
        prefix(trained("prompt"), trained("ptuning"))
    path, _ = prefix(trained("prompt"))
    with pytest.raises(InputError, match="of the model"):
        load_prefix(engine, path, model_sha256="0" * 64, kv_type="f16")
    data = path.read_bytes()
    bad = tmp_path / "bad.state"
    start = len(b"edgekit-prefix-1") + 4
    for damaged in (
        b"", data[:10], data[:-1], data + b"x", b"other" + data, data[: start - 4] + b"\xff" * 4 + data[start:],
        data[:start] + b"[" * 50 + data[start + 50 :], data.replace(b'"virtual":5', b'"virtual":6'),
        data.replace(b'"virtual":5', b'"virtual":-'),
    ):  # fmt: skip
        bad.write_bytes(damaged)
        with pytest.raises(InputError, match="a prefix file at"):
            load_prefix(engine, bad, model_sha256=digest(gguf), kv_type="f16")
    with pytest.raises(InputError, match="a prefix file at"):
        read_prefix(tmp_path / "none")
    again = tmp_path / "again.state"
    write_prefix(again, read_prefix(path))
    assert again.read_bytes() == data
    options = EngineOptions(context_tokens=4, sequences=1, threads=1)
    small = llama_cpp.open_model(gguf.path / "model.gguf", options)
    with small, pytest.raises(InputError, match="a context longer than"):
        load_prefix(small, path, model_sha256=digest(gguf), kv_type="f16")


def test_a_state_comes_back(engine: llama_cpp.LlamaCpp) -> None:
    sequence = engine.start()
    engine.step([Entry(sequence, token) for token in TOKENS])
    state = engine.save(sequence)
    wanted = engine.step([Entry(sequence, 50)]).logits
    engine.release(sequence)
    other = engine.start()
    engine.step([Entry(other, 9)])
    back = engine.load(state)
    assert engine.length(back) == len(TOKENS)
    assert float(np.abs(engine.step([Entry(back, 50)]).logits - wanted).max()) < 1e-4
    for name in (back, other):
        engine.release(name)
    empty = engine.start()
    with pytest.raises(ToolError, match="whole state of 0"):
        engine.save(empty)
    engine.release(empty)


def test_hostile_states_leave_everything_as_it_was(engine: llama_cpp.LlamaCpp) -> None:
    sequence = engine.start()
    engine.step([Entry(sequence, token) for token in TOKENS[:3]])
    state = engine.save(sequence)
    wanted = score(engine, TOKENS)
    random = np.random.default_rng(7)
    cases = [state[:size] for size in (0, 3, 8, 20, 60, len(state) - 1)] + [state + b"\0" * 16, b"\0" * len(state)]
    for offset in range(0, 72, 4):  # each number of the header and the cells in turn
        for value in (0, 1, 2, 0x7FFFFFFF, 0xFFFFFFFF):
            cases.append(state[:offset] + struct.pack("<I", value) + state[offset + 4 :])
    for _ in range(100):
        noisy = bytearray(state)
        noisy[int(random.integers(len(noisy)))] ^= int(random.integers(1, 256))
        cases.append(bytes(noisy))
    refused = 0
    for case in cases:
        try:
            engine.release(engine.load(case))
        except InputError:
            refused += 1
    assert refused > 60
    assert engine.length(sequence) == 3
    assert kld(wanted, score(engine, TOKENS)) < 1e-9
    engine.release(sequence)
    _, (cache,) = llama_state.read_state(state)
    assert len(cache.keys) == len(cache.values) == 2
    assert cache.keys[0].nbytes == 3 * 2 * 64 * 2


def test_a_state_longer_than_the_context(gguf: Artifact, engine: llama_cpp.LlamaCpp) -> None:
    sequence = engine.start()
    engine.step([Entry(sequence, token) for token in TOKENS])
    state = engine.save(sequence)
    engine.release(sequence)
    with llama_cpp.open_model(
        gguf.path / "model.gguf", EngineOptions(context_tokens=16, sequences=8, threads=1)
    ) as small:
        with pytest.raises(InputError, match="at most 16 positions"):
            small.load(state)
        assert small.start() >= 0


def test_contents_name_what_is_replaced(trained: Callable[..., Path]) -> None:
    contents = read_adapter(trained("lora", "-saved", **SPECIAL["saved"][1]))
    assert set(contents.whole) == {"lm_head.weight", "model.norm.weight"}
    assert not contents.scalable
