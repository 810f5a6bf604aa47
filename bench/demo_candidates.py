"""How the demo's question was chosen: candidates answered alone and routed.

Each question of `questions/demo_candidates.jsonl` is answered by the small model alone, greedily;
where that answer is right or wrong, also routed within the default budget; where routing made it
right, also by the large model alone. Prints one JSON object a question.

    python bench/demo_candidates.py --large http://127.0.0.1:8080/v1
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mlxroute import LargeModel, SmallModel, generate
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.questions.demo_question import DemoQuestion
from mlxroute.routers import always_escalate, make_router, never_escalate

_CANDIDATES = Path(__file__).parent / "questions" / "demo_candidates.jsonl"
_RESULTS = {True: "right", False: "wrong", None: "unclear"}
_BUDGET = 0.07
_MAX_TOKENS = 90
_TIMEOUT_S = 120.0


def main() -> None:
    """Answer the candidates and print what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", default="qwen2.5-coder-0.5b")
    parser.add_argument("--large", required=True, metavar="URL")
    parser.add_argument("--only", nargs="*", default=[], metavar="ID")
    options = parser.parse_args()
    small = SmallModel.load(options.small)
    quantiles = ScoreRanks.find(options.small, Path())["entropy"]
    with LargeModel(options.large, timeout_s=_TIMEOUT_S) as large:
        for line in _CANDIDATES.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if options.only and row["id"] not in options.only:
                continue
            question = DemoQuestion(row["prompt"], tuple(row["answers"]))
            record = {"id": row["id"]}
            record["small"] = _answer(small, None, question, never_escalate())
            if record["small"]["result"] != _RESULTS[None]:
                router = make_router("entropy", budget=_BUDGET, quantiles=quantiles)
                record["routed"] = _answer(small, large, question, router)
                if (record["small"]["result"], record["routed"]["result"]) == ("wrong", "right"):
                    record["large"] = _answer(
                        small, large, question, always_escalate(), prefetch=64
                    )
            json.dump(record, sys.stdout, ensure_ascii=False)
            sys.stdout.write("\n")
            sys.stdout.flush()


def _answer(
    small: SmallModel,
    large: LargeModel | None,
    question: DemoQuestion,
    router: Any,
    *,
    prefetch: int = 0,
) -> dict[str, Any]:
    """Return the text of an answer, its result and its escalated positions."""
    answer = generate(
        small,
        large,
        question.prompt,
        router=router,
        max_tokens=_MAX_TOKENS,
        timeout_s=_TIMEOUT_S,
        mode="wait",
        prefetch=prefetch,
    )
    escalations = []
    for token in answer:
        if token.escalation is None or token.escalation.large is None:
            continue
        logprobs = [logprob for _, logprob in token.escalation.large.top]
        own = small.vocabulary.token_bytes(token.escalation.small_id)
        escalations.append(
            {
                "token": token.index + 1,
                "small": own.decode(errors="replace"),
                "large": token.escalation.large.text,
                "entropy_nats": round(token.signals.entropy_nats, 3),
                "large_gap_nats": round(logprobs[0] - logprobs[1], 3) if logprobs[1:] else None,
            }
        )
    stats = answer.stats()
    result = _RESULTS[question.judge(stats.text)]
    record = {"text": stats.text, "tokens": stats.tokens, "result": result}
    return record if large is None else record | {"escalations": escalations}


if __name__ == "__main__":
    main()
