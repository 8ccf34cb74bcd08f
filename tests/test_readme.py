"""The table of inputs names tests that there are."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_tests_that_the_table_names_are_there():
    named = 0
    for line in (TESTS / "README.md").read_text(encoding="utf-8").splitlines():
        file = None
        for path, name in re.findall(r"`(?:([\w/]+\.py)(?:::)?)?(test_\w+)?`", line):
            file = TESTS / path if path else file
            if path:
                assert file.is_file(), path
            if name:
                named += 1
                assert f"\ndef {name}(" in file.read_text(encoding="utf-8"), f"{file.name}::{name}"
    assert named > 30
