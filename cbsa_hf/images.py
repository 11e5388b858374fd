"""An old path of `cbsa_hf.segmentation.images`, which the next version removes."""

import warnings

from .segmentation.images import *  # noqa: F403


warnings.warn("`cbsa_hf.images` is now `cbsa_hf.segmentation.images`.", FutureWarning, stacklevel=2)
