"""Tiny models made from scratch: every architecture of llama.cpp's kind in a fraction of a second, nothing downloaded.

The tokenizer is a SentencePiece model with byte fallback, which represents any text. llama.cpp's converter takes
such a file as it is, while it knows byte-level BPE tokenizers only by the hash of what they make of one text.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from edgekit.build import BuildEvents, Built, build
from edgekit.cli import main
from edgekit.model import resolve_model
from edgekit.plan import Plan, make_plan
from edgekit.recipe import find_recipe, parse_overrides
from edgekit.store import Store
from edgekit.target import find_target

TEXT = """\
A bundle holds the model, its tokenizer and its settings, and a manifest that names every file of it.
The planner reads the header of a checkpoint and says what the result will weigh before anything is computed.
The quick brown fox jumps over the lazy dog while seven wise owls count the stars above the river.
When a measurement lies outside its bound, the gate fails and the report says by how much.
The store keeps the result of every step under a key made of its inputs, its parameters and its tools.
A device with little memory wants a small type; a device with little bandwidth wants one even more.
If a file was damaged, the step that made it runs again, and nobody has to remember anything.
Numbers such as 1234567890 and 3.14159 are text, too, and so is def add(a, b): return a + b.
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VOCABULARY = 384
SMALL = ("evaluation.windows=4", "evaluation.window_tokens=128", "imatrix.windows=4", "imatrix.window_tokens=128")
"""Settings for short texts."""
QUICK = tuple(part for setting in SMALL for part in ("--set", setting))
READERS = ("sensitivity", "gguf", "gptq", "onnx_round")
"""Stages that read calibration text and round with feedback."""
ARCHITECTURES = ("llama", "llama-biases", "mistral", "qwen3", "gemma2", "gemma3_text")


def write_checkpoint(
    directory: Path,
    kind: str = "llama",
    *,
    hidden: int = 256,
    tied: bool = False,
    shard_bytes: int | None = None,
    dtype: str = "float16",
) -> Path:
    """Write a random model of two layers in Hugging Face layout; equal arguments give equal bytes."""
    import torch
    import transformers

    more: dict[str, Any] = {"attention_bias": True} if kind == "llama-biases" else {}
    if kind.startswith("gemma"):  # what its published models have, and all that llama.cpp knows
        more |= {"query_pre_attn_scalar": hidden // 4}
    config = transformers.AutoConfig.for_model(
        kind.removesuffix("-biases"),
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=tied or kind.startswith("gemma"),
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        **more,
    )
    with torch.random.fork_rng():
        torch.manual_seed(20240607)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms of ones and biases of zeros would hide that they are left out
                torch.nn.init.uniform_(parameter, *((-0.1, 0.1) if name.endswith("bias") else (0.8, 1.2)))
    model = model.to(getattr(torch, dtype))
    sharding = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    model.save_pretrained(directory, **sharding)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """Train the tokenizer on `TEXT` and write it in both forms, with a chat template."""
    import sentencepiece
    import transformers

    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=stream,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(stream.getvalue())
    tokenizer = transformers.LlamaTokenizer.from_pretrained(directory, legacy=False, add_bos_token=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    # the plain class takes tokenizer.json as it is; others replace parts of it by what the architecture usually has
    edit_json(directory / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


class Silent(BuildEvents):
    """Says nothing."""


@dataclass(frozen=True)
class Result:
    """What a command printed and how it ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def edgekit(*arguments: str | Path) -> Result:
    """Run the command line in this process, exactly as `edgekit ARGUMENTS` would."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["edgekit", *map(str, arguments)]),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def plan_of(model: Path, recipe: str = "gguf-q4", *settings: str, target: str = "jetson", small: bool = True) -> Plan:
    """Plan a build of a tiny model."""
    overrides = parse_overrides(settings)
    chosen = find_recipe(recipe, overrides)
    names = {stage.name for stage, _ in chosen.stages} | {"evaluation"}
    reading = [stage.name for stage, params in chosen.stages if params.text_fields and stage.name in READERS]
    quick = SMALL + tuple(f"{name}.{field}" for name in reading for field in ("windows=4", "window_tokens=128"))
    quick = tuple(setting for setting in quick if small and setting.partition(".")[0] in names)
    chosen = find_recipe(recipe, {**parse_overrides(quick), **overrides})
    return make_plan(resolve_model(str(model)), chosen, find_target(target))


def build_in(store: Store, plan: Plan) -> Built:
    """Build without a bundle."""
    return build(plan, store, Silent())


def write_reward_model(directory: Path, base: Path, labels: int, kind: str) -> Any:
    """A random reward model on the tiny model's trunk."""
    import torch
    import transformers

    classes = {
        "sequence": transformers.AutoModelForSequenceClassification,
        "token": transformers.AutoModelForTokenClassification,
    }
    torch.manual_seed(3)
    model = classes[kind].from_pretrained(base, num_labels=labels, dtype=torch.float32, pad_token_id=0).eval()
    torch.nn.init.normal_(model.score.weight, std=0.2)
    model.save_pretrained(directory, max_shard_size="400KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((base / name).read_bytes())
    return model
