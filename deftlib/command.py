"""What every command does with what goes wrong: one sentence and an exit code, and a traceback for bugs alone."""

import os
import sys
from contextlib import contextmanager

EXPECTED = ValueError, RuntimeError, OSError, LookupError  # the kinds that this library and the ones below it raise
BUGS = KeyError, IndexError  # kinds of LookupError that tell a user nothing


@contextmanager
def one_sentence(code=1):
    """Ends the process with "error: …" and this exit code where something expected goes wrong inside.

    DEFT_TRACEBACK=1 shows the traceback too. An interrupted run (Ctrl-C) says that it can go on, with exit code 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept, the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    except EXPECTED as error:
        if isinstance(error, BUGS) or os.environ.get("DEFT_TRACEBACK"):
            raise
        sentence = f"error: {' '.join(str(error).split()) or type(error).__name__}"
        if code == 1:
            raise SystemExit(sentence) from error  # Python prints it
        print(sentence, file=sys.stderr)
        raise SystemExit(code) from error
