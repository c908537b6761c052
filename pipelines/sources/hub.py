"""The Hugging Face hub: the archives of the published data sets, downloaded once or read by ranges.

    path = download("krandiash/sc09", ("sc09.zip",))  # a local file
    file = locate("krandiash/sc09", ("sc09.zip",))    # a RemoteFile that a worker reads by ranges

huggingface_hub gives the URLs, the token and the cache, but not the download. That of 2.4, plain or with hf_xet 1.8,
starts from nothing after a kill, and accepts a file whose bytes do not match their SHA-256.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from harmonic.errors import UserError
from harmonic.locks import locked_file
from pipelines.errors import disk_full
from pipelines.sources.remote import HttpFile, Refused

_ELSEWHERE = "download it elsewhere and give its path as --source"
_BLOCK_BYTES = 1 << 20


class HubFile(HttpFile):
    """A file of a data set repository at one commit. Each process uses the token of its own machine."""

    def __init__(self, repo: str, name: str, revision: str | None = None):
        from huggingface_hub import constants, hf_hub_url

        super().__init__(hf_hub_url(repo, name, repo_type="dataset", revision=revision))
        self.page = f"{constants.ENDPOINT}/datasets/{repo}"

    def authorize(self, request: Any) -> Any:
        from huggingface_hub import constants, get_token

        if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    def refusal(self, error: Refused) -> UserError:
        if error.status in (401, 403):
            return UserError(no_permission(self.page, error))
        return super().refusal(error)


def locate(repo: str, names: tuple[str, ...], patient: bool = True) -> HubFile:
    """The archive of a data set repository, pinned to a commit: the first of `names` that exists.

    Raises:
      Refused: no answer, or one that does not say whether the archive exists.
      UserError: no such repository or archive, or no permission to read it.
    """
    for name in names:
        file = HubFile(repo, name)
        try:
            file.pin(patient)
        except Refused as error:
            if error.status in (401, 403):
                raise file.refusal(error) from error
            if error.status != 404:
                raise
            if error.headers.get("X-Error-Code") in ("RepoNotFound", "RevisionNotFound"):
                break
            continue
        if commit := file.headers.get("X-Repo-Commit"):
            file.url = HubFile(repo, name, revision=commit).url
        return file
    raise UserError(f"{file.page} does not hold {' or '.join(names)} (404); {_ELSEWHERE}")


def download(repo: str, names: tuple[str, ...]) -> str:
    """The local path of a data set repository's archive, downloaded unless the cache has it.

    A download that broke off, or whose process was killed, continues where it stopped, and the whole is compared with
    the hub's SHA-256. Without a connection the cached archive is used; HF_HUB_OFFLINE=1 prevents all requests.

    Raises:
      UserError: no connection, no such repository or archive, no permission to read it, or no room for it.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cached = _cached(repo, names)
    try:
        if constants.HF_HUB_OFFLINE:
            raise Refused("there is no connection to it (HF_HUB_OFFLINE is set)")
        file = locate(repo, names, patient=cached is None)
    except Refused as error:
        if cached is not None:
            return cached
        page = f"{constants.ENDPOINT}/datasets/{repo}"
        raise UserError(
            f"cannot download {names[0]} from {page}: {error}, and it is not in the cache; try again, or {_ELSEWHERE}"
        ) from error
    name = os.path.basename(file.name)
    etag = re.sub(r'^(W/)?"|"$', "", file.tag or "")
    commit = file.headers.get("X-Repo-Commit")
    with contextlib.closing(file):
        theirs = try_to_load_from_cache(repo, name, repo_type="dataset", revision=commit)
        if isinstance(theirs, str):
            return theirs
        try:
            # The server's tag becomes the name of a folder, so it may not be a path.
            key = etag if re.fullmatch(r"[0-9A-Za-z]{1,64}", etag) else hashlib.sha256(etag.encode()).hexdigest()
            folder = _assets(repo) / key
            folder.mkdir(parents=True, exist_ok=True)
            return _fetch(file, folder / name, etag)
        except OSError as error:
            where = constants.HF_ASSETS_CACHE
            if disk_full(error):
                raise UserError(f"no space left in {where} for {name}; make room, or set HF_HOME") from error
            raise UserError(f"cannot write {name} to {where} ({error.strerror}); set HF_HOME") from error


def _cached(repo: str, names: tuple[str, ...]) -> str | None:
    """A whole archive on this disk, the newest if there are several."""
    from huggingface_hub import try_to_load_from_cache

    found = [path for name in names for path in _assets(repo).glob(f"*/{name}")]
    if found:
        return str(max(found, key=lambda path: path.stat().st_mtime))
    theirs = (try_to_load_from_cache(repo, name, repo_type="dataset") for name in names)
    return next((path for path in theirs if isinstance(path, str)), None)


def _assets(repo: str) -> Path:
    """A folder in huggingface_hub's cache for the files of other libraries."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE, "harmonic_rnn", repo.replace("/", "--"))


def _fetch(file: HubFile, path: Path, etag: str) -> str:
    """Downloads to `path`, continuing with the part that is there."""
    assert file.size is not None
    with locked_file(f"{path}.incomplete") as partial:
        if path.exists():  # another process has been faster
            os.unlink(partial.name)
            return str(path)
        have = partial.seek(0, os.SEEK_END)
        if have > file.size:
            have = partial.truncate(0)
        free = shutil.disk_usage(path.parent).free
        if file.size - have > free:
            raise OSError(errno.ENOSPC, f"{file.size - have:,} bytes are missing and {free:,} free")
        with (
            file.open() as remote,
            # disable=None: no bar unless stderr is a terminal.
            tqdm(desc=path.name, total=file.size, initial=have, unit="B", unit_scale=True, disable=None) as bar,
        ):
            remote.seek(have)
            remote.expect(file.size)
            while block := remote.read(_BLOCK_BYTES):
                partial.write(block)
                bar.update(len(block))
        partial.flush()
        os.fsync(partial.fileno())
        if re.fullmatch(r"[0-9a-f]{64}", etag):
            partial.seek(0)
            digest = hashlib.file_digest(cast(Any, partial), "sha256").hexdigest()
            if digest != etag:
                partial.truncate(0)
                raise UserError(f"{file.name} arrived damaged (SHA-256 {digest[:12]}, not {etag[:12]}); run again")
        os.rename(partial.name, path)
        return str(path)


def no_permission(page: str, error: Refused | None = None) -> str:
    """The line for a repository that may not be read, with the way out."""
    if error is not None and "Invalid credentials" in error.headers.get("X-Error-Message", ""):
        return f"{page} does not know the token that it was given; log in again with `hf auth login` or set HF_TOKEN"
    return (
        f"{page} asks for permission to read: accept its terms there, then log in with `hf auth login` or set HF_TOKEN "
        "(on the machines of all workers), or give an archive that you have as --source"
    )
