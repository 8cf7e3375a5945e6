"""train.py: settings, the tiny world, the training loop, checkpoints.

    python train.py                    a tiny world: minutes on a laptop, no download, no GPU
    python train.py --adapter lora     the same window, without thought encoding
    python train.py --world long       up to six sums to remember, for 14 evictions
    python train.py --model DIR --data gsm8k_train.jsonl --out runs/mine         a real model

Each step: take some problems, sample a group of responses to each under the window (rollout.py),
give each response a reward (the task), compare within groups and update the adapter (grpo.py).
With --sft-steps, supervised steps on worked examples come first, under the same window.

Problems and random numbers are functions of seed and step, so a checkpoint needs no random state:
`--resume RUN` goes on as if the run had never stopped, on a CPU to the last bit. Several GPUs share
the problems of a step: torchrun --nproc_per_node=4 train.py ...  Left out: models split over GPUs.

In a notebook:  from train import Config, train
                for metrics in train(Config(steps=20)): print(metrics["reward"])
"""
import argparse
import atexit
import io
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from cache import eviction_size
from encoder import (ADAPTERS, MEMORY_KEYS, MEMORY_ORDERS, MEMORY_UPDATES, attach_by_config,
                     base_folder, load_run, merge_adapter, read_config, save_adapter)
from evaluate import (ProblemFile, append, check_template, compare, evaluation_args,
                      extract_answer, grade_rollout, open_locked, problem_ids, problem_prompts,
                      problems_hash, right_parts)
from grpo import grpo_step, sft_step
from model import (ArgumentParser, ModelConfig, Tokenizer, Transformer, UserError, atomic_write,
                   load_model, pick_device, read_json, run_script, set_chat_format, weights_hash,
                   write_json, write_safetensors)
from rollout import generate_in_parts, given_responses

# ---------------------------------------------------------------------------------------- settings

PRESETS = ("tiny", "long", "24gb", "80gb")      # two for a CPU, a GPU of 24 GB, one of 80 GB

def flag(default, help, choices=None):
    """A field that is a command-line flag. A tuple is a default for each preset, in their order."""
    return field(default=None if isinstance(default, tuple) else default,
                 metadata={"default": default, "help": help, "choices": choices})

@dataclass
class Config:
    """Every setting, with unit and default. Each is a flag of the command line."""
    preset: str = flag("auto", "auto: as the world for the tiny model, else 24gb",
                       ("auto", *PRESETS))
    model: str = flag("tiny", "'tiny', a model folder, or an id on the Hugging Face hub")
    data: str = flag("tally", "a task of train.py ('tally'), or a JSONL file of problems")
    world: str = flag("tiny", "tally with up to 3 lists, or long: up to 6", ("tiny", "long"))
    out: str = flag("", "run folder; default: the next free runs/MODEL-ADAPTER-SEED")
    prompt_template: str = flag("", "text around {problem}; default: asks for a \\boxed answer")
    system: str = flag("", "system message of the chat format")
    template_args: str = flag("{}", "JSON for the chat template: '{\"enable_thinking\": false}'")
    date: str = flag("", "YYYY-MM-DD, for chat templates that write the date; default: today")
    adapter: str = flag("pte", "thought encoding, plain LoRA, or only S_0, never updated", ADAPTERS)
    memory_order: str = flag("keys-match", "order of evicted keys and values in S' (encoder.py)",
                             MEMORY_ORDERS)
    memory_update: str = flag("delta", "how an eviction joins the memory (encoder.py)",
                              tuple(MEMORY_UPDATES))
    memory_keys: str = flag("rotated", "evicted keys with their positions in them, or without",
                            MEMORY_KEYS)
    truncate_memory: int = flag(0, "1: the gradient passes through the last eviction only", (0, 1))
    rank: int = flag(32, "R, rank of the adapter; the state is R x R")
    global_tokens: int = flag(32, "M, learnable tokens that make S_0; 0: S_0 = 0")
    alpha: float = flag(32.0, "the update of the weights is scaled by alpha / rank")
    window: int = flag((16, 16, 256, 1024), "W, response tokens kept beside the prompt; 0: all")
    evict_ratio: float = flag(0.25, "share of the window that leaves at once")
    max_new_tokens: int = flag((47, 92, 1024, 3072), "longest response, in tokens")
    temperature: float = flag(1.0, "of sampling; the log-probs are those at this temperature")
    prompts: int = flag((16, 16, 8, 32), "N, problems per step")
    group_size: int = flag((16, 16, 8, 8), "G, responses to each problem")
    rollout_batch: int = flag((256, 256, 64, 256), "responses decoded at once: for memory only")
    micro_batch: int = flag((4096, 4096, 2048, 8192), "response tokens replayed at once: likewise")
    sft_steps: int = flag(0, "supervised steps on worked examples, before GRPO")
    steps: int = flag((140, 320, 200, 200), "steps of GRPO")
    lr: float = flag((1e-3, 1e-3, 1e-5, 1e-5), "peak learning rate of AdamW, for A and B")
    encoder_lr: float = flag((4e-3, 4e-3, 1e-4, 1e-4), "peak learning rate of the thought encoder")
    warmup: int = flag(10, "steps of rising learning rate; it falls linearly to a tenth")
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to this norm")
    inner_epochs: int = flag(1, "updates per rollout; above 1 the clip acts")
    clip_low: float = flag(0.2, "the ratio is clipped below 1 - this")
    clip_high: float = flag(0.28, "and above 1 + this")
    kl_coef: float = flag(0.0, "weight of the KL to the base model with its full cache")
    loss: str = flag("grpo", "dr_grpo: no division by std and length", ("grpo", "dr_grpo"))
    reward: str = flag("task", "task: as the task says (tally: share of right sums); exact: 1 for "
                       "a right answer, else 0", ("task", "exact"))
    base_steps: int = flag((350, 350, 1, 1), "tiny: supervised steps that make the base model")
    test_problems: int = flag(500, "tiny: problems of each K in the final table; 0: no table")
    save_every: int = flag((20, 20, 5, 5), "steps between checkpoints, and samples logged")
    resume: str = flag("", "run folder to go on with, under its settings and what is given anew")
    merge: str = flag("", "run folder of a LoRA to be written to --out as a model of its own")
    wandb: bool = flag(False, "also log to Weights & Biases (pip install wandb)")
    seed: int = flag(0, "random seed of base model, problems, samples and adapter")
    device: str = flag("auto", "where to run", ("auto", "cuda", "mps", "cpu"))
    dtype: str = flag("auto", "of the frozen weights; auto: bfloat16 on a GPU, else float32",
                      ("auto", "float32", "bfloat16"))

    def __post_init__(self):
        if self.preset == "auto":
            self.preset = self.world if self.model == "tiny" else "24gb"
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None:
                value = f.metadata["default"][PRESETS.index(self.preset)]
            setattr(self, f.name, f.type(value))            # a notebook may give alpha=16

    def check(self):
        """Raises UserError for settings that cannot work."""
        eviction_size(self.window, self.evict_ratio)
        set_chat_format(argparse.Namespace(), asdict(self))     # a mistake in it shows now
        least = dict.fromkeys(("rank", "max_new_tokens", "prompts",
                               "rollout_batch", "micro_batch", "inner_epochs", "base_steps",
                               "save_every"), 1)
        least |= dict.fromkeys(("alpha", "lr", "warmup", "max_grad_norm", "clip_low", "clip_high",
                                "kl_coef", "seed", "test_problems", "global_tokens",
                                "encoder_lr", "sft_steps", "steps"), 0)
        least |= {"group_size": 2, "temperature": 0.01}
        for f in fields(self):
            value = getattr(self, f.name)
            flag_name = f"--{f.name.replace('_', '-')}"
            most = 9999 if f.name in ("rank", "global_tokens") else 10**9
            if f.name in least and not least[f.name] <= value <= most:
                raise UserError(f"{flag_name} {value}: give {least[f.name]} to {most}")
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise UserError(f"{flag_name} {value}: choose from {f.metadata['choices']}")
        check_template(self.prompt_template)
        if (self.model == "tiny") != (self.data in TASKS):
            raise UserError(f"--model {self.model} --data {self.data}: the tiny model does the "
                            f"task {' or '.join(TASKS)}, other models need a JSONL file")
        if self.world == "long" and self.data != "tally":
            raise UserError("--world long is a world of --data tally; leave one of them out")

# What may change when a run goes on: how long it lasts, where it runs, where things are.
CHANGEABLE = ("resume", "out", "steps", "model", "data", "device", "micro_batch", "rollout_batch",
              "save_every", "test_problems", "wandb")

def resume_config(run, **given):
    """The Config of a run that goes on, with what is given anew. Raises UserError."""
    saved = read_config(run)
    settings = {f.name: saved[f.name] for f in fields(Config) if f.name in saved}
    return Config(**{**settings, **given, "resume": str(run)})

def parse_args():
    """The Config of the command line; with --resume, that of the run and what is given anew."""
    parser = ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        how = {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.type is bool:
            how = {"action": "store_true"}
        elif f.metadata["choices"]:                         # --help lists them
            how = {"type": f.type, "choices": f.metadata["choices"]}
        text = f"{f.metadata['help']} (default: {f.metadata['default']})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **how)
    given = vars(parser.parse_args())                       # only the flags that were typed
    return resume_config(given.pop("resume"), **given) if "resume" in given else Config(**given)

# ------------------------------------------------------------------- the tiny world: task and base

class Tally:
    """K lists of six digits, as in `527184,903341=`. The response walks along each list and writes
    every digit and the running sum mod 10, `;` after each list; then `Answer:` and the K sums.

    Under a window of 16 all sums but the last have left the cache when they are asked for. A model
    that has not kept them can only guess, 1 in 10: it cannot add six digits of the prompt in one
    token. Another task is a class with the names below (or a subclass that overrides some), added
    to TASKS. Its problems of one K must have equally many tokens."""
    characters = "0123456789,=;"                            # the vocabulary of the base model
    counts = (1, 2, 3)                                      # K: the base model learns all of them
    stages = {0: (2, 2, 2, 1), 40: (3, 3, 2, 1)}            # from this step of GRPO on: K, in turn

    def problem(self, K, rng):
        lists = rng.integers(0, 10, (K, 6))                                     # (K, 6)
        sums = lists.cumsum(axis=1) % 10                                        # (K, 6)
        walks = []
        for digits, running_sums in zip(lists, sums):
            walks.append("".join(f"{d}{s}" for d, s in zip(digits, running_sums)) + ";")
        question = ",".join("".join(map(str, digits)) for digits in lists) + "="
        answer = "".join(map(str, sums[:, -1]))
        written = [13 * i + 11 for i in range(K)]           # the tokens of the K sums in the walks
        return {"problem": question, "walks": walks, "answer": answer, "exact": True,
                "parts": written, "K": K}

    def batch(self, step, n, seed):
        """The n problems of a step, a function of seed and step."""
        rng = np.random.default_rng([seed, 1, step])
        counts = self.stages[max(first for first in self.stages if first <= step)]
        K = counts[step % len(counts)]
        return [self.problem(K, rng) for _ in range(n)]

    def gold(self, problem):
        """The response that supervised steps teach."""
        return "".join(problem["walks"]) + "Answer:" + problem["answer"]

    def reward(self, problem, text, n_tokens, ended):
        """The share of right sums. ended: the response was not cut off. n_tokens: for those who
        reward short responses."""
        return float(np.mean(right_parts(problem, extract_answer(text)))) if ended else 0.0

class LongTally(Tally):
    """Up to six lists: the first of six sums must outlive 14 evictions."""
    counts = (1, 2, 3, 4, 5, 6)
    stages = {0: (2, 2, 2, 1), 50: (3, 3, 2, 1), 90: (4, 4, 3, 2), 130: (5, 5, 4, 3),
              180: (6, 6, 5, 4), 240: (6, 6, 5, 3)}

TASKS = {"tally": Tally}                                    # the choices of --data, but for files

def make_task(config):
    """The task object that --data and --world name. Raises UserError for a file that is wrong."""
    if config.world == "long":
        return LongTally()
    return TASKS[config.data]() if config.data in TASKS else ProblemFile(config.data)

def history_mask(T, start, stop):
    """Causal attention mask (B, 1, T, T) that also hides tokens start ... stop - 1 of each row from
    all later ones. start: an integer, stop (B,)."""
    keys = torch.arange(T, device=stop.device)                                  # (T,)
    queries = keys[:, None]                                                     # (T, 1)
    stop = stop[:, None, None]                                                  # (B, 1, 1)
    hidden = (keys >= start) & (keys < stop) & (queries >= stop)                # (B, T, T)
    return ((keys <= queries) & ~hidden)[:, None]

def tiny_tokenizer(characters):
    """What tokenizer.json holds: the characters, then `Answer:` and the special `<|end|>`."""
    vocab = {character: i for i, character in enumerate(characters)}
    added = [{"id": len(vocab), "content": "Answer:", "special": False},
             {"id": len(vocab) + 1, "content": "<|end|>", "special": True}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return {"added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []}}

def base_loss(model, tokenizer, task, problems, rng):
    """Cross-entropy of the gold responses, summed, and their number of tokens.

    In half of the rows some of the first walks are hidden from all that follows them. So the model
    learns to guess evenly where it cannot know, and GRPO finds lucky guesses to reward. It learns
    nothing about carrying what is hidden."""
    device = model.embedding.weight.device
    texts = [problem["problem"] + task.gold(problem) for problem in problems]
    ids = [tokenizer.encode(text) + model.config.eos_ids for text in texts]
    assert tokenizer.decode(ids[0][:-1]) == texts[0], "the task's characters lack some of these"
    ids = torch.tensor(ids, device=device)                                      # (B, T + 1)
    start = len(tokenizer.encode(problems[0]["problem"]))                       # alike in all rows
    walks = [len(tokenizer.encode(walk)) for walk in problems[0]["walks"]]
    ends = start + np.cumsum([0, *walks])                                       # of the walks
    n_hidden = rng.integers(2, size=len(ids)) * rng.integers(len(walks), size=len(ids))
    T = ids.shape[1] - 1
    mask = history_mask(T, start, torch.tensor(ends[n_hidden], device=device))
    positions = torch.arange(T, device=device)[None]                            # (1, T)
    hidden = model.layers(ids[:, :-1], positions, mask, None, None)             # (B, T, C)
    logits = model.logits(hidden[:, start - 1:])                              # (B, response, vocab)
    targets = ids[:, start:].flatten()                                          # (B * response,)
    return F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"), len(targets)

def make_base(folder, task, config, device):
    """Trains a Llama of 300,000 weights on gold responses, never under a window. Writes a folder
    that is read like any other model's; does nothing if it is there already."""
    example = task.gold(task.problem(max(task.counts), np.random.default_rng(0)))
    made_for = [config.base_steps, task.characters, list(task.counts), example]
    if folder.exists() and read_json(folder / "config.json", {}).get("made_for") == made_for:
        return
    torch.manual_seed(config.seed)
    rng = np.random.default_rng([config.seed, 0])
    tokenizer = Tokenizer(tiny_tokenizer(task.characters), {})
    raw = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=96,
               num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
               intermediate_size=256, rope_theta=100.0, max_position_embeddings=4096,
               vocab_size=tokenizer.n_ids, eos_token_id=tokenizer.n_ids - 1, made_for=made_for)
    model = Transformer(ModelConfig(raw)).to(device)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            std = 0.3 if "embedding" in name else weight.shape[1] ** -0.5
            if "wo." in name or "w_down." in name:
                std = 0.4 * std                             # residual branches start small
            torch.nn.init.normal_(weight, std=std)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.5)
    bar = tqdm(range(config.base_steps), desc=f"making {folder}", file=sys.stderr)
    for step in bar:
        losses = []
        draws = rng.choice(task.counts, size=128)
        for K in task.counts:                               # rows of one K have the same length
            problems = [task.problem(K, rng) for _ in range(max((draws == K).sum(), 1))]
            losses.append(base_loss(model, tokenizer, task, problems, rng))
        loss = sum(loss for loss, _ in losses) / sum(n for _, n in losses)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = max(0.02, 1 - step / config.base_steps)
        optimizer.param_groups[0]["lr"] = 6e-3 * min((step + 1) / 30, decay)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    made = Path(f"{folder}.{os.getpid()}")                  # another run may make the same one now
    made.mkdir(parents=True)
    write_safetensors(made / "model.safetensors", model.tensors())
    write_json(made / "tokenizer.json", tiny_tokenizer(task.characters))
    write_json(made / "config.json", raw)
    shutil.rmtree(folder, ignore_errors=True)               # made for another task
    made.rename(folder)

# ------------------------------------------------------------------ several processes, checkpoints

RANK = int(os.environ.get("RANK", 0))                   # torchrun sets both for its processes
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

def init_distributed(device):
    """Joins the processes that torchrun has started, if any."""
    if WORLD_SIZE > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)         # or its threads may abort the exit

def all_reduce(tensor):
    """Adds up a tensor over all processes, in place. One on the CPU makes each wait for all."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

def log(text):
    if RANK == 0:
        tqdm.write(text, file=sys.stderr)

def choose_out(config):
    """The run folder: --resume, --out, or the next free name in runs/. Raises UserError."""
    if config.resume:
        return config.resume
    if WORLD_SIZE > 1 and not config.out:
        raise UserError("several processes need --out DIR, a new folder")
    name = f"runs/{Path(config.model).name}-{config.adapter}-{config.seed}"
    out = config.out or name
    n = 1
    while Path(out).exists():
        if config.out:
            raise UserError(f"--out {out} exists; give another, or --resume {out}")
        n += 1
        out = f"{name}-{n}"
    return out

LOGS = ("metrics.jsonl", "samples.jsonl")

def save_checkpoint(out, step, encoder, optimizer, config):
    """Writes all that the next step needs to one file, and the adapter for everybody else."""
    sizes = {name: (out / name).stat().st_size for name in LOGS}
    save_adapter(out, encoder, asdict(config))              # first: never older than the checkpoint
    buffer = io.BytesIO()
    torch.save({"step": step, "adapter": encoder.tensors(), "sizes": sizes,
                "optimizer": optimizer.state_dict()}, buffer)
    with atomic_write(out / "checkpoint.pt") as file:
        file.write(buffer.getvalue())

def load_checkpoint(out, encoder, optimizer):
    """Restores a run, and cuts off what it logged after its checkpoint -> the number of steps done.
    Raises UserError if the checkpoint is damaged."""
    path = out / "checkpoint.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        for name, tensor in encoder.tensors().items():
            tensor.copy_(state["adapter"][name])
        for name in LOGS if RANK == 0 else ():
            if (out / name).stat().st_size < state["sizes"][name]:
                raise ValueError(f"{name} has lost lines")
            os.truncate(out / name, state["sizes"][name])
        return state["step"]
    except Exception as error:              # a damaged file makes torch.load fail in many ways
        raise UserError(f"{path}: damaged, or of another run ({error}); train again with another "
                        "--out") from None

# ---------------------------------------------------------------------------------------- the loop

def warn_if_unhealthy(metrics, dtype):
    """Says on stderr what is wrong with a step, if anything, and what to do."""
    skipped = "the gradient is not finite, no update; if that goes on, lower --lr"
    if metrics["phase"] == "sft":
        if metrics["skipped"]:
            log(f"step {metrics['step']}: {skipped}")
        return
    found = (f"an answer was found in {metrics['answer_found']:.0%} of the responses, "
             f"{metrics['truncated']:.0%} were cut off at --max-new-tokens; see samples.jsonl")
    largest_gap = 1e-3 if dtype == torch.float32 else 0.5
    checks = [
        (metrics["skipped"], skipped),
        (not metrics["logp_gap"] <= largest_gap,
         f"logp_gap {metrics['logp_gap']:.2g} is more than rounding. The replay does not see what "
         "the rollout saw (does an eviction rule or the encoder draw random numbers of its own?), "
         "and nothing that is learned can be trusted"),
        (metrics["spread"] == 0 and metrics["accuracy"] < 0.9,
         f"all rewards of each group are equal, so nothing can be learned from them; {found}"),
        (metrics["answer_found"] < 0.1, f"{found}, or change --prompt-template")]
    for is_wrong, text in checks:
        if is_wrong:
            log(f"step {metrics['step']}: {text}")

def step_metrics(rows):
    """Means over the graded responses of a step, and the most memory that a GPU has used so far."""
    metrics = {"answer_found": np.mean([row["prediction"] is not None for row in rows]),
               "peak_memory_mb": torch.cuda.max_memory_allocated() / 1e6}
    for name, column in (("reward", "reward"), ("accuracy", "correct"), ("truncated", "truncated"),
                         ("response_tokens", "tokens"), ("evictions", "evictions")):
        metrics[name] = np.mean([row[column] for row in rows])
    return metrics

def mean_over_processes(metrics):
    """The means of all metrics over all processes; of logp_gap the largest."""
    gaps = torch.zeros(WORLD_SIZE)
    gaps[RANK] = metrics.get("logp_gap", 0.0)
    means = torch.tensor(list(metrics.values()), dtype=torch.float64) / WORLD_SIZE
    metrics = dict(zip(metrics, all_reduce(means).tolist()))
    if "logp_gap" in metrics:
        metrics["logp_gap"] = all_reduce(gaps).max().item()
    return metrics

def save_adapter_of_sft(out, encoder, config):
    """Saves the adapter after the supervised steps as a run of its own, RUN/sft."""
    folder = out / "sft"
    folder.mkdir(exist_ok=True)
    if config.model == "tiny":
        shutil.copytree(out / "base", folder / "base", dirs_exist_ok=True)
    save_adapter(folder, encoder, asdict(config))
    write_json(folder / "config.json", read_json(out / "config.json") | {"steps": 0})

def open_run(config, task, device):
    """Makes the folder of a run, or goes on with one. Sets config.out. Raises UserError.
    -> model, tokenizer, encoder, optimizer, steps done, files that are locked while open."""
    saved = read_config(config.resume) if config.resume else {}
    for name, value in asdict(config).items():
        if saved and name not in CHANGEABLE and saved.get(name) != value:
            raise UserError(f"--{name.replace('_', '-')}: {config.resume} was trained with "
                            f"{saved.get(name)}, which cannot change; leave the flag out (in "
                            "Python: use resume_config)")
    config.out = choose_out(config)
    out = Path(config.out)
    all_reduce(torch.zeros(()))                             # all have seen that --out is free
    if RANK == 0 and config.model == "tiny" and not (out / "base").exists():
        base = Path(f"runs/{config.world}-base-{config.seed}")
        make_base(base, task, config, device)
        shutil.copytree(base, out / "base")                 # so that a run can be moved
    all_reduce(torch.zeros(()))                             # the base is there
    base = base_folder(out, asdict(config) | {"base_hash": saved.get("base_hash", "")})
    data_hash = problems_hash(getattr(task, "problems", []))
    if saved.get("data_hash", data_hash) != data_hash:
        raise UserError(f"--data {config.data}: not the problems that {out} was trained on")
    model, tokenizer = load_model(base, device, config.dtype)
    config.date = config.date or time.strftime("%Y-%m-%d")
    set_chat_format(tokenizer, asdict(config))
    if config.model != "tiny":
        problem_prompts(model, tokenizer, task.problems, config.prompt_template,
                        config.max_new_tokens)              # fails now if one is too long
        config.data = str(Path(config.data).absolute())     # so that it is found from anywhere
        if config.sft_steps:
            for problem in task.problems:
                task.gold(problem)                          # fails now if one has none
        if Path(config.model).exists():                     # else it is an id on the hub
            config.model = str(Path(config.model).absolute())
    torch.manual_seed(config.seed)
    encoder = attach_by_config(model, asdict(config))
    groups = [{"params": list(encoder.linears.parameters()), "peak_lr": config.lr},
              {"params": list(encoder.parameters(recurse=False)), "peak_lr": config.encoder_lr}]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]   # not the base's weights
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.99), weight_decay=0)
    locked = []
    hashes = {"base_hash": weights_hash(base), "data_hash": data_hash}
    settings = asdict(config) | {"resume": "", **hashes}
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        locked = [open_locked(out / name) for name in LOGS]
        if not (out / "checkpoint.pt").exists():
            write_json(out / "config.json", settings)
            save_checkpoint(out, 0, encoder, optimizer, config)
    all_reduce(torch.zeros(()))                             # the checkpoint is there
    done = load_checkpoint(out, encoder, optimizer)
    if RANK == 0:
        write_json(out / "config.json", settings)           # with what is given anew
    return model, tokenizer, encoder, optimizer, done, locked

def supervised_step(model, encoder, optimizer, tokenizer, task, problems, prompts, config):
    """One step on the worked examples of the problems -> metrics, Rollout of the examples."""
    end = model.config.eos_ids[:1] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = [tokenizer.encode(task.gold(problem)) + end for problem in problems]
    rollout = given_responses(prompts, ids, config.window, config.evict_ratio,
                              model.embedding.weight.device)
    return sft_step(model, encoder, optimizer, rollout, config, all_reduce), rollout

def sample_reward_update(model, encoder, optimizer, tokenizer, task, problems, prompts, seed,
                         config):
    """One step of GRPO -> metrics, Rollout, graded responses (dicts with a "reward")."""
    rollout = generate_in_parts(
        model, encoder, prompts, config.group_size, rollout_batch=config.rollout_batch,
        max_new_tokens=config.max_new_tokens, window=config.window, evict_ratio=config.evict_ratio,
        temperature=config.temperature, seeds=range(seed, seed + len(prompts)))
    rows = grade_rollout(problems, rollout, tokenizer)
    for row, i in zip(rows, rollout.prompt_of.tolist()):
        row["reward"] = float(row["correct"])
        if config.reward == "task":
            row["reward"] = task.reward(problems[i], row["response"], row["tokens"],
                                        not row["truncated"])
    rewards = torch.tensor([row["reward"] for row in rows], device=rollout.tokens.device)   # (B,)
    metrics = grpo_step(model, encoder, optimizer, rollout, rewards, config, all_reduce)
    return metrics | step_metrics(rows), rollout, rows

def train(config):
    """A generator: does one step at a time and yields its metrics, a dict, once they are saved.
    The supervised steps come first, if there are any.

    Sets config.out to the run folder. Raises UserError."""
    config.check()
    device = pick_device(config.device)
    init_distributed(device)
    n = config.prompts // WORLD_SIZE                        # problems of this process
    if n * WORLD_SIZE != config.prompts:
        raise UserError(f"--prompts {config.prompts} cannot be shared by {WORLD_SIZE} processes")
    if config.wandb:
        import wandb
    torch.use_deterministic_algorithms(device == "cpu")     # else threads add in any order
    task = make_task(config)
    model, tokenizer, encoder, optimizer, done, locked = open_run(config, task, device)
    out = Path(config.out)
    if config.wandb and RANK == 0:
        wandb.init(project="nanopte", name=out.name, config=asdict(config))

    for step in range(done, config.sft_steps + config.steps):
        start = time.time()
        phase, i, n_steps = "sft", step, config.sft_steps   # i: number of the step in its phase
        if step >= config.sft_steps:
            phase, i, n_steps = "grpo", step - config.sft_steps, config.steps
        # The problems of this step, and the learning rates: up for `warmup` steps, then down.
        seed = config.seed + 500_000 * (phase == "sft")
        problems = task.batch(i, config.prompts, seed)[RANK * n:(RANK + 1) * n]
        prompts = [problem_ids(tokenizer, problem, config.prompt_template) for problem in problems]
        factor = min((i + 1) / max(config.warmup, 1), 1 - 0.9 * i / n_steps)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
        # Train.
        what = model, encoder, optimizer, tokenizer, task, problems, prompts
        rows = []
        if phase == "sft":
            metrics, rollout = supervised_step(*what, config)
        else:
            seed = (config.seed * 1_000_003 + i) * config.prompts + RANK * n
            metrics, rollout, rows = sample_reward_update(*what, seed, config)
        # Measure, warn, save.
        metrics["seconds"] = time.time() - start
        n_tokens = rollout.lengths.sum().item() * WORLD_SIZE
        metrics["tokens_per_second"] = n_tokens / metrics["seconds"]
        metrics = {"step": step + 1, "phase": phase, "K": problems[0].get("K"),
                   "lr": factor * config.lr, **mean_over_processes(metrics)}
        warn_if_unhealthy(metrics, model.norm.weight.dtype)
        if RANK == 0:
            append(out / "metrics.jsonl", [metrics])
            if config.wandb:
                wandb.log(metrics, step=step + 1)
            is_last = i + 1 == n_steps                      # of its phase
            if step == 0 or (step + 1) % config.save_every == 0 or is_last:
                for k in range(min(n, 4) if rows else 0):   # the first response to each prompt
                    sample = {"step": step + 1, "prompt": tokenizer.decode(prompts[k])}
                    append(out / "samples.jsonl", [sample | rows[k * config.group_size]])
                if phase == "sft" and is_last:              # before the checkpoint, or a run that
                    save_adapter_of_sft(out, encoder, config)       # is killed here would lose it
                save_checkpoint(out, step + 1, encoder, optimizer, config)
        yield metrics

# -------------------------------------------------------------------------------------- the script

def status_line(recent):
    """One line about the last steps, a list of their metrics. Their bars are the learning curve."""
    recent = [metrics for metrics in recent if metrics["phase"] == recent[-1]["phase"]]
    if recent[-1]["phase"] == "sft":
        loss = np.mean([metrics["loss"] for metrics in recent])
        return f"step {recent[-1]['step']:4}  supervised, loss {loss:.3f} per token"
    by_K = {}
    for metrics in recent:
        by_K.setdefault(metrics["K"], []).append(metrics["accuracy"])
    accuracy = ""
    for K in sorted(by_K, key=str):
        value = np.mean(by_K[K])
        accuracy += f"{'' if K is None else f'K={K} '}{value:4.0%} |{'#' * round(20 * value):20}| "
    means = {name: np.mean([metrics[name] for metrics in recent])
             for name in ("reward", "response_tokens", "truncated", "logp_gap", "seconds")}
    return (f"step {recent[-1]['step']:4}  accuracy {accuracy} reward {means['reward']:.2f}, "
            f"{means['response_tokens']:.0f} tokens, {means['truncated']:.0%} cut off, logp_gap "
            f"{means['logp_gap']:.0e}, {means['seconds']:.1f} s")

def print_table(config):
    """Tests base and adapter on new problems of each K, with the window and without."""
    out = Path(config.out)
    task = make_task(config)
    rng = np.random.default_rng([config.seed, 2])
    for name in ("table.json", "table.jsonl", "table.md"):  # from before a resume
        (out / name).unlink(missing_ok=True)
    files = []
    for K in task.counts:
        files.append(f"{out}/{config.data}-{K}.jsonl")
        Path(files[-1]).unlink(missing_ok=True)
        append(files[-1], [task.problem(K, rng) for _ in range(config.test_problems)])
    runs = [str(out)]
    if (out / "sft").exists() and config.steps > 0:
        runs.insert(0, str(out / "sft"))
    windows = sorted({"0", str(config.window)})
    print(compare(evaluation_args([
        "--runs", *runs, "--data", *files, "--window", *windows, "--json", f"{out}/table.json",
        "--max-new-tokens", str(config.max_new_tokens), "--batch", "500",
        "--grader", "builtin", "--device", config.device, "--dtype", config.dtype])))
    rows = read_json(out / "table.json")["rows"]
    K = max(task.counts)
    found = [row["scores"][f"{config.data}-{K}"]["accuracy"][0] for row in rows
             if row["window"] == config.window]
    print(f"K = {K} with a window of {config.window}: {found[0]:.1%} before, {found[-1]:.1%} after")

def main():
    config = parse_args()
    if config.merge:
        merge_adapter(config.merge, config.out, "" if config.model == "tiny" else config.model)
        log(f"{config.out} is a model folder now: python rollout.py --model {config.out}")
        return
    start = time.time()
    recent = []
    try:
        n_steps = config.sft_steps + config.steps
        with tqdm(total=n_steps, desc="training", disable=RANK > 0, delay=1) as bar:
            for metrics in train(config):
                bar.update(metrics["step"] - bar.n)
                recent.append(metrics)
                if metrics["step"] % 20 == 0 or metrics["step"] == n_steps:
                    log(status_line(recent))
                    recent = []
        if RANK == 0 and config.model == "tiny" and config.test_problems:
            print_table(config)
    except KeyboardInterrupt:
        if Path(config.out, "checkpoint.pt").exists():
            log(f"go on from the last checkpoint with: python train.py --resume {config.out}")
        raise
    log(f"{(time.time() - start) / 60:.1f} minutes; everything is in {config.out}")

if __name__ == "__main__":
    run_script(main)
