"""The tokenizer of a checkpoint (`tokenizer.json`) over the package tokenizers, with the semantics of the protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgekit.errors import InputError, ToolError

_FILE = "tokenizer.json"
_MAX_JSON_BYTES = 64 << 20
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece's mark for a space
_END_NAMES = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<EOT>",
    "<|endoftext|>", "<|end_of_text|>", "</s>",
)  # fmt: skip
"""Control tokens that end a turn or a text wherever they are known: llama.cpp, too, tells them by their names, since
the configurations of many chat models leave theirs out."""


class Tokenizer:
    """Text to tokens and back, as transformers encodes and as llama.cpp decodes: piece by piece, to bytes.

    Byte-level BPE and SentencePiece models with byte fallback (or without, where they have `Metaspace`).
    """

    def __init__(self, directory: Path) -> None:
        """Raises InputError for files that are missing or damaged, ToolError without the package tokenizers."""
        path = directory / _FILE
        content = _read_object(path)
        if content is None:
            found = "only tokenizer.model" if (directory / "tokenizer.model").is_file() else "no such file"
            command = f"python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{directory}')"
            raise InputError(f"{path}", found, f"{command}.save_pretrained('{directory}')\"")
        kinds = set(_decoder_kinds(content.get("decoder")))
        self._byte_level = "ByteLevel" in kinds
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            wanted = f"a byte-level or SentencePiece tokenizer in {path}"
            raise InputError(wanted, f"a decoder of {', '.join(sorted(kinds)) or 'nothing'}", "use another model")
        self._byte_fallback = "ByteFallback" in kinds
        self._tokens = _load(path)
        self._settings = _read_object(directory / "tokenizer_config.json") or {}
        added = self._tokens.get_added_tokens_decoder()
        self._control = frozenset(identity for identity, token in added.items() if token.special)
        self._plain = {identity: token.content for identity, token in added.items() if not token.special}
        self._prefix = self._find_prefix()
        self._pieces: dict[int, bytes] = {}
        self.end_tokens = self._find_end_tokens(directory)
        """Tokens that end a generation: of config and generation_config, `eos_token`, and those known by name."""

    @property
    def size(self) -> int:
        """Tokens that the tokenizer knows; the model's vocabulary may be padded to more."""
        return int(self._tokens.get_vocab_size(with_added_tokens=True))

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Encode text; `special` parses control tokens in it and adds what the tokenizer begins every text with."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"half a surrogate pair at character {error.start}"
            raise InputError("text", found, "check the encoding") from None
        self._tokens.encode_special_tokens = not special
        tokens: list[int] = self._tokens.encode(text, add_special_tokens=False).ids
        return [*self._prefix, *tokens] if special else tokens

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """Decode tokens to bytes, piece by piece: the bytes of a sequence are the bytes of its parts joined.

        Control tokens, and those that pad the vocabulary, give nothing. A SentencePiece model keeps the space that
        its tokenizer puts before a text.
        """
        return b"".join(map(self._piece, tokens))

    def _piece(self, token: int) -> bytes:
        if token not in self._pieces:
            self._pieces[token] = self._decode(token)
        return self._pieces[token]

    def _decode(self, token: int) -> bytes:
        text: str | None = None
        if token >= 0 and token not in self._control:
            text = self._tokens.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            # added tokens are written as they are
            return text.encode() if token in self._plain else b"".join(_BYTES.get(c, c.encode()) for c in text)
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(text)):
            return bytes.fromhex(byte[1])
        return text.replace(_SPACE, " ").encode()

    def _find_prefix(self) -> list[int]:
        """BOS where `add_bos_token` says so, else what the post-processor puts first (as transformers decides)."""
        asked, bos = self._settings.get("add_bos_token"), self._token(self._settings.get("bos_token"))
        if isinstance(asked, bool):
            return [bos] if asked and bos is not None else []
        plain = self._tokens.encode("a", add_special_tokens=False).ids
        whole = self._tokens.encode("a", add_special_tokens=True).ids
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return list(whole[:start])

    def _find_end_tokens(self, directory: Path) -> frozenset[int]:
        named = {token for name in _END_NAMES if (token := self._token(name)) in self._control}
        found: set[Any] = {self._token(self._settings.get("eos_token")), *named}
        for name in ("config.json", "generation_config.json"):
            value = (_read_object(directory / name) or {}).get("eos_token_id")
            found.update(value if isinstance(value, list) else [value])
        return frozenset(token for token in found if type(token) is int and token >= 0)

    def _token(self, value: Any) -> int | None:
        text = value.get("content") if isinstance(value, dict) else value
        return self._tokens.token_to_id(text) if isinstance(text, str) else None


def _load(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Tokens
    except ModuleNotFoundError:
        raise ToolError("the package tokenizers", "it is not installed", "pip install tokenizers") from None
    try:
        tokens = Tokens.from_file(str(path))
    except Exception as error:  # the package raises no other kind
        raise InputError(f"a tokenizer in {path}", str(error)[:200], "fetch the model's files again") from None
    # settings of the training run that would cut or pad every text
    tokens.no_truncation()
    tokens.no_padding()
    return tokens


def _read_object(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None where there is no such file."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise InputError(f"a JSON file of at most {_MAX_JSON_BYTES} bytes", str(path), "check the model's files")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"a readable {path}", error.strerror or str(error), "check the model's files") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"valid JSON in {path}", str(error)[:200], "fetch the model's files again") from None
    if not isinstance(value, dict):
        raise InputError(f"a JSON object in {path}", f"a {type(value).__name__}", "fetch the model's files again")
    return value


def _decoder_kinds(decoder: Any) -> Iterator[str]:
    if isinstance(decoder, dict):
        yield str(decoder.get("type"))
        for part in decoder.get("decoders") or ():
            yield from _decoder_kinds(part)


def _byte_characters() -> dict[str, bytes]:
    """The characters by which byte-level BPE writes bytes: itself where printable, else the next from U+0100.

    Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): `bytes_to_unicode` of their code.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    codes = {byte: byte for byte in printable} | {byte: 0x100 + index for index, byte in enumerate(others)}
    return {chr(code): bytes([byte]) for byte, code in codes.items()}


_BYTES = _byte_characters()
