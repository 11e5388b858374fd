"""
Kill training runs with SIGKILL, resume them, and compare their results with those of an undisturbed run.

    python tools/kill_training.py --kills 50 --seed 1
    python tools/kill_training.py --kills 10 --processes 2

A run is killed at a random time or at a chosen moment: while a file of a checkpoint is written, before a file is
renamed or removed, during a validation, or while the results are written. The signal goes to one of the run's
processes, to its launcher, or to all of them at once, as when a machine fails. The run is then resumed from its last
checkpoint. It may be killed again, and finally it is left to end. Faults are: weights or metrics that differ from
those of the undisturbed run; a checkpoint that was complete and is not any more; a run that does not resume;
checkpoints or temporary files that should have been removed; a process that is still there after its run. The exit
status is 1 if there was a fault.

A run with one process is forked from this process, which has imported everything. A run with two processes is started
by `accelerate launch`. Data, model and runs are small: a run takes a few seconds. Needs Linux and the packages of the
extra `train`.
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


# The libraries read these variables when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"

import numpy as np
from processes import Stopwatch, find_argument, find_session


TRAINING = Path(__file__).resolve().parents[1] / "training"
CHECKPOINTS = "checkpoint-" + "[0-9]" * 8
PATIENCE = 120  # seconds of computing and sleeping after which a run counts as hanging
NUM_ROWS = {"train": 12, "validation": 5}
SETTINGS = ["--batch_size=4", "--num_epochs=3", "--warmup_epochs=0", "--learning_rate=3e-3", "--drop_path_rate=0.2"]
CLASSIFIER = ["--image_size=32", "--patch_size=8", "--crop_sizes=24"]


@dataclass(frozen=True)
class Variant:
    """
    Args:
        script: the training script.
        options: its options, beside those of every run.
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
    The moment of a kill: some time after an event has happened a number of times.

    Args:
        event: name of a Python audit event, `validation`, `results`, or `time`: the start of the script.
        path: text that the path of the event contains.
        count: number of such events to let pass first.
        delay: seconds between the event and the kill.
        rank: rank of the process in which the events are counted.
        victim: what is killed, one of [`VICTIMS`].
    """

    event: str
    path: str = ""
    count: int = 0
    delay: float = 0.0
    rank: int = 0
    victim: str = "process"


VICTIMS = ("process", "launcher", "all")
EVERYWHERE = ("time", "validation")  # events of all processes; the others happen in the main process alone


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
    """The name that an [`Aim`] uses for an audit event, and the path of the event."""
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
    """Draw when a run with that number of processes is killed, and what is killed."""
    aim = AIMS[moment](draw)
    rank = draw.randrange(processes) if aim.event in EVERYWHERE else 0
    return replace(aim, rank=rank, victim=draw.choice(VICTIMS if processes > 1 else ("process", "all")))


def kill(victim: str, folder: str):
    """Kill this process, its launcher, or all processes that train into the folder (this one last)."""
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
    """Prepare this process to kill at that moment."""
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
    """Call `tell` whenever the training loop starts a validation."""
    from training.tasks.classification import ClassificationTask
    from training.tasks.segmentation import SegmentationTask

    for task in (ClassificationTask, SegmentationTask):
        evaluate = task.evaluate

        def told(self, losses, evaluate=evaluate):
            tell()
            return evaluate(self, losses)

        task.evaluate = told


def run_script(script: str, argv: list[str], aim: Aim | None):
    """Run a training script in this process as `python SCRIPT` would, with an [`Aim`] or without one."""
    sys.argv = [script, *argv]
    if aim is not None:
        arm(aim, next(option.removeprefix("--output_dir=") for option in argv if option.startswith("--output_dir=")))
    runpy.run_path(str(TRAINING / script), run_name="__main__")


# ---------------------------------------------------------------- runs


def write_data(folder: Path):
    """Write Parquet files of noisy pictures, one set with labels and one with masks, and a small configuration."""
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
    """Save a small model with random weights, for runs that fine-tune."""
    import torch
    from transformers import ViTImageProcessorPil

    from cbsa_hf import CBSAConfig, CBSAForImageClassification

    torch.manual_seed(0)
    CBSAForImageClassification(CBSAConfig.from_pretrained(folder)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained(folder)


@dataclass
class Run:
    """
    An output folder, and the processes that train into it.

    Args:
        variant: script and options.
        data: the folder that [`write_data`] wrote.
        folder: the output folder.
        processes: number of training processes.
    """

    variant: Variant
    data: Path
    folder: Path
    processes: int
    printed: str = field(default="", init=False)

    def argv(self) -> list[str]:
        """The options of the script. The run resumes if it has a complete checkpoint."""
        masks = self.variant.script == "finetune.py"
        model = f"--{'model_name_or_path' if masks else 'config_name'}={self.data / 'model'}"
        argv = [f"--dataset_name={self.data / ('masks' if masks else 'labels')}", f"--output_dir={self.folder}", model]
        argv += [*SETTINGS, *self.variant.options, "--report_to=none"]
        return argv + (["--resume_from_checkpoint=last"] if self.whole() else [])

    def whole(self) -> list[int]:
        """Steps of the complete checkpoints: those that have their final names."""
        return sorted(int(path.name[-8:]) for path in self.folder.glob(CHECKPOINTS))

    def start(self, aim: Aim | None) -> int:
        """Start the run in a new session. Returns its process id, which is also the id of the session."""
        log = self.folder.with_suffix(".log")
        if self.processes > 1:
            # On CPU, two processes start only with `--multi_gpu` and ACCELERATE_USE_CPU: see docs/guides/training.md.
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
        """Start the run and wait until it ends or is killed. Returns `ended`, `killed`, or what is wrong."""
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
    """Kill all of these processes. Returns how many there were."""
    members = find_members()
    for pid in members:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(members)


# ---------------------------------------------------------------- what is compared


def summarise(folder: Path) -> dict[str, object]:
    """What two runs have to have in common at their end: results, and the bytes of all weights and checkpoints."""
    results = json.loads((folder / "results.json").read_text())
    found = {name: results[name] for name in ("step", "metrics", "best", "best_step")}
    return found | {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def compare(folder: Path, expected: dict[str, object]) -> str | None:
    """The first difference from what is expected, or None."""
    found = summarise(folder)
    for name in expected:
        if found.get(name) != expected[name]:
            return f"different: {name}"
    known = {str(Path(name).parent) for name in expected}
    left = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in known)
    return f"left behind: {', '.join(left)}" if left else None


def kill_run(run: Run, draw: random.Random, moments: list[str]) -> tuple[list[tuple[str, str]], str | None]:
    """
    Start a run, kill it at these moments, and let it end. Returns moment and victim of each kill, and the fault.
    """
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
    """Kill runs `--kills` times. Returns 1 if there was a fault, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="number of kills (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="processes of each run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (%(default)s)")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="what is trained"
    )
    parser.add_argument("--moments", nargs="+", choices=list(AIMS), default=list(AIMS), help="when it is killed")
    args = parser.parse_args(argv)
    from training import finetune, pretrain  # noqa: F401, forked processes have them already

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
    """Print how often each variant was killed at each moment, and the number of faults."""
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
        # An aim at validations changes classes of these modules before the script imports them.
        from training import finetune  # noqa: F401

        aim = json.loads(aim)
        run_script(script, rest, None if aim is None or os.environ.get("RANK") != "0" else Aim(**aim))
    else:
        sys.exit(main())
