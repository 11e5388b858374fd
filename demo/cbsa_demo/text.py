"""What the page says in words: how to use it from code, and what it cannot do."""

CODE = """
import skimage.data
from cbsa_hf import ZeroShotSegmenter, load_checkpoint

found = ZeroShotSegmenter(*load_checkpoint())(skimage.data.coffee())
print(found.mask.mean(), [segment.score for segment in found.segments])
""".strip()

CLIENT = """
from gradio_client import Client, handle_file

page = Client("http://127.0.0.1:7860")
print(page.predict(photo=handle_file("photo.jpg"), num_segments=4, api_name="/segment")["segments"])
""".strip()

SHELL = """
cbsa segment photo.jpg -o overlay.png   # the foreground, and its mask
cbsa inspect photo.jpg -o report/       # pictures and numbers of every layer
""".strip()

AGENT = '{"mcpServers": {"cbsa": {"url": "http://127.0.0.1:7860/gradio_api/mcp/"}}}'

ENDPOINTS = """
What the page shows as pictures, its endpoints give as numbers: `/choices`, `/segment`, `/steps`, `/attention`,
`/inside`, `/compare`, `/street`, `/download`. *Use via API or MCP* at the foot of the page describes them. They are
tools for agents, too.
"""

STREET = """
<p>The segmenter that ships gives every pixel one of eleven classes: sky, building, pole, road, pavement, tree, sign,
fence, car, pedestrian, bicyclist. Whatever the photo shows, it gets these; upload a street.</p>
"""

LIMITS = """
The classifier that ships has 1.6 million parameters, knows ten classes of ImageNet, and never saw a mask. This is how
far its foreground overlaps with the true one, on 117 photos of COCO:

| foreground | mean IoU |
|---|---|
| **normalised cut** (`ncut`) | **0.431** |
| groups by representatives | 0.406 |
| attention of CLS | 0.383 |
| a centred ellipse, whatever the photo | 0.343 |
| everything is foreground | 0.339 |

- On 45 % of these photos the overlap is 0.5 or more; on 33 % it is below 0.25: the mask takes a part of the object,
  much around it, or another thing.
- Whatever it sees gets one of ten names. Where none is likely, the legend says so.
- Single patches draw much of the attention in many layers, as in other vision transformers without register tokens.
- The model for street scenes saw 367 images of one town. Its mean IoU is 0.541 on the test images; it often misses
  poles and signs. Do not drive by it.
"""
