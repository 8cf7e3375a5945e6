"""Finding and grading answers: tables of what must be right and of near misses that must be wrong."""

import random
import time

import pytest

from evaluate import MAX_CHARS, extract_answer, same_answer

EXTRACTED = [  # (completion, answer)
    (r"so \boxed{42}.", "42"),
    (r"\boxed{1} and then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\{1, 2\}} is the set", r"\{1, 2\}"),
    (r"\boxed{\left\{x : x > 0\right.}", r"\left\{x : x > 0\right."),  # \{ needs no \}
    (r"\fbox{7}", "7"),
    (r"\boxed {7}", "7"),
    (r"\boxed{ 7" + "\n}", "7"),
    (r"$\boxed{\text{east}}$", r"\text{east}"),
    (r"\boxed{5} or rather \boxed{6", "5"),  # cut off by the token limit
    (r"\boxed{5} or rather \boxed{\frac{6}{7}", "5"),
    (r"\boxed{cut \boxed{5}", "5"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"{ { \boxed{5}", "5"),
    (r"\boxed{5} }", "5"),
    (r"The answer is 3. \boxed{4}", "4"),
    (r"\boxed{4}. The answer is 3.", "4"),
    (r"\boxed{4", None),
    (r"\boxed{4\}", None),
    (r"\boxed 4", None),
    (r"\boxed{}", ""),  # complete, and says nothing
    ("", None),
    ("I think it is 5.", None),
    ("The answer is 5.", "5"),
    ("The answer is 3.5.", "3.5"),
    ("The answer is 3.5", "3.5"),
    ("THE FINAL ANSWER IS: 7\nBye.", "7"),
    ("The answer is 12. It is even. So there.", "12"),
    ("The answer is 1. Wait. The answer is 2.", "2"),
    ("The answer is 5. The answer is", "5"),
    ("The answer is $80,000.", "80,000"),
    ("The answer is **$80,000**.", "80,000"),
    ("**The answer is 9.**", "9"),
    (r"The answer is $\frac{3}{4}$.", r"\frac{3}{4}"),
    (r"The answer is \(x = 3\).", "x = 3"),
    ("Answer: 8 eggs", "8 eggs"),
    ("**Answer:** 8", "8"),
    ("**Final Answer**: 8", "8"),
    ("Answer:\n$$\n8\n$$\n", "8"),
    ("Answer: **8** eggs", "8 eggs"),
    ("Answer: 2**3", "2**3"),
    ("3 + 4 = 7\n#### 7", "7"),
    ("#### 7\r\n", "7"),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    (r"<think>\boxed{1}</think> I don't know.", None),
    (r"<think>\boxed{1}</think>", "1"),
    (r"<think>\boxed{1}</think>" + " \n", "1"),
    (r"\boxed{1}</think>\boxed{2}</think>\boxed{3}", "3"),
]

SAME = [  # (gold, prediction): equal, in both directions
    *[("1/2", half) for half in ("0.5", ".5", "0.50", "5e-1", "2/4", r"\frac12", r"\dfrac{1}{2}", "1 / 2")],
    *[("18", text) for text in ("18.0", "018", "+18", r"\$18", "$18$", "18.", " 18\n", r"\text{18}", r"\(18\)")],
    *[("18", unit) for unit in ("18 dollars", r"18\text{ eggs}", r"18 \mathrm{m}", "18 feet per day", "18cm^2", "£18")],
    *[("50", percent) for percent in ("50%", r"50\%", r"50 \%", "50 percent", "50°", r"50^\circ", r"50^{\circ}")],
    *[("1000", sep) for sep in ("1,000", "1,000.00", r"1,\!000", "1{,}000", r"1\,000", "10^3", "10^{3}", "1e3")],
    *[("3/2", mixed) for mixed in ("1 1/2", r"1\frac{1}{2}", r"1 \frac12", "1.5", r"\frac{3}{2}")],
    *[("-3/2", mixed) for mixed in (r"-1\frac{1}{2}", "-1.5", "−1.5", r"\frac{-3}{2}", r"\frac{3}{-2}")],
    *[("320000", power) for power in (r"3.2\times10^{5}", r"3.2 \times 10^5", r"3.2\cdot10^{5}", "3.2*10^5", "3.2E5")],
    ("0.00032", r"3.2 \times 10^{-4}"),
    *[("5", named) for named in ("x=5", "x = 5", "x_1=5", r"\theta = 5.0", "f(x)=5", "x = 5 cm")],
    (r"x \in [-2,7]", "[-2, 7]"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"),
    ("(0.5, 1)", r"(\frac12, 1)"),
    ("[0,1)", r"\left[0,\, 1\right)"),
    ("1,-2", "-2, 1"),
    (r"\{1,2\}", r"\left\{2, 1\right\}"),
    ("(1,2), (3,4)", "(3,4), (1,2)"),
    ("x=1, y=2", "y = 2, x = 1"),
    (r"\text{Evelyn}", "Evelyn."),
    (r"\text{(C)}", "(C)"),
    ("70 \\sqrt{2}", "70\\sqrt2"),
    ("x^{2} + 1", "x^2+1"),
    ("4210_{5}", "4210_5"),
    ("9^{9^{9^9}}", "9^{9^{9^9}}"),
]

DIFFERENT = [  # (gold, prediction): near misses, in both directions
    *[("12", near) for near in ("112", "2", "1", "-12", "12.001", "1.2", "12/5", "1 2", "1,2", "(12)x", "12x", "12!")],
    ("-3", "3"),
    *[("1/2", near) for near in ("2", "1", "-1/2", "1/20", r"\frac{2}{1}", r"\frac{1}{2}3", "50%", "0.4999999999")],
    *[("1/3", near) for near in ("0.333", "0.3333333333333333", "1/30", "3")],
    *[("11/2", near) for near in ("1 1/2", r"1\frac{1}{2}", "1 + 1/2")],
    ("1/23", r"\frac{1}{2}3"),
    ("1", "1,000"),
    ("1", "1 000"),
    *[("1000", near) for near in ("1,00", "1, 000", "(1,000)", "10,00", "10^4", "10^{-3}")],
    *[(near, "1/0") for near in ("0", "1", "10")],
    *[("3", near) for near in ("3,4", "3, 3", "(3,)", "0,3", "33")],
    ("34", "3,4"),
    *[("5", word) for word in ("5 million", r"5 \text{ thousand}", "5 and a half", "5 pi", r"5\pi", r"5\mathrm{i}")],
    *[("5", more) for more in ("5 n", "5 or 6", "5 base six", r"5\sqrt{2}", "5^2", "5_8", "-x=5", "x>5", "x=y=5")],
    ("x=5", "y=5"),
    ("x=1, y=2", "x=2, y=1"),
    ("3.2", r"3.2\times10^{5}"),
    (r"3.2\times10^{4}", r"3.2\times10^{5}"),
    ("1e999", "1e999999999"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "1,2"),
    ("(1,2)", "(1,2,2)"),
    ("(1,2)", "(12)"),
    ("(1,234)", "1234"),
    ("(2,251,252)", "(2251,252)"),
    ("[0,1)", "(0,1)"),
    ("[0,1)", "[0,1]"),
    ("(0,1)", r"\{0,1\}"),
    ("1, 1, 2", "1, 2, 2"),
    ("(1,2), (3,4)", "(1,2), (4,3)"),
    (r"(0,1) \cup (2,3)", "(0,3)"),
    (r"\{1\} \times \{2,3\}", r"\{3,1\} \times \{2\}"),
    ("2^{10}", "2^1 0"),
    (r"\sqrt{12}", r"\sqrt12"),
    ("x^2", "x^3"),
    ("east", "west"),
    ("9^{9^{9^9}}", "9"),
    *[("5", nothing) for nothing in ("", " ", "$", ".")],
    ("$", "%"),
]


@pytest.mark.parametrize("completion, answer", EXTRACTED)
def test_the_answer_is_found(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize("gold, prediction", SAME)
def test_equal_answers(gold, prediction):
    assert same_answer(gold, prediction) and same_answer(prediction, gold)


@pytest.mark.parametrize("gold, prediction", DIFFERENT)
def test_near_misses(gold, prediction):
    assert not same_answer(gold, prediction) and not same_answer(prediction, gold)


def test_no_answer_is_wrong():
    assert not same_answer("5", None)


def milliseconds(function, *arguments) -> float:
    """The better of two runs, so that a busy machine is not taken for slow code."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        function(*arguments)
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


HUGE = [r"\boxed{", "{", "}", "{}", "\\", r"\{", "1", "(", "(1,", "1,", "$", " ", "\n", "9^{", "#", "a", "1 ", r"\frac"]


@pytest.mark.parametrize("piece", HUGE)
def test_a_megabyte_is_read_in_milliseconds(piece):
    for length in (10**6, MAX_CHARS):  # huge, and the longest that is parsed at all
        text = piece * (length // len(piece))
        assert milliseconds(extract_answer, text) < 100 and milliseconds(extract_answer, r"\boxed{" + text) < 100
        assert milliseconds(same_answer, "5", text) < 100 and milliseconds(same_answer, text, text) < 100
    assert extract_answer(r"\boxed{7} \boxed{" + "{" * 10**6) == "7"


def test_random_strings_never_raise_nor_hang():
    rng = random.Random(0)
    pieces = r"\boxed{ \frac \text{ \left \times 10^ { } \{ \} ( ) [ ] , . 1 23 / - = x e5 \, $ % ** Answer: </think>"
    alphabet = [*pieces.split(), " ", "\n", "é", "²", "٣", "\0"]
    for _ in range(3000):
        first, second = ("".join(rng.choices(alphabet, k=rng.randint(0, 100))) for _ in range(2))
        assert milliseconds(extract_answer, first) < 50 and milliseconds(same_answer, first, second) < 50
        assert same_answer(first, second) == same_answer(second, first)
