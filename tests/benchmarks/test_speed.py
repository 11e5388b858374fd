"""Optimisations change no output and no gradient, and layers take no more operations than recorded here."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import as_reference
from benchmarks.zero_shot_cost import peak_memory
from cbsa_hf import CBSAConfig, CBSAForImageClassification, CBSAModel, fold
from cbsa_hf.modeling_cbsa import CBSAISTA


MEMORY = ROOT / "training" / "engine" / "memory.py"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_a_training_step(dtype):
    """Gradients are those of the formulas in the reference implementation."""
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


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's malloc can be told to keep memory")
def test_freed_memory_is_kept():
    """A buffer of 64 MiB that is freed and allocated again causes few page faults."""
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


class LargeOperations(TorchDispatchMode):
    """Counts operations by name, without views, whose result has at least `num_values` values."""

    def __init__(self, num_values: int):
        super().__init__()
        self.num_values, self.found = num_values, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        if not function.is_view and "view" not in function.name() and first.numel() >= self.num_values:
            self.found[function.overloadpacket.__name__] += 1
        return result


BATCH, TOKENS, WIDTH, HEADS, REPRESENTATIVES = 2, 65, 32, 2, 16


def one_layer(folded: bool):
    """A folded layer, or one in training mode, and tokens for it."""
    config = CBSAConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        image_size=64,
        patch_size=8,
        representatives_size=4,
    )
    model = CBSAModel(config)
    layer = (fold(model) if folded else model.train()).layers[0]
    return layer, torch.randn(BATCH, TOKENS, WIDTH, requires_grad=not folded)


def count_and_measure(run) -> tuple[dict[str, int], float, int]:
    """Large operations by name, peak memory in bytes per token and channel, and floating-point operations."""
    with LargeOperations(BATCH * TOKENS * WIDTH) as operations:
        run()
    with FlopCounterMode(display=False) as counter:
        run()
    return dict(operations.found), peak_memory(run) * 2**20 / (BATCH * TOKENS * WIDTH), counter.get_total_flops()


@torch.no_grad()
def test_operations_of_inference():
    """Fails if a layer takes another copy, pass over the tokens, or buffer."""
    layer, tokens = one_layer(folded=True)
    found, memory, flops = count_and_measure(lambda: layer(tokens, (8, 8)))
    assert found == {
        "native_layer_norm": 2,
        "addmm": 3,  # projection, output layer, ISTA
        "clone": 2,  # heads are split and merged
        "bmm": 2,  # scores and broadcast; other products have the small size of the representatives
        "_softmax": 1,
        "add": 1,  # residual
        "relu": 1,
    }
    assert memory <= 4 * 7
    linear = 3 * TOKENS * WIDTH**2
    attention = 3 * TOKENS * WIDTH * REPRESENTATIVES + 2 * WIDTH * REPRESENTATIVES**2
    assert flops == 2 * BATCH * (linear + attention)


def test_operations_of_a_training_step():
    layer, tokens = one_layer(folded=False)
    found, memory, flops = count_and_measure(lambda: layer(tokens, (8, 8)).sum().backward())
    assert found == {
        "native_layer_norm": 2,
        "mm": 4,  # projection; backward of the three linear layers
        "addmm": 2,
        "clone": 4,
        "bmm": 6,
        "_softmax": 1,
        "add": 5,  # residual; sums of gradients of tokens and attention
        "relu": 1,
        "threshold_backward": 1,
        "native_layer_norm_backward": 2,
        "_softmax_backward_data": 1,
        "slice_backward": 1,  # the patches are a slice of the tokens
    }
    assert memory <= 4 * 12.5
    linear = 3 * TOKENS * WIDTH**2
    attention = 3 * TOKENS * WIDTH * REPRESENTATIVES + 2 * WIDTH * REPRESENTATIVES**2
    assert flops == 3 * 2 * (BATCH * (linear + attention) + WIDTH**3)  # D^T D is computed, too
