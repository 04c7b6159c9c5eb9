"""How good the replies of a policy are: by reward model, by text scores, by a judge, by people.

    pair_judge     an LLM behind an endpoint that prefers one of two replies, held to human labels
    judge_tests    reward models on human-labelled pairs from elsewhere
    preference     what the humans said: how often a policy ranks held-out pairs as they did
    rating_page    the page on which people rate blind pairs
    human_eval     blind pairs, files of ratings, win rates and agreement
    refine         reference answers rewritten by a stronger model
    mt_bench       MT-Bench: asks the judge (through `models.endpoint`), reads and averages its ratings
    questions      MT-Bench's questions, judge prompts and right answers
    mini_bench     MT-Bench's format in the mini world, with a judge by rule
    evaluate       replies to the test prompts with their scores; methods compared
    metrics        BLEU, BARTScore, likelihood, KL divergence, distinct-n

Start with `evaluate.replies`.
"""
