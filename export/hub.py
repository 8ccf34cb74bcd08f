"""Checkpoints of the Hugging Face hub, in huggingface_hub's own cache folder.

Files are fetched one after the other in the calling thread, so that an interrupt ends that at once. Of a file that was
interrupted, huggingface_hub keeps nothing for the next process, and it checks no hash; weights are gigabytes, so they
are fetched here into a file that stays, by its own `http_get`, checked, and put where it looks for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import httpx2
import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_token
from huggingface_hub.utils import logging as hub_logging

from pascalvl.export.checkpoint import INDEX, PICKLES, SINGLE, SMALL_FILES, check_model_type, names_in_index
from pascalvl.plugins import bundle
from pascalvl.plugins.errors import UserError, library_reason, shown
from pascalvl.plugins.user_cache import locked

log = logging.getLogger(__name__)

_CONFIG = bundle.CHECKPOINT_CONFIG
_SECONDS_TO_ANSWER = 10.0
_PARTIAL = ".pascalvl.incomplete"
"""End of the name of a weight file that is not whole; `hf cache prune` knows what it is."""
_COMMIT = re.compile("[0-9a-f]{40}")
_LOG_IN = "run 'hf auth login', or set HF_TOKEN"
_NETWORK_ERRORS = (httpx2.HTTPError, httpx2.InvalidURL, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
"""What huggingface_hub raises where the hub does not give what it was asked for; refusals are among the first."""


@dataclasses.dataclass(frozen=True)
class _File:
    """What the hub says of a file: its bytes, and their SHA-256 where the hub keeps them apart from the repository."""

    nbytes: int
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class HubCheckpoint:
    """A checkpoint on the hub, of which at least the config is here.

    Attributes:
        repo: its name, ``ORG/NAME``.
        commit: 40 hexadecimal digits.
        folder: where its files are, or will be.
        files: what an export reads of it, by name.
    """

    repo: str
    commit: str
    folder: Path
    files: Mapping[str, _File]

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(file.nbytes for file in self.files.values())

    @property
    def missing_bytes(self) -> int:
        """Of what is still to be downloaded."""
        return sum(self.files[name].nbytes - self._bytes_here(name) for name in self._missing())

    def download(self, progress: Callable[[int], None] = lambda _: None) -> Path:
        """Fetch what is missing; returns the folder.

        Args:
            progress: called with numbers of bytes that came, `missing_bytes` together.

        Raises:
            UserError: the hub refuses, cannot be reached, or sends something else than it said.
        """
        with _refusals(self.repo, self.commit):
            for name in self._missing():
                if self.files[name].sha256 is None:
                    _fetch(self.repo, name, self.commit)
                    progress(self.files[name].nbytes)
                else:
                    self._fetch_weights(name, progress)
        return self.folder

    def _missing(self) -> list[str]:
        """Files that are not here, the smallest first, so that one that is refused is known before gigabytes came."""
        missing = [name for name in self.files if not (self.folder / name).is_file()]
        return sorted(missing, key=lambda name: self.files[name].nbytes)

    def _bytes_here(self, name: str) -> int:
        blob = self._blob(name)
        here = [path.stat().st_size for path in (blob, _partial(blob)) if path.is_file()]
        return min(here[0], self.files[name].nbytes) if here else 0

    def _blob(self, name: str) -> Path:
        """Where huggingface_hub keeps a file that has this hash."""
        return self.folder.parents[1] / "blobs" / str(self.files[name].sha256)

    def _fetch_weights(self, name: str, progress: Callable[[int], None]) -> None:
        blob, file = self._blob(name), self.files[name]
        locks = Path(constants.HF_HUB_CACHE) / ".locks" / self.folder.parents[1].name
        for folder in (blob.parent, locks):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(locks / f"{file.sha256}.pascalvl.lock"):
            if not blob.exists():
                partial = _partial(blob)
                with partial.open("ab") as target:
                    self._append(target, name, progress)
                if bundle.sha256(partial).hex() != file.sha256:
                    partial.unlink()
                    raise UserError(
                        f"what {constants.ENDPOINT} sent as {name} of {self.repo} is not the file that it lists (its "
                        "SHA-256 is another): start again, or look whether something between here and the hub alters "
                        "downloads."
                    )
                partial.rename(blob)
        _fetch(self.repo, name, self.commit)  # finds it, and links to it

    def _append(self, target: BinaryIO, name: str, progress: Callable[[int], None]) -> None:
        """Fetch what ``target`` lacks of a file, again and again as long as something comes."""
        nbytes = self.files[name].nbytes
        if target.tell() > nbytes:
            target.truncate(0)
            target.seek(0)
        url = huggingface_hub.hf_hub_url(self.repo, name, revision=self.commit)
        while (start := target.tell()) < nbytes:
            try:
                http_get(
                    url,
                    _Counted(target, progress),  # type: ignore[arg-type]
                    resume_size=start,
                    headers=build_hf_headers(),
                    expected_size=nbytes,
                )
            except httpx2.TransportError:
                if target.tell() == start:
                    raise
                log.info("%s broke off at byte %d", name, target.tell())
            except OSError as error:
                if error.errno is not None or isinstance(error, errors.HfHubHTTPError):
                    raise
                return  # it has another size than the hub said, which its hash tells


class _Counted:
    """A file of whose growth ``progress`` is told."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None]) -> None:
        self._file = file
        self._progress = progress
        self.tell, self.seek = file.tell, file.seek

    def write(self, content: bytes) -> int:
        self._progress(len(content))
        return self._file.write(content)

    def truncate(self) -> int:
        """Cut the file off where it stands: the server begins anew."""
        size = self._file.seek(0, 2)
        end = self._file.truncate(0)
        self._file.seek(0)
        self._progress(-size)
        return end


def find_checkpoint(repo: str, revision: str | None = None, tell: Callable[[str], None] = log.info) -> HubCheckpoint:
    """Ask the hub what a checkpoint consists of, and fetch its config.

    Args:
        repo: ``ORG/NAME``.
        revision: branch, tag or commit; None: the main branch. For a commit that is here whole, the hub is not asked.
        tell: called where what is here is taken because the hub does not answer.

    Raises:
        UserError: no such model, or none that may be read; another architecture; weights that are not in safetensors;
            or no network, and not all files here.
    """
    disable_progress_bars()
    if not log.isEnabledFor(logging.INFO):
        hub_logging.set_verbosity_error()
    if revision and _COMMIT.fullmatch(revision) and (here := _here(repo, revision)):
        return here
    try:
        info = huggingface_hub.HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=_SECONDS_TO_ANSWER
        )
    except (errors.HFValidationError, *_NETWORK_ERRORS) as error:
        why, remedy = _refusal(error, repo, revision)
        is_wrong = isinstance(error, errors.RevisionNotFoundError | errors.HFValidationError)
        if is_wrong or not (here := _here(repo, revision)):
            raise UserError(f"{why}: {remedy}.") from error
        check_model_type(bundle.read_json(here.folder / _CONFIG, "download the model again"), repo)
        tell(f"{repo} is taken as it was downloaded before, commit {here.commit[:12]}: {why}")
        return here
    listed = {
        file.rfilename: _File(file.size or 0, file.lfs.sha256 if file.lfs else None) for file in info.siblings or ()
    }
    commit = str(info.sha)
    with _refusals(repo, revision):
        if _CONFIG not in listed:
            raise UserError(f"{repo} on {constants.ENDPOINT} has no {_CONFIG}: give the name of a Qwen3-VL model.")
        if revision != commit:
            _fetch(repo, _CONFIG, revision)  # that the revision is this commit is kept for when there is no network
        folder = _fetch(repo, _CONFIG, commit).parent
        check_model_type(bundle.read_json(folder / _CONFIG, "download the model again"), repo)
        names = [*(name for name in SMALL_FILES if name in listed), *_weight_files(repo, commit, listed)]
    return HubCheckpoint(repo, commit, folder, {name: listed[name] for name in names})


def _weight_files(repo: str, commit: str, listed: Mapping[str, _File]) -> list[str]:
    """Those that an export reads, among all that are listed."""
    if SINGLE in listed:
        return [SINGLE]
    if INDEX not in listed:
        pickles = [name for name in listed for names in PICKLES if fnmatch.fnmatch(name, names)]
        found = f"it has {pickles[0]}, in PyTorch's own format" if pickles else "it has neither"
        raise UserError(
            f"expected {SINGLE}, or {INDEX} with its files, in {repo} on {constants.ENDPOINT}, and {found}: give a "
            "model with weights in safetensors."
        )
    names = names_in_index(_fetch(repo, INDEX, commit))
    if missing := [name for name in names if name not in listed]:
        raise UserError(
            f"{repo} on {constants.ENDPOINT} lacks its weight file {shown(missing[0])}: give another model."
        )
    return names


def _fetch(repo: str, name: str, revision: str | None) -> Path:
    """A file, in huggingface_hub's cache folder."""
    return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))


def _here(repo: str, revision: str | None) -> HubCheckpoint | None:
    """A checkpoint all of whose files are here, without a word to the hub."""
    config = huggingface_hub.try_to_load_from_cache(repo, _CONFIG, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    if (folder / SINGLE).is_file():
        weights = [SINGLE]
    elif (folder / INDEX).is_file():
        weights = names_in_index(folder / INDEX)
    else:
        return None
    if not all((folder / name).is_file() for name in (bundle.TOKENIZER, *weights)):
        return None
    names = [*(name for name in SMALL_FILES if (folder / name).is_file()), *weights]
    files = {name: _File((folder / name).stat().st_size, None) for name in names}
    return HubCheckpoint(repo, folder.name, folder, files)


def _partial(blob: Path) -> Path:
    return blob.with_name(blob.name + _PARTIAL)


# Refusals -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _refusals(repo: str, revision: str | None) -> Iterator[None]:
    """Raise `UserError` for what the hub refuses, and for a hub that cannot be reached."""
    try:
        yield
    except _NETWORK_ERRORS as error:
        why, remedy = _refusal(error, repo, revision)
        raise UserError(f"{why}: {remedy}.") from error


def _refusal(error: Exception, repo: str, revision: str | None) -> tuple[str, str]:
    """What an error of huggingface_hub means, and what a person can do about it; the token is never quoted."""
    hub = constants.ENDPOINT
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.HFValidationError):
        return f"{shown(repo)} is no name of a model ({library_reason(error)})", "expected ORG/NAME"
    if isinstance(error, errors.GatedRepoError):
        why = f"{repo} may be read by those alone who have accepted its terms"
        return why, f"accept them at {hub}/{repo}, and give a token of that account ({_LOG_IN})"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} on {hub} has no revision {shown(revision)}", "give a branch, a tag or a commit of it"
    has_token = get_token() is not None
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404 or (status == 401 and not has_token):
        token = "another token (HF_TOKEN)" if has_token else f"a token that may read it ({_LOG_IN})"
        return f"there is no model {repo} on {hub}, or it is private", f"check the name, or give {token}"
    if status == 401:
        return f"{hub} does not know the token that was sent", f"{_LOG_IN}, to one that is valid"
    if status == 403:
        return f"{hub} does not let this account read {repo}", f"ask its owner, or give another token ({_LOG_IN})"
    if status == 429:
        return f"{hub} asks for fewer requests for now", f"try again in some minutes, or log in ({_LOG_IN})"
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    elif status is not None:
        why = f"{hub} answers with status {status}"
    else:
        why = f"{hub} cannot be reached ({type(error).__name__}, {library_reason(error)})"
    return why, (
        f"not all of {repo} is here; try again later, or, where there is a network, run 'hf download {repo} "
        "--local-dir FOLDER', bring that folder here, and give its path in place of the name (what is read: "
        f"*.safetensors and, as far as there are, {', '.join(SMALL_FILES)})"
    )
