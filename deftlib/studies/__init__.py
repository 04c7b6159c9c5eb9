"""Questions that take many runs: each study trains what is not there yet and returns frames to tabulate.

    ablation       Table 3, random and truly best lists, sweeps over omega, a, c, l and data volume
    comparison     all methods side by side: gain, cost, distance, the frontier
    first_updates  twenty updates of every method on a real model

Start with `ablation.controls`.
"""
