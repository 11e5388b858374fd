"""
Check the claims of the paper with small models on two CPU cores, and write the results to `docs/claims.md`.

    python benchmarks/claims.py --dataset_name ../shared/data/imagenette-128 --masks_name ../shared/data/coco128-seg \
        --checkpoints FOLDER

FOLDER is the output of `training/compare.py`: classifiers that differ only in their attention, in the subfolders
`cbsa-0`, `mssa-0`, `tssa-0` and `softmax-0`. Claims whose data or checkpoints are not given are not checked. For them
the page keeps the earlier result, or says "not run". Trained models and scores are kept in `--cache_dir`, so an
interrupted run continues where it stopped.
"""

import json
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import HfArgumentParser

from benchmarks.model_claims import adaptation, objective, pooled_representatives, robustness, zero_shot_segmentation
from benchmarks.operator_claims import linear_cost, union_of_subspaces
from benchmarks.workbench import NOT_RUN, Finding, Workbench, table


CLAIMS = {
    1: (
        "Zero-shot segmentation: thresholded attention maps of a classifier segment objects; CBT ahead of CRATE and "
        "of softmax attention.",
        zero_shot_segmentation,
    ),
    2: (
        "Layers do what the objective says: the coding rate of the projected tokens falls through the attention "
        "steps, sparsity rises through ISTA.",
        objective,
    ),
    3: (
        "Pooled initial representatives keep the attention matrix at a higher rank than learned ones.",
        pooled_representatives,
    ),
    4: (
        "Accuracy degrades more slowly than softmax attention when noise is added to the projection weights.",
        robustness,
    ),
    5: ("Cost grows linearly with the number of tokens.", linear_cost),
    6: (
        "On synthetic data drawn around a union of low-dimensional subspaces, iterating the operator with the true "
        "bases compresses the tokens onto them.",
        union_of_subspaces,
    ),
    7: (
        "A pretrained ViT can be adapted: replacing its attention and fine-tuning loses little.",
        adaptation,
    ),
}


@dataclass
class Arguments:
    """The options of this script."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "labelled images with a `train` and a `validation` split: claims 2, 3, 4, 7"}
    )
    masks_name: str | None = field(default=None, metadata={"help": "images with masks, a `train` split: claim 1"})
    checkpoints: str | None = field(
        default=None, metadata={"help": "`--output_dir` of `training/compare.py`: claims 1, 2, 4"}
    )
    claims: list[int] = field(
        default_factory=lambda: list(CLAIMS), metadata={"help": "which to check; the others keep their last results"}
    )
    output: str = field(default="docs/claims.md", metadata={"help": "page to write; pictures go beside it"})
    cache_dir: str = field(default="runs/claims", metadata={"help": "folder for trained models and results"})


def describe_machine() -> str:
    """Versions and CPU cores, for the page."""
    return (
        f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {os.cpu_count()} CPU cores"
    )


def save_finding(number: int, finding: Finding, seconds: float, cache: Path, docs: Path):
    """Save the picture beside the page, and everything else as JSON in the cache. [`write_page`] reads both."""
    picture = None
    if finding.picture is not None:
        caption, image = finding.picture
        picture = {"caption": caption, "name": f"claim-{number}.png"}
        partial = docs / f".{picture['name']}.partial"
        image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(partial, "PNG", optimize=True)
        partial.replace(docs / picture["name"])
    found = {
        "run": finding.run,
        "verdicts": finding.verdicts,
        "tables": finding.tables,
        "picture": picture,
        "seconds": seconds,
        "machine": describe_machine(),
    }
    partial = cache / f"claim-{number}.partial"
    partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    partial.replace(cache / f"claim-{number}.json")


def write_page(output: Path, cache: Path):
    """Write the page from the findings in the cache."""
    summary, sections = [], []
    for number, (claim, _) in CLAIMS.items():
        path = cache / f"claim-{number}.json"
        section = [f"## {number}. {claim}"]
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            verdicts = found["verdicts"]
            section += [f"- {part}: **{verdict}**; {reason}" for part, (verdict, reason) in verdicts.items()]
            if found["run"]:
                cost = f"{found['seconds']:.0f} s besides what the cache had; {found['machine']}."
                section.append(f"\n{found['run']} ({cost})")
            section += [f"\n{text}" for text in found["tables"]]
            if found["picture"]:
                section.append(f"\n![{claim}]({found['picture']['name']})\n\n*{found['picture']['caption']}*")
        else:
            verdicts = {claim: (NOT_RUN, "")}
        summary += [[number, part, f"**{verdict}**"] for part, (verdict, _) in verdicts.items()]
        sections.append("\n".join([section[0], "", *section[1:]]))
    introduction = (
        "# The claims of the paper, checked\n\n"
        "Written by `python benchmarks/claims.py --dataset_name ../shared/data/imagenette-128 --masks_name "
        "../shared/data/coco128-seg --checkpoints FOLDER`. Everything here is small: models of one to two million "
        "parameters or less, ten classes, minutes on two cores. *Holds here* and *does not hold here* speak of that "
        "scale and no other; *cannot tell* means that models or seeds disagree or the difference is too small.\n"
    )
    page = "\n".join([introduction, table(["", "claim", "verdict"], summary), "", "\n\n".join(sections)]) + "\n"
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(output)


def main(args: Arguments):
    """
    Check the chosen claims, save the findings, and write the page.

    Raises:
        ValueError: if a claim or a folder does not exist.
    """
    unknown = [number for number in args.claims if number not in CLAIMS]
    if unknown:
        raise ValueError(f"There is no claim {unknown[0]}; they are {', '.join(map(str, CLAIMS))}.")
    checkpoints = None if args.checkpoints is None else Path(args.checkpoints)
    if checkpoints is not None and not checkpoints.is_dir():
        raise ValueError(f"`--checkpoints {checkpoints}` is no folder.")
    output, cache = Path(args.output), Path(args.cache_dir)
    if not output.parent.is_dir():
        raise ValueError(f"There is no folder {output.parent} to write {output.name} to.")
    cache.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bench = Workbench(cache, args.dataset_name, args.masks_name, checkpoints)
    for number in args.claims:
        started = time.time()
        finding = CLAIMS[number][1](bench)
        if (
            finding.run or not (cache / f"claim-{number}.json").is_file()
        ):  # an earlier finding is not replaced by "not run"
            save_finding(number, finding, time.time() - started, cache, output.parent)
        for part, (verdict, reason) in finding.verdicts.items():
            print(f"{number}. {part}: {verdict}; {reason}", flush=True)
    write_page(output, cache)


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
    except ValueError as error:
        sys.exit(f"claims.py: {error}")
