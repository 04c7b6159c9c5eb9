"""Many runs at once: the same results as one by one, each made once, whatever fails or dies on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from deftlib import gpus, jobs, store
from deftlib.sections import Launch
from deftlib.workers import JobError, LocalWorkers, Place, in_order


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """An empty project folder to publish into, here and in the workers."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setenv("DEFT_ROOT", str(tmp_path))
    return tmp_path


def profile(many, **more):
    return SimpleNamespace(**{"name": "p", "label": "p", "jobs": many, "cluster": "", "launch": Launch(), **more})


def of(name, number=0, rests_on=None, says=None, fault=None, seconds=0.0):
    """A call that publishes one number, after that of another call, and may fail on the way. Returns the number."""
    below = of(**rests_on) if rests_on else 0

    def produce(folder):
        with open(store.ROOT / "made.txt", "a") as file:
            file.write(f"{name} {os.getpid()} {time.time()}\n")
        if says:
            print(says)
        time.sleep(seconds)
        _fail(fault, store.ROOT / f"{name}.failed")
        (folder / "number.json").write_text(json.dumps(number + below))

    folder = store.stage(profile(1), f"numbers/{name}", {"number": number + below}, produce, "method.grading")
    return json.loads((folder / "number.json").read_text())


def _fail(fault, mark):
    once = not mark.exists()
    mark.touch()
    if fault == "value":
        raise ValueError("seven is no even number")
    if fault == "memory" or (fault == "memory once" and once):
        raise MemoryError("too large")
    if fault == "death" or (fault == "death once" and once):
        os.kill(os.getpid(), signal.SIGKILL)


def made():
    """[(name, process, time)] in the order they were made."""
    return [line.split() for line in (store.ROOT / "made.txt").read_text().splitlines()]


def calls(**of_each):
    return {name: partial(of, name, **options) for name, options in of_each.items()}


TREE = {
    "sft": {"number": 1},
    **{f"dpo{i}": {"number": 10 * i, "rests_on": {"name": "sft", "number": 1}} for i in range(1, 5)},
}


def test_two_workers_find_what_one_finds_and_make_each_result_once():
    expected = {"sft": 1, "dpo1": 11, "dpo2": 21, "dpo3": 31, "dpo4": 41}
    assert jobs.results(profile(2), calls(**TREE)) == expected
    names = [name for name, _, _ in made()]
    assert sorted(names) == sorted(TREE) and names[0] == "sft", "the four waited for what they rest on"
    processes = {process for _, process, _ in made()}
    assert len(processes) == 2 and str(os.getpid()) not in processes
    assert jobs.results(profile(2), calls(**TREE)) == expected and len(made()) == 5, "nothing is made anew"


def lengths(words):
    """A call that shares its work among processes of its own, as tokenizing does under `scale.num_proc`."""
    produce = lambda folder: (folder / "n.json").write_text(json.dumps(list(in_order(len, words, num_proc=2))))
    folder = store.stage(profile(1), "lengths/of-words", {"words": words}, produce, "method.grading")
    return json.loads((folder / "n.json").read_text())


def test_a_worker_may_have_processes_of_its_own():
    found = jobs.results(profile(2), {words: partial(lengths, words.split()) for words in ("a bc", "def g hi")})
    assert found == {"a bc": [1, 2], "def g hi": [3, 1, 2]}


def test_one_worker_is_this_process():
    assert jobs.results(profile(1), calls(a={"number": 1}, b={"number": 2})) == {"a": 1, "b": 2}
    assert {int(process) for _, process, _ in made()} == {os.getpid()}


def test_results_are_told_as_used_by_the_process_that_asked():
    jobs.results(profile(2), calls(a={"number": 1}, b={"number": 2}))
    assert {name.rpartition("-")[0] for name in store.USED["p"]} >= {"numbers/a", "numbers/b"}


def test_what_workers_say_is_shown_behind_their_number(capfd):
    jobs.results(profile(2), calls(a={"says": "half way"}, b={"number": 1, "says": "half way"}))
    lines = capfd.readouterr().out.splitlines()
    assert "  2 of 2 runs are not made yet: 2 workers, " in lines[0]
    assert {"  1| half way", "  2| half way"} <= set(lines)


@pytest.mark.parametrize("many", [2, 3])
def test_the_first_error_is_told_with_its_run_when_the_others_are_done(many):
    bad = {"number": 7, "fault": "value"}
    of_each = {"good": {"number": 1, "seconds": 0.5}, "bad": bad, "other": {"number": 2}}
    of_each["on bad"] = {"number": 1, "rests_on": {"name": "bad", **bad}}
    with pytest.raises(
        JobError, match=r"^2 of 4 runs failed, the others stand; first bad: seven is no even number$"
    ) as e:
        jobs.results(profile(many), calls(**of_each))
    assert isinstance(e.value.__cause__, ValueError)
    assert [name for name, _, _ in made()].count("bad") == 1, "what rests on it does not try again"
    assert of("good", 1) == 1 and of("other", 2) == 2 and len(made()) == 3


@pytest.mark.parametrize("fault", ["memory once", "death once"])
def test_what_does_not_fit_is_tried_alone(fault, capfd):
    slow = {"number": 2, "seconds": 1.0}
    found = jobs.results(profile(2), calls(large={"number": 1, "fault": fault}, slow=slow, small={"number": 3}))
    assert found == {"large": 1, "slow": 2, "small": 3}
    times = {name: float(time) for name, _, time in made()}  # of the second attempt
    assert times["large"] >= times["slow"] + 1.0, "it waited until no other was at work"
    assert "large did not get through" in capfd.readouterr().out


@pytest.mark.parametrize(("fault", "said"), [("memory", "too large"), ("death", r"its worker died \(exit code -9\)")])
def test_what_does_not_fit_alone_either_is_an_error(fault, said):
    with pytest.raises(JobError, match=said):
        jobs.results(profile(2), calls(large={"number": 1, "fault": fault}, small={"number": 2}))
    assert [name for name, _, _ in made()].count("large") == 2
    assert of("small", 2) == 2 and len(made()) == 3


def keyed_by_process():
    """A call whose result has another key in each process, as after an edit of code that this one has imported."""
    produce = lambda folder: (folder / "n.txt").write_text("1")
    return store.stage(profile(1), "numbers/own", {"process": os.getpid()}, produce, "method.grading")


def test_a_worker_that_makes_something_else_is_an_error_and_not_asked_again(root, monkeypatch):
    monkeypatch.setattr(jobs, "SECONDS_TO_APPEAR", 0)
    with pytest.raises(JobError, match=r"first own: .*own-\w+ is not there, though its worker is done"):
        jobs.results(profile(2), {"own": keyed_by_process, **calls(good={"number": 1})})
    assert len(list(root.glob("build/p/numbers/own-*"))) == 1


def sum_of(numbers):
    """A call that asks for several itself."""
    return sum(jobs.results(profile(2), calls(**{f"n{n}": {"number": n} for n in numbers})).values())


def test_a_call_may_ask_for_many_itself():
    found = jobs.results(profile(2), {name: partial(sum_of, range(*name)) for name in ((1, 4), (2, 5))})
    assert found == {(1, 4): 6, (2, 5): 9}
    assert len(made()) == 4 and len({process for _, process, _ in made()}) <= 2, "by the two workers there are"


def exits():
    sys.exit(3)


def test_an_idle_worker_may_die():
    with LocalWorkers([Place(None, 1)]) as workers:
        workers.start("a", partial(of, "a", 1))
        assert workers.next_outcome().error is None
        (worker,) = workers._workers.values()
        worker.process.kill()
        worker.process.join()
        workers.start("b", partial(of, "b", 2))
        outcome = workers.next_outcome()
        assert outcome.name == "b" and outcome.too_big
        workers.start("b", partial(of, "b", 2), alone=True)
        assert workers.next_outcome() == ("b", None, False)


def test_a_worker_that_ends_by_itself_is_not_said_to_want_memory():
    with LocalWorkers([Place(None, 1)]) as workers:
        workers.start("a", exits)
        assert str(workers.next_outcome().error) == "its worker died (exit code 3): stderr says why"


class Unreadable(Exception):
    """As httpx.HTTPStatusError: it can be pickled, and is not made anew from its words alone."""

    def __init__(self, words, *, request):
        super().__init__(words)


def refused():
    raise Unreadable("status 500", request=None)


def dies_within_a_message():
    os.write(sys.stdout.connection.fileno(), (1000).to_bytes(4, "big") + b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_error_that_cannot_be_read_again_is_told_by_its_words():
    with LocalWorkers([Place(None, 1)]) as workers:
        workers.start("a", refused)
        assert str(workers.next_outcome().error) == "Unreadable: status 500"


def test_a_worker_may_die_within_a_message():
    with LocalWorkers([Place(None, 1)]) as workers:
        workers.start("a", dies_within_a_message)
        assert "its worker died (exit code -9)" in str(workers.next_outcome().error)


def talks():
    """A call that asks its stdout what libraries ask it, and ends no line."""
    of("a", 1)
    print(f"terminal: {sys.stdout.isatty()}", end="")


def test_what_a_worker_prints_to_answers_as_a_stream_and_keeps_the_last_line(capfd):
    with LocalWorkers([Place(None, 1)]) as workers:
        workers.start("a", talks)
        assert workers.next_outcome().error is None
    assert "  1| terminal: False\n" in capfd.readouterr().out


POOL = """
import os, sys, time
from deftlib.workers import in_order

def note(piece):
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(0.2)

for _ in in_order(note, range(8), 2):
    time.sleep(60)
"""


def test_the_processes_of_in_order_end_when_theirs_is_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", POOL, str(tmp_path / "pids")], stderr=subprocess.DEVNULL)
    numbers = lambda: set((tmp_path / "pids").read_text().split()) if (tmp_path / "pids").is_file() else set()
    while len(numbers()) < 2:
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    alive = lambda: [number for number in numbers() if running(number)]
    deadline = time.time() + 10
    while alive() and time.time() < deadline:
        time.sleep(0.1)
    assert not alive()


def running(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_unknown_call_is_told_like_any_other():
    def refuse():
        raise ValueError("no such method")

    with pytest.raises(JobError, match="1 of 2 runs failed, the others stand; first bad: no such method"):
        jobs.results(profile(2), {"bad": refuse, **calls(good={"number": 1})})
    assert of("good", 1) == 1 and len(made()) == 1


# ---- a Ray cluster -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_of_two(tmp_path_factory):
    """(a Ray cluster of two cores of this machine, its project folder). Its workers find what this file defines."""
    ray, place = pytest.importorskip("ray"), tmp_path_factory.mktemp("ray")
    path = {"PYTHONPATH": os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"DEFT_ROOT": str(place), **path}})
        yield ray, place
        ray.shutdown()


@pytest.fixture
def cluster(ray_of_two, root, monkeypatch):
    ray, place = ray_of_two
    monkeypatch.setattr(store, "ROOT", place)
    monkeypatch.setenv("DEFT_ROOT", str(place))
    return ray


def test_tasks_of_a_ray_cluster_find_what_one_process_finds(cluster):
    on_ray = profile(2, cluster="ray")
    expected = {"sft": 1, "dpo1": 11, "dpo2": 21, "dpo3": 31, "dpo4": 41}
    assert jobs.results(on_ray, calls(**TREE)) == expected
    assert sorted(name for name, _, _ in made()) == sorted(TREE)
    assert str(os.getpid()) not in {process for _, process, _ in made()}

    of_each = {"large": {"number": 1, "fault": "death once"}, "slow": {"number": 2, "seconds": 1.0}}
    assert jobs.results(on_ray, calls(**of_each)) == {"large": 1, "slow": 2}, "its worker died, and another made it"
    bad = {"number": 7, "fault": "value"}
    with pytest.raises(JobError, match="1 of 2 runs failed, the others stand; first bad: seven is no even number"):
        jobs.results(on_ray, calls(bad=bad, good={"number": 8}))
    with pytest.raises(JobError, match="first lost: its worker died"):
        jobs.results(on_ray, calls(lost={"number": 1, "fault": "death"}, small={"number": 9}))
    assert of("good", 8) == 8 and of("small", 9) == 9


def test_auto_asks_no_machine_of_a_cluster_for_more_cores_than_it_has(cluster):
    assert cluster.cluster_resources()["CPU"] < jobs.CORES_OF_A_WORKER
    assert jobs.results(profile("auto", cluster="ray"), calls(a={"number": 1})) == {"a": 1}


def test_without_ray_a_cluster_is_refused_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    on_ray = profile(2, cluster="ray")
    with pytest.raises(JobError, match=r"pip install 'deftlib\[ray\]'"):
        jobs.results(on_ray, calls(a={}, b={}))


def test_a_run_that_takes_every_gpu_is_alone():
    assert jobs.results(profile("auto", launch=Launch(2)), calls(a={"number": 1}, b={"number": 2})) == {"a": 1, "b": 2}
    assert {int(process) for _, process, _ in made()} == {os.getpid()}
    with pytest.raises(JobError, match="launch gives every GPU to one run: leave jobs at 1"):
        jobs.results(profile(2, launch=Launch(2)), calls(a={}, b={}))


# ---- places --------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Sets how many cores and GPUs there are."""

    def of(cores, gpus=0, visible=None):
        import torch

        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible else monkeypatch.delenv(
            "CUDA_VISIBLE_DEVICES", raising=False
        )

    return of


def test_auto_is_today_on_a_laptop_and_a_share_of_many_cores(machine):
    machine(cores=2)
    assert jobs.places(profile("auto")) == [Place(None, 2)]
    machine(cores=16)
    assert jobs.places(profile("auto")) == 4 * [Place(None, 4)]
    assert jobs.places(profile(2)) == 2 * [Place(None, 8)]


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("6,2", 6), ("", 4), ("none", 4), ("0", 4)])
def test_threads_are_those_that_openmp_is_told(machine, monkeypatch, said, threads):
    machine(cores=8)
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert jobs.places(profile(2)) == 2 * [Place(None, threads)]


def test_workers_are_dealt_over_the_visible_gpus(machine):
    machine(cores=16, gpus=2)
    assert [place.gpu for place in jobs.places(profile(4))] == ["0", "1", "0", "1"]
    machine(cores=16, gpus=2, visible="5,7")
    assert [place.gpu for place in jobs.places(profile(3))] == ["5", "7", "5"]
    assert {place.threads for place in jobs.places(profile(3))} == {5}


class Card:
    """A GPU of 80 GiB as nvidia-smi tells of it: `others` bytes are held by other people's processes."""

    def __init__(self, others=0):
        self.others = others

    def run(self, asked, **_):
        assert asked[:2] == ["nvidia-smi", "--id=0"]
        return SimpleNamespace(stdout=f"{80 * 1024 - self.others // 2**20}, {80 * 1024}\n")


def test_a_gpu_takes_another_run_while_it_has_room_for_one(monkeypatch):
    card = Card()
    monkeypatch.setattr(gpus.subprocess, "run", card.run)
    room = gpus.Room(4 * ["0"])
    assert all(room.on("0", at_work) for at_work in range(4)), "four of an equal share, before any is known"
    room.took(0)
    room.took(30 * 2**30)  # and a GiB of CUDA itself
    assert room.on("0", 1) and not room.on("0", 2), "what two that have just started will take is theirs"
    room.took(20 * 2**30)
    assert not room.on("0", 2), "the largest counts"
    card.others = 60 * 2**30
    assert not room.on("0", 1), "somebody else is on the card"
    assert room.on("0", 0), "alone it is tried: what does not fit there fits nowhere"


@pytest.mark.parametrize("answer", [OSError("none here"), "[N/A], [N/A]", ""])
def test_where_nothing_tells_of_memory_places_alone_decide(monkeypatch, answer):
    def run(*_, **__):
        if isinstance(answer, OSError):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(gpus.subprocess, "run", run)
    assert gpus.memory("MIG-1") is None and gpus.Room(["MIG-1"]).on("MIG-1", 3)


def test_runs_that_do_not_fit_beside_others_wait(machine, monkeypatch):
    machine(cores=2, gpus=1)
    monkeypatch.setattr(gpus.subprocess, "run", Card(others=60 * 2**30).run)
    assert jobs.results(profile(3), calls(**TREE))["dpo4"] == 41
    assert len({process for _, process, _ in made()}) == 1, "one at a time, on a card that somebody else fills"


def gpu_and_threads():
    """What a worker finds in its environment, published."""
    import torch

    def produce(folder):
        seen = [os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads()]
        (folder / "seen.json").write_text(json.dumps(seen))
        time.sleep(0.5)

    return store.stage(profile(1), "seen/by-worker", {}, produce, "method.grading")


def test_a_worker_sees_its_own_gpu_and_threads(machine, root):
    machine(cores=4, gpus=2)
    jobs.results(profile(2), {"a": gpu_and_threads, "b": partial(of, "b")})
    (seen,) = root.glob("build/p/seen/*/seen.json")
    assert json.loads(seen.read_text()) in (["0", 2], ["1", 2])
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
