"""One training of each kind, as one process or as several: what `test_two_processes` compares. Not a test itself.

    python tests/method/two_processes.py OUT    # OUT/<rank>.pt: {Run: what it did} of two processes, forked here

On the CPU with gloo. The global batch is eight micro-batches of two rows in two updates, however many processes share
them. FSDP2 is what the Trainer and accelerate make of it on GPUs, told to do so here: accelerate looks for it there
alone. GRPO and RLOO draw from the random state of each process, so what they say is fixed by the prompt instead.
"""

import gc
import os
import socket
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # conftest

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import EOS, SMALL, VOCAB
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainingArguments,
)
from trl import DPOConfig, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer, SFTConfig

from deftlib.method.guidance import DistributionGuided
from deftlib.method.losses import ipo_loss, pro_loss
from deftlib.models.loop import arguments
from deftlib.training import encoding, trainers

MICRO_BATCH, MICRO_BATCHES = 2, 4  # rows; of one update


class Run(NamedTuple):
    method: str
    guided: bool = True
    lora: bool = False
    tied: bool = True
    wrapper: str = "ddp"
    kept: bool = False  # what the reference says, before training

    def __str__(self):
        head = "tied" if self.tied else "untied"
        return " ".join(
            [
                self.wrapper,
                self.method,
                "guided" if self.guided else "plain",
                head,
                "lora" * self.lora,
                "kept" * self.kept,
            ]
        )


METHODS = ["sft", "dpo", "pro", "ift", "rloo"]
RUNS = [
    *(Run(method, guided, wrapper=w) for method in METHODS for guided in (True, False) for w in ("ddp", "fsdp2")),
    *(Run(method, tied=False, wrapper=w) for method in METHODS for w in ("ddp", "fsdp2")),
    *(
        Run(method, lora=True, tied=tied, wrapper=w)
        for method in METHODS
        for tied, w in ((True, "ddp"), (False, "fsdp2"))
    ),
    # A head in shards of its own, which TRL's losses do not average over processes; ours do.
    *(Run(method, tied=False, wrapper="fsdp2 of every matrix") for method in ("pro", "ift")),
    *(Run(method, wrapper=w) for method in ("dpo", "ift") for w in ("ddp checkpointed", "fsdp2 checkpointed")),
    *(Run(method, lora=True, wrapper=w, kept=True) for method in ("dpo", "ipo") for w in ("ddp", "fsdp2")),
    *(Run("kto", wrapper=w) for w in ("ddp", "fsdp2")),
    *(Run(method, wrapper=w) for method in ("sft", "pro") for w in ("ddp bf16", "fsdp2 bf16")),
]


def tokenizer():
    words = Tokenizer(WordLevel(VOCAB, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="right")


def policy(tied):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "hidden_size": 32, "tie_word_embeddings": tied}))


def lists(count, length):
    """Encoded ranked lists of different sizes, and the words of their prompts."""
    generator = torch.Generator().manual_seed(length)

    def words(low, high):
        size = torch.randint(low, high, (), generator=generator).item()
        return torch.randint(3, len(VOCAB), (size,), generator=generator).tolist()

    ranks = [float(length - 1 - i) for i in range(length)]
    rows = [
        {"prompt_ids": words(2, 5), "response_ids": [[*words(1, 6), EOS] for _ in ranks], "rewards": ranks}
        for _ in range(count)
    ]
    return Dataset.from_list(rows)


class SaidBefore(RLOOTrainer):
    """RLOO whose completions follow from the prompt and from which of its generations they are."""

    def _generate_single_turn(self, prompt_ids, *_):
        seen, said = {}, []
        for prompt in prompt_ids:
            number = seen[tuple(prompt)] = seen.get(tuple(prompt), -1) + 1
            said.append([3 + (7 * token + 5 * number) % 37 for token in prompt][: 2 + number] + [EOS])
        return said


class GuidedSaidBefore(DistributionGuided, SaidBefore): ...


class GuidedKTO(DistributionGuided, KTOTrainer): ...


def sharded(kind, wrapper):
    """The trainer class on FSDP2, which accelerate offers on GPUs alone."""
    apart = ["LlamaDecoderLayer", *["Linear"] * ("every matrix" in wrapper)]

    class Sharded(kind):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            PartialState().distributed_type = self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=apart,
                cpu_ram_efficient_loading=False,
                activation_checkpointing="checkpointed" in wrapper,
            )
            if "bf16" in wrapper:
                self.accelerator.state.fsdp_plugin.set_mixed_precision("bf16")
            self.is_fsdp_enabled = True

    return Sharded


def build(run, folder, processes):
    """The trainer of a run in one of so many processes: 16 micro-batches, 4 an update, 2 updates."""
    AcceleratorState._reset_state()
    if processes > 1:
        PartialState().distributed_type = DistributedType.MULTI_CPU
    kwargs = arguments(
        folder,
        epochs=1,
        learning_rate=0.1,
        batch_size=MICRO_BATCH,
        seed=0,
        gradient_accumulation_steps=MICRO_BATCHES // processes,
        max_steps=2,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        max_grad_norm=0.0,
        use_cpu=True,
        gradient_checkpointing=run.wrapper == "ddp checkpointed",
        bf16="bf16" in run.wrapper,
    )
    q_diff = torch.rand(len(VOCAB), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    common = {"processing_class": tokenizer(), "q_diff": q_diff - q_diff.mean(), "ratio_steps": 1}
    model, kind = policy(run.tied), lambda kind: kind
    if run.wrapper.startswith("fsdp2") and processes > 1:
        kind = partial(sharded, wrapper=run.wrapper)
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if run.lora else None
    count = MICRO_BATCH * MICRO_BATCHES * 2
    if run.method == "sft":
        args = SFTConfig(**kwargs, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        rows = lists(count, 1)
        rows = rows.map(encoding.as_sft, remove_columns=rows.column_names)
        return kind(trainers.GuidedSFTTrainer)(model, args, train_dataset=rows, peft_config=adapters, **common)
    if run.method == "dpo":
        args = DPOConfig(**kwargs, max_length=None, precompute_ref_log_probs=run.kept)
        common |= {"peft_config": adapters, "ref_model": None if run.lora else policy(run.tied)}
        common["kept_in"], rows = folder if run.kept else None, lists(count, 2)
        rows = rows.map(encoding.as_pair, remove_columns=["response_ids", "rewards"])
        return kind(trainers.GuidedPairTrainer)(model, args=args, train_dataset=rows, **common, summed_sft_weight=0.05)
    names = {number: word for word, number in VOCAB.items()}
    words = lambda ids: " ".join(names[i] for i in ids)
    if run.method == "kto":  # a loss that does not ask all processes for a mean of theirs, as KTO's own does
        args = KTOConfig(**kwargs, max_length=None, loss_type="apo_zero_unpaired")
        rows = [
            {"prompt": words(row["prompt_ids"]), "completion": words(row["response_ids"][0][:-1]), "label": i % 3 == 0}
            for i, row in enumerate(lists(count, 1))
        ]
        common |= {"train_dataset": Dataset.from_list(rows), "ref_model": policy(run.tied)}
        return kind(GuidedKTO)(model, args=args, **common)
    if run.method == "rloo":
        kwargs["per_device_train_batch_size"] *= 2
        args = RLOOConfig(**kwargs, num_generations=2, max_completion_length=6, beta=0.0, remove_unused_columns=False)
        rows = [{"prompt": words(row["prompt_ids"])} for row in lists(count, 1)]
        lengths = lambda completions, **_: [float(len(text)) for text in completions]
        common |= {"reward_funcs": lengths, "train_dataset": Dataset.from_list(rows), "peft_config": adapters}
        return kind(GuidedSaidBefore)(model, args=args, **common)
    if run.lora:
        torch.manual_seed(1)
        model = get_peft_model(model, adapters)
    common["args"] = TrainingArguments(**kwargs, remove_unused_columns=False)
    common["data_collator"] = partial(trainers.collate_lists, pad_token_id=0)
    if run.method == "ift":
        return kind(trainers.GuidedIntuitiveTrainer)(model, train_dataset=lists(count, 1), **common)
    if run.method == "ipo":
        of_pairs = lambda scores: ipo_loss(scores.sums, scores.reference_sums, scores.counts, 0.1, True)
        trainer = kind(trainers.GuidedRankedListTrainer)(
            model, train_dataset=lists(count, 2), list_loss=of_pairs, **common
        )
        trainer.keep_reference(folder)
        return trainer
    of_lists = lambda scores: pro_loss(scores.sums, scores.counts)
    return kind(trainers.GuidedRankedListTrainer)(model, train_dataset=lists(count, 3), list_loss=of_lists, **common)


def adapt(model):
    """Adapters that do something, the same in every process: PEFT starts them where they change nothing."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def trained_weights(model):
    whole = lambda p: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten().double()
    return torch.cat([whole(p).clone() for p in model.parameters() if p.requires_grad])


def did(run, processes, shared=None):
    """What a run did in this process: omega, log entries, weights before and after, the rows of each micro-batch.

    shared: a folder for what all processes of a run read.
    """
    with tempfile.TemporaryDirectory() as own:
        folder = shared / str(run) if shared and run.kept else own
        trainer = build(run, folder, processes)
        adapt(trainer.model)
        before, batches, ratios = trained_weights(trainer.model), [], []
        trainer.remove_callback(PrinterCallback)
        if run.guided:
            trainer.omega = 0.3 if run.method == "rloo" else trainer.calibrate(0.3, batches=5)
        step = trainer.training_step

        def recorded(model, inputs, *rest):
            if "input_ids" in inputs:
                batches.append([[i for i in row if i] for row in inputs["input_ids"].tolist()])
            loss = step(model, inputs, *rest)
            ratios.extend(trainer._guided.get("gradient_ratio", [])[-1:])
            return loss

        trainer.training_step = recorded
        trainer.train()
        names = ("loss", "R_dis", "loss_method", "gradient_ratio", "num_tokens")
        log = [{n: entry[n] for n in names if n in entry} for entry in trainer.state.log_history if "loss" in entry]
        after = trained_weights(trainer.model)
    found = {"omega": trainer.omega, "log": log, "before": before, "after": after, "batches": batches}
    found["checkpointed"] = sum("CheckpointWrapper" in type(module).__name__ for module in trainer.model.modules())
    return {**found, "ratios": [ratio.item() for ratio, _ in ratios]}


def one_of_two(rank, out, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.save({tuple(run): did(run, 2, Path(out)) for run in RUNS}, Path(out) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def main(out):
    """Both processes are forked from this one: what it has imported they need not."""
    gc.freeze()  # nor look at it, whenever a training begins by collecting garbage
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(one_of_two, (out, port), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1])
