"""Questions that take many runs: each study trains what is not there yet and returns frames to tabulate.

    plan           what a profile will do: stages, GPU time, disk, and the rates they rest on
    trainings      which policies the notebooks of a profile train
    bench          what speed and size cost here, as ratios
    comparison     all methods side by side: gain, cost, distance, the frontier
    ablation       Table 3, random and truly best lists, sweeps over omega, a, c, l and data volume
    filtering      which lists carry the most preference information, by a small preference model
    coverage       how often the intervals hold the true mean, simulated
    bench_lists    how much memory a million lists take, and how fast they are counted
    bench_loop     training against a bare PyTorch loop of the same model, batches, loss and optimizer
    first_updates  twenty updates of every method on a real model

Start with `ablation.controls`.
"""
