"""Takes out of a text what tells whose machine it is from."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import pwd
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pascalvl.engines.backends import BACKENDS

_PATH = re.compile(r"""(?<![\w/.~])(?<!https:)(?<!http:)/(?=[^\s|])(?:[^'"`:;,()|<>\n]*/)?[^\s'"`:;,()|<>]*""")
"""From a slash on that begins a word, up to the last of its words that has one."""
_OF_SYSTEM = re.compile(r"/(usr|lib|lib64|bin|sbin|dev|proc|sys|etc)/")
_FILE = re.compile(r"[\w.+-]+\.(so[.\d]*|py|json|cu|cpp|h|o|onnx|plan|data|bin|jinja)")
_IDENTITIES = {
    "[uuid]": re.compile(r"(?:\b(?:GPU|MIG)-)?\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", re.IGNORECASE),
    "[address]": re.compile(r"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b", re.IGNORECASE),
    r"\1[serial]": re.compile(r"\b(serial(?: number)?(?:\s+is)?[\s:=#]+)\w*\d[\w-]*", re.IGNORECASE),
    "[number]": re.compile(r"\b\d{10,}\b"),
}
"""By what is put there: of cards, disks, network adapters."""
_COMMON = {
    *("admin", "build", "ci", "debian", "docker", "fedora", "gpu", "guest", "linux", "localdomain", "localhost"),
    *("nvidia", "pascal", "pascalvl", "python", "root", "runner", "test", "ubuntu", "user", *BACKENDS),
}
"""Names of users and machines that tell nothing, and that a report may have for other reasons."""
_SHORTEST = 3
"""Letters of a name: shorter ones are looked for in paths alone."""


def anonymous(text: str) -> str:
    """The text without absolute paths (but for names of files), names of this user and machine, and numbers of
    devices."""
    for folder in sorted(set(_folders()), key=len, reverse=True):
        text = text.replace(folder, "/_")  # a space in it would end a path
    text = _PATH.sub(_without_folders, text)
    for placeholder, pattern in _IDENTITIES.items():
        text = pattern.sub(placeholder, text)
    for placeholder, names in (("[user]", _users()), ("[host]", _hosts())):
        for name in sorted(names, key=len, reverse=True):
            if len(name) >= _SHORTEST and name.lower() not in _COMMON:
                whole = rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"
                text = re.sub(whole, placeholder, text, flags=re.IGNORECASE)
    return text


def _without_folders(match: re.Match[str]) -> str:
    path = match[0].rstrip(".")
    name, rest = path.rpartition("/")[2], match[0][len(path) :]
    return (f"…/{name}" if name and (_OF_SYSTEM.match(path) or _FILE.fullmatch(name)) else "[path]") + rest


def _folders() -> Iterator[str]:
    """Those of this user and this run."""
    folders = [os.path.expanduser("~"), os.environ.get("HOME", ""), os.getcwd(), tempfile.gettempdir(), sys.prefix]
    folders += [account.pw_dir for account in _accounts()]
    for folder in folders:
        for path in (folder, os.path.realpath(folder)):
            if len(Path(path).parts) > 1:
                yield path


def _users() -> set[str]:
    names = {account.pw_name for account in _accounts()}
    names |= {account.pw_gecos.split(",")[0] for account in _accounts()}
    names |= {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    with contextlib.suppress(KeyError, OSError):  # a number that has no name
        names.add(getpass.getuser())
    return names


def _accounts() -> list[pwd.struct_passwd]:
    try:
        return [pwd.getpwuid(os.getuid())]
    except KeyError:
        return []


def _hosts() -> set[str]:
    names = {platform.node(), os.uname().nodename, os.environ.get("HOSTNAME", ""), os.environ.get("HOST", "")}
    return names | {name.partition(".")[0] for name in names}
