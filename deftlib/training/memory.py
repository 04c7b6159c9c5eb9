"""What a run takes of memory and disk, worked out before anything is loaded, and refused where it cannot fit.

    need = needed(profile, "deft-dpo", config)            # Need: bytes of one device, by what holds them
    check(profile, "deft-dpo", start, lists)              # NotEnough, with the numbers and with what would fit

Weights, and what a forward pass keeps for the backward pass, are counted by `models.footprint`. The page
`notebooks/what_fits_where.md` rests on these numbers and says how far they are from measured ones.
"""

import math
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.compute as pc
import torch
from pyarrow.parquet import ParquetFile
from transformers import AutoConfig

from deftlib import jobs, store
from deftlib.gpus import OF_CUDA
from deftlib.models import adapters, footprint, policies
from deftlib.profile import Profile
from deftlib.training import launch
from deftlib.training.building import keeps_reference
from deftlib.training.likelihood import LOGITS_AT_ONCE
from deftlib.training.trainers import LIST_METHODS

GIB = 2**30
SPARE = 1.1  # of what is counted, before we say that it fits: fragments, and what is not counted
STATE = {  # bytes of optimizer state for a trained number, scales included; all others have two of the weights' kind
    "adamw_torch_4bit": 1 + 8 / 128,
    **dict.fromkeys(("adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2 + 8 / 256),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1 + 4 / 256),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 3 + 12 / 256),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), 4),
    **{"paged_adamw_32bit": 8, "ademamix": 12, "paged_ademamix_32bit": 12},
    **dict.fromkeys(("rmsprop", "adagrad"), 4),  # at most: one of the weights' kind
    **{"sgd": 0, "adafactor": 4 / 16},  # one a row and a column: less, but of adapters
}
OF_TRL = ("sft", "dpo", "rloo")  # methods whose trainers take log-probabilities by TRL's kernel (`trl.kernels`)
TILE = (4096, 32768)  # positions and tokens of the vocabulary whose logits that holds at a time
KEPT = 20  # bytes a logit that stays on a CPU: five copies in float32 while the entropy is taken (`head_of_trl`)
WITHOUT_TRITON = 29  # bytes a logit on CPUs: seven copies in float32 and a mask, in its backward pass


class NotEnough(RuntimeError):
    """A run that cannot fit into the memory or onto the disk that there is."""


@dataclass(frozen=True)
class Need:
    """Bytes that a run takes of one device, and of the disk."""

    weights: int
    optimizer: int
    reference: int  # a second model, or IFT's frozen embedding
    buckets: int  # DDP's copy of the gradients
    gradients: int
    accumulated: bool  # they stand beside the activations: a micro-batch is not the first of its update
    measured: bool  # and beside those of a backward pass that measures the gradient ratio
    activations: int  # what the forward pass of the largest micro-batch keeps for the backward pass
    logits: int  # of one chunk with what is made of them, and the head's gradient from it
    ends: int  # the embedding's gradient before it is added to
    step: int  # a copy that the optimizer makes for a moment
    whole: int  # what a device holds before FSDP2 deals it out: the policy while it is its own reference
    waiting: int  # in the memory of a machine with GPUs: what all its processes load before FSDP2 deals it out
    saved: int  # on disk: what is published
    checkpoint: int  # on disk: each

    @property
    def total(self):
        """The peak: before weights are dealt out, at either end of a backward pass, or in the optimizer's step."""
        forward = self.activations + self.logits + self.accumulated * self.gradients
        resting = self.weights + self.optimizer + self.reference + self.buckets
        backward = (1 + self.measured) * self.gradients + self.ends
        return max(self.whole, resting + max(forward, backward, self.gradients + self.step))

    def disk(self, save_steps):
        """Bytes: two checkpoints are kept while a third is written, and the result is while there are two."""
        return max(3 * self.checkpoint, 2 * self.checkpoint + self.saved) if save_steps else self.saved

    def __str__(self):
        held = ("weights", "gradients", "optimizer", "reference", "buckets", "activations", "logits", "whole")
        return ", ".join(f"{name} {getattr(self, name) / GIB:.1f}" for name in held if getattr(self, name) >= GIB / 20)


def needed(profile, method, config, responses=2, cuda=True):
    """The `Need` of each device of the profile's `launch`. config: of any causal language model, to start from.

    responses: of the longest list. cuda: False on CPUs, whose AdamW makes no copies. Raises LaunchError where the lists
    of an update cannot be dealt over the devices.
    """
    profile, base = launch.share(profile), method.removeprefix("deft-")
    training, processes, sharded = profile.training, profile.launch.processes, profile.launch.config == "fsdp2"
    parts, mixed = (processes if sharded else 1), training.bf16 and profile.policy.dtype == "float32"
    accumulated = training.gradient_accumulation > 1
    model = footprint.described(config, profile.lora)
    sizes = footprint.sizes(*model, profile.policy.dtype)
    rows = training.batch_size * _rows(profile, base, responses)
    gathers_half = sharded and mixed  # FSDP gathers in 16 bits; autocast keeps 16-bit copies of the weights instead
    activations = footprint.activations(
        model,
        "bfloat16" if gathers_half else profile.policy.dtype,
        training.bf16 and not gathers_half,
        training.gradient_checkpointing,
        rows,
        profile.text.prompt_tokens + profile.text.reply_tokens,
    )
    positions, shape = rows * profile.text.reply_tokens, config.get_text_config()
    logits = _logits(profile, base, positions, shape.vocab_size, shape.hidden_size, cuda) + 4 * sizes.trained_head
    state = STATE.get(training.optimizer)
    optimizer = 2 * sizes.trained_bytes if state is None else math.ceil(state * sizes.trained)
    numbers = 2 * sizes.layer + sizes.outside if parts > 1 else 0  # gathered at a time: this layer and the next
    gathered = numbers * (2 if gathers_half else getattr(torch, profile.policy.dtype).itemsize)
    foreach = cuda and training.optimizer == "adamw_torch"
    second = _second_model(profile, base)
    loaded = (1 + second) * sizes.bytes
    embedding = shape.vocab_size * shape.hidden_size * getattr(torch, profile.policy.dtype).itemsize
    copies = 2 if base in ("dpo", "rloo") else 1  # TRL saves the first adapters too
    saved = sizes.trained_bytes if profile.lora.rank else sizes.bytes
    return Need(
        weights=sizes.bytes // parts + gathered,
        optimizer=optimizer // parts,
        reference=second * sizes.bytes // parts + (base == "ift") * embedding,
        buckets=sizes.trained_bytes if processes > 1 and not sharded else 0,
        gradients=sizes.trained_bytes // parts,
        accumulated=accumulated,
        measured=accumulated and parts == 1 and method != base and training.ratio_steps > 0,  # FSDP2: the first alone
        activations=activations,
        logits=logits,
        ends=sizes.trained_ends,
        step=sizes.trained_bytes // parts if foreach else 0,
        whole=(parts > 1) * (loaded if not cuda else keeps_reference(profile, base) * sizes.bytes),
        waiting=(parts > 1 and cuda) * processes // profile.launch.nodes * loaded,
        saved=saved,
        checkpoint=(copies if profile.lora.rank else 1) * saved + optimizer,
    )


def _logits(profile, base, positions, vocabulary, width, cuda):
    """Bytes of the logits that stand at a time, and of what is made of them, at the start of the backward pass."""
    if base not in OF_TRL:
        return 12 * min(positions * vocabulary, LOGITS_AT_ONCE)  # in float32, with softmax and gradient
    if not cuda and positions * vocabulary <= LOGITS_AT_ONCE:
        return KEPT * positions * vocabulary
    halves, weights_are_halves = profile.training.bf16, profile.policy.dtype != "float32"
    rows, columns = min(positions, TILE[0]), min(vocabulary, TILE[1])
    tile = rows * columns
    held = (2 if halves or weights_are_halves else 4) * tile + 2 * columns * width * (halves and not weights_are_halves)
    if cuda:  # Triton's kernel writes the gradient over the logits
        return held
    multiplied = 4 * (tile + columns * width) if halves or weights_are_halves else 0  # in float32
    return held + max(math.ceil(WITHOUT_TRITON * tile), multiplied)


def _rows(profile, base, responses):
    """Rows of one pass for each list of a micro-batch."""
    if base in LIST_METHODS:
        return 2 if LIST_METHODS[base].pairs else responses
    return {"dpo": 2, "rloo": profile.training.rloo.generations}.get(base, 1)


def _second_model(profile, base):
    has_reference = base in ("dpo", "rloo") or (base in LIST_METHODS and LIST_METHODS[base].reference)
    return has_reference and not profile.lora.rank and not keeps_reference(profile, base)


# ---- the preflight -----------------------------------------------------------------------------------------------


def _said(size):
    """Bytes as a reader takes them in."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def largest(profile, methods, responses=2, cuda=True):
    """(method, its `Need`) of the method that takes most of a device.

    None where the policy's configuration is not known without asking the hub: see `footprint.shape`.
    """
    config = _config(profile)
    needs = {method: needed(profile, method, config, responses, cuda) for method in methods} if config else {}
    return max(needs.items(), key=lambda item: item[1].total, default=None)


def check_first(profile, methods, responses):
    """`check` of several methods before anything is made, if the policy's configuration is known by then.

    responses: of the longest list. What the profile has built so far counts as room on the disk: it may stand already.
    Where the largest would not fit as often as `jobs` runs share a device, that is said, and not refused: others are
    smaller, and few stand at their peak at once.
    """
    config, policy = _config(profile), policies.short_name(profile.policy.source)
    if config is None:
        return
    for method in methods:
        _check(profile, method, policy, config, responses, store.build_dir(profile.name))
    cuda, places = torch.cuda.is_available(), jobs.places(profile)
    many = math.ceil(len(places) / len({place.gpu for place in places}))
    if many == 1 or profile.cluster or profile.launch.processes > 1:
        return
    method, need = largest(profile, methods, responses, cuda)
    take, free = many * (need.total + cuda * OF_CUDA), free_of_a_device()
    if take > free:
        print(f"  jobs: {many} runs like {method} at a time would take {_said(take)}, and {_said(free)} are free")


def _config(profile):
    if profile.policy.source == "mini":
        return policies.mini_config(profile, policies.mini_tokenizer())
    return footprint.shape(profile.policy.source)


def check(profile, method, start, lists, folder=None, free=None, free_disk=None):
    """Raises NotEnough, with the numbers and with what would fit, if a run cannot fit into memory or onto the disk.

    Devices are those of the profile's `launch`. start: folder or hub id of the policy; its configuration alone is read.
    lists: the Parquet file that is trained on. free: bytes of one device, free_disk: bytes where results are built;
    what there is now, beside the runs that `jobs` has at work, if not given. folder: what an interrupted run left,
    whose files are written over. Where a system does not tell, nothing is refused.
    """
    below = adapters.base(start)[0] if adapters.is_adapter(start) else start
    config = AutoConfig.from_pretrained(**policies.origin(below))
    _check(profile, method, policies.short_name(below), config, longest_list(lists), folder, free, free_disk)


def _check(profile, method, policy, config, responses, folder=None, free=None, free_disk=None):
    cuda, processes = torch.cuda.is_available(), profile.launch.processes // profile.launch.nodes  # of this machine
    if cuda and processes > (here := torch.cuda.device_count()):
        raise launch.LaunchError(f"launch asks for {processes} GPUs of a machine, one a process, and sees {here}")
    need = needed(profile, method, config, responses, cuda)
    free_disk = shutil.disk_usage(_existing(store.build_dir(profile.name))).free if free_disk is None else free_disk
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else 0
    disk = need.disk(profile.training.save_steps) - written
    name = f"{method} of {policy}"
    if disk > free_disk:
        smaller = " or lora.rank=16" if not profile.lora.rank else ""
        raise NotEnough(
            f"{name} writes {_said(disk)} (a checkpoint {_said(need.checkpoint)}, the policy {_said(need.saved)}), and "
            f"{_said(free_disk)} are free: make room, training.save_steps=0{smaller}"
        )
    if need.waiting > (host := _free_without_gpu(Path("/"))):
        raise NotEnough(
            f"{name} loads {_said(need.waiting)} into the machine's memory, a model in each process before it is dealt "
            f"out, and {_said(host)} are free: fewer launch.processes, economy.reference=kept, policy.dtype=bfloat16"
        )
    free = free_of_a_device(processes) if free is None else free
    reserved = OF_CUDA if cuda else 0
    if need.total + reserved <= free:
        return
    ways = _ways(profile, cuda)
    under = {way: needed(changed, method, config, responses, cuda) for way, changed in ways.items()}
    would = [f"{way} ({n.total / GIB:.1f})" for way, n in under.items() if fits(n, free, reserved)]
    raise NotEnough(
        f"{name} needs {need.total / GIB:.1f} GiB of {'a GPU' if cuda else 'memory a process'} ({need}), and "
        f"{max(free - reserved, 0) / GIB:.1f} are free; what would fit: {', '.join(would) or 'nothing of what we know'}"
    )


def fits(need, free, reserved=0):
    """Whether a run fits into so many bytes with a little to spare."""
    return SPARE * need.total + reserved <= free


def _ways(profile, cuda):
    """{settings: the profile under them}: what may fit where the profile does not; lists of an update stay as many."""
    training, launched = profile.training, profile.launch
    lists = training.batch_size * training.gradient_accumulation
    changed = lambda section, **settings: replace(profile, **{section: replace(getattr(profile, section), **settings)})
    low = replace(
        changed("policy", dtype="bfloat16"),
        lora=replace(profile.lora, rank=profile.lora.rank or 16),
        training=replace(training, gradient_checkpointing=True),
    )
    ways = {
        "economy.reference=kept": changed("economy", reference="kept"),
        "training.gradient_checkpointing=true": changed("training", gradient_checkpointing=True),
        f"training.batch_size=1 training.gradient_accumulation={lists}": changed(
            "training", batch_size=1, gradient_accumulation=lists
        ),
        "training.optimizer=adamw_torch_8bit": changed("training", optimizer="adamw_torch_8bit"),
        f"lora.rank={low.lora.rank} policy.dtype=bfloat16": replace(low, training=training),
        f"lora.rank={low.lora.rank} policy.dtype=bfloat16 training.gradient_checkpointing=true": low,
    }
    for more in (2, 4, 8):
        evenly = training.batch_size % more == 0 or training.gradient_accumulation % more == 0
        if cuda and more > launched.processes and evenly:
            ways[f"launch.processes={more} launch.config=fsdp2"] = changed("launch", processes=more, config="fsdp2")
    return ways


def free_of_a_device(processes=1):
    """Free bytes of the GPU, of the smallest of several GPUs in all, or a process's share of the memory there is.

    Without a GPU that is what the machine has, or the container or Slurm job around this process if it may take less.
    Infinite where a system does not tell.
    """
    if torch.cuda.is_available():
        if processes == 1:
            return torch.cuda.mem_get_info()[0]
        devices = range(min(processes, torch.cuda.device_count()))  # asked what is free, each would be opened
        return min(torch.cuda.get_device_properties(device).total_memory for device in devices)
    return _free_without_gpu(Path("/")) / processes


def _free_without_gpu(root):
    """Bytes that this process may still take, by the kernel's files below `root`."""
    try:
        machine = _counted(root / "proc/meminfo", ":")["MemAvailable"] * 1024
    except (OSError, KeyError):
        machine = math.inf
    return min([machine, *_left_in_control_groups(root)])


def _left_in_control_groups(root):
    """Yields the bytes left in each control group around this process that has a limit: of version 2, or of version 1.

    What a group holds of files is given back when memory is short, and counts as free.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, place = line.split(":", 2)
            if not kinds:
                mount, limit, used, of_files = "", "memory.max", "memory.current", ""
            elif "memory" in kinds.split(","):
                mount, limit, used, of_files = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
            else:
                continue
            top = root / "sys/fs/cgroup" / mount
            group = top / place.strip("/")
            for folder in [group, *group.parents]:  # in a container the first may not be there, and the last is its own
                with suppress(OSError, ValueError, KeyError):  # no such file; "max", which is no limit
                    most = int((folder / limit).read_text())
                    held = _counted(folder / "memory.stat")
                    files = held[f"{of_files}active_file"] + held[f"{of_files}inactive_file"]
                    yield most - int((folder / used).read_text()) + files
                if folder == top:
                    break


def _counted(path, separator=None):
    """{name: number} of a file with one of each a line."""
    return {name: int(rest.split()[0]) for name, rest in (line.split(separator, 1) for line in path.open())}


def longest_list(path):
    """How many responses the longest list of a Parquet file has."""
    batches = ParquetFile(path).iter_batches(columns=["responses"])
    return max(pc.max(pc.list_value_length(batch.column(0))).as_py() for batch in batches)


def _existing(folder):
    """The folder, or the nearest one above it that is there."""
    return folder if folder.is_dir() else _existing(folder.parent)


# ---- the page ----------------------------------------------------------------------------------------------------

HALF = {"policy.dtype": "bfloat16"}
TRAINED = {  # what is trained, and in what: changes of the profile `paper`
    "all weights, float32 under bf16": {"economy.reference": "kept"},
    "all weights, bfloat16, 8-bit Adam": {
        **HALF,
        "economy.reference": "kept",
        "economy.stochastic_rounding": True,
        "training.optimizer": "adamw_torch_8bit",
    },
    "LoRA 16, float32 under bf16": {"lora.rank": 16},
    "LoRA 16, bfloat16": {**HALF, "lora.rank": 16},
}
CARDS = (24, 48, 80)  # GB as sold, 10^9 bytes


def table(models=footprint.SHAPES, method="deft-dpo"):
    """The lines of the page's table: GiB of each GPU by how many there are, where it fits, GiB of disk; Markdown."""
    lines = ["| policy | trained | 1 GPU | 2 | 4 | 8 | fits | disk |", "|---|---|---|---|---|---|---|---|"]
    for model in models:
        for trained, changes in TRAINED.items():
            dealt = "ddp" if "lora.rank" in changes else "fsdp2"
            of = lambda n, c=changes, d=dealt: Profile.load("paper", {**c, "launch": {"processes": n, "config": d}})
            needs = {n: needed(of(n), method, footprint.SHAPES[model]) for n in (1, 2, 4, 8)}
            on = lambda card, needs=needs: [n for n, need in needs.items() if fits(need, 1e9 * card, OF_CUDA)]
            least = ", ".join(f"{min(on(card))} x {card} GB" for card in CARDS if on(card)) or "nowhere"
            sizes = " | ".join(f"{need.total / GIB:.1f}" for need in needs.values())
            disk = needs[1].disk(save_steps=1) / GIB
            lines.append(f"| {model} | {trained} | {sizes} | {least} | {disk:.1f} |")
    return lines


if __name__ == "__main__":
    print(*table(), sep="\n")
