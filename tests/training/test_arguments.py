"""Options of the training scripts: recipes, command line, and errors."""

import dataclasses
import re
import runpy
import sys

import pytest
import yaml
from conftest import ROOT

from training.arguments import (
    ComparisonArguments,
    FinetuningArguments,
    PretrainingArguments,
    ScoringArguments,
    SegmentationArguments,
    parse_arguments,
)


class TestArguments:
    NAMES = ["--dataset_name=nowhere", "--output_dir=nowhere"]
    RECIPE = "dataset_name: somewhere\nlearning_rate: 1e-4\ncrop_sizes: [96, 128]\nkeep_best: true\nteacher:\n"

    def test_command_line_overrides_the_recipe(self, tmp_path):
        (tmp_path / "recipe.yaml").write_text(self.RECIPE)
        given = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", "out", "--crop_sizes", "64"]
        args = parse_arguments(PretrainingArguments, given)
        assert (args.dataset_name, args.learning_rate, args.keep_best) == ("somewhere", 1e-4, True)
        assert (args.crop_sizes, args.teacher, args.batch_size) == ([64], None, 64)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("batchsize: 8", "names `batchsize`, which the script does not know; did you mean `batch_size`?"),
            ("- a list", "has to be a list of `name: value` lines"),
            ("a: [", "is not YAML"),
        ],
    )
    def test_bad_recipe_raises(self, tmp_path, text, message):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"recipe\.yaml") as error:
            parse_arguments(PretrainingArguments, ["--config", str(tmp_path / "recipe.yaml")])
        assert message in str(error.value)

    @pytest.mark.parametrize(
        ("name", "arguments_class"),
        [
            ("cbsa-tiny-camvid", SegmentationArguments),
            ("cbsa-tiny-camvid-2", SegmentationArguments),
            ("cbsa-tiny-camvid-3", SegmentationArguments),
            ("cbsa-tiny-imagenette", PretrainingArguments),
            ("cbsa-tiny-imagenette-2", FinetuningArguments),
            ("comparison", ComparisonArguments),
        ],
    )
    def test_every_recipe_is_valid(self, name, arguments_class):
        recipe = ROOT / "training" / "recipes" / f"{name}.yaml"
        args = parse_arguments(arguments_class, ["--config", str(recipe), *self.NAMES])
        for option, value in yaml.safe_load(recipe.read_text()).items():
            assert getattr(args, option) == value
        assert len(list(recipe.parent.iterdir())) == 6

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--drop_path_rate=1"], "`--drop_path_rate` is 1.0, and has to be below 1."),
            (["--learning_rate=nan"], "`--learning_rate` is nan, and has to be at least 0."),
            (["--mixup_alpha=-1"], "`--mixup_alpha` is -1.0, and has to be at least 0."),
            (["--label_smoothing=1.5"], "`--label_smoothing` is 1.5, and has to be at most 1."),
            (["--num_epochs=0"], "`--num_epochs` is 0, and has to be at least 1."),
            (["--num_workers=-1"], "`--num_workers` is -1, and has to be at least 0."),
            (["--crop_sizes", "64", "0"], "`--crop_sizes` is 0, and has to be at least 1."),
            (["--num_train_images=8"], "`--num_train_images` does nothing without `--streaming`."),
            (["--teacher_cache=answers"], "`--teacher_cache` does nothing without `--teacher`."),
            (["--teeth=8"], "names `teeth`, which the script does not know; `--help` lists those that it knows."),
        ],
    )
    def test_bad_options_raise(self, arguments, message):
        with pytest.raises(ValueError) as error:
            parse_arguments(PretrainingArguments, [*self.NAMES, *arguments])
        assert message in str(error.value)

    def test_help_has_groups(self, capsys):
        """Every option except `--help` and `--config` is in a group."""
        with pytest.raises(SystemExit):
            parse_arguments(ScoringArguments, ["--help"])
        options, *groups = capsys.readouterr().out.split("options:")[1].split("\n\n")
        assert re.findall(r"^  .*?(--\w+)", options, re.M) == ["--help", "--config"]
        titles = [group.split(":")[0].strip() for group in groups]
        assert titles == ["what to score", "data", "semantic and zero-shot segmentation", "output"]
        named = re.findall(r"^  (--\w+)", "\n".join(groups), re.M)
        assert sorted(named) == sorted(f"--{option.name}" for option in dataclasses.fields(ScoringArguments))

    def test_help_without_a_task(self, monkeypatch, capsys):
        """`finetune.py --help` lists the tasks, and says how to see the options of one."""
        monkeypatch.setattr(sys, "argv", ["finetune.py", "--help"])
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(ROOT / "training" / "finetune.py"), run_name="__main__")
        assert not ending.value.code
        printed = capsys.readouterr().out
        assert "--task {image-classification,semantic-segmentation}" in printed
        assert "accelerate launch training/finetune.py --task semantic-segmentation" in printed

    def test_valid_options(self):
        args = parse_arguments(SegmentationArguments, [*self.NAMES, "--task=x", "--no_photometric_distortion"])
        assert args.photometric_distortion is False
        assert parse_arguments(PretrainingArguments, [*self.NAMES, "--num_workers=0"]).num_workers == 0

    @pytest.mark.parametrize(
        "name", ["seed", "attention_type", "feed_forward_type", "resume_from_checkpoint", "push_to_hub"]
    )
    def test_a_comparison_has_no_options_of_one_run(self, name):
        with pytest.raises(ValueError, match=f"names `{name}`, which the script does not know"):
            parse_arguments(ComparisonArguments, [*self.NAMES, f"--{name}=1"])


def test_accelerate_configurations_are_valid():
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((ROOT / "training" / "accelerate").glob("*.yaml"))
    assert len(files) == 3
    processes = {file.stem: load_config_from_file(str(file)).num_processes for file in files}
    assert processes == {"1-gpu": 1, "8-gpus": 8, "4x8-gpus-fsdp": 32}
