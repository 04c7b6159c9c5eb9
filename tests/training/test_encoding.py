"""Ranked lists as token ids: cuts, rejects, rewards that fit the order; shards that are kept."""

import json
import tempfile

import pytest
import torch
from datasets import Dataset

from deftlib.models import policies
from deftlib.preferences.lists import FEATURES, read_lists
from deftlib.sections import Text
from deftlib.training import encoding


def ranked(*responses, prompt="w1 w2", rewards=None, name="a"):
    return {"id": name, "prompt": prompt, "responses": list(responses), "rewards": rewards}


def test_a_short_reply_ends_in_one_eos_and_a_long_one_is_cut_without(tokenizer):
    text = Text(prompt_tokens=8, reply_tokens=3)
    (row,) = encoding.encode_lists([ranked(" w1 w2", " w1 w2 w3", " w2 w2 w3 w4 w5")], tokenizer, text)
    w1, w2, w3 = (tokenizer.convert_tokens_to_ids(w) for w in ("w1", "w2", "w3"))
    assert row["response_ids"] == [[w1, w2, tokenizer.eos_token_id], [w1, w2, w3], [w2, w2, w3]]


def test_replies_that_the_cut_makes_equal_are_rejected_wherever_they_stand(tokenizer, tmp_path, capsys):
    lists = [ranked("w1 w2 w3", "w1 w2 w4", name="pair"), ranked("w1 w2", "w2 w3 w4", "w2 w3 w5", name="late")]
    rows = encoding.encode_lists(
        [*lists, ranked("w1", "w2")], tokenizer, Text(reply_tokens=2), tmp_path / "rejects.jsonl"
    )
    assert len(rows) == 1
    assert "rejected 2 lists: 2 two responses differ only behind the cut" in capsys.readouterr().out
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [reject["id"] for reject in rejects] == ["pair", "late"]


def test_a_prompt_is_cut_on_the_left(tokenizer):
    (row,) = encoding.encode_lists([ranked("w5", "w6", prompt="w1 w2 w3 w4")], tokenizer, Text(prompt_tokens=2))
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == ["w3", "w4"]


def test_a_response_without_tokens_is_rejected_with_a_reason_and_the_rest_trains(tokenizer, tmp_path, capsys):
    lists = [ranked("w1", "   ", name="blank"), ranked("w1", "w2", name="good"), ranked("w1", "<eos>", name="eos only")]
    rows = encoding.encode_lists(lists, tokenizer, Text(), tmp_path / "rejects.jsonl")
    assert len(rows) == 1
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert rejects == [{"id": name, "reason": "a response vanishes by truncation"} for name in ("blank", "eos only")]
    assert "rejected 2 lists" in capsys.readouterr().out


def test_nothing_left_to_train_on_is_an_error_that_names_the_setting(tokenizer):
    with pytest.raises(ValueError, match=r"text\.reply_tokens"):
        encoding.encode_lists([ranked("", "w1")], tokenizer, Text())


def test_temporary_files_go_with_the_dataset_and_after_an_error(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    encoded = encoding.encode_lists([ranked("w1", "w2")], tokenizer, Text())
    assert list(tmp_path.iterdir())
    del encoded
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"text\.reply_tokens"):
        encoding.encode_lists([ranked("", "w1")], tokenizer, Text())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [(None, [2, 1, 0]), ([0.1, 0.5, 0.0], [2, 1, 0]), ([3.5, -1.0, -2.0], [3.5, -1.0, -2.0]), ([1, 1, 0], [1, 1, 0])],
)
def test_rewards_that_do_not_fit_the_order_become_ranks(rewards, expected, tokenizer):
    (row,) = encoding.encode_lists([ranked("w1", "w2", "w3", rewards=rewards)], tokenizer, Text())
    assert row["rewards"] == expected


# ---- many lists --------------------------------------------------------------------------------------------------


@pytest.fixture
def two_a_shard(monkeypatch):
    monkeypatch.setattr(encoding, "LISTS_PER_SHARD", 2)


def published(path, count=7, first=0):
    rows = [ranked(f"w{i}", f"w{i + 1} w3", name=str(i)) | {"subset": "s"} for i in range(first, first + count)]
    rows[3]["responses"] = ["w1", "w1 <eos>"]  # a reject, in the second shard
    Dataset.from_list(rows, features=FEATURES).to_parquet(path)
    return path


def test_lists_of_a_file_are_encoded_as_their_rows_are_by_any_number_of_processes(tokenizer, tmp_path, two_a_shard):
    path = published(tmp_path / "lists.parquet")
    whole = encoding.encode_lists(read_lists(path).to_list(), tokenizer, Text())
    for num_proc in (1, 2):
        rejects, folder = tmp_path / f"rejects-{num_proc}.jsonl", tmp_path / f"encoded-{num_proc}"
        encoded = encoding.encode_lists(path, tokenizer, Text(), rejects, folder, num_proc)
        assert encoded.to_list() == whole.to_list() and len(encoded) == 6
        assert [json.loads(line)["id"] for line in rejects.read_text().splitlines()] == ["3"]
        assert len(encoded.cache_files) == 4  # mapped, not held


def test_interrupted_encoding_goes_on_after_its_last_shard(tokenizer, tmp_path, two_a_shard, monkeypatch):
    path, folder, asked = published(tmp_path / "lists.parquet"), tmp_path / "encoded", []
    real = policies.encode_replies

    def killed_at_the_third(tokenizer, replies, text):
        asked.append(len(replies))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(tokenizer, replies, text)

    monkeypatch.setattr(policies, "encode_replies", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        encoding.encode_lists(path, tokenizer, Text(), folder=folder)
    resumed = encoding.encode_lists(path, tokenizer, Text(), tmp_path / "rejects.jsonl", folder)
    assert asked == [4, 4, 4, 4, 2]  # two whole shards were kept
    assert "two responses" in (tmp_path / "rejects.jsonl").read_text()  # of a shard that was kept
    monkeypatch.undo()
    assert resumed.to_list() == encoding.encode_lists(path, tokenizer, Text()).to_list()


@pytest.mark.parametrize("change", ["lists", "text", "rows"])
def test_what_was_encoded_from_anything_else_is_not_taken(tokenizer, tmp_path, two_a_shard, change):
    path, folder, text = published(tmp_path / "lists.parquet"), tmp_path / "encoded", Text()
    encoding.encode_lists(path, tokenizer, text, folder=folder)
    if change == "lists":
        published(path, first=10)
    lists = read_lists(published(tmp_path / "others.parquet", first=20)) if change == "rows" else path
    text = Text(reply_tokens=2) if change == "text" else text
    again = encoding.encode_lists(lists, tokenizer, text, folder=folder)
    assert again.to_list() == encoding.encode_lists(lists, tokenizer, text).to_list()


# ---- batches of one length ---------------------------------------------------------------------------------------


def lengths_of(count):
    return torch.randint(10, 400, (count,), generator=torch.Generator().manual_seed(3))


def test_batches_by_length_hold_every_list_once_and_little_padding():
    lengths = lengths_of(1003)
    order = torch.tensor(list(encoding.ByLength(lengths, 8, seed=0)))
    assert sorted(order.tolist()) == list(range(1003))
    padding = lambda order: 1 - lengths[order].sum() / sum(8 * lengths[batch].max() for batch in order.split(8))
    assert padding(order) < 0.05 < 0.4 < padding(torch.arange(1003))


def test_the_order_of_batches_knows_nothing_of_length_and_belongs_to_seed_and_epoch():
    lengths, orders = lengths_of(4000), encoding.ByLength(lengths_of(4000), 8, seed=0)
    first = list(orders)
    means = lengths[torch.tensor(first)].view(-1, 8).float().mean(1)
    assert abs(torch.corrcoef(torch.stack([torch.arange(500.0), means]))[0, 1]) < 0.15
    assert list(orders) == first == list(encoding.ByLength(lengths, 8, seed=0))
    orders.set_epoch(1)
    assert list(orders) != first != list(encoding.ByLength(lengths, 8, seed=1))
