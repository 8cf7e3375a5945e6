"""rollout.py: batched generation under the cache, of rollouts and of solutions to problem sets; as a script, a chat.

    y_t ~ pi(. | C_t, S_t)

Each prompt goes through the model once and is shared by its group of G rollouts; then all rows advance together, one
token a step. Before the ring would overflow, the oldest thoughts leave the cache and enter the thought state. A row
ends with the first end token it draws, which counts as one of its tokens; what is computed for it afterwards is masked
by length, never by comparing ids, until the batch is halved. The log-prob of each token is stored: GRPO's old policy.

Left out: speculative decoding, paged caches, serving.

Try it:  python rollout.py --model DIR --prompt "What is the capital of France?" --temperature 0
"""
import codecs
import hashlib
import json
import re
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from cache import Decoder, SlidingCache, eviction_size, first_line, halved, next_logits, pick_compile, window_of
from encoder import ModelOptions, arms, command_line, flag, load, resume, run_config, run_script
from model import UserError


@dataclass
class Rollout:
    """N prompts and B = N * G completions; row b continues prompt b // G."""
    prompt_ids: torch.Tensor      # (N, P) right-padded
    prompt_lengths: torch.Tensor  # (N,)
    prompt_of: torch.Tensor       # (B,) which prompt a row continues
    tokens: torch.Tensor          # (B, T) sampled ids; beyond a row's length: of no meaning
    lengths: torch.Tensor         # (B,) tokens that count, the end token included
    logps: torch.Tensor           # (B, T) float32, log pi(y_t | C_t, S_t) as sampled
    ended: torch.Tensor           # (B,) True if the row drew an end token, False if it was truncated
    window: int                   # W, 0 for a full cache
    evict_size: int               # E
    n_ids: int                    # ids that may be sampled
    cache_megabytes: float = 0.0

    def completions(self):
        """The sampled ids of every row, as lists, cut at the row's length."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist())]

    def evictions(self):
        """How often each row's window overflowed while the row was alive, (B,)."""
        if not self.window:
            return torch.zeros_like(self.lengths)
        # The last token drawn is never written, so a row writes length - 1 thoughts.
        over = self.lengths - 1 - self.window
        return (over + self.evict_size - 1).div(self.evict_size, rounding_mode="floor").clamp(min=0)


def sample(logits, temperature, top_k, top_p, u):
    """Draws one id a row from logits (B, n_ids) by u (B, 1), uniform in [0, 1). Temperature 0 takes the largest, top_k
    0 and top_p 1 cut nothing. Returns ids (B,) and their log-probs (B,) in the distribution that was sampled from."""
    if temperature == 0:
        largest, ids = logits.max(dim=-1)
        return ids, largest - logits.logsumexp(dim=-1)
    logps = torch.log_softmax(logits / temperature, dim=-1)
    if top_k or top_p < 1:
        ordered, order = logps.sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(dim=-1) - ordered.exp()                   # mass of what is likelier
        cut = (before >= top_p) | (torch.arange(logps.shape[-1], device=logps.device) >= (top_k or logps.shape[-1]))
        cut[:, 0] = False                                                       # the likeliest always stays
        logps = torch.log_softmax(logps.masked_fill(cut.scatter(1, order, cut), -torch.inf), dim=-1)
    # The first id at which the summed mass reaches a point in (0, mass]: one draw a row, not one for every id.
    mass = logps.exp().cumsum(dim=-1)                                           # (B, n_ids)
    ids = torch.searchsorted(mass, (1 - u.to(mass.dtype)) * mass[:, -1:])       # (B, 1)
    ids = ids.clamp(max=logps.shape[-1] - 1)                                    # nan would lead beyond the last
    return ids[:, 0], logps.gather(1, ids)[:, 0]


def check_prompts(model, prompts, max_new_tokens):
    """Raises UserError if one of the prompts (lists of ids) is empty, or does not fit the model with its thoughts."""
    longest = max(map(len, prompts))
    if longest + max_new_tokens > model.config.max_positions:
        raise UserError(f"a prompt of {longest} tokens and --max-new-tokens {max_new_tokens} exceed the model's "
                        f"context of {model.config.max_positions}; shorten one of them")
    if min(map(len, prompts)) == 0:
        raise UserError("a prompt is empty, or holds nothing that this model's tokenizer knows; write another")


@torch.inference_mode()
def generate(model, encoder, prompts, group_size=1, *, max_new_tokens, window=0, evict_ratio=0.25, n_ids=None,
             temperature=1.0, top_k=0, top_p=1.0, seed=0, share=(0, 1), compile=False, progress="", on_token=None):
    """Samples group_size completions of every prompt under the cache-constrained policy.

    prompts: lists of ids. encoder: a ThoughtEncoder attached to the model, or None for the model as it is. seed: draws
    repeat on one device. share (rank, ranks): the prompts are the rank-th of equal shares of a batch, and draw as they
    would in the whole. compile: see cache.Decoder. progress: a tqdm bar's title. on_token(ids, evicted): each step.
    Returns a Rollout. Raises UserError if a prompt and its thoughts do not fit the model's positions."""
    device = model.embedding.weight.device
    prompt_lengths = torch.tensor([len(p) for p in prompts], device=device)
    check_prompts(model, prompts, max_new_tokens)
    P = max(map(len, prompts))
    prompt_ids = torch.tensor([p + [0] * (P - len(p)) for p in prompts], device=device)  # (N, P)
    rows = torch.arange(len(prompts), device=device).repeat_interleave(group_size)       # (B,)
    B, n_ids = len(rows), n_ids or model.config.vocab_size
    draws = torch.rand(max_new_tokens, share[1] * B, device=device, generator=torch.Generator(device).manual_seed(seed))
    draws = draws[:, share[0] * B:][:, :B]                                      # (T, B) a row's, whoever else is there
    eos = torch.tensor(model.config.eos_ids, dtype=torch.long, device=device)
    E = eviction_size(window, evict_ratio)

    cache = SlidingCache(model.config.n_layers, prompt_lengths, window, E, max_new_tokens)
    U = encoder.start() if encoder else None
    S = encoder.read(U) if encoder else None
    hidden = model.hidden(prompt_ids, cache, S)                                 # (N, P, C)
    hidden = hidden[torch.arange(len(prompts), device=device), prompt_lengths - 1][rows]  # (N, C) -> (B, C)
    cache.spread(rows, 32 if compile else 1)
    megabytes = cache.megabytes
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(B, max_new_tokens, device=device)
    alive = torch.arange(B, device=device)                                      # (b,) the rows still in the batch
    ended = torch.zeros(B, dtype=torch.bool, device=device)                     # (b,) which of them have ended
    decoder = Decoder(model, cache, compile)
    if encoder:
        encoder.prepare(model.embedding.weight.dtype)
    look = 16 if device.type == "cuda" and not on_token else 1                  # on a GPU, looking means waiting
    for t in tqdm(range(max_new_tokens), desc=progress, disable=not progress, leave=False):
        drawn, logp = sample(next_logits(model, hidden, n_ids), temperature, top_k, top_p, draws[t, :, None])
        tokens[alive, t], logps[alive, t] = drawn, logp
        ended |= torch.isin(drawn, eos)
        left = len(alive) - int(ended.sum()) if t % look == 0 else len(alive)
        done = t + 1 == max_new_tokens or left == 0
        if not done and 2 * left <= len(alive):                                 # finished rows leave the batch; halves
            on = ended.int().argsort(stable=True)[:halved(len(alive), left)]    # of it: few sizes to compile for
            alive, drawn, ended, draws = alive[on], drawn[on], ended[on], draws[:, on]
            cache.keep(on)
            if encoder and U.shape[1] > 1:                                      # (L, b, M, R); one for all till then
                U, S = U[:, on], S[:, on]
        evicted = not done and cache.full
        if evicted:
            leaving = cache.evict()
            U = encoder.write(U, *leaving) if encoder else None
            S = encoder.read(U) if encoder else None
        if on_token:
            on_token(drawn, evicted)
        if done:
            break
        hidden = decoder(drawn, S)[:, 0]                                        # (b, 1, C) -> (b, C)
    if encoder:
        encoder.prepare(None)
    tokens, logps = tokens[:, :t + 1], logps[:, :t + 1]
    ends = torch.isin(tokens, eos)                                              # (B, T) a row's first counts
    lengths = torch.where(ended := ends.any(dim=1), ends.int().argmax(dim=1) + 1, t + 1)
    made = prompt_ids, prompt_lengths, rows, tokens, lengths, logps, ended
    with torch.inference_mode(False):                                           # copies that a graph may be built on
        return Rollout(*(x.clone() for x in made), window, E, n_ids, megabytes)


# ------------------------------------------------------------------------------------ problems, put to a model

Benchmark = namedtuple("Benchmark", "file hub config split problem answer k tolerance")
BENCHMARKS = {  # file in --data-dir; id, configuration, split, fields on the Hugging Face hub; k of the paper's pass@k
    "math500": Benchmark("math500.jsonl", "HuggingFaceH4/MATH-500", None, "test", "problem", "answer", 1, 0),
    "olympiadbench": Benchmark("olympiadbench.jsonl", "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train",
                               "question", "final_answer", 1, 0),
    "minerva": Benchmark("minerva_math.jsonl", "math-ai/minervamath", None, "test", "question", "answer", 1, 0.01),
    "amc23": Benchmark("amc23.jsonl", "math-ai/amc23", None, "test", "question", "answer", 1, 0),
    "aime24": Benchmark("aime24.jsonl", "HuggingFaceH4/aime_2024", None, "train", "problem", "answer", 16, 0),
    "aime25": Benchmark("aime25.jsonl", "math-ai/aime25", None, "test", "problem", "answer", 16, 0),
    "gsm8k": Benchmark("gsm8k_test.jsonl", "openai/gsm8k", "main", "test", "question", "answer", 1, 0)}
MAX_ANSWER = 500  # characters; longer is no answer (the longest gold of all benchmarks has 210)
ASK = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def load_problems(path):
    """Reads a JSONL file: an object a line, with `problem`, `question` or `prompt`, and `answer` -> list of dicts with
    "problem" and "answer" as strings. Raises UserError naming file and line for anything else."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")              # splitlines also cuts at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({getattr(error, 'strerror', None) or 'it is not UTF-8 text'}); "
                        "give --data FILE.jsonl, one JSON object a line") from None
    problems = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                problems.append(as_problem(json.loads(line)))
            except RecursionError:
                raise UserError(f"{path}, line {number}: not JSON; one object a line is wanted") from None
            except ValueError as error:
                what = "not JSON; one object a line is wanted" if isinstance(error, json.JSONDecodeError) else error
                raise UserError(f"{path}, line {number}: {what}") from None
    if not problems:
        raise UserError(f"{path} holds no problems; one JSON object a line is wanted")
    return problems


def as_problem(row):
    """A row of a data set with its "problem" and "answer" as strings; ValueError if it has none."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object with 'problem' and 'answer'")
    problem = next((row[key] for key in ("problem", "question", "prompt") if row.get(key)), None)
    answer = row.get("answer")
    if isinstance(answer, list):                                                # OlympiadBench on the hub
        answer = ", ".join(map(str, answer)).replace("$", "")
    if isinstance(answer, str):
        answer = answer.rpartition("####")[2].strip()                           # GSM8K as published ends "#### 72"
    if not isinstance(problem, str) or len(problem) > 200_000:                  # tiktoken panics at a million spaces
        raise ValueError("no 'problem' (or 'question' or 'prompt') that is a text of at most 200,000 characters")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError("no 'answer' that is a text or a number")
    return {**row, "problem": problem, "answer": str(answer)}


def load_data(name, data_dir, limit):
    """The problems of a JSONL file or a benchmark, each with its "data", "k", "tolerance". Raises UserError."""
    benchmark = BENCHMARKS.get(name)
    path = Path(data_dir, benchmark.file) if benchmark else Path(name)
    if benchmark and not path.exists():
        try:
            from datasets import load_dataset
        except ImportError:
            raise UserError(f"--data {name}: there is no {path}; give --data-dir; or, to fetch {benchmark.hub} from "
                            "the Hugging Face hub: pip install datasets") from None
        try:
            rows = [as_problem({"problem": row[benchmark.problem], "answer": row[benchmark.answer]})
                    for row in load_dataset(benchmark.hub, benchmark.config, split=benchmark.split)]
        except Exception as error:  # the library's errors have no common base; all of them mean that there is no data
            raise UserError(f"--data {name}: the Hugging Face hub does not give {benchmark.hub} "
                            f"({first_line(error)})") from None
    elif benchmark or path.suffix or path.exists():
        rows = load_problems(path)
    else:
        raise UserError(f"--data {name} is neither a file nor one of {', '.join(BENCHMARKS)}")
    return [{**row, "data": name if benchmark else path.stem, "k": benchmark.k if benchmark else 1,
             "tolerance": benchmark.tolerance if benchmark else 0} for row in rows[:limit or None]]


def prompt_ids(tokenizer, text, raw=False):
    """The ids that put a text to a model: in its chat format; as it stands if it has none (a base model) or if raw."""
    if tokenizer.template and not raw:
        return tokenizer.chat([{"role": "user", "content": text}])
    return [tokenizer.bos_id] * tokenizer.adds_bos + tokenizer.encode(text)


def ask(tokenizer, problem):
    """The ids that put a problem to a model; a base model, without a chat format, reads it as it stands."""
    return prompt_ids(tokenizer, problem + ASK if tokenizer.template else problem)


BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.S)  # a backslash takes the next character along: \{ and \} are no braces
PHRASE = re.compile(r"\bthe (?:final |correct )?answer is:?|\banswer(?:\*\*)?:|#{4,}", re.I)
SENTENCE_END = re.compile(r"\n|\.(?=\**(?:\s|$))")  # the point of 3.5 ends nothing
MARKUP = re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(])|\\?\$|(?<!\\)\\[()\[\]]")  # **bold**  $  \$  \( \)  \[ \]; not 2**3


def extract_answer(text):
    r"""The final answer that a completion states, or None. Leave the prompt out: it may hold boxes of its own.

    >>> extract_answer(r"First \boxed{1}, then \boxed{\frac{1}{2}}, and cut off in \boxed{3")
    '\\frac{1}{2}'
    >>> extract_answer("He pays $20,000 four times. The answer is **$80,000**.")
    '80,000'"""
    after_thinking = text.rpartition("</think>")[2]                             # all of it where there is no such tag
    text = after_thinking if after_thinking.strip() else text
    # From the last box back; while none closes, the box before can only close ahead of them.
    for piece in reversed(BOX.split(text)[1:]):
        depth = 1
        for brace in BRACE.finditer(piece[:MAX_ANSWER]) if "}" in piece else ():
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return piece[:brace.start()].strip()
    if "answer" in text.lower() or "####" in text:                              # much faster to see than PHRASE
        for piece in reversed(PHRASE.split(text)[1:]):
            sentence = SENTENCE_END.split(piece.lstrip(" *$\t\r\n")[:MAX_ANSWER], maxsplit=1)[0]
            if answer := MARKUP.sub("", sentence).strip(" *\r").rstrip("."):
                return answer
    return None


def batch_of(samples, batch):
    """How many problems `solve` puts into a batch of `batch` rows."""
    return max(1, batch // samples)


def solve(model, encoder, tokenizer, problems, *, window, evict_ratio, max_new_tokens, temperature=0.0, samples=1,
          batch=32, seed=0, skip=0, compile=False, progress=""):
    """Lets a model write solutions under a window (0: full cache); encoder None: without adapter.

    A generator of (index of the problem, its solutions, MB of cache a row, MB of memory), longest problem first, so
    that rows of like length share a batch of at most `batch` rows. The order and the draws depend on nothing but the
    arguments: `skip` of the problems, a whole number of `batch_of(samples, batch)`, may be left out at the start. A
    solution is {"response", "tokens", "truncated", "evictions"}. Memory is the peak of the GPU; on the CPU what
    weights and cache take."""
    prompts = [ask(tokenizer, p["problem"]) for p in problems]
    check_prompts(model, prompts, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    on_gpu, at_once = model.embedding.weight.is_cuda, batch_of(samples, batch)
    with tqdm(total=len(order), initial=skip, desc=progress, disable=not progress, file=sys.stderr) as bar:
        for start in range(skip, len(order), at_once):
            chosen = order[start:start + at_once]
            solutions, memory = [[] for _ in chosen], 0.0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            for first in range(0, samples, batch):                              # a problem's samples may exceed a batch
                group = min(batch, samples - first)
                rollout = generate(model, encoder, [prompts[i] for i in chosen], group, max_new_tokens=max_new_tokens,
                                   window=window, evict_ratio=evict_ratio, n_ids=tokenizer.n_ids,
                                   temperature=temperature, seed=seed + start * samples + first, compile=compile)
                rows = zip(rollout.completions(), rollout.evictions().tolist(), rollout.ended.tolist())
                for row, (ids, evictions, ended) in enumerate(rows):
                    response = tokenizer.decode([t for t in ids if t not in model.config.eos_ids])
                    solutions[row // group].append({"response": response, "tokens": len(ids), "truncated": not ended,
                                                    "evictions": evictions})
                peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else weights + rollout.cache_megabytes
                memory = max(memory, peak)
            cache = rollout.cache_megabytes / (len(chosen) * group)
            for i, texts in zip(chosen, solutions):
                yield i, texts, cache, memory
            bar.update(len(chosen))


def measure(o, grade):
    """Puts all problems to every model under every window: o are the Options of evaluate.py, grade(problem, response)
    gives a prediction and whether it is right. Returns problems, records (a dict for each problem of each job) and the
    path of --json: records go to a .jsonl beside it as they come, and those already there are not made again."""
    sets = [load_data(name, o.data_dir, o.limit) for name in o.data]
    problems, names = sum(sets, []), [problems[0]["data"] for problems in sets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--data: two sets of problems are called {twice[0]}; rename a file")
    models, unit, n = arms(o.model, o.runs), batch_of(o.samples, o.batch), len(problems)
    jobs = [(*model, window) for model in models for window in o.window]
    for _, _, run, _, window in jobs:                                           # before anything is done
        window_of(window, o.evict_ratio, run_config(run) if run else {})
    settings = {k: v for k, v in asdict(o).items() if k not in ("json", "plot", "pass_at", "data_dir", "compile")} | {
        "problems": hashlib.sha256(json.dumps(problems).encode()).hexdigest(), "models": [m[-1] for m in models]}
    path, records = resume(o.json, settings, n, unit)
    for job, (arm, folder, run, _, window) in enumerate(jobs):
        if (done := len(records) - job * n) >= n:
            continue
        model, encoder, tokenizer, config = load(folder, run, o.dtype, o.device)
        W, evict_ratio = window_of(window, o.evict_ratio, config)
        for i, solutions, cache, memory in solve(
                model, encoder, tokenizer, problems, window=W, evict_ratio=evict_ratio, batch=o.batch, skip=done,
                max_new_tokens=o.max_new_tokens, temperature=o.temperature, samples=o.samples, seed=o.seed,
                compile=pick_compile(o.compile, o.device), progress=f"{arm}, window {W or 'full'}"):
            for solution in solutions:
                solution["prediction"], solution["correct"] = grade(problems[i], solution["response"])
            records.append({"arm": arm, "model": run or folder, "window": W, "cache_mb": cache, "memory_mb": memory,
                            "data": problems[i]["data"], "number": i, "answer": problems[i]["answer"],
                            "samples": solutions})
            path.parent.mkdir(exist_ok=True)                                    # runs/
            with open(path.with_suffix(".jsonl"), "a") as file:                 # first of all: what it is of
                print(*[json.dumps(settings)] * (file.tell() == 0), json.dumps(records[-1]), sep="\n", file=file)
    in_order = [r for job in range(len(jobs)) for r in sorted(records[job * n:][:n], key=lambda r: r["number"])]
    return problems, in_order, path


@dataclass
class Options(ModelOptions):
    """The flags of `python rollout.py`."""
    run: str = flag("", "run folder of train.py: its adapter, its model, its window")
    prompt: str = flag("", "what to say to the model")
    raw: bool = flag(False, "take the prompt as it is, without the chat format")
    window: int = flag(-1, "thought tokens kept, 0 keeps all, -1: as the run was trained, else 0", least=-1)
    max_new_tokens: int = flag(256, "longest completion, in tokens", least=1)
    temperature: float = flag(0.7, "of sampling; 0 takes the likeliest token", least=0)
    top_k: int = flag(0, "sample among the k likeliest tokens, 0 for all", least=0)
    top_p: float = flag(1.0, "sample among the likeliest tokens that make up this mass", least=0)
    show_evictions: bool = flag(False, "mark on stderr where thoughts left the window")


def main():
    o = command_line(Options, "Chat with a model under a bounded cache; only the completion goes to stdout.")
    if not o.prompt:
        raise UserError('nothing to say: give --prompt "..."')
    model, encoder, tokenizer, config = load(o.model, o.run, o.dtype, o.device)
    window, evict_ratio = window_of(o.window, o.evict_ratio, config)
    ids = prompt_ids(tokenizer, o.prompt, raw=o.raw)
    decoder, count, start = codecs.getincrementaldecoder("utf-8")("replace"), 0, time.time()

    def stream(tokens, evicted):
        nonlocal count
        count += 1
        if tokens[0].item() not in model.config.eos_ids:
            print(decoder.decode(tokenizer.decode_bytes(tokens.tolist())), end="", flush=True)
        if evicted and o.show_evictions:
            print(f"[-{eviction_size(window, evict_ratio)}]", end="", file=sys.stderr, flush=True)

    rollout = generate(model, encoder, [ids], max_new_tokens=o.max_new_tokens, window=window,
                       evict_ratio=evict_ratio, n_ids=tokenizer.n_ids, temperature=o.temperature, top_k=o.top_k,
                       top_p=o.top_p, seed=o.seed, compile=pick_compile(o.compile, o.device), on_token=stream)
    print(decoder.decode(b"", final=True), flush=True)
    print(f"{count} tokens, {count / (time.time() - start):.1f} tokens/s, {int(rollout.evictions()[0])} evictions, "
          f"cache {rollout.cache_megabytes:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
