"""From preference lists to an aligned policy, by any method, with or without the distribution reward.

    check          what is understood of data of your own: `deft check`
    extend         one more reply for every list: D_3 from an endpoint or from the SFT policy
    train          fit(profile, "deft-dpo", seed): one policy, published
    memory         what a run takes of memory and disk; what cannot fit is refused before anything is loaded
    one_run        one training into a folder, in this process or as one of several
    building       the trainer of a method, as the profile sets it up: model, reference, data, arguments
    launch         one large run on several GPUs: starts the processes, deals the lists of an update
    trainers       the table of methods over ranked lists, their trainer, IFT's, and TRL's own
    likelihood     log-probabilities of responses, in chunks of logits; those of a reference, kept
    encoding       ranked lists as token ids, the rows that SFT and DPO take, batches of one length
    count_block    counting as a block of datatrove, for more lists than one machine reads
    subset         split, score, grade (by the rules of `method.grading`), count: the graded subset and its q_diff
    counting       token counts of ranked lists, by several processes

Start with `train.fit`. A new method is a loss in `deftlib.method.losses` and a line in `trainers.LIST_METHODS`.
"""
