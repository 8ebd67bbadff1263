"""From a folder to a repository on the Hub: created where it is new, and brought up to date in one commit.

What is uploaded is exactly what lies in the folder. Files of an earlier publication that have no successor go in the
same commit, so that nobody loads last month's shard beside this month's index; everything else in the repository
stays. What the Hub refuses comes back as a sentence that says what to do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from .licence import Origin
from .published_folder import FORMER, KINDS, has_budget, model_type_in

# A licence may have been put into the repository by hand, and is never taken away.
MODEL_FILES = (*FORMER, *(pattern for kind, patterns in KINDS.items() if kind != "licence" for pattern in patterns))
# The class of all errors of the HTTP library that huggingface_hub uses in this version.
HTTPError = HfHubHTTPError.__bases__[0]


class HubRefused(RuntimeError):
    """The Hub, or the way to it, did not let something through. The message says what to do."""


class Publication(NamedTuple):
    """The repository's address, its last commit, which has everything, and whether it is private."""

    url: str
    commit: CommitInfo
    private: bool


def require_repository_id(repo_id: str) -> None:
    """
    Raises:
        ValueError: if `repo_id` is not `owner/name`. Without the owner nobody else could load what the card says.
    """
    try:
        validate_repo_id(repo_id)
        is_allowed = repo_id.count("/") == 1
    except HFValidationError:
        is_allowed = False
    if not is_allowed:
        raise ValueError(f"`repo_id` is {repo_id!r}; expected is a repository's id on the Hub, 'owner/name'.")


def require_licence(origin: Origin, how: str) -> None:
    """
    Raises:
        ValueError: if it is not known under which licence a model may be published.
    """
    if origin.license is None:
        base = f" made from {origin.base_model}" if origin.base_model else ""
        raise ValueError(
            f"The licence of this model{base} is not known, and weights inherit that of what they were made from; "
            f"name it with {how}, such as llama2, apache-2.0 or other."
        )


def upload(
    folder: str | Path,
    repo_id: str,
    message: str,
    repo_type: str = "model",
    private: bool | None = None,
    replaced: Sequence[str] = MODEL_FILES,
    token: str | None = None,
    revision: str | None = None,
) -> Publication:
    """
    Uploads a folder in one commit; without a commit, if the repository has all of it already.

    Args:
        folder: with what is published, and nothing else.
        private: whether a new repository is private; `None` leaves it to the user's or the organisation's own
            setting. A repository that exists keeps what it is.
        replaced: patterns of the names that publications have: such files in the repository that are not in the
            folder are removed.
        token: by default the one that was logged in with.
        repo_id, message, repo_type, revision: see [`HfApi.upload_folder`].

    Raises:
        ValueError: if `repo_id` is not one, or the card's metadata are not as the Hub wants them.
        HubRefused: if there is no token, it has no right to write there, the Hub cannot be reached, `private` is
            asked for and the repository exists and is public, or it has a model of another kind.
    """
    require_repository_id(repo_id)
    if token is None and get_token() is None:
        raise HubRefused("There is no token of the Hub: log in with `hf auth login`, or set HF_TOKEN.")
    api = HfApi(token=token, library_name="adavtp")
    with _refusals_in_words(repo_id, api.endpoint):
        url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        is_private = bool(api.repo_info(repo_id, repo_type=repo_type).private)
        if private and not is_private:
            raise HubRefused(
                f"{repo_id} exists and is public; make it private in its settings, or choose another name."
            )
        if revision is not None:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, repo_type=repo_type, revision=revision)
        if repo_type == "model" and "config.json" in there:
            _require_adavtp(api, repo_id, revision)
        here = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")}
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            delete_patterns=[name for name in there if name not in here and _matches(name, replaced)] or None,
        )
    return Publication(str(url), commit, is_private)


def _require_adavtp(api: HfApi, repo_id: str, revision: str | None) -> None:
    """That what is replaced is an earlier publication, and not another model under a name that was mistyped."""
    config = Path(api.hf_hub_download(repo_id, "config.json", revision=revision))
    if not has_budget(config):
        raise HubRefused(
            f"{repo_id} has a {model_type_in(config)!r} model, which would be replaced; choose another name."
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path matches one of the patterns; a star stands for no slash."""
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def _refusals_in_words(repo_id: str, endpoint: str) -> Iterator[None]:
    """Says errors of the Hub, and of the way to it, as sentences."""
    try:
        yield
    except HubRefused:
        raise
    except (HTTPError, ConnectionError) as error:
        raise HubRefused(_in_words(error, repo_id, endpoint)) from error
    except RuntimeError as error:
        # What goes wrong while a large file is on its way is wrapped in the file's name.
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise HubRefused(f"{error} {_in_words(error.__cause__, repo_id, endpoint)}") from error


def _in_words(error: Exception, repo_id: str, endpoint: str) -> str:
    response = getattr(error, "response", None)
    if response is None:
        return f"{endpoint} could not be reached: {error}"
    said = getattr(error, "server_message", None) or str(error).strip().splitlines()[-1]
    reasons = {
        401: "the token is not valid: log in again with `hf auth login`",
        403: f"the token has no right to write to {repo_id}: use one with write access, of somebody who owns it",
        404: f"there is no {repo_id}, or the token may not see it",
        409: f"the name {repo_id} is taken, or somebody else is writing to it",
    }
    reason = reasons.get(response.status_code, f"it answered with status {response.status_code}")
    return f"{endpoint} refused: {reason}. It says: {said}"
