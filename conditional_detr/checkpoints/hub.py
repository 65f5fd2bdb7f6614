"""Upload a checkpoint with its model card to the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from conditional_detr.checkpoints.files import is_hub_id
from conditional_detr.checkpoints.model_card import CardDetails
from conditional_detr.checkpoints.saving import save_pretrained
from conditional_detr.checkpoints.tensor_files import first_line
from conditional_detr.modeling.detection_transformer import DetectionTransformer


def push_to_hub(
    model: DetectionTransformer,
    repository: str,
    *,
    card: CardDetails | str | Path | None = None,
    dtype: torch.dtype | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a model in the published format, with a model card, in one commit.

    The repository is created if it does not exist. Its earlier files stay in its history.

    Args:
        model: the model.
        repository: the hub id, "owner/name".
        card: what the generated card says of data, recipe, metrics and licence; or the file of a card; None: a card
            of what the model knows.
        dtype: precision of the weights; default: the model's own.
        private: whether a new repository is private; None: as the owner's settings say.
        revision: branch to commit to, created if it does not exist; None: the main branch.
        token: hub token; default: that of ``HF_TOKEN`` or of the login.

    Returns:
        The address of the repository.

    Raises:
        OSError: the hub cannot be reached or fails; PermissionError without a token, or if it may not write.
        ValueError: not a hub id, or a model or card that cannot be saved.
    """
    from huggingface_hub import HfApi

    check_repository(repository)
    api = HfApi(token=_token(repository, token))
    with TemporaryDirectory(prefix="conditional_detr_") as folder:
        save_pretrained(model, folder, dtype=dtype, card=CardDetails() if card is None else card, name=repository)
        with _clear_errors(repository):
            address = api.create_repo(repository, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=folder, revision=revision, commit_message="Upload a checkpoint"
            )
    return str(address)


def check_repository(repository: str) -> None:
    """Raise ValueError unless a string has the form of a hub id."""
    if not is_hub_id(repository):
        raise ValueError(f"repository: expected a hub id 'owner/name', got {repository!r}")


def _token(repository: str, token: str | None) -> str:
    """Return the token to use.

    Raises:
        PermissionError: there is none.
    """
    from huggingface_hub import get_token

    token = token or get_token()
    if not token:
        raise PermissionError(
            f"{repository}: expected a token of the hub to upload with, got none; set HF_TOKEN, or log in by"
            " 'hf auth login'"
        )
    return token


@contextmanager
def _clear_errors(repository: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into OSError, one line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = None if error.response is None else error.response.status_code
        if status == 401:
            raise PermissionError(f"{repository}: the hub does not accept the token ({first_line(error)})") from error
        if status == 403:
            raise PermissionError(
                f"{repository}: the token may not write to this repository; expected a token with the permission"
                f" 'write' of an owner or member ({first_line(error)})"
            ) from error
        raise OSError(f"{repository}: the upload failed: {first_line(error)}") from error
    except Exception as error:  # the error of a failed connection differs between huggingface_hub's versions
        cause = "" if error.__cause__ is None else f" ({first_line(error.__cause__)})"
        raise OSError(f"{repository}: the upload failed: {first_line(error)}{cause}") from error
