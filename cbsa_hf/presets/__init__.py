"""
The published sizes of CBT, and CRATE and ToST of the same widths: configurations `cbt-tiny` ... `tost-large`.

All have the convolutional stem, as the CBSA paper compares them. CRATE as published is wider (384, 576, 768, 1024) and
has `patch_embedding_type="patchify"`.
"""

from pathlib import Path


PRESETS = sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


def preset_path(name: str) -> str:
    """
    Path of the JSON file of one of [`PRESETS`], which `CBSAConfig.from_pretrained` opens.

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return str(Path(__file__).with_name(f"{name}.json"))
