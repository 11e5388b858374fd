"""The claims about trained models: 1, 2, 3, 4 and 7. Each function takes a workbench and returns a finding."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedModel

from benchmarks.small_models import accuracy, with_attention
from benchmarks.workbench import (
    FAILS,
    FAMILY,
    HOLDS,
    NOT_RUN,
    OPEN,
    Finding,
    Workbench,
    not_run,
    sign_verdict,
    spread,
    table,
)
from cbsa_hf import default_checkpoint, load_checkpoint
from cbsa_hf.interpretability.measures import LayerMeasures, accuracy_under_noise, measure_layers, noisy_projections
from cbsa_hf.interpretability.plots import line_panels


ROOT = Path(__file__).resolve().parents[1]
NO_DATA = "no `--dataset_name` was given."


def digest_of(text: str, *paths: Path) -> str:
    """Twelve hexadecimal digits that depend on the text and on the content of the files."""
    return hashlib.sha256(b"".join([text.encode(), *(path.read_bytes() for path in paths)])).hexdigest()[:12]


def score_masks(bench: Workbench, name: str, checkpoint: str) -> dict[str, float]:
    """The scores of `training/score.py` for a checkpoint; from the cache unless data, weights or code have changed."""
    code = [ROOT / "training" / name for name in ("score.py", "evaluation/zero_shot.py")]
    code += sorted((ROOT / "cbsa_hf").rglob("*.py"))
    weights = [Path(checkpoint) / name for name in ("model.safetensors", "config.json")]
    digest = digest_of(bench.masks_name, *weights, *code)
    output = bench.cache / f"masks-{name}-{digest}.json"
    if not output.is_file():
        partial = output.with_suffix(".partial")
        command = [sys.executable, str(code[0]), "--task", "zero-shot-segmentation", "--split", "train"]
        command += ["--dataset_name", bench.masks_name, "--checkpoint", checkpoint, "--output", str(partial)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise ValueError(f"Scoring the masks of {name} failed: {process.stderr.strip().splitlines()[-1]}")
        partial.replace(output)
    return {key: value for key, value in json.loads(output.read_text()).items() if isinstance(value, float)}


def zero_shot_segmentation(bench: Workbench) -> Finding:
    """Check claim 1."""
    parts = (
        "Attention maps segment objects, better than trivial masks",
        "CBT is ahead of CRATE and softmax attention",
    )
    run = "`training/score.py --task zero-shot-segmentation` on every checkpoint of the comparison, one seed each."
    if bench.masks_name is None:
        return not_run("no `--masks_name` was given.", *parts)
    checkpoints = {"shipped": default_checkpoint(), **bench.compared()}
    scores = {name: score_masks(bench, name, checkpoint) for name, checkpoint in checkpoints.items()}
    names = list(dict.fromkeys(key for found in scores.values() for key in found))
    rows = [[key, *(f"{found[key]:.3f}" if key in found else "" for found in scores.values())] for key in names]

    margin = 0.02
    attention = {name: found["attention"] for name, found in scores.items()}
    trivial = max(scores["shipped"][key] for key in ("everything", "centred ellipse", "two colours"))
    ours = {name: attention[name] for name in ("shipped", "cbsa") if name in attention}
    best, worst = max(ours.values()), min(ours.values())
    verdict = HOLDS if worst > trivial + margin else FAILS if best < trivial else OPEN
    listed = ", ".join(f"{value:.3f} ({name})" for name, value in ours.items())
    verdicts = {parts[0]: (verdict, f"the attention of CLS has {listed}; the best trivial mask {trivial:.3f}.")}
    others = {name: attention[name] for name in ("mssa", "softmax") if name in attention}
    if not others or "cbsa" not in attention:
        verdicts[parts[1]] = (NOT_RUN, "it needs `--checkpoints` with `cbsa`, `mssa` and `softmax`.")
    else:
        ahead = [attention["cbsa"] - other for other in others.values()]
        verdict = HOLDS if min(ahead) > margin else FAILS if max(ahead) < -margin else OPEN
        listed = ", ".join(f"{name} {value:.3f}" for name, value in ({"cbsa": attention["cbsa"]} | others).items())
        verdicts[parts[1]] = (verdict, f"{listed}; differences below {margin} count as none.")
    return Finding(run, verdicts, [table(["mean IoU of the foreground", *scores], rows)])


RATES = ("normalised_coding_rate", "coding_rate")  # the fields of `LayerMeasures` that claim 2 compares


def measure_objective(bench: Workbench) -> dict[str, LayerMeasures]:
    """Measures of the shipped model, of the compared checkpoints and of the small models, by name of the model."""
    models = {"shipped": load_checkpoint()}
    models |= {name: load_checkpoint(folder) for name, folder in bench.compared().items() if name != "softmax"}
    measured = {}
    for name, (model, processor) in models.items():
        batches = [pixel_values for pixel_values, _ in bench.photos(processor, bench.num_images)]
        measured[name] = measure_layers(model, batches)
    small_images = [bench.validation_set.pixel_values[:256]]
    for name in ("cbsa", "mssa", "tssa"):
        for seed in bench.seeds:
            model = bench.small(name, seed, attention_type=name)
            measured[f"small {name}, seed {seed}"] = measure_layers(model, small_images)
    return measured


def rate_changes(found: LayerMeasures) -> dict[str, torch.Tensor]:
    """How much the attention step changes each of `RATES`, (images, layers, heads)."""
    return {kind: getattr(found, f"{kind}_after") - getattr(found, f"{kind}_before") for kind in RATES}


def share_of_falls(found: LayerMeasures) -> dict[str, float]:
    """Share of the heads of all layers in which the mean over images of each of `RATES` falls."""
    return {kind: (change.mean(0) < 0).double().mean().item() for kind, change in rate_changes(found).items()}


def objective_row(name: str, found: LayerMeasures) -> list[str]:
    """One row of the table of claim 2."""
    return [
        name,
        *(f"{change.mean():+.2f} ± {change.mean((1, 2)).std():.2f}" for change in rate_changes(found).values()),
        *(f"{share:.0%}" for share in share_of_falls(found).values()),
        f"{found.zeros_after[:, 0].mean():.2f}, {found.zeros_after[:, -1].mean():.2f}",
        f"{found.sparsity_before.mean():.2f}, {found.sparsity_after.mean():.2f}",
    ]


def eps_table(bench: Workbench) -> str:
    """The share of the heads in which the coding rate of the shipped model falls, for several values of eps."""
    model, processor = load_checkpoint()
    few = [pixel_values for pixel_values, _ in bench.photos(processor, 16)]
    rows = [
        [eps, *(f"{share:.0%}" for share in share_of_falls(measure_layers(model, few, eps)).values())]
        for eps in (0.1, 0.5, 2.0)
    ]
    return table(["eps, shipped model", "heads where it falls, normalised", "as they are"], rows)


def objective_verdicts(measured: dict[str, LayerMeasures], parts: tuple[str, str, str]) -> dict[str, tuple[str, str]]:
    """The verdicts of claim 2; only the models with `cbsa` count."""
    verdicts, shipped = {}, measured["shipped"]
    ours = [name for name in measured if name in ("shipped", "cbsa") or name.startswith("small cbsa")]
    for part, kind in zip(parts, RATES, strict=False):
        shares = [share_of_falls(measured[name])[kind] for name in ours]
        verdict = HOLDS if min(shares) >= 0.9 else FAILS if max(shares) <= 0.1 else OPEN
        listed = ", ".join(f"{name} ({share:.0%})" for name, share in zip(ours, shares, strict=True))
        verdicts[part] = (verdict, f"share of the heads in which it falls, by the mean over images: {listed}.")
    sparser = (shipped.sparsity_after.mean(0) > shipped.sparsity_before.mean(0)).double().mean().item()
    zeros = shipped.zeros_after.mean()
    reason = f"Hoyer sparsity rises in {sparser:.0%} of the shipped model's layers, and {zeros:.0%} become 0."
    verdicts[parts[2]] = (HOLDS if sparser == 1 else FAILS if sparser == 0 else OPEN, reason)
    return verdicts


def draw_objective(found: LayerMeasures) -> Image.Image:
    """Draw the change of the coding rates, the zeros and the sparsity over the layers of a model."""
    changes = zip(("normalised", "as they are"), rate_changes(found).values(), strict=True)
    panels = [
        {
            "title": "change of the coding rate by attention",
            "y": "nats",
            "lines": {name: values.mean(2).numpy() for name, values in changes},
        },
        {"title": "zeros after ISTA", "y": "share of entries", "lines": {"shipped": found.zeros_after.numpy()}},
        {
            "title": "Hoyer sparsity",
            "y": "0 dense, 1 one entry",
            "lines": {"before ISTA": found.sparsity_before.numpy(), "after": found.sparsity_after.numpy()},
        },
    ]
    layers = list(range(found.zeros_after.shape[1]))
    return line_panels([{"x": "layer", "positions": layers, **panel} for panel in panels])


def objective(bench: Workbench) -> Finding:
    """Check claim 2."""
    parts = (
        "Attention lowers the coding rate, tokens normalised as the operator is given them",
        "Attention lowers the coding rate, tokens as the residual stream has them",
        "ISTA makes tokens sparser",
    )
    if bench.dataset_name is None:
        return not_run(NO_DATA, *parts)
    measured = measure_objective(bench)
    run = (
        f"`measure_layers` on {bench.num_images} validation images (256 for small models): the coding rate of the "
        "tokens in the basis of each head before the attention step and after it, residual included, eps = 0.5, in "
        f"nats. Changes are means over layers and heads, ± over images. {bench.describe_small()}"
    )
    header = ["model", "change, normalised", "change, as they are", "falls, normalised", "falls, as they are"]
    header += ["zeros after ISTA, first and last layer", "Hoyer sparsity before and after"]
    rows = [objective_row(name, found) for name, found in measured.items()]
    picture = ("The shipped model: mean and standard deviation over images.", draw_objective(measured["shipped"]))
    return Finding(run, objective_verdicts(measured, parts), [table(header, rows), eps_table(bench)], picture)


def pooled_representatives(bench: Workbench) -> Finding:
    """Check claim 3."""
    claim = "Pooled representatives keep the attention at a higher rank than learned ones"
    stds = (1.0, 0.02)  # the initial one of this library, and the usual one of vision transformers
    parts = {std: f"{claim} that start with a standard deviation of {std:g}" for std in stds}
    if bench.dataset_name is None:
        return not_run(NO_DATA, *parts.values())
    images = [bench.validation_set.pixel_values[:256]]
    kinds = {"pooled": {"name": "cbsa"}}
    for std in stds:
        values = {"name": f"cbsa-learned-{std:g}", "representatives_type": "learned", "learned_std": std}
        kinds[f"learned, from {std:g}"] = values
    matrices = {"representative_attention": "A", "map": "A^T A"}
    ranks, rows = {}, []
    for kind, values in kinds.items():
        models = [bench.small(seed=seed, attention_type="cbsa", **values) for seed in bench.seeds]
        measured = [measure_layers(model, images) for model in models]
        ranks[kind] = {
            matrix: torch.stack([getattr(found, f"{matrix}_rank").mean((0, 2)) for found in measured])  # seeds, layers
            for matrix in matrices
        }
        scores = spread(accuracy(model, bench.validation_set) for model in models)
        rows.append([kind, *(spread(ranks[kind][matrix].mean(1), 2) for matrix in matrices), scores])
    verdicts = {}
    for std, part in parts.items():
        differences = (ranks["pooled"]["map"] - ranks[f"learned, from {std:g}"]["map"]).mean(1).tolist()
        listed = ", ".join(f"{difference:+.2f}" for difference in differences)
        verdicts[part] = (sign_verdict(differences), f"pooled minus learned, rank of A^T A, per seed: {listed}.")
    panels = [
        {
            "title": f"effective rank of ${title}$",
            "x": "layer",
            "y": f"of at most {bench.recipe.representatives_size**2}",
            "positions": list(range(bench.recipe.num_layers)),
            "lines": {kind: found[matrix].numpy() for kind, found in ranks.items()},
        }
        for matrix, title in matrices.items()
    ]
    run = f"Effective rank (exponential of the entropy of the singular values) on 256 images. {bench.describe_small()}"
    header = ["representatives", *(f"rank of {title}" for title in matrices.values()), "accuracy"]
    picture = ("Mean and standard deviation over seeds.", line_panels(panels))
    return Finding(run, verdicts, [table(header, rows)], picture)


NOISE_SCALES = (0.25, 0.5, 0.75, 1.0, 1.5)  # of claim 4, relative to the weights


def noise_curves(model: PreTrainedModel, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Accuracy without noise and at each of `NOISE_SCALES`, for three draws of the noise; (draws, 1 + scales)."""
    scales = (0, *NOISE_SCALES)
    return torch.tensor([accuracy_under_noise(model, batches, scales, seed=draw) for draw in range(3)])


def share_kept(name: str, curves: torch.Tensor) -> torch.Tensor:
    """Accuracy at each noise scale divided by the accuracy without noise, (samples, scales), from [`noise_curves`]."""
    if (curves[:, 0] == 0).any():
        raise ValueError(f"The {name} gets no image right; does it know the classes of the data set?")
    return curves[:, 1:] / curves[:, :1]


def robustness_row(name: str, model: PreTrainedModel, curves: torch.Tensor) -> list[str]:
    """One row of the table of claim 4."""
    sizes = [weight.square().mean().sqrt().item() for weight in noisy_projections(model, 0).values()]
    kept = share_kept(name, curves)
    return [name, spread(curves[:, 0]), spread(sizes), *(spread(column, 2) for column in kept.T)]


def draw_robustness(groups: dict[str, dict[str, torch.Tensor]]) -> Image.Image:
    """Draw the share of the accuracy that is kept against the scale of the noise, one panel for each group."""
    panels = [
        {
            "title": title,
            "x": "noise / root mean square of the weights",
            "y": "share of the accuracy kept",
            "positions": [0, *NOISE_SCALES],
            "lines": {name: torch.cat([torch.ones(len(v), 1), v], dim=1).numpy() for name, v in found.items()},
        }
        for title, found in groups.items()
        if found
    ]
    return line_panels(panels)


def robustness(bench: Workbench) -> Finding:
    """Check claim 4."""
    parts = ("cbsa loses less accuracy than softmax, small models", "the same, checkpoints of the comparison")
    if bench.dataset_name is None:
        return not_run(NO_DATA, *parts)
    small, compared, rows = {}, {}, []
    batches = bench.validation_set.batches()[:4]
    for name in FAMILY:
        models = [bench.small(name, seed, attention_type=name) for seed in bench.seeds]
        curves = torch.stack([noise_curves(model, batches).mean(0) for model in models])
        rows.append(robustness_row(f"small {name}", models[-1], curves))
        small[name] = share_kept(name, curves)
    for name, folder in bench.compared().items():
        model, processor = load_checkpoint(folder)
        curves = noise_curves(model, bench.photos(processor, 2 * bench.num_images))
        rows.append(robustness_row(f"checkpoint {name}", model, curves))
        compared[name] = share_kept(name, curves)

    verdicts = dict.fromkeys(parts, (NOT_RUN, "it needs `--checkpoints` with `cbsa` and `softmax`."))
    lead = (small["cbsa"] - small["softmax"]).mean(1).tolist()
    reason = "share of the accuracy kept, mean over scales, cbsa minus softmax per seed: "
    verdicts[parts[0]] = (sign_verdict(lead), f"{reason}{', '.join(f'{value:+.3f}' for value in lead)}.")
    if {"cbsa", "softmax"} <= compared.keys():
        lead = (compared["cbsa"] - compared["softmax"]).mean(1).tolist()
        listed = ", ".join(f"{value:+.3f}" for value in lead)
        verdicts[parts[1]] = (sign_verdict(lead), f"the same, per draw of the noise: {listed}; one training seed.")
    run = (
        "`accuracy_under_noise`: Gaussian noise on the matrices that project to queries, keys and values (one for the "
        "white-box operators, three for softmax). Its standard deviation is the scale times the root mean square of "
        f"the matrix. Three draws. Small models on {len(batches) * 256} images at most, checkpoints on "
        f"{2 * bench.num_images}. {bench.describe_small()}"
    )
    header = ["model", "accuracy", "root mean square of the weights", *(f"kept at {scale}" for scale in NOISE_SCALES)]
    picture = draw_robustness({"small models, over seeds": small, "checkpoints, over draws": compared})
    return Finding(run, verdicts, [table(header, rows)], ("Mean and standard deviation.", picture))


def adaptation(bench: Workbench) -> Finding:
    """Check claim 7."""
    part = "Replacing the attention of a trained softmax model and fine-tuning loses little"
    if bench.dataset_name is None:
        return not_run(NO_DATA, part)
    scores = {name: [] for name in ("before", "replaced", "tuned", "softmax tuned")}
    for seed in bench.seeds:
        model = bench.small("softmax", seed, attention_type="softmax")
        replaced = with_attention(model, attention_type="agent")
        scores["before"].append(accuracy(model, bench.validation_set))
        scores["replaced"].append(accuracy(replaced, bench.validation_set))
        for name, attention in (("tuned", "agent"), ("softmax tuned", "softmax")):
            tuned = bench.adapted(model, f"softmax-to-{attention}", seed, attention_type=attention)
            scores[name].append(accuracy(tuned, bench.validation_set))
    losses = [control - tuned for tuned, control in zip(scores["tuned"], scores["softmax tuned"], strict=True)]
    worst = max(losses)
    verdict = HOLDS if worst < 0.02 else FAILS if min(losses) > 0.02 else OPEN
    listed = ", ".join(f"{loss:+.3f}" for loss in losses)
    reason = f"accuracy lost against softmax that was tuned as long, per seed: {listed}; up to 0.02 counts as little."
    names = {
        "before": "softmax, as trained",
        "replaced": "its attention replaced by `agent`, the same weights",
        "tuned": "and fine-tuned",
        "softmax tuned": "softmax, fine-tuned as long",
    }
    run = (
        "A small softmax model is trained from scratch on the same images; the paper takes a pretrained ViT. Then "
        "`agent` replaces its attention, with the same weights, and the model is fine-tuned for half as many epochs "
        f"at a quarter of the learning rate. {bench.describe_small()}"
    )
    rows = [[names[name], spread(found)] for name, found in scores.items()]
    return Finding(run, {part: (verdict, reason)}, [table(["model", "accuracy"], rows)])
