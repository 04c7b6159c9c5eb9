"""Other people's data: the same sixteen lists in every format and every kind of file, and what each row means.

| kind | example | right value |
|---|---|---|
| kind of file | JSON array, object, Parquet, CSV of any country, UTF-16, CRLF, gzip, shards | the same lists |
| messages | TRL implicit and explicit, UltraFeedback, Orca with a system, ShareGPT | the same prompts and replies |
| scores | score_chosen, chosen-rating, completions with ratings, ranks | best first; equal ones in file order |
| two columns and a verdict | PKU-SafeRLHF, AlpacaFarm, SHP, arena, WebGPT | the better first; ties counted, left out |
| turns in lists | LMSYS 55k | the dialogue; ties counted, left out |
| what stands beside | Alpaca's input, Dolly's context, a history, a system | a part of the prompt |
| cells | Decimal, far dates, broken UTF-8, two columns of one name | the row without them; one sentence |
| no preference | SFT's messages, KTO's labels | one sentence that says so |
"""

import csv
import gzip
import io
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from deftlib.models import policies
from deftlib.preferences import dialogues
from deftlib.preferences.lists import PreferenceError, read
from deftlib.sections import Text
from deftlib.training import check, subset

ROWS = [
    {side: row["prompt"] + row["responses"][which] for side, which in (("chosen", 0), ("rejected", -1))}
    for row in read("mini", format="lists").select(range(0, 320, 20))
]
ROWS[3] = {side: text + '\n\n- a, list; of "things"\n\n- more' for side, text in ROWS[3].items()}


def messages(dialogue):
    return [{"role": dialogues.ROLES[role], "content": said.strip()} for role, said in dialogues.turns(dialogue)]


def split_off(row):
    """Message lists of a pair: (prompt, chosen, rejected), replies as lists of one message."""
    chosen, rejected = messages(row["chosen"]), messages(row["rejected"])
    return chosen[:-1], chosen[-1:], rejected[-1:]


def shared(found):
    """Messages as ShareGPT has them."""
    return [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in found]


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows, delimiter=","):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return file.getvalue()


IMPLICIT = [{side: messages(row[side]) for side in ("chosen", "rejected")} for row in ROWS]
EXPLICIT = [dict(zip(("prompt", "chosen", "rejected"), split_off(row))) for row in ROWS]
ULTRAFEEDBACK = [
    {"prompt": pair["chosen"][0]["content"], **pair, "score_chosen": 8.5, "score_rejected": 3.0} for pair in IMPLICIT
]
QUESTIONS = [
    {"question": p[0]["content"], "chosen": one[0]["content"], "rejected": other[0]["content"]}
    for p, one, other in map(split_off, ROWS)
]
COMPLETIONS = [
    {"instruction": row["question"], "completions": [
        {"response": row["rejected"], "overall_score": 2}, {"response": row["chosen"], "overall_score": 7}]}
    for row in QUESTIONS
]  # fmt: skip
CRLF = [{side: text.replace("\n", "\r\n") for side, text in row.items()} for row in ROWS]
FILES = {  # name: (of the file, its bytes)
    "TRL implicit": ("prefs.jsonl", json_lines(IMPLICIT).encode()),
    "TRL explicit": ("prefs.jsonl", json_lines(EXPLICIT).encode()),
    "UltraFeedback": ("prefs.jsonl", json_lines(ULTRAFEEDBACK).encode()),
    "ShareGPT": (
        "prefs.jsonl",
        json_lines({side: shared(row[side]) for side in row} for row in IMPLICIT).encode(),
    ),
    "question and replies": ("prefs.jsonl", json_lines(QUESTIONS).encode()),
    "completions with scores": ("prefs.jsonl", json_lines(COMPLETIONS).encode()),
    "CRLF in texts": ("prefs.jsonl", json_lines(CRLF).encode()),
    "CRLF between lines": ("prefs.jsonl", json_lines(ROWS).replace("\n", "\r\n").encode()),
    "JSON array": ("prefs.json", json.dumps(ROWS, indent=2).encode()),
    "JSON array by another name": ("prefs.jsonl", json.dumps(ROWS).encode()),
    "object with the rows in it": ("prefs.json", json.dumps({"version": 1, "data": ROWS}, indent=1).encode()),
    "gzip": ("prefs.jsonl.gz", gzip.compress(json_lines(ROWS).encode())),
    "byte order mark": ("prefs.jsonl", b"\xef\xbb\xbf" + json_lines(ROWS).encode()),
    "UTF-16": ("prefs.jsonl", json_lines(ROWS).encode("utf-16")),
    "UTF-16 without a mark": ("prefs.jsonl", json_lines(ROWS).encode("utf-16-le")),
    "CSV": ("prefs.csv", table(ROWS).encode()),
    "CSV of Excel": ("prefs.csv", b"\xef\xbb\xbf" + table(ROWS, ";").encode()),
    "CSV in UTF-16": ("prefs.tsv", table(ROWS, "\t").encode("utf-16")),
    "CSV of messages": ("prefs.csv", table([{k: json.dumps(v) for k, v in row.items()} for row in EXPLICIT]).encode()),
    "CSV as pandas has it": ("prefs.csv", table([{k: str(v) for k, v in row.items()} for row in EXPLICIT]).encode()),
}  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "prefs.jsonl"
    path.write_text(json_lines(ROWS), encoding="utf-8")
    return read(path)


def texts(lists):
    """Prompts and replies; line breaks inside a reply may be of any kind."""
    return [(row["prompt"], [reply.replace("\r\n", "\n") for reply in row["responses"]]) for row in lists]


@pytest.mark.parametrize(("name", "content"), FILES.values(), ids=FILES)
def test_the_same_lists_come_out_of_every_format(original, tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    lists = read(path, max_reject_share=0.0)
    assert texts(lists) == texts(original)
    tokenizer = policies.mini_tokenizer()
    count = lambda found: subset.count_lists(found, [(1, -1)] * 16, tokenizer, len(tokenizer), Text())
    if name != "prefs.jsonl" or b"\\r" not in content:  # line breaks inside a reply stay as they were written
        assert all((one == other).all() for one, other in zip(count(lists), count(original)))


def test_parquet_our_own_too_folders_and_shards(original, tmp_path, monkeypatch, capsys):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert texts(read(tmp_path / "a.parquet")) == texts(original)
    Dataset.from_list(IMPLICIT).to_parquet(tmp_path / "messages.parquet")
    assert texts(read(tmp_path / "messages.parquet")) == texts(original)
    monkeypatch.chdir(tmp_path)
    assert check.main([str(tmp_path / "a.parquet"), "--out", "out.parquet"]) == 0
    assert read(tmp_path / "out.parquet").to_list() == read(tmp_path / "a.parquet").to_list()
    shards = tmp_path / "hub" / "data"
    shards.mkdir(parents=True)
    for i in range(2):
        Dataset.from_list(ROWS[8 * i : 8 * i + 8]).to_parquet(shards / f"train-{i:05d}-of-00002.parquet")
    Dataset.from_list(ROWS[:2]).to_parquet(shards / "test-00000-of-00001.parquet")
    lists = read(tmp_path / "hub")
    assert texts(lists) == texts(original) and set(lists["subset"]) == {"hub"}
    assert len(read(tmp_path / "hub", split="test")) == 2
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "one.csv").write_text(table(ROWS[:8]))
    (mine / "two.json").write_text(json.dumps(ROWS[8:]))
    lists = read(mine)
    assert texts(lists) == texts(original) and lists["subset"][:] == ["one"] * 8 + ["two"] * 8


def one(tmp_path, *rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text(json_lines(rows))
    return read(path, **options)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "response_0": "bad", "response_1": "good", "better_response_id": 1, "safer_response_id": 0},
        {"instruction": "Hi", "input": "", "output_1": "good", "output_2": "bad", "preference": 1},
        {"history": "Hi", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0, "score_A": 3, "score_B": 9},
        {"conversation_a": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "good"}],
         "conversation_b": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "bad"}],
         "winner": "model_a"},
        {"question": {"full_text": "Hi"}, "answer_0": "bad", "answer_1": "good", "score_0": -0.5, "score_1": 0.5},
        {"prompt": "Hi", "answers": [{"answer": "bad", "rank": 2}, {"answer": "good", "rank": 1}]},
        {"input": "Hi", "generations": ["bad", "good"], "rating": [2, 9], "chosen": "good", "rejected": "bad"},
        {"query": "Hi", "responses": ["bad", "good"], "scores": [0.1, 0.9]},
        {"prompt": "Hi", "generations": ["bad", "good"], "ratings": ["1,5", "4,0"]},
        {"prompt": "Hi", "responses": ["bad", "good"], "ranks": [2, 1]},
        {"question": "Hi", "answers": [{"text": "bad", "pm_score": 1}, {"text": "good", "pm_score": 4}]},
        {"prompt": "Hi", "completions": [{"text": "bad"}, {"text": "good", "score": 1}], "scores": [0, 1]},
        {"question": "Hi", "response_j": "good", "response_k": "bad", "id": 7},
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}},
        {"prompt": [{"role": "user", "content": "Hi"}], "chosen": {"role": "assistant", "content": "good"},
         "rejected": "bad"},
        {"context": "Hi", "chosen": "good", "rejected": "bad"},
        {"prompt": '["Hi"]', "response_a": '["bad"]', "response_b": '["good"]', "winner_model_a": 0,
         "winner_model_b": 1, "winner_tie": 0},
        {"prompt": "Hi", "response_a": "bad", "response_b": "good", "winner": "b"},
    ],
)  # fmt: skip
def test_the_better_reply_comes_first(tmp_path, row):
    (found,) = one(tmp_path, row)
    assert (found["prompt"], found["responses"]) == ("\n\nHuman: Hi\n\nAssistant:", [" good", " bad"])


def test_scores_that_contradict_what_was_chosen_are_told_and_left_out(tmp_path, capsys):
    row = {"prompt": "Hi", "chosen": "good", "rejected": "bad", "chosen-rating": "1,200", "rejected-rating": "900"}
    assert one(tmp_path, row)[0]["responses"] == [" good", " bad"]
    contradicts = {"prompt": "Ho", "chosen": "good", "rejected": "bad", "chosen_reward": 0.1, "rejected_reward": 0.3}
    (found,) = one(tmp_path, contradicts)
    assert found["responses"] == [" good", " bad"] and found["rewards"] is None
    assert "pairs whose scores contradict what was chosen: 1" in capsys.readouterr().out


def test_an_unclosed_quote_and_messages_that_cannot_be_read_are_faults(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,chosen,rejected\np1,g1,"b1\np2,g2,b2\n')
    with pytest.raises(PreferenceError, match=r"p\.csv line \d: is no CSV"):
        read(tmp_path / "p.csv")
    broken = "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'good'}]"  # as numpy prints it
    with pytest.raises(PreferenceError, match="1 messages that cannot be read"):
        one(tmp_path, {"prompt": "Hi", "chosen": broken, "rejected": "bad"}, max_reject_share=0.0)


def test_files_named_after_a_split_anywhere_are_of_that_split(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"prefs_{split}.jsonl").write_text(json_lines(ROWS[: 4 if split == "train" else 2]))
    assert (len(read(tmp_path)), len(read(tmp_path, split="test"))) == (4, 2)


def test_equal_scores_keep_the_file_order_and_ties_of_two_are_counted_and_left_out(tmp_path, capsys):
    rated = [{"response": text, "rating": rating} for text, rating in (("a", 3), ("b", 5), ("c", 5), ("d", 1))]
    (found,) = one(tmp_path, {"instruction": "Hi", "completions": rated})
    assert found["responses"] == [" b", " c", " a", " d"] and found["rewards"] == [5, 5, 3, 1]
    tie = {"conversation_a": "Human: Hi\nAssistant: a", "conversation_b": "Human: Hi\nAssistant: b", "winner": "tie"}
    assert len(one(tmp_path, tie, tie | {"winner": "model_b"}, tie | {"winner": "tie (bothbad)"})) == 1
    assert "pairs without a winner: 2" in capsys.readouterr().out


def test_turns_that_lmsys_lists_are_a_dialogue(tmp_path, capsys):
    row = {"prompt": '["Hi", "And?"]', "response_a": '["Ho", "good"]', "response_b": '["Ho", "bad"]'}
    won, tied = {"winner_model_a": "1", "winner_model_b": "0"}, {"winner_model_a": "0", "winner_model_b": "0"}
    (found,) = one(tmp_path, row | won, row | tied)
    assert found["prompt"] == "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: And?\n\nAssistant:"
    assert found["responses"] == [" good", " bad"] and "pairs without a winner: 1" in capsys.readouterr().out
    other = row | won | {"response_b": '["Hm", "bad"]'}
    with pytest.raises(PreferenceError, match="1 differing prompts"):
        one(tmp_path, other, max_reject_share=0.0)
    with pytest.raises(PreferenceError, match="1 wrong type"):
        one(tmp_path, row | won | {"response_b": '["Hm", null]'}, max_reject_share=0.0)


@pytest.mark.parametrize("name", ["instruction", "question", "query"])
def test_a_context_belongs_to_its_question(tmp_path, name):
    row = {name: "Who?", "context": "Ann came.", "chosen": "good", "rejected": "bad"}
    assert one(tmp_path, row)[0]["prompt"] == "\n\nHuman: Who?\n\nAnn came.\n\nAssistant:"
    assert one(tmp_path, row | {"context": ""})[0]["prompt"] == "\n\nHuman: Who?\n\nAssistant:"


@pytest.mark.parametrize("whole", [True, False])
def test_a_reply_in_messages_may_spell_an_opener(tmp_path, whole):
    asked, spelled = [{"role": "user", "content": "Hi"}], "I write:\n\nAssistant: good"
    replies = [[{"role": "assistant", "content": content}] for content in (spelled, "bad")]
    row = dict(zip(("chosen", "rejected"), [asked + reply for reply in replies] if whole else replies))
    (found,) = one(tmp_path, row if whole else {"prompt": asked, **row})
    assert (found["prompt"], found["responses"][0].strip()) == ("\n\nHuman: Hi\n\nAssistant:", spelled)


def test_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected, chosen\nHi,good,bad,other\n")
    with pytest.raises(PreferenceError, match=r"p\.csv: two columns are called 'chosen'; rename or delete one"):
        read(tmp_path / "p.csv")
    columns = [pa.array(["Hi"]), pa.array(["good"]), pa.array(["bad"]), pa.array(["other"])]
    pq.write_table(pa.table(columns, names=["prompt", "chosen", "rejected", "chosen"]), tmp_path / "p.parquet")
    with pytest.raises(PreferenceError, match=r"p\.parquet: two columns are called 'chosen'"):
        read(tmp_path / "p.parquet")


def test_cells_of_parquet_that_python_cannot_hold_cost_no_row_that_does_not_need_them(tmp_path):
    far, text = pa.array([2**60, 0], pa.timestamp("us")), pa.array(["Hi", "Ho"])
    scores = pa.array([Decimal("8.5"), Decimal("7.0")]), pa.array([Decimal("3.0"), Decimal("2.5")])
    columns = {"prompt": text, "chosen": pa.array(["good", "fine"]), "rejected": pa.array(["bad", "worse"])}
    columns |= {"created_at": far, "score_chosen": scores[0], "score_rejected": scores[1]}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    lists = read(tmp_path / "p.parquet", max_reject_share=0.0)
    assert lists["responses"][:] == [[" good", " bad"], [" fine", " worse"]] and lists[0]["rewards"] == [8.5, 3.0]
    broken = pa.StringArray.from_buffers(2, pa.array([0, 2, 4], pa.int32()).buffers()[1], pa.py_buffer(b"Hi\xff\xfe"))
    pq.write_table(pa.table({**columns, "prompt": broken}), tmp_path / "q.parquet")
    assert len(read(tmp_path / "q.parquet", max_reject_share=0.6)) == 1


def test_a_history_beside_an_instruction_is_what_was_said_before(tmp_path):
    row = {"instruction": "And?", "input": "", "history": [["Hi", "Ho"]], "chosen": "good", "rejected": "bad"}
    assert one(tmp_path, row)[0]["prompt"] == "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: And?\n\nAssistant:"


def test_what_a_system_says_stands_before_the_question(tmp_path):
    row = {"system": "Be brief.", "question": "Hi", "chosen": "good", "rejected": "bad"}
    assert one(tmp_path, row)[0]["prompt"] == "\n\nHuman: Be brief.\n\nHi\n\nAssistant:"
    row = {"instruction": "Translate.", "input": "Hallo", "output_1": "Hello", "output_2": "Bye", "preference": 1}
    assert one(tmp_path, row)[0]["prompt"] == "\n\nHuman: Translate.\n\nHallo\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [{"messages": [{"role": "user", "content": "Hi"}]}, {"prompt": "Hi", "completion": "Hello", "label": True}],
)
def test_data_without_a_preference_is_told_so(tmp_path, row):
    with pytest.raises(PreferenceError, match=r"rows\.jsonl: none of 1 rows .*expected two or more ranked replies"):
        one(tmp_path, row)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.csv", b"chosen,rejected\n1,2,3\n", "none of 1 rows .* the first is uneven row, 3 cells under 2 names"),
        (
            "p.csv",
            "chosen,rejected\né,b\n".encode("latin-1"),
            "p.csv: is no text in utf-8-sig; save it as CSV in UTF-8",
        ),
        ("p.json", b'[{"chosen": "a"', "p.json: begins as a JSON array and is none"),
        ("p.parquet", b"PAR1 and no more", "p.parquet: the Parquet file is damaged"),
        ("p.csv", b"", "p.csv: the file is empty; expected JSON lines, a JSON array, CSV or Parquet"),
        ("p.csv", b"chosen,rejected\n", "p.csv: the file is empty|p.csv: holds no row"),
    ],
)
def test_a_file_that_is_damaged_is_one_sentence(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PreferenceError, match=said):
        read(tmp_path / name, max_reject_share=0.0)


def test_text_of_any_size_is_a_cell(tmp_path):
    rows = [{"prompt": "Hi", "chosen": "a" * 300_000, "rejected": "b"}]
    (tmp_path / "p.csv").write_text(table(rows))
    assert len(read(tmp_path / "p.csv")[0]["responses"][0]) == 300_001


def test_a_config_of_the_hub_is_named_after_a_colon(monkeypatch):
    asked = []
    load = lambda hub_id, **options: asked.append((hub_id, options)) or Dataset.from_list(ROWS)
    monkeypatch.setattr("datasets.load_dataset", load)
    assert len(read("someone/prefs:binarized", split="train_prefs")) == 16
    ((hub_id, options),) = asked
    assert (hub_id, options["name"], options["split"]) == ("someone/prefs", "binarized", "train_prefs")
