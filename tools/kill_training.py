"""
Kills training runs with SIGKILL, resumes them, and compares their ends with that of a run that was left alone.

    python tools/kill_training.py --kills 50 --seed 1
    python tools/kill_training.py --kills 10 --processes 2

A run is killed at a random time or at an aimed moment: while a file of a checkpoint is written, before one of the
steps of renaming and removing, during a validation, while the results are written. What is killed is one of its
processes, its launcher, or all of them at once, as when a machine fails. It is resumed from its last checkpoint,
killed again now and then, and at last left to end. Faults are: weights or metrics other than those of the run that was
left alone; a checkpoint that was whole and is not any more; a run that does not go on; checkpoints or temporary files
that should have been removed; a process that outlives its run. The status is 1 if there was one.

A single process is forked from one that has imported everything; two are started by `accelerate launch`. The data, the
model and the runs are small: a run is some seconds. Needs Linux and the packages of the extra `train`.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path


# Before any import of the libraries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"

import numpy as np
from processes import Stopwatch, find_argument, find_session


TRAINING = Path(__file__).resolve().parents[1] / "training"
CHECKPOINTS = "checkpoint-" + "[0-9]" * 8
PATIENCE = 120  # seconds that a run may compute and sleep
NUM_ROWS = {"train": 12, "validation": 5}
SETTINGS = ["--batch_size=4", "--num_epochs=3", "--warmup_epochs=0", "--learning_rate=3e-3", "--drop_path_rate=0.2"]
CLASSIFIER = ["--image_size=32", "--patch_size=8", "--crop_sizes=24"]


@dataclass(frozen=True)
class Variant:
    """
    Args:
        script: of training.
        options: what else it is told.
    """

    script: str
    options: tuple[str, ...]


VARIANTS = {
    "average": Variant(
        "pretrain.py", (*CLASSIFIER, "--num_workers=0", "--ema_decay=0.5", "--mixup_alpha=0.2", "--keep_best=true")
    ),
    "steps": Variant(
        "pretrain.py", (*CLASSIFIER, "--num_workers=0", "--checkpointing_steps=1", "--keep_checkpoints=1")
    ),
    "workers": Variant("pretrain.py", (*CLASSIFIER, "--num_workers=2", "--checkpointing_steps=2")),
    "streaming": Variant(
        "pretrain.py",
        (*CLASSIFIER, "--num_workers=0", "--streaming=true", "--num_train_images=12", "--checkpointing_steps=2"),
    ),
    "masks": Variant(
        "finetune.py",
        (
            "--task=semantic-segmentation",
            "--num_workers=0",
            "--crop_size=24",
            "--dice=true",
            "--checkpointing_steps=2",
        ),
    ),
}


# ---------------------------------------------------------------- where a run is killed


@dataclass
class Aim:
    """
    The moment of a kill: some time after an event, of Python's audit events, has happened a number of times.

    Args:
        event: its name; `time` for none: the time counts from the first step on.
        path: part of the path that it is about.
        count: how many of them go before.
        delay: seconds.
        rank: of the process that it happens in.
        victim: one of [`VICTIMS`].
    """

    event: str
    path: str = ""
    count: int = 0
    delay: float = 0.0
    rank: int = 0
    victim: str = "process"


VICTIMS = ("process", "launcher", "all")
EVERYWHERE = ("time", "validation")  # events of all processes, not of the main one alone


AIMS = {
    "random": lambda draw: Aim("time", delay=draw.uniform(0, 3)),
    "write": lambda draw: Aim(
        draw.choice(("open", "os.mkdir")), ".partial", draw.randrange(4), draw.choice((0, draw.uniform(0, 0.02)))
    ),
    "rename": lambda draw: Aim("os.rename", "checkpoint-", draw.randrange(6)),
    "remove": lambda draw: Aim("os.remove", "", draw.randrange(8)),
    "validation": lambda draw: Aim("validation", count=draw.randrange(3), delay=draw.choice((0, 0.01, 0.05))),
    "results": lambda draw: Aim("results", count=draw.randrange(5), delay=draw.choice((0, 0.001))),
}


def describe(event: str, args: tuple) -> tuple[str, str]:
    """An audit event as an [`Aim`] names it, and its path."""
    path = str(args[0]) if args else ""
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        name = Path(path).name
        is_result = ".partial" not in path and name in (
            "results.json",
            "README.md",
            "config.json",
            "preprocessor_config.json",
        )
        return ("results" if is_result else "open"), path
    return ("" if event == "open" else event), path


def draw_aim(draw: random.Random, moment: str, processes: int) -> Aim:
    """Where a run of so many processes is killed."""
    aim = AIMS[moment](draw)
    rank = draw.randrange(processes) if aim.event in EVERYWHERE else 0
    return replace(aim, rank=rank, victim=draw.choice(VICTIMS if processes > 1 else ("process", "all")))


def kill(victim: str, folder: str):
    """This process, its launcher, or all that train into the folder, this one last."""
    if victim == "launcher":
        os.kill(os.getppid(), signal.SIGKILL)
        return
    if victim == "all":
        members = {*find_session(os.getsid(0)), *find_argument(f"--output_dir={folder}")}
        for pid in members - {os.getpid()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def arm(aim: Aim, folder: str):
    """Kill at that moment."""
    seen = Counter()

    def strike():
        if aim.delay:
            threading.Timer(aim.delay, kill, (aim.victim, folder)).start()
        else:
            kill(aim.victim, folder)

    def on_event(event: str, args: tuple):
        name, path = describe(event, args)
        if name == aim.event and aim.path in path and os.getpid() == armed:
            seen[name] += 1
            if seen[name] == aim.count + 1:
                strike()

    armed = os.getpid()
    if aim.event == "time":
        strike()
    elif aim.event == "validation":
        watch_validation(lambda: on_event("validation", ()))
    else:
        sys.addaudithook(on_event)


def watch_validation(tell: Callable[[], None]):
    """Call that whenever the loop starts to validate."""
    from training.tasks.classification import ClassificationTask
    from training.tasks.segmentation import SegmentationTask

    for task in (ClassificationTask, SegmentationTask):
        evaluate = task.evaluate

        def told(self, losses, evaluate=evaluate):
            tell()
            return evaluate(self, losses)

        task.evaluate = told


def run_script(script: str, argv: list[str], aim: Aim | None):
    """In this process, as it is started by hand."""
    sys.argv = [script, *argv]
    if aim is not None:
        arm(aim, next(option.removeprefix("--output_dir=") for option in argv if option.startswith("--output_dir=")))
    runpy.run_path(str(TRAINING / script), run_name="__main__")


# ---------------------------------------------------------------- runs


def write_data(folder: Path):
    """Noisy pictures of two classes, with labels and with masks, as Parquet; and a small configuration."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    draw = np.random.default_rng(0)
    for kind in ("labels", "masks"):
        (folder / kind).mkdir(parents=True)
        features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"]) if kind == "labels" else Image()})
        for split, count in NUM_ROWS.items():
            labels = [i % 2 for i in range(count)]
            images = [PILImage.fromarray(draw.integers(0, 200, (30, 28, 3), dtype=np.uint8)) for _ in labels]
            if kind == "masks":
                labels = [PILImage.fromarray((np.asarray(image)[..., 0] > 100).astype(np.uint8)) for image in images]
            rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
            for shard in range(2):  # a stream is divided among processes by its files
                part = rows.shard(2, shard, contiguous=True)
                part.to_parquet(folder / kind / f"{split}-0000{shard}-of-00002.parquet")
    (folder / "masks" / "id2label.json").write_text(json.dumps({0: "dark", 1: "light"}))
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = {"model_type": "cbsa", "patch_embedding_type": "patchify", **sizes}
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(config))


def build_model(folder: Path):
    """Weights for a run that begins with some."""
    import torch
    from transformers import ViTImageProcessorPil

    from cbsa_hf import CBSAConfig, CBSAForImageClassification

    torch.manual_seed(0)
    CBSAForImageClassification(CBSAConfig.from_pretrained(folder)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained(folder)


@dataclass
class Run:
    """
    One output folder, and whatever processes train into it.

    Args:
        variant: what is trained.
        data: from [`write_data`].
        folder: the output folder.
        processes: how many train.
    """

    variant: Variant
    data: Path
    folder: Path
    processes: int
    printed: str = field(default="", init=False)

    def argv(self) -> list[str]:
        """The command line of the script: a new run, or the same run resumed if it has a whole checkpoint."""
        masks = self.variant.script == "finetune.py"
        model = f"--{'model_name_or_path' if masks else 'config_name'}={self.data / 'model'}"
        argv = [f"--dataset_name={self.data / ('masks' if masks else 'labels')}", f"--output_dir={self.folder}", model]
        argv += [*SETTINGS, *self.variant.options, "--report_to=none"]
        return argv + (["--resume_from_checkpoint=last"] if self.whole() else [])

    def whole(self) -> list[int]:
        """Steps of the checkpoints under their final names."""
        return sorted(int(path.name[-8:]) for path in self.folder.glob(CHECKPOINTS))

    def start(self, aim: Aim | None) -> int:
        """The process id; its session, of all its processes, has the same."""
        log = self.folder.with_suffix(".log")
        if self.processes > 1:
            # Two processes on CPU start only with this flag and a variable: see the README.
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1"]
            launcher += [f"--num_processes={self.processes}", "--mixed_precision=no", "--dynamo_backend=no"]
            launcher += ["--main_process_port=0"]
            command = [*launcher, __file__, "--inside", self.variant.script, json.dumps(vars(aim) if aim else None)]
            with open(log, "w") as printed:
                process = subprocess.Popen(
                    [*command, *self.argv()], stdout=printed, stderr=printed, start_new_session=True
                )
            return process.pid
        argv = self.argv()
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        status = 1
        try:
            os.setsid()
            with open(log, "w") as printed:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
            run_script(self.variant.script, argv, aim)
            status = 0
        except SystemExit as error:
            print(error.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def attempt(self, aim: Aim | None) -> str:
        """Run until it ends or is killed: `ended`, `killed`, or what is wrong."""
        pid = self.start(aim)

        def find_members() -> list[int]:
            return [*{*find_session(pid), *find_argument(f"--output_dir={self.folder}")}]

        watch = Stopwatch(find_members)
        while not (found := os.waitpid(pid, os.WNOHANG))[0] and watch.seconds() < PATIENCE:
            time.sleep(0.05)
        self.printed = self.folder.with_suffix(".log").read_text(errors="replace")
        if not found[0]:
            end_all(find_members)
            os.waitpid(pid, 0)
            return f"hang: no end within {PATIENCE} s"
        watch = Stopwatch(find_members)
        while find_members() and watch.seconds() < PATIENCE:
            time.sleep(0.05)
        if end_all(find_members):
            return "orphan: a process outlives its run"
        code = os.waitstatus_to_exitcode(found[1])
        if code == 0:
            return "ended"
        killed = code == -signal.SIGKILL or (self.processes > 1 and "SIGKILL" in self.printed)
        return "killed" if aim is not None and killed else f"refused: {self.printed.strip()[-300:]}"


def end_all(find_members: Callable[[], list[int]]) -> int:
    """How many there were, which are killed now."""
    members = find_members()
    for pid in members:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(members)


# ---------------------------------------------------------------- what is compared


def summarise(folder: Path) -> dict[str, object]:
    """Of a run that has ended, all that has to be as in another: weights and checkpoints byte by byte, and results."""
    results = json.loads((folder / "results.json").read_text())
    found = {name: results[name] for name in ("step", "metrics", "best", "best_step")}
    return found | {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def compare(folder: Path, expected: dict[str, object]) -> str | None:
    """What is other than expected."""
    found = summarise(folder)
    for name in expected:
        if found.get(name) != expected[name]:
            return f"different: {name}"
    known = {str(Path(name).parent) for name in expected}
    left = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in known)
    return f"left behind: {', '.join(left)}" if left else None


def kill_run(run: Run, draw: random.Random, moments: list[str]) -> tuple[list[tuple[str, str]], str | None]:
    """Start it, kill it at some of these moments, let it end: when and what was killed, and what is wrong."""
    killed = []
    for moment in moments:
        before = max(run.whole(), default=0)
        aim = draw_aim(draw, moment, run.processes)
        ending = run.attempt(aim)
        if max(run.whole(), default=0) < before:
            return killed, f"lost: the checkpoint of step {before} is gone"
        if ending not in ("killed", "ended"):
            return killed, ending
        if ending == "ended":
            break
        killed.append((moment, aim.victim))
    ending = run.attempt(None)
    return killed, None if ending == "ended" else ending


def main(argv: list[str] | None = None) -> int:
    """Kill as many times as wanted; 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how many (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="that each run has (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="what is trained"
    )
    parser.add_argument("--moments", nargs="+", choices=list(AIMS), default=list(AIMS), help="when it is killed")
    args = parser.parse_args(argv)
    from training import finetune, pretrain  # noqa: F401, for the processes that are forked

    draw, counts = random.Random(args.seed), {name: Counter() for name in args.variants}
    victims, faults = Counter(), []
    with tempfile.TemporaryDirectory(prefix="kill-") as scratch:
        data, expected, number = Path(scratch) / "data", {}, 0
        write_data(data)
        build_model(data / "model")
        while sum(sum(count.values()) for count in counts.values()) < args.kills:
            name = args.variants[number % len(args.variants)]
            if name not in expected:
                whole = Run(VARIANTS[name], data, Path(scratch) / name, args.processes)
                if (ending := whole.attempt(None)) != "ended":
                    raise RuntimeError(f"The run that was left alone did not end. {ending}")
                expected[name] = summarise(whole.folder)
            run = Run(VARIANTS[name], data, Path(scratch) / f"{name}-{number}", args.processes)
            moments = [draw.choice(args.moments) for _ in range(draw.randint(1, 3))]
            killed, fault = kill_run(run, draw, moments)
            fault = fault or compare(run.folder, expected[name])
            counts[name].update(moment for moment, _ in killed)
            victims.update(victim for _, victim in killed)
            said = f"{name}, killed at {', '.join(f'{moment} ({victim})' for moment, victim in killed) or 'no moment'}"
            print(f"run {number}: {said}: {fault or 'the same end'}", flush=True)
            if fault is not None:
                faults.append(fault)
                print(run.printed[-1500:])
            shutil.rmtree(run.folder, ignore_errors=True)
            number += 1
    print_table(counts, victims, args, number, faults)
    return int(bool(faults))


def print_table(
    counts: dict[str, Counter], victims: Counter, args: argparse.Namespace, number: int, faults: list[str]
):
    """How often each variant was killed at each moment, and how that ended."""
    print(f"| {args.processes} process(es) | " + " | ".join(args.moments) + " | all |")
    print("|" + "---|" * (len(args.moments) + 2))
    for name, count in counts.items():
        print(f"| {name} | " + " | ".join(str(count[m]) for m in args.moments) + f" | {sum(count.values())} |")
    print("\nWhat was killed: " + ", ".join(f"{count} x {victim}" for victim, count in victims.items()) + ".")
    kinds = Counter(fault.split(": ")[0] for fault in faults)
    said = (
        ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "0 faults: every end is bit for bit the same"
    )
    print(f"\n{number} runs, {sum(sum(c.values()) for c in counts.values())} kills; {said}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:  # in the processes that a launcher has started
        script, aim, *rest = sys.argv[2:]
        # With the modules that an aim may need before the script has imported them.
        from training import finetune  # noqa: F401

        aim = json.loads(aim)
        run_script(script, rest, None if aim is None or os.environ.get("RANK") != "0" else Aim(**aim))
    else:
        sys.exit(main())
