"""Any model input becomes one checkpoint in Hugging Face layout: the first step of every recipe."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from edgekit.artifact import Artifact
from edgekit.errors import InputError
from edgekit.huggingface import load_model, load_tokenizer, quiet
from edgekit.model import model_shape
from edgekit.stage import Facts, StageContext, StageParams, stage
from edgekit.tools import copy_file

ROUND_TRIP_TEXTS = (
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.\n\n    indented(code) == 42;\n",
    "naïve café, 東京, Ελλάδα, 🙂 and \t tabs",
    "1234567890 3.14159 x**2 + y**2",
)


class Params(StageParams):
    """Parameters of `checkpoint`."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type that an imported GGUF's weights are stored in; a Hugging Face directory keeps its own."""
    trust_remote_code: bool = False
    """Run the model's own Python code (`auto_map`). Only for publishers you trust."""


@stage(version=1, takes="source", gives="checkpoint", tools=("transformers", "torch", "accelerate", "gguf"))
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Copy or import the model, and check its tokenizer and chat template by round trip."""
    if model.facts.get("remote_code") and not params.trust_remote_code:
        raise InputError(
            "a model without code of its own",
            f"auto_map in {model.path / 'config.json'}",
            "read that code, then pass --set checkpoint.trust_remote_code=true",
        )
    if model.facts["format"] == "gguf":
        _import_gguf(model, out, params)
    else:
        for index, name in enumerate(model.manifest.files):
            copy_file(model.path / name, out / name)
            ctx.progress(index + 1, len(model.manifest.files), "files")
    tokenizer = load_tokenizer(out, trust_remote_code=params.trust_remote_code)
    check_round_trip(tokenizer, out)
    shape = model_shape(model)
    return {
        **model.facts,
        "source_digest": model.digest,
        "parameters": shape.parameters,
        "layers": shape.layers,
        "vocabulary": shape.vocabulary,
        "context_tokens": shape.context_tokens,
        "chat_template": check_chat_template(tokenizer, out),
        "trust_remote_code": params.trust_remote_code,
    }


def check_round_trip(tokenizer: Any, place: Path) -> None:
    """Encode and decode sample texts. Raises InputError when text is lost."""
    for text in ROUND_TRIP_TEXTS:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back.strip() != text.strip():
            raise InputError(
                f"a tokenizer in {place} that round-trips {text!r}", repr(back), "check the tokenizer's files"
            )


def check_chat_template(tokenizer: Any, place: Path) -> bool:
    """Render a short conversation. Returns whether there is a template; raises InputError when it fails."""
    if not tokenizer.chat_template:
        return False
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "ping-7c1"}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of the publisher's
        raise InputError(f"a working chat template in {place}", str(error), "fix or remove the chat template") from None
    if "ping-7c1" not in text:
        raise InputError(f"a chat template in {place} that keeps the message", repr(text[:80]), "fix the chat template")
    return True


def _import_gguf(model: Artifact, out: Path, params: Params) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    (file_name,) = model.manifest.files
    with _parse_once():
        tokenizer = load_tokenizer(model.path, gguf_file=file_name)
        _check_against_llama_cpp(model.path / file_name, tokenizer)
        loaded = load_model(model.path, gguf_file=file_name)
    settings = loaded.config.to_dict()
    # transformers keeps the GGUF origin in the config and then refuses to save; build it anew without
    for stale in ("quantization_config", "_name_or_path"):
        settings.pop(stale, None)
    with quiet(), torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.to(getattr(torch, params.dtype))
    if not all(bool(p.isfinite().all()) for p in plain.parameters()):
        raise InputError(f"weights that fit {params.dtype}", "an overflow", "pass --set checkpoint.dtype=float32")
    with quiet():
        plain.generation_config = GenerationConfig.from_model_config(plain.config)
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
    _repeat_rope_theta(out / "config.json")


@contextlib.contextmanager
def _parse_once() -> Iterator[None]:
    """Let transformers parse a GGUF once instead of for tokenizer, config and weights, and map names once."""
    import gguf

    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield


def _check_against_llama_cpp(path: Path, tokenizer: Any) -> None:
    from edgekit.engines import llama_cpp

    with llama_cpp.open_vocabulary(path) as vocabulary:
        for text in ROUND_TRIP_TEXTS:
            ours, theirs = tokenizer(text, add_special_tokens=False)["input_ids"], vocabulary.tokenize(text)
            if ours != theirs:
                raise InputError(
                    f"the tokens that llama.cpp gives for {text!r}",
                    f"{ours} instead of {theirs} from the imported tokenizer of {path}",
                    "use the publisher's Hugging Face directory",
                )


def _repeat_rope_theta(path: Path) -> None:
    # transformers 4 reads only a top-level rope_theta, and silently builds another model without it
    config = json.loads(path.read_text())
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        config.setdefault("rope_theta", theta)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
