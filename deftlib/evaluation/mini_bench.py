"""MT-Bench of the mini world: sixteen questions of two turns, and a judge that applies the world's own rule.

    mini_bench.judge(request)      # "... Rating: [[7.3]]", from the messages that any other judge would be sent

`data/mini/mt_bench` has FastChat's layout and categories: the first turns are test questions of the world, the second
ones follow up in its words, the references are its best answers. The judge reads a request and answers in the format
asked for, so all that comes before and after a judgment is the code that a real judge runs through.
"""

import re

from deftlib.preferences import mini_world

FOLDER = mini_world.FOLDER / "mt_bench"
REFERENCES = "best.jsonl"
JUDGE = "rule judge: the mini world's true reward, not a model"


def judge(request):
    """What the rule judge says to a chat request built from `data/mini/mt_bench/judge_prompts.jsonl`.

    One conversation is rated, `Rating: [[1 + 9 * true reward / 100]]`; of two, "[[A]]", "[[B]]" or "[[C]]" has the last
    answer of higher true reward. Raises ValueError for a request of another form.
    """
    rewards = [last_reward(text) for text in conversations(request["messages"][-1]["content"])]
    said = " and ".join(f"{reward:g}" for reward in rewards) + " of 100 by the mini world's rule, not by a model."
    if len(rewards) == 1:
        return f"The last answer earns {said} Rating: [[{1 + 9 * rewards[0] / 100:g}]]"
    verdict = "C" if rewards[0] == rewards[1] else "A" if rewards[0] > rewards[1] else "B"
    return f"The last answers earn {said} [[{verdict}]]"


def conversations(user_prompt):
    """The one or two conversations that a judge is shown. Raises ValueError for another number."""
    found = re.split(r"\[Conversation(?: [AB])?\]\n", user_prompt)[1:]
    if len(found) not in (1, 2):
        raise ValueError(f"expected one or two conversations as in data/mini/mt_bench, found {len(found)}")
    return found


def last_reward(conversation):
    """True reward, 0 to 100, of the last answer to the last question in "Human: ... Assistant: ..." text."""
    prompt, _, answer = conversation.rpartition("\n\nAssistant:")
    return mini_world.true_reward(prompt, answer)
