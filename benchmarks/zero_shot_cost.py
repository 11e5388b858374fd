"""
Measure how the cost of zero-shot segmentation grows with the photo: the cut in linear time, and a dense cut.

    python benchmarks/zero_shot_cost.py
"""

import time
from collections.abc import Callable

import skimage.data
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from cbsa_hf import ZeroShotSegmenter, load_checkpoint
from cbsa_hf.segmentation.patch_grouping import descriptor_factor
from cbsa_hf.segmentation.spectral import cut_dense, cut_factored


def peak_memory(run: Callable[[], object]) -> float:
    """The peak of what torch allocates in a run, in MiB, without weights."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    # The peak is the largest running sum over all allocations and releases.
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def measure(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the second run, and the peak memory of the first in MiB."""
    peak = peak_memory(run)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started, peak


def main():
    """Print a table of time and memory, of the segmenter and of the cut alone, by the longer side of the photo."""
    torch.set_num_threads(1)
    model, processor = load_checkpoint()
    photo = Image.fromarray(skimage.data.astronaut())
    rows = []
    for side in (192, 512, 1024):
        segmenter = ZeroShotSegmenter(model, processor, long_side=side)
        encoding = segmenter.encode(photo)
        grid, factor = encoding.grid, descriptor_factor(encoding)
        runs = [lambda s=segmenter: s(photo), lambda f=factor: cut_factored(f)]
        if side < 1024:  # would take 64 times as long as 512 px, with matrices of 2 GiB each
            runs.append(lambda f=factor: cut_dense(f.T @ f))
        cells = [f"{seconds:.3g} s, {memory:.0f} MiB" for seconds, memory in map(measure, runs)]
        rows.append([f"{side} px, {grid[0] * grid[1]} patches", *cells, *["not run"] * (3 - len(cells))])
    header = ["input", "the whole segmenter", "of it the cut", "a dense cut of the same affinity"]
    for row in (header, ["---"] * 4, *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
