"""What a reader gets: tables, figures, verdicts and pages, in figures/<profile>/ and build/<profile>/site/.

    site           executed notebooks, tables and figures as static pages
    settings       the first screen of a notebook: its profile in one line, what it reads, folded
    report         save_table, save_figure, save_claim: every artefact with its data and its provenance
    claims         what the paper claims, the rule of verdicts, the page of them

Start with `report.save_table`.
"""
