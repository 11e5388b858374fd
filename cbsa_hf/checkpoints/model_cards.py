"""Parts of the model cards of converted and of published checkpoints."""

from ..modeling_cbsa import CBSAPreTrainedModel


def auto_class_of(model: CBSAPreTrainedModel) -> str:
    """Name of the Auto class that loads a model of this library, such as `AutoModelForImageClassification`."""
    return f"AutoModel{type(model).__name__.removeprefix('CBSA').removeprefix('Model')}"


def loading_example(name: str, auto_class: str) -> str:
    """Markdown: a block of Python that loads the model and the image processor with that id from the Hub."""
    return f"""```python
from transformers import AutoImageProcessor, {auto_class}

processor = AutoImageProcessor.from_pretrained("{name}")
model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
```"""
