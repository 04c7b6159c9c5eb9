"""The first screen of a notebook: its profile in one line, and the settings that this notebook reads, folded.

    settings.shown(profile, "data", "text", "grading.top")     # sections, or single settings, by dotted name

Jupyter shows it as HTML, a terminal as text.
"""

import textwrap
from html import escape

from deftlib.profile import Profile, ProfileError, one_line


def shown(profile, *names):
    """What a notebook's second cell ends with: `Shown`, which shows itself.

    names: of sections or settings. Raises ProfileError for a name that no setting has.
    """
    every = profile.settings()
    read = {name: [key for key in every if key == name or key.startswith(f"{name}.")] for name in names}
    for name, keys in read.items():
        if not keys:
            sections = dict.fromkeys(key.partition(".")[0] for key in every)
            raise ProfileError(f"no setting {name!r} in a profile: a section is one of {', '.join(sections)}")
    return Shown(profile, [key for key in every if any(key in keys for keys in read.values())])


def in_one_line(profile):
    """Name, policy, data and sizes of a profile."""
    policy, data, text = profile.policy, profile.data, profile.text
    layers = "1 layer" if policy.layers == 1 else f"{policy.layers} layers"
    size = f"{layers} of {policy.hidden_size}" if policy.source == "mini" else policy.dtype
    lists = data.train_lists or ("all" if data.train_share == 1 else f"{100 * data.train_share:g} % of the")
    return (
        f"{profile.name}: policy {policy.source} ({size}), {lists} lists of the policy's part of {data.source}, "
        f"prompts of {text.prompt_tokens} and replies of {text.reply_tokens} tokens, seeds {one_line(profile.seeds)}"
    )


class Shown:
    """Some settings of a profile; those that overrides changed are marked, whether this notebook reads them or not."""

    def __init__(self, profile, keys):
        self.line = in_one_line(profile)
        self.values = {key: one_line(value) for key, value in profile.settings().items()}
        plain = Profile.load(profile.name).settings()
        self.was = {k: f"{one_line(plain.get(k))} in {profile.name}.yaml" for k in profile.changes}
        self.keys = keys

    def __repr__(self):
        lines = [self.line, *(f"changed: {key} {self.values[key]} ({was})" for key, was in self.was.items())]
        sections = {}
        for key in self.keys:
            section, _, name = key.rpartition(".")
            sections.setdefault(section, []).append(f"{name} {self.values[key]}" + " (changed)" * (key in self.was))
        lines += [f"{section or 'profile'}: {', '.join(settings)}" for section, settings in sections.items()]
        return "\n".join(textwrap.fill(line, 79, subsequent_indent="  ", break_on_hyphens=False) for line in lines)

    def _repr_html_(self):
        changed = [
            f"<br>changed: {key} <b>{escape(self.values[key])}</b> ({escape(was)})" for key, was in self.was.items()
        ]
        line = f"<p>{escape(self.line)}{''.join(changed)}</p>"
        if not self.keys:
            return line
        rows = [[key, self.values[key], self.was.get(key, "")] for key in self.keys]
        table = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return (
            f"{line}<details><summary>the {len(self.keys)} settings that this notebook reads</summary>"
            f"<table><tr><th>setting</th><th>value</th><th>changed from</th></tr>{table}</table></details>"
        )
