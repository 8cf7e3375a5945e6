"""train.py: the whole thing. Configuration, data, the tiny world, the loop, what is saved.

    python train.py                    a tiny world, a laptop, minutes: no download, no GPU
    python train.py --adapter lora     the same without thought encoding: most seeds never learn
    python train.py --preset 24gb --model DIR --data gsm8k_train.jsonl --out runs/mine

Each step: draw prompts, roll out a group of completions for each under the window (rollout.py), reward 1 for a right
answer and 0 for any other, compare within the group, replay and take one step of AdamW on the adapter (grpo.py).

The tiny world, *tally*: K lists of six digits, `527184,903341=`. The thought walks each list, writing each digit and
the running sum mod 10, `;` after each list, then `Answer:` and the K final sums. A base model learns it with a full
cache. Under a window of 16 the first of two sums (thought 11) has left the cache before thought 24, and is asked for at
thought 27: the base can only guess, 1 in 10. GRPO, which rewards the right answer and nothing else, has to teach the
thought encoder to carry it.

Reward of tally: R = 1 if what follows `Answer:` is the gold text, to the letter, and the rollout ended; else 0.
Every --save-every steps, and on Ctrl-C or SIGTERM, all that the next step needs goes into a checkpoint; `--resume RUN`
goes on as if nothing had happened, bit for bit on a CPU (data and draws are functions of seed and step: no random state
is kept). Several GPUs share the problems of a step: `torchrun --nproc_per_node=4 train.py`. Left out: models in parts.
"""
import hashlib
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from cache import (DTYPES, eviction_size, everyone, first_line, free_folder, join, make_folder, model_folder,
                   pick_compile, pick_device, pick_dtype, ranks, replacing, say, write_json, write_safetensors)
from encoder import (KINDS, UPDATES, attach, command_line, fingerprint, flag, merge, run_config, run_script,
                     write_adapter)
from evaluate import Options, compare
from grpo import Health, train_step
from model import ModelConfig, Tokenizer, Transformer, UserError, read_folder
from rollout import ask, check_prompts, load_problems

REAL = dict(rank=32, global_tokens=32, group_size=8, micro_batch=0, lr=1e-5)
PRESETS = {"tiny": {},  # what differs from the defaults of Config
           "24gb": dict(window=256, max_new_tokens=1024, prompts=8, **REAL),
           "80gb": dict(window=1024, max_new_tokens=3072, prompts=32, **REAL)}


@dataclass
class Config:
    """Every setting, with its unit and default; the command line is made from these fields."""
    preset: str = flag("tiny", "defaults for: a CPU, a GPU of 24 GB, a GPU of 80 GB", tuple(PRESETS))
    model: str = flag("tiny", "'tiny' builds one; else a model folder, or id on the Hugging Face hub (owner/name)")
    data: str = flag("tally", "'tally', or a JSONL file of problem/question/prompt and answer")
    out: str = flag("", "run folder to write; default runs/MODEL-ADAPTER-SEED")
    adapter: str = flag("pte", "thought encoding, plain LoRA, or the paper's two ablations", KINDS)
    memory_update: str = flag("paper", "paper: the older, the fainter; sum: all evictions weigh alike", UPDATES)
    truncate_memory: int = flag(0, "evictions that the gradient reaches back, 0 for all", least=0)
    rank: int = flag(16, "R, rank of the adapter and width of the state", least=1)
    global_tokens: int = flag(16, "M, learnable queries of the thought encoder", least=1)
    alpha: float = flag(32.0, "the adapter's update is scaled by alpha / rank", least=0)
    window: int = flag(16, "W, thought tokens kept in the cache, 0 keeps all")
    evict_ratio: float = flag(0.25, "share of the window that leaves at once")
    max_new_tokens: int = flag(34, "longest completion, in tokens", least=1)
    prompts: int = flag(16, "N, problems a step", least=1)
    group_size: int = flag(16, "G, completions of each", least=2)
    steps: int = flag(200, "updates of the adapter", least=1)
    lr: float = flag(1e-3, "peak learning rate of AdamW", least=0)
    warmup: int = flag(10, "steps of rising learning rate; then it falls along a line to 10 %% of the peak", least=0)
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to this norm", least=0)
    micro_batch: int = flag(4096, "thoughts that are replayed at once, 0: as many as fit; changes memory, not results",
                            least=0)
    inner_epochs: int = flag(1, "updates per rollout; above 1 the clip acts", least=1)
    clip_low: float = flag(0.2, "the ratio is clipped below 1 - this", least=0)
    clip_high: float = flag(0.28, "and above 1 + this", least=0)
    kl_coef: float = flag(0.0, "weight of the KL to the base model with its full cache", least=0)
    loss: str = flag("grpo", "dr_grpo: no std, constant length; dapo: skip groups without spread, punish overlong ones",
                     ("grpo", "dr_grpo", "dapo"))
    overlong_buffer: int = flag(0, "dapo: tokens before max-new-tokens over which the punishment grows", least=0)
    base_steps: int = flag(350, "tiny: supervised steps that make the base model", least=1)
    test_problems: int = flag(500, "tiny: problems of each K in the table of arms, 0 for no table", least=0)
    sample_every: int = flag(20, "steps between records in samples.jsonl", least=1)
    save_every: int = flag(20, "steps between checkpoints; the two newest are kept", least=1)
    resume: str = flag("", "run folder that goes on where it stopped, with the flags that it began with")
    merge: str = flag("", "run folder of --adapter lora, to be written to --out as a model of its own")
    wandb: bool = flag(False, "send the metrics to Weights & Biases, too (pip install wandb)")
    seed: int = flag(0, "of the base, the data, the draws and the adapter", least=0)
    device: str = flag("auto", "auto: cuda, mps or cpu", ("auto", "cuda", "mps", "cpu"))
    compile: str = flag("auto", "one compiled function a token; auto: on a GPU only", ("auto", "on", "off"))
    dtype: str = flag("auto", "of the frozen weights; auto: bfloat16 on a GPU, else float32", ("auto", *DTYPES))


# ---------------------------------------------------------------------------------------------- the tiny world

TINY = {  # config.json
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 15, "hidden_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    "intermediate_size": 256, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 100.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 14}
COUNTS = (1, 2, 3)  # K, lists in a problem: the base learns all, GRPO trains on 1 and 2, the table shows all


def tally(K, rng, n=6):
    """One problem of K lists of n digits -> {"problem", "thought", "answer", "exact", "K"}."""
    lists = rng.integers(0, 10, (K, n))
    sums = lists.cumsum(axis=1) % 10
    walk = "".join("".join(f"{d}{s}" for d, s in zip(*pair)) + ";" for pair in zip(lists, sums))
    return {"problem": ",".join("".join(map(str, digits)) for digits in lists) + "=", "thought": walk,
            "answer": "".join(str(s[-1]) for s in sums), "exact": True, "K": K}


class LostLists:
    """Takes the place of a cache while the base is made: row b never sees lost[b] thoughts from start[b] on once they
    are over. So it learns not to be sure of what it cannot see (it guesses evenly, and guesses are what GRPO rewards);
    it learns nothing about carrying, for nothing that comes later has seen what is lost."""

    def __init__(self, start, lost):
        self.start, self.end = start[:, None, None, None], (start + lost)[:, None, None, None]  # (B, 1, 1, 1)

    def begin(self, T):
        queries, keys = torch.arange(T, device=self.start.device)[:, None], torch.arange(T, device=self.start.device)
        hidden = (keys >= self.start) & (keys < self.end) & (queries >= self.end)               # (B, 1, T, T)
        return keys[None], (keys <= queries) & ~hidden

    def write(self, layer, k, v):
        return k, v


def build_base(folder, steps, seed, device):
    """Trains the tiny base on gold thoughts, never under a window, and writes it as a Hugging Face folder."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    write_tiny_tokenizer(folder)
    tokenizer = Tokenizer.from_folder(folder)
    model = Transformer(ModelConfig(TINY)).to(device)
    for name, p in model.named_parameters():
        if p.dim() > 1:                                                         # residual branches start small
            scale = 0.4 if ".wo." in name or ".w2." in name else 1.0
            torch.nn.init.normal_(p, std=0.3 if "embedding" in name else scale * p.shape[1] ** -0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.5)
    bar = tqdm(range(steps), desc="base model, gold thoughts", file=sys.stderr)
    for step in bar:
        optimizer.zero_grad()
        counts, total_loss = rng.multinomial(128, [1 / 3] * 3), 0.0
        learnt = sum(n * (14 * K + 2) for K, n in zip(COUNTS, counts))          # tokens: thoughts, not problems
        for K, n in zip(COUNTS, counts):                                        # rows of one K have one length: no pads
            problems = [tally(K, rng) for _ in range(n)]
            texts = [p["problem"] + p["thought"] + "Answer:" + p["answer"] for p in problems]
            ids = torch.tensor([tokenizer.encode(text) + [TINY["eos_token_id"]] for text in texts], device=device)
            gone = rng.integers(K, size=n) * rng.integers(2, size=n)            # how many of the first lists are lost
            start = torch.full((n,), 7 * K, device=device)                      # where the thoughts begin
            lost = LostLists(start, torch.from_numpy(13 * gone).to(device))
            hidden = model.hidden(ids[:, :-1], lost)[:, 7 * K - 1:]             # (n, 21K + 1, C) -> (n, 14K + 2, C)
            logits = model.head(hidden).flatten(0, 1)                           # (n * (14K + 2), ids)
            loss = F.cross_entropy(logits, ids[:, 7 * K:].flatten(), reduction="sum") / learnt
            loss.backward()
            total_loss += loss.item()
        optimizer.param_groups[0]["lr"] = 6e-3 * min((step + 1) / 30, max(0.02, 1 - step / steps))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{total_loss:.3f}")
    write_json(folder / "config.json", TINY)
    write_safetensors(folder / "model.safetensors", model.tensors())            # last: where it is, the base is whole


def write_tiny_tokenizer(folder):
    """tokenizer.json of 15 ids: digits, `,` `=` `;`, and two added tokens, `Answer:` and the special `<|end|>`."""
    added = [{"id": 13, "content": "Answer:", "special": False}, {"id": 14, "content": "<|end|>", "special": True}]
    for token in added:
        token.update(single_word=False, lstrip=False, rstrip=False, normalized=False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate("0123456789,=;")}, "merges": []}}, indent=1))


# ---------------------------------------------------------------------------------------------- what is saved

def save(out, step, encoder, optimizer, health, files, config):
    """Writes out/checkpoint-STEP.pt, all that the next step needs, and the adapter; the two newest checkpoints stay.
    files {name: open file}: what has been written there so far belongs to the checkpoint. Raises OSError."""
    for file in files.values():
        os.fsync(file.fileno())
    state, buffer, path = {
        "step": step, "adapter": encoder.tensors(), "optimizer": optimizer.state_dict(), "health": asdict(health),
        "sizes": {name: file.tell() for name, file in files.items()}}, io.BytesIO(), out / f"checkpoint-{step:06}.pt"
    torch.save(state, buffer)
    with replacing(path) as file:                                               # torch.load does not see a flipped bit
        file.writelines([hashlib.sha256(buffer.getbuffer()).digest(), buffer.getbuffer()])
    others = set(out.glob("checkpoint-*.pt")) - {path}
    for other in others - {max((o for o in others if o < path), default=None)}:
        other.unlink()
    write_adapter(out, encoder, config)


def restore(out, encoder, optimizer, health):
    """Puts the newest sound checkpoint into encoder, optimizer and health -> its step and the sizes of the files then,
    (0, {}) if there is none yet. Raises UserError if all are damaged."""
    for path in (paths := sorted(out.glob("checkpoint-*.pt"), reverse=True)):
        try:
            data = path.read_bytes()
            if hashlib.sha256(data[32:]).digest() != data[:32]:
                raise ValueError("its checksum is another")
            state, tensors = torch.load(io.BytesIO(data[32:]), weights_only=True), encoder.tensors()
            if {n: x.shape for n, x in state["adapter"].items()} != {n: x.shape for n, x in tensors.items()}:
                raise ValueError("it is of another run")
            optimizer.load_state_dict(state["optimizer"])
            for name, tensor in tensors.items():
                tensor.copy_(state["adapter"][name])
            vars(health).update(state["health"])
            for newer in paths[:paths.index(path)] if ranks()[0] == 0 else ():  # out of the way, but not lost
                newer.rename(f"{newer}.damaged")
            return state["step"], state["sizes"]
        except Exception as error:  # a damaged file fails in many ways; each means that it is of no use
            say(f"{path} cannot be used ({first_line(error)}); trying the one before")
    if paths:
        raise UserError(f"{out}: no checkpoint there can be used; start anew with another --out")
    return 0, {}


def appending(path, size):
    """A file to add lines to, cut back to the size that the checkpoint knows. Raises UserError if it is shorter."""
    file = open(path, "ab")
    if file.tell() < size:
        raise UserError(f"{path} is shorter than it was when the checkpoint was written; start anew with another --out")
    file.truncate(size)
    return file


# ---------------------------------------------------------------------------------------------- the loop

def batches(c, problems):
    """Endless lists of c.prompts problems: the file's, shuffled anew each time round, or fresh tallies, three steps
    of two lists, then one of one list (rows of one step are of one length: none waits for another)."""
    rng, order = np.random.default_rng(c.seed + 1), []
    for step in itertools.count():
        if problems is None:
            yield [tally(1 if step % 4 == 3 else 2, rng) for _ in range(c.prompts)]
            continue
        while len(order) < c.prompts:
            order += rng.permutation(len(problems)).tolist()
        yield [problems[order.pop(0)] for _ in range(c.prompts)]


def check(c):
    """Raises UserError for settings that cannot work, before anything is written."""
    eviction_size(c.window, c.evict_ratio)
    pick_compile(c.compile, c.device)
    if c.adapter == "lora" and c.rank != c.global_tokens:
        raise UserError(f"--adapter lora wants --global-tokens equal to --rank ({c.rank}): its state is an identity")
    if (c.model == "tiny") != (c.data == "tally"):
        raise UserError(f"--model {c.model} --data {c.data}: the tiny model reads tally, others a file; give a model "
                        "folder and a JSONL file, or neither")
    if c.model == "tiny" and 14 + c.max_new_tokens > TINY["max_position_embeddings"]:
        raise UserError(f"--max-new-tokens {c.max_new_tokens} exceeds the tiny model's context of 4096; give less")
    if c.wandb and not find_spec("wandb"):
        raise UserError("--wandb: pip install wandb first, or leave it off; metrics.jsonl holds the same")


NOT_KEPT = ("resume", "merge")  # in config.json
FREE = ("steps", "save_every", "sample_every", "device", "compile", "wandb")  # may change on --resume


def settings_of(run):
    """The settings of a run that goes on: what it began with, and what may be given anew. Raises UserError."""
    saved, began = run_config(run), {name: value for name, value in asdict(Config()).items() if name not in NOT_KEPT}
    for name, value in began.items():
        if type(saved.get(name)) is not type(value):
            raise UserError(f"{run}/config.json: {name} is {saved.get(name, 'missing')}, no {type(value).__name__}; "
                            "write in what it was, or start anew")
    c = command_line(Config, __doc__, dict.fromkeys([*PRESETS, saved["preset"]], {name: saved[name] for name in began}))
    for name in began:
        if getattr(c, name) != saved[name] and name not in FREE or name == "steps" and c.steps < saved["steps"]:
            raise UserError(f"--{name.replace('_', '-')} {getattr(c, name)}: {run} has {saved[name]}, and goes on with "
                            f"it{' or more' * (name == 'steps')}; leave it out, or start anew with another --out")
    c.out = run
    return c


def main():
    c = command_line(Config, __doc__, PRESETS)
    if c.merge:
        return merge(c.merge, c.out)
    if c.resume:
        c = settings_of(c.resume)
    c.out = c.out or f"runs/{Path(c.model).name}-{c.adapter}-{c.seed}"
    check(c)
    device = pick_device(c.device)
    join(c.prompts, device)
    out, started, first = Path(c.out), time.time(), ranks()[0] == 0            # the first process alone writes
    if first and not c.resume:
        free_folder(c.out, "give another --out, or remove it, or go on with it: --resume")
    problems = None if c.data == "tally" else load_problems(c.data)
    settings = {name: value for name, value in asdict(c).items() if name not in NOT_KEPT}
    if first and c.model == "tiny":
        make_folder(out)
        if not c.resume:
            write_json(out / "config.json", settings)
        if not (out / "base" / "model.safetensors").exists():
            build_base(out / "base", c.base_steps, c.seed, device)
    everyone("there is a base")
    folder = out / "base" if c.model == "tiny" else model_folder(c.model)
    tokenizer = Tokenizer.from_folder(folder)
    model = Transformer.from_folder(folder, dtype=pick_dtype(c.dtype, device), device=device)
    if problems:
        check_prompts(model, [ask(tokenizer, p["problem"]) for p in problems], c.max_new_tokens)
        make_folder(out)
    torch.manual_seed(c.seed)
    encoder, health = attach(model, asdict(c)), Health(c.micro_batch)
    optimizer = torch.optim.AdamW(encoder.trainable().values(), lr=c.lr, betas=(0.8, 0.99), weight_decay=0.0)
    settings |= {"fingerprint": fingerprint(read_folder(folder)),               # of the model that the adapter bends
                 "problems": hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:16]}
    start, sizes, files = 0, {}, {}
    if c.resume:
        for name, what in (("fingerprint", folder), ("problems", f"--data {c.data}")):
            if settings[name] != run_config(out).get(name, settings[name]):
                raise UserError(f"{what} is not what it was when {out} began; put back what was there, or start anew")
        start, sizes = restore(out, encoder, optimizer, health)
    if first:
        files = {name: appending(out / name, sizes.get(name, 0)) for name in ("metrics.jsonl", "samples.jsonl")}
        write_json(out / "config.json", settings)
        if start:
            write_adapter(out, encoder, settings)                               # it was killed before that, perhaps
        for old in [*out.glob("*.tmp"), *(out.glob("table.*") if start < c.steps else ())]:
            old.unlink()                                                        # half a file; a table of fewer steps
        say(f"{c.adapter} on {folder}: {sum(p.numel() for p in encoder.trainable().values()):,} trained numbers, "
            f"window {c.window}, {c.prompts} x {c.group_size} rollouts a step, {device}; all goes to {out}"
            + f", from step {start + 1} on" * bool(c.resume))
    stopped = train(c, start, model, encoder, tokenizer, optimizer, problems, health, files, settings)
    if ranks()[1] > 1:
        dist.destroy_process_group()
    if first and stopped:
        print(f"stopped after step {stopped} of {c.steps}; go on with: python train.py --resume {out}", flush=True)
    elif first:
        if c.model == "tiny" and c.test_problems:
            table_of_arms(c, out)
        print(f"done in {(time.time() - started) / 60:.1f} minutes; look into {out}", file=sys.stderr)


def train(c, start, model, encoder, tokenizer, optimizer, problems, health, files, settings):
    """The steps from `start` on. Ctrl-C and SIGTERM end it after the step that runs, with a checkpoint -> the number of
    that step, or None if all steps are done. files are those of the first process. Raises UserError."""
    signals, tracker = [], None
    if c.wandb and files:
        import wandb
        tracker = wandb.init(project="nanopte", name=Path(c.out).name, config=settings)

    def stop(number, frame):
        if signals:
            raise KeyboardInterrupt                                             # asked twice: now
        signals.append(number)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        bar = tqdm(range(start, c.steps), desc="GRPO", file=sys.stderr, initial=start, total=c.steps, disable=not files)
        for step, batch in zip(bar, itertools.islice(batches(c, problems), start, None)):
            metrics, samples = train_step(c, step, model, encoder, tokenizer, optimizer, batch, health)
            over = any(everyone(bool(signals)))
            if files:
                numbers = {name: x if x is None or math.isfinite(x) else None for name, x in metrics.items()}  # JSON
                some = samples if step % c.sample_every == 0 or step + 1 == c.steps else []
                for name, records in ("metrics.jsonl", [numbers]), ("samples.jsonl", some):
                    files[name].write("".join(json.dumps(record) + "\n" for record in records).encode())
                    files[name].flush()
                bar.set_postfix_str(f"reward {metrics['reward']:.3f}, {metrics['response_tokens']:.0f} tokens, "
                                    f"logp_gap {metrics['logp_gap']:.0e}, {metrics['tokens_per_second']:.0f} tokens/s")
                if tracker:
                    tracker.log(metrics, step=metrics["step"])
                if over or (step + 1) % c.save_every == 0 or step + 1 == c.steps:
                    save(Path(c.out), step + 1, encoder, optimizer, health, files, settings)
            if over:
                return step + 1
    except OSError as error:  # a disk that is full, or gone
        raise UserError(f"{error.filename or c.out}: {error.strerror}; make room, then go on from the last checkpoint: "
                        f"python train.py --resume {c.out}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def table_of_arms(c, out):
    """Writes fresh problems of each K as files, and measures base and adapter on them, as `python evaluate.py` does."""
    rng, files = np.random.default_rng(1_000_000 + c.seed), []                  # not the problems trained on
    for K in COUNTS:
        files.append(str(out / f"tally-{K}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps(tally(K, rng)) + "\n" for _ in range(c.test_problems)))
    windows = (0, c.window) if c.window else (0,)
    print(compare(Options(runs=(str(out),), data=tuple(files), window=windows, max_new_tokens=64, batch=c.test_problems,
                          device=c.device, dtype=c.dtype, compile=c.compile, json=str(out / "table.json")))[0])


if __name__ == "__main__":
    run_script(main)
