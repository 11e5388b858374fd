"""
A page that segments a photo and shows how CBSA got there.

    python demo/app.py --port 7860 --checkpoint FOLDER_OR_HUB_ID ...
"""

import argparse
import sys
from pathlib import Path

from cbsa_demo.looks import Explorer
from cbsa_demo.page import SERVER, build_page

from cbsa_hf import default_checkpoint


SHIPPED = {
    "classifier (ships)": default_checkpoint(),
    "street segmenter (ships)": default_checkpoint("semantic-segmentation"),
}


def name_for_visitors(checkpoint: str) -> str:
    """A hub id as it is, and of a folder its own name, since nobody is to know where it lies."""
    return Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint


def main(argv: list[str] | None = None) -> int:
    """Serve the page until it is interrupted. Returns the exit status: 0, or 2 after an error."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--port", type=int, help="port to serve on; default: the first free one from 7860")
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="folders or hub ids that visitors may choose beside those in the package; the first is shown at first",
    )
    args = parser.parse_args(argv)
    try:
        named = [(name_for_visitors(name), name) for name in args.checkpoint] + list(SHIPPED.items())
        if len(dict(named)) < len(named):
            raise ValueError("Two checkpoints have the same name; visitors could not tell them apart.")
        page = build_page(Explorer(dict(named)))
        page.launch(server_port=args.port, **SERVER)
    except (ValueError, OSError) as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
