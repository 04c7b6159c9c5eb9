"""What a run takes of memory and disk: counted by hand, refused before anything is loaded."""

import re
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer import utils as trl_utils
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from deftlib.models import adapters, footprint, policies
from deftlib.profile import Profile
from deftlib.sections import Lora
from deftlib.store import ROOT
from deftlib.training import launch, likelihood, memory, subset, train

CONFIG = LlamaConfig(**SMALL, tie_word_embeddings=False)
NUMBERS = 2 * 40 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16  # embedding, head; two layers; a norm
FULL = {"training.bf16": False, "training.batch_size": 2, "training.gradient_accumulation": 1, "text.prompt_tokens": 8}


def need(method="sft", config=CONFIG, responses=2, cuda=False, **changes):
    return memory.needed(Profile.load("mini", FULL | changes), method, config, responses, cuda)


# ---- by hand -----------------------------------------------------------------------------------------------------


def test_weights_gradients_and_adams_two_moments_are_sixteen_bytes_a_number():
    found = need()
    assert (found.weights, found.gradients, found.optimizer) == (4 * NUMBERS, 4 * NUMBERS, 8 * NUMBERS)
    assert (found.reference, found.buckets, found.step) == (0, 0, 0)
    assert found.saved == 4 * NUMBERS and found.checkpoint == 12 * NUMBERS
    assert found.disk(save_steps=10) == 3 * 12 * NUMBERS and found.disk(save_steps=0) == 4 * NUMBERS


def test_bfloat16_weights_and_an_8_bit_optimizer_are_six_bytes_a_number():
    found = need(**{"policy.dtype": "bfloat16", "training.optimizer": "adamw_torch_8bit"})
    assert found.weights + found.gradients + found.optimizer == pytest.approx((2 + 2 + 2 + 8 / 256) * NUMBERS, abs=1)


def test_the_state_of_an_optimizer_is_counted_by_its_name():
    assert set(memory.STATE) < {name.value for name in OptimizerNames}
    of = lambda name: need(**{"training.optimizer": name}).optimizer / NUMBERS
    bits_8 = ("adamw_8bit", "paged_adamw_8bit", "adamw_bnb_8bit")
    assert [of(name) for name in bits_8] == pytest.approx(3 * [2 + 8 / 256], abs=1e-3)
    assert (of("lion_32bit"), of("paged_adamw_32bit"), of("adamw_torch_fused")) == (4, 8, 8)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw_torch_fused", "rmsprop", "adagrad", "sgd"])
def test_the_state_of_an_optimizer_is_what_it_holds(optimizer, tmp_path):
    weight = torch.nn.Parameter(torch.randn(16, 1024))
    weight.grad = torch.randn(16, 1024)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(tmp_path, optim=optimizer))
    made = kind([weight], **settings)
    made.step()
    held = sum(value.nbytes for value in made.state[weight].values() if torch.is_tensor(value) and value.ndim)
    assert held / weight.numel() == pytest.approx(memory.STATE.get(optimizer, 8), abs=0.01)


def test_intuitive_fine_tuning_keeps_a_frozen_embedding():
    assert need("ift").reference == 4 * 40 * 16 and need("rrhf").reference == 0


def test_adapters_are_float32_on_frozen_weights_and_published_alone():
    rank, found = 2, need(**{"lora.rank": 2, "policy.dtype": "bfloat16"})
    trained = 2 * rank * (4 * (16 + 16) + 3 * (16 + 32))
    assert found.weights == 2 * NUMBERS + 4 * trained
    assert (found.gradients, found.optimizer, found.saved) == (4 * trained, 8 * trained, 4 * trained)


@pytest.mark.parametrize(
    ("method", "changes", "second"),
    [
        ("sft", {}, 0),
        ("dpo", {}, 1),
        ("deft-ipo", {}, 1),
        ("rloo", {}, 1),
        ("pro", {}, 0),
        ("dpo", {"economy.reference": "kept"}, 0),
        ("rloo", {"lora.rank": 2}, 0),
        ("sr-dpo", {"lora.rank": 2}, 0),
    ],
)
def test_a_second_model_stands_where_a_reference_is_not_kept_and_nothing_is_adapted(method, changes, second):
    assert need(method, **changes).reference == second * 4 * NUMBERS


def test_several_devices_share_what_is_dealt_out_and_hold_copies_of_what_is_not():
    alone = need(**{"training.batch_size": 8})
    own = need(**{"training.batch_size": 8, "launch.processes": 4})
    dealt = need(**{"training.batch_size": 8, "launch.processes": 4, "launch.config": "fsdp2"})
    assert (own.weights, own.optimizer, own.buckets) == (alone.weights, alone.optimizer, alone.gradients)
    assert (dealt.gradients, dealt.optimizer) == (alone.gradients // 4, alone.optimizer // 4)
    layer, ends = (NUMBERS - 2 * 40 * 16) // 2, 2 * 40 * 16
    assert dealt.weights == alone.weights // 4 + 4 * (2 * layer + ends) and dealt.buckets == 0
    assert own.activations == pytest.approx(alone.activations / 4, rel=0.05)  # two lists each


def test_weights_that_are_to_be_dealt_out_are_loaded_whole_in_every_process():
    fsdp = {"training.batch_size": 8, "launch": {"processes": 8, "config": "fsdp2", "nodes": 2}}
    dealt = lambda method, cuda=True, **changes: need(method, cuda=cuda, **fsdp, **changes)
    assert (dealt("sft").waiting, dealt("dpo").waiting) == (4 * 4 * NUMBERS, 4 * 2 * 4 * NUMBERS)
    assert (dealt("dpo").whole, dealt("dpo", **{"economy.reference": "kept"}).whole) == (0, 4 * NUMBERS)
    assert (dealt("dpo", cuda=False).whole, dealt("dpo", cuda=False).waiting) == (2 * 4 * NUMBERS, 0)
    assert (need("dpo", cuda=True).whole, need("dpo", cuda=True).waiting) == (0, 0)
    assert replace(dealt("dpo"), whole=10**9).total == 10**9


def see_gpus(many, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: many)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    launched = lambda **of: Profile.load("mini", {**FULL, "training.batch_size": 8, "launch": of})
    monkeypatch.setattr(memory, "free_of_a_device", lambda processes: 2**40)
    memory.check_first(launched(processes=8), ["sft"], 2)
    see_gpus(4, monkeypatch)
    for enough in ({"processes": 4}, {"processes": 8, "nodes": 2}):
        memory.check_first(launched(**enough), ["sft"], 2)
    with pytest.raises(launch.LaunchError, match="launch asks for 8 GPUs of a machine, one a process, and sees 4"):
        memory.check_first(launched(processes=8), ["sft"], 2)


def test_weights_that_the_machine_cannot_hold_for_all_processes_are_refused(monkeypatch):
    profile = Profile.load("mini", {**FULL, "training.batch_size": 8, "launch": {"processes": 4, "config": "fsdp2"}})
    see_gpus(4, monkeypatch)
    monkeypatch.setattr(memory, "_free_without_gpu", lambda root: 10**6)
    with pytest.raises(memory.NotEnough, match=r"sft of mini loads .* into the machine's memory"):
        memory.check_first(profile, ["sft"], 2)


def test_rows_are_what_a_method_runs_of_a_list():
    assert need("pro", responses=5).activations == pytest.approx(5 / 2 * need("dpo").activations, rel=0.05)
    assert need("asft", responses=5).activations == need("dpo").activations
    assert need("dpo").activations == pytest.approx(2 * need("sft").activations, rel=0.05)


def test_the_peak_is_where_most_stands_at_a_time():
    of = dict.fromkeys(("saved", "checkpoint", "reference", "buckets", "whole", "waiting"), 0)
    held = lambda accumulated=False, measured=False, **other: memory.Need(
        **{
            **of,
            **{"weights": 10, "optimizer": 20, "gradients": 5, "activations": 7, "logits": 1, "ends": 2, "step": 0},
            **{"accumulated": accumulated, "measured": measured, **other},
        }
    )
    assert held().total == 30 + 8  # the forward pass over
    assert held(activations=1).total == 30 + 5 + 2  # the backward pass over
    assert held(step=9).total == 30 + 5 + 9
    assert held(accumulated=True).total == 30 + 8 + 5
    assert held(accumulated=True, measured=True, gradients=9).total == 30 + 9 + 9 + 2


def test_a_measurement_of_the_gradient_ratio_holds_its_gradients_beside_those_that_are_accumulated():
    of = lambda method, steps=2, **more: need(method, **{"training.gradient_accumulation": steps, **more}).measured
    assert of("deft-sft") and not of("sft") and not of("deft-sft", steps=1)
    assert not of("deft-sft", **{"training.ratio_steps": 0})
    dealt = {"training.batch_size": 8, "launch": {"processes": 8, "config": "fsdp2"}}
    assert not of("deft-sft", steps=3, **dealt), "FSDP2 measures the first micro-batch alone"


# ---- against the output heads that run ------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside held at a time, beside those given."""

    def __init__(self, *given):
        super().__init__()
        self.now, self.most, self.seen = 0, 0, weakref.WeakSet(tensor.untyped_storage() for tensor in given)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]:
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, size):
        self.now -= size


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("dtype", "autocast"), [("float32", False), ("float32", True), ("bfloat16", False)])
@pytest.mark.parametrize("width", [8, 600])
def test_logits_are_what_the_head_of_a_training_holds_of_them_on_a_cpu(width, dtype, autocast, kept, monkeypatch):
    """Those that stay until the backward pass, and of more of them what TRL's kernel holds at a time."""
    for module in (memory, likelihood):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", 80 * (memory.TILE[1] + 100) - (not kept))
    profile = Profile.load("mini", {"policy.dtype": dtype, "training.bf16": autocast})
    hidden = torch.randn(80, width, dtype=getattr(torch, dtype), requires_grad=True)
    weight, targets = torch.randn(memory.TILE[1] + 100, width, dtype=getattr(torch, dtype)), torch.zeros(80).long()
    with Peak(hidden, weight) as peak, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        given = (hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy", "mean_logits"))
        trl_utils._ChunkedLogProbFunction.apply(*given)[0].sum().backward()
    worked_out = memory._logits(profile, "dpo", 80, len(weight), width, cuda=False)
    worked_out += 2 * weight.numel() * (autocast and kept)  # autocast's copy of the head: one of the activations
    assert peak.most == pytest.approx(worked_out, rel=0.03)


def test_tiles_are_as_large_as_trls():
    assert memory.TILE == (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)


# ---- the preflight -----------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path, make_model, tokenizer):
    make_model().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def lists(tmp_path):
    rows = [{"id": "a", "prompt": "w1", "responses": ["w2", "w3", "w4"][:n], "rewards": None} for n in (2, 3, 2)]
    Dataset.from_list(rows).to_parquet(tmp_path / "lists.parquet")
    return tmp_path / "lists.parquet"


def test_what_cannot_fit_is_refused_with_the_numbers_and_what_would(start, lists, monkeypatch):
    monkeypatch.setattr(policies, "load_policy", lambda *_: pytest.fail("loaded"))
    profile = Profile.load("mini", {**FULL, "training.batch_size": 64})
    whole = memory.needed(profile, "dpo", LlamaConfig(**SMALL, tie_word_embeddings=True), 3, False).total
    memory.check(profile, "dpo", start, lists, free=whole)
    monkeypatch.setattr(memory, "GIB", 2**20)
    monkeypatch.setattr(memory, "SPARE", 1)
    with pytest.raises(memory.NotEnough) as refused:
        memory.check(profile, "dpo", start, lists, free=whole - 1)
    said = str(refused.value)
    assert said.startswith(f"dpo of start needs {whole / 2**20:.1f} GiB of memory a process (")
    assert "activations" in said and "economy.reference=kept (" in said
    assert "training.batch_size=1 training.gradient_accumulation=64 (" in said
    with pytest.raises(memory.NotEnough, match="what would fit: nothing of what we know"):
        memory.check(profile, "dpo", start, lists, free=1000)


def test_more_gpus_are_named_where_there_are_gpus(start, lists, monkeypatch):
    profile = Profile.load("mini", {**FULL, "training.batch_size": 8})
    see_gpus(1, monkeypatch)
    monkeypatch.setattr(memory, "OF_CUDA", 0)
    monkeypatch.setattr(memory, "SPARE", 1)
    dealt = Profile.load("mini", {**FULL, "training.batch_size": 8, "launch": {"processes": 4, "config": "fsdp2"}})
    room = memory.needed(dealt, "deft-sft", LlamaConfig(**SMALL, tie_word_embeddings=True), 3).total
    with pytest.raises(memory.NotEnough) as refused:
        memory.check(profile, "deft-sft", start, lists, free=room)
    said = str(refused.value)
    assert "of a GPU" in said and "launch.processes=4 launch.config=fsdp2" in said and "launch.processes=2" not in said


def test_checkpoints_that_the_disk_cannot_hold_are_refused(start, lists):
    profile = Profile.load("mini", {**FULL, "training.save_steps": 2})
    with pytest.raises(memory.NotEnough, match=r"sft of start writes .* or lora.rank=16"):
        memory.check(profile, "sft", start, lists, free_disk=1000)


def test_what_an_interrupted_run_left_on_the_disk_is_written_over(start, lists, tmp_path):
    profile, left = Profile.load("mini", {**FULL, "training.save_steps": 2}), tmp_path / "left" / "checkpoints"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(bytes(10**7))
    memory.check(profile, "sft", start, lists, folder=left.parent, free_disk=1000)


def test_what_is_built_already_is_room_for_what_is_to_be_built(tmp_path, monkeypatch):
    monkeypatch.setattr(memory.store, "build_dir", lambda name: tmp_path)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(memory.NotEnough, match="sft of mini writes"):
        memory.check_first(Profile.load("mini", FULL), ["sft"], 2)
    (tmp_path / "weights").write_bytes(bytes(10**7))
    memory.check_first(Profile.load("mini", FULL), ["sft"], 2)


def test_runs_that_share_the_memory_are_told_when_they_are_too_many(monkeypatch, capsys):
    profile = Profile.load("mini", {**FULL, "jobs": 3})
    room = memory.largest(profile, ["sft"], cuda=False)[1].total
    monkeypatch.setattr(memory, "free_of_a_device", lambda processes=1: 3 * room)
    memory.check_first(profile, ["sft"], 2)
    assert not capsys.readouterr().out
    monkeypatch.setattr(memory, "free_of_a_device", lambda processes=1: 3 * room - 1)
    memory.check_first(profile, ["sft"], 2)
    assert "jobs: 3 runs like sft at a time would take" in capsys.readouterr().out


def test_an_adapter_is_counted_on_the_model_below_it(start, lists, tmp_path):
    folder = tmp_path / "sft"
    adapters.wrapped(policies.load_policy(start), Lora(rank=2), 0).save_pretrained(folder)
    adapters.name_base(folder, start, policies.identity(start))
    memory.check(Profile.load("mini", {**FULL, "lora.rank": 2}), "dpo", folder, lists)


def test_fit_checks_before_it_loads(start, lists, tmp_path, tokenizer, monkeypatch):
    subset.save_q_diff(tmp_path / "q_diff.npz", np.arange(40), np.arange(40)[::-1], policies.fingerprint(tokenizer))
    monkeypatch.setattr(subset, "scored", lambda profile: tmp_path)
    monkeypatch.setattr(subset, "counted", lambda profile: tmp_path)
    monkeypatch.setattr(policies, "start_policy", lambda profile: start)
    monkeypatch.setattr(train.store, "stage", lambda profile, name, key, produce, module: produce(tmp_path))
    monkeypatch.setattr(policies, "load_policy", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(memory, "free_of_a_device", lambda processes: 1000)
    with pytest.raises(memory.NotEnough, match="sft of start needs"):
        train.fit(Profile.load("mini", FULL), "sft")


def test_memory_of_this_machine_is_shared_by_its_processes():
    assert memory.free_of_a_device() > 2**20
    assert memory.free_of_a_device(4) == pytest.approx(memory.free_of_a_device() / 4, rel=0.2)


def test_memory_of_a_machine_is_not_shared_with_the_processes_of_another(start, lists, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "free_of_a_device", lambda processes: asked.append(processes) or 2**50)
    of_two = Profile.load("mini", {**FULL, "training.batch_size": 8, "launch": {"processes": 8, "nodes": 2}})
    memory.check(of_two, "sft", start, lists)
    assert asked == [4]


def test_a_container_or_slurm_job_may_have_less_memory_than_its_machine(tmp_path):
    def put(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    left = lambda: memory._free_without_gpu(tmp_path)
    assert left() == float("inf")
    put("proc/meminfo", "MemTotal:   99 kB\nMemAvailable:   50 kB\nHugePages_Total:    0\n")
    assert left() == 50 * 1024
    put("proc/self/cgroup", "0::/job/step\n")
    put("sys/fs/cgroup/job/step/memory.max", "max\n")
    assert left() == 50 * 1024
    put("sys/fs/cgroup/job/memory.max", "30000\n")  # the limit of a group holds for those inside
    put("sys/fs/cgroup/job/memory.current", "20000\n")
    put("sys/fs/cgroup/job/memory.stat", "anon 13000\nactive_file 4000\ninactive_file 3000\n")
    assert left() == 30000 - 20000 + 7000
    put("proc/self/cgroup", "12:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n")  # version 1, seen from a container
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9000\n")
    put("sys/fs/cgroup/memory/memory.usage_in_bytes", "8000\n")
    put("sys/fs/cgroup/memory/memory.stat", "active_file 1\ntotal_active_file 500\ntotal_inactive_file 0\n")
    assert left() == 9000 - 8000 + 500


# ---- the page ----------------------------------------------------------------------------------------------------


def test_the_page_is_what_is_counted():
    page = (ROOT / "notebooks/what_fits_where.md").read_text().splitlines()
    rows = [line for line in page if re.match(rf"\| ({'|'.join(footprint.SHAPES)}) \|", line)]
    assert len(rows) == len(footprint.SHAPES) * len(memory.TRAINED)
    for line in memory.table(["SmolLM2-135M"]):  # the others come from the same function, in minutes
        assert line in page
