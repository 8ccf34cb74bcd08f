"""`bench server` against a server of nano."""

import json

from pascalvl.runtime.cli import main
from tests.runtime.server.served import serving

OPTIONS = ["--clients", "3", "--requests", "2", "--words", "40", "--tokens", "20"]


def test_a_server_is_timed(nano_engine_bundle, tmp_path, monkeypatch, capsys):
    figures = tmp_path / "figures.json"
    with serving(nano_engine_bundle, "--sequences", 3, "--api-key", "secret") as server:
        asked = ["bench", "server", server.url, *OPTIONS, "--json", str(figures)]
        assert main(asked) == 2
        assert "answered 401" in capsys.readouterr().err
        monkeypatch.setenv("PASCALVL_API_KEY", "secret")
        assert main(asked) == 0
    found = json.loads(figures.read_text())
    assert found["model"] == "nano"
    assert 6 <= found["tokens"] <= 6 * 20
    assert min(found["tokens_per_second"], *found["first_token_ms"]) > 0
    assert "nano at http" in " ".join(capsys.readouterr().out.split())


def test_servers_that_give_no_answer(capsys):
    for url, why in (
        ("http://127.0.0.1:9/v1", "gives no answer (Connection refused): start one with 'pascalvl serve'"),
        ("ftp://127.0.0.1/v1", "expected the URL of a server's API"),
        ("http://127.0.0.1:x/v1", "no port that can be"),
    ):
        assert main(["bench", "server", url]) == 2
        assert why in capsys.readouterr().err
    assert main(["bench", "server", "http://127.0.0.1:9/v1", "--clients", "0"]) == 2
    assert "clients is out of range: expected 1 to 1024, found 0" in capsys.readouterr().err
