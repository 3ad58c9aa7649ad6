"""Where a page has its pictures, style and script: inside it, or in files beside it."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Protocol

PAGE = Path(__file__).parent / "page"
TYPES = {"webp": "image/webp", "svg": "image/svg+xml"}
SHEETS = 48  # sheets of synthetic images that one file embeds, of each kind of sheet; equal ones count once


class Assets(Protocol):
    """sheets: how many sheets of images there is room for. addresses: of style and script; empty where the page has them inside."""

    sheets: int
    addresses: dict[str, str]

    def image(self, content: bytes, kind: str) -> str:
        """The address of a picture. kind: a key of TYPES."""
        ...


class Inside:
    """One file that holds everything."""

    sheets = SHEETS

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}

    def image(self, content: bytes, kind: str) -> str:
        return f"data:{TYPES[kind]};base64,{base64.b64encode(content).decode()}"


class Beside:
    """Files of a folder, by their path in it: what several pages show is there once."""

    sheets = 1_000_000

    def __init__(self) -> None:
        self.addresses = {name: name for name in ("style.css", "page.js")}
        self.files: dict[str, bytes] = {name: (PAGE / name).read_bytes() for name in self.addresses}

    def image(self, content: bytes, kind: str) -> str:
        name = f"images/{hashlib.sha256(content).hexdigest()[:16]}.{kind}"
        self.files[name] = content
        return name
