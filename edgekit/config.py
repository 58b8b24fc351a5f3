"""Strict configuration: unknown fields are errors, and every error names its file and line."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from edgekit.errors import InputError, suggest

Location = tuple[str | int, ...]
MAX_YAML_BYTES = 1 << 20


class Strict(BaseModel):
    """Base of everything users write: immutable, and a misspelt field never vanishes silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


M = TypeVar("M", bound=Strict)


def yaml_value(text: str) -> Any:
    """What a value on the command line says, read as YAML; the text itself where it is none."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text


class Document:
    """A parsed YAML file that remembers the line of each of its values."""

    def __init__(self, path: Path) -> None:
        """Parse `path` with the safe loader; duplicate keys, anchors and custom tags are refused.

        Raises:
            InputError: the file is missing, too large, not UTF-8 or not YAML.
        """
        self.path = path
        self.lines: dict[Location, int] = {}
        self._problems: list[tuple[int, str]] = []
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"a readable YAML file at {path}", error.strerror or str(error), "check the path"
            ) from None
        if len(raw) > MAX_YAML_BYTES:
            raise InputError(
                f"a YAML file of at most {MAX_YAML_BYTES} bytes", f"{len(raw)} in {path}", "check the path"
            )
        try:
            root = yaml.compose(raw.decode("utf-8"), Loader=_Loader)
            self.value = {} if root is None else self._build(root, ())
        except UnicodeDecodeError as error:
            raise InputError(f"UTF-8 text in {path}", f"an undecodable byte at {error.start}", f"edit {path}") from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            problem = error.problem or "a syntax error"
            raise InputError("well-formed YAML", f"{path}:{line}: {problem}", f"edit {path}") from None
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            # ValueError: a scalar that looks like a date or number but is not one, e.g. 2024-13-45
            raise InputError("well-formed YAML", f"{path}: {error}".replace("\n", " "), f"edit {path}") from None

    def _build(self, node: yaml.Node, location: Location) -> Any:
        self.lines[location] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key, line = str(key_node.value), key_node.start_mark.line + 1
                if key in mapping:
                    self._problems.append((line, f"{_dotted((*location, key))}: given twice"))
                mapping[key] = self._build(value_node, (*location, key))
                self.lines[(*location, key)] = line
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*location, i)) for i, item in enumerate(node.value)]
        return _construct(node)

    def problem(self, location: Location, message: str) -> None:
        """Record one error at the line of `location` (or of its nearest known parent)."""
        where = location
        while where and where not in self.lines:
            where = where[:-1]
        dotted = _dotted(location)
        self._problems.append((self.lines.get(where, 1), f"{dotted}: {message}" if dotted else message))

    def check(self, model: type[M], value: Any = None, at: Location = ()) -> M | None:
        """Validate `value` (default: the whole document) as `model`; errors are recorded, not raised."""
        value = self.value if value is None else value
        if not isinstance(value, dict):
            self.problem(at, f"expected a mapping, found {type(value).__name__}")
            return None
        try:
            return model.model_validate(value)
        except ValidationError as error:
            for detail in error.errors():
                self.problem((*at, *detail["loc"]), explain(model, detail))
            return None

    def finish(self, what: str) -> None:
        """Raise one InputError that lists every recorded problem with file:line, if there is any."""
        if self._problems:
            lines = [f"{self.path}:{line}: {text}" for line, text in sorted(set(self._problems))]
            raise InputError(f"a valid {what}", "\n  ".join(["", *lines]).lstrip(" "), f"edit {self.path}")


class _Loader(yaml.SafeLoader):
    """The safe loader without aliases: they allow exponential expansion and are not needed here."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark: Any = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)


def _construct(node: yaml.Node) -> Any:
    """Return the value of a scalar; one that does not match its tag (`!!bool perhaps`) is malformed."""
    try:
        return yaml.SafeLoader("").construct_document(node)
    except (LookupError, AttributeError, ArithmeticError) as error:  # PyYAML's own slips: it expects a match
        raise yaml.MarkedYAMLError(problem=f"not a {node.tag}: {error}", problem_mark=node.start_mark) from None


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)


def explain(model: type[BaseModel], detail: Any) -> str:
    """Turn a pydantic error into a sentence; an unknown field gets the closest known one."""
    if detail["type"] == "extra_forbidden":
        parent = _model_at(model, detail["loc"][:-1])
        known = parent.model_fields if parent else ()
        return f"unknown field{suggest(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return "is required"
    message = str(detail["msg"])
    message = message.removeprefix("Value error, ")
    found = detail.get("input")
    return message if isinstance(found, dict | list) else f"{message}, found {found!r}"


def _model_at(model: type[BaseModel] | None, location: Location) -> type[BaseModel] | None:
    """Follow field names from `model` to the nested model at `location`, through unions and containers."""
    for part in location:
        if model is None:
            return None
        if isinstance(part, int) or part not in model.model_fields:
            continue
        model = _find_model(model.model_fields[part].annotation)
    return model


def _find_model(annotation: Any) -> type[BaseModel] | None:
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        return annotation
    return next((found for arg in typing.get_args(annotation) if (found := _find_model(arg))), None)
