"""Pushes weights and their model card to the Hugging Face Hub, and pulls them; needs the extra [hub]."""

from __future__ import annotations

import os
import pathlib
import tempfile
from typing import Any

from regnet_flax.errors import HubError, WeightsError, one_line
from regnet_flax.modes import export, model_card
from regnet_flax.trained import load

FILE = export.FILES["safetensors"]


def _hub() -> Any:
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WeightsError('the Hub needs huggingface_hub: pip install "regnet-flax[hub]"') from error
    return huggingface_hub


def push(
    source: str | os.PathLike[str],
    repository: str,
    *,
    checkpoint: str | int = "best",
    seed: int | None = None,
    private: bool = False,
    message: str = "",
) -> str:
    """Commits a run's weights, or a file of weights, with their model card to a repository of the Hub.

    A repository that does not exist is created. Log in once with `hf auth login`, or set HF_TOKEN.

    Args:
      source: a workdir; or a .safetensors file that `--mode export` wrote, with its card beside it.
      repository: "user/name".
      checkpoint: for a workdir: "best", "last" or a step.
      seed: for a workdir in which several seeds trained together; the first by default.
      private: whether only its owner can see a new repository.
      message: the commit's message.

    Returns:
      The commit's URL.

    Raises:
      WeightsError: the file is not a .safetensors file or has no card beside it, or huggingface_hub is not installed.
      HubError: the Hub refuses the commit, or cannot be reached.
      ConfigError, WorkdirError, CheckpointError: see `regnet_flax.load`.
    """
    hub, source = _hub(), pathlib.Path(source)
    with tempfile.TemporaryDirectory() as folder:
        if source.is_dir():
            trained = load(source, checkpoint, seed=seed)
            trained.config.export.format, trained.config.export.path = "safetensors", str(pathlib.Path(folder, FILE))
            file = export.export_model(trained, source)
            card = file.with_name(model_card.NAME)
        else:
            file, card = source, model_card.find(source)
            if file.suffix != ".safetensors" or not file.is_file():
                raise WeightsError(f"{file} is not a .safetensors file: name one from --mode export, or a workdir")
            if card is None:
                raise WeightsError(f"{file} has no model card beside it: export it again with --mode export")
        text = model_card.of_one_file(card.read_text(encoding="utf-8"), file.name, FILE)
        files = [
            hub.CommitOperationAdd(FILE, str(file)),
            hub.CommitOperationAdd(model_card.NAME, text.encode()),
        ]
        try:
            api = hub.HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.create_commit(repository, files, commit_message=message or f"{FILE} by regnet_flax")
        except Exception as error:  # the exceptions of its HTTP client differ between versions
            raise HubError(f"{repository} could not be written: {one_line(error)}") from error
    return str(done.commit_url)


def pull(repository: str, *, revision: str | None = None) -> pathlib.Path:
    """Fetches weights that `push` committed, into huggingface_hub's cache.

        trained = regnet_flax.load(hub.pull("user/name"))
        probabilities = trained.predict("photo.jpg")

    Args:
      repository: "user/name".
      revision: a branch, a tag or a commit; the newest commit by default.

    Returns:
      The file, for `model.init_from` or `regnet_flax.load`; its card is beside it.

    Raises:
      WeightsError: huggingface_hub is not installed.
      HubError: there is no such repository, file or revision; or the Hub cannot be reached, and the file is not in the
        cache.
    """
    api = _hub().HfApi()
    try:
        file = api.hf_hub_download(repository, FILE, revision=revision)
        # From the same commit, even if there is a newer one by now.
        api.hf_hub_download(repository, model_card.NAME, revision=pathlib.Path(file).parent.name)
    except Exception as error:
        raise HubError(f"{repository} could not be read: {one_line(error)}") from error
    return pathlib.Path(file)
