"""The `cbsa` command as it is installed: outside the package, whose imports take seconds in which Ctrl-C may come."""

import sys


def main() -> int:
    try:
        from cbsa_hf.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("cbsa: Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
