"""The page at `/`: one file, which may run and load nothing but what is in it and ask this server alone."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import Response

from ..runtime.samplers import SAMPLERS
from .openapi import Operation

if TYPE_CHECKING:
    from starlette.requests import Request

_FILE = Path(__file__).with_name("page.html")
_SAMPLERS = "{{samplers}}"
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def operation() -> Operation:
    """Offer it. It has no secrets: whoever opens it gives it the server's key, where there is one."""
    content = _content()
    headers = {
        "content-security-policy": policy(content),
        "cache-control": "no-cache",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    async def page(_: Request) -> Response:
        return Response(content, media_type="text/html", headers=headers)

    reply = {200: ("The page.", {"text/html": {"type": "string"}})}
    return Operation("GET", "/", "page", "Show a page that makes pictures.", page, reply, open=True)


def _content() -> str:
    options = (
        f'<option value="{html.escape(key)}">{html.escape(sampler.label)}</option>' for key, sampler in SAMPLERS.items()
    )
    return _FILE.read_text(encoding="utf-8").replace(_SAMPLERS, "".join(options))


def policy(content: str) -> str:
    """Give the Content-Security-Policy of a page: its own script and style by their hashes, and what they need.

    Source: https://www.w3.org/TR/CSP3/
    """
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(content):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
        hashes[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        [
            "default-src 'none'",
            *(f"{kind}-src {' '.join(found)}" for kind, found in hashes.items()),
            "img-src blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )
