"""One typed record of every size, model and data source of a run: `Profile.load("mini")`.

A profile is a YAML file in `notebooks/profiles/`; `overrides` change single keys, by dotted name or nested:
`Profile.load("smol", {"grading.top": 10, "training": {"batch_size": 2}})`. Unknown keys and wrong types are
refused with the nearest valid name. This module alone reads the YAML.
"""

import dataclasses
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from deftlib import typed
from deftlib.credentials import hidden
from deftlib.sections import Settings, digest
from deftlib.store import ROOT
from deftlib.typed import ProfileError

FOLDER = ROOT / "notebooks" / "profiles"
OF_THE_MACHINE = ("jobs", "cluster", "launch")  # they say who computes: no result is another one by them
NAMES = ("mini", "hh-rlhf", "oasst", "policy", "words")  # sources by name, whatever stands in the user's folder


@dataclass(frozen=True)
class Profile(Settings):
    """Settings, and what tells them from those of the file as it was when they were loaded.

    A profile made from another by `dataclasses.replace`, for a part of its work, keeps the label of the whole.
    """

    label: str = field(kw_only=True, compare=False)
    written: str = field(kw_only=True, compare=False)  # 12 hex digits over file and overrides: no defaults of the code
    changes: dict = field(kw_only=True, compare=False)  # {dotted name: value} of what overrides changed

    @classmethod
    def from_options(cls, options):
        """The profile that a command was asked for, by the options of `add_options`. Raises ProfileError."""
        overrides = typed.flat(dict(cls.override(text) for text in options.set))
        return cls.load(options.profile, {key: from_here(key, value) for key, value in overrides.items()})

    @staticmethod
    def override(text):
        """(key, value) from `KEY=VALUE` as typed in a shell; the value is YAML. Raises ProfileError."""
        key, equals, value = text.partition("=")
        if not equals:
            raise ProfileError(f"an override is KEY=VALUE, found {text!r}")
        try:
            return key, yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ProfileError(f"{value!r} is not valid YAML, in {text!r}") from error

    @classmethod
    def load(cls, name, overrides=None):
        """The profile of that name, with overrides applied. Raises ProfileError on anything unknown."""
        plain = typed.build(Settings, _without_credentials(_read(name)))
        if plain.name != name:
            raise ProfileError(f"{name}.yaml calls itself {plain.name!r}, expected {name!r}")
        whole = _read(name)
        for key, value in (overrides or {}).items():
            typed.override(whole, key, value)
        tree = _without_credentials(whole)
        chosen = typed.build(Settings, tree)
        _check_machines(chosen)
        were = plain.settings()
        changes = {key: value for key, value in chosen.settings().items() if key not in were or were[key] != value}
        return cls(**vars(chosen), label=_label(chosen, changes), written=digest(tree), changes=changes)

    @property
    def options(self):
        """The options of a command that give this profile: "--profile mini --set grading.top=10.0"."""
        sets = [shlex.quote(f"{key}={one_line(value)}") for key, value in self.changes.items()]
        return " --set ".join([f"--profile {self.name}", *sets])


def _check_machines(settings):
    launch = settings.launch
    for name, many in (("jobs", settings.jobs), ("launch.processes", launch.processes), ("launch.nodes", launch.nodes)):
        if many != "auto" and many < 1:
            raise ProfileError(f"{name} is {many}: at least 1")
    if launch.processes % launch.nodes:
        raise ProfileError(
            f"launch.processes={launch.processes} cannot be dealt evenly over launch.nodes={launch.nodes}"
        )


def from_here(key, value):
    """The value, its paths absolute: they are meant from where the user stands, not from the notebooks' folder."""
    if isinstance(value, list):
        return [from_here(key, part) for part in value]
    if isinstance(value, dict):
        return {name: from_here(name, part) for name, part in value.items()}
    is_path = key.rpartition(".")[2] in ("source", "bart") and isinstance(value, str) and value not in NAMES
    return str(Path(value).expanduser().resolve()) if is_path and value and Path(value).expanduser().exists() else value


def add_options(parser, default="mini"):
    """Give a command's `argparse` parser the options that `Profile.from_options` reads."""
    parser.add_argument("--profile", default=default, help=f"mini, smol, gpu or paper (default: {default})")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. grading.top=10")


def one_line(value):
    """A value as `--set` takes it: YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
    return json.dumps(value) if "\n" in text else text


def _read(name):
    """The nested dict in the profile's file."""
    path = FOLDER / f"{name}.yaml"
    if not FOLDER.is_dir():
        raise ProfileError(f"no profiles at {FOLDER}: run inside the project's checkout, or set DEFT_ROOT to it")
    if not path.is_file():
        names = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        raise ProfileError(f"no profile {name!r} in {FOLDER.name}/: {typed.nearest(str(name), names)}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ProfileError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def _without_credentials(tree):
    """`credentials.hidden`, of which two for one address are a fault of the profile."""
    try:
        return hidden(tree)
    except ValueError as error:
        raise ProfileError(str(error)) from error


def _label(settings, changes):
    """`mini`, and after overrides `mini,grading.top=10.0,5d0c7a9e`: the name of a folder for this setting alone.

    It says what differs, as far as 80 characters reach; the digest is over all settings that can change a result.
    """
    told = {key: value for key, value in changes.items() if key.partition(".")[0] not in OF_THE_MACHINE}
    said = ",".join(f"{key}={one_line(value).rpartition('/')[2]}" for key, value in told.items())
    readable = re.sub(r"[^\w.,=+-]+", "-", said)[:80]
    sections = [f.name for f in dataclasses.fields(Settings) if f.name not in OF_THE_MACHINE]
    return f"{settings.name},{readable},{settings.digest(*sections)[:8]}" if told else settings.name
