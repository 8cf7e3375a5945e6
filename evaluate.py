r"""evaluate.py: is the answer right, and how often is it under a given window?

Answers: finding one in a completion, and deciding whether it is the right one.

1. The answer is the last complete `\boxed{...}`, else what follows the last "The answer is", "Answer:" or "####".
2. Two answers are the same if their canonical forms are equal. Numbers are exact: 0.5 is 1/2, 0.333 is not 1/3.
3. Dressing goes first: `$`, `\left`, `\text{}`, degrees, percent signs (50% is 50), units, `x =`, the comma of 1,000.
4. Tuples and intervals compare by bracket and order, sets and bare lists in any order, all else as text without spaces.
5. Nothing is executed or rounded, and nothing gets big or slow: at most MAX_CHARS characters, three-digit exponents.

    accuracy = 1/n sum_i [ same_answer(gold_i, extract_answer(y_i)) ],   y_i ~ pi(. | C_t, S_t) under a window W

Left out: sampling several answers (pass@k, maj@k), tolerance, algebra (sympy), the hub's benchmarks by name.

Try it:  python evaluate.py --model DIR --data gsm8k_test.jsonl --limit 20 --window 64
"""
import json
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path

from tqdm import tqdm

from model import UserError
from rollout import DTYPES, check_prompts, command_line, flag, generate, load, prompt_ids, run_script, window_of

MAX_CHARS = 1000  # longer is no answer; also well below the 4300 digits at which Python refuses to read an int

# ---------------------------------------------------------------- finding the answer

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.S)  # a backslash takes the next character along: \{ and \} are no braces
PHRASE = re.compile(r"\bthe (?:final |correct )?answer is:?|\banswer(?:\*\*)?:|#{4,}", re.I)
SENTENCE_END = re.compile(r"\n|\.(?=\**(?:\s|$))")  # the point of 3.5 ends nothing
MARKUP = re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(])|\\?\$|(?<!\\)\\[()\[\]]")  # **bold**  $  \$  \( \)  \[ \]; not 2**3


def extract_answer(text: str) -> str | None:
    r"""The final answer that a completion states, or None. Leave the prompt out: it may hold boxes of its own.

    >>> extract_answer(r"First \boxed{1}, then \boxed{\frac{1}{2}}, and cut off in \boxed{3")
    '\\frac{1}{2}'
    >>> extract_answer("He pays $20,000 four times. The answer is **$80,000**.")
    '80,000'
    """
    after_thinking = text.rpartition("</think>")[2]  # the whole text where there is no such tag
    text = after_thinking if after_thinking.strip() else text

    # From the last box back. While none closes, the box before can only close ahead of them: each piece needs one look.
    for piece in reversed(BOX.split(text)[1:]):
        depth = 1
        for brace in BRACE.finditer(piece[:MAX_CHARS]) if "}" in piece else ():
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return piece[: brace.start()].strip()

    if "answer" in text.lower() or "####" in text:  # much faster to see than PHRASE
        for piece in reversed(PHRASE.split(text)[1:]):
            sentence = SENTENCE_END.split(piece.lstrip(" *$\t\r\n")[:MAX_CHARS], maxsplit=1)[0]
            if answer := MARKUP.sub("", sentence).strip(" *\r").rstrip("."):
                return answer
    return None


# ---------------------------------------------------------------- comparing answers

DIGIT_GROUP = re.compile(r"(?<=[0-9])(?:,\\!\s*|\{,\}|\\,)(?=[0-9]{3})")  # 10,\!080  10{,}080  10\,080
DRESSING = re.compile(r"""\\(?:left|right|displaystyle)(?![A-Za-z]) | (?<=\\)[dtc](?=frac)      # \dfrac is \frac
    | \\?[$€£%] | \^\{?\\circ\}? | \\degree | ° | (?<!\\)\\[()\[\]]""", re.X)
SPACING = re.compile(r"(?:(?<!\\)\\[,!;: ]|\\q?quad(?![A-Za-z])|[~\s])+")
UNIT = re.compile(r"""(?<=[0-9}])\ ?(?:
      \\(?:text|textrm|mbox|mathrm)\ ?\{[A-Za-z/ ]+\}                    # 5 \text{ m/s}^2
    | \ [A-Za-z]{3,}(?:\ [A-Za-z]{2,}){0,2} | (?:[cmk]m|[mk]g|m[lL]|ft)  # 5 miles per hour, 5cm^3, but not 5 n
    )(?:\^\{?[23]\}?)?$""", re.X)
NOT_A_UNIT = re.compile(r"""(?ix)\b(?:(?:(?:hundred|thousand)(?:th)?|[mbt]r?illion|dozen|quarter|third)s?|hal(?:f|ves)
    |(?:four|fif|six|seven|eigh|nin|ten)ths?|squared|cubed|factorial|pi|[eiknxyz]|am|pm|base|and|or|plus)\b""")
NAME = re.compile(r"(\\?[A-Za-z]+(?:_\w|_\{\w+\})?(?:\([A-Za-z]\))?) ?(?:=|\\in(?![A-Za-z])) ?(.+)")  # x=  f(x)=  x \in
THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]*)?")
BRACKETED = re.compile(r"([(\[]|\\\{)(.*)([)\]]|\\\})")
TEXT = re.compile(r"\\(?:text|textbf|textrm|mbox|mathrm|mathbf) ?\{([^{}]*)\}")
SINGLE = re.compile(r"(?<!\\)\{([^{}\\])\}")  # x^{2} is x^2
SPACE = re.compile(r"(?<![0-9]) | (?![0-9])")  # any but the one in 1 1/2, which is not 11/2
NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"
VALUE = re.compile(rf"([-+]?) ?(?:([0-9]+) (?=[1-9].*/))?({NUMBER})(?:/(-?{NUMBER}))?")  # sign, whole, top, bottom
FRAC = re.compile(r"\\frac(?:\{([^{} ]+)\}|([0-9]))(?:\{([^{} ]+)\}|([0-9]))$")
TEN_TO = re.compile(rf"([-+]?)(?:({NUMBER})(?:\\times|\\cdot|[*×·]))?10\^\{{?([-+]?[0-9]{{1,3}})\}}?")


def same_answer(gold: str, prediction: str | None) -> bool:
    r"""Whether a prediction states the gold answer; nothing predicted is wrong.

    >>> same_answer("1/2", r"\dfrac{1}{2}"), same_answer("72", "72 clips"), same_answer("[0,1)", r"\left[0, 1\right)")
    (True, True, True)
    >>> same_answer("1/3", "0.333"), same_answer("(1,2)", "(2,1)"), same_answer("x=5", "y=5"), same_answer("5", None)
    (False, False, False, False)
    """
    if not prediction or max(len(gold), len(prediction)) > MAX_CHARS:
        return False
    (gold_name, gold_form), (name, form) = canonical(undressed(gold)), canonical(undressed(prediction))
    return form == gold_form != "" and (name == gold_name or "" in (name, gold_name))


def undressed(answer: str) -> str:
    r"""The answer without what LaTeX and prose put around it: `$\left(1,\,2\right)$.` becomes `(1, 2)`."""
    answer = DRESSING.sub("", DIGIT_GROUP.sub("", answer.replace("−", "-")))
    return SPACING.sub(" ", answer).strip(" ").rstrip(" .")


def canonical(answer: str, nesting: int = 3) -> tuple[str, object]:
    """(name, form): the x of `x = 5` or "", and a number, a sequence or a text that is equal for equal answers."""
    answer = answer.strip(" ")
    if (unit := UNIT.search(answer)) and not NOT_A_UNIT.search(unit[0]):
        answer = answer[: unit.start()]
    name, value = match.groups() if (match := NAME.fullmatch(answer)) else ("", answer)
    name = plain(name)
    if THOUSANDS.fullmatch(value):
        value = value.replace(",", "")
    elif nesting and len(parts := split_at_commas(answer)) > 1:  # 1, -2 or (0,1), (1,0)
        return "", frozenset(Counter(canonical(part, nesting - 1) for part in parts).items())
    elif nesting and (match := BRACKETED.fullmatch(value)) and (parts := split_at_commas(match[2])):
        forms = [canonical(part, nesting - 1) for part in parts]
        if match[1] == r"\{":
            return name, ("set", frozenset(forms))
        if len(forms) > 1:
            return name, (match[1], *forms, match[3])
    value = plain(value)
    number = exact_value(value)
    return name, value if number is None else number


def split_at_commas(text: str) -> list[str]:
    """The parts between the commas outside all brackets; none where a bracket closes that was not opened: 0,1)+(2,3"""
    depths = list(accumulate((char in "([{") - (char in ")]}") for char in text))
    if min(depths, default=-1) < 0:
        return []
    commas = (i for i, depth in enumerate(depths) if depth == 0 and text[i] == ",")
    return [text[a + 1 : b] for a, b in pairwise([-1, *commas, len(text)])]


def plain(text: str) -> str:
    r"""The text without spaces, `\text{}` and needless braces, to be compared letter by letter."""
    return SPACE.sub("", SINGLE.sub(r"\1", TEXT.sub(r"\1", text)))


def exact_value(text: str) -> Fraction | None:
    r"""The value of -3, .5, 1/2, \frac{1}{2}, 1\frac{1}{2} (mixed: 3/2), 3.2e5 or 3.2\times10^5, else None."""
    if match := TEN_TO.fullmatch(text):
        text = f"{match[1]}{match[2] or 1}e{match[3]}"
    match = VALUE.fullmatch(FRAC.sub(r" \1\2/\3\4", text).strip(" "))
    if not match or not (bottom := Fraction(match[4] or 1)):
        return None
    value = Fraction(match[2] or 0) + Fraction(match[3]) / bottom
    return -value if match[1] == "-" else value


# ---------------------------------------------------------------- problems, and what a model makes of them

ASK = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def load_problems(path):
    """Reads a JSONL file: an object a line, with `problem`, `question` or `prompt`, and `answer` -> list of dicts with
    "problem" and "answer" as strings. Raises UserError naming file and line for anything else."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")                # splitlines also cuts at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({getattr(error, 'strerror', None) or 'it is not UTF-8 text'}); "
                        "give --data FILE.jsonl, one JSON object a line") from None
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number}: not JSON; one object a line is wanted") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object with 'problem' and 'answer'")
        problem = next((row[key] for key in ("problem", "question", "prompt") if row.get(key)), None)
        answer = row.get("answer")
        if isinstance(answer, str):
            answer = answer.rpartition("####")[2].strip()                       # GSM8K as published ends "#### 72"
        if not isinstance(problem, str):
            raise UserError(f"{path}, line {number}: no 'problem' (or 'question' or 'prompt') that is a text")
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
            raise UserError(f"{path}, line {number}: no 'answer' that is a text or a number")
        problems.append({**row, "problem": problem, "answer": str(answer)})
    if not problems:
        raise UserError(f"{path} holds no problems; one JSON object a line is wanted")
    return problems


def ask(tokenizer, problem):
    """The ids that put a problem to a model; a base model, without a chat format, reads it as it stands."""
    return prompt_ids(tokenizer, problem + ASK if tokenizer.template else problem)


def solve(model, encoder, tokenizer, problems, *, window, evict_ratio, max_new_tokens, temperature=0.0, batch=32,
          same=same_answer, seed=0, progress=""):
    """Lets a model answer problems under a window (0: full cache); encoder None: without adapter.

    same(gold, prediction) grades. Returns a record for each problem, in their order."""
    prompts = [ask(tokenizer, p["problem"]) for p in problems]
    check_prompts(model, prompts, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))         # rows of like length share a batch
    records = [None] * len(problems)
    for start in tqdm(range(0, len(order), batch), desc=progress, disable=not progress):
        chosen = order[start:start + batch]
        rollout = generate(model, encoder, [prompts[i] for i in chosen], max_new_tokens=max_new_tokens, window=window,
                           evict_ratio=evict_ratio, n_ids=tokenizer.n_ids, temperature=temperature, seed=seed + start)
        for i, ids, evictions, ended in zip(chosen, rollout.completions(), rollout.evictions().tolist(),
                                            rollout.ended.tolist()):
            response = tokenizer.decode([t for t in ids if t not in model.config.eos_ids])
            prediction = extract_answer(response)
            records[i] = {"problem": problems[i]["problem"], "answer": problems[i]["answer"], "prediction": prediction,
                          "correct": same(problems[i]["answer"], prediction or ""), "tokens": len(ids),
                          "truncated": not ended, "evictions": evictions, "response": response}
    return records


@dataclass
class Options:
    """The flags of `python evaluate.py`."""
    model: str = flag("", "model folder, as downloaded from Hugging Face")
    run: str = flag("", "run folder of train.py: its adapter, its model, its window")
    data: str = flag("", "JSONL file of problem/question/prompt and answer")
    limit: int = flag(0, "only the first so many problems, 0 for all", least=0)
    window: int = flag(-1, "thought tokens kept, 0 keeps all, -1: as the run was trained, else 0", least=-1)
    evict_ratio: float = flag(-1.0, "share of the window that leaves at once, -1: as the run was trained, else 0.25")
    max_new_tokens: int = flag(512, "longest completion, in tokens", least=1)
    temperature: float = flag(0.0, "of sampling; 0 takes the likeliest token", least=0)
    batch: int = flag(32, "problems at a time", least=1)
    seed: int = flag(0, "makes the draw repeatable", least=0)
    json: str = flag("", "file to write: the scores and every problem's record")
    dtype: str = flag("auto", "of the weights; auto: bfloat16 on a GPU, else float32", ("auto", *DTYPES))
    device: str = flag("auto", "auto: cuda, mps or cpu", ("auto", "cuda", "mps", "cpu"))


def main():
    o = command_line(Options, __doc__)
    if not o.data:
        raise UserError("which problems? give --data FILE.jsonl")
    if o.json and (Path(o.json).exists() or not Path(o.json).parent.is_dir()):
        raise UserError(f"--json {o.json} exists, or its folder does not; give another")
    problems = load_problems(o.data)[:o.limit or None]
    model, encoder, tokenizer, config = load(o.model, o.run, o.dtype, o.device)
    window, evict_ratio = window_of(o, config)
    records = solve(model, encoder, tokenizer, problems, window=window, evict_ratio=evict_ratio,
                    max_new_tokens=o.max_new_tokens, temperature=o.temperature, batch=o.batch, seed=o.seed,
                    progress=f"{Path(o.data).name}, window {window or 'full'}")
    scores = {name: sum(r[key] for r in records) / len(records) for name, key in (
        ("accuracy", "correct"), ("truncated", "truncated"), ("response_tokens", "tokens"), ("evictions", "evictions"))}
    print("| data | window | n | accuracy | truncated | tokens | evictions |\n|---|---|---|---|---|---|---|")
    print(f"| {Path(o.data).name} | {window or 'full'} | {len(records)} | {scores['accuracy']:.1%} | "
          f"{scores['truncated']:.1%} | {scores['response_tokens']:.0f} | {scores['evictions']:.1f} |")
    if o.json:
        report = {"model": o.model, "run": o.run, "data": o.data, "window": window, "n": len(records), **scores}
        Path(o.json).write_text(json.dumps({**report, "problems": records}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_script(main)
