"""Record the outputs of the shipped checkpoint for the example photo. Run it only if the checkpoint was retrained."""

import numpy as np
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from test_checkpoint import GOLDEN, compute

from cbsa_hf import load_checkpoint


if __name__ == "__main__":
    photo = Image.fromarray(skimage.data.chelsea())
    tensors = compute(*load_checkpoint(), photo)
    tensors["mask"] = torch.from_numpy(np.packbits(tensors["mask"].numpy()))
    save_file(tensors, GOLDEN)
