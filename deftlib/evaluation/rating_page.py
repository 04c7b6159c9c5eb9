"""The page on which people rate blind pairs, in JupyterLab: one at a time, saved at every click, resumed by name."""

import html
import re
from pathlib import Path

import ipywidgets as widgets
import pandas as pd

from deftlib import store
from deftlib.evaluation.human_eval import ANSWERS, ASPECTS, RatingError, read_ratings, write_sheet

LABELS = {"1": "1 is better", "tie": "tie", "2": "2 is better"}
BOX = (
    "border: 1px solid var(--jp-border-color2, #bbb); border-radius: 4px; padding: 8px 12px; margin: 4px 0; "
    "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.45"
)


class RatingPage(widgets.VBox):
    """One pair at a time: prompt, two replies side by side, two questions; show it by naming it last in a cell.

    sheet: of `make_sheet`. folder: where `<rater>.csv` is written anew after every click, and found again when the same
    rater comes back, who goes on at the first pair without both answers. No text is shown before a rater has a name.
    Next wants both answers; answers can be changed by going back.
    """

    def __init__(self, sheet, folder):
        self.sheet, self.folder, self.path, self.at = sheet.reset_index(drop=True), Path(folder), None, 0
        self.answers = self._blank()
        self.rater = widgets.Text(description="rater", placeholder="your name, then Enter", continuous_update=False)
        self.status, self.pair = widgets.HTML(), widgets.HTML()
        self.progress = widgets.IntProgress(max=len(sheet), layout={"width": "auto"})
        self.back, self.forward = (widgets.Button(description=text) for text in ("Back", "Next"))
        self.buttons = {(q, a): widgets.Button(description=LABELS[a]) for q in ASPECTS for a in ANSWERS}
        self.rater.observe(lambda change: self.begin(), "value")
        self.back.on_click(lambda button: self.turn(-1))
        self.forward.on_click(lambda button: self.turn(+1))
        for chosen, button in self.buttons.items():
            button.on_click(lambda button, chosen=chosen: self.answer(*chosen))
        rows = []
        for aspect in ASPECTS:
            question = widgets.HTML(f"<b>More {aspect}?</b>", layout={"width": "9em"})
            rows.append(widgets.HBox([question, *(self.buttons[aspect, answer] for answer in ANSWERS)]))
        rows.append(widgets.HBox([self.back, self.forward]))
        super().__init__([self.rater, self.progress, self.status, self.pair, *rows])
        self.show()

    def __repr__(self):
        return f"RatingPage({len(self.sheet)} pairs, {self.done} rated)"

    @property
    def done(self):
        """How many pairs have both answers."""
        return sum(map(_complete, self.answers.values()))

    def begin(self):
        """Open the file of the rater whose name was typed, or start one; a file that cannot be read is left alone."""
        self.answers, self.at, self.path = self._blank(), 0, None
        name = re.sub(r"[^\w-]+", "-", self.rater.value).strip("-")
        path = self.folder / f"{name}.csv"
        try:
            if path.is_file():
                ratings, _ = read_ratings(path, self.sheet)
                self.answers |= ratings.fillna("").set_index("pair")[ASPECTS].to_dict("index")
        except RatingError as error:
            return self.show(error)
        self.path = path if name else None
        self.at = [*map(_complete, self.answers.values()), False].index(False)
        self.show()

    def answer(self, aspect, chosen):
        """One click on "1 is better", "tie" or "2 is better" of one question: written to disk, then shown."""
        self._given()[aspect] = chosen
        try:
            write_sheet(self.sheet.join(pd.DataFrame.from_dict(self.answers, "index"), on="pair"), self.path)
        except store.StoreError as error:
            return self.show(error)
        self.show()

    def turn(self, pages):
        """Back, or on to the next pair; beyond the last one there is a page that says thank you."""
        if pages < 0 or _complete(self._given()):  # the second half of a double click skips no pair
            self.at = max(self.at + pages, 0)
            self.show()

    def show(self, error=None):
        """Draw the page as it stands; an error (a file that cannot be read or written) is shown above the pair."""
        given, n = self._given(), len(self.sheet)
        self.progress.value = self.done
        if error:
            self.status.value = f"<b>Not saved or not read: {html.escape(str(error))}</b>"
        elif self.path is None:
            self.status.value = "Please type your name: what you click is kept under it, and found again."
        elif given:
            self.status.value = f"{self.done} of {n} pairs rated; this is pair {self.at + 1}"
        else:
            self.status.value = f"{self.done} of {n} pairs rated. Thank you! You can go back, or close this page."
        self.pair.value = _pair_html(self.sheet.loc[self.at]) if given else ""
        self.back.disabled = self.path is None or self.at == 0
        self.forward.disabled = not _complete(given)
        for (aspect, answer), button in self.buttons.items():
            picked = given.get(aspect) == answer
            button.disabled, button.button_style, button.icon = not given, "info" * picked, "check" * picked

    def _given(self):
        """The answers to the pair on the page, {aspect: answer or ""}; {} where the page shows none."""
        shown = self.path is not None and self.at < len(self.sheet)
        return self.answers[self.sheet["pair"][self.at]] if shown else {}

    def _blank(self):
        return {pair: dict.fromkeys(ASPECTS, "") for pair in self.sheet["pair"]}


def _complete(answers):
    return bool(answers) and all(answers.values())


def _pair_html(row):
    """Prompt and replies as text: HTML that a model wrote is shown, not obeyed."""
    asked = row["prompt"].strip().removesuffix("Assistant:")
    prompt, *replies = (html.escape(said.strip()) for said in (asked, row["reply_1"], row["reply_2"]))
    boxes = [f'<div style="{BOX}; flex: 1 1 0"><b>Reply {k}</b>\n{said}</div>' for k, said in enumerate(replies, 1)]
    return f'<div style="{BOX}">{prompt}</div><div style="display: flex; gap: 12px">{"".join(boxes)}</div>'
