"""benchmark.py: how fast this machine decodes and trains, and how much memory that takes.

What is compared takes turns (A B C A B C), after one run of each that does not count. Numbers are
medians over the turns. Without --model the model is the tiny shape with random weights.

Left out: the quality of the responses, several GPUs, prompts of mixed length.

Try it:  python tests/benchmark.py --sections 4 --json training.json
"""
import sys
import tempfile
import time
import weakref
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from encoder import attach
from grpo import grpo_step, replay_and_backward
from model import (ArgumentParser, ModelConfig, Transformer, model_folder, pick_device, pick_dtype,
                   run_script, write_json, write_safetensors)
from rollout import generate

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
         "intermediate_size", "vocab_size", "model_type")
SHAPES = {"tiny": (2, 128, 4, 2, 384, 256, "qwen2"),
          "smollm2-135m": (30, 576, 9, 3, 1536, 49152, "llama"),
          "qwen2.5-0.5b": (24, 896, 14, 2, 4864, 151936, "qwen2"),
          "qwen2.5-3b": (36, 2048, 16, 2, 11008, 151936, "qwen2")}
PROMPT = list(range(32))

def write_random_model(folder, shape):
    """Writes a model folder with random weights. Returns the folder."""
    config = dict(zip(SIZES, SHAPES[shape]), max_position_embeddings=4096, tie_word_embeddings=True)
    with torch.device("meta"):                                  # shapes without weights
        shapes = Transformer(ModelConfig(config)).tensors()
    weights = {name: 0.1 * torch.randn(x.shape).bfloat16() for name, x in shapes.items()}
    write_json(Path(folder, "config.json"), config)
    write_safetensors(Path(folder, "model.safetensors"), weights)
    return folder

def load(args, adapter=None):
    """(model, its encoder or None). No token ends a response, and no response is too long."""
    model = Transformer.from_folder(args.model, args.dtype, args.device)
    model.config.eos_ids = []
    model.config.max_positions = sys.maxsize
    return model, attach(model, adapter) if adapter else None

def take_turns(jobs, repeats):
    """Runs jobs {name: function} in turns. Returns {name: median seconds}."""
    seconds = {name: [] for name in jobs}
    for _ in range(1 + repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()                        # wait until the GPU has done it
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values[1:]) for name, values in seconds.items()}

def compare_rates(args, arms):
    """arms {name: function of prompts} -> table of tokens per second of all rows."""
    table = []
    for rows in args.rows:
        jobs = {name: partial(arm, [PROMPT] * rows) for name, arm in arms.items()}
        for name, seconds in take_turns(jobs, args.repeats).items():
            table.append({"arm": name, "rows": rows, "tokens/s": rows * args.new_tokens / seconds})
    return table

def decode(args):
    """1. Decoding under the window; the time of the prompts is included."""
    run = partial(generate, window=args.window, max_new_tokens=args.new_tokens)
    return compare_rates(args, {"PTE": partial(run, *load(args, "pte")),
                                "LoRA": partial(run, *load(args, "lora")),
                                "no adapter": partial(run, *load(args))})

def against_transformers(args):
    """2. The same without an adapter, greedy, here and with transformers' generate()."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("Left out: transformers is not installed; pip install transformers")
        return []
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device)
    theirs.generation_config.eos_token_id = None

    def transformers(prompts):
        ids = torch.tensor(prompts, device=args.device)
        theirs.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, do_sample=False,
                        max_new_tokens=args.new_tokens)
    full = partial(generate, *load(args), max_new_tokens=args.new_tokens, temperature=0)
    return compare_rates(args, {"full cache": full, "window": partial(full, window=args.window),
                                "transformers": transformers})

def per_token(args):
    """3. PTE under the window, 1 row: the mean time of the last 256 tokens up to a length."""
    times = []
    generate(*load(args, "pte"), [PROMPT], max_new_tokens=16384, window=args.window,
             on_token=lambda ids, evicting: times.append(time.perf_counter()))
    return [{"tokens": n, "ms per token": 1000 * (times[n - 1] - times[n - 257]) / 256}
            for n in (1024, 16384)]

def bytes_kept(replay):
    """The most bytes that autograd keeps for backward at one time during replay(token_loss).
    Tensors in the same memory count once, parameters of the model do not count."""
    parameters = {parameter.data_ptr() for parameter in replay.args[0].parameters()}
    kept = weakref.WeakSet()
    totals = []

    def pack(tensor):
        box = lambda: tensor                                    # autograd drops it when it is used
        kept.add(box)
        return box

    def token_loss(logps, columns):                             # here a segment's graph is complete
        memory = [box().untyped_storage() for box in kept]
        sizes = {x.data_ptr(): x.nbytes() for x in memory if x.data_ptr() not in parameters}
        totals.append(sum(sizes.values()))
        return -logps.sum()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box()):
        replay(token_loss)
    return max(totals)

def training(args):
    """4. A replay with its backward passes, 2 rows, W = 64, E = 16: seconds, bytes kept for
    backward, and the ratio of the seconds per token to those at the first length."""
    arms = [("PTE", "pte", 64), ("PTE, truncated memory", "pte", 64),
            ("LoRA, full cache", "lora", 0)]                    # the last one for short ones only
    rows = torch.arange(2, device=args.device)
    first = {}
    table = []
    for length in args.lengths:
        replays = {}
        for name, adapter, window in arms if length <= 4096 else arms[:2]:
            model, encoder = load(args, adapter)
            rollout = generate(model, encoder, [PROMPT], 2, max_new_tokens=2, window=window)
            rollout.tokens = torch.randint(256, (2, length), device=args.device)
            rollout.lengths = rollout.lengths - 2 + length
            replays[name] = partial(replay_and_backward, model, encoder, rollout, rows,
                                    truncate_memory="truncated" in name)
        jobs = {name: partial(run, lambda logps, _: -logps.sum()) for name, run in replays.items()}
        for name, seconds in take_turns(jobs, args.repeats).items():
            first.setdefault(name, seconds / length)
            table.append({"arm": name, "tokens": length, "seconds": seconds,
                          "bytes": bytes_kept(replays[name]),
                          "ratio": seconds / length / first[name]})
    return table

def step(args):
    """5. A step of GRPO, 2 prompts of 86 tokens with 8 completions of 64 tokens each: seconds, and
    the peak memory of a process that does nothing else (of the GPU, if it runs there)."""
    table = []
    for name, adapter, window in (("LoRA, full cache", "lora", 0), ("PTE, window 32", "pte", 32)):
        with get_context("spawn").Pool(1) as process:
            seconds, peak = process.apply(measure_step, (args, adapter, window))
        table.append({"arm": name, "seconds": seconds, "peak MiB": peak})
    return table

def measure_step(args, adapter, window):
    """-> (median seconds, peak MiB). To be called in a process of its own."""
    from train import Config                                    # for the defaults of its settings
    torch.set_num_threads(args.threads)
    model, encoder = load(args, adapter)
    optimizer = torch.optim.AdamW(encoder.trainable_parameters(), lr=1e-5)
    config = Config(group_size=8, max_new_tokens=64, micro_batch=1024)
    prompts = [list(range(86))] * 2                             # 86: the mean of GSM8K as a chat
    rewards = torch.arange(16.0, device=args.device) % 4
    def one_step():
        rollout = generate(model, encoder, prompts, 8, max_new_tokens=64, window=window)
        grpo_step(model, encoder, optimizer, rollout, rewards, config)
    seconds = take_turns({"step": one_step}, args.repeats)["step"]
    if rewards.is_cuda:
        return seconds, torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()              # getrusage counts the parent's too
    return seconds, int(status.partition("VmHWM:")[2].split()[0]) / 1024

def main(argv=None):
    parser = ArgumentParser(description="1 decode 2 transformers 3 long 4 training 5 GRPO step")
    add = parser.add_argument
    add("--sections", type=int, nargs="+", default=[1, 2, 3, 4, 5], choices=range(1, 6))
    add("--model", default="", help="model folder, or an id on the Hugging Face hub")
    add("--shape", default="tiny", choices=SHAPES, help="without --model: random weights")
    add("--rows", type=int, nargs="+", default=[1, 16], help="responses at a time (1, 2)")
    add("--new-tokens", type=int, default=96, help="length of a response (1, 2)")
    add("--window", type=int, default=32, help="W (1, 2, 3)")
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens (4)")
    add("--repeats", type=int, default=3, help="turns")
    add("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch on a CPU")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--json", default="", help="file for all numbers")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, args.device)
    sections = (decode, against_transformers, per_token, training, step)
    tables = {}
    with tempfile.TemporaryDirectory() as scratch:
        args.model = model_folder(args.model) or write_random_model(scratch, args.shape)
        for section in [sections[number - 1] for number in args.sections]:
            print(f"\n{' '.join(section.__doc__.split())}\n", flush=True)
            table = section(args)
            tables[section.__name__] = table
            if table:
                print("| " + " | ".join(table[0]) + " |\n|" + "---|" * len(table[0]))
            for row in table:
                cells = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()]
                print("| " + " | ".join(cells) + " |")
    if args.json:
        write_json(args.json, tables)

if __name__ == "__main__":
    run_script(main)
