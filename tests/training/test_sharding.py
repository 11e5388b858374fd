"""Two processes shard weights with `fully_shard`, train them, and save them whole and in shards."""

import os
import subprocess
import sys

import numpy as np
import torch
from accelerate.utils import merge_fsdp_weights
from conftest import ROOT
from safetensors.torch import load_file
from torch.nn import functional as F

from cbsa_hf import CBSAConfig, CBSAForImageClassification, load_checkpoint
from training.engine.results import model_weights


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
SIZES |= {"patch_embedding_type": "patchify", "num_labels": 3}
SHARDED = f"""
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import ViTImageProcessorPil

from cbsa_hf import CBSAConfig, CBSAForImageClassification
from training.engine.results import write_results
from training.tasks.classification import ClassificationLoss

folder, mesh = Path(sys.argv[1]), init_device_mesh("cpu", (2,))
rank = mesh.get_rank()
torch.manual_seed(0)
losses = ClassificationLoss(CBSAForImageClassification(CBSAConfig(**{SIZES!r})), label_smoothing=0.0)
for layer in losses.model.base_model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(losses, mesh=mesh)
optimizer = torch.optim.SGD(losses.parameters(), lr=0.1)
pixels, labels = torch.load(folder / "batch.pt", weights_only=True)
losses(pixels[rank::2], labels[rank::2])["loss"].backward()
optimizer.step()
assert all(weight.to_local().numel() < weight.numel() for weight in losses.parameters() if weight.shape[0] > 1)
checkpoint.save({{"model": get_model_state_dict(losses)}}, checkpoint_id=folder / "shards")
# As `Accelerator.get_state_dict` does for sharded weights.
state = get_model_state_dict(losses, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    arguments = {{"dataset_name": "somebody/data", "validation_split": "validation", "seed": 0, "batch_size": 4}}
    arguments |= {{"keep_best": False}}
    results = {{"arguments": arguments, "metrics": {{"accuracy": 0.5}}, "processes": 2, "seconds": 1.0, "step": 1}}
    processor = ViTImageProcessorPil(size={{"height": 32, "width": 32}}, do_convert_rgb=True)
    write_results(folder / "result", losses.model, state, processor, results, "accuracy")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_sharded_weights_are_saved_whole(tmp_path):
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.normal(size=(4, 3, 32, 32))).float()
    labels = torch.tensor([0, 2, 1, 0])
    torch.save((pixels, labels), tmp_path / "batch.pt")
    (tmp_path / "result").mkdir()
    (tmp_path / "script.py").write_text(SHARDED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(tmp_path / "script.py"), str(tmp_path)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr

    # The same step without sharding.
    torch.manual_seed(0)
    model = CBSAForImageClassification(CBSAConfig(**SIZES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    F.cross_entropy(model(pixels).logits, labels).backward()
    optimizer.step()
    expected = model.state_dict()
    assert any((expected[name] - before[name]).abs().max() > 1e-3 for name in expected)

    loaded, _ = load_checkpoint(str(tmp_path / "result"))
    assert type(loaded) is CBSAForImageClassification
    again = CBSAForImageClassification.from_pretrained(tmp_path / "result")
    merge_fsdp_weights(str(tmp_path / "shards"), str(tmp_path / "merged"))
    merged = model_weights(load_file(tmp_path / "merged" / "model.safetensors"))
    for found in (loaded.state_dict(), again.state_dict(), merged):
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-5)
    card = (tmp_path / "result" / "README.md").read_text()
    assert "`CBSAForImageClassification` of cbsa-hf" in card
