"""Servers of each family, all with a model that knows a few texts by heart.

Each is the `answer` of a `Loopback`. It replies correctly; tests of faulty servers pass functions
that change prompts, tokens or replies.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any, Final

from mlxroute.large.dialects.chat.framing import Framing
from mlxroute.large.negotiation.continuation_questions import CONTINUATIONS, FINISHED
from mlxroute.types import Message
from tests.support.example_chat import read_question
from tests.support.loopback import Reply, Request
from tests.support.vocabularies import BYTE_CHARACTERS, END_ID, TableTokenizer, TableVocabulary

_WORDS = [
    *("pine", "apple", "Ġpine", "ĠMonday", "Thurs", "day", "Tues", "Wed", "nes", "Ġ", "Ġthe"),
    *("10", "11", "12", "13", "Ġ7", "Ġ12", "Ġ13", "Ġ14", "Ġ15", "Ġ16", "Red", "Sure", "caf"),
]
PIECES: Final = [*BYTE_CHARACTERS, *_WORDS]
VOCABULARY: Final = TableVocabulary(PIECES)
_TURN: Final = "<s>assistant\n"
_KNOWN: Final = (
    "pineapple " * 10,
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20.",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
    "漢字" * 20,
    "café " * 10,
    "Red",
    "Sure! Here you are: one, two, three.",
    *(question.text + question.expected for _, question in CONTINUATIONS),
    FINISHED.text,
)

Ids = tuple[int, ...]
Json = dict[str, Any]
ChangePrompt = Callable[[str, str], str]
ChangeTokens = Callable[[str, Ids], Ids]
ChangeReply = Callable[[str, Json, Json], Json]


def continuation(written: str) -> str | None:
    """Return what the model writes next, to the end of its answer; None for an unknown text."""
    begun = written.rpartition(_TURN)[2]
    if _TURN in written and not begun:
        return "Red" if "blood?" in written else "Sure! Here you are: one, two, three."
    return next((text[len(begun) :] for text in _KNOWN if text.startswith(begun)), None)


def score_of(token_id: int) -> float:
    """Return the logprob of a token that the model did not choose itself."""
    return -0.25 * (1 + token_id % 5)


class FamilyServer:
    """The replies of one server family.

    `change_prompt(path, text)` may change the prompt that the model gets on a route,
    `change_tokens(path, ids)` the tokens it generates, and `change_reply(path, request, reply)` the
    JSON of the reply.
    """

    def __init__(
        self,
        family: str,
        *,
        vocabulary: TableVocabulary = VOCABULARY,
        models: Sequence[str] = ("m",),
        needs_model: bool = True,
        change_prompt: ChangePrompt = lambda path, text: text,
        change_tokens: ChangeTokens = lambda path, ids: ids,
        change_reply: ChangeReply = lambda path, body, reply: reply,
    ) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = TableTokenizer(vocabulary)
        self._models = models
        self._needs_model = needs_model and len(models) > 1
        self._change_prompt = change_prompt
        self._change_tokens = change_tokens
        self._change_reply = change_reply
        self._routes = self._families()[family]

    def __call__(self, request: Request) -> Reply:
        if request.path == "/v1/models":
            return Reply.of({"data": [{"id": name} for name in self._models]})
        route = self._routes.get(request.path)
        if route is None:
            return Reply.of({"detail": "Not Found"}, status=404)
        body = request.json
        if body.get("model", self._models[0]) not in self._models:
            return Reply.of({"error": "no such model"}, status=404)
        if "model" not in body and self._needs_model:
            return Reply.of({"error": "you must name a model"}, status=400)
        try:
            reply = route(request.path, dict(body))
        except _Refused as exc:
            return Reply.of({"error": {"message": str(exc)}}, status=exc.status)
        return Reply.of(self._change_reply(request.path, body, reply))

    def _families(self) -> dict[str, dict[str, Callable[[str, Json], Json]]]:
        routes = {"/tokenize": self._tokenize, "/detokenize": self._detokenize}
        legacy: dict[str, Callable[[str, Json], Json]] = {"/v1/completions": self._legacy}
        return {
            "mlx_lm": {"/v1/completions": self._mlx_lm, "/v1/chat/completions": self._closing},
            "vllm": {
                "/v1/completions": self._vllm,
                "/v1/chat/completions": self._chat_by_flags,
                **routes,
            },
            "llama-server": {
                "/completion": self._llama,
                "/tokenize": self._llama_tokenize,
                "/detokenize": self._detokenize,
                "/apply-template": self._apply_template,
            },
            "sglang": {"/generate": self._sglang, **routes},
            "old sglang": {
                "/generate": self._sglang,
                "/tokenize": self._tokenize_prompt,
                "/detokenize": self._detokenize,
            },
            "tgi": {"/generate": self._tgi},
            "ollama": {"/api/generate": self._ollama, "/v1/completions": self._templated},
            "legacy": legacy,
            "text only": {"/v1/completions": self._text_only},
            "chat by flags": {"/v1/chat/completions": self._chat_by_flags},
            "chat by prefix": {"/v1/chat/completions": self._chat_by_prefix},
            "chat by trailing turn": {"/v1/chat/completions": self._chat_by_trailing_turn},
            "echoing chat": {"/v1/chat/completions": self._echoing},
            "mistral": {"/v1/chat/completions": self._mistral},
            "closing chat": {"/v1/chat/completions": self._closing},
            "chat by example": {"/v1/chat/completions": self._by_example},
            "nothing": {},
        }

    # The model

    def _write(self, path: str, prompt: str | Sequence[int], count: int) -> Ids:
        """Return the next greedy tokens after a prompt, at most to the end of the answer."""
        data = prompt.encode() if isinstance(prompt, str) else self._bytes(prompt)
        data = self._change_prompt(path, data.decode(errors="surrogateescape")).encode(
            errors="surrogateescape"
        )
        written: list[int] = []
        while len(written) < count and END_ID not in written:
            written.append(self._greedy(data))
            data += self._vocabulary.token_bytes(written[-1])
        return self._change_tokens(path, tuple(written))

    def _greedy(self, data: bytes) -> int:
        # A text that ends inside a character is looked up without that part.
        whole = data.decode(errors="ignore")
        rest = continuation(whole)
        follows = (" the" if rest is None else rest).encode()[len(data) - len(whole.encode()) :]
        if not follows:
            return END_ID
        longest = self._vocabulary.longest(follows)
        assert longest is not None
        return longest

    def _top(self, token_id: int, count: int) -> list[tuple[int, float]]:
        others = [i for i in (*range(33 + 2, 33 + 12), token_id + 1) if i != token_id]
        return [(token_id, -0.1), *((i, -4.0 - at) for at, i in enumerate(others))][:count]

    def _bytes(self, ids: Sequence[int]) -> bytes:
        if not all(type(i) is int and 0 <= i < self._vocabulary.size for i in ids):
            raise _Refused("prompt holds an id that is none", 400)
        return b"".join(map(self._named_bytes, ids))

    def _named_bytes(self, token_id: int) -> bytes:
        name = self._vocabulary.piece(token_id) or ""
        return name.encode() if token_id <= END_ID else self._vocabulary.token_bytes(token_id)

    def _deltas(self, ids: Ids) -> list[str]:
        """Return what each token adds to the text; a character is added when it is complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return [decoder.decode(self._vocabulary.token_bytes(i)) for i in ids]

    def _shown(self, token_id: int) -> str:
        return self._vocabulary.token_bytes(token_id).decode(errors="replace")

    # Native routes

    def _mlx_lm(self, path: str, body: Json) -> Json:
        _only(body, "model prompt max_tokens temperature logprobs top_logprobs")
        if not isinstance(body["prompt"], str):
            raise _Refused("text input must be of type str", 404)
        if not isinstance(body.get("logprobs"), bool):
            raise _Refused("logprobs must be of type bool", 400)
        ids = self._write(path, body["prompt"], body["max_tokens"])
        content = []
        for token_id in ids:
            top = [
                {"id": i, "token": self._vocabulary.piece(i), "logprob": value}
                for i, value in self._top(token_id, body["top_logprobs"])
            ]
            content.append({**top[-1], "top_logprobs": top[::-1]})
        reply = _choice(ids, text="", logprobs={"content": content})
        reply["usage"]["prompt_tokens"] = len(self._tokenizer.encode_prompt(body["prompt"]))
        return reply

    def _vllm(self, path: str, body: Json) -> Json:
        _only(
            body,
            "model prompt max_tokens temperature logprobs return_token_ids",
            "return_tokens_as_token_ids repetition_penalty presence_penalty frequency_penalty",
            "echo",
        )
        ids = self._write(path, body["prompt"], body["max_tokens"])
        if body.get("echo"):
            return self._echo(tuple(body["prompt"]), ids, by_id=True)
        logprobs = self._legacy_logprobs(ids, self._deltas(ids), body)
        if logprobs and body.get("return_tokens_as_token_ids"):
            logprobs["tokens"] = [f"token_id:{i}" for i in ids]
            logprobs["top_logprobs"] = [
                {f"token_id:{i}": value for i, value in self._top(token_id, body["logprobs"])}
                for token_id in ids
            ]
        reply = _choice(ids, text="".join(self._deltas(ids)), logprobs=logprobs)
        if body.get("return_token_ids"):
            reply["choices"][0]["token_ids"] = list(ids)
        return reply

    def _llama(self, path: str, body: Json) -> Json:
        _only(
            body,
            "model prompt n_predict n_probs temperature samplers cache_prompt return_tokens",
            "response_fields logit_bias",
        )
        ids = self._write(path, body["prompt"], body["n_predict"])
        if "logit_bias" in body:
            ids = tuple(token_id for token_id, _ in body["logit_bias"])
        data, named, shown = b"", [], 0
        for token_id in ids:
            data += self._vocabulary.token_bytes(token_id)
            if data.decode(errors="ignore").encode() == data:
                # The token that completes a character is named with all of its bytes.
                whole = {"token": data[shown:].decode(), "bytes": list(data[shown:])}
                shown = len(data)
                if "logit_bias" in body:
                    named.append(self._named(token_id, score_of(token_id)) | whole)
                    continue
                top = [self._named(i, p) for i, p in self._top(token_id, body["n_probs"])]
                named.append({**top[0], **whole, "top_logprobs": top})
        return {
            "content": data.decode(errors="replace"),
            "tokens": list(ids),
            "stop_type": "eos" if ids[-1] == END_ID else "limit",
            **({"completion_probabilities": named} if named else {}),
            "tokens_evaluated": len(body["prompt"]),
            "tokens_predicted": len(ids),
            "timings": {"cache_n": len(body["prompt"]) - 1},
        }

    def _named(self, token_id: int, value: float) -> Json:
        data = self._vocabulary.token_bytes(token_id)
        text = data.decode(errors="ignore")
        return {"id": token_id, "token": text, "bytes": list(data), "logprob": value}

    def _sglang(self, path: str, body: Json) -> Json:
        _only(
            body,
            "input_ids sampling_params return_logprob top_logprobs_num return_text_in_logprobs",
        )
        ids = self._write(path, body["input_ids"], body["sampling_params"]["max_new_tokens"])
        tops = [
            [[value, i, self._shown(i)] for i, value in self._top(top_id, body["top_logprobs_num"])]
            for top_id in ids
        ]
        stopped = {"type": "stop", "matched": END_ID}
        meta = {
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(ids),
            "cached_tokens": 0,
            "finish_reason": stopped if ids[-1] == END_ID else {"type": "length"},
            "output_token_logprobs": [top[0] for top in tops],
            "output_top_logprobs": tops,
        }
        return {"text": self._text(ids), "meta_info": meta}

    def _text(self, ids: Ids) -> str:
        return b"".join(map(self._vocabulary.token_bytes, ids)).decode(errors="replace")

    def _tgi(self, path: str, body: Json) -> Json:
        _only(body, "inputs parameters")
        ids = self._write(path, body["inputs"], body["parameters"]["max_new_tokens"])
        tops = [[self._tgi_token(i, value) for i, value in self._top(top_id, 5)] for top_id in ids]
        details = {
            "finish_reason": "eos_token" if ids[-1] == END_ID else "length",
            "generated_tokens": len(ids),
            "tokens": [top[0] for top in tops],
            "top_tokens": tops,
        }
        return {"generated_text": "".join(self._deltas(ids)), "details": details}

    def _tgi_token(self, token_id: int, value: float) -> Json:
        special = token_id <= END_ID
        text = self._vocabulary.piece(token_id) if special else self._deltas((token_id,))[0]
        return {"id": token_id, "text": text, "logprob": value, "special": special}

    def _ollama(self, path: str, body: Json) -> Json:
        _only(body, "model prompt raw stream truncate think logprobs top_logprobs options")
        ids = self._write(path, body["prompt"], body["options"]["num_predict"])
        deltas = self._deltas(ids)
        entries = [
            {"token": text, "logprob": -0.1, "top_logprobs": [{"token": text, "logprob": -0.1}]}
            for text in deltas
            if text
        ]
        done = "stop" if ids[-1] == END_ID else "length"
        reply: Json = {"response": "".join(deltas), "done": True, "done_reason": done}
        return reply | ({"logprobs": entries} if entries else {})

    # OpenAI's routes

    def _legacy(self, path: str, body: Json) -> Json:
        _only(body, "model prompt max_tokens temperature logprobs echo")
        if not isinstance(body["prompt"], str):
            raise _Refused("prompt must be a string", 400)
        if isinstance(body.get("logprobs"), bool):
            raise _Refused("logprobs must be an integer", 400)
        ids = self._write(path, body["prompt"], body["max_tokens"])
        text_ids = tuple(i for i in ids if i != END_ID)
        if body.get("echo"):
            prompt_ids = self._vocabulary.encode(body["prompt"])
            return self._echo(prompt_ids, text_ids, by_id=False)
        names = [self._shown(i) for i in text_ids]
        logprobs = self._legacy_logprobs(text_ids, names, body)
        return _choice(ids, text=self._text(ids), logprobs=logprobs)

    def _echo(self, prompt_ids: Ids, ids: Ids, *, by_id: bool) -> Json:
        """Return a reply with prompt and new tokens; the first token has no logprob."""
        tokens = (*prompt_ids, *ids)
        logprobs = {
            "tokens": [f"token_id:{i}" if by_id else self._shown(i) for i in tokens],
            "token_logprobs": [None, *map(score_of, tokens[1:])],
        }
        return _choice(ids, text=self._text(tokens), logprobs=logprobs)

    def _legacy_logprobs(self, ids: Ids, names: list[str], body: Json) -> Json | None:
        if not body.get("logprobs"):
            return None
        tops = [self._top(token_id, body["logprobs"]) for token_id in ids]
        return {
            "tokens": names,
            "token_logprobs": [-0.1] * len(ids),
            "top_logprobs": [
                {name: value} | {self._shown(i): p for i, p in top[1:]}
                for name, top in zip(names, tops, strict=True)
                for value in [top[0][1]]
            ],
        }

    def _text_only(self, path: str, body: Json) -> Json:
        _only(body, "model prompt max_tokens temperature")
        ids = self._write(path, body["prompt"], body["max_tokens"])
        return _choice(ids, text=self._text(ids), logprobs=None)

    def _templated(self, path: str, body: Json) -> Json:
        asked: Message = {"role": "user", "content": str(body["prompt"])}
        ids = self._write(path, self._tokenizer.render([asked]), body["max_tokens"])
        return _choice(ids, text=self._text(ids), logprobs=None)

    def _chat_by_flags(self, path: str, body: Json) -> Json:
        _only(
            body,
            "model messages max_tokens temperature logprobs top_logprobs",
            "continue_final_message add_generation_prompt chat_template_kwargs",
        )
        flags = body.get("continue_final_message"), body.get("add_generation_prompt", True)
        return self._chat(path, body, continues=flags == (True, False))

    def _chat_by_prefix(self, path: str, body: Json) -> Json:
        _only(body, "model messages max_tokens temperature logprobs top_logprobs")
        return self._chat(path, body, continues=body["messages"][-1].get("prefix", False))

    def _chat_by_trailing_turn(self, path: str, body: Json) -> Json:
        _only(body, "model messages max_tokens temperature logprobs top_logprobs")
        _only(body["messages"][-1], "role content")
        return self._chat(path, body, continues=body["messages"][-1]["role"] == "assistant")

    def _echoing(self, path: str, body: Json) -> Json:
        return _echoed(body, self._chat_by_trailing_turn(path, body))

    def _mistral(self, path: str, body: Json) -> Json:
        _only(body, "model messages max_tokens temperature")
        return _echoed(body, self._chat_by_prefix(path, body))

    def _closing(self, path: str, body: Json) -> Json:
        return self._chat(path, body, continues=False)

    def _by_example(self, path: str, body: Json) -> Json:
        _only(body, "model messages max_tokens temperature logprobs top_logprobs")
        question = read_question(body["messages"])
        if question is None:
            return self._closing(path, body)
        turns, answer, part = question
        # Real vocabularies have longer tokens than this one.
        count = body["max_tokens"] - Framing((), part).repeated_tokens
        rest = self._write(path, self._tokenizer.render(turns) + answer, count)
        return self._chat_reply(body, (*self._vocabulary.encode(part), *rest))

    def _chat(self, path: str, body: Json, *, continues: bool) -> Json:
        messages, begun = body["messages"], ""
        if continues:
            messages, begun = messages[:-1], messages[-1]["content"]
        ids = self._write(path, self._tokenizer.render(messages) + begun, body["max_tokens"])
        return self._chat_reply(body, ids)

    def _chat_reply(self, body: Json, ids: Ids) -> Json:
        text_ids = [i for i in ids if i != END_ID]
        content = [
            {**top[0], "top_logprobs": top}
            for token_id in text_ids
            if body.get("logprobs")
            for top in [[self._named(i, p) for i, p in self._top(token_id, body["top_logprobs"])]]
        ]
        for entry in (token for item in content for token in [item, *item["top_logprobs"]]):
            entry.pop("id", None)
        message = {"role": "assistant", "content": self._text(ids)}
        reply = _choice(ids, text="", logprobs={"content": content} if content else None)
        reply["choices"][0]["message"] = message
        return reply

    # Tokenise routes

    def _tokenize(self, path: str, body: Json) -> Json:
        if "prompt" in body:
            _only(body, "model prompt add_special_tokens")
            return {"tokens": self._tokenizer.encode_prompt(body["prompt"])}
        _only(body, "model messages add_generation_prompt chat_template_kwargs")
        if "messages" not in body:
            raise _Refused("prompt or messages", 400)
        text = self._tokenizer.render(body["messages"])
        return {"tokens": self._tokenizer.encode_prompt(text)}

    def _tokenize_prompt(self, path: str, body: Json) -> Json:
        if "prompt" not in body:
            raise _Refused("prompt: Field required", 422)
        return self._tokenize(path, body)

    def _llama_tokenize(self, path: str, body: Json) -> Json:
        _only(body, "model content add_special parse_special")
        parse = body["parse_special"]
        encode = self._tokenizer.encode_prompt if parse else self._vocabulary.encode
        return {"tokens": list(encode(body["content"]))}

    def _apply_template(self, path: str, body: Json) -> Json:
        _only(body, "model messages chat_template_kwargs")
        return {"prompt": self._tokenizer.render(body["messages"])}

    def _detokenize(self, path: str, body: Json) -> Json:
        _only(body, "model tokens")
        # SGLang leaves out control tokens.
        ids = [i for i in body["tokens"] if i > END_ID or "/generate" not in self._routes]
        text = self._bytes(ids).decode(errors="replace")
        return {"content": text} if "/completion" in self._routes else {"prompt": text}


class _Refused(Exception):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _only(body: Json, *keys: str) -> None:
    """Refuse unknown keys, as the strictest servers do."""
    unknown = set(body) - set(" ".join(keys).split())
    if unknown:
        raise _Refused(f"Unexpected fields in the request: {sorted(unknown)}", 422)


def _choice(ids: Ids, *, text: str, logprobs: Json | None) -> Json:
    finish = "stop" if ids[-1] == END_ID else "length"
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": logprobs}
    return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": len(ids)}}


def _echoed(body: Json, reply: Json) -> Json:
    last = body["messages"][-1]
    if last["role"] == "assistant":
        message = reply["choices"][0]["message"]
        message["content"] = last["content"] + message["content"]
    return reply
