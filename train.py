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
Left out: several GPUs, resuming a run.
"""
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cache import eviction_size
from encoder import (DTYPES, KINDS, UPDATES, attach, command_line, fingerprint, flag, model_folder, pick_compile,
                     pick_device, pick_dtype, run_script)
from evaluate import Options, compare, grade
from grpo import backward, group_advantages, largest_micro_batch, micro_batches, overlong_penalty
from model import FILE_DTYPES, ModelConfig, Tokenizer, Transformer, UserError, read_folder, reading
from rollout import ask, check_prompts, generate, load_problems

PRESETS = {  # what differs from the defaults of Config
    "tiny": {},
    "24gb": dict(rank=32, global_tokens=32, window=256, max_new_tokens=1024, prompts=8, group_size=8, micro_batch=0,
                 steps=200, lr=1e-5),
    "80gb": dict(rank=32, global_tokens=32, window=1024, max_new_tokens=3072, prompts=32, group_size=8, micro_batch=0,
                 steps=200, lr=1e-5),
}


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
    write_safetensors(folder / "model.safetensors", model.tensors())
    (folder / "config.json").write_text(json.dumps(TINY, indent=1))


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


def write_safetensors(path, tensors):
    """Writes {name: tensor}; `path` changes only once all is written. Raises UserError."""
    header, end, kinds = {"__metadata__": {"format": "pt"}}, 0, {dtype: kind for kind, dtype in FILE_DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # wide dtypes first: all are aligned
    for name in order:
        first, end = end, end + tensors[name].nbytes
        header[name] = dict(dtype=kinds[tensors[name].dtype], shape=[*tensors[name].shape], data_offsets=[first, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with reading(path, "make room, or pick another folder"):
        with open(f"{path}.tmp", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:  # as bytes, for numpy has no bfloat16
                file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        Path(f"{path}.tmp").replace(path)


# ---------------------------------------------------------------------------------------------- the loop


def learning_rate(step, c):
    """Rises for `warmup` steps, then falls along a line to 10 % of the peak."""
    return c.lr * min((step + 1) / max(c.warmup, 1), 1 - 0.9 * step / c.steps)


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


def peak_memory_mb(device):
    """The most memory that was in use, in MB (10^6 bytes): of the GPU in this step; on a CPU, of this process so far
    (None on Windows, which does not tell)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def train_step(c, step, model, encoder, tokenizer, optimizer, problems):
    """One step of GRPO: roll out, reward, replay, update. Returns the line for metrics.jsonl, and sample records."""
    start, device = time.time(), model.embedding.weight.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    prompts = [ask(tokenizer, p["problem"]) for p in problems]
    rollout = generate(model, encoder, prompts, c.group_size, max_new_tokens=c.max_new_tokens, window=c.window,
                       evict_ratio=c.evict_ratio, n_ids=tokenizer.n_ids, seed=c.seed * 1_000_003 + step,
                       compile=pick_compile(c.compile, c.device),
                       progress="" if c.model == "tiny" else f"step {step + 1}: rollout")
    texts = [tokenizer.decode([i for i in ids if i not in model.config.eos_ids]) for ids in rollout.completions()]
    correct = torch.tensor([float(grade(problems[b // c.group_size], text)[1]) for b, text in enumerate(texts)],
                           device=device)
    rewards = correct * rollout.ended if c.data == "tally" else correct
    if c.loss == "dapo":
        rewards = rewards + overlong_penalty(rollout.lengths, c.max_new_tokens, c.overlong_buffer)
    advantages = group_advantages(rewards, c.group_size, use_std=c.loss != "dr_grpo")
    counted = rollout.lengths[advantages != 0] if c.loss == "dapo" else rollout.lengths
    total = len(texts) * c.max_new_tokens if c.loss == "dr_grpo" else max(int(counted.sum()), 1)

    if not c.micro_batch:
        c.micro_batch = largest_micro_batch(model, encoder, rollout, c.truncate_memory)
        print(f"--micro-batch {c.micro_batch} is the largest that fits", file=sys.stderr)
    batches_of_rows = micro_batches(rollout, advantages, c.micro_batch, everything=c.kl_coef > 0)
    tokens = sum(int(rollout.lengths[rows].sum()) for rows in batches_of_rows)
    gap = 0.0
    for epoch in range(c.inner_epochs):
        optimizer.zero_grad()
        parts = [backward(model, encoder, rollout, advantages, rows, total=total, clip_low=c.clip_low,
                          clip_high=c.clip_high, kl_coef=c.kl_coef, truncate=c.truncate_memory)
                 for rows in batches_of_rows]
        if epoch == 0:                                                          # before the first update
            gap = max(part["gap"] for part in parts)
        grad_norm = torch.nn.utils.clip_grad_norm_(encoder.trainable().values(), c.max_grad_norm).item()
        optimizer.param_groups[0]["lr"] = learning_rate(step, c)
        optimizer.step()
    seconds = time.time() - start
    metrics = {
        "step": step + 1, "reward": rewards.mean().item(), "accuracy": correct.mean().item(),
        "response_tokens": rollout.lengths.float().mean().item(), "truncated": 1 - rollout.ended.float().mean().item(),
        "evictions": rollout.evictions().float().mean().item(), "loss": sum(part["loss"] for part in parts),
        "grad_norm": grad_norm, "logp_gap": gap, "ratio_clipped": sum(part["clipped"] for part in parts) / tokens,
        "kl": sum(part["kl"] for part in parts) / tokens, "tokens_per_second": int(rollout.lengths.sum()) / seconds,
        "peak_memory_mb": peak_memory_mb(device.type), "seconds": seconds}
    samples = [{"step": step + 1, "prompt": problems[b // c.group_size]["problem"], "response": texts[b],
                "answer": problems[b // c.group_size]["answer"], "reward": rewards[b].item()}
               for b in range(0, min(len(texts), 4 * c.group_size), c.group_size)]
    return metrics, samples


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
        raise UserError(f"--max-new-tokens {c.max_new_tokens} exceeds the tiny model's context of "
                        f"{TINY['max_position_embeddings']} with its problem of 14; give less")
    if Path(c.out).exists() and not (Path(c.out).is_dir() and not any(Path(c.out).iterdir())):
        raise UserError(f"{c.out} already holds a run, or something else; give another --out, or remove it")


def make_folder(path):
    """Makes the run folder. Raises UserError if that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path} ({error.strerror}); give another --out") from None


def main():
    c = command_line(Config, __doc__, PRESETS)
    c.out = c.out or f"runs/{Path(c.model).name}-{c.adapter}-{c.seed}"
    check(c)
    device = pick_device(c.device)
    out, started = Path(c.out), time.time()
    problems = None if c.data == "tally" else load_problems(c.data)
    if c.model == "tiny":
        make_folder(out)
        build_base(out / "base", c.base_steps, c.seed, device)
    folder = out / "base" if c.model == "tiny" else model_folder(c.model)
    tokenizer = Tokenizer.from_folder(folder)
    model = Transformer.from_folder(folder, dtype=pick_dtype(c.dtype, device), device=device)
    if problems:
        check_prompts(model, [ask(tokenizer, p["problem"]) for p in problems], c.max_new_tokens)
        make_folder(out)
    torch.manual_seed(c.seed)
    encoder = attach(model, asdict(c))
    trainable = encoder.trainable()
    optimizer = torch.optim.AdamW(trainable.values(), lr=c.lr, betas=(0.8, 0.99), weight_decay=0.0)
    settings = asdict(c) | {"fingerprint": fingerprint(read_folder(folder))}    # of the model that the adapter bends
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{c.adapter} on {folder}: {sum(p.numel() for p in trainable.values()):,} trained numbers, window "
          f"{c.window}, {c.prompts} x {c.group_size} rollouts a step, {device}; all goes to {out}", file=sys.stderr)

    with open(out / "metrics.jsonl", "w") as metrics_file, open(out / "samples.jsonl", "w") as samples_file:
        bar = tqdm(range(c.steps), desc="GRPO", file=sys.stderr)
        for step, batch in zip(bar, batches(c, problems)):
            metrics, samples = train_step(c, step, model, encoder, tokenizer, optimizer, batch)
            print(json.dumps(metrics), file=metrics_file, flush=True)
            if step % c.sample_every == 0 or step + 1 == c.steps:
                for record in samples:
                    print(json.dumps(record), file=samples_file, flush=True)
            bar.set_postfix_str(f"reward {metrics['reward']:.3f}, {metrics['response_tokens']:.0f} tokens, "
                                f"logp_gap {metrics['logp_gap']:.0e}, {metrics['tokens_per_second']:.0f} tokens/s")
    write_safetensors(out / "adapter.safetensors", {name: p.detach() for name, p in trainable.items()})
    if c.model == "tiny" and c.test_problems:
        table_of_arms(c, out)
    print(f"done in {(time.time() - started) / 60:.1f} minutes; look into {out}", file=sys.stderr)


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
