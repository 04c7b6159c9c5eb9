"""What a trainer's own passes compute, seen from outside: forward passes that show their outputs, gradients' norms.

    with at_the_head(model, lambda hidden, weight, bias, scale: ...) as found:
        trainer_loss(model, batch)                       # found: one value for each forward pass with gradients

A distributed wrapper lets the head's weight be read in one place only: inside the wrapped forward pass. FSDP2 holds it
as a shard of itself elsewhere. So what needs it is computed there, by a hook on the transformer below the head.
"""

from contextlib import contextmanager

import torch

from deftlib.method.heads import backbone, output_head


@contextmanager
def outputs_of(module, only_with_gradients=True):
    """Collects what a module returns in every forward pass, or in those with gradients: not LoRA's reference pass."""
    captured = []

    def keep(module, args, output):
        if torch.is_grad_enabled() or not only_with_gradients:
            captured.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def at_the_head(model, compute, only_with_gradients=True):
    """Collects `compute(hidden, weight, bias, scale)` of every forward pass, called inside it, outside autocast.

    model: unwrapped (`accelerator.unwrap_model`). hidden: float[N, T, d], the last hidden states, longer than the batch
    by a PEFT adapter's virtual tokens, which stand first. The rest: `heads.output_head`, whole under FSDP2 too.
    """
    found = []

    def at_pass(module, args, output):
        if torch.is_grad_enabled() or not only_with_gradients:
            hidden = output.last_hidden_state
            with torch.autocast(hidden.device.type, enabled=False):
                found.append(compute(hidden, *output_head(model)))

    handle = backbone(model).register_forward_hook(at_pass)
    try:
        yield found
    finally:
        handle.remove()


def gradient_norm(model, value, averaged=None):
    """|grad value| over the trainable parameters, by a backward pass that leaves no gradient behind: float[].

    averaged: what makes a gradient of one process the mean over all, None if it is to stay its own. Under FSDP2 it is
    that mean in any case, and the norm is that of the whole. Adds to no gradient that an optimizer is still to read:
    call it where there are none.
    """
    value.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if averaged is not None:
        gradients = [g if hasattr(g, "full_tensor") else averaged(g) for g in gradients]
    for parameter in model.parameters():
        parameter.grad = None
    sharded = [gradient for gradient in gradients if hasattr(gradient, "full_tensor")]
    whole = [gradient.float().norm() for gradient in gradients if not hasattr(gradient, "full_tensor")]
    if sharded:
        whole.append(torch.nn.utils.get_total_norm(sharded).full_tensor().float())
    norms = [norm.to(value.device) for norm in whole]  # FSDP2 may keep them in the memory of the host
    return torch.stack(norms).norm() if norms else value.new_zeros(())
