"""A report on disk: `report.json` is the record, `report.md` and `report.html` are made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgekit.errors import InputError
from edgekit.report import Report, html, markdown

JSON_NAME, MARKDOWN_NAME, HTML_NAME = "report.json", "report.md", "report.html"
SCHEMA_VERSION: int = Report.model_fields["schema_version"].default
MAX_REPORT_BYTES = 64 << 20


def to_json(report: Report) -> str:
    """Canonical JSON: indent 2, sorted keys, ASCII, a newline at the end.

    Raises:
        ValueError: a figure is not finite; JSON has no word for it.
    """
    return json.dumps(report.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n"


def write_report(report: Report, directory: Path) -> None:
    """Write the three files into `directory`. Everything is rendered before the first byte is written."""
    files = {
        MARKDOWN_NAME: markdown.render(report),
        HTML_NAME: html.render(report),
        JSON_NAME: to_json(report),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8", newline="\n")


def read_report(path: Path) -> Report:
    """Read a `report.json`, or the one in the directory `path`.

    Raises:
        InputError: the file is missing, too large, not JSON, of a newer schema version or not a valid report.
    """
    file = path / JSON_NAME if path.is_dir() else path
    rebuild = "edgekit build --out dist"
    try:
        size = file.stat().st_size
        raw = file.read_bytes() if size <= MAX_REPORT_BYTES else b""
    except OSError as error:
        # `edgekit build --out dist` puts a bundle for each target there
        inside = next((found.parent for found in sorted(path.glob(f"*/{JSON_NAME}"))), None)
        advice = f"name one: {inside}" if inside else "check the path"
        raise InputError(f"a readable report at {file}", error.strerror or str(error), advice) from None
    if size > MAX_REPORT_BYTES:
        raise InputError(f"a report of at most {MAX_REPORT_BYTES} bytes", f"{size} in {file}", "check the path")
    try:
        value = json.loads(raw, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"JSON in {file}", str(error), rebuild) from None
    version = value.get("schema_version") if isinstance(value, dict) else None
    if type(version) is not int:
        raise InputError(f"a report of edgekit in {file}", "JSON without a schema_version", rebuild)
    if version > SCHEMA_VERSION:
        raise InputError(
            f"a report of schema version {SCHEMA_VERSION} or older in {file}",
            f"version {version}, from a newer edgekit",
            "pip install --upgrade edgekit",
        )
    try:
        # from JSON once more: only its strict mode takes arrays for tuples and nothing else for anything
        return Report.model_validate_json(raw, strict=True)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()[:5])
        raise InputError(f"a valid report in {file}", problems, rebuild) from None


def report_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `report.json` as it is written; published in `docs/schemas/`."""
    schema = Report.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "edgekit build report"}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
