"""edgekit as a wheel, made from the files that run: what `edgekit device setup` installs on a board."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import zipfile
from pathlib import Path

import edgekit

_DATE = (1980, 1, 1, 0, 0, 0)  # equal sources give an equal wheel, which is uploaded once


def build_wheel(directory: Path) -> Path:
    """Write the wheel into `directory` and return its path (layout: PyPA's binary distribution format, version 1.0)."""
    version = edgekit.__version__
    package = Path(edgekit.__file__).parent
    info = f"edgekit-{version}.dist-info"
    metadata = importlib.metadata.distribution("edgekit").read_text("METADATA") or ""
    files = {
        f"edgekit/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    files[f"{info}/METADATA"] = metadata.encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: edgekit\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\nedgekit = edgekit.cli:main\n"
    record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    wheel = directory / f"edgekit-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, _DATE), data, zipfile.ZIP_DEFLATED)
    return wheel


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
