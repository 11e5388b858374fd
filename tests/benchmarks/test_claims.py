"""The claims, on small models and data: every part runs, and verdicts follow from the numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import ViTImageProcessorPil


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Reddish and bluish noise, 24 images for training and 12 for validation."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "blue"])})
    for split, count in [("train", 24), ("validation", 12)]:
        labels = [i % 2 for i in range(count)]
        pixels = random.integers(0, 160, (count, 20, 24, 3))
        for label, array in zip(labels, pixels, strict=True):
            array[..., 2 * label] += 90
        images = [PILImage.fromarray(array.astype(np.uint8)) for array in pixels]
        Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
            folder / f"{split}-00000-of-00001.parquet"
        )
    return folder


@pytest.fixture
def bench(data, tmp_path):
    from benchmarks.small_models import Recipe
    from benchmarks.workbench import Workbench

    recipe = Recipe(16, 4, 16, 2, 2, representatives_size=2, num_epochs=8, batch_size=8, learning_rate=1e-2)
    return Workbench(tmp_path, str(data), recipe=recipe, seeds=(0, 1), num_images=3)


def test_small_models_learn_and_are_cached(bench):
    from benchmarks.small_models import accuracy

    bench.recipe = replace(bench.recipe, num_epochs=24)
    model = bench.small("cbsa", 0, attention_type="cbsa")
    assert accuracy(model, bench.validation_set) > 0.9
    (folder,) = bench.cache.iterdir()
    trained = load_file(folder / "model.safetensors")
    bench.training_set.pixel_values.zero_()  # a model trained again would learn nothing
    again = bench.small("cbsa", 0, attention_type="cbsa")
    assert bench.training_set.digest != bench.validation_set.digest  # the cache depends on the images
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("claim", [2, 3, 4, 7])
def test_claims_about_trained_models(bench, claim):
    from benchmarks.claims import CLAIMS
    from benchmarks.workbench import FAILS, HOLDS, NOT_RUN, OPEN

    if claim == 4:
        bench.checkpoints = bench.cache / "comparison"
        for name in ("cbsa", "softmax"):
            bench.small(name, 0, attention_type=name).save_pretrained(bench.checkpoints / f"{name}-0")
            ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(bench.checkpoints / f"{name}-0")
    finding = CLAIMS[claim][1](bench)
    assert all(verdict in (HOLDS, FAILS, OPEN) for verdict, _ in finding.verdicts.values())
    assert all(len({line.count("|") for line in text.splitlines()}) == 1 for text in finding.tables)
    assert "nan" not in str(finding.tables)
    assert (finding.picture is None) == (claim == 7)
    bench.dataset_name = None
    assert {verdict for verdict, _ in CLAIMS[claim][1](bench).verdicts.values()} == {NOT_RUN}


def test_adaptation_replaces_only_the_attention(bench):
    from benchmarks.small_models import with_attention

    model = bench.small("softmax", 0, attention_type="softmax")
    replaced = with_attention(model, attention_type="agent")
    assert type(replaced.cbsa.layers[0].attention).__name__ == "AgentSelfAttention"
    assert all(torch.equal(replaced.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    tuned = bench.adapted(model, "softmax-to-agent", 0, attention_type="agent")
    assert tuned.config.attention_type == "agent"
    assert not torch.equal(tuned.classifier.weight, model.classifier.weight)


def test_masks_are_scored_once(bench, tmp_path):
    """Claim 1 on two photos. The second time, the scores come from the cache."""
    from benchmarks.model_claims import zero_shot_segmentation
    from benchmarks.workbench import NOT_RUN

    random = np.random.default_rng(0)
    masks = [PILImage.fromarray(np.pad(np.ones((20, 20), np.uint8), 10)) for _ in range(2)]
    images = [PILImage.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(2)]
    folder = tmp_path / "masks"
    folder.mkdir()
    features = Features({"image": Image(), "label": Image()})
    rows = Dataset.from_dict({"image": images, "label": masks}, features=features)
    rows.to_parquet(folder / "train-00000-of-00001.parquet")
    bench.masks_name = str(folder)
    finding = zero_shot_segmentation(bench)
    (cached,) = bench.cache.glob("masks-shipped-*.json")
    scores = json.loads(cached.read_text())
    assert scores["everything"] == pytest.approx(0.25)
    assert f"| everything | {scores['everything']:.3f} |" in finding.tables[0]
    cached.write_text(json.dumps(scores | {"attention": 0.9}))
    segments, ahead = zero_shot_segmentation(bench).verdicts.values()
    assert segments[0] == "holds here"
    assert ahead[0] == NOT_RUN


def test_verdict_over_seeds():
    from benchmarks.workbench import FAILS, HOLDS, OPEN, sign_verdict

    assert [sign_verdict(values) for values in ([1, 2], [-1, -2], [1, -1])] == [HOLDS, FAILS, OPEN]


def test_page_of_claims(tmp_path, capsys):
    from benchmarks.claims import Arguments, main
    from benchmarks.operator_claims import linear_cost

    cache, output = tmp_path / "cache", tmp_path / "docs" / "claims.md"
    with pytest.raises(ValueError, match=r"There is no folder .*docs to write"):
        main(Arguments(claims=[5], cache_dir=str(cache), output=str(output)))
    assert not list(tmp_path.iterdir())
    output.parent.mkdir()
    main(Arguments(claims=[6], cache_dir=str(cache), output=str(output)))
    main(Arguments(claims=[1, 5], cache_dir=str(cache), output=str(output)))  # claim 6 stays on the page
    assert "5. Cost grows linearly with tokens: holds here" in capsys.readouterr().out
    page = output.read_text()
    assert page.count("\n## ") == 7
    assert "| 5 | Cost grows linearly with tokens | **holds here** |" in page
    assert (
        "| 6 | Iterating the operator with the true bases compresses tokens onto the subspaces | **holds here** |"
        in page
    )
    assert "**not run**; no `--masks_name` was given." in page
    found = {"run": "Once.", "verdicts": {"a part": ["holds here", "by far."]}, "tables": [], "picture": None}
    (cache / "claim-1.json").write_text(json.dumps(found | {"seconds": 1, "machine": "any"}))
    main(Arguments(claims=[1], cache_dir=str(cache), output=str(output)))
    assert "- a part: **holds here**; by far." in output.read_text()  # a claim that cannot run keeps its former result
    assert sorted(path.name for path in output.parent.iterdir()) == ["claim-5.png", "claim-6.png", "claims.md"]
    # 2 N d^2 + 3 N m d, and 2 m^2 d within the contraction; N = 16385.
    count = 2 * 16385 * 192**2 + 3 * 16385 * 64 * 192 + 2 * 64**2 * 192
    assert f"{count / 1e6:,.1f}" in linear_cost(None).tables[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [({"claims": [8]}, "There is no claim 8"), ({"checkpoints": "nowhere"}, "`--checkpoints nowhere` is no folder")],
)
def test_bad_input_raises(tmp_path, monkeypatch, values, message):
    from benchmarks.claims import Arguments, main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main(Arguments(**values))
    assert not list(tmp_path.iterdir())


def test_peak_memory_of_the_cost_benchmark():
    from benchmarks.zero_shot_cost import measure

    _, peak = measure(lambda: [torch.ones(2**18), torch.ones(2**18)])  # both at once, 1 MiB each
    assert peak == pytest.approx(2, rel=0.01)
