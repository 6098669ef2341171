"""Models on the hub (huggingface.co, or the address in HF_ENDPOINT): downloaded, and uploaded when asked."""

import re
from pathlib import Path

from ranjax.data.files import hub_answers
from ranjax.errors import UserError, needing

MODEL_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def download(model: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """The folder in the hub's cache that has these files of a model; without a network, as they were downloaded before.

    Raises:
      UserError: for what is no id, a model that is not there or may not be read, a hub that does not answer.
    """
    if not MODEL_ID.fullmatch(model):
        raise UserError(f"{model} is neither a folder nor the id of a model on the hub, OWNER/NAME.")
    with needing("export"):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # of its client

    offline = not hub_answers()
    try:
        found = Path(snapshot_download(model, revision=revision, allow_patterns=list(files), local_files_only=offline))
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(
            f"{model} is no folder here, and could not be loaded from the hub: {_reason(error)}. With a copy in the "
            "cache no network is needed (HF_HOME says where); a model that is private needs HF_TOKEN."
        ) from None
    missing = [name for name in files if not (found / name).is_file()]
    if missing:
        raise UserError(f"{model} on the hub is no model that ranjax wrote: it has no {', '.join(missing)}.")
    return found


def upload(folder: Path, model: str) -> str:
    """Uploads a folder as a model, which is created if it is not there, and returns its address.

    Raises:
      UserError: for what is no id; where the hub does not answer, or does not allow it.
    """
    check_id(model)
    with needing("export"):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        api = HfApi()
        address = api.create_repo(model, exist_ok=True)
        api.upload_folder(repo_id=model, folder_path=folder, commit_message="Model exported by ranjax")
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(
            f"--push-to-hub {model} failed: {_reason(error)}. The model is in {folder}. A token that may write is "
            "needed: HF_TOKEN, or `hf auth login`."
        ) from None
    return str(address)


def check_id(model: str) -> None:
    """Raises a UserError for what is no id of a model on the hub."""
    if not MODEL_ID.fullmatch(model):
        raise UserError(f"--push-to-hub must be OWNER/NAME; got {model}.")


def _reason(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
