"""Parts of the model cards of converted, trained and published checkpoints."""

from pathlib import Path

from huggingface_hub import ModelCard

from ..modeling_cbsa import CBSAPreTrainedModel


USES = {  # of the outputs of each Auto class, in the example of a model card
    "AutoModel": "print(outputs.last_hidden_state.shape)  # CLS and patches",
    "AutoModelForImageClassification": """\
print(model.config.id2label[outputs.logits[0].argmax().item()])

segment = pipeline("cbsa-zero-shot-segmentation", model="{name}", trust_remote_code=True)
segment("photo.jpg")["mask"].save("foreground.png")""",
    "AutoModelForSemanticSegmentation": """\
(labels,) = processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])
print({{model.config.id2label[label] for label in labels.unique().tolist()}})""",
}


def auto_class_of(model: CBSAPreTrainedModel) -> str:
    """Name of the Auto class that loads a model of this library, such as `AutoModelForImageClassification`."""
    name = type(model).__name__.removeprefix("FSDP")  # of sharded models
    return f"AutoModel{name.removeprefix('CBSA').removeprefix('Model')}"


def base_model_of(source: str) -> str | list[str] | None:
    """
    What a model card gives as `base_model` of a model that comes from `source`: the hub id itself, or what the card in
    that folder gives. None if that is not known.
    """
    if not Path(source).exists():
        return source if "/" in source else None
    card = Path(source) / "README.md"
    try:
        return ModelCard.load(card).data.base_model if card.is_file() else None
    except Exception:  # of YAML, or of the types of the metadata: a card that cannot be read names no model
        return None


def loading_example(name: str, auto_class: str) -> str:
    """Markdown: a block of Python that loads the model of that id from the Hub, and runs it on `photo.jpg`."""
    also = ", pipeline" if "pipeline(" in USES[auto_class] else ""
    return f"""```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, {auto_class}{also}

processor = AutoImageProcessor.from_pretrained("{name}")
model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
image = Image.open("photo.jpg")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
{USES[auto_class].format(name=name)}
```"""
