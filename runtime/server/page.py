"""The page at ``/``: one file that asks this server and nobody else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

_BLOCK = "<{0}>(.*?)</{0}>"
_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data: blob:; media-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Nothing runs or is loaded but what the page has itself, and text cannot become HTML."""


def page() -> tuple[bytes, dict[str, str]]:
    """The page, and the headers with which it is sent: a content security policy with the hashes of what is in it."""
    text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    policy = _POLICY.format(script=_hashes(text, "script"), style=_hashes(text, "style"))
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return text.encode(), headers


def _hashes(text: str, tag: str) -> str:
    """Of all that stands in elements of a tag, as a policy has them."""
    blocks = re.findall(_BLOCK.format(tag), text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
