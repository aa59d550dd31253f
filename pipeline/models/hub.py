"""Requests to the Hugging Face hub, with one-sentence errors."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.errors import Fail, sentence
from pipeline.models.directory import CONFIGURATION

TRIES = 3  # of a request; the hub's client retries lost connections and HTTP 429 itself

Found = TypeVar("Found")


def fetch(repo_id: str, revision: str, weights: list[str]) -> Path:
    """The hub cache's snapshot with configuration and the named weight files, downloaded where missing."""
    from huggingface_hub import snapshot_download

    patterns = [*CONFIGURATION, *weights]
    return Path(from_hub("base", snapshot_download, repo_id, revision=revision, allow_patterns=patterns))


def from_hub(section: str, request: Callable[..., Found], repo_id: str, *, revision: str, **options: Any) -> Found:
    """The result of `request`; raises `Fail` naming the section of params.yaml that asks.

    The hub's client does not retry server errors or files of a wrong length: they are tried again here.
    """
    from httpx import HTTPError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    check_token()
    problem = ""
    for attempt in range(TRIES):
        time.sleep(2.0 * attempt)
        try:
            return request(repo_id, revision=revision, **options)
        except GatedRepoError:
            page = f"https://huggingface.co/{'datasets/' if 'repo_type' in options else ''}{repo_id}"
            raise Fail(f"{repo_id} is gated: accept its licence at {page}, then set HF_TOKEN") from None
        except RepositoryNotFoundError:
            raise Fail(
                f"{section}.repo_id: the hub has no {repo_id}, or it is private; check it or set HF_TOKEN"
            ) from None
        # The hub's errors are HTTPError or OSError; ValueError is an answer that is no JSON or no text.
        except (HTTPError, OSError, ValueError) as error:
            if sentence(error):
                why = getattr(error, "strerror", None) or type(error).__name__
                raise Fail(
                    f"{repo_id} cannot be written into the hub's cache ({why}); free disk or set HF_HOME to another "
                    "directory, then run `dvc repro`"
                ) from None
            status = http_status(error)
            if status == 401:
                raise Fail(f"the hub refuses HF_TOKEN (HTTP 401 for {repo_id}); set it to a valid token") from None
            problem = f"HTTP {status}" if status else type(error).__name__
            if status < 500 and "Consistency check failed" not in str(error):
                break
    raise Fail(
        f"{repo_id} at {revision} could not be fetched from the hub ({problem}); "
        f"check the network and {section}.revision, then run `dvc repro`"
    )


def check_token() -> None:
    """Raise `Fail` if HF_TOKEN cannot be sent as an HTTP header; the client's error would not name it."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", token):
        raise Fail("HF_TOKEN in the environment has characters that no token has; set it to your token, or unset it")


def http_status(error: BaseException | None) -> int:
    """The HTTP status of an error of the hub's client or of its causes; 0 if there is none."""
    while error:
        response: Any = getattr(error, "response", None)
        if response is not None:
            return response.status_code
        error = error.__cause__ or error.__context__
    return 0
