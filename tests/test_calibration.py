from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from edgekit.calibration import (
    Generated,
    check_text,
    find_text_set,
    generate_windows,
    pieces,
    text_digest,
    text_set_names,
    token_windows,
)
from edgekit.errors import InputError
from edgekit.huggingface import load_model


def encode(text: str) -> list[int]:
    return list(text.encode())


def write_documents(path: Path, count: int = 200) -> Path:
    path.write_text("\n".join(f'{{"text": "document number {n} says {n * n}"}}' for n in range(count)))
    return path


@pytest.mark.parametrize("name", text_set_names())
def test_every_set_of_the_catalog_loads(name: str) -> None:
    assert find_text_set(name).description


@pytest.mark.parametrize("name", ["python-docs", "python-code"])
def test_sets_on_every_machine_are_long_enough_and_their_splits_share_no_window(name: str) -> None:
    calibration, evaluation = (
        {text[start : start + 200] for text in pieces(name, split) for start in range(0, len(text) - 200, 200)}
        for split in ("calibration", "evaluation")
    )
    assert sum(map(len, calibration)) > 200_000
    assert sum(map(len, evaluation)) > 30_000
    shared = calibration & evaluation
    # modules repeat licence headers; anything more would be a leak
    assert len(shared) <= 0.01 * len(evaluation)


def test_every_document_is_in_exactly_one_split(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "mine.jsonl")
    calibration, evaluation = (list(pieces(str(path), split)) for split in ("calibration", "evaluation"))
    assert len(calibration) + len(evaluation) == 200
    assert not set(calibration) & set(evaluation)
    assert 25 <= len(evaluation) <= 75


def test_the_digest_is_of_the_text_and_not_of_its_place(tmp_path: Path) -> None:
    one, two = write_documents(tmp_path / "one.jsonl"), write_documents(tmp_path / "two.jsonl")
    other = write_documents(tmp_path / "other.jsonl", count=199)
    assert text_digest(str(one)) == text_digest(str(two)) != text_digest(str(other))


def test_windows_are_deterministic_full_and_begin_with_bos(tmp_path: Path) -> None:
    name = str(write_documents(tmp_path / "mine.jsonl"))
    first, again = (token_windows(name, "calibration", 4, 64, encode, 1000) for _ in range(2))
    assert first.shape == (4, 64)
    assert first.dtype == np.int32
    assert (first == again).all()
    assert (first[:, 0] == 1000).all()
    plain = token_windows(name, "calibration", 4, 63, encode, None)
    assert (plain == first[:, 1:]).all()


def test_too_little_text_says_how_much_is_needed(tmp_path: Path) -> None:
    name = str(write_documents(tmp_path / "mine.jsonl", count=20))
    with pytest.raises(InputError, match="wanted 51100 tokens of calibration text"):
        token_windows(name, "calibration", 100, 512, encode, 1)


def test_text_that_the_model_writes_is_for_calibration_only() -> None:
    check_text("generated", "calibration")
    with pytest.raises(InputError, match="which the model writes itself"):
        check_text("generated", "evaluation")


def test_generated_text_is_the_same_for_a_seed_and_follows_the_model(tiny_hf: Path) -> None:
    model = load_model(tiny_hf)
    source = Generated(kind="generated", seed=3)
    windows, again, other = (
        generate_windows(s, model, 3, 24, 1, lambda done, total: None)
        for s in (source, source, Generated(kind="generated", seed=4))
    )
    assert windows.shape == (3, 24)
    assert (windows == again).all()
    assert (windows != other).any()
    assert windows.min() >= 0
    assert windows.max() < tiny.VOCABULARY
    # almost cold, sampling is the argmax of a forward pass without a cache
    cold = generate_windows(Generated(kind="generated", temperature=1e-6), model, 1, 8, 1, lambda done, total: None)
    import torch

    with torch.inference_mode():
        logits = model(torch.from_numpy(cold.astype(np.int64))).logits[0]
    assert (logits[:-1].argmax(dim=-1).numpy() == cold[0, 1:]).all()
