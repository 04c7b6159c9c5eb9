"""What a policy says: generation against a loop by hand, where a reply ends, what is kept and what a server says."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from conftest import EOS
from warm import forked_workers as forked_workers  # a fixture

from deftlib import jobs, store
from deftlib.models import generation, policies
from deftlib.models.generation import ends, generate, name_of, numbered
from deftlib.profile import Profile
from deftlib.sections import Endpoint, Generation, Launch, Text

TEXT = Text(prompt_tokens=8, reply_tokens=8)
GREEDY = Generation(max_new_tokens=6, temperature=0.0, samples=1, batch_size=16)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, samples=3)
PROMPTS = ["w3 w4", "w5 w6 w7 w8 w9", "w30", "w11 w12 w13", "w2 w20 w30 w9 w7 w7", "w4"]


@pytest.fixture
def talker(make_model):
    """A random policy that ends some of its replies before the limit."""
    return make_model(seed=4).eval()


def greedy_by_hand(model, tokenizer, prompt):
    ids = tokenizer(prompt)["input_ids"]
    n_prompt = len(ids)
    while len(ids) < n_prompt + GREEDY.max_new_tokens:
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == EOS:
            break
    return tokenizer.decode(ids[n_prompt:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
def test_greedy_replies_are_those_of_a_loop_by_hand_whatever_shares_their_batch(talker, tokenizer, batch_size):
    by_hand = [greedy_by_hand(talker, tokenizer, prompt) for prompt in PROMPTS]
    assert len(set(by_hand)) > 1 and any(by_hand)
    settings = dataclasses.replace(GREEDY, batch_size=batch_size)
    assert generate(talker, tokenizer, PROMPTS, TEXT, settings) == [[reply] for reply in by_hand]


def test_continuous_batching_says_the_same_greedy_text(talker, tokenizer):
    said = generate(talker, tokenizer, PROMPTS, TEXT, dataclasses.replace(GREEDY, engine="continuous"))
    assert said == generate(talker, tokenizer, PROMPTS, TEXT, GREEDY)
    with pytest.raises(policies.ModelError, match="engine=continuous is greedy"):
        generate(talker, tokenizer, PROMPTS, TEXT, dataclasses.replace(SAMPLED, engine="continuous"))


def test_a_reply_ends_at_eos_which_is_not_part_of_it(talker, tokenizer):
    lengths = {len(greedy_by_hand(talker, tokenizer, prompt).split()) for prompt in PROMPTS}
    assert min(lengths) < GREEDY.max_new_tokens
    said = generate(talker, tokenizer, PROMPTS, TEXT, GREEDY)
    assert {len(replies[0].split()) for replies in said} == lengths
    assert not any("<eos>" in replies[0] or "<pad>" in replies[0] for replies in said)


def test_a_long_prompt_is_cut_on_the_left(talker, tokenizer):
    short = dataclasses.replace(TEXT, prompt_tokens=2)
    assert generate(talker, tokenizer, ["w9 w9 w9 w3 w4"], short, GREEDY) == generate(
        talker, tokenizer, ["w3 w4"], TEXT, GREEDY
    )


def test_each_prompt_gets_its_samples_and_one_seed_repeats_them(talker, tokenizer):
    first, again, other = (generate(talker, tokenizer, PROMPTS, TEXT, SAMPLED, seed) for seed in (0, 0, 1))
    assert [len(replies) for replies in first] == [3] * len(PROMPTS)
    assert first == again != other
    assert any(len(set(replies)) > 1 for replies in first)


def test_samples_belong_to_the_prompt_they_were_drawn_for(make_model, tokenizer):
    model = make_model().eval()
    greedy = generate(model, tokenizer, PROMPTS, TEXT, GREEDY)
    assert len({replies[0] for replies in greedy}) > 2
    sure = dataclasses.replace(SAMPLED, temperature=1e-4, batch_size=6)  # greedy in effect; two prompts a batch
    assert generate(model, tokenizer, PROMPTS, TEXT, sure) == [replies * 3 for replies in greedy]


def test_sampling_is_from_the_whole_distribution(talker, tokenizer):
    """No top-k or top-p: shares of the first token are those of the softmax."""
    many = Generation(max_new_tokens=1, temperature=1.0, samples=4000, batch_size=4000)
    (said,) = generate(talker, tokenizer, ["w3 w4"], TEXT, many)
    with torch.no_grad():
        ids = tokenizer("w3 w4", return_tensors="pt")["input_ids"]
        probabilities = talker(ids).logits[0, -1].softmax(-1).numpy()
    words = [tokenizer.decode([i], skip_special_tokens=True) for i in range(len(probabilities))]
    shares = np.array([said.count(word) / len(said) for word in words])
    named = [i for i, word in enumerate(words) if word]
    error = np.sqrt(probabilities * (1 - probabilities) / len(said))
    assert (np.abs(shares - probabilities)[named] < 5 * error[named]).all()
    assert (shares[named] > 0).sum() > 30  # top-k 50 could not bite here, top-p 0.9 would


def test_a_reply_ends_at_any_end_that_the_model_knows(talker, tokenizer):
    whole = [reply.split() for (reply,) in generate(talker, tokenizer, PROMPTS, TEXT, GREEDY)]
    end = next(word for said in whole for word in said if said[0] != word)
    talker.generation_config.eos_token_id = [EOS, tokenizer.convert_tokens_to_ids(end)]  # as Gemma, Phi-3, Llama 3
    assert ends(talker, tokenizer) == sorted(talker.generation_config.eos_token_id)
    cut = [reply.split() for (reply,) in generate(talker, tokenizer, PROMPTS, TEXT, GREEDY)]
    assert cut == [said[: said.index(end)] if end in said else said for said in whole] != whole
    talker.generation_config.eos_token_id = 10**6  # of another tokenizer
    assert ends(talker, tokenizer) == [EOS]


# ---- kept ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def policy(talker, tokenizer, tmp_path, monkeypatch):
    """A profile of short texts and the folder of a policy, in a project of its own."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    folder = tmp_path / "policies" / "sft-seed0-0123456789"
    talker.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Profile.load("mini", {"generation": vars(SAMPLED), "text": vars(TEXT)}), folder


def test_a_killed_run_goes_on_and_says_what_an_uninterrupted_one_would_have_said(policy, talker, monkeypatch):
    profile, folder = policy
    two_a_batch = dataclasses.replace(SAMPLED, batch_size=6)
    whole = generation.replies(profile, folder, PROMPTS, settings=two_a_batch)
    (file,) = (store.ROOT / "build/mini/kept").glob("*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:10])  # killed in the middle of a line
    asked = []
    real = type(talker).generate
    monkeypatch.setattr(
        type(talker), "generate", lambda self, **kwargs: asked.append(len(kwargs["input_ids"])) or real(self, **kwargs)
    )
    assert generation.replies(profile, folder, PROMPTS, settings=two_a_batch) == whole
    assert asked == [2, 2]  # of three batches; the second had lost one of its two


def test_two_processes_say_a_share_each_and_together_what_one_says(policy, monkeypatch, forked_workers):
    profile, folder = policy
    two_a_batch = dataclasses.replace(SAMPLED, batch_size=6)
    said = generation.replies(profile, folder, PROMPTS, settings=two_a_batch)
    shutil.rmtree(store.ROOT / "build")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shared = dataclasses.replace(profile, launch=Launch(processes=2))
    monkeypatch.setattr(policies, "load_policy", lambda *args: pytest.fail("loaded in this process"))
    assert generation.replies(shared, folder, PROMPTS, settings=two_a_batch) == said
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(jobs.JobError, match=r"^share \d of 2 failed: "):
        generation.replies(shared, folder, PROMPTS)


def test_what_is_kept_needs_no_model(policy, monkeypatch):
    profile, folder = policy
    said = generation.replies(profile, folder, PROMPTS)
    monkeypatch.setattr(policies, "load_policy", lambda *args: pytest.fail("loaded"))
    assert generation.replies(profile, folder, PROMPTS) == said
    with pytest.raises(pytest.fail.Exception, match="loaded"):  # other company in a batch, other samples
        generation.replies(profile, folder, PROMPTS[:2])
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        generation.replies(profile, folder, PROMPTS, seed=1)


def test_replies_are_said_with_the_weights_that_training_computes_with(policy, talker, monkeypatch):
    profile, folder = policy
    half = dataclasses.replace(profile, training=dataclasses.replace(profile.training, bf16=True))
    generation.replies(profile, folder, PROMPTS)
    loaded, real = [], policies.load_policy
    monkeypatch.setattr(policies, "load_policy", lambda *given: loaded.append(real(*given)) or loaded[-1])
    generation.replies(half, folder, PROMPTS)  # not those that were kept
    assert {p.dtype for p in loaded[0].parameters()} == {torch.bfloat16}


def test_what_is_said_does_not_depend_on_what_was_asked_before(policy):
    profile, folder = policy
    fresh = generation.replies(profile, folder, PROMPTS)
    shutil.rmtree(store.ROOT / "build")
    generation.replies(profile, folder, PROMPTS[:3])  # say, under --set data.test_lists=3
    assert generation.replies(profile, folder, PROMPTS) == fresh


def test_equal_prompts_are_questions_of_their_own(policy):
    profile, folder = policy
    assert numbered(["a", "b", "a"]) == [["a", 0], ["b", 0], ["a", 1]]
    first, second = generation.replies(profile, folder, ["w3 w4", "w3 w4"])
    assert first != second
    assert generation.replies(profile, folder, ["w3 w4", "w3 w4"]) == [first, second]


@pytest.mark.parametrize(
    "policy, name",
    [
        ("build/mini/policies/deft-dpo-omega0-seed2-0123456789", "deft-dpo-omega0-seed2"),
        ("someone/zephyr-7b-beta", "zephyr-7b-beta"),
        (Endpoint("http://localhost/v1", "org/model-8b"), "model-8b"),
        (Endpoint("http://localhost/v1", "llama3:8b"), "llama3:8b"),
    ],
)
def test_the_short_name_of_a_policy(policy, name):
    assert name_of(policy) == name
