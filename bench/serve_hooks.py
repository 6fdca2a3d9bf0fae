"""What schemathesis loads with its hooks: pictures that are asked for are small ones, and every call is counted."""

from __future__ import annotations

import atexit
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import schemathesis

if TYPE_CHECKING:
    from schemathesis.core.transport import Response
    from schemathesis.generation.case import Case
    from schemathesis.hooks import HookContext

COUNTS = "SDRT_BENCH_COUNTS"
"""Environment variable: the file in which the calls are counted, by operation and status."""
_MOST = {"n": 2, "num_inference_steps": 2}

_calls: Counter[str] = Counter()


@schemathesis.hook
def before_call(_context: HookContext, case: Case, **_: Any) -> None:
    """Lower the numbers that make a picture expensive, where they are what the document allows; keep the others."""
    body = case.body
    if not isinstance(body, dict) or not isinstance(body.get("prompt"), str):
        return
    body = {"num_inference_steps": None, **body}
    if body["num_inference_steps"] is None:
        body["num_inference_steps"] = _MOST["num_inference_steps"]
    for name, most in _MOST.items():
        if type(body.get(name)) is int and most < body[name] <= _document_maximum(case, name):
            body[name] = most
    case.body = body


def _document_maximum(case: Case, name: str) -> int:
    (media,) = case.operation.definition.raw["requestBody"]["content"].values()
    maximum: int = media["schema"]["properties"][name]["maximum"]
    return maximum


@schemathesis.hook
def after_call(_context: HookContext, case: Case, response: Response) -> None:
    """Count it."""
    _calls[f"{case.operation.label} {response.status_code}"] += 1


if COUNTS in os.environ:
    atexit.register(lambda: Path(os.environ[COUNTS]).write_text(json.dumps(_calls), encoding="utf-8"))
