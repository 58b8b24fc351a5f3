"""Named text sets: what calibration and evaluation read, deterministic, with a digest, and disjoint.

A set is one YAML file in `catalog/calibration/`, or the path of the user's own .txt, .md or .jsonl file. Its
documents fall into two splits by the hash of each document, so that calibration text and evaluation
text of one set, or of sets that share documents, never meet.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import sysconfig
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveFloat, PositiveInt

from edgekit.artifact import canonical_sha256
from edgekit.config import Document, Strict
from edgekit.errors import InputError, ToolError, suggest

CATALOG = Path(__file__).parent / "catalog" / "calibration"
Split = Literal["calibration", "evaluation"]
_EVALUATION_SHARE = 4
_PIECE_CHARACTERS = 4000
_MAX_CHARACTERS = 1 << 21
MAX_TOKENS = 1 << 24
"""Most tokens to take of a text whose length is not known beforehand: days of work for a model that writes them."""


class PythonDocs(Strict):
    """The language reference that ships with Python (`help('topics')`)."""

    kind: Literal["python-docs"]


class PythonCode(Strict):
    """Source code of the standard library's modules."""

    kind: Literal["python-code"]


class TextFile(Strict):
    """A file of the user: .jsonl with one document per line in `field`, else text."""

    kind: Literal["file"]
    path: str
    field: str = "text"


class Dataset(Strict):
    """A dataset on the hub, at a fixed revision so that its digest is known before it is fetched."""

    kind: Literal["dataset"]
    id: str
    revision: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    documents: PositiveInt = 2000


class Generated(Strict):
    """Text that the model itself writes, by sampling from its beginning-of-text token. Calibration only."""

    kind: Literal["generated"]
    temperature: PositiveFloat = 1.0
    seed: int = 0


class TextSet(Strict):
    """A declared text set."""

    name: str
    description: str
    source: Annotated[PythonDocs | PythonCode | TextFile | Dataset | Generated, Field(discriminator="kind")]


def text_set_names() -> tuple[str, ...]:
    """Names of the sets in the catalog."""
    return tuple(sorted(path.stem for path in CATALOG.glob("*.yaml")))


@cache
def find_text_set(name: str) -> TextSet:
    """Return a set by name, or one made of a user's file by its path. Raises InputError."""
    path = Path(name).expanduser()
    if name.endswith((".yaml", ".yml")):
        return _load(path)
    if name in text_set_names():
        return _load(CATALOG / f"{name}.yaml")
    if path.is_file():
        return TextSet(name=path.stem, description=f"the file {path}", source=TextFile(kind="file", path=str(path)))
    known = text_set_names()
    raise InputError(
        "a text set or a file of text", f"{name!r}{suggest(name, known)}", f"use one of {', '.join(known)}, or a path"
    )


@cache
def text_digest(name: str) -> str:
    """Digest of what the set says, not of its name or place.

    Sets whose text depends on the model or lives on the hub are identified by their declaration.
    """
    source = find_text_set(name).source
    if isinstance(source, Generated | Dataset):
        return canonical_sha256(source.model_dump())
    return canonical_sha256([hashlib.sha256(d.encode()).hexdigest() for d in _documents(name)])


def token_windows(
    name: str, split: Split, count: int, length: int, encode: Callable[[str], list[int]], bos: int | None
) -> npt.NDArray[np.int32]:
    """Cut a set's text into token windows, shape (count, length), each begun with `bos` if there is one.

    Documents follow each other in the order of their hashes, so that every window is a fair sample.

    Raises InputError when the text is empty or too short.
    """
    body = length - (bos is not None)
    needed = count * body
    tokens: list[int] = []
    for piece in pieces(name, split):
        tokens.extend(encode(piece))
        if len(tokens) >= needed:
            break
    if len(tokens) < needed:
        raise InputError(
            f"{needed} tokens of {split} text in {name!r}", f"{len(tokens)}", "give more text, or fewer windows"
        )
    windows = np.array(tokens[:needed], dtype=np.int32).reshape(count, body)
    if bos is None:
        return windows
    return np.concatenate([np.full((count, 1), bos, np.int32), windows], axis=1)


def check_text(name: str, split: Split, tokens: int = 1) -> None:
    """Raise InputError unless the set exists and may have that many tokens in the split, as far as that can be known.

    No tokenizer is asked: a text has at most a token for each of its bytes, and one for the beginning of each piece.
    """
    source = find_text_set(name).source
    if isinstance(source, Dataset) or (isinstance(source, Generated) and split == "calibration"):
        most = MAX_TOKENS
    else:
        most = sum(len(piece.encode()) + 1 for piece in pieces(name, split))
        if not most:
            raise InputError(f"{split} text in {name!r}", "none", "give more text, in several documents")
    if tokens > most:
        raise InputError(
            f"{tokens} tokens of {split} text in {name!r}", f"at most {most}", "give more text, or fewer windows"
        )


def pieces(name: str, split: Split) -> Iterable[str]:
    """Yield the split's text in pieces of at most a few thousand characters, in a fixed shuffled order."""
    cut: list[tuple[str, str]] = []
    for document in _documents(name):
        whole = hashlib.sha256(document.encode()).digest()
        if (whole[0] % _EVALUATION_SHARE == 0) != (split == "evaluation"):
            continue
        for start in range(0, len(document), _PIECE_CHARACTERS):
            piece = document[start : start + _PIECE_CHARACTERS]
            cut.append((hashlib.sha256(whole + start.to_bytes(8)).hexdigest(), piece))
    return (piece for _, piece in sorted(cut))


def generate_windows(
    source: Generated, model: Any, count: int, length: int, bos: int, progress: Callable[[int, int], None]
) -> npt.NDArray[np.int32]:
    """Sample windows from a loaded Hugging Face model, shape (count, length); deterministic for one machine."""
    import torch

    generator = torch.Generator().manual_seed(source.seed)
    tokens = torch.full((count, 1), bos, dtype=torch.long)
    past, step = None, tokens
    with torch.inference_mode():
        for position in range(1, length):
            output = model(step, past_key_values=past, use_cache=True)
            past = output.past_key_values
            probabilities = torch.softmax(output.logits[:, -1].float() / source.temperature, dim=-1)
            step = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, step], dim=1)
            progress(position + 1, length)
    return np.asarray(tokens.numpy(), dtype=np.int32)


def _load(path: Path) -> TextSet:
    document = Document(path)
    loaded = document.check(TextSet)
    if loaded and loaded.name != path.stem:
        document.problem(("name",), f"must be the file's name, {path.stem!r}")
    document.finish("text set")
    assert loaded is not None
    return loaded


@cache
def _documents(name: str) -> tuple[str, ...]:
    source = find_text_set(name).source
    if isinstance(source, Generated):
        raise InputError("text to evaluate on", f"{name!r}, which the model writes itself", "use another text set")
    if isinstance(source, PythonDocs):
        documents = _python_docs()
    elif isinstance(source, PythonCode):
        documents = _python_code()
    elif isinstance(source, TextFile):
        documents = _file(source)
    else:
        documents = _dataset(source)
    # the same document twice could not fall into both splits, but would count double
    return tuple(dict.fromkeys(d.strip() for d in documents if d.strip()))


def _python_docs() -> list[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise ToolError(
            "the documentation that ships with Python", "no module pydoc_data", "name a file of your own text instead"
        ) from None
    return [*topics.values()]


def _python_code() -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    documents, size = [], 0
    for path in sorted(library.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        documents.append(text)
        size += len(text)
        if size > _MAX_CHARACTERS:
            break
    return documents


def _file(source: TextFile) -> list[str]:
    path = Path(source.path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"text at {path}", error.strerror or str(error), "check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"UTF-8 text in {path}", f"an undecodable byte at {error.start}", "convert the file") from None
    if path.suffix != ".jsonl":
        return _paragraph_groups(text)
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[source.field]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"JSON with a field {source.field!r}", f"something else at {path}:{number}", "edit it"
            ) from None
        documents.append(str(value))
    return documents


def _paragraph_groups(text: str, characters: int = 2000) -> list[str]:
    """Cut running text at blank lines into documents of about `characters`."""
    groups: list[str] = []
    current = ""
    for paragraph in text.split("\n\n"):
        current = f"{current}\n\n{paragraph}" if current else paragraph
        if len(current) >= characters:
            groups.append(current)
            current = ""
    return [*groups, current]


def _dataset(source: Dataset) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise ToolError("the package datasets", "it is not installed", "pip install datasets") from None
    try:
        rows = datasets.load_dataset(source.id, source.config, split=source.split, revision=source.revision)
        return [str(row[source.field]) for row in rows.select(range(min(source.documents, len(rows))))]
    except KeyError:
        raise InputError(
            f"a field {source.field!r} in {source.id}", ", ".join(rows.column_names), "edit the set"
        ) from None
    except Exception as error:  # the hub's client raises many kinds; each means that the text is not to be had
        raise ToolError(
            f"the dataset {source.id}@{source.revision}",
            f"{type(error).__name__}",
            "connect to the network, or use a file",
        ) from None
