"""Models on the Hugging Face hub: fetched into its cache, pushed with the user's token; a failure is one line.

huggingface_hub does the work, and reads `HF_TOKEN` or `hf auth login`, `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from harmonic.errors import UserError

_FAILURES = (HTTPError, LocalEntryNotFoundError)  # HTTPError: answers that refuse, and no answers
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def fetch(repo: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Fetches `files` of a model repository, all of one commit and no others; the folder of the cache that holds them.

    Raises:
      UserError: there is no such repository or revision, no permission to read it, or no connection.
    """
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except _FAILURES as error:
        raise _explained(error, repo, "read", revision) from error


def cache_folder(repo: str) -> Path:
    """The folder of the cache for a model repository."""
    return Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")


def check_push(repo: str) -> None:
    """Refuses what `push` would refuse before it asks the hub.

    Raises:
      UserError: the name is impossible, or there is no token.
    """
    try:
        validate_repo_id(repo)
        named = repo.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise UserError(f"{repo!r} is not the name of a repository on the hub; write USER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo} cannot be pushed to: HF_HUB_OFFLINE is set; unset it")
    if not get_token():
        raise UserError(f"there is no token to push to {repo} with; {_LOG_IN}, with a token that may write")


def push(folder: Path, repo: str, files: Sequence[str], *, private: bool = False, overwrite: bool = False) -> str:
    """Uploads `files` of `folder` in one commit, and removes older samples. Makes the repository if there is none.

    Args:
      private: make the repository private; one that exists must be private already.
      overwrite: replace a model in the repository that is no HarmonicRNN export.

    Returns:
      The commit's address.

    Raises:
      UserError: there is no token, no permission to write or no connection, or the repository holds another model.
    """
    check_push(repo)
    api = HfApi()
    try:
        # None leaves the account's own default.
        api.create_repo(repo, exist_ok=True, private=private or None)
        info = api.model_info(repo)
        if private and not info.private:
            raise UserError(f"{_page(repo)} is public; make it private in its settings first, or leave out --private")
        theirs = {sibling.rfilename for sibling in info.siblings or ()}
        if not overwrite and theirs & set(files) and not ("config.json" in theirs and _is_ours(repo)):
            raise UserError(
                f"{_page(repo)} holds something else than a HarmonicRNN export; give --overwrite if it may go"
            )
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(files),
            delete_patterns="sample_*.wav",
            commit_message="HarmonicRNN export",
        )
    except _FAILURES as error:
        raise _explained(error, repo, "write to") from error
    except ValueError as error:  # the hub checks the card's front matter; or the answer is not the hub's
        said = " ".join(str(error).split())[:300]
        mend = "; is --license one that the hub knows?" if "metadata" in said else ""
        raise UserError(f"{_page(repo)} does not take it: {said}{mend}") from error
    return str(commit.commit_url)


def _is_ours(repo: str) -> bool:
    try:
        return is_export(json.loads(Path(hf_hub_download(repo, "config.json")).read_text()))
    except ValueError:
        return False


def is_export(raw: object) -> bool:
    """Whether the content of a config.json is that of an export, of any version."""
    return isinstance(raw, dict) and raw.get("library_name") == "harmonic-rnn" and "config" in raw


def _page(repo: str) -> str:
    return f"{constants.ENDPOINT}/{repo}"


def _explained(error: Exception, repo: str, verb: str, revision: str | None = None) -> UserError:
    """The line for a failure. It never quotes requests or their headers: they hold tokens."""
    page = _page(repo)
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, error.response.headers.get("x-error-message", "")
        if "Invalid credentials" in said or "Invalid user token" in said:
            return UserError(f"{page} does not know the token that it was given; {_LOG_IN} again")
        if isinstance(error, GatedRepoError):
            return UserError(f"{page} needs permission to {verb}: accept its terms there, then {_LOG_IN}")
        if isinstance(error, RevisionNotFoundError):
            return UserError(f"{page} has no revision {revision!r}; give a branch, a tag or a commit of it")
        if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
            what = f"no folder {repo} here and no model {page} that may be read"
            what = what if verb == "read" else f"no model {page} that may be written to"
            return UserError(f"there is {what} ({status}); check the name, or {_LOG_IN}")
        if status == 403:
            return UserError(f"the token gives no permission to {verb} {page} (403); take one that does: {_LOG_IN}")
        detail = f" ({re.sub(r'[^ -~]', ' ', said)[:200]})" if said else ""
        return UserError(f"{page} answers with status {status}{detail}; try again later")
    if constants.HF_HUB_OFFLINE:
        return UserError(f"{page} is not in the cache, and HF_HUB_OFFLINE is set; unset it, or give a folder")
    kept = " and is not in the cache" if verb == "read" else ""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, HfHubHTTPError):
        return _explained(cause, repo, verb, revision)
    return UserError(f"{page} cannot be reached ({type(cause).__name__}){kept}; check the connection and try again")
