r"""evaluate.py: is an answer right, how often, and with how much memory? The table of all arms.

An arm is a model before training, or all runs of one method, which differ in their seeds.

    accuracy = mean over samples of [answer is right], sampled under a window W (rollout.py)
    pass@k   = 1 - C(n - c, k) / C(n, k)     c of n samples are right: is one of k of them?
    maj@k    = is the most frequent answer of the first k right? Tied answers share the point

Each is a mean over problems, with a 95 % interval by bootstrap. Answers are equal if they are the
same number (exactly: 0.333 is not 1/3), lists of equal parts, or the same text without dressing
such as \left. For algebra the library math-verify is asked too, where it is installed:
pip install "math-verify[antlr4_13_2]". Left out: proofs, code, a model as a judge.

Try it:  python evaluate.py --runs RUN --data gsm8k --data-dir ../shared/data --limit 40
"""
import contextlib
import hashlib
import itertools
import json
import logging
import math
import multiprocessing
import re
import signal
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cache import eviction_size
from encoder import base_folder, load_run, read_config
from model import (ArgumentParser, UserError, load_model, model_folder, run_script,
                   set_chat_format, weights_hash, write_json)
from rollout import check_prompts, generate

# ------------------------------------------------------------------------------------ problem sets

# name: (file in --data-dir, samples per problem, relative tolerance of an answer)
BENCHMARKS = {
    "math500": ("math500.jsonl", 1, 0),
    "olympiadbench": ("olympiadbench.jsonl", 1, 0),
    "minerva": ("minerva_math.jsonl", 1, 0.01),
    "amc23": ("amc23.jsonl", 1, 0),
    "aime24": ("aime24.jsonl", 16, 0),
    "aime25": ("aime25.jsonl", 16, 0),
    "gsm8k": ("gsm8k_test.jsonl", 1, 0)}
INSTRUCTION = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
NO_ANSWER = ("", "None", "nan", "null", "NaN", "[]")

def load_problems(path, tolerance=0):
    """Reads a JSONL file: one object per line with `problem`, `question` or `prompt`, and `answer`.
    Returns dicts with "problem", "answer" (texts) and "source" (file and line). A column
    `tolerance` is the relative tolerance of a number. Raises UserError that names the line."""
    problems = []
    text = Path(path).read_text("utf-8-sig", errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):
        source = f"{path}, line {number}"
        if line.strip():
            try:
                problems.append(read_problem(json.loads(line), tolerance) | {"source": source})
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{source}: {error}; each line is a JSON object with a text "
                                "'problem' (or 'question', 'prompt') and an 'answer'") from None
    if not problems:
        raise UserError(f"{path} holds no problems; give one JSON object per line")
    return problems

def read_problem(row, tolerance):
    """A row of a problem file as the rest of this file needs it. Raises ValueError."""
    problem = row.get("problem") or row.get("question") or row.get("prompt")
    answer = row.get("answer", row.get("final_answer"))
    if isinstance(answer, dict):
        answer = None
    if isinstance(answer, list):                                    # OlympiadBench on the hub
        answer = ", ".join(answer).replace("$", "")
    answer = str(answer).rpartition("####")[2].strip()              # GSM8K ends with "#### 72"
    if answer.startswith(r"\boxed"):
        answer = extract_answer(answer) or ""
    if not isinstance(problem, str) or answer in NO_ANSWER:
        raise ValueError(f"no text of a problem or no answer in the columns {', '.join(row)}")
    tolerance = row.get("tolerance", tolerance)
    if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
        raise ValueError(f"tolerance {tolerance!r} is not a number from 0 to 1")
    return row | {"problem": problem, "answer": answer, "tolerance": tolerance}

def check_template(template):
    """Raises UserError for a prompt template without a place for the problem."""
    if template and "{problem}" not in template:
        raise UserError("--prompt-template: {problem} is missing, for where the problem comes")

def problem_ids(tokenizer, problem, template=""):
    """The prompt of a problem, a list of ids. template: text with {problem} in it; "": asks for a
    boxed answer, but gives the bare problem to a base model, which has no chat format."""
    if not template:
        template = INSTRUCTION if tokenizer.template else "{problem}"
    return tokenizer.prompt(template.replace("{problem}", problem["problem"]))

def problems_hash(problems):
    """A short hash of what is asked, wherever the file lies."""
    texts = [[problem["problem"], problem["answer"]] for problem in problems]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8]

class ProblemFile:
    """The task of train.py that takes its problems from a JSONL file."""
    def __init__(self, path):
        self.problems = load_problems(path)

    def batch(self, step, n, seed):
        """The n problems of a step. All problems come once before one comes again."""
        batch = []
        for index in range(step * n, (step + 1) * n):
            n_rounds, i = divmod(index, len(self.problems))
            order = np.random.default_rng([seed, 1, n_rounds]).permutation(len(self.problems))
            batch.append(self.problems[order[i]])
        return batch

    def gold(self, problem):
        """The worked example of a problem, for supervised steps. Raises UserError."""
        text = problem.get("solution") or problem.get("thought")
        if not isinstance(text, str):
            raise UserError(f"{problem['source']}: --sft-steps needs a text 'solution' (or "
                            "'thought') that ends in the answer")
        return text

    def reward(self, problem, text, n_tokens, ended):
        return float(grade(problem, text)[1])

# ------------------------------------------------------------------- finding and comparing answers

MAX_ANSWER = 500                        # characters; the longest gold answer has 210
PHRASE = re.compile(r"(?s:.*)(?:\bthe (?:final |correct )?answer is:?|\banswer(?:\*\*)?:"
                    r"|####(?=\s*[-$\d]))"                      # but no heading of Markdown
                    r"[\s*$]*([^\s*$].{0,499}?)(?:[.*$ \r]{0,4}(?:\n|$)|\.\**\s)", re.I)

def extract_answer(text):
    """The final answer of a completion (without its prompt, which may hold boxes), or None: the
    last complete box that is not empty, else what follows "the answer is", "answer:", "####"."""
    text = (text.rpartition("</think>")[2].strip() or text)[-100_000:]
    boxes = []
    for piece in reversed(re.split(r"\\(?:boxed|fbox)\s*\{", text)[1:]):
        content = ""                                            # of a box that is not complete
        depth = 1
        for brace in re.finditer(r"(?<!\\)[{}]", piece[:MAX_ANSWER]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                content = piece[:brace.start()]
                break
        if boxes and not re.fullmatch(r"[\s$,]*(?:,|and|or)[\s$]*", piece[len(content) + 1:]):
            break                                               # \boxed{2} and \boxed{3} is a list
        if content.strip():
            boxes.insert(0, content.strip())
    phrase = PHRASE.match(text)
    return ", ".join(boxes) or (phrase and phrase[1])

REWRITES = (                                                    # pattern, usual spelling
    (r"\\(?:left|right|displaystyle|large|limits)(?![a-z])|(?<!\\)\\[()\[\]]|\\!\s*|\.(?=/)", ""),
    (r"(?<=\\)[dt](?=frac)|(?<=\\)l(?=dots)|(?<=\\[gln]e)q(?:slant)?(?![a-z])", ""),     # \dfrac
    (r"−", "-"),
    (r"\{,\}", ","),                                            # 1{,}000
    (r"\^\{?\\circ\}?| ?degrees?\b", "°"),
    (r" ?\\?percent\b", "%"),
    (r"feet\b", "ft"),
    (r"^\s*\\?\$([\d.,]+)\s*$", r"\1 dollar"),
    (r"\\?\$|\\(?:text[a-z]*|mbox|mathrm|mathbf|operatorname) ?\{([^{}]*)\}", r" \1 "),
    (r"(?:, *)?\b(?:and|or)\b", ","),
    (r"\\(frac|sqrt(?! ?\d\d)) ?(\d)", r"\\\1{\2}"),            # \frac12
    (r"(\\frac\{[^{}]*\}) ?(\d)", r"\1{\2}"),
    (r"\{([^{}]*?) ?\\over(?![a-z]) ?([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"([_^])\{(\w)\}(?!\w)", r"\1\2"),
    (r"^\s*([-+]?[1-9]\d?\d?),(\d{3})(?:,(\d{3}))?(?:,(\d{3}))?(?![\w,])", r"\1\2\3\4"),  # 1,000
    (r"(?:(?<!\\)\\[,;: ]|\\q?quad|[~\s])+", " "),
    (r"(\\[A-Za-z]+ (?=[A-Za-z])|\d (?=\d|e ?\d))| ", r"\1"),   # but \pi r, and 12 3
    (r"^=|^0+(?=\d)|(?<![.,])[.,]$", ""),                       # 042 is 42
    (r"^\(([^(),]*)\)$|^\\(?:\{|lbrace ?)((?:(?!\\\}).)*?)\\(?:\}|rbrace)$", r"\1\2"))  # (C) is C
NAME = re.compile(r"^[|\\]?[A-Za-z]\w*(?:_\{[^}]*\}|\(\w+\)|\|)?(?:=|\\in\b)(?!.*[=<>]|.*\\[gln]e)")
UNIT = re.compile(r"(?<=[\d)}])\\?(%|°|dollar|cent|inch|mile|meter|[cmk]m|[mk]g|m[lL]|ft"
                  r"|hour|minute|second|day|week|month|year|unit|m/s|mph)(?:e?s)?(\^\d)?$")
NUMBER = re.compile(r"(?<![^,(\[])[-+]?(?!0\d)(?:\d+/[1-9]\d*|\d*\.?\d+(?:e[-+]?\d{1,3})?)"
                    r"(?![^,)\]])")                             # between commas and brackets

@lru_cache(maxsize=10_000)              # train.py asks twice about every response
def same_answer(gold, prediction, tolerance=0.0, grader="auto"):
    """Whether a prediction states the gold answer. tolerance: relative, for numbers. grader:
    "builtin", or "auto" to ask math-verify as well, where it is installed."""
    if not prediction or max(len(gold), len(prediction)) > MAX_ANSWER:
        return False
    a = undress(gold)
    b = undress(prediction)
    for part in (NAME, UNIT):                                   # x=5 is 5, and so is 5 cm,
        if len({*part.findall(a), *part.findall(b)}) > 1:       # but not y=5, or 5 km
            return False
        a = part.sub("", a)
        b = part.sub("", b)
    x = canonical(a)
    y = canonical(b)
    if NUMBER.fullmatch(x) and NUMBER.fullmatch(y):
        return abs(Fraction(x) - Fraction(y)) <= Fraction(tolerance) * abs(Fraction(x))
    return x == y or grader == "auto" and LIBRARY is not None and ask_library(a, b)

def undress(text):
    """The text in the usual spelling. Even is even, but E is not e."""
    for pattern, usual in REWRITES:
        text = re.sub(pattern, usual, text)
    return text.lower() if re.fullmatch(r"[A-Z][a-z]{3,}\d*", text) else text

def canonical(text):
    """The parts of a list in sorted order. A part that is a number becomes a reduced fraction."""
    text = re.sub(r"(?<![^,(\[])(-?)\\frac\{(-?\d+)\}\{(\d+)\}(?![^,)\]])", r"\1\2/\3", text)
    text = re.sub(r"(?:\*|\\cdot|\\times)10\^\{?(-?\d+)\}?(?![^,)\]])", r"e\1", text)
    text = NUMBER.sub(lambda number: str(Fraction(number[0])), text)
    if re.search(r"[(\[][^)\]]*[(\[]|\{[^{}]*,", text):         # brackets in brackets
        return text
    return ",".join(sorted(re.split(r",(?![^(\[]*[)\]])", text)))

LIBRARY = version("math-verify") if find_spec("math_verify") else None
NOT_FOR_LIBRARY = re.compile(r"(?<![\\A-Za-z])((?![pb]matrix)[A-Za-z]{3,}|[A-Za-z]\d)|\d_|\d \d"
                             r"|(?m:^[A-Za-z]+$)|\^\{?\d*\^|[^\w\\{}()\[\]^+*/=!|.&\s-]")

def library_verdict(gold, prediction):
    """Runs in a process of its own, which can be killed when it takes too long."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # Ctrl-C ends the main program
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify import verify
    case = ConversionConfig(lowercase_symbols=False)
    try:
        pair = [latex2sympy(text, conversion_config=case) for text in (gold, prediction)]
        return verify(*pair, float_rounding=40, numeric_precision=50)
    except Exception:                   # not an expression, or one that the library does not know
        return False

@lru_cache(maxsize=1)
def library_pool():
    """The process. It takes seconds to start: it imports this file and the library."""
    pool = multiprocessing.get_context("spawn").Pool(1, initializer=logging.disable)
    pool.apply(library_verdict, ("1", "1"))
    return pool

def ask_library(gold, prediction, seconds=20):
    """Whether math-verify finds them equal in time. It is not asked about what it misreads."""
    if gold.count("=") != prediction.count("=") or NOT_FOR_LIBRARY.search(f"{gold}\n{prediction}"):
        return False
    try:
        return library_pool().apply_async(library_verdict, (gold, prediction)).get(seconds)
    except multiprocessing.TimeoutError:
        library_pool().terminate()
        library_pool.cache_clear()
        return False

def grade(problem, text, grader="auto"):
    """(prediction, whether it is right). With "exact": true the answer is wanted to the letter."""
    prediction = extract_answer(text)
    if problem.get("exact"):
        return prediction, prediction == problem["answer"]
    tolerance = problem.get("tolerance", 0)
    return prediction, same_answer(problem["answer"], prediction, tolerance, grader)

def right_parts(problem, prediction):
    """Which characters of the answer are right, a list of booleans: of tally, which sums."""
    gold = problem["answer"]
    if prediction is None or len(prediction) != len(gold):
        return [False] * len(gold)
    return [a == b for a, b in zip(prediction, gold)]

def grade_rollout(problems, rollout, tokenizer, grader="auto"):
    """What a response is worth: a dict for each row of the rollout of these problems' prompts."""
    lengths = rollout.lengths.tolist()
    ended = rollout.ended.tolist()
    evictions = rollout.n_evictions().tolist()
    prompt_of = rollout.prompt_of.tolist()
    rows = []
    for row, text in enumerate(rollout.texts(tokenizer)):
        problem = problems[prompt_of[row]]
        prediction, correct = grade(problem, text, grader)
        rows.append({"answer": problem["answer"], "response": text, "prediction": prediction,
                     "correct": correct, "tokens": lengths[row], "truncated": not ended[row],
                     "evictions": evictions[row]})
        if problem.get("parts"):
            rows[-1]["parts"] = right_parts(problem, prediction)
        if isinstance(problem.get("parts"), list):          # the tokens that the parts come from
            start = lengths[row] - 1 - len(problem["parts"])    # the answer stands before the end
            rows[-1]["survived"] = [
                evictions_survived(token, start + i, rollout.window, rollout.evict_size)
                for i, token in enumerate(problem["parts"])]
    return rows

def evictions_survived(token, now, window, evict_size):
    """How many evictions response token number `token` has been through, its own included, when
    number `now` is drawn; 0: it is still in the cache."""
    if window == 0 or now <= window:
        return 0
    n_evictions = math.ceil((now - window) / evict_size)
    return max(0, n_evictions - token // evict_size)

# ------------------------------------------------------------------------------------------ scores

def pass_at_k(n, c, k):
    """The chance that k of n samples, drawn without replacement, hold one of the c right ones."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def majority(samples, grader="builtin"):
    """maj@k of k records: 1 if the most frequent prediction is right, 0 if not. Tied predictions
    share the point. A sample without a prediction has no vote."""
    voters = [sample for sample in samples if sample["prediction"]]
    counts = []
    for sample in voters:
        same = [same_answer(sample["prediction"], other["prediction"], 0.0, grader)
                for other in voters]
        counts.append(sum(same))
    winners = [s["correct"] for s, count in zip(voters, counts) if count == max(counts)]
    return sum(winners) / max(len(winners), 1)

def problem_scores(samples, k, grader="builtin"):
    """{name: number} for the records of one problem and one model."""
    right = [sample["correct"] for sample in samples]
    scores = {"accuracy": np.mean(right)}
    for name in ("truncated", "tokens", "evictions", "cache_mb"):
        scores[name] = np.mean([sample[name] for sample in samples])
    if "parts" in samples[0]:
        parts = np.mean([sample["parts"] for sample in samples], axis=0)        # (K,) oldest first
        scores["sums"] = parts.mean()
        scores |= {f"sum-{i}": part for i, part in enumerate(parts, start=1)}
    if k > 1:
        scores[f"pass@{k}"] = pass_at_k(len(samples), sum(right), k)
        scores[f"maj@{k}"] = majority(samples[:k], grader)
    return scores

def interval(columns, draws=2000):
    """[mean, low, high] of the mean of the columns' means (arrays, a number per problem), with the
    bounds of the 95 % bootstrap interval: problems are drawn with replacement."""
    rng = np.random.default_rng(0)
    means = np.zeros(draws)
    for x in columns:
        means += x[rng.integers(len(x), size=(draws, len(x)))].mean(axis=1) / len(columns)
    mean = np.mean([x.mean() for x in columns])
    return [float(mean), *np.quantile(means, (0.025, 0.975)).tolist()]

# ------------------------------------------------------------------------------- files of results

def append(path, records):
    """Adds a line of JSON to a file for each record. Raises UserError, as when the disk is full."""
    try:
        with open(path, "a") as file:
            for record in records:
                strict = {name: None if x != x else x for name, x in record.items()}    # no nan
                file.write(json.dumps(strict) + "\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make room, or give another place") from None

def open_locked(path):
    """Opens a file that this process alone may add to while it is open. Raises UserError."""
    file = open(path, "a")
    with contextlib.suppress(ImportError):                  # Windows has no such module
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another process is writing to it (or a stopped cell of this "
                            "notebook: restart it); stop that, or give another name") from None
    return file

def key(record):
    return tuple(record[name] for name in ("model", "window", "data", "number", "sample"))

def read_records(path, settings):
    """{key: record}, as earlier calls with the same settings left them in a .jsonl file. Its first
    line holds the settings; a last line that was cut off is dropped. Raises UserError."""
    header = json.dumps(settings) + "\n"
    text = path.read_text(errors="replace")
    whole = text[:text.rfind("\n") + 1]
    if not whole.startswith(header) and not header.startswith(text):    # the latter: it was cut off
        raise UserError(f"{path} holds something else, or results of other settings; give another "
                        "--json")
    if whole != text:
        path.write_text(whole)
    try:
        return {key(record): record for record in map(json.loads, whole.splitlines()[1:])}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: a line is damaged; take it out, or give another --json") from None

# ---------------------------------------------------------------------------------- the evaluation

@dataclass
class ProblemSet:
    """Problems, and how they are measured: samples for each, k of pass@k, temperature."""
    problems: list
    n_samples: int
    k: int
    temperature: float

    @property
    def score(self):
        """The score that the table shows."""
        return f"pass@{self.k}" if self.k > 1 else "accuracy"

def load_set(name, args):
    """A JSONL file or the name of a benchmark -> (short name, ProblemSet). Raises UserError."""
    file, default, tolerance = BENCHMARKS.get(name, (name, 1, 0))
    path = Path(args.data_dir, file) if name in BENCHMARKS else Path(name)
    if not path.is_file():
        raise UserError(f"no file {path}; give --data FILE.jsonl, or --data-dir DIR and one of "
                        f"{', '.join(BENCHMARKS)}")
    n_samples = args.samples or default
    k = args.pass_at or min(n_samples, default)
    temperature = args.temperature
    if temperature is None:
        temperature = 0.6 if n_samples > 1 else 0.0
    if k > n_samples or n_samples > 1 and temperature == 0:
        raise UserError(f"--data {name}: --samples must be at least --pass-at, and several "
                        "samples need a --temperature above 0")
    problems = load_problems(path, tolerance)[:args.limit or None]
    return Path(name).stem, ProblemSet(problems, n_samples, k, temperature)

def problem_prompts(model, tokenizer, problems, template, max_new_tokens):
    """The prompts of problems. Raises UserError that names the line of one that is too long."""
    prompts = [problem_ids(tokenizer, problem, template) for problem in problems]
    check_prompts(model, prompts, max_new_tokens, [problem["source"] for problem in problems])
    return prompts

# Settings in which the seeds of an arm may differ: where a run lies, and what changes no number.
# Other problems, and other models but the tiny ones, show in data_hash and base_hash.
NOT_OF_AN_ARM = ("seed", "out", "date", "device", "model", "data", "micro_batch", "rollout_batch",
                 "save_every", "test_problems", "wandb")

def find_arms(model, runs):
    """{run, or model before training: (name of the arm, config of the run or None)}. Runs of the
    same name are seeds of one arm."""
    configs = {str(run): read_config(run) for run in runs}
    bases = [base_folder(run, config, model) for run, config in configs.items()]
    bases = bases or [model_folder(model)]
    arms = {str(base): ("no training", None) for base in bases}
    first = {}                                                  # config of an arm's first run
    for run, config in configs.items():
        lora = "LoRA_c" if config["window"] else "LoRA"
        name = {"pte": "PTE", "lora": lora}.get(config["adapter"], config["adapter"])
        if config["adapter"] == "pte":                          # what is not the default
            name = "PTE, no global tokens" if config["global_tokens"] == 0 else name
            name += ", paper's order" if config["memory_order"] == "paper" else ""
            update = config["memory_update"]
            name += f", {update} update" if update != "delta" else ""
            name += ", plain keys" if config["memory_keys"] == "plain" else ""
        if config["sft_steps"]:
            name += ", SFT" if config["steps"] == 0 else ", SFT and GRPO"
        for setting, value in first.setdefault(name, config).items():
            may_differ = setting in NOT_OF_AN_ARM
            if setting == "base_hash":
                may_differ = config["model"] == "tiny"          # each seed has a base of its own
            if not may_differ and config.get(setting) != value:
                raise UserError(f"--runs: two runs of the arm {name} differ in {setting} and not "
                                "in the seed alone; compare them in two calls")
        arms[run] = name, config
    return arms

def load_arm(folder, config, args):
    """(model, its encoder or None, tokenizer) of a run, or without a config of a base model."""
    if config:
        return load_run(folder, args.model, args.device, args.dtype)[:3]
    model, tokenizer = load_model(folder, args.device, args.dtype)
    return model, None, tokenizer

def answer_problems(loaded, common, problem_set, todo, args):
    """Yields the records of a batch. todo: [(number of the problem, sample)]. common: what stands
    in every record. Each sample has a seed of its own, so it does not depend on the others."""
    model, encoder, tokenizer = loaded
    problems = problem_set.problems
    prompts = problem_prompts(model, tokenizer, problems, args.prompt_template,
                              args.max_new_tokens)
    todo = sorted(todo, key=lambda pair: -len(prompts[pair[0]]))            # longest prompts first
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    title = f"{common['arm']}, {common['data']}, window {common['window'] or 'full'}"
    for start in tqdm(range(0, len(todo), args.batch), desc=title):
        chosen = todo[start:start + args.batch]
        rollout = generate(
            model, encoder, [prompts[number] for number, _ in chosen], window=common["window"],
            evict_ratio=args.evict_ratio, max_new_tokens=args.max_new_tokens,
            temperature=problem_set.temperature,
            seeds=[(args.seed * 100_000 + number) * 1000 + sample for number, sample in chosen])
        records = grade_rollout([problems[i] for i, _ in chosen], rollout, tokenizer, args.grader)
        for record, (number, sample) in zip(records, chosen):
            record.update(common, number=number, sample=sample,
                          cache_mb=rollout.cache_mb / len(chosen),
                          memory_mb=weights / 1e6 + rollout.cache_mb)
        yield records

def table_row(arm, window, models, sets, records, grader):
    """One arm under one window. The score of a problem is the mean over the arm's models."""
    mine = [r for r in records.values() if r["model"] in models and r["window"] == window]
    row = {"arm": arm, "window": window, "models": models, "scores": {}}
    for name in ("cache_mb", "memory_mb"):
        row[name] = max(record[name] for record in mine)
    shown_columns = []
    for data, problem_set in sets.items():
        samples = {}                                            # of one problem and one model
        for record in mine:
            if record["data"] == data:
                samples.setdefault((record["number"], record["model"]), []).append(record)
        scores = [problem_scores(samples[pair], problem_set.k, grader) for pair in sorted(samples)]
        row["scores"][data] = {}
        for name in scores[0]:
            column = np.reshape([score[name] for score in scores], (-1, len(models))).mean(axis=1)
            row["scores"][data][name] = interval([column])
            if name == problem_set.score:
                shown_columns.append(column)
    row["average"] = interval(shown_columns)
    outlived = {}                               # evictions: whether the parts of answers are right
    for record in mine:
        for n, right in zip(record.get("survived", []), record.get("parts", [])):
            outlived.setdefault(n, []).append(right)
    row["by_evictions"] = {n: float(np.mean(outlived[n])) for n in sorted(outlived)}
    return row

def markdown(rows, sets):
    """The table of arms, in %; for answers in parts also each part of the last set's answers, and
    the accuracy of parts by the number of evictions since they were written."""
    titles = [f"{data} {s.score}".removesuffix(" accuracy") for data, s in sets.items()]
    lines = [["arm", "window", *titles, "average", "cache MB", "memory MB"]]
    last = list(sets)[-1]
    has_parts = "sums" in rows[0]["scores"][last]
    if has_parts:
        lines[0].append(f"parts of {last}, oldest first")
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        scores = [row["scores"][data][problem_set.score] for data, problem_set in sets.items()]
        cells = []
        for score in [*scores, row["average"]]:
            cells.append("{:.1f} ({:.1f}-{:.1f})".format(*[100 * x for x in score]))
        lines.append([row["arm"], str(row["window"] or "full"), *cells, f"{row['cache_mb']:.3f}",
                      f"{row['memory_mb']:.0f}"])
        if has_parts:
            parts = [score for name, score in row["scores"][last].items() if "sum-" in name]
            lines[-1].append(" ".join(f"{100 * part[0]:.0f}" for part in parts))
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    curves = curves_by_evictions(rows)
    if len({n for curve in curves.values() for n in curve}) > 1:
        text += "\n" + text_chart(BY_EVICTIONS, curves)
    return text

BY_EVICTIONS = "% right, by evictions since written"

def curves_by_evictions(rows):
    """{arm: {number of evictions: accuracy of the parts of answers that outlived as many}}"""
    return {row["arm"]: row["by_evictions"] for row in rows if row["window"]}

def learning_curves(arms):
    """{arm and K: {step: accuracy}} of each run from its metrics.jsonl, means of 20 steps; a list,
    one for each run."""
    found = []
    for folder, (arm, config) in arms.items():
        path = Path(folder, "metrics.jsonl")
        lines = []
        if config and path.exists():
            lines = path.read_text().splitlines()
        bins = {}
        for line in lines:
            metrics = json.loads(line)
            if "accuracy" in metrics:
                label = arm if metrics["K"] is None else f"{arm}, K = {metrics['K']}"
                step = 20 * math.ceil(metrics["step"] / 20)
                bins.setdefault(label, {}).setdefault(step, []).append(metrics["accuracy"])
        found.append({label: {step: float(np.mean(x)) for step, x in curve.items()}
                      for label, curve in bins.items()})
    return found

def mean_curve(curves):
    """The mean of several curves {x: y}, where any of them has a point."""
    points = {}
    for curve in curves:
        for x, y in curve.items():
            points.setdefault(x, []).append(y)
    return {x: float(np.mean(ys)) for x, ys in sorted(points.items())}

def text_chart(title, curves):
    """Curves {label: {x: y}}, y between 0 and 1 -> lines of text, in %."""
    numbers = sorted({x for curve in curves.values() for x in curve})
    text = f"{title:36}" + "".join(f"{x:>5}" for x in numbers) + "\n"
    for label, curve in curves.items():
        cells = [f"{100 * curve[x]:5.0f}" if x in curve else " " * 5 for x in numbers]
        text += f"{label:36}" + "".join(cells) + "\n"
    return text

def draw(rows, arms, path):
    """Four panels: learning curves (a thin line for each seed), accuracy over evictions and over
    windows, and the cache over the length. Returns the same as text where there is no matplotlib.
    """
    runs = learning_curves(arms)
    labels = dict.fromkeys(label for run in runs for label in run)
    learning = {label: mean_curve([run[label] for run in runs if label in run])
                for label in labels}
    windows, caches = {}, {}
    for row in rows:
        windows.setdefault(row["arm"], {})[row["window"]] = row["average"][0]
        curve = caches.setdefault(f"window {row['window'] or 'full'}", {})
        for scores in row["scores"].values():
            curve[round(scores["tokens"][0])] = scores["cache_mb"][0]
    panels = {"accuracy while training, by step": learning,
              BY_EVICTIONS: curves_by_evictions(rows), "accuracy by window (0: full)": windows}
    if find_spec("matplotlib") is None:
        return "\n".join(text_chart(title, curves) for title, curves in panels.items())
    import matplotlib.pyplot as plt
    panels["KV cache, MB, by response tokens"] = caches
    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for label, curve in curves.items():
            line, = axis.plot(*zip(*sorted(curve.items())), marker=".", label=label)
            for run in runs if curves is learning else []:
                points = run.get(label, {})
                axis.plot(list(points), list(points.values()), color=line.get_color(), lw=0.5)
        axis.set_title(title)
        axis.legend(fontsize=7)
    figure.savefig(path)
    return f"{path}: learning curves, accuracy over evictions and windows, memory over length\n"

WITHOUT_RUNS = {"window": 0, "max_new_tokens": 512, "evict_ratio": 0.25}

def settle(args, configs):
    """What the command line leaves open is as in the runs, alike for all arms."""
    if not args.windows:
        args.windows = sorted({config["window"] for config in configs})
    if not args.max_new_tokens:
        args.max_new_tokens = max(config["max_new_tokens"] for config in configs)
    for name in ("evict_ratio", "prompt_template", "system", "template_args", "date"):
        values = [config.get(name, "") for config in configs]
        if getattr(args, name) is None and values != values[:1] * len(values):
            raise UserError(f"the runs differ in {name}; give --{name.replace('_', '-')}")
        if getattr(args, name) is None:
            setattr(args, name, values[0])
    check_template(args.prompt_template)
    for window in args.windows:
        eviction_size(window, args.evict_ratio)
    if LIBRARY is None:
        args.grader = "builtin"

def compare(args):
    """Measures all arms on all data under all windows, as `evaluation_args` says. Writes args.json
    and, beside it, a .jsonl with a record per sample. Returns the table in Markdown."""
    if not (args.model or args.runs) or not args.data:
        raise UserError("give --model DIR or --runs RUN, and --data FILE.jsonl or one of "
                        f"{', '.join(BENCHMARKS)}")
    if args.batch < 1 or min(args.limit, args.samples or 0, args.pass_at or 0) < 0:
        raise UserError("--batch must be at least 1, --limit, --samples, --pass-at at least 0")
    arms = find_arms(args.model, args.runs)
    settle(args, [config for _, config in arms.values() if config] or [WITHOUT_RUNS])
    sets = dict(load_set(name, args) for name in args.data)
    if len(sets) < len(args.data):
        raise UserError("--data: two files have the same name")
    settings = {"grader": f"math-verify {LIBRARY}" if args.grader == "auto" else "builtin"}
    for name in ("seed", "max_new_tokens", "evict_ratio", "dtype", "prompt_template", "system",
                 "template_args", "date"):
        settings[name] = getattr(args, name)
    settings["data"] = {name: [problem_set.n_samples, problem_set.temperature,
                               problems_hash(problem_set.problems)]
                        for name, problem_set in sets.items()}
    path = Path(args.json)
    lines_path = path.with_suffix(".jsonl")
    is_taken = path.exists() or path.with_suffix(".md").exists()
    if path.suffix != ".json" or is_taken and not lines_path.exists():
        raise UserError(f"--json {path}: give a new name that ends in .json")
    path.parent.mkdir(parents=True, exist_ok=True)
    locked = open_locked(lines_path)                                    # until this returns
    hashes = {folder: weights_hash(folder) for folder in arms}
    records = {pair: record for pair, record in read_records(lines_path, settings).items()
               if record["weights"] == hashes.get(record["model"])}     # not of older weights
    for folder, (arm, config) in arms.items():
        loaded = None                                                   # the last one is freed
        for window, name in itertools.product(args.windows, sets):
            numbers = range(len(sets[name].problems))
            todo = [pair for pair in itertools.product(numbers, range(sets[name].n_samples))
                    if (folder, window, name, *pair) not in records]
            if not todo:
                continue
            loaded = loaded or load_arm(folder, config, args)
            set_chat_format(loaded[2], vars(args))
            common = {"arm": arm, "model": folder, "weights": hashes[folder], "window": window,
                      "data": name}
            for found in answer_problems(loaded, common, sets[name], todo, args):
                records |= {key(record): record for record in found}
                is_new = lines_path.stat().st_size == 0
                append(lines_path, [settings, *found] if is_new else found)
    rows = []
    for arm in dict.fromkeys(arm for arm, _ in arms.values()):
        models = [folder for folder, (name, _) in arms.items() if name == arm]
        for window in args.windows:
            rows.append(table_row(arm, window, models, sets, records, args.grader))
    write_json(path, {"grader": settings["grader"], "settings": settings, "rows": rows})
    text = markdown(rows, sets)
    path.with_suffix(".md").write_text(text)
    if args.plot:
        text += "\n" + draw(rows, arms, args.plot)
    return text

def evaluation_args(argv=None):
    """The settings of an evaluation, from the command line or a list of flags."""
    parser = ArgumentParser(description="Measures models and runs on problems: the table of arms.")
    add = parser.add_argument
    add("--model", default="", help="folder or Hugging Face id; default: that of the runs")
    add("--runs", nargs="+", default=[], help="run folders of train.py")
    add("--data", nargs="+", default=[], help=f"JSONL files, or: {', '.join(BENCHMARKS)}")
    add("--data-dir", default="data", help="folder with the files of the named sets")
    add("--limit", type=int, default=0, help="only the first so many problems; 0: all")
    add("--window", type=int, nargs="+", dest="windows", metavar="W",
        help="response tokens kept, 0: all; default: as in the runs")
    add("--evict-ratio", type=float, help="share that leaves; default: as in the run, else 0.25")
    add("--max-new-tokens", type=int, help="longest response; default: as in the runs, else 512")
    add("--samples", type=int, help="responses per problem; default: 16 for AIME, else 1")
    add("--temperature", type=float, help="default: 0.6 for several samples, else 0")
    add("--pass-at", type=int, help="k of pass@k and maj@k; default: 16 for AIME, else 1")
    add("--prompt-template", help="text with {problem} in it; default: as in the run")
    add("--system", help="system message of the chat format; default: as in the run")
    add("--template-args", help="JSON for the chat template; default: as in the run")
    add("--date", help="YYYY-MM-DD, for chat templates that write it; default: as in the run")
    add("--batch", type=int, default=32, help="rows that are decoded at a time")
    add("--json", default="runs/eval.json", help="file for the scores")
    add("--plot", default="", help="FILE.png: curves; as text where matplotlib is missing")
    add("--seed", type=int, default=0, help="other samples")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--grader", default="auto", choices=("auto", "builtin"), help="builtin: no math-verify")
    return parser.parse_args(argv)

def main():
    print(compare(evaluation_args()))

if __name__ == "__main__":
    run_script(main)
