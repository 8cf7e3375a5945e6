r"""evaluate.py: is the answer right, how often, and with how much memory? The paper's Table 1 for any model and runs.

    accuracy = mean over samples of [same_answer(gold, extract_answer(y))],   y ~ pi(. | C_t, S_t) under a window W
    pass@k   = 1 - C(n - c, k) / C(n, k)     for c of n samples right: the chance that k of them hold a right one
    maj@k    = is the most frequent answer of the first k right? Tied answers share the point; no answer has no vote

each a mean over problems, with a 95 % interval by bootstrap: problems are drawn anew, with replacement.

Answers are equal by value, not by form. Dressing goes (`$`, `\left`, `\text{}`, units, the comma of 1,000); tuples and
intervals compare by bracket and order, lists and sets in any order, words as text, expressions by their value: exact
where fractions can be (0.333 is not 1/3), else to ten digits, with random numbers for letters. Nothing is executed, and
nothing gets big or slow, whatever a model writes. (How an answer is found in a completion: rollout.py.) Left out:
inequalities (compared as text), proofs, a judge model.

Try it:  python evaluate.py --model DIR --data gsm8k --data-dir ../shared/data --limit 40 --window 0,64
"""
import cmath
import json
import math
import operator
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from random import Random

import numpy as np

from encoder import ModelOptions, command_line, flag, run_script
from model import UserError
from rollout import BENCHMARKS, MAX_ANSWER, extract_answer, measure

# ------------------------------------------------------------------------------------ comparing answers

SYMBOLS = str.maketrans({"−": "-", "×": "*", "·": "*", "÷": "/", "π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ",
                         "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "±": r"\pm ", "²": "^2", "³": "^3", "°": ""})
SPELLINGS = [(re.compile(pattern), usual) for pattern, usual in (
    (r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])|(?<=\\)[dtc](?=frac)", ""),              # \dfrac is \frac
    (r"\\?[$€£]|\^\{?\\circ\}?|\\degree|(?<!\\)\\[()\[\]]", ""),                                # $5, 60^\circ, \(5\)
    (r"(?<=[0-9])(?:,\\!\s*|\{,\}|\\,)(?=[0-9]{3})", ""),                                        # 10,\!080  10{,}080
    (r"(?:(?<!\\)\\[,!;: ]|\\q?quad(?![A-Za-z])|[~\s])+", " "), (r" ?_ ?", "_"), (r"\*\*", "^"),
    (r"\\(?:cdot|times)(?![A-Za-z])", "*"), (r"\\div(?![A-Za-z])", "/"), (r"(?<=\)) ?(?=[0-9])", "*"),
    (r"(\\frac) ?([0-9])", r"\1{\2}"), (r"(\\frac\{[^{}]*\}) ?([0-9])", r"\1{\2}"),               # \frac12
    (r"(?<![\w.^}/)* ])([0-9]+)(?: ?\\frac\{([0-9]+)\}\{([0-9]+)\}| ([0-9]+)/([0-9]+))(?![0-9])", r"(\1+\2\4/\3\5)"),
    (r"(?<![\\A-Za-z])(?:np\.|math\.)?(sqrt|pi|infty|ln|log|exp|sin|cos|tan|arc[a-z]+)(?![A-Za-z])", r"\\\1"),
    (r"\\(sin|cos|tan)\^\{-1\}", r"\\arc\1"), (r"(\\log)_\{?10\}?", r"\1"),
    (r"\\([gl])eq?(?:slant)?(?![a-z])", r"\\\1e"))]
PERCENT = re.compile(r" ?(?:\\?%|\\text\{ ?percent\}|percent)$")
UNIT = re.compile(r"""(?<=[0-9})])\ ?(?:\\(?:text|textrm|mbox|mathrm)\ ?\{[A-Za-z/. ]+\}             # 5 \text{ m/s}^2
    | \ [A-Za-z]{3,}(?:\ [A-Za-z]{2,}){0,2} | (?:[cmk]m|[mk]g|m[lL]|ft))(?:\^\{?-?[23]\}?)?$""", re.X)
NOT_A_UNIT = re.compile(r"""(?ix)\b(?:(?:(?:hundred|thousand)(?:th)?|[mbt]r?illion|dozen|quarter|third)s?|hal(?:f|ves)
    |(?:four|fif|six|seven|eigh|nin|ten)ths?|one|two|three|four|five|six|seven|eight|nine|ten|squared|cubed|factorial
    |sqrt|pi|ln|log|sin|cos|tan|[eiknxyz]|am|pm|base|and|or|plus|minus|times|over|less|more|than|if|is)\b""")
THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]*)?")
COMMA = re.compile(r"(?:[,;] *)?(?:\\text ?\{ *)?\b(?:and|or)\b *\}?|[,;]|\\cup(?![A-Za-z])")
NAMED = re.compile(r"""(\\?[A-Za-z]+(?:_\w|_\{\w+\})?(?:\([A-Za-z]\))?|\\text\{[^{}]*\})\ ?               # x  x_1  f(x)
    (?:=|\\in(?![A-Za-z]))([^=<>]+)""", re.X)
MATRIX = re.compile(r"\\begin\{([pb]matrix)\}(.*)\\end\{\1\}")
BRACKETED = re.compile(r"([(\[]|\\\{)(.*)([)\]]|\\\})")
TEXT = re.compile(r"\\(?:text[a-z]*|mbox|math[a-z]+|operatorname) ?\{([^{}]*)\}")


def same_answer(gold, prediction, tolerance=0.0):
    r"""Whether a prediction states the gold answer; nothing predicted is wrong. tolerance: relative, of a number.

    >>> same_answer("1/2", r"\dfrac{1}{2}"), same_answer(r"\sqrt{12}", r"2\sqrt3"), same_answer("(0,1]", "(0, 1.0]")
    (True, True, True)
    >>> same_answer("1/3", "0.333"), same_answer("(1,2)", "(2,1)"), same_answer("x=5", "y=5"), same_answer("5", None)
    (False, False, False, False)"""
    if not prediction or max(len(gold), len(prediction)) > MAX_ANSWER:
        return False
    whole = usual(gold), usual(prediction)
    a, b = (PERCENT.sub("", text) for text in whole)
    readings = [(a, b)]                                                         # 50% is 50, if asked for in percent
    if (a != whole[0]) != (b != whole[1]):
        readings += [(f"({a})/100", b) if a != whole[0] else (a, f"({b})/100")]  # and it is 1/2
    return any(agree(canonical(a), canonical(b), tolerance) for a, b in readings)


def agree(a, b, tolerance):
    """Whether two canonical answers say the same: x=5 and 5 do, 5 cm and 5; x=5 and y=5 do not, 5 cm and 5 km."""
    (name, unit, form), (other_name, other_unit, other) = a, b
    short, long = sorted((unit, other_unit), key=len)
    if name and other_name and name != other_name or short and short != long and not (
            len(long) > 3 and re.match(".*".join(short), long)):                # the c and m of centimeter
        return False
    numbers = all(isinstance(x, tuple) and not isinstance(x[0], str) for x in (form, other))
    return form == other != "" or numbers and all(
        abs(p - q) <= tolerance * max(abs(p), abs(q)) for p, q in zip(form, other))


def usual(answer):
    r"""The answer in its usual spelling, undressed: `$\left(1,\,2\right)$.` becomes `(1, 2)`."""
    answer = answer.translate(SYMBOLS)
    for spelling, replacement in SPELLINGS:
        answer = spelling.sub(replacement, answer)
    return answer.strip(" ").rstrip(" .")


def canonical(text, nesting=3):
    """(name, unit, form): the x of `x = 5 cm` or "", cm or "", and a form that is equal for equal answers."""
    text, unit = text.strip(" "), ""
    if (found := UNIT.search(text)) and not NOT_A_UNIT.search(found[0]):
        text, unit = text[:found.start()], re.sub(r"\\[a-z]+|square|sq|cubic|[^a-z/]", "", found[0].lower())
        unit = re.sub("(?<=[a-z]{2})s$", "", unit)
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "")

    def forms(parts):                                                           # 3 \pm 1 is two
        signed = [part.replace(r"\pm", sign) for part in parts for sign in ("+-" if r"\pm" in part else "+")]
        return [canonical(part, nesting - 1)[::2] for part in signed]           # names and forms

    def unordered(parts):
        names, values = zip(*(found := forms(parts)))
        one = len(set(names)) == 1                                              # x=1 or x=2
        return names[0] if one else "", unit, ("list", frozenset(Counter(values if one else found).items()))
    if nesting:
        if found := MATRIX.fullmatch(text):
            return "", unit, ("matrix", *(tuple(forms(r.split("&"))) for r in found[2].strip("\\ ").split(r"\\")))
        if found := NAMED.fullmatch(text):
            return plain(found[1]), unit, canonical(found[2], nesting - 1)[2]
        if 1 < len(parts := split(text, COMMA)) <= 30:                          # 1, -2   (0,1) \cup (1,2)
            return unordered(parts)
        if (found := BRACKETED.fullmatch(text)) and 0 < len(parts := split(found[2], COMMA)) <= 30:
            if found[1] == r"\{":
                return unordered(parts)
            if len(parts) > 1:
                return "", unit, (found[1], *forms(parts), found[3])
        if r"\pm" in text:
            return unordered([text])
    try:
        if text.count("=") == 1:                                                # 2x+y=1 is 4x+2y-2=0
            return "", unit, ("=", *value("({})-({})".format(*text.split("=")), to_a_factor=True))
        return "", unit, value(text)
    except (ValueError, ArithmeticError, RecursionError, IndexError):           # no expression, or one that gets big
        return "", unit, plain(text).casefold()


def split(text, separator):
    """The parts of a text between separators outside all brackets; none if a bracket closes that has not opened."""
    depth = [*accumulate(((c in "([{") - (c in ")]}") for c in text), initial=0)]
    edges = [edge for found in separator.finditer(text) if not depth[found.start()] for edge in found.span()]
    return [text[a:b] for a, b in zip([0, *edges[1::2]], [*edges[::2], None])] if min(depth) == 0 else []


def plain(text):
    r"""The text without spaces, `\text{}` and needless braces, to be compared letter by letter."""
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", re.sub(r"(?<!\\)\{([^{}\\])\}", r"\1", TEXT.sub(r"\1", text)))


# ------------------------------------------------------------------------------------ the value of an expression

TOKEN = re.compile(r"""\ *([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))? | \.[0-9]+ | [A-Za-z]{3,}
    | (?:\\[A-Za-z]+|[A-Za-z])(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\})|(?<=[A-Z])\([0-9]\))? | \\?.)\ *""", re.X | re.S)
FUNCTIONS = {"ln": cmath.log, "log": cmath.log10} | {
    name: getattr(cmath, name.replace("arc", "a")) for name in "exp sin cos tan arcsin arccos arctan".split()}
OPERATORS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul), "/": (2, operator.truediv),
             "^": (4, lambda a, b: power(a, b))}                                # how tightly it binds; a sign: 3
CONSTANTS, CLOSING = {r"\pi": math.pi, "e": math.e, "i": 1j}, {"(": ")", "[": "]", "{": "}", "|": "|"}


def value(text, to_a_factor=False):
    r"""Three values of `2x-1`, `\frac{\sqrt2}{2}`, `1 1/2`, each a Fraction if it is exact, else complex to ten digits.

    Letters stand for random numbers, drawn each time: expressions that agree three times are equal whatever their form.
    What is no expression, or gets big, raises ValueError, ArithmeticError, IndexError or RecursionError."""
    found = []
    for draw in range(3):
        tokens = TOKEN.findall(TEXT.sub(r"\1", text))[::-1]                     # the next one is the last
        found.append(expression(tokens, draw))
        if tokens:
            raise ValueError
    found = [x / found[0] for x in found] if to_a_factor else found
    for i, x in enumerate(found):
        if not isinstance(x, Fraction):
            near, scale = Fraction(x.real).limit_denominator(1000), 10 ** (9 - math.floor(math.log10(abs(x))))
            tens = complex(round(x.real * scale), round(x.imag * scale)) / scale
            found[i] = near if abs(x - near) < 1e-12 * abs(x) else tens         # \sqrt2^2 is 2
    return tuple(found)


def expression(tokens, draw, least=1):
    """The value of what comes next, up to an operator that binds more loosely than `least`."""
    if tokens[-1] in ("+", "-"):
        value = OPERATORS[tokens.pop()][1](0, expression(tokens, draw, 3))      # -2^2 is -(2^2)
    else:
        value = operand(tokens, draw)
    while tokens:
        beside = re.match(r"[A-Za-z(\[{]|\\[A-Za-z]", tokens[-1]) is not None  # 2\pi, (x+1)(x-1), but not 2 3
        rank, apply = OPERATORS.get("*" if beside else tokens[-1], (0, None))
        if rank < least:
            break
        from_the_left = beside or tokens.pop() != "^"                           # 2^3^2 is 2^(3^2)
        value = small(apply(value, expression(tokens, draw, rank + from_the_left)))
    return value


def operand(tokens, draw):
    """The value of a number, a letter, a bracket, or a command with what it takes."""
    token = tokens.pop()
    name = token.lstrip("\\")
    if token in CLOSING:
        value = expression(tokens, draw)
        if tokens.pop() != CLOSING[token]:
            raise ValueError
        value = abs(value) if token == "|" else value
    elif token[0] in "0123456789.":
        value = small(Fraction(token))
    elif token in (r"\frac", r"\binom"):
        a, b = operand(tokens, draw), operand(tokens, draw)
        value = small(a / b) if token == r"\frac" else Fraction(math.comb(*map(range(171).index, (a, b))))
    elif token == r"\sqrt":
        degree = operand(tokens, draw) if tokens[-1] == "[" else Fraction(2)
        value = power(operand(tokens, draw), 1 / degree)
    elif token[0] == "\\" and name in FUNCTIONS:
        bracket = tokens[-1] in CLOSING                                         # \sin(x)^3 is (\sin x)^3
        value = operand(tokens, draw) if bracket else expression(tokens, draw, 3)
        while not bracket and tokens and re.fullmatch(r"[A-Za-z]|\\pi", tokens[-1]):            # \sin 2x
            value = value * operand(tokens, draw)
        value = FUNCTIONS[name](value)
    elif token in CONSTANTS:
        value = CONSTANTS[token]
    elif name[:1].isalpha() and (token[0] == "\\" or not token[:3].isalpha() or len(token) < 3):
        random = Random(f"{name.replace('{', '').replace('}', '')} {draw}")
        value = complex(random.uniform(0.5, 2), random.uniform(0, 0.5))
    else:
        raise ValueError                                                        # a word, or a sign of no meaning here
    while tokens and tokens[-1] == "!":
        tokens.pop()
        value = Fraction(math.factorial(range(171).index(value)))               # 170! has 300 digits; ValueError above
    return value


def small(x):
    """x, unless it is a fraction of more than 300 digits: ValueError."""
    if isinstance(x, Fraction) and max(x.numerator.bit_length(), x.denominator.bit_length()) > 1000:
        raise ValueError
    return x


def power(a, b):
    """a ** b: exact if it can be, never big."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        if b.denominator == 1:
            if abs(b) * max(a.numerator.bit_length(), a.denominator.bit_length()) > 1000:
                raise ValueError
            return a ** int(b)
        exact = Fraction(*(round(abs(n) ** (1 / b.denominator)) for n in (a.numerator, a.denominator)))
        if exact ** b.denominator == a:
            return power(exact, Fraction(b.numerator))
    return complex(a) ** complex(b)


# ------------------------------------------------------------------------------------ scores

def grade(problem, response):
    """(prediction, whether it is right). A problem with "exact": true wants its answer to the letter."""
    gold, prediction = problem["answer"], extract_answer(response)
    right = prediction == gold if problem.get("exact") else same_answer(gold, prediction, problem.get("tolerance", 0.0))
    return prediction, right


def pass_at_k(n, c, k):
    """The chance that k of n samples, drawn without replacement, hold one of the c right ones."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(samples):
    """1 if the most frequent prediction is right, 0 if not; tied ones share the point, no prediction has no vote."""
    votes = []                                                                  # [prediction, how often, right]
    for sample in samples:
        alike = [v for v in votes if v[2] == sample["correct"] and (
            v[0] == sample["prediction"] or same_answer(v[0], sample["prediction"]))]
        if alike:
            alike[0][1] += 1
        elif sample["prediction"] is not None:
            votes.append([sample["prediction"], 1, sample["correct"]])
    first = [right for _, count, right in votes if count == max(v[1] for v in votes)]
    return sum(first) / max(len(first), 1)


def scores(samples, k):
    """What is measured of one problem, {name: number}: pass@k and maj@k for k, all powers of two, and all samples."""
    n, right = len(samples), sum(s["correct"] for s in samples)
    ks = sorted({2 ** i for i in range(1, n.bit_length())} | {n, k} - {0, 1})
    return {"accuracy": right / n, **{f"pass@{k}": pass_at_k(n, right, k) for k in ks},
            **{f"maj@{k}": majority(samples[:k]) for k in ks},
            **{name: sum(s[name] for s in samples) / n for name in ("truncated", "tokens", "evictions")}}


def interval(columns, draws=2000):
    """The mean of the means of columns (arrays, a number a problem), with its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    means = np.mean([x[rng.integers(len(x), size=(draws, len(x)))].mean(axis=1) for x in columns], axis=0)  # (draws,)
    return [float(np.mean([x.mean() for x in columns])), *map(float, np.quantile(means, (0.025, 0.975)))]


# ------------------------------------------------------------------------------------ the table of arms

@dataclass
class Options(ModelOptions):
    """The flags of `python evaluate.py`."""
    runs: tuple[str, ...] = flag((), "run folders of train.py; those that differ in nothing but the seed make one arm")
    data: tuple[str, ...] = flag((), f"JSONL files, or names: {', '.join(BENCHMARKS)}")
    data_dir: str = flag("data", "folder with the files of the named ones, which else come from the Hugging Face hub")
    limit: int = flag(0, "only the first so many problems of each, 0 for all", least=0)
    window: tuple[int, ...] = flag((-1,), "thought tokens kept, 0 keeps all, -1: as trained, else 0", least=-1)
    max_new_tokens: int = flag(512, "longest completion, in tokens", least=1)
    samples: int = flag(1, "completions of each problem", least=1)
    temperature: float = flag(0.0, "of sampling; 0 takes the likeliest token", least=0)
    pass_at: int = flag(0, "k of the table's pass@k, 0: the paper's (16 for AIME), at most --samples", least=0)
    batch: int = flag(32, "rows at a time", least=1)
    json: str = flag("", "FILE.json for all scores, and FILE.jsonl, FILE.md beside it; default runs/eval-HASH.json")
    plot: str = flag("", "FILE.png to draw accuracy over memory in (needs matplotlib)")


def summary(records, shown, k):
    """A row for each arm and window: its scores on each data set, {name: [mean, low, high]}, and the average of those
    shown, {data: name}. Of an arm with several models (seeds) a problem has the mean of their scores."""
    rows = []
    for arm, window in dict.fromkeys((r["arm"], r["window"]) for r in records):
        mine, found = [r for r in records if (r["arm"], r["window"]) == (arm, window)], {data: {} for data in shown}
        for r in mine:
            for name, score in scores(r["samples"], k).items():
                found[r["data"]].setdefault(name, {}).setdefault(r["number"], []).append(score)
        columns = {data: {name: np.array([np.mean(x) for _, x in sorted(by_number.items())])    # (problems,)
                          for name, by_number in names.items()} for data, names in found.items()}
        rows.append({"arm": arm, "window": window, "models": list(dict.fromkeys(r["model"] for r in mine)),
                     "cache_mb": max(r["cache_mb"] for r in mine), "memory_mb": max(r["memory_mb"] for r in mine),
                     "average": interval([columns[data][name] for data, name in shown.items()]),
                     "scores": {data: {name: interval([x]) for name, x in names.items()}
                                for data, names in columns.items()}})
    return rows


def markdown(rows, shown):
    """The table of arms, in %; the same by window, if there are several; and everything that was measured."""
    def table(*lines):
        return "".join("| " + " | ".join(line) + " |\n" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))

    def cell(x, name=""):
        return "{:.1f} ({:.1f}-{:.1f})".format(*(y * (1 if name in ("tokens", "evictions") else 100) for y in x))
    windows = {row["window"]: str(row["window"] or "full") for row in rows}
    average = {(row["arm"], row["window"]): cell(row["average"]) for row in rows}
    text = table(["arm", "window", *(f"{data} {name}".removesuffix(" accuracy") for data, name in shown.items()),
                  "average", "cache MB", "memory MB"], *(
        [row["arm"], windows[row["window"]], *(cell(row["scores"][data][name]) for data, name in shown.items()),
         cell(row["average"]), f"{row['cache_mb']:.3f}", f"{row['memory_mb']:.0f}"] for row in rows))
    if len(windows) > 1:
        text += "\n" + table(["average by window", *windows.values()], *(
            [arm, *(average.get((arm, W), "") for W in windows)] for arm in dict.fromkeys(row["arm"] for row in rows)))
    return text + "\n" + table(["data", "arm", "window", *rows[0]["scores"][next(iter(shown))]], *(
        [data, row["arm"], windows[row["window"]], *(cell(x, name) for name, x in row["scores"][data].items())]
        for data in shown for row in rows))


def draw(rows, path):
    """Average accuracy over the cache of a row, a line for each arm."""
    import matplotlib.pyplot as plt
    for arm in dict.fromkeys(row["arm"] for row in rows):
        x, y = zip(*sorted((row["cache_mb"], row["average"]) for row in rows if row["arm"] == arm))
        mean, low, high = np.array(y).T
        plt.errorbar(x, mean, [mean - low, high - mean], label=arm, marker="o", capsize=3)
    plt.gca().set(xlabel="cache, MB a sequence", ylabel="accuracy, average")
    plt.legend()
    plt.savefig(path)


def compare(o):
    """Measures, and writes FILE.json and FILE.md -> the Markdown tables, and FILE.json."""
    problems, records, path = measure(o, grade)
    shown = {p["data"]: f"pass@{k}" if (k := min(o.pass_at or p["k"], o.samples)) > 1 else "accuracy" for p in problems}
    text = markdown(rows := summary(records, shown, o.pass_at), shown)
    path.write_text(json.dumps({"rows": rows, "problems": records}, indent=1) + "\n")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    if o.plot:
        draw(rows, o.plot)
    return text, path


def main():
    o = command_line(Options, __doc__)
    if not o.data:
        raise UserError(f"which problems? give --data FILE.jsonl, or one of {', '.join(BENCHMARKS)}")
    if o.samples > 1 and not o.temperature:
        raise UserError(f"--samples {o.samples} at --temperature 0 are all the same; give --temperature 0.6")
    if o.pass_at > o.samples:
        raise UserError(f"pass@{o.pass_at} wants at least as many samples; give --samples {o.pass_at}, or more")
    if o.plot and not find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    if o.plot and (Path(o.plot).suffix != ".png" or not Path(o.plot).parent.is_dir()):
        raise UserError(f"--plot {o.plot}: give a name that ends in .png, in a folder that exists")
    print("{}\nsaved: {}, .jsonl, .md".format(*compare(o)))


if __name__ == "__main__":
    run_script(main)
