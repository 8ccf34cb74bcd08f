"""Whose a request is: API keys, the machine that browsers believe to talk to, and pages that ask."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Mapping

from pascalvl.runtime.sequence import cache_salt
from pascalvl.runtime.server.config import ServerConfig
from pascalvl.runtime.server.errors import APIError

_BEARER = "bearer "


class Keys:
    """Knows who may ask, and what each one's prompts are salted with."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._secret = secrets.token_bytes(32)
        self._digests = [self._digest(key) for key in config.api_keys]
        # The same when the server is started again, for files of the cache, which tell a key to nobody.
        self._salts = [cache_salt(_slowly_hashed(key)) for key in config.api_keys]

    def _digest(self, key: str) -> bytes:
        return hashlib.blake2b(key.encode("latin-1", "replace"), key=self._secret).digest()

    def salt(self, headers: Mapping[str, str]) -> int:
        """See `pascalvl.runtime.sequence.cache_salt`; 0: this one shares with all.

        Raises:
            APIError: 401 without a key that is known. How long that takes tells nothing of the keys: all are compared,
                hashed under a secret.
        """
        if not self._digests:
            return 0
        given = headers.get("authorization", "")
        key = given[len(_BEARER) :].strip() if given[: len(_BEARER)].lower() == _BEARER else ""
        digest, found, salt = self._digest(key), False, 0
        for known, own in zip(self._digests, self._salts, strict=True):
            is_same = hmac.compare_digest(digest, known)
            found |= is_same
            salt |= is_same * own
        if not found:
            what = "is not known here" if key else "is missing"
            raise APIError(
                401, f"the API key {what}: expected a header 'Authorization: Bearer KEY'.", code="invalid_api_key"
            )
        return 0 if self._config.shared_prefixes else salt

    def check_browser(self, headers: Mapping[str, str]) -> None:
        """Raise `APIError` 403 for what a browser was led to ask by another server's page.

        A page may send requests to this machine, and without preflight if they look like a form's; and a name of its
        own may be made to lead here (DNS rebinding), so that it reads the answers, too.
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        if host and self._config.is_local and not self._config.api_keys and not _is_local_name(host):
            raise APIError(
                403,
                "the request is for another host's name, and this server is for this machine alone: ask for "
                "127.0.0.1 or localhost, or start it with an API key.",
                code="host_not_allowed",
            )
        if origin is None or origin in self._config.allowed_origins or "*" in self._config.allowed_origins:
            return
        if origin.partition("://")[2] != host:
            raise APIError(
                403,
                "pages of other servers may not ask: start the server with --allow-origin.",
                None,
                "origin_not_allowed",
            )


def _slowly_hashed(key: str) -> bytes:
    return hashlib.scrypt(key.encode("latin-1", "replace"), salt=b"pascalvl", n=1 << 14, r=8, p=1)


def _is_local_name(host: str) -> bool:
    name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
    if name.lower().rstrip(".") == "localhost" or name.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
