"""What a reader gets: tables, figures, verdicts and pages, in figures/<profile>/ and build/<profile>/site/.

    site           executed notebooks, tables and figures as static pages
    summary        what a run leaves, in a few lines: what was made, where to look, what was found
    settings       the first screen of a notebook: its profile in one line, what it reads, folded
    report         save_table, save_figure: every artefact with its data
    records        save_claim; where every artefact comes from
    claims_page    claims.md and differences.md
    escape         text that others wrote, inside Markdown and LaTeX
    claims         what the paper claims, and the rule of verdicts

Start with `report.save_table`.
"""
