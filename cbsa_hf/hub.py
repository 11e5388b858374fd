"""Publish a checkpoint on the Hub, with code, image processor and model card."""

from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError

from .checkpoints import default_checkpoint, load_checkpoint
from .checkpoints.model_cards import auto_class_of, loading_example


REQUIRED_METADATA = ("library_name", "pipeline_tag", "license")


def load_card(checkpoint: str) -> ModelCard:
    """
    The model card in a folder or of a hub id.

    Raises:
        ValueError: there is none, or its metadata lacks one of `REQUIRED_METADATA`, which the Hub needs.
    """
    try:
        card = ModelCard.load(Path(checkpoint) / "README.md" if Path(checkpoint).is_dir() else checkpoint)
    except Exception as error:  # of YAML, of the types of the metadata, of the Hub, or a RecursionError
        raise ValueError(f"{checkpoint} has no model card that can be read; write its README.md.") from error
    missing = [name for name in REQUIRED_METADATA if not getattr(card.data, name)]
    if missing:
        raise ValueError(f"The model card of {checkpoint} does not give {', '.join(missing)} in its metadata.")
    return card


def load_by_id(text: str, former: str, name: str, auto_class: str) -> str:
    """
    The text of a model card with its example loading the model by its hub id; an example is added if there is none.

    Args:
        text: Markdown.
        former: folder or hub id that the example may load from now; of a path, the last part counts too.
        name: the hub id.
        auto_class: name of the Auto class, for the example that is added.
    """
    for known in (former, Path(former).resolve().name):
        for loads in ("from_pretrained(", "model="):
            text = text.replace(f'{loads}"{known}"', f'{loads}"{name}"')
    if f'from_pretrained("{name}"' in text:
        return text
    return f"{text.rstrip()}\n\n## From the Hub\n\n{loading_example(name, auto_class)}\n"


def push_checkpoint(name: str, checkpoint: str | None = None, private: bool = False) -> str:
    """
    Publish a checkpoint with the code that `trust_remote_code=True` runs.

    Args:
        name: the hub id to publish under, `user/model`.
        checkpoint: the folder or hub id of the checkpoint; by default [`default_checkpoint`].
        private: whether a new repository is private; a repository that exists stays as it is.

    Returns:
        The URL of the model's page.

    Raises:
        ValueError: the checkpoint is incomplete or has no model card, or the Hub refuses. All files are uploaded in
            one commit, or none.
    """
    checkpoint = default_checkpoint() if checkpoint is None else checkpoint
    model, processor = load_checkpoint(checkpoint)
    card = load_card(checkpoint)
    card.text = load_by_id(card.text, checkpoint, name, auto_class_of(model))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        card.save(Path(folder) / "README.md")
        api = HfApi()
        try:
            url = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {type(model).__name__}")
        except (HTTPError, HFValidationError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"The Hub did not take {name}: {reason}") from error
    return str(url)
