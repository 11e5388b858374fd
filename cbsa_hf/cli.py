"""The `cbsa` command: segment a photo, look inside the layers, convert and publish checkpoints."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import transformers
from PIL import Image
from tqdm import tqdm

from .checkpoints import load_checkpoint
from .conversion.convert import (
    ORIGINS,
    compare_outputs,
    compare_with_original,
    convert_checkpoint,
    model_card,
    save_conversion,
)
from .conversion.key_mappings import VIT_ATTENTIONS
from .exporting import FORMATS, export_model
from .hub import push_checkpoint
from .interpretability.attention_maps import attention_maps, map_formula
from .overlays import class_colours, class_legend, draw_mask, overlay_classes
from .photo_jobs import STANDARD_INPUT, Job, check_job, find_photos, plan_folder, save_pngs
from .segmentation.images import MAX_PIXELS, MAX_RATIO, fit_to_patches, open_image, to_image, to_pixel_values
from .segmentation.memory import MAX_MEMORY, check_input
from .segmentation.patch_grouping import METHODS
from .segmentation.sliding_window import SlidingWindowSegmenter, label_names
from .segmentation.zero_shot import Segment, ZeroShotSegmentation, ZeroShotSegmenter


Finder = Callable[[Image.Image], tuple[Image.Image, Image.Image, str]]
"""Takes a photo; returns the overlay, the mask, and a description in words."""

FOREGROUND_OPTIONS = {"method": "method", "segments": "num_segments"}
"""Options of `segment` only for the task `foreground`: name -> name in [`ZeroShotSegmenter`]."""


def check_folder(path: Path):
    """Raises ValueError if a path is not a new or empty folder; called before any work is done."""
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} to.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; name a new one.")


def read_photo(photo: str, args: argparse.Namespace) -> Image.Image:
    """Open a file, or standard input for `-`. Raises ImageError as `open_image` does."""
    limits = {"max_pixels": args.max_pixels, "max_ratio": args.max_ratio}
    if photo == STANDARD_INPUT:
        return open_image(sys.stdin.buffer, name="The photo on standard input", **limits)
    return open_image(photo, **limits)


def plan_segmentation(args: argparse.Namespace) -> list[Job]:
    """The photos to read and the pictures to write. Raises ValueError for options without effect."""
    if args.task == "semantic":
        for name in FOREGROUND_OPTIONS:
            if name in args:
                raise ValueError(f"`--{name}` has no effect with `--task semantic`; leave it out.")
    photos = find_photos(args.photos)
    if photos == args.photos and len(photos) == 1:
        mask = args.mask or args.output.with_name(f"{args.output.stem}_mask.png")
        return [Job(photos[0], (args.output, mask))]
    if args.mask is not None:
        raise ValueError("`--mask` names the mask of one photo; of several, each mask is named after its photo.")
    return plan_folder(photos, args.output)


def segment(args: argparse.Namespace) -> int:
    """`cbsa segment`. Returns 1 if some of several photos could not be segmented, else 0."""
    jobs = plan_segmentation(args)
    if jobs[0].outputs[0] == args.output:
        segment_photo(jobs[0], args)
        return 0
    is_new = not args.output.exists()
    args.output.mkdir(exist_ok=True)
    try:
        failures = segment_photos(jobs, args)
    finally:
        if is_new and not any(args.output.iterdir()):
            args.output.rmdir()
    if failures:
        print(f"cbsa: {len(failures)} of {len(jobs)} photos could not be segmented:", file=sys.stderr)
        for error in failures:
            print_error(error)
    return 1 if failures else 0


def segment_photo(job: Job, args: argparse.Namespace):
    """Segment a single photo."""
    check_job(job, [job.photo], args.force)
    image = read_photo(job.photo, args)  # before the model is loaded, which takes longer
    *pictures, found = load_finder(args)(image)
    save_pngs(pictures, job.outputs)
    print(f"{job.outputs[0]} and {job.outputs[1]}: {found}.")


def segment_photos(jobs: list[Job], args: argparse.Namespace) -> list[Exception]:
    """Segment several photos. Returns an error for each photo that could not be segmented."""
    photos, find, failures = [job.photo for job in jobs], None, []
    # In terminals alone, and gone at the end: an error or "Interrupted." stands on a line of its own.
    with tqdm(jobs, unit="photo", leave=False, disable=None) as progress:
        for job in progress:
            try:
                check_job(job, photos, args.force)
                image = read_photo(job.photo, args)
            except (ValueError, OSError) as error:
                failures.append(error)
                continue
            find = find or load_finder(args)
            try:
                *pictures, found = find(image)
                save_pngs(pictures, job.outputs)
            except (ValueError, OSError) as error:
                failures.append(ValueError(f"{job.photo}: {error}"))
            else:
                tqdm.write(f"{job.outputs[0]} and {job.outputs[1]}: {found}.", file=sys.stdout)
    return failures


def load_finder(args: argparse.Namespace) -> Finder:
    """The segmenter that the options ask for; its model is loaded once for all photos."""
    if args.task == "semantic":
        model, processor = load_checkpoint(args.checkpoint, "semantic-segmentation")
        segmenter = SlidingWindowSegmenter(
            model, processor, long_side=args.long_side, sharp=args.sharp, max_memory=args.max_memory
        )
        return lambda image: show_classes(image, segmenter(image), label_names(model.config.id2label))
    options = {option: getattr(args, name) for name, option in FOREGROUND_OPTIONS.items() if name in args}
    if args.long_side is not None:
        options["long_side"] = args.long_side
    segmenter = ZeroShotSegmenter(
        *load_checkpoint(args.checkpoint), sharp=args.sharp, max_memory=args.max_memory, **options
    )
    show = show_segments if "segments" in args else show_foreground
    return lambda image: show(image, segmenter(image))


def label_picture(labels: np.ndarray, num_labels: int) -> Image.Image:
    """Labels (height, width) as a picture; up to 256 labels get a palette, so that people can tell them apart."""
    picture = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        picture.putpalette(class_colours(num_labels).tobytes())
    return picture


def name_segment(segment: Segment, index: int) -> str:
    """The name of a segment with its probability, or its number."""
    return f"segment {index}" if segment.name is None else f"{segment.name} (p = {segment.probability:.2f})"


def show_foreground(image: Image.Image, found: ZeroShotSegmentation) -> tuple[Image.Image, Image.Image, str]:
    """The overlay, which is drawn on the photo itself, the mask, and a description in words."""
    names = [name_segment(s, i) for i, s in enumerate(found.segments) if s.score > 0 and s.name is not None]
    text = ", ".join([f"{found.mask.mean():.0%} of the pixels are foreground", *names])
    draw_mask(image, found.mask)
    return image, Image.fromarray(found.mask), text


def show_segments(image: Image.Image, found: ZeroShotSegmentation) -> tuple[Image.Image, Image.Image, str]:
    """The overlay with a legend, the index of each pixel's segment, and a description in words."""
    names = {i: name_segment(segment, i) for i, segment in enumerate(found.segments)}
    text = ", ".join(text for _, text in class_legend(found.labels, names))
    return overlay_classes(image, found.labels, names), label_picture(found.labels, len(names)), text


def show_classes(
    image: Image.Image, labels: np.ndarray, names: dict[int, str]
) -> tuple[Image.Image, Image.Image, str]:
    """The overlay with a legend, the index of each pixel's class, and a description in words."""
    found = ", ".join(text for _, text in class_legend(labels, names))
    return overlay_classes(image, labels, names), label_picture(labels, len(names)), found


def attention(args: argparse.Namespace):
    """`cbsa attention`."""
    from .interpretability.plots import attention_grid  # loads Matplotlib, which `segment` does not need

    check_job(Job(args.photo, (args.output,)), [args.photo], args.force)
    image = read_photo(args.photo, args)
    model, processor = load_checkpoint(args.checkpoint)
    size = fit_to_patches((image.height, image.width), args.long_side, model.config.patch_size)
    check_input(model, size, args.max_memory)
    pixel_values = to_pixel_values(image, processor, args.long_side, model.config.patch_size)
    maps = attention_maps(model, pixel_values)[:, 0]
    title = f"attention of CLS to the patches: its row of {map_formula(model)}, per layer and head"
    save_pngs([attention_grid(image, maps, title)], [args.output])
    print(f"{args.output}: {maps.shape[0]} layers x {maps.shape[1]} heads, {maps.shape[2]} x {maps.shape[3]} patches.")


def inspect(args: argparse.Namespace):
    """`cbsa inspect`."""
    from .interpretability.report import inspect_photo, save_report

    check_folder(args.output)
    image = read_photo(args.photo, args)
    report = inspect_photo(image, *load_checkpoint(args.checkpoint), args.long_side, args.patch, args.max_memory)
    report.numbers = {"photo": Path(args.photo).name, **report.numbers}
    save_report(report, args.output)
    print(f"{args.output}: report.json and {len(report.pictures)} pictures.")


def convert(args: argparse.Namespace):
    """`cbsa convert`."""
    output = args.output
    check_folder(output)
    conversion = convert_checkpoint(args.source, args.origin, args.attention, args.num_heads)
    if args.verify:
        differences = compare_outputs(conversion.model, args.verify)
        for name, (absolute, relative) in differences.items():
            print(f"{name}: differs by {absolute:.1e} at most, {relative:.1e} of the largest value.")
        if not all(relative <= 1e-5 for _, relative in differences.values()):
            raise ValueError("The outputs differ by more than 1e-05 of the largest value; nothing was written.")
    difference = compare_with_original(conversion, args.source)
    is_exact = conversion.model.config.attention_type == ORIGINS[conversion.origin].attention_types[0]
    print(
        f"Beside the original on one input of noise: differs by {difference:.1e} of the largest output"
        + ("." if is_exact else ", since its attention was replaced.")
    )
    if is_exact and not difference <= 1e-3:  # rounding alone adds up to some 1e-5 in deep models
        raise ValueError("The model does not compute what the original computes; nothing was written.")

    # The card does not show local paths.
    source = Path(args.source).resolve().name if Path(args.source).exists() else args.source
    card = model_card(conversion, output.name, source, args.license, args.attribution)
    save_conversion(conversion, output, card)
    config, processor = conversion.model.config, conversion.processor
    print(
        f"{output}: {type(conversion.model).__name__} from {conversion.origin}, attention {config.attention_type}, "
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads, image size {config.image_size}, "
        f"mean {list(processor.image_mean)}, std {list(processor.image_std)}."
    )
    if conversion.dropped:
        print(f"Left out, without effect on the outputs: {', '.join(conversion.dropped)}.")


def export(args: argparse.Namespace):
    """`cbsa export`."""
    check_folder(args.output)
    model, processor = load_checkpoint(args.checkpoint)
    calibration = None
    if args.int8 is not None:
        photos = (to_image(photo, num_channels=model.config.num_channels) for photo in find_photos(args.int8))
        calibration = [processor(photo, return_tensors="np")["pixel_values"] for photo in photos]
    check = export_model(model, processor, args.output, args.format, calibration)
    name = args.format if calibration is None else f"{args.format} in 8 bits"
    print(
        f"{args.output}: {name}, differs by {check.difference:.1e} of the largest output at most; one image in "
        f"{1000 * check.engine_time:.1f} ms, in PyTorch {1000 * check.eager_time:.1f} ms."
    )


def push(args: argparse.Namespace):
    """`cbsa push`."""
    print(push_checkpoint(args.name, args.checkpoint, args.private))


def at_least(least: int, kind: type = int) -> Callable[[str], float]:
    """A type for argparse: numbers of that kind that are not below `least`."""

    def number(text: str) -> float:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{value:g} is not at least {least}")
        return value

    return number


def gigabytes(text: str) -> float:
    """A type for argparse: gigabytes above 0, as bytes."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value:g} is not above 0")
    return value * 1e9


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, whatever words it was given."""

    def error(self, message: str):
        """Print usage and message, and exit with 2."""
        super().error(" ".join(message.split()))


def build_parser() -> Parser:
    """The parser of `cbsa` with its commands."""
    parser = Parser(prog="cbsa", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_photo_commands(commands)
    add_checkpoint_commands(commands)
    return parser


def add_photo_commands(commands):
    """Add `segment`, `attention` and `inspect`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--checkpoint", help="a folder or hub id; default: the checkpoint in this package")
    common.add_argument(
        "--max-pixels",
        type=at_least(1),
        default=MAX_PIXELS,
        metavar="N",
        help="refuse a photo of more (%(default)s)",
    )
    common.add_argument(
        "--max-ratio",
        type=at_least(1, float),
        default=MAX_RATIO,
        metavar="R",
        help="of a photo's sides, at most (%(default)s)",
    )
    common.add_argument(
        "--max-memory",
        type=gigabytes,
        default=MAX_MEMORY,
        metavar="GB",
        help=f"refuse at once what is estimated to take more ({MAX_MEMORY / 1e9:g})",
    )
    photo = argparse.ArgumentParser(add_help=False)
    photo.add_argument("photo", metavar="PHOTO", help="an image file; - reads it from standard input")
    photo.add_argument(
        "--long-side",
        type=at_least(1),
        default=256,
        help="pixels of the longer side that the model sees (%(default)s)",
    )
    picture = argparse.ArgumentParser(add_help=False)
    picture.add_argument("--force", action="store_true", help="replace pictures that exist")
    command = commands.add_parser(
        "segment", parents=[common, picture], help="find the foreground, or the class of every pixel"
    )
    add_segment_options(command)
    command = commands.add_parser(
        "attention", parents=[photo, common, picture], help="draw the attention of every layer and head"
    )
    command.add_argument("-o", "--output", type=Path, required=True, help="the picture to write, a .png")
    command.set_defaults(run=attention)

    command = commands.add_parser(
        "inspect", parents=[photo, common], help="look inside: pictures and numbers of every layer"
    )
    command.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    command.add_argument(
        "--patch",
        type=int,
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="the patch whose attention is shown, counted from 0; default: CLS",
    )
    command.set_defaults(run=inspect)


def add_segment_options(command: argparse.ArgumentParser):
    """Add the options of `segment`."""
    command.add_argument(
        "photos",
        nargs="+",
        metavar="PHOTO",
        help="an image file, a folder of them or a pattern such as 'holiday/*.jpg'; - reads one from standard input",
    )
    command.add_argument(
        "-o", "--output", type=Path, required=True, help="the picture to write, a .png; of several photos a folder"
    )
    command.add_argument(
        "--task",
        choices=["foreground", "semantic"],
        default="foreground",
        help="foreground: with any model, which need not have seen a mask; semantic: with a segmenter",
    )
    command.add_argument(
        "--long-side",
        type=at_least(1),
        help="pixels of the longer side that the model sees; default: 256, or for --task semantic what the image "
        "processor says, else the photo's own",
    )
    # Without defaults, so that `plan_segmentation` knows which options were given.
    command.add_argument(
        "--method",
        choices=METHODS,
        default=argparse.SUPPRESS,
        help="for foreground: normalised cut of the patches (the default), their representatives, or attention of CLS",
    )
    command.add_argument(
        "--segments",
        type=at_least(2),
        metavar="K",
        default=argparse.SUPPRESS,
        help="for foreground: show K segments, with names where known",
    )
    command.add_argument("--sharp", action="store_true", help="move edges to the photo's; needs kornia")
    command.add_argument("--mask", type=Path, help="the mask to write, a .png; default: OUTPUT_mask.png")
    command.set_defaults(run=segment)


def add_checkpoint_commands(commands):
    """Add `convert`, `export` and `push`."""
    command = commands.add_parser("convert", help="make a CBSA model of another library's checkpoint")
    command.add_argument("source", metavar="SOURCE", help="a file of weights, a folder, or a hub id")
    command.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    command.add_argument("--origin", choices=ORIGINS, help="where it comes from; default: what the weights' names say")
    command.add_argument(
        "--attention",
        choices=VIT_ATTENTIONS,
        help="of a ViT: softmax is exact (the default), the others are linear in the tokens and have to be fine-tuned",
    )
    command.add_argument(
        "--num-heads", type=at_least(1), help="default: config.json, else the published model that wide"
    )
    command.add_argument("--verify", type=Path, metavar="TENSORS", help="recorded outputs to compare, .safetensors")
    command.add_argument("--license", help="of the weights, for the model card, such as apache-2.0")
    command.add_argument("--attribution", help="whose weights they are, a sentence for the model card")
    command.set_defaults(run=convert)

    command = commands.add_parser("export", help="write a model for another engine, and compare it with the model")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder or hub id")
    command.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    command.add_argument("--format", choices=FORMATS, default="onnx", help="what to write (%(default)s)")
    command.add_argument(
        "--int8",
        nargs="+",
        metavar="PHOTO",
        help="for openvino: compute in 8 bits, calibrated on these photos: files, folders or patterns; some hundred",
    )
    command.set_defaults(run=export)

    command = commands.add_parser("push", help="publish a checkpoint on the Hub, with code, processor and card")
    command.add_argument("name", metavar="NAME", help="the id to publish under, user/model")
    command.add_argument("--checkpoint", help="a folder or hub id; default: the checkpoint in this package")
    command.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    command.set_defaults(run=push)


def print_error(error: Exception):
    """Print an error in one line, whatever file names and messages of libraries have in them."""
    print(f"cbsa: {' '.join(str(error).split())}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """
    Run the command.

    Returns:
        0; 1 when some of several photos could not be segmented; 2 after one sentence on standard error when the input
        is bad; 130 when it was interrupted.
    """
    args = build_parser().parse_args(argv)
    # Messages of the libraries would hide our one sentence.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("cbsa: Interrupted.", file=sys.stderr)
        return 130
