"""The picture of an answer in the README: run it with two models, or draw it again.

    python bench/picture.py --large URL "Question?"    # answer, record, draw
    python bench/picture.py                            # draw from the record

The record is bench/results/picture.json; the pictures are docs/images/answer-light.svg and
answer-dark.svg.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from mlxroute.view.answer_svg import PicturedToken, draw_answer

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "bench" / "results" / "picture.json"
IMAGES = ROOT / "docs" / "images"


def record_answer(
    question: str, *, small_name: str, large_url: str, budget: float, max_tokens: int
) -> dict[str, Any]:
    """Answer the question and return the record of the answer, with its environment."""
    from mlxroute import EntropyRouter, LargeModel, SmallModel, generate
    from mlxroute.bench.measurement import describe_environment
    from mlxroute.routers import never_escalate

    small = SmallModel.load(small_name)
    with LargeModel(large_url) as large:
        answer = generate(
            small,
            large,
            question,
            router=EntropyRouter(budget=budget),
            max_tokens=max_tokens,
            mode="wait",
            strict=True,
        )
        tokens = list(answer)
        large_name = large.model_name
        alone = generate(small, None, question, router=never_escalate(), max_tokens=max_tokens)
        for _ in alone:
            pass
    stats = answer.stats()
    command = ["python", "bench/picture.py", *sys.argv[1:]]
    rows: list[dict[str, Any]] = []
    for token in tokens:
        row: dict[str, Any] = {"text": token.text}
        if token.escalation is not None:
            small_id = token.signals.token_id
            same = small_id == token.token_id
            chosen = small.vocabulary.token_bytes(small_id).decode(errors="replace")
            row["small_text"] = token.text if same else chosen
        rows.append(row)
    return {
        **describe_environment(shlex.join(command)),
        "question": question,
        "small": small_name,
        "large": large_name.removesuffix(".gguf"),
        "budget": budget,
        "tokens": rows,
        "small_alone": alone.stats().text,
        "figures": {
            "tokens": stats.tokens,
            "escalated": stats.escalated,
            "agreed": stats.agreed,
            "tokens_per_s": round(stats.tokens_per_s, 2),
            "uploaded_bytes": stats.uploaded_bytes,
            "requests": stats.requests,
            "finish_reason": stats.finish_reason.value,
        },
    }


def draw_record(record: dict[str, Any], *, dark: bool) -> str:
    """Return the picture of a recorded answer."""
    figures = record["figures"]
    caption = (
        f"{record['small']} (small): {figures['tokens'] - figures['escalated']} of"
        f" {figures['tokens']} tokens\n"
        f"{record['large']} (large): {figures['escalated']}\n"
        f"the small model alone: {record['small_alone']}"
    )
    tokens = [PicturedToken(row["text"], row.get("small_text")) for row in record["tokens"]]
    return draw_answer(record["question"], tokens, caption=caption, dark=dark, width=60)


def main() -> None:
    """Record an answer if a large model is given, and draw the recorded answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?")
    parser.add_argument("--small", default="qwen2.5-coder-0.5b")
    parser.add_argument("--large", metavar="URL")
    parser.add_argument("--budget", type=float, default=0.07, help="as a fraction")
    parser.add_argument("--max-tokens", type=int, default=160)
    arguments = parser.parse_args()
    if (arguments.question is None) != (arguments.large is None):
        parser.error("a question needs --large URL, and --large a question")
    if arguments.question is not None:
        record = record_answer(
            arguments.question,
            small_name=arguments.small,
            large_url=arguments.large,
            budget=arguments.budget,
            max_tokens=arguments.max_tokens,
        )
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, dark in (("light", False), ("dark", True)):
        file = IMAGES / f"answer-{name}.svg"
        file.write_text(draw_record(record, dark=dark), encoding="utf-8")
        print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
