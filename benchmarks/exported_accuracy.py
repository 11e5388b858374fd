"""
What the precisions of an export cost: accuracy, agreement with the model, and time.

    python benchmarks/exported_accuracy.py --dataset_name ../shared/data/imagenette-128

Exports the classifier that ships in the package, in float32 and in 8 bits, which training images calibrate, and
classifies validation images. The contestants take turns, batch by batch; read times as ratios.
"""

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.speed import describe_machine, seconds_of
from benchmarks.workbench import Workbench, table
from cbsa_hf import export_model, load_checkpoint, open_export


@torch.no_grad()
def main():
    """Export, classify, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--dataset_name", required=True, help="labelled images, with the splits train and validation")
    parser.add_argument("--count", type=int, default=960, help="of validation images (%(default)s)")
    parser.add_argument("--calibration", type=int, default=320, help="of training images (%(default)s)")
    args = parser.parse_args()
    model, processor = load_checkpoint()
    bench = Workbench(cache=Path(), dataset_name=args.dataset_name)
    with TemporaryDirectory() as folder:
        calibration = [pixels.numpy() for pixels, _ in bench.photos(processor, args.calibration, "train")]
        exact, int8 = Path(folder) / "float32", Path(folder) / "int8"
        export_model(model, processor, exact, "openvino")
        export_model(model, processor, int8, "openvino", calibration)
        classifiers = {
            "PyTorch, float32": lambda pixels: model(torch.from_numpy(pixels)).logits.numpy(),
            "OpenVINO, float32": open_export(exact),
            "OpenVINO, bfloat16": open_export(exact, "bfloat16"),
            "OpenVINO, 8 bits": open_export(int8),
        }
        print(compare(classifiers, bench.photos(processor, args.count)))


def compare(classifiers: dict, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """A table in Markdown, a row for each classifier; the first is the one that the others are compared with."""
    found = {name: [] for name in classifiers}
    times = {name: [] for name in classifiers}
    for pixels, _ in batches:
        pixels = pixels.numpy()
        for name, classify in classifiers.items():
            found[name].append(classify(pixels).argmax(-1))  # compiles for a new shape
            times[name].append(seconds_of(lambda run=classify, pixels=pixels: run(pixels), "cpu"))
    labels = torch.cat([labels for _, labels in batches]).numpy()
    first, rows = next(iter(classifiers)), []
    for name in classifiers:
        predicted, expected = np.concatenate(found[name]), np.concatenate(found[first])
        ratio = statistics.median(one / other for one, other in zip(times[first], times[name], strict=True))
        shares = [f"{(predicted == truth).mean():.4f}" for truth in (labels, expected)]
        rows.append([name, *shares, f"{ratio:.2f}"])
    title = f"{len(labels)} images, batches of {len(batches[0][1])}. {describe_machine('cpu')}."
    return title + "\n\n" + table(["", "accuracy", "same class as the first", "times as fast as the first"], rows)


if __name__ == "__main__":
    main()
