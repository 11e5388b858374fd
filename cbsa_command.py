"""The `cbsa` command as it is installed: outside the package, whose imports take seconds in which Ctrl-C may come."""

import _thread
import signal
import sys


def main() -> int:
    asked = []

    def interrupt(number, frame):
        asked.append(number)
        raise KeyboardInterrupt

    def raise_again(ignored):
        """Python ignores what a destructor or a callback raises; a KeyboardInterrupt is then raised once more."""
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            _thread.interrupt_main()
        else:
            sys.__unraisablehook__(ignored)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = raise_again
    status = 130
    try:
        from cbsa_hf.cli import main as run

        status = run()
        said = status == 130
    except KeyboardInterrupt:
        said = False
    if asked and not said:  # also where a library caught the KeyboardInterrupt while it was imported
        print("cbsa: Interrupted.", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
