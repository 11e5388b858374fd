"""
Give the library damaged, odd and hostile input, and count how each case ends.

    python tools/fuzz.py images checkpoints masks datasets commands --count 200 --seed 1
    python tools/fuzz.py images --seed 1 --only 417

A case may end in two ways: sound input gives a result, and other input gives one sentence that says what is wrong.
Everything else is a fault: a traceback, a hang, a crash, memory above the bound, a file written or changed outside the
output folder, a program started, a question to the user, a result for input that cannot have one, a refusal of sound
input, or a sentence that does not name the file. The exit status is 1 if there was a fault.

A seed and a number always give the same case. `--only` repeats one case and prints its whole output.

Needs Linux and the packages of the extras `test` and `train`.
"""

import argparse
import shutil
import sys
from collections import Counter

from fuzzing import SCRATCH
from fuzzing.cases import FAULTS, RIGHT, Kind, Outcome
from fuzzing.checkpoints import make_checkpoint
from fuzzing.commands import make_command
from fuzzing.data_sets import import_scripts, make_labels, make_masks
from fuzzing.images import make_image
from fuzzing.models import build_models
from fuzzing.workers import run_cases


KINDS = {
    "images": Kind(make_image, per_process=50),
    "checkpoints": Kind(make_checkpoint),
    "masks": Kind(make_masks),
    "datasets": Kind(make_labels),
    "commands": Kind(make_command),
}


def print_table(found: dict[str, list[Outcome]]):
    """Print how often each verdict occurred, and the largest time and memory of a case."""
    columns = ("kind", "cases", *(f"{verdict}s" for verdict in RIGHT), *FAULTS, "most s", "most MB")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for kind, outcomes in found.items():
        counts = Counter(outcome.verdict for outcome in outcomes)
        numbers = [len(outcomes), *(counts[verdict] for verdict in RIGHT + FAULTS)]
        numbers += [f"{max(o.seconds for o in outcomes):.1f}", f"{max(o.megabytes for o in outcomes):.0f}"]
        print(f"| {kind} | " + " | ".join(map(str, numbers)) + " |")


def print_faults(kind: str, seed: int, outcomes: list[Outcome]):
    """Print each kind of fault once, with the numbers of its cases and the last lines that the first case printed."""
    sorts: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.verdict not in RIGHT:
            sorts.setdefault((outcome.verdict, outcome.detail), []).append(outcome)
    for (verdict, detail), cases in sorted(sorts.items(), key=lambda item: -len(item[1])):
        indices = ", ".join(str(case.index) for case in cases[:5])
        print(f"\n{len(cases)} x {verdict}: {detail}\n    {kind} --seed {seed} --only {indices}")
        for line in cases[0].text.strip().splitlines()[-6:]:
            print(f"        {line[:200]}")


def main(argv: list[str] | None = None) -> int:
    """Try cases of the chosen kinds. Returns 1 if there was a fault, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=list(KINDS), help="what to try")
    parser.add_argument("--count", type=int, default=100, help="cases of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (%(default)s)")
    parser.add_argument("--only", type=int, help="try only the case with this number, and print its output")
    parser.add_argument("--seconds", type=float, default=20, help="that a case may compute or sleep (%(default)s)")
    parser.add_argument("--memory", type=float, default=2048, help="megabytes that a case may use (%(default)s)")
    args = parser.parse_args(argv)
    found = {}
    try:
        import_scripts()
        build_models()
        for name in args.kinds:
            indices = list(range(args.count)) if args.only is None else [args.only]
            found[name] = []
            for outcome in run_cases(KINDS[name], args.seed, indices, args):
                found[name].append(outcome)
                if len(found[name]) % 500 == 0:
                    print(f"{name}: {Counter(case.verdict for case in found[name])}", flush=True)
            print_faults(name, args.seed, found[name])
            if args.only is not None:
                print(found[name][0].text, found[name][0].verdict, found[name][0].detail)
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    print()
    print_table(found)
    return int(any(outcome.verdict not in RIGHT for outcomes in found.values() for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
