"""
Configurations of the published sizes: `cbt-tiny` to `tost-large`.

CRATE and ToST have the widths of CBT and the convolutional stem here, as the CBSA paper compares them. CRATE was
published with other widths (384, 576, 768, 1024) and with `patch_embedding_type="patchify"`.
"""

from pathlib import Path


PRESETS = sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


def preset_path(name: str) -> str:
    """
    Path of the JSON file of a preset, for `CBSAConfig.from_pretrained`.

    Args:
        name: one of [`PRESETS`], such as `"cbt-tiny"`.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return str(Path(__file__).with_name(f"{name}.json"))
