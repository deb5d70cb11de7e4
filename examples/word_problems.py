"""Arithmetic word problems made from original templates: training data for the examples, as much as one wants.

A template is a question with placeholders and a worked solution whose steps are written ``[name = left op right]``.
Numbers are drawn from the ranges of the template, and each step is replaced by the sum written out, so the
arithmetic is right by construction. A draw that would lead to a fraction or to a number below two is discarded.
The same seed always gives the same rows, and a smaller set is the beginning of a larger one.

    python examples/word_problems.py 2000 > train.jsonl
"""

import argparse
import json
import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

# fmt: off
NAMES = (
    "Amina", "Bruno", "Clara", "Daniel", "Elif", "Farid", "Greta", "Hanna", "Igor", "Jonas", "Keiko", "Lena", "Mateo",
    "Nadia", "Oscar", "Priya", "Quentin", "Rosa", "Samir", "Tara", "Ulrich", "Vera", "Wanda", "Xavier", "Yusuf", "Zoe",
)
# fmt: on
WORDS = {
    "city": ("Lisbon", "Oslo", "Turin", "Prague", "Dublin", "Kyoto"),
    "dish": ("soup", "curry", "salad", "stew", "casserole"),
    "food": ("rice", "lentils", "potatoes", "carrots", "noodles", "beans"),
    "fruit": ("apples", "plums", "pears", "cherries", "peaches"),
    "game": ("darts", "quiz", "dice", "bowling", "skittles"),
    "goods": ("pencils", "candles", "notebooks", "mugs", "ribbons", "postcards"),
    "piece": ("jacket", "lamp", "backpack", "blanket", "radio", "kettle"),
    "plant": ("tomato", "pepper", "cabbage", "lettuce", "pumpkin"),
    "toy": ("stickers", "marbles", "stamps", "beads", "shells"),
}
OPERATORS: dict[str, Callable[[int, int], int | Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": Fraction,
}
STEP = re.compile(r"\[(\w+) = (\w+) ([-+*/]) (\w+)\]")


@dataclass(frozen=True)
class Template:
    """One kind of problem: the steps of ``setup`` are worked out first, the last step of ``solution`` is the answer."""

    ranges: dict[str, range]
    question: str
    solution: str
    setup: str = ""


TEMPLATES = (
    Template(
        {"n": range(3, 13), "price": range(2, 10), "rest": range(2, 20)},
        "{A} buys {n} {goods} for {price} dollars each at the village market and hands over {paid} dollars. "
        "How many dollars of change should {A} get back?",
        "The {goods} cost [cost = n * price] dollars. The change is [answer = paid - cost] dollars.",
        setup="[cost = n * price] [paid = cost + rest]",
    ),
    Template(
        {"x": range(12, 60), "y": range(12, 60), "k": range(3, 9)},
        "{A} picks {x} {fruit} and {B} picks {y}. They put everything together and share it out equally among {k} "
        "baskets. How many {fruit} go into each basket?",
        "Together they have [sum = x + y] {fruit}. Each basket receives [answer = sum / k] {fruit}.",
    ),
    Template(
        {"v": range(60, 160, 10), "h": range(2, 6), "w": range(50, 120, 5), "g": range(2, 5)},
        "A train to {city} travels at {v} kilometres per hour for {h} hours and then at {w} kilometres per hour for "
        "{g} more hours. How many kilometres does it cover in total?",
        "It first covers [first = v * h] kilometres and then [second = w * g] kilometres. "
        "In total that is [answer = first + second] kilometres.",
    ),
    Template(
        {"m": range(10, 60, 5), "k": range(20, 100, 5)},
        "{A} reads for {m} minutes on each of the five weekdays and for {k} minutes on each of the two days of the "
        "weekend. How many minutes does {A} read in a week?",
        "Weekdays give [week = 5 * m] minutes and the weekend gives [end = 2 * k] minutes. "
        "Together that is [answer = week + end] minutes.",
    ),
    Template(
        {"price": range(20, 200, 5), "d": range(5, 60, 5)},
        "A {piece} normally costs {price} dollars in the shop where {A} works, but this week it is sold at a "
        "discount of {d} percent. How many dollars does the {piece} cost now?",
        "The discount is {d} percent: [part = price * d] and [off = part / 100] dollars. "
        "The {piece} now costs [answer = price - off] dollars.",
    ),
    Template(
        {"x": range(4, 19), "k": range(2, 5), "t": range(2, 25)},
        "{A} is {x} years old, and {B}, who lives next door, is {k} times as old as {A}. How old will {B} be in {t} years?",
        "{B} is now [age = x * k] years old. In {t} years {B} will be [answer = age + t] years old.",
    ),
    Template(
        {"r": range(4, 30), "h": range(2, 7), "p": range(10, 55, 5)},
        "A machine in a factory near {city} fills {r} bottles every minute. How many bottles does it fill within {h} "
        "hours if it stands still for {p} minutes of that time?",
        "The hours have [all = h * 60] minutes, of which it runs [run = all - p] minutes. It fills [answer = run * r] bottles.",
    ),
    Template(
        {"s": range(2, 7), "g": range(40, 150, 5), "t": range(7, 20)},
        "A recipe for {dish} asks for {total} grams of {food} for {s} people. {A} wants to cook it for {t} people. "
        "How many grams of {food} are needed?",
        "One person needs [each = total / s] grams of {food}. For {t} people that makes [answer = each * t] grams.",
        setup="[total = s * g]",
    ),
    Template(
        {"x": range(10, 100), "w": range(3, 16), "k": range(4, 20)},
        "{A} has {x} dollars in a savings box and adds {w} dollars every week to buy a {piece} for {goal} dollars. "
        "After how many weeks is there enough money?",
        "Still missing are [gap = goal - x] dollars. At {w} dollars a week this takes [answer = gap / w] weeks.",
        setup="[more = w * k] [goal = x + more]",
    ),
    Template(
        {"l": range(20, 60), "w": range(5, 20), "g": range(2, 5)},
        "{A} puts a fence around a rectangular {plant} field, {l} metres long and {w} metres wide, and leaves a gap "
        "of {g} metres for the gate. How many metres of fence are needed?",
        "Two sides make [half = l + w] metres and all four make [round = half * 2] metres. "
        "Without the gap that is [answer = round - g] metres.",
    ),
    Template(
        {"l": range(13, 30), "w": range(3, 13), "c": range(2, 7)},
        "The floor of a hall is a rectangle, {l} metres long and {w} metres wide. One box of tiles covers {c} square "
        "metres. How many boxes does {A} need for the whole floor?",
        "The floor measures [area = l * w] square metres. This takes [answer = area / c] boxes of tiles.",
    ),
    Template(
        {"t": range(150, 500), "r": range(20, 140), "d": range(4, 15)},
        "{A} has read {r} of the {t} pages of a novel and wants to finish the rest in {d} days, with the same number "
        "of pages every day. How many pages is that per day?",
        "There are [left = t - r] pages left. Over {d} days this makes [answer = left / d] pages per day.",
    ),
    Template(
        {"p": range(9, 25), "h": range(3, 9), "d": range(3, 7), "x": range(15, 90, 5)},
        "{A} earns {p} dollars an hour and works {h} hours a day for {d} days. A {piece} for {x} dollars is paid from "
        "this money. How many dollars are left?",
        "{A} works [time = h * d] hours and earns [pay = time * p] dollars. "
        "After the purchase [answer = pay - x] dollars are left.",
    ),
    Template(
        {"a": range(10, 60), "b": range(10, 60), "c": range(10, 60)},
        "In three rounds of a {game} contest in {city}, {A} scored {a}, {b} and {c} points. What was the average "
        "score of {A} per round?",
        "The points add up in two steps: [two = a + b] and [all = two + c]. The average is [answer = all / 3] points.",
    ),
    Template(
        {"p": range(2, 8), "q": range(2, 8), "k": range(3, 25)},
        "{A} and {B} divide {n} {toy} so that {A} gets {p} for every {q} that go to {B}. "
        "How many {toy} does {A} receive in the end?",
        "One turn uses up [turn = p + q] {toy}, so there are [turns = n / turn] turns. {A} receives [answer = p * turns] {toy}.",
        setup="[parts = p + q] [n = parts * k]",
    ),
    Template(
        {"x": range(18, 50), "a": range(3, 15), "b": range(2, 20), "c": range(2, 15)},
        "A bus leaves {city} with {x} passengers. At the first stop {a} people get off and {b} get on, and at the "
        "second stop {c} more get on. How many passengers are there now?",
        "After the first stop there are [stay = x - a] and then [first = stay + b] passengers. "
        "After the second there are [answer = first + c].",
    ),
    Template(
        {"r": range(8, 25), "s": range(9, 25), "e": range(5, 60), "p": range(4, 16)},
        "The theatre of {city} has {r} rows of {s} seats. One evening {e} seats stay empty, and every visitor pays {p} "
        "dollars. How many dollars does the theatre take in?",
        "There are [seats = r * s] seats and [full = seats - e] visitors. They pay [answer = full * p] dollars.",
    ),
    Template(
        {"u": range(4, 10), "price": range(2, 4), "d": range(200, 1500, 100)},
        "A car uses {u} litres of petrol per 100 kilometres, and one litre costs {price} dollars. "
        "How many dollars does {A} spend on petrol for a trip of {d} kilometres to {city}?",
        "The trip has [parts = d / 100] parts of 100 kilometres and takes [fuel = parts * u] litres. "
        "They cost [answer = fuel * price] dollars.",
    ),
    Template(
        {"n": range(40, 700, 10), "p": range(10, 90, 5)},
        "A school in {city} has {n} pupils, and {p} percent of them come on foot. All the others take the bus. "
        "How many pupils take the bus?",
        "The share on the bus is [share = 100 - p] percent. That makes [part = n * share] and then [answer = part / 100] pupils.",
    ),
    Template(
        {"k": range(4, 16), "a": range(5, 20), "b": range(3, 12)},
        "{A} looks after {k} beds of {plant} plants. Each bed takes {a} minutes for weeding and {b} minutes for "
        "watering. How many minutes does the whole job take?",
        "One bed takes [each = a + b] minutes. The {k} beds of {plant} plants take [answer = each * k] minutes.",
    ),
    Template(
        {"x": range(6, 50), "y": range(3, 30), "k": range(2, 5)},
        "{A} has collected {x} {toy}. {B} has {y} more than {A}, and {C} has {k} times as many as {B}. "
        "How many {toy} does {C} have?",
        "{B} has [more = x + y] {toy}. {C} has {k} times this number, which is [answer = more * k] {toy}.",
    ),
    Template(
        {"k": range(6, 13), "q": range(8, 40), "r": range(2, 6)},
        "A bakery in {city} has made {t} rolls and packs them in bags of {k}. It fills {q} bags completely. "
        "How many rolls are left over?",
        "The full bags hold [packed = q * k] rolls. That leaves [answer = t - packed] of the {t} rolls over.",
        setup="[filled = k * q] [t = filled + r]",
    ),
    Template(
        {"v": range(60, 800, 10), "a": range(9, 30), "b": range(2, 8)},
        "An empty tank on the farm of {A} holds {v} litres. A pump adds {a} litres a minute while a leak loses {b} "
        "litres a minute. After how many minutes is the tank full?",
        "Each minute the tank gains [net = a - b] litres. It is full after [answer = v / net] minutes.",
    ),
    Template(
        {"d": range(60, 400, 4), "v": range(12, 30), "w": range(12, 30)},
        "{A} and {B} start {d} kilometres apart and cycle towards each other, {A} at {v} and {B} at {w} kilometres per "
        "hour. After how many hours do they meet?",
        "Every hour they come [speed = v + w] kilometres closer. They meet after [answer = d / speed] hours.",
    ),
    Template(
        {"a": range(20, 90), "b": range(20, 85)},
        "{A} draws a triangle on the board. Its first angle measures {a} degrees and the second one {b} degrees. "
        "How many degrees does the third angle measure?",
        "The two known angles add up to [two = a + b] degrees. The third measures [answer = 180 - two] degrees.",
    ),
    Template(
        {"a": range(3, 20), "b": range(3, 20), "c": range(30, 250, 5)},
        "{A} has {a} coins of 5 cents and {b} coins of 20 cents and spends {c} cents on {fruit}. "
        "How many cents does {A} have left?",
        "The coins are worth [low = a * 5] and [high = b * 20], together [all = low + high] cents. "
        "What is left is [answer = all - c] cents.",
    ),
    Template(
        {"n": range(3, 40), "a": range(2, 10), "b": range(5, 60)},
        "{A} thinks of a number, multiplies it by {a} and then adds {b}. The result that {A} tells {B} is {c}. "
        "What was the number at the start?",
        "Undo the addition first: [before = c - b]. Then undo the multiplication: [answer = before / a], the number.",
        setup="[times = n * a] [c = times + b]",
    ),
    Template(
        {"k": range(4, 20), "p": range(6, 30), "q": range(8, 45), "f": range(5, 30)},
        "{A} buys {k} crates of {fruit} at {p} dollars each and sells every crate for {q} dollars. The market stall "
        "costs {f} dollars. How many dollars of profit remain?",
        "Each crate brings [gain = q - p] dollars, all of them [gross = gain * k] dollars. "
        "After the stall the profit is [answer = gross - f] dollars.",
    ),
)


def work_out(text: str, values: dict[str, int]) -> str:
    """Write out each step of ``text`` in numbers and add its result, an integer above one, to ``values``."""

    def written_out(step: re.Match[str]) -> str:
        name, left, sign, right = step.groups()
        a, b = (int(term) if term.isdigit() else values[term] for term in (left, right))
        result = OPERATORS[sign](a, b)
        if result < 2 or result.denominator != 1:
            raise ValueError(f"{a} {sign} {b} is not an integer above one")
        values[name] = int(result)
        return f"{a} {sign} {b} = {values[name]}"

    return STEP.sub(written_out, text)


def word_problem(template: Template, rng: random.Random) -> dict[str, str]:
    """Draw one problem of a kind, with new names, objects and numbers until the numbers come out right."""
    while True:
        words = dict(zip("ABC", rng.sample(NAMES, 3), strict=True))
        words |= {kind: rng.choice(some) for kind, some in WORDS.items()}
        values = {name: rng.choice(numbers) for name, numbers in template.ranges.items()}
        try:
            work_out(template.setup, values)
            solution = work_out(template.solution, values)
        except ValueError:
            continue
        question = template.question.format(**words, **values)
        answer = f"{solution.format(**words, **values)} #### {values['answer']}"
        return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def word_problems(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Return ``n`` different word problems as prompt and completion, in the same order for the same seed."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        row = word_problem(rng.choice(TEMPLATES), rng)
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write arithmetic word problems as JSON lines to stdout.")
    parser.add_argument("n", type=int, nargs="?", default=1000, help="number of problems")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for row in word_problems(arguments.n, arguments.seed):
        print(json.dumps(row))
