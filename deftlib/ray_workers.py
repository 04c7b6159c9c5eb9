"""Workers of a Ray cluster, behind the same names as `workers.LocalWorkers`. Its machines share the project's folder.

`pip install 'deftlib[ray]'`; the cluster is the one that RAY_ADDRESS names, else one of this machine alone. What a task
prints Ray shows, with its process and machine. A task asks for a GPU where there are any, so one runs on each.
"""

import os

from deftlib.workers import TOO_BIG, JobError, Outcome, make_one

PASSED_ON = ("DEFT_ROOT", "DEFT_DATA", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")  # to tasks, where they are set


class RayWorkers:
    """Tasks of a Ray cluster with `cores` each, as many at a time as `many` says; None: as it has GPUs, or cores."""

    def __init__(self, many, cores):
        try:
            import ray
        except ModuleNotFoundError as error:
            raise JobError("cluster: ray needs Ray: pip install 'deftlib[ray]'") from error
        self.ray, self.many, self.cores = ray, many, cores
        self._names = {}  # {reference to a task's result: name}

    def __enter__(self):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
        self.was_there = self.ray.is_initialized()
        if not self.was_there:
            passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
            self.ray.init(include_dashboard=False, runtime_env={"env_vars": passed}, log_to_driver=True)
        self.machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        self.cores = min(self.cores, int(max(has.get("CPU", 0) for has in self.machines)))  # more would wait for ever
        has = self.ray.cluster_resources()
        self.gpus, cores = int(has.get("GPU", 0)), int(has["CPU"])
        self.many = self.many or self.gpus or max(1, cores // max(1, self.cores))
        return self

    def __exit__(self, *_):
        for reference in self._names:
            self.ray.cancel(reference, force=True)
        if not self.was_there:
            self.ray.shutdown()

    @property
    def described(self):
        return f"{self.many} tasks at a time on {len(self.machines)} machines of a Ray cluster"

    @property
    def busy(self):
        return len(self._names)

    @property
    def has_room(self):
        return self.busy < self.many

    def start(self, name, call, alone=False):
        """Hand a call to the cluster. alone: the caller sees to it that no other is at work."""
        gpus = min(1, self.gpus / self.many) if self.gpus and not alone else int(bool(self.gpus))
        task = self.ray.remote(make_one).options(num_cpus=self.cores, num_gpus=gpus, max_retries=0)
        self._names[task.remote(call)] = name

    def next_outcome(self):
        """Wait until a task is done."""
        (done,), _ = self.ray.wait(list(self._names), num_returns=1)
        name = self._names.pop(done)
        try:
            self.ray.get(done)
        except self.ray.exceptions.RayTaskError as error:  # raised by the call itself
            cause = error.cause if error.cause is not None else JobError(str(error))
            return Outcome(name, cause, too_big=type(cause).__name__ in TOO_BIG)
        except self.ray.exceptions.RayError as error:  # its worker or its machine died
            return Outcome(name, JobError(f"its worker died: {error}".splitlines()[0]), too_big=True)
        return Outcome(name, None, too_big=False)
