"""What makes the models fast changes no output and no gradient."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from speed import as_reference

from cbsa_hf import CBSAConfig, CBSAForImageClassification
from cbsa_hf.modeling_cbsa import CBSAISTA


MEMORY = Path(__file__).resolve().parents[2] / "training" / "engine" / "memory.py"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_a_training_step(dtype):
    """The same as of the formulas as the reference implementation writes them."""
    torch.manual_seed(0)
    config = CBSAConfig(
        image_size=48, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_labels=5
    )
    model = CBSAForImageClassification(config).to(dtype).train()
    pixel_values, labels = torch.randn(4, 3, 48, 48, dtype=dtype), torch.arange(4)
    gradients = []
    for contestant in (model, as_reference(model)):
        contestant(pixel_values, labels=labels).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in contestant.parameters()]))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    assert (gradients[0] - gradients[1]).norm() <= tolerance * gradients[1].norm()


@pytest.mark.parametrize("num_tokens", [3, 40])
def test_gradients_of_ista(num_tokens):
    """With y = relu(M x + b) and M = I + s (D^T - D^T D): dD = s (dM^T - D dM - D dM^T)."""
    torch.manual_seed(0)
    ista = CBSAISTA(CBSAConfig(hidden_size=8, num_attention_heads=2, ista_step_size=0.3)).double()
    torch.nn.init.normal_(ista.weight)
    x = torch.randn(num_tokens, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(num_tokens, 8, dtype=torch.float64)
    output = ista(x)
    output.backward(upstream)

    dictionary = ista.weight.detach()
    matrix = torch.eye(8, dtype=torch.float64) + 0.3 * (dictionary.T - dictionary.T @ dictionary)
    before = x.detach() @ matrix.T - 0.3 * 0.1
    torch.testing.assert_close(output.detach(), before.clamp(min=0))
    masked = upstream * (before > 0)
    torch.testing.assert_close(x.grad, masked @ matrix)
    outer = masked.T @ x.detach()
    torch.testing.assert_close(ista.weight.grad, 0.3 * (outer.T - dictionary @ outer - dictionary @ outer.T))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc alone is told to keep memory")
def test_freed_memory_is_kept():
    """Buffers of 64 MiB, allocated and freed in turn, are mapped once; without it, every time."""
    script = f"""
import ctypes, resource, runpy
module = runpy.run_path({str(MEMORY)!r})
if not hasattr(ctypes.CDLL(None), "mallopt"):
    raise SystemExit("no glibc")
for keeps in (False, True):
    if keeps:
        module["keep_freed_memory"]()
        bytearray(2**26)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(2**26)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if "no glibc" in done.stderr:
        pytest.skip("no glibc")
    before, after = map(int, done.stdout.split())
    assert after < before / 10
