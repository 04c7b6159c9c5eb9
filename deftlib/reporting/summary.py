"""What a run leaves to look at, in a few lines: what was made, where it is, what was found.

print(summary(profile))
"""

from deftlib.reporting import claims, records

# What the paper is about, in three questions: does DEFT add reward, what of it is R_dis, what does it cost?
MAIN = ("reward-gain-PRO-D3", "ablation-Rdis / DEFT-PRO", "cost / PRO/time")


def summary(profile):
    """Lines of text about `figures/<profile>/`: how many tables and figures, the pages, the main findings."""
    folder = records.folder_of(profile)
    names = records.recorded_provenance(folder / "provenance.json")["artefacts"]
    figures = sum(name.startswith("fig") for name in names)
    lines = [f"made   {len(names) - figures} tables and {figures} figures: figures/{profile.label}/"]
    lines.append(
        f"look   figures/{profile.label}/claims.md: the paper's claims, each with its verdict; make lab, make report"
    )
    return "\n".join([*lines, *findings(profile)])


def findings(profile):
    """A line for each of the main claims that this run says something to."""
    parts, recorded = (
        claims.parts(records.published()),
        records.recorded_claims(records.folder_of(profile) / "claims.json"),
    )
    found = claims.verdicts(parts, recorded)
    for part in parts:
        record = recorded.get(part.name)
        if part.name in MAIN and record and record["ours"]:
            mean, low, high, _ = record["ours"]
            yield f"found  {part.means}: {mean:+.3g} [{low:+.3g}, {high:+.3g}] {part.unit}; {found[part.name].said}"
