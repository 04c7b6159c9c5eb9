"""The command `deft`: every step that is worth typing, `deft train --method deft-dpo` and its like.

deft                      # what there is
deft train --help         # the options of one
"""

import importlib
import sys

import deftlib

COMMANDS = {  # name: (module, what it does, the extra that brings what it imports)
    "check": ("training.check", "tell what is understood of preference data of your own", ""),
    "train": ("training.train", "train one policy by any method", ""),
    "plan": ("studies.plan", "tell what a profile will do: stages, GPU time, disk", "reporting"),
    "run": ("run", "execute notebooks headless with a profile", "notebooks"),
    "site": ("reporting.site", "turn what was executed into static pages", "reporting"),
    "extend": ("training.extend", "give every list one more reply", ""),
    "refine": ("evaluation.refine", "let a stronger model rewrite the references", "evaluation"),
    "mt-bench": ("evaluation.mt_bench", "answer MT-Bench and have it judged", "evaluation"),
    "first-updates": ("studies.first_updates", "twenty updates of every method on a real model", "reporting"),
    "statistics": ("studies.coverage", "simulate how often the intervals hold the true mean", "reporting"),
    "bench": ("studies.bench", "measure what speed and size cost here, as ratios", "reporting"),
    "mini-world": ("preferences.mini_world", "write data/mini, or check it", ""),
    "mini-start": ("models.policies", "train the mini world's start policy into data/mini/start", ""),
}


def main():
    """Runs the command named first; each reads its own options. Returns its exit code."""
    name, *options = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"error: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module, _, extra = COMMANDS[name]
    try:
        module = importlib.import_module(f"deftlib.{module}")
    except ModuleNotFoundError as error:
        if not extra or error.name.startswith("deftlib"):
            raise
        print(f"error: deft {name} needs {error.name}: pip install 'deftlib[{extra}]'", file=sys.stderr)
        return 2
    sys.argv = [f"deft {name}", *options]
    return module.main()


def usage():
    """What `deft --help` prints."""
    commands = "\n".join(f"  {name:14} {does}" for name, (_, does, _) in COMMANDS.items())
    return f"""usage: deft COMMAND [options]

{commands}

deft COMMAND --help tells its options. This is deftlib {deftlib.__version__}."""


if __name__ == "__main__":
    sys.exit(main())
