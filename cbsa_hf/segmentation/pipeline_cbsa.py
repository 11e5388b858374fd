"""Zero-shot segmentation as a pipeline of Transformers: `pipeline("cbsa-zero-shot-segmentation")`."""

import base64

import httpx
from PIL import Image
from transformers import AutoModelForImageClassification, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY, PipelineRegistry

from .images import BYTES_PER_PIXEL, MAX_PIXELS, ImageError, to_image
from .zero_shot import ZeroShotSegmentation, ZeroShotSegmenter


TASK = "cbsa-zero-shot-segmentation"


def fetch(url: str) -> bytes:
    """
    The bytes behind a URL; of a file larger than [`to_image`] accepts only as many as it takes to refuse it.

    Raises:
        ImageError: the server does not answer, or not with a file.
    """
    data = bytearray()
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=60) as response:
            response.raise_for_status()
            for part in response.iter_bytes():
                data += part
                if len(data) > BYTES_PER_PIXEL * MAX_PIXELS:
                    break
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(f"{url} cannot be fetched: {' '.join(str(error).split())}.") from error
    return bytes(data)


def decode_url(url: str) -> bytes:
    """
    The bytes in a URL such as `data:image/png;base64,...`.

    Raises:
        ImageError: they are not in base64.
    """
    try:
        return base64.b64decode(url.partition(",")[2], validate=True)
    except ValueError as error:
        raise ImageError("The image in a `data:` URL is damaged: it is not base64.") from error


class ZeroShotSegmentationPipeline(Pipeline):
    """
    [`ZeroShotSegmenter`] as a pipeline. Images are PIL images, arrays, paths or URLs (`http:`,
    `https:` and `data:`), one or a list. Keywords are
    those of the segmenter, given to `pipeline` for all calls or to one call.

    The result for an image is a dictionary. `mask` is the foreground, a PIL image of 0 and 255. `segments` are
    dictionaries in descending order of `score`, which is above 0 for foreground; each one also has `mask`, and `label`
    and `probability`, which may be None.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> import cbsa_hf

    >>> segment = pipeline("cbsa-zero-shot-segmentation")
    >>> segment("photo.jpg", num_segments=6)["segments"][0]["label"]  # doctest: +SKIP
    ```
    """

    _load_image_processor = True
    _load_tokenizer = _load_feature_extractor = _load_processor = False

    def _sanitize_parameters(self, **options):
        return {}, options, {}

    def preprocess(self, image) -> dict[str, Image.Image]:
        """Read an image, from a URL if it is one."""
        name = None
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            name, image = image, fetch(image)
        elif isinstance(image, str) and image.startswith("data:"):
            image = decode_url(image)
        return {"image": to_image(image, name=name, num_channels=self.model.config.num_channels)}

    def _forward(self, inputs: dict[str, Image.Image], **options) -> dict[str, ZeroShotSegmentation]:
        return {"found": ZeroShotSegmenter(self.model, self.image_processor, **options)(inputs["image"])}

    def postprocess(self, outputs: dict[str, ZeroShotSegmentation]) -> dict:
        """The result as PIL images and plain values."""
        found = outputs["found"]
        segments = [
            {
                "label": segment.name,
                "probability": segment.probability,
                "score": segment.score,
                "mask": Image.fromarray(segment.mask).convert("L"),
            }
            for segment in found.segments
        ]
        return {"mask": Image.fromarray(found.mask).convert("L"), "segments": segments}


def register_in(registry: PipelineRegistry, default: dict | None = None):
    """Add the task to a registry of Transformers, which also notes in the class what `save_pretrained` writes."""
    registry.register_pipeline(
        TASK,
        pipeline_class=ZeroShotSegmentationPipeline,
        pt_model=AutoModelForImageClassification,
        default=default,
        type="image",
    )


def register_pipeline(default: str):
    """
    Make the task known to `pipeline`.

    Args:
        default: path of the checkpoint that `pipeline` loads without a model.
    """
    register_in(PIPELINE_REGISTRY, {"model": (default, "main")})
    note_for_saving()


def note_for_saving():
    """
    Make `save_pretrained` write the task, without a default, into `config.json`, where `trust_remote_code=True` finds
    the pipeline. The registry that does it is thrown away: `pipeline` does not see it.
    """
    register_in(PipelineRegistry({}, {}))


note_for_saving()  # here too, since `register_pipeline` is not called where this file is remote code
