"""The `cbsa` command as it is installed: outside the package, whose imports take seconds in which Ctrl-C may come."""

import _thread
import signal
import sys
import threading


def main() -> int:
    """Run `cbsa_hf.cli.main` and return its exit status, which is 130 after Ctrl-C at any time."""
    asked = []

    def interrupt(number, frame):
        asked.append(number)
        raise KeyboardInterrupt

    def raise_again(ignored):
        """Python ignores what a destructor or a callback raises; a KeyboardInterrupt is then raised once more."""
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            # After this hook, because Python ignores what the hook raises, too.
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            sys.__unraisablehook__(ignored)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = raise_again
    try:
        from cbsa_hf.cli import main as run

        status = run()
    except KeyboardInterrupt:
        status = None
    # A library that catches the KeyboardInterrupt, while it is imported, does not decide that the command goes well.
    if status is None or (asked and status != 130):
        print("cbsa: Interrupted.", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
