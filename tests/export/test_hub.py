"""Checkpoints of the hub, from a server of this machine that speaks its protocol."""

import re
import socket

import pytest
from huggingface_hub import constants

from pascalvl.export import hub as of_hub
from pascalvl.export.hub import find_checkpoint
from pascalvl.plugins.errors import UserError
from tests.hub_server import COMMIT, REPO, serving

LARGE = "model-00001-of-00002.safetensors"
CHUNK = 10 << 20
"""Bytes that huggingface_hub writes at once: what comes after the last of them is lost with a connection."""


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Make huggingface_hub, which has read its variables when it was imported, ask a server."""

    def use(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return use


@pytest.fixture
def hub(nano_checkpoint, use):
    with serving(nano_checkpoint) as hub:
        use(hub.url)
        yield hub


@pytest.fixture
def closed_url() -> str:
    """Where nothing answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_what_an_export_reads_is_downloaded(hub, nano_checkpoint):
    found, counts = find_checkpoint(REPO), []
    assert hub.sent == {"config.json", "model.safetensors.index.json"}
    assert (found.repo, found.commit) == (REPO, COMMIT)
    assert found.nbytes == sum(path.stat().st_size for path in nano_checkpoint.iterdir())
    missing = found.missing_bytes
    assert missing == found.nbytes - sum(len(hub.files[name]) for name in hub.sent)
    folder = found.download(counts.append)
    assert sum(counts) == missing
    assert found.missing_bytes == 0
    assert hub.sent == {path.name for path in nano_checkpoint.iterdir()} == {path.name for path in folder.iterdir()}
    for path in nano_checkpoint.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_is_here_is_not_asked_for_again(hub):
    folder = find_checkpoint(REPO).download()
    hub.requests.clear()
    assert find_checkpoint(REPO, COMMIT).download() == folder  # a commit stays what it is
    assert hub.requests == []
    assert find_checkpoint(REPO).download() == folder
    assert not any(asked.method == "GET" and "/api/" not in asked.path for asked in hub.requests)


def test_a_token_goes_to_the_hub_alone(hub, monkeypatch):
    hub.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    find_checkpoint(REPO).download()
    assert hub.ranges(LARGE) == [None]
    for asked in hub.requests:
        assert ("authorization" in asked.headers) == (not asked.path.startswith("/cdn/")), asked


def test_a_connection_that_breaks_off_is_taken_up_again(hub, nano_checkpoint):
    hub.cut_at = {LARGE: CHUNK + 200_000}
    counts, found = [], find_checkpoint(REPO)
    missing = found.missing_bytes
    folder = found.download(counts.append)
    assert hub.ranges(LARGE) == [None, f"bytes={CHUNK}-"]
    assert sum(counts) == missing
    assert (folder / LARGE).read_bytes() == (nano_checkpoint / LARGE).read_bytes()


def test_a_download_that_failed_goes_on_the_next_time(hub, nano_checkpoint):
    hub.cut_at, hub.is_refused_then = {LARGE: CHUNK + 200_000}, True
    with pytest.raises(UserError, match=rf"{hub.url} answers with status 503: not all of {REPO} is here"):
        find_checkpoint(REPO).download()
    hub.refusal = None
    hub.requests.clear()
    counts, found = [], find_checkpoint(REPO)
    assert found.missing_bytes == len(hub.files[LARGE]) - CHUNK
    folder = found.download(counts.append)
    assert sum(counts) == len(hub.files[LARGE]) - CHUNK
    assert [path for path in map(hub.ranges, hub.files) if path] == [[f"bytes={CHUNK}-"]]
    assert (folder / LARGE).read_bytes() == (nano_checkpoint / LARGE).read_bytes()


def test_damage_on_the_way_is_noticed(hub, tmp_path, nano_checkpoint):
    hub.is_damaged = True
    with pytest.raises(UserError, match=r"model-0000\d-of-00002.safetensors of .* is not the file that it lists"):
        find_checkpoint(REPO).download()
    assert not list(tmp_path.glob("hub/**/*.incomplete"))
    hub.is_damaged = False
    folder = find_checkpoint(REPO).download()
    assert (folder / LARGE).read_bytes() == (nano_checkpoint / LARGE).read_bytes()


def test_another_architecture_is_refused_before_its_weights(hub):
    hub.files["config.json"] = b'{"model_type": "qwen2_5_vl"}'
    with pytest.raises(UserError, match=rf"expected a dense Qwen3-VL checkpoint .* in {REPO}, found 'qwen2_5_vl'"):
        find_checkpoint(REPO)
    assert hub.sent == {"config.json"}


@pytest.mark.parametrize(
    ("remove", "add", "match"),
    [
        (["config.json"], [], "has no config.json: give the name of a Qwen3-VL model"),
        (["model.safetensors.index.json"], ["pytorch_model.bin"], "it has pytorch_model.bin, in PyTorch's own format"),
        (["model.safetensors.index.json"], [], "expected model.safetensors, or .* it has neither"),
        ([LARGE], [], f"lacks its weight file '{LARGE}'"),
    ],
)
def test_models_that_are_no_checkpoints(hub, remove, add, match):
    for name in remove:
        del hub.files[name]
    hub.files |= dict.fromkeys(add, b"")
    with pytest.raises(UserError, match=match):
        find_checkpoint(REPO)
    assert hub.sent <= {"config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize(
    ("refusal", "match"),
    [
        (
            (401, {"X-Error-Code": "GatedRepo"}),
            rf"have accepted its terms: accept them at http.*/{REPO}, and give a token",
        ),
        ((403, {"X-Error-Code": "GatedRepo"}), "have accepted its terms"),
        ((401, {}), rf"there is no model {REPO} on http.*, or it is private: check the name, or give a token that may"),
        ((404, {"X-Error-Code": "RepoNotFound"}), rf"there is no model {REPO}"),
        ((403, {"X-Error-Message": "Forbidden"}), "does not let this account read"),
        ((429, {"Retry-After": "60"}), "asks for fewer requests for now: try again in some minutes"),
        ((500, {}), "answers with status 500: not all of maker/Nano-VL is here; try again later"),
    ],
)
def test_refusals(hub, refusal, match):
    hub.refusal = refusal
    with pytest.raises(UserError, match=match) as told:
        find_checkpoint(REPO)
    assert re.fullmatch(r"[^\n]+\.", str(told.value))
    assert len(hub.requests) == 1


def test_tokens_that_do_not_help(hub, monkeypatch):
    """They are not quoted."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.token = "hf_another"
    with pytest.raises(UserError, match=r"does not know the token that was sent: run 'hf auth login', or set") as told:
        find_checkpoint(REPO)
    assert "hf_secret" not in str(told.value)
    hub.refusal = 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "hf_secret"}
    with pytest.raises(UserError, match=r"or give another token \(HF_TOKEN\)") as told:
        find_checkpoint(REPO)
    assert "hf_secret" not in str(told.value)


def test_revisions(hub):
    with pytest.raises(UserError, match=rf"{REPO} on .* has no revision 'v2': give a branch, a tag or a commit of it"):
        find_checkpoint(REPO, "v2")
    assert find_checkpoint(REPO, "main").commit == COMMIT


@pytest.mark.parametrize("is_offline", [False, True])
def test_without_a_network(hub, use, closed_url, monkeypatch, is_offline):
    """What is here whole is taken, and else it is told what to bring."""
    if is_offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        why = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    else:
        use(closed_url)
        why = rf"{closed_url} cannot be reached \(ConnectError, .*\)"
    how = f"not all of {REPO} is here; try again later, or, .* run 'hf download {REPO} --local-dir FOLDER', bring .*"
    with pytest.raises(UserError, match=rf"{why}: {how}\*\.safetensors and, .* config.json, .*tokenizer.json") as told:
        find_checkpoint(REPO)
    assert len(str(told.value)) < 800
    assert hub.requests == []

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use(hub.url)
    found = find_checkpoint(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    use(hub.url if is_offline else closed_url)
    with pytest.raises(UserError, match=why):  # the weights are missing
        find_checkpoint(REPO)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use(hub.url)
    found.download()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    use(hub.url if is_offline else closed_url)
    hub.requests.clear()
    said = []
    here = find_checkpoint(REPO, tell=said.append)
    assert (here.folder, here.commit, here.missing_bytes) == (found.folder, COMMIT, 0)
    assert re.match(rf"{REPO} is taken as it was downloaded before, commit {COMMIT[:12]}: {why}", said[0])
    assert hub.requests == []


def test_names_are_the_hubs():
    with pytest.raises(UserError, match=r"'a--b/c' is no name of a model .*: expected ORG/NAME"):
        of_hub.find_checkpoint("a--b/c")
