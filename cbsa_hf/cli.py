"""The `cbsa` command: segment a photo, look inside the layers, convert and publish checkpoints."""

import argparse
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import transformers
from PIL import Image

from .checkpoint import load_checkpoint
from .convert_checkpoints import ORIGINS, compare_outputs, convert_checkpoint, model_card, save_conversion
from .figures import attention_grid, class_colours, class_legend, overlay_classes, overlay_mask
from .hub import push_checkpoint
from .images import MAX_PIXELS, MAX_RATIO, fit_to_patches, open_image, to_pixel_values
from .interpretability import attention_maps, map_formula
from .memory import MAX_MEMORY, check_input
from .report import inspect_photo, save_report
from .sliding_window import SlidingWindowSegmenter
from .token_groups import METHODS
from .zero_shot import Segment, ZeroShotSegmentation, ZeroShotSegmenter


def check_output(path: Path):
    """A ValueError, before any work is done, when a PNG cannot be written there."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"The output {path} has to end in .png.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} to.")


def check_folder(path: Path):
    """A ValueError, before any work is done, when that is no new or empty folder."""
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} to.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; name a new one.")


def save_png(image: Image.Image, path: Path):
    """Write under a temporary name and rename, so that a file of that name is always whole."""
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, format="PNG", compress_level=3)  # the default takes three times as long for the same size
    partial.replace(path)


def segment(args: argparse.Namespace):
    mask_path = args.mask or args.output.with_name(f"{args.output.stem}_mask.png")
    check_output(args.output)
    check_output(mask_path)
    image = open_image(args.photo, max_pixels=args.max_pixels, max_ratio=args.max_ratio)
    if args.task == "semantic":
        overlay, mask, found = find_classes(image, args.checkpoint, args.long_side, args.sharp, args.max_memory)
    else:
        options = {"method": args.method, "sharp": args.sharp, "max_memory": args.max_memory}
        if args.long_side is not None:
            options["long_side"] = args.long_side
        if args.segments is not None:
            options["num_segments"] = args.segments
        segmentation = ZeroShotSegmenter(*load_checkpoint(args.checkpoint), **options)(image)
        show = show_foreground if args.segments is None else show_segments
        overlay, mask, found = show(image, segmentation)
    save_png(overlay, args.output)
    save_png(mask, mask_path)
    print(f"{args.output} and {mask_path}: {found}.")


def label_picture(labels: np.ndarray, num_labels: int) -> Image.Image:
    """Indices as pixels, with a palette where there are few, so that it is more than shades of black to look at."""
    picture = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        picture.putpalette(class_colours(num_labels).tobytes())
    return picture


def name_segment(segment: Segment, index: int) -> str:
    return f"segment {index}" if segment.name is None else f"{segment.name} (p = {segment.probability:.2f})"


def show_foreground(image: Image.Image, found: ZeroShotSegmentation) -> tuple[Image.Image, Image.Image, str]:
    """Overlay, mask, and what was found in words."""
    names = [name_segment(s, i) for i, s in enumerate(found.segments) if s.score > 0 and s.name is not None]
    text = ", ".join([f"{found.mask.mean():.0%} of the pixels are foreground", *names])
    return overlay_mask(image, found.mask), Image.fromarray(found.mask), text


def show_segments(image: Image.Image, found: ZeroShotSegmentation) -> tuple[Image.Image, Image.Image, str]:
    """Overlay with a legend, segment indices as a mask, and what was found in words."""
    names = {i: name_segment(segment, i) for i, segment in enumerate(found.segments)}
    labels = found.labels.astype(np.min_scalar_type(len(names)))
    text = ", ".join(text for _, text in class_legend(labels, names))
    return overlay_classes(image, labels, names), label_picture(labels, len(names)), text


def find_classes(
    image: Image.Image, checkpoint: str | None, long_side: int | None, sharp: bool, max_memory: float
) -> tuple[Image.Image, Image.Image, str]:
    """Overlay with a legend, class indices as a mask, and what was found in words."""
    model, processor = load_checkpoint(checkpoint, "semantic-segmentation")
    segmenter = SlidingWindowSegmenter(model, processor, long_side=long_side, sharp=sharp, max_memory=max_memory)
    labels = segmenter(image)
    names = model.config.id2label
    found = ", ".join(text for _, text in class_legend(labels, names))
    return overlay_classes(image, labels, names), label_picture(labels, len(names)), found


def attention(args: argparse.Namespace):
    check_output(args.output)
    image = open_image(args.photo, max_pixels=args.max_pixels, max_ratio=args.max_ratio)
    model, processor = load_checkpoint(args.checkpoint)
    size = fit_to_patches((image.height, image.width), args.long_side, model.config.patch_size)
    check_input(model.config, size, args.max_memory)
    pixel_values = to_pixel_values(image, processor, args.long_side, model.config.patch_size)
    maps = attention_maps(model, pixel_values)[:, 0]
    title = f"attention of CLS to the patches: its row of {map_formula(model)}, per layer and head"
    save_png(attention_grid(image, maps, title), args.output)
    print(f"{args.output}: {maps.shape[0]} layers x {maps.shape[1]} heads, {maps.shape[2]} x {maps.shape[3]} patches.")


def inspect(args: argparse.Namespace):
    check_folder(args.output)
    image = open_image(args.photo, max_pixels=args.max_pixels, max_ratio=args.max_ratio)
    report = inspect_photo(image, *load_checkpoint(args.checkpoint), args.long_side, args.patch, args.max_memory)
    report.numbers = {"photo": args.photo.name, **report.numbers}
    save_report(report, args.output)
    print(f"{args.output}: report.json and {len(report.pictures)} pictures.")


def convert(args: argparse.Namespace):
    output = args.output
    check_folder(output)
    conversion = convert_checkpoint(args.source, args.origin, args.attention, args.num_heads)
    if args.verify:
        differences = compare_outputs(conversion.model, args.verify)
        for name, (absolute, relative) in differences.items():
            print(f"{name}: differs by {absolute:.1e} at most, {relative:.1e} of the largest value.")
        if not all(relative <= 1e-5 for _, relative in differences.values()):
            raise ValueError("The outputs differ by more than 1e-05 of the largest value; nothing was written.")

    # A local path says nothing to others, and too much.
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


def push(args: argparse.Namespace):
    print(push_checkpoint(args.name, args.checkpoint, args.private))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def gigabytes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value:g} is not above 0")
    return value * 1e9


def ratio(text: str) -> float:
    value = float(text)
    if not value >= 1:
        raise argparse.ArgumentTypeError(f"{value:g} is not at least 1")
    return value


def at_least_two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value} is not at least 2")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cbsa", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("photo", type=Path, metavar="PHOTO", help="an image file")
    common.add_argument("--checkpoint", help="a folder or hub id; default: the checkpoint in this package")
    common.add_argument(
        "--max-pixels",
        type=positive,
        default=MAX_PIXELS,
        metavar="N",
        help="refuse a photo of more (%(default)s)",
    )
    common.add_argument(
        "--max-ratio",
        type=ratio,
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
    sized = argparse.ArgumentParser(add_help=False)
    sized.add_argument(
        "--long-side", type=positive, default=256, help="pixels of the longer side that the model sees (%(default)s)"
    )
    picture = argparse.ArgumentParser(add_help=False)
    picture.add_argument("-o", "--output", type=Path, required=True, help="the picture to write, a .png")

    command = commands.add_parser(
        "segment", parents=[common, picture], help="find the foreground, or the class of every pixel"
    )
    command.add_argument(
        "--task",
        choices=["foreground", "semantic"],
        default="foreground",
        help="foreground: with any model, which need not have seen a mask; semantic: with a segmenter",
    )
    command.add_argument(
        "--long-side",
        type=positive,
        help="pixels of the longer side that the model sees; default: 192, or for --task semantic what the image "
        "processor says, else the photo's own",
    )
    command.add_argument(
        "--method",
        choices=METHODS,
        default="ncut",
        help="for foreground: normalised cut of the patches (the default), their representatives, or attention of CLS",
    )
    command.add_argument(
        "--segments", type=at_least_two, metavar="K", help="for foreground: show K segments, with names where known"
    )
    command.add_argument("--sharp", action="store_true", help="move edges to the photo's; needs kornia")
    command.add_argument("--mask", type=Path, help="the mask to write, a .png; default: OUTPUT_mask.png")
    command.set_defaults(run=segment)

    command = commands.add_parser(
        "attention", parents=[common, picture, sized], help="draw the attention of every layer and head"
    )
    command.set_defaults(run=attention)

    command = commands.add_parser(
        "inspect", parents=[common, sized], help="look inside: pictures and numbers of every layer"
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

    command = commands.add_parser("convert", help="make a CBSA model of another library's checkpoint")
    command.add_argument("source", metavar="SOURCE", help="a file of weights, a folder, or a hub id")
    command.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    command.add_argument("--origin", choices=ORIGINS, help="where it comes from; default: what the weights' names say")
    command.add_argument(
        "--attention",
        choices=["softmax", "agent"],
        help="of a ViT: softmax is exact (the default), agent is linear in the tokens and has to be fine-tuned",
    )
    command.add_argument("--num-heads", type=positive, help="default: config.json, else the published model that wide")
    command.add_argument("--verify", type=Path, metavar="TENSORS", help="recorded outputs to compare, .safetensors")
    command.add_argument("--license", help="of the weights, for the model card, such as apache-2.0")
    command.add_argument("--attribution", help="whose weights they are, a sentence for the model card")
    command.set_defaults(run=convert)

    command = commands.add_parser("push", help="publish a checkpoint on the Hub, with code, processor and card")
    command.add_argument("name", metavar="NAME", help="the id to publish under, user/model")
    command.add_argument("--checkpoint", help="a folder or hub id; default: the checkpoint in this package")
    command.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    command.set_defaults(run=push)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 2 after one sentence on standard error when the input is bad."""
    args = build_parser().parse_args(argv)
    # Their retries and reports would bury the one sentence.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"cbsa: {error}", file=sys.stderr)
        return 2
    return 0
