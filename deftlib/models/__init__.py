"""What runs a model: policies, reward models, replies, other people's servers.

    generation     what a policy says to a prompt, in process or behind an endpoint
    endpoint       ask any OpenAI-compatible server: judges, refiners, zero-shot rows; answers kept as they come
    rewards        reward models r_train and r_eval: load, train, score
    policies       policies and tokenizers: load, text to tokens, the models that come without a hub
    loop           what all trainings share: arguments, progress lines, checkpoints to resume from

Start with `policies`.
"""
