"""Compare the tokens of completion by example with the large model's own, position by position.

Start a server of rung 1 or 2 first, then run this script with its address, a file, and the number
of calls in flight (1 by default):

    python bench/by_example.py http://127.0.0.1:8081/v1 qwen2.5-coder-1.5b rows.jsonl 8

The large model writes ten answers in the exact dialect. At up to 200 positions of them, drawn with
a fixed seed, inside words too, the same server is asked by example through a proxy that leaves only
its chat route. Writes a row for each answer and position; a file with rows is continued. Prints
JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mlxroute import LargeModel
from mlxroute.bench.chat_only_server import ChatOnlyServer
from mlxroute.catalog import Catalog
from mlxroute.engine.transcript import RenderedPrompt, Transcript
from mlxroute.errors import LargeNotContinued
from mlxroute.recorded.record_file import append_records, read_records
from mlxroute.tokenizers.chat_tokenizer import ChatTokenizer
from mlxroute.types import Uploads, no_notice, no_progress
from mlxroute.types.limits import MAX_PREFETCH
from mlxroute.user_folders import cache_folder
from mlxroute.weights import resolve

PROMPTS = Path(__file__).parent / "prompts" / "begun_answers.jsonl"
TOKENS, POSITIONS, INSIDE_WORDS = 160, 20, 4
TIMEOUT_S = 1800.0

# The proxy keeps its address, so that a continued run finds the verdict of its probe.
PROXY_PORT = 8099
Row = dict[str, Any]


class OwnToken(NamedTuple):
    """A token of the large model's own answer."""

    ids: list[int]
    text: str
    ends: bool
    large_ids: list[int]


def main() -> None:
    """Write the missing rows and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("address", metavar="URL", help="server of the large model")
    parser.add_argument("model", metavar="MODEL", help="its name in the catalogue")
    parser.add_argument("file", type=Path, metavar="FILE", help="a file with rows is continued")
    parser.add_argument("at_once", type=int, nargs="?", default=1, metavar="CALLS_IN_FLIGHT")
    given = parser.parse_args()
    address, model, path, at_once = given.address, given.model, given.file, given.at_once
    rows: list[Row] = list(read_records(path, dict))
    answers = {row["kind"]: row["answer"] for row in rows if "answer" in row}
    compared = {(row["kind"], row["index"]): row for row in rows if "index" in row}
    tokenizer, verdicts = load_tokenizer(model), path.with_suffix(".verdicts.json")
    questions = [json.loads(line) for line in PROMPTS.read_text().split("\n") if line]
    with (
        ChatOnlyServer(address, port=PROXY_PORT) as proxy,
        LargeModel(
            address, timeout_s=TIMEOUT_S, verdicts=verdicts, find_tokenizer=lambda name: tokenizer
        ) as exact,
        LargeModel(proxy.url, timeout_s=TIMEOUT_S, verdicts=verdicts) as by_example,
        ThreadPoolExecutor(at_once) as pool,
    ):
        starts = {item["kind"]: render(tokenizer, item["prompt"]) for item in questions}

        def keep(row: Row) -> Row:
            append_records(path, [row])
            return row

        def answer(kind: str) -> list[OwnToken]:
            if kind not in answers:
                answers[kind] = write_answer(exact, starts[kind])
                keep({"kind": kind, "answer": answers[kind]})
            return [OwnToken(*token) for token in answers[kind]]

        def ask(place: tuple[str, int]) -> None:
            if place not in compared:
                (kind, index), spent = place, by_example.uploads
                row = compare(by_example, starts[kind], tokens[kind], index)
                # The sums of calls at the same time cannot be told apart.
                row |= {} if at_once > 1 else upload_counts(spent, by_example.uploads)
                compared[place] = keep({"kind": kind, "index": index} | row)

        print(exact.connect(), by_example.connect(), sep="\n", file=sys.stderr)
        assert by_example.is_approximate
        tokens = dict(zip(starts, pool.map(answer, starts), strict=True))
        places = [
            (kind, index)
            for kind, start in starts.items()
            for index in choose_positions(kind, start, tokens[kind])
        ]
        # An unfinished run has positions of all kinds.
        random.Random("order").shuffle(places)
        list(pool.map(ask, places))
    print(json.dumps(report([compared[place] for place in places])))


def load_tokenizer(model: str) -> ChatTokenizer:
    """Return the tokenizer of a model of the catalogue."""
    folder = resolve(
        model,
        catalog=Catalog.load(),
        cache_dir=cache_folder(),
        offline=False,
        progress=no_progress,
        notify=no_notice,
    )
    return ChatTokenizer.load(folder.path, name=model)


def render(tokenizer: ChatTokenizer, question: str) -> Transcript:
    """Return the transcript of an answer that has not begun."""
    messages = ({"role": "user", "content": question},)
    encoded = tokenizer.encode_conversation(messages)
    return Transcript(RenderedPrompt(tokenizer.vocabulary, messages, encoded.rendered, encoded.ids))


def write_answer(exact: LargeModel, transcript: Transcript) -> list[OwnToken]:
    """Return the large model's own answer."""
    tokens: list[OwnToken] = []
    while len(tokens) < TOKENS and not (tokens and tokens[-1].ends):
        call = exact.begin(transcript.context(), prefetch=MAX_PREFETCH)
        exact.wait(lambda call=call: call.finished, timeout_s=TIMEOUT_S)  # type: ignore[misc]
        for large in call.result():
            token = OwnToken(list(large.token_ids), large.text, large.is_eos, list(large.large_ids))
            tokens.append(token)
            transcript = extend(transcript, token)
    return tokens[:TOKENS]


def extend(transcript: Transcript, token: OwnToken) -> Transcript:
    """Return the transcript with one more token."""
    return transcript.extend(token.ids, ends=token.ends, large_ids=tuple(token.large_ids))


def choose_positions(kind: str, start: Transcript, tokens: list[OwnToken]) -> list[int]:
    """Return numbers of tokens to ask for, none of them the first or inside a character."""
    rng, transcript = random.Random(f"positions {kind}"), start
    whole: list[int] = []
    inside: list[int] = []
    for index, token in enumerate(tokens):
        if index and not transcript.ends_in_character:
            whole.append(index)
            around = transcript.text[-1:] + token.text[:1]
            if len(around) == 2 and around.isascii() and around.isalpha():
                inside.append(index)
        transcript = extend(transcript, token)
    chosen = set(rng.sample(inside, min(INSIDE_WORDS, len(inside))))
    rest = [index for index in whole if index not in chosen]
    return sorted(chosen | set(rng.sample(rest, min(POSITIONS - len(chosen), len(rest)))))


def compare(by_example: LargeModel, start: Transcript, tokens: list[OwnToken], index: int) -> Row:
    """Ask for one token by example and return how it compares with the large model's own."""
    transcript = start
    for earlier in tokens[:index]:
        transcript = extend(transcript, earlier)
    own = tokens[index]
    row: Row = {"before": transcript.text[-24:], "own": own.text, "ends": own.ends}
    try:
        token = by_example.next_token(transcript.context())
    except LargeNotContinued as exc:
        row |= {"by_example": None, "failure": str(exc).partition(": ")[2], "equal": False}
    else:
        own_bytes = b"".join(map(start.prompt.vocabulary.token_bytes, own.ids))
        begins = token.is_eos == own.ends and token.text.encode().startswith(own_bytes)
        # A part of a character is compared with the whole one. A server without logprobs gives
        # words, which may be longer than a token.
        is_whole = token.text == own.text or not own.text
        row |= {"by_example": token.text, "equal": begins and is_whole, "begins_equal": begins}
    return row


def upload_counts(before: Uploads, after: Uploads) -> Row:
    """Return what was sent and generated between two counts."""
    spent = after - before
    return {
        "prompt_tokens": spent.tokens,
        "cached_tokens": spent.cached_tokens,
        "generated_tokens": spent.completion_tokens,
        "requests": spent.requests,
    }


def report(rows: list[Row]) -> Row:
    """Return the figures over all rows."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    return {
        "positions": len(rows),
        "equal": share(rows, "equal"),
        "begins_equal": share(rows, "begins_equal"),
        "agrees": round(sum(map(agrees, rows)) / len(rows), 3),
        "not_continued": round(sum(row["by_example"] is None for row in rows) / len(rows), 3),
        "equal_where_continued": share([r for r in rows if r["by_example"] is not None], "equal"),
        "equal_by_kind": {
            kind: f"{sum(row['equal'] for row in part)} of {len(part)}"
            for kind, part in kinds.items()
        },
        **({} if any("requests" not in row for row in rows) else cost(rows)),
    }


def agrees(row: Row) -> bool:
    """Return whether the shorter of the two texts begins the longer one, and both or none end."""
    own, other = row["own"], row["by_example"]
    if row["equal"] or row.get("begins_equal"):
        return True
    return bool(other) and not row["ends"] and (other.startswith(own) or own.startswith(other))


def cost(rows: list[Row]) -> Row:
    """Return what the requests of all rows cost."""
    return {
        "mean_prompt_tokens": mean(rows, "prompt_tokens"),
        "mean_cached_tokens": mean(rows, "cached_tokens"),
        "mean_generated_tokens": mean(rows, "generated_tokens"),
        "requests": sum(row["requests"] for row in rows),
    }


def share(rows: list[Row], name: str) -> float:
    """Return the share of rows in which a value is true."""
    return round(sum(bool(row.get(name)) for row in rows) / max(1, len(rows)), 3)


def mean(rows: list[Row], name: str) -> float:
    """Return the mean of a value."""
    return round(statistics.fmean(row[name] for row in rows), 1)


if __name__ == "__main__":
    main()
