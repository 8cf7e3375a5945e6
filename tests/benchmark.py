"""benchmark.py: how fast this machine decodes and trains, and what memory that takes.

Six sections: (1) decode tokens/s; (2) against transformers' generate, same weights, in the same process; (3) time per
token after n tokens; (4) memory and (5) time of a training step; (6) bytes a decode step must read over its time, as a
share of the copy bandwidth. Each is a markdown table, all numbers go to a JSON file. Shapes are of real models, weights
random unless --model gives a folder's. Arms take turns (A B C A B C) after one untimed warm-up of each; figures are
medians over the turns, ratios medians of each turn's ratio. (3 and 4 run once: 3 takes medians on its way, 4 counts.)

Try it:  python tests/benchmark.py --shape smollm2-135m
"""
import copy
import gc
import json
import sys
import tempfile
import time
import weakref
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cache import DTYPES, eviction_size, pick_device, pick_dtype
from encoder import ThoughtEncoder, command_line, flag, model_folder, run_script
from grpo import backward
from model import ModelConfig, Transformer, UserError, read_json
from rollout import generate

P, R, ALL = 32, 32, 999                                                         # tokens of a prompt; rank; all layers
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "intermediate_size", "rope_theta", "tie_word_embeddings", "model_type")
SHAPES = {
    "tiny": (256, 64, 2, 4, 2, 128, 1e4, False, "qwen2"),
    "smollm2-135m": (49152, 576, 30, 9, 3, 1536, 1e5, True, "llama"),
    "qwen2.5-0.5b": (151936, 896, 24, 14, 2, 4864, 1e6, True, "qwen2"),
    "qwen2.5-3b": (151936, 2048, 36, 16, 2, 11008, 1e6, True, "qwen2"),
    "qwen2.5-7b": (152064, 3584, 28, 28, 4, 18944, 1e6, False, "qwen2"),
    "llama-8b": (128256, 4096, 32, 32, 8, 14336, 5e5, False, "llama")}
BY_DEVICE = {  # what flags left at 0 or empty mean; all five sections should end in a quarter hour on 2 CPU cores
    "cpu": dict(sections=(1, 2, 3, 4, 5), lengths=(1024, 4096, 16384), train_lengths=(1024, 2048, 4096, 16384),
                new_tokens=36, step_tokens=96, layers=2, full_length=4096),
    "cuda": dict(sections=(1, 2, 3, 4, 5, 6), lengths=(1024, 4096, 16384, 65536), train_lengths=(1024, 4096, 16384),
                 new_tokens=256, step_tokens=3072, layers=ALL, full_length=16384)}


@dataclass
class Options:
    """The flags; after `options` device and dtype are those of PyTorch, and none is left open."""
    shape: str = flag("smollm2-135m", "sizes of a model, with random weights", tuple(SHAPES))
    model: str = flag("", "model folder in place of --shape (random weights still where layers are cut)")
    sections: tuple[int, ...] = flag((), "what to measure; all by default, 6 on a GPU only", least=1)
    rows: tuple[int, ...] = flag((1, 8, 16, 32), "rows of a batch (sections 1, 2, 6)", least=1)
    window: int = flag(256, "W, thoughts kept; fewer where else none would leave (sections 1, 2, 5)", least=4)
    new_tokens: int = flag(0, "tokens made in sections 1 and 2 (CPU 36, GPU 256)", least=0)
    long_tokens: int = flag(1024, "tokens made in section 2 by 1 row under the window", least=6)
    lengths: tuple[int, ...] = flag((), "tokens made in section 3 (1024 4096 16384, GPU 65536 too)", least=1)
    train_lengths: tuple[int, ...] = flag((), "tokens of a training step in section 4 (1024 to 16384)", least=2)
    full_length: int = flag(0, "longest run without PTE in sections 3 and 4 (CPU 4096, GPU 16384)", least=0)
    layers: int = flag(0, "layers kept of the shape in sections 3 and 4 (CPU 2, GPU all)", least=0)
    step_tokens: int = flag(0, "tokens made in section 5 (CPU 96, GPU 3072)", least=0)
    group_size: int = flag(8, "rollouts in section 5", least=1)
    micro_batch: int = flag(1, "of them replayed at once", least=1)
    repeats: int = flag(3, "turns", least=1)
    compile: bool = flag(False, "compile the decode step")
    threads: int = flag(0, "of PyTorch on the CPU, 0 leaves it alone", least=0)
    dtype: str = flag("auto", "of the weights; auto: bfloat16 on a GPU, else float32", ("auto", *DTYPES))
    device: str = flag("auto", "auto: cuda, mps or cpu", ("auto", "cuda", "mps", "cpu"))
    json: str = flag("", "file of all numbers, default runs/benchmark-SHAPE.json")


# ---- what the sections share -----------------------------------------------------------------------------------------
def raw_config(o, layers=ALL):
    """config.json of the shape or folder, with no end token and a context that no length exceeds."""
    raw = dict(zip(SIZES, SHAPES[o.shape])) if not o.model else read_json(Path(model_folder(o.model), "config.json"))
    return raw | {"num_hidden_layers": min(layers, raw["num_hidden_layers"]), "max_position_embeddings": 1 << 17,
                  "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def build(o, layers=ALL, folder=""):
    """A frozen model: of the folder, or else of --model; of random weights without one, or if layers are cut."""
    gc.collect()                                                                # the last section's model
    config, folder = ModelConfig(raw_config(o, layers)), folder or model_folder(o.model)
    if folder and config.n_layers == raw_config(o)["num_hidden_layers"]:
        model = Transformer.from_folder(folder, o.dtype, o.device)
        model.config.eos_ids, model.config.max_positions = [], config.max_positions  # rollouts of a fixed length
        return model
    torch.set_default_dtype(o.dtype)                                            # never a float32 copy of 7B weights
    with torch.device(o.device):
        model = Transformer(config)
    torch.set_default_dtype(torch.float32)
    for name, p in model.named_parameters():
        torch.nn.init.ones_(p) if name.endswith("norm.weight") else torch.nn.init.normal_(p, std=0.02)
    return model.requires_grad_(False)


def adapted(o, model, kind):
    """(model, encoder): the same weights, not copied, in a model of their own that carries an adapter; "" for none."""
    own = copy.deepcopy(model, {id(p): p for p in model.parameters()})          # what is in the memo is not copied
    return own, ThoughtEncoder(own, kind, R, R, R, "paper").to(o.device) if kind else None


def now(o):
    """The time, in seconds, once the device has done all it was given."""
    if o.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def roll(o, arm, prompts, group_size, tokens, window, temperature=1.0, marks=()):
    """A Rollout by arm (model, encoder), and the times at which so many tokens of a row (marks) were there."""
    ids, times, count = torch.arange(prompts * P).view(prompts, P) % arm[0].config.vocab_size, [], 0

    def on_token(drawn, evicted):
        nonlocal count
        if (count := count + 1) in marks:
            times.append(now(o))
    return generate(*arm, ids.tolist(), group_size, max_new_tokens=tokens, window=window, temperature=temperature,
                    compile=o.compile, on_token=on_token), times


def turns(o, run, jobs, tokens):
    """jobs {name: arguments} -> [{name: run(tokens, *arguments)}], one for each turn."""
    if o.compile:
        torch.compiler.reset()                                                  # it gives up after a few shapes
    for job in jobs.values():  # the warm-up is a whole run where it has shapes to compile; else a few tokens will do
        run(tokens if o.compile or o.device == "cuda" else min(tokens, 8), *job)
    return [{name: run(tokens, *job) for name, job in jobs.items()} for _ in range(o.repeats)]


def middle(done, name, over=None):
    """The median of an arm over the turns; with `over`, of its ratio to that arm in the same turn."""
    return median(turn[name] / (turn[over] if over else 1) for turn in done)


def peak_of(o, run):
    """(result, the GPU's peak in MB); None for the peak without a GPU, for both if its memory ran out."""
    if o.device != "cuda":
        return run(), None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        return run(), torch.cuda.max_memory_allocated() / 1e6
    except torch.OutOfMemoryError:
        return None, None


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """As a context: `peak`, the most bytes of distinct storages that autograd held at once, parameters and ids (int64)
    left out: those are there anyway."""
    def __init__(self, parameters):
        super().__init__(self.pack, lambda box: box())
        self.left_out, self.users = {p.untyped_storage().data_ptr() for p in parameters}, Counter()
        self.held = self.peak = 0

    def pack(self, x):
        box, key, size = lambda: x, x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        if x.dtype != torch.int64 and key not in self.left_out:
            self.count(key, size, 1)
            weakref.finalize(box, self.count, key, size, -1)                    # a box dies with its graph
        return box

    def count(self, key, size, change):
        self.users[key] += change
        self.held += size * change * (self.users[key] == max(change, 0))        # the first to hold it, or the last
        self.peak = max(self.peak, self.held)


# ---- the sections: the docstring is printed, what is returned is its table -------------------------------------------
def decode(o, model, kinds, windows, tokens, first):
    """Table of the speed from a row's token `first` on; kinds {name: adapter}."""
    arms, table = {name: adapted(o, model, kind) for name, kind in kinds.items()}, []

    def rate(tokens, arm, rows, window):
        start, end = roll(o, arm, 1, rows, tokens, window, marks=(min(first, tokens - 1), tokens))[1]
        return rows * (tokens - min(first, tokens - 1)) / (end - start)
    for rows in o.rows:
        jobs = {(name, window): (arms[name], rows, window) for window in windows for name in kinds}
        done = turns(o, rate, jobs, tokens)
        table += [{"rows": rows, "window": window or "full", "adapter": name, "tokens/s": middle(done, (name, window)),
                   "to no adapter": middle(done, (name, window), ("none", window))} for name, window in jobs]
    return table


def section_1(o):
    """Decoding {o.new_tokens} tokens a row: tokens/s of all rows, and over those without an adapter."""
    W = min(o.window, o.new_tokens // 6 * 4)
    return decode(o, build(o), {"none": "", "LoRA": "lora", "PTE": "pte"}, (0, W), o.new_tokens, first=1)


def section_2(o):
    """Against transformers' generate (full cache), greedy, time of the prompt included: tokens/s, ratio, and the rows
    that have the same tokens to the end (float32: all)."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed; pip install transformers")
        return []
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:                               # the same weights for both
        if not o.model:
            raw = raw_config(o)
            config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
            torch.manual_seed(0)
            with torch.device(o.device):
                transformers.AutoModelForCausalLM.from_config(config, dtype=o.dtype).save_pretrained(folder)
        where = model_folder(o.model) if o.model else folder
        ours = build(o, folder=where), None
        theirs = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=o.dtype).to(o.device)
    theirs.generation_config.eos_token_id, made, table = None, {}, []

    def rate(tokens, name, rows, window):
        start = now(o)
        if name == "here":
            made[name] = roll(o, ours, rows, 1, tokens, window, temperature=0)[0]
        else:
            ids = made["here"].prompt_ids
            made[name] = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                                         min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return rows * tokens / (now(o) - start)
    for rows, tokens, window in (*((rows, o.new_tokens, 0) for rows in o.rows),
                                 (1, o.long_tokens, min(o.window, o.long_tokens // 6 * 4))):
        done = turns(o, rate, {name: (name, rows, window) for name in ("here", "there")}, tokens)
        same = None if window else int((made["here"].tokens == made["there"][:, P:]).all(dim=1).sum())
        table.append({"rows": rows, "window here": window or "full", "tokens": tokens, "here": middle(done, "here"),
                      "transformers": middle(done, "there"), "ratio": middle(done, "here", "there"), "same": same})
    return table


def section_3(o):
    """Time per token, 1 row, window {o.window}, {o.layers} layers: ms, the median of 8 stretches of W/4 tokens before
    that length (under the window each has one eviction); one rollout an arm."""
    model, E, table = build(o, o.layers), eviction_size(o.window, 0.25), []
    for name, kind, window in (("PTE, window", "pte", o.window), ("none, window", "", o.window), ("none, full", "", 0)):
        lengths = [n for n in sorted(o.lengths) if kind or n <= o.full_length] or [min(o.lengths)]
        marks = range(E, max(lengths) + 1, E)                                   # from mark to mark: one eviction
        _, times = roll(o, adapted(o, model, kind), 1, 1, max(lengths), window, marks=marks)
        ms = [1000 * (b - a) / E for a, b in zip(times, times[1:])]             # [i]: of the E tokens up to (i + 2) * E
        last = {n: median(ms[n // E - 9:n // E - 1]) for n in lengths}
        table += [{"arm": name, "after tokens": n, "ms a token": last[n], "to the first": last[n] / last[lengths[0]]}
                  for n in lengths]
    return table


def section_4(o):
    """Memory of a training step, 1 row, window {o.window}, {o.layers} layers: MB (10^6 bytes) that autograd keeps at
    most, and the GPU's peak with the weights (-: no GPU, or its memory ran out)."""
    model, table = build(o, o.layers), []
    for name, kind, window, truncate in (("LoRA, full cache", "lora", 0, 0), ("PTE, whole chain", "pte", o.window, 0),
                                         ("PTE, truncate 1", "pte", o.window, 1)):
        first, (own, encoder) = None, adapted(o, model, kind)
        short, _ = roll(replace(o, compile=False), (own, encoder), 1, 1, 6, window)
        row = torch.tensor([0], device=o.device)

        def replay(T):  # of made-up thoughts: nothing in a step's memory depends on which they are
            r = replace(short, tokens=torch.randint(model.config.vocab_size, (1, T)).to(o.device), lengths=row + T,
                        logps=torch.zeros(1, T, device=o.device))
            with (saved := Saved([*own.parameters(), *encoder.parameters()])):
                backward(own, encoder, r, row + 1.0, row, total=T, truncate=truncate)
            return saved.peak / 1e6
        for T in [n for n in sorted(o.train_lengths) if window or n <= o.full_length]:
            saved, peak = peak_of(o, lambda: replay(T))
            first = first or saved
            table.append({"arm": name, "tokens": T, "saved MB": saved, "to the first": saved and saved / first,
                          "peak MB": peak})
            encoder.zero_grad()
    return table


def section_5(o):
    """A training step, 1 prompt, {o.group_size} rollouts of {o.step_tokens} tokens, micro-batch {o.micro_batch}:
    seconds, tokens/s of all, the GPU's peak with the weights and both adapters (-: no GPU, or its memory ran out)."""
    model, W, jobs, table = build(o), min(o.window, o.step_tokens // 6 * 4), {}, []

    def step(tokens, arm, window, optimizer):
        times = [now(o)]
        r, _ = roll(o, arm, 1, o.group_size, tokens, window)
        times.append(now(o))
        advantages = torch.linspace(-1, 1, o.group_size, device=o.device)
        for rows in torch.arange(o.group_size, device=o.device).split(o.micro_batch):
            backward(*arm, r, advantages, rows, total=o.group_size * tokens)
        times.append(now(o))
        optimizer.step()
        optimizer.zero_grad()
        times.append(now(o))
        return [b - a for a, b in zip(times, times[1:])] + [times[-1] - times[0]]
    for name, kind, window in (("LoRA, full cache", "lora", 0), (f"PTE, window {W}", "pte", W)):
        arm = adapted(o, model, kind)
        jobs[name] = arm, window, torch.optim.AdamW(arm[1].trainable().values(), lr=1e-5)
    done = turns(o, lambda *job: peak_of(o, lambda: step(*job)), jobs, o.step_tokens)
    for name in jobs:
        seconds, peaks = zip(*(turn[name] for turn in done))
        parts = [median(part) for part in zip(*seconds)] if all(seconds) else [None] * 4
        table.append({"arm": name, **dict(zip(("rollout s", "replay s", "update s"), parts)),
                      "tokens/s": parts[3] and o.group_size * o.step_tokens / parts[3],
                      "peak MB": max(peaks) if all(peaks) else None})
    return table


def section_6(o):
    """Reading, window {o.window} full: MB of weights, keys and values that a step must read, these over its time, and
    as a share of the bandwidth of copying (bytes read and written)."""
    x = torch.ones(1 << 30 if o.device == "cuda" else 1 << 28, dtype=torch.uint8, device=o.device)  # no cache holds it
    copying = Timer("y.copy_(x)", globals={"x": x, "y": x.clone()}, num_threads=torch.get_num_threads())
    bandwidth, model, E = 2 * x.nbytes / copying.blocked_autorange().median, build(o), eviction_size(o.window, 0.25)
    c, weights = model.config, sum(p.nbytes for p in model.parameters())
    weights -= 0 if c.tied else model.embedding.weight.nbytes                   # of which a step reads a line a row
    table = decode(o, model, {"none": "", "PTE": "pte"}, (o.window,), o.window + 4 * E, first=o.window + 2 * E)
    for row in table:
        cached = row["rows"] * (P + o.window) * c.n_layers * 2 * c.n_kv_heads * c.head_dim * o.dtype.itemsize
        rate = (weights + cached) * row["tokens/s"] / row["rows"]
        row |= {"read MB": (weights + cached) / 1e6, "GB/s": rate / 1e9, "copy GB/s": bandwidth / 1e9,
                "share %": 100 * rate / bandwidth}
    return table


# ---- the script ------------------------------------------------------------------------------------------------------
def options(argv=None):
    """The flags, with what the device decides filled in. Raises UserError for what cannot be measured."""
    o = command_line(Options, __doc__, argv=argv)
    o.device, E = pick_device(o.device), eviction_size(o.window, 0.25)
    o.dtype, preset = pick_dtype(o.dtype, o.device), BY_DEVICE["cuda" if o.device == "cuda" else "cpu"]
    o.lengths = o.lengths or tuple(n for n in preset["lengths"] if n >= 4 * o.window) or (4 * o.window,)
    for name, value in preset.items():
        setattr(o, name, getattr(o, name) or value)
    o.layers = min(o.layers, raw_config(o)["num_hidden_layers"])
    o.json = o.json or f"runs/benchmark-{Path(o.model).name or o.shape}.json"
    if wrong := [n for n in o.lengths if n % E or n < 4 * o.window]:            # so its last 2 W saw a full window
        raise UserError(f"--lengths {wrong[0]}: give multiples of {E}, from {4 * o.window} on, or another --window")
    if max(o.sections) > 6 or min(o.new_tokens, o.step_tokens) < 6:
        raise UserError("--sections go from 1 to 6, --new-tokens and --step-tokens from 6 on")
    return o


def markdown(table):
    """Rows (dicts with the same keys) as a markdown table, numbers to 4 digits."""
    def cell(x):
        return "-" if x is None else str(x) if type(x) is not float else f"{x:.0f}" if x >= 1000 else f"{x:.4g}"
    lines = [table[0], ["---"] * len(table[0]), *(map(cell, row.values()) for row in table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    o = options()
    torch.set_num_threads(o.threads or torch.get_num_threads())
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = info.partition("model name")[2].partition(":")[2].partition("\n")[0].strip() or "CPU"
    dtype, gpu = str(o.dtype)[6:], torch.cuda.get_device_name() if o.device == "cuda" else "no GPU"
    machine = (f"{cpu}, {torch.get_num_threads()} threads, {gpu}, torch {torch.__version__}, {dtype}, "
               f"{Path(o.model).name or o.shape}, decode step {'compiled' if o.compile else 'not compiled'}")
    result = {"machine": machine, "options": asdict(o) | {"dtype": dtype}, "sections": {}}
    print(machine)
    for number in sorted(set(o.sections)):
        section = globals()[f"section_{number}"]
        print(f"\n{number}. {' '.join(section.__doc__.format(o=o).split())}\n", flush=True)
        table = result["sections"][str(number)] = section(o)
        print(markdown(table) if table else "", flush=True)
        Path(o.json).parent.mkdir(parents=True, exist_ok=True)
        Path(o.json).write_text(json.dumps(result, indent=1) + "\n")            # after each section: some take long
    print(f"all numbers are in {o.json}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
