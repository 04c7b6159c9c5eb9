"""MT-Bench (sec. 4.3, Fig. 4): questions of two turns in eight categories, and a judge that rates each answer 1 to 10.

    bench = questions.load(profile)                                      # with judge prompts and right answers
    said = mt_bench.all_answers(profile, bench)                          # {name: a row an answer}
    rated = mt_bench.ratings(mt_bench.judgments(profile, bench, said))   # one row an answer
    mt_bench.score_table(rated)

Temperatures, prompts, parsing and the rule for swapped positions are those of FastChat's `llm_judge` (Zheng et al.,
2023); a judgment that cannot be read is reported and never averaged in. Also a command: `deft mt-bench
--profile smol --set mt_bench.judge.url=URL --set mt_bench.judge.model=NAME`. Exit code 0: every answer was judged;
1: judgments are missing (run again for those that were not answered); 2: an option or a setting is wrong.
"""

import argparse
import json
import re
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from deftlib import jobs, store
from deftlib.command import one_sentence
from deftlib.evaluation import mini_bench, questions
from deftlib.evaluation.questions import OTHER, TEMPERATURES, WITH_REFERENCE, MTBenchError, lines
from deftlib.intervals import Samples, mean_interval
from deftlib.models import endpoint, generation
from deftlib.models.policies import load_tokenizer, positions, start_policy
from deftlib.profile import Profile, add_options
from deftlib.sections import Endpoint
from deftlib.training import train

NO_JUDGE = "no judge configured"


# ---- answers -----------------------------------------------------------------------------------------------------


def all_answers(profile, bench):
    """{name: `answers`} of the start policy, and of `mt_bench.methods` under each of `mt_bench.seeds`."""
    methods, seeds = profile.mt_bench.methods, profile.mt_bench.seeds
    runs = train.fit_all(profile, {(m, s): {"method": m, "seed": s} for m in methods for s in seeds})
    asked = {("start", seeds[0]): start_policy(profile)} | runs
    calls = {run: partial(answers, profile, bench, policy, run[1]) for run, policy in asked.items()}
    said = jobs.results(profile, calls)
    return {m: pd.concat([said[m, s] for s in seeds if (m, s) in said]) for m in ("start", *methods)}


def answers(profile, bench, policy, seed=0):
    """What a policy answers in both turns: DataFrame of seed, question_id, category, turn (1, 2), answer, words, cut.

    policy: folder, hub id or `Endpoint`. Conversations are cut as `text_for` says. The published `model_answer.jsonl`
    has FastChat's format. cut: the answer fills `mt_bench.max_new_tokens`; None where the policy's tokenizer is not at
    hand.
    """
    text = text_for(profile, policy)
    limit, name = profile.mt_bench.max_new_tokens, generation.name_of(policy)
    key = {"policy": generation.identity(policy), "seed": seed, "questions": bench.questions}
    key |= {"dtype": generation.dtype(profile), "text": vars(text), "limit": limit}
    key["batch_size"] = profile.generation.batch_size  # a batch is seeded by what is in it
    key["engine"] = profile.generation.engine

    def produce(folder):
        if text.prompt_tokens < profile.mt_bench.prompt_tokens:
            print(f"  MT-Bench, {name}: its positions leave {text.prompt_tokens} tokens for a conversation", flush=True)
        said = [[] for _ in bench.questions]
        for turn in (1, 2):
            of_question = [TEMPERATURES.get(question["category"], OTHER) for question in bench.questions]
            for temperature in sorted(set(of_question)):
                asked = [i for i, own in enumerate(of_question) if own == temperature]
                prompts = [conversation(bench.questions[i]["turns"][:turn], said[i]) for i in asked]
                sampling = replace(profile.generation, max_new_tokens=limit, temperature=temperature, samples=1)
                label = f"MT-Bench, {name}, turn {turn}, temperature {temperature:g}"
                replies = generation.replies(profile, policy, prompts, seed, text, sampling, label)
                for i, (reply,) in zip(asked, replies):
                    said[i].append(reply.strip())
        tokenizer = None if isinstance(policy, Endpoint) else load_tokenizer(policy)
        with open(folder / "model_answer.jsonl", "w", encoding="utf-8") as file:
            for question, turns in zip(bench.questions, said):
                cut = [tokenizer and len(tokenizer(f" {answer}")["input_ids"]) >= limit for answer in turns]
                row = {"question_id": question["question_id"], "model_id": name, "cut": cut}
                file.write(json.dumps({**row, "choices": [{"index": 0, "turns": turns}]}) + "\n")

    folder = store.stage(profile, f"mt_bench/answers-{name}", key, produce, "evaluation.mt_bench")
    rows = []
    for question, row in zip(bench.questions, lines(folder / "model_answer.jsonl")):
        for turn, (answer, cut) in enumerate(zip(row["choices"][0]["turns"], row["cut"]), start=1):
            of_question = {"question_id": question["question_id"], "category": question["category"], "turn": turn}
            rows.append({"seed": seed, **of_question, "answer": answer, "words": len(answer.split()), "cut": cut})
    return pd.DataFrame(rows)


def text_for(profile, policy):
    """The profile's Text with the tokens of a conversation: `mt_bench.prompt_tokens`, or what the policy's positions
    leave beside an answer of `mt_bench.max_new_tokens`.

    LLaMA's 2,048 leave 1,024. FastChat's server cuts so too; its `llm_judge` reads past the last position that a model
    knows. Raises ValueError if nothing is left.
    """
    most, limit = profile.mt_bench.prompt_tokens, profile.mt_bench.max_new_tokens
    if not isinstance(policy, Endpoint) and (known := positions(policy)):
        if known <= limit:
            raise ValueError(
                f"{policy} has {known} positions, and answers may take {limit}: lower mt_bench.max_new_tokens"
            )
        most = min(most, known - limit)
    return replace(profile.text, prompt_tokens=most)


def conversation(turns, said):
    """The prompt that asks the last of `turns`, in the text format of every policy. said: the answers so far."""
    replies = [f" {answer}" if answer else "" for answer in said]
    return "".join(f"\n\nHuman: {turn}\n\nAssistant:{reply}" for turn, reply in zip(turns, [*replies, ""]))


# ---- judgments ---------------------------------------------------------------------------------------------------


def single_request(bench, question, said, turn, number=0):
    """The request for a rating of the answer to turn 1 or 2, as FastChat builds it. said: both answers.

    number: of the judgment, from 0; further ones carry a seed of their own, and the first is asked as FastChat does.
    """
    fields = {"answer": said[0], "answer_1": said[0], "answer_2": said[1]}
    request = _request(bench, question, turn, ("single-v1", "single-math-v1"), fields)
    return request | {"seed": number} if number else request


def pair_request(bench, question, said_a, said_b, turn):
    """The request for a verdict on two answers, `said_a` shown first, as FastChat builds it."""
    fields = {"answer_a": said_a[0], "answer_a_1": said_a[0], "answer_a_2": said_a[1]}
    fields |= {"answer_b": said_b[0], "answer_b_1": said_b[0], "answer_b_2": said_b[1]}
    return _request(bench, question, turn, ("pair-v2", "pair-math-v1"), fields)


def _request(bench, question, turn, names, fields):
    """names: of the judge's prompt for the first turn, without and with a reference answer."""
    guided = question["category"] in WITH_REFERENCE
    prompt = bench.prompts[names[guided] + ("-multi-turn" if turn == 2 else "")]
    first, second = question["turns"]
    fields |= {"question": first, "question_1": first, "question_2": second}
    if guided:
        fields["ref_answer_1"], fields["ref_answer_2"] = bench.references[question["question_id"]]
    messages = [{"role": "system", "content": prompt["system_prompt"]}]
    messages.append({"role": "user", "content": prompt["prompt_template"].format(**fields)})
    return {"messages": messages, "temperature": 0, "max_tokens": 2048}


def parse_rating(judgment):
    """The first "[[x]]" of a judgment, else the first "[x]", as FastChat reads it: float from 1 to 10.

    Raises ValueError with the reason where there is none: FastChat's -1, and what it would have averaged in.
    """
    found = re.search(r"\[\[(\d+(?:\.\d*)?)\]\]", judgment) or re.search(r"\[(\d+(?:\.\d*)?)\]", judgment)
    if not found:
        raise ValueError("no rating in the judgment" if judgment.strip() else "empty judgment")
    rating = float(found[1])
    if not 1 <= rating <= 10:
        raise ValueError(f"rating {rating:g} is not between 1 and 10")
    return rating


def parse_verdict(judgment):
    """ "A", "B" or "C" (a tie), looked for in this order as FastChat does. Raises ValueError with the reason."""
    for letter in "ABC":
        if f"[[{letter}]]" in judgment:
            return letter
    raise ValueError("no verdict in the judgment" if judgment.strip() else "empty judgment")


def judge_name(profile):
    """Who judges: the model at `mt_bench.judge`, in the mini world else its rule, otherwise None."""
    return profile.mt_bench.judge.model or (mini_bench.JUDGE if profile.policy.source == "mini" else None)


def _judge(profile, requests, parse):
    """DataFrame, a row a request: judgment, what `parse` reads in it, the reason for none or "", and the judge."""
    judge, failures, cut = profile.mt_bench.judge, {}, set()
    if judge.url or judge.model:
        path = store.build_dir(profile.name) / "kept" / f"mt_bench-{store.content_key([judge.url, judge.model])}.jsonl"
        texts, failures = endpoint.ask(judge, requests, path, "judging")
        cut = endpoint.cut_short(judge, requests, path)
        name = ", ".join(endpoint.answered_by(judge, requests, path)) or judge.model  # with its version
    elif profile.policy.source == "mini":
        texts, name = [mini_bench.judge(request) for request in requests], mini_bench.JUDGE
    else:
        texts, name = [None] * len(requests), NO_JUDGE
        failures = dict.fromkeys(range(len(requests)), NO_JUDGE)
    read = [(None, failures[i]) if i in failures else _read(parse, text, i in cut) for i, text in enumerate(texts)]
    columns = ["judgment", "read", "reason", "judge"]
    return pd.DataFrame([(text, *result, name) for text, result in zip(texts, read)], columns=columns)


def _read(parse, judgment, is_cut=False):
    """(what `parse` reads, "") or (None, why it could not)."""
    try:
        return parse(judgment), ""
    except ValueError as error:
        return None, f"{error}: cut at max_tokens, raise mt_bench.judge.max_tokens" if is_cut else str(error)


def judgments(profile, bench, said):
    """Every answer judged `mt_bench.judgments` times: `answers`' columns, model, judgment, rating, reason, judge.

    said: as of `all_answers`. A judgment that failed has no rating (NaN) but a reason. Every text that a
    judge sent is kept in `build/<profile>/kept/`, as it comes: a later call asks only for what is missing.
    """
    rows, requests = [], []
    by_id = {question["question_id"]: question for question in bench.questions}
    for name, frame in said.items():
        turns = frame.groupby(["seed", "question_id"])["answer"].agg(list)
        for row, number in product(frame.to_dict("records"), range(profile.mt_bench.judgments)):
            i = row["question_id"]
            requests.append(single_request(bench, by_id[i], turns[row["seed"], i], row["turn"], number))
            rows.append({"model": name, **row})
    judged = _judge(profile, requests, parse_rating).rename(columns={"read": "rating"}).astype({"rating": float})
    return pd.concat([pd.DataFrame(rows), judged], axis=1)


def pairwise(profile, bench, said, name, baseline):
    """Both turns of every question judged side by side, in both orders, under every seed of both.

    A DataFrame of seed, question_id, category, turn, consistent, result, reason.
    result: 1 if `name` wins, 0 if `baseline` does, 0.5 for a tie; verdicts that change with the order are a tie
    (FastChat's rule) and not `consistent`. NaN where either verdict failed, with the reason.
    """
    mine, theirs = (said[model].groupby(["seed", "question_id"])["answer"].agg(list) for model in (name, baseline))
    seeds = [seed for seed in mine.index.unique("seed") if seed in theirs.index.unique("seed")]
    rows, requests = [], []
    for seed, question, turn in product(seeds, bench.questions, (1, 2)):
        i = question["question_id"]
        rows.append({"seed": seed, "question_id": i, "category": question["category"], "turn": turn})
        pair = mine[seed, i], theirs[seed, i]
        requests += [pair_request(bench, question, *order, turn) for order in (pair, pair[::-1])]
    judged = _judge(profile, requests, parse_verdict)
    points = judged["read"].map({"A": 1.0, "B": 0.0, "C": 0.5}).to_numpy().reshape(-1, 2)
    points = abs(points - [0, 1])  # in the second order `name` is B
    reasons = judged["reason"].to_numpy().reshape(-1, 2)
    frame = pd.DataFrame(rows)
    frame["consistent"] = points[:, 0] == points[:, 1]
    frame["result"] = np.where(frame["consistent"] | np.isnan(points).any(1), points.mean(1), 0.5)
    return frame.assign(reason=[one or other for one, other in reasons])


# ---- scores ------------------------------------------------------------------------------------------------------


def ratings(judged):
    """One row per answer: the median of its ratings with the interval of 95 % of them, and how many are missing."""
    keys = ["model", "seed", "question_id", "category", "turn"]
    rated = judged.groupby(keys, sort=False)["rating"]
    frame = pd.DataFrame({"rating": rated.median(), "low": rated.quantile(0.025), "high": rated.quantile(0.975)})
    frame["missing"] = rated.size() - rated.count()
    kept = [column for column in ("words", "cut") if column in judged]
    return frame.join(judged.groupby(keys, sort=False)[kept].first()).reset_index()


def by_question(rated, model, turn=None, column="rating"):
    """DataFrame, seeds by questions: the value of one turn, or the mean of both. Without questions that lack any."""
    mine = rated[rated["model"] == model].pivot(index=["seed", "question_id"], columns="turn", values=column)
    values = mine.mean(axis=1, skipna=False) if turn is None else mine[turn]
    return values.unstack("question_id").dropna(axis=1)


def difference(rated, model, baseline, turn=None, column="rating"):
    """`Samples` of model and baseline over the seeds and questions that both have; None if there is one question."""
    ours, other = (by_question(rated, name, turn, column) for name in (model, baseline))
    ours, other = ours.align(other, join="inner")
    return Samples(ours.to_numpy(), other.to_numpy()) if ours.shape[1] > 1 else None


def score_table(rated, column="rating"):
    """Row per model: means by category and turn, over both with a 95 % interval, and how many judgments are missing.

    "all" rests on the questions whose two turns were rated, under every seed; the mean of nothing is missing (NaN).
    """
    rows = {}
    for name, mine in rated.groupby("model", sort=False):
        both = by_question(mine, name, column=column)
        n = both.shape[1]
        mean = both.to_numpy().mean() if n else None
        interval = mean_interval(both.to_numpy()) if n > 1 else (mean, None, None, n)
        of_category = mine.groupby("category")[column].mean()
        names = [name for name in dict.fromkeys([*TEMPERATURES, *of_category.index]) if name in of_category and name]
        row = {category: of_category[category] for category in names}
        row |= {f"turn {turn}": mine[mine["turn"] == turn][column].mean() for turn in (1, 2)}
        row |= dict(zip(("all", "low", "high", "questions"), interval))
        rows[name] = row | {"missing": int(mine["missing"].sum())}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def labelled(table, profile):
    """A score table to show: where there is no score, it says that there is no judge, or that all are missing."""
    return table.astype(object).where(table.notna(), "all missing" if judge_name(profile) else NO_JUDGE)


def aggregate(path):
    """`ratings`' input from a file of FastChat's judgments, read anew from their texts. Raises MTBenchError."""
    rows = []
    for number, line in enumerate(lines(Path(path)), start=1):
        try:
            row = {name: line[name] for name in ("model", "question_id", "turn", "judgment")}
            row |= {"category": "", "seed": 0, "judge": line["judge"][0]}
        except (TypeError, KeyError) as error:
            raise MTBenchError(f"{path} line {number}: no {error} in it; expected a judgment as FastChat's") from error
        rows.append(row | dict(zip(("rating", "reason"), _read(parse_rating, row["judgment"]))))
    if not rows:
        raise MTBenchError(f"{path}: no judgments in it")
    return pd.DataFrame(rows).astype({"rating": float})


def main(arguments=None):
    """The command of the first lines; returns its exit code."""
    parser = argparse.ArgumentParser(description="Answer MT-Bench and judge it.")
    add_options(parser)
    parser.add_argument("--aggregate", metavar="FILE", help="only read a file of FastChat's judgments and average it")
    options = parser.parse_args(arguments)
    with one_sentence(2):
        profile = Profile.from_options(options)
        if options.aggregate:
            judged = aggregate(options.aggregate)
        else:
            bench = questions.load(profile)
            judged = judgments(profile, bench, all_answers(profile, bench))
    table, missing = labelled(score_table(ratings(judged)), profile), judged[judged["rating"].isna()]
    print(f"\njudge: {judged['judge'].iloc[0]}\n{table.to_string(float_format='{:.2f}'.format)}")
    for reason, count in missing["reason"].value_counts().items():
        print(f"{count} of {len(judged)} judgments missing: {reason}")
    return 1 if len(missing) else 0


if __name__ == "__main__":
    raise SystemExit(main())
