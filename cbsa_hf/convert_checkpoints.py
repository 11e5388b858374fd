"""An old path of `cbsa_hf.conversion.convert`, which the next version removes."""

import warnings

from .conversion.convert import *  # noqa: F403


warnings.warn("`cbsa_hf.convert_checkpoints` is now `cbsa_hf.conversion.convert`.", FutureWarning, stacklevel=2)
