"""The documented replies of each dialect's servers."""

from __future__ import annotations

from typing import Any

import pytest

from mlxroute.errors import LargeNotContinued, LargeProtocolError
from mlxroute.large.dialects import RequestOptions
from mlxroute.large.dialects.llama_server import LlamaServer
from mlxroute.large.dialects.sglang import SglangGenerate
from mlxroute.large.prompt import Prompt
from mlxroute.large.reply import Completion, ReplyPosition
from mlxroute.large.vocabulary.token_reader import TokenReader
from tests.support.prompt_forms import TEXT, dialect, prompt_for
from tests.support.vocabularies import TableVocabulary


def read(name: str, reply: dict[str, Any]) -> Completion:
    return dialect(name).completion(reply, prompt_for(dialect(name)))


def texts(completion: Completion) -> list[tuple[int | None, str | None, bool]]:
    return [
        (position.token.token_id, position.token.text, position.ends)
        for position in completion.positions
    ]


def data(position: ReplyPosition) -> bytes | None:
    return TokenReader().text_bytes(position.token)


# llama-server


def llama(ids: list[int], named: list[dict[str, Any]], /, **changes: Any) -> dict[str, Any]:
    return {
        "content": "",
        "tokens": ids,
        "stop_type": "limit",
        "completion_probabilities": named,
        "tokens_evaluated": 12,
        "tokens_predicted": len(ids),
        "timings": {"cache_n": 11},
    } | changes


def named(token_id: int, text: str, logprob: float = -0.5) -> dict[str, Any]:
    token = {"id": token_id, "token": text, "bytes": list(text.encode()), "logprob": logprob}
    return token | {"top_logprobs": [token]}


def test_llama_server_names_ids_bytes_and_counts() -> None:
    completion = read("llama-server completion", llama([7], [named(7, " a")], content=" a"))
    (position,) = completion.positions
    assert (position.token.token_id, position.token.data, position.token.logprob) == (
        7,
        b" a",
        -0.5,
    )
    assert [other.data for other in position.top] == [b" a"]
    assert (completion.prompt_tokens, completion.cached_tokens) == (12, 11)
    assert (completion.text, completion.ends) == (" a", False)


def test_llama_server_gives_a_fragment_by_id_alone() -> None:
    completion = read("llama-server completion", llama([7], [], content="\ufffd"))
    (position,) = completion.positions
    assert (position.token.token_id, position.token.logprob, data(position)) == (7, None, None)


def test_llama_server_tokens_without_logprobs_keep_their_places() -> None:
    reply = llama([7, 8, 9], [named(8, "é"), named(9, "b")], content="éb")
    entries = read("llama-server completion", reply).positions
    assert [(position.token.token_id, data(position)) for position in entries] == [
        (7, None),
        (8, "é".encode()),
        (9, b"b"),
    ]


def test_llama_server_gives_no_logprobs_of_drafted_tokens() -> None:
    drafted = named(8, "b", 0.0) | {"top_logprobs": []}
    names = [named(7, "a"), drafted, named(9, "c", 0.0), named(10, "d")]
    reply = llama([7, 8, 9, 10], names, content="abcd")
    positions = read("llama-server completion", reply).positions
    assert [position.token.logprob for position in positions] == [-0.5, None, 0.0, -0.5]
    assert [len(position.top) for position in positions] == [1, 0, 1, 1]


def test_llama_servers_stop_type_marks_the_end() -> None:
    end = named(2, "")
    reply = llama([7, 2], [named(7, "a"), end], stop_type="eos", content="a")
    assert texts(read("llama-server completion", reply)) == [(7, "a", False), (2, "", True)]


def test_a_llama_server_that_ignores_return_tokens_is_read_from_its_logprobs() -> None:
    reply = llama([], [named(7, "a")])
    assert texts(read("llama-server completion", reply)) == [(7, "a", False)]


def test_a_llama_servers_token_at_the_end_of_its_context_is_read() -> None:
    """It is of the whole prompt; later ones may be of a part, if the server drops the beginning."""
    reply = llama([7], [named(7, "a")], truncated=True, content="a")
    completion = LlamaServer().completion(reply, Prompt(ids=(1,) * 12))
    assert texts(completion) == [(7, "a", False)]
    two = llama([7, 8], [named(7, "a"), named(8, "b")], truncated=True, content="ab")
    for other, count in ((reply, 13), (two, 12)):
        with pytest.raises(LargeProtocolError, match="truncated the prompt"):
            LlamaServer().completion(other, Prompt(ids=(1,) * count))


@pytest.mark.parametrize(
    "changes",
    [
        {"truncated": True, "tokens_evaluated": None},
        {"tokens": []},
        {"tokens": [8]},
        {"tokens": None},
        {"content": None},
        {"completion_probabilities": [{"id": 7}]},
    ],
)
def test_a_llama_server_reply_that_cannot_be_trusted_is_refused(changes: dict[str, Any]) -> None:
    named_one = [] if changes.get("tokens") == [] else [named(7, "a")]
    with pytest.raises(LargeProtocolError):
        read("llama-server completion", llama([7], named_one, **changes))


# vLLM


def vllm(ids: list[int], tokens: list[str], /, **changes: Any) -> dict[str, Any]:
    logprobs = {
        "tokens": tokens,
        "token_logprobs": [-0.5] * len(tokens),
        "top_logprobs": [{token: -0.5, "zz": -2.0} for token in tokens],
    }
    choice = {"text": "".join(tokens), "finish_reason": "length", "logprobs": logprobs}
    return {"choices": [choice | {"token_ids": ids} | changes]}


def test_vllm_names_ids_beside_the_text() -> None:
    completion = read("vLLM completions", vllm([7], [" a"]))
    assert texts(completion) == [(7, " a", False)]
    assert [(other.text, other.logprob) for other in completion.positions[0].top] == [
        (" a", -0.5),
        ("zz", -2.0),
    ]


def test_vllms_token_id_names_become_ids() -> None:
    reply = vllm([7], ["token_id:7"])
    reply["choices"][0]["logprobs"]["top_logprobs"] = [{"token_id:7": -0.5, "token_id:9": -2.0}]
    (position,) = read("vLLM completions", reply).positions
    assert (position.token.token_id, position.token.text) == (7, None)
    assert [(other.token_id, other.text) for other in position.top] == [(7, None), (9, None)]


_OF_TEXT = ["OpenAI completions", "OpenAI completions, text only", "chat continuation (flags)"]


def finished(name: str, text: str, reason: Any) -> Completion:
    """Read a reply with text alone, finished for a reason."""
    choice = {"text": text, "message": {"content": text}, "finish_reason": reason}
    return read(name, {"choices": [choice]})


@pytest.mark.parametrize("name", _OF_TEXT)
def test_every_name_of_the_end_ends_an_answer(name: str) -> None:
    ends = {"stop": True, "eos": True, "eos_token": True, "length": False, None: False, "": False}
    for reason, expected in ends.items():
        assert finished(name, "", reason).ends is expected


@pytest.mark.parametrize("name", _OF_TEXT)
@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "abort", 7, []])
def test_a_reply_without_text_for_another_reason_asks_for_no_more_tokens(
    name: str, reason: Any
) -> None:
    with pytest.raises(LargeNotContinued, match=r"no text \(finish reason"):
        finished(name, "", reason)


def test_vllms_finish_reason_tells_a_fragment_from_the_end() -> None:
    (fragment,) = read("vLLM completions", vllm([7], [""])).positions
    assert (fragment.ends, data(fragment)) == (False, None)
    (end,) = read(
        "vLLM completions", vllm([2], ["<|im_end|>"], text="", finish_reason="stop")
    ).positions
    assert (end.ends, end.token.token_id) == (True, 2)


@pytest.mark.parametrize(
    "reply",
    [
        vllm([7], [" a"], token_ids=None),
        vllm([], []),
        vllm([7, 8], [" a"]),
        vllm([7], ["token_id:8"]),
        vllm([7], [" a"], logprobs=None),
        vllm([-1], [" a"]),
    ],
    ids=["no ids", "no token", "fewer names", "another id", "no logprobs", "no id"],
)
def test_a_vllm_reply_that_cannot_be_trusted_is_refused(reply: dict[str, Any]) -> None:
    with pytest.raises(LargeProtocolError):
        read("vLLM completions", reply)


# SGLang


def sglang(tokens: list[list[Any]], **changes: Any) -> dict[str, Any]:
    meta = {
        "prompt_tokens": 12,
        "completion_tokens": len(tokens),
        "cached_tokens": 8,
        "finish_reason": {"type": "length", "length": 1},
        "output_token_logprobs": tokens,
        "output_top_logprobs": [[[-2.0, 9, "zz"], token] for token in tokens],
    }
    return {"text": "a", "meta_info": meta | changes}


def test_sglangs_triples_are_logprob_id_and_text() -> None:
    completion = read("SGLang generate", sglang([[-0.5, 7, "a"]]))
    assert texts(completion) == [(7, "a", False)]
    assert [other.token_id for other in completion.positions[0].top] == [7, 9]
    assert (completion.prompt_tokens, completion.cached_tokens) == (12, 8)


def test_sglangs_pairs_and_missing_texts_are_ids_alone() -> None:
    for token in ([-0.5, 7], [-0.5, 7, None]):
        (position,) = read("SGLang generate", sglang([token])).positions
        assert (position.token.token_id, position.token.text, data(position)) == (7, None, None)


def test_sglangs_replacement_character_leaves_the_bytes_open() -> None:
    (position,) = read("SGLang generate", sglang([[-0.5, 7, "\ufffd"]])).positions
    assert data(position) is None


def test_sglangs_matched_stop_marks_the_end() -> None:
    reply = sglang([[-0.5, 2, "</s>"]], finish_reason={"type": "stop", "matched": 2})
    assert texts(read("SGLang generate", reply)) == [(2, "</s>", True)]


def test_an_sglang_that_counts_fewer_tokens_than_it_got_has_truncated_them() -> None:
    reply = sglang([[-0.5, 7, "a"]])
    assert SglangGenerate().completion(reply, Prompt(ids=(1,) * 12)).prompt_tokens == 12
    with pytest.raises(LargeProtocolError, match="truncated the prompt"):
        SglangGenerate().completion(reply, Prompt(ids=(1,) * 13))


@pytest.mark.parametrize("tokens", [[], [[-0.5]], ["a"], [[None, 7, "a"]], [[float("-inf"), 7]]])
def test_an_sglang_reply_that_cannot_be_trusted_is_refused(tokens: list[Any]) -> None:
    with pytest.raises(LargeProtocolError):
        read("SGLang generate", sglang([]) | {"meta_info": {"output_token_logprobs": tokens}})


# TGI


def tgi(tokens: list[tuple[int, str]], finish: str = "length") -> dict[str, Any]:
    named_tokens = [{"id": i, "text": text, "logprob": -0.5} for i, text in tokens]
    details = {
        "finish_reason": finish,
        "generated_tokens": len(tokens),
        "tokens": named_tokens,
        "top_tokens": [
            [{"id": 9, "text": "zz", "logprob": -2.0}, position] for position in named_tokens
        ],
    }
    return {"generated_text": "a", "details": details}


def test_tgi_names_ids_and_a_fragment_has_no_text() -> None:
    completion = read("TGI generate", tgi([(7, ""), (8, "é")]))
    assert texts(completion) == [(7, "", False), (8, "é", False)]
    assert data(completion.positions[0]) is None
    assert [other.token_id for other in completion.positions[0].top] == [7, 9]
    assert completion.completion_tokens == 2


def test_tgis_finish_reason_marks_the_end() -> None:
    assert texts(read("TGI generate", tgi([(2, "</s>")], "eos_token"))) == [(2, "</s>", True)]


def test_sglang_and_tgi_replies_are_not_mistaken_for_each_other() -> None:
    with pytest.raises(LargeProtocolError):
        read("TGI generate", sglang([[-0.5, 7, "a"]]))
    with pytest.raises(LargeProtocolError):
        read("SGLang generate", tgi([(7, "a")]))


# Ollama


def ollama(text: str, **changes: Any) -> dict[str, Any]:
    token = {"token": text, "logprob": -0.5}
    position = token | {"top_logprobs": [token, {"token": "zz", "logprob": -2.0}]}
    reply = {"response": text, "done": True, "done_reason": "length", "logprobs": [position]}
    return reply | {"prompt_eval_count": 12, "eval_count": 1} | changes


def test_ollama_gives_text_and_its_own_counts() -> None:
    completion = read("Ollama generate", ollama(" a"))
    assert texts(completion) == [(None, " a", False)]
    assert (completion.prompt_tokens, completion.completion_tokens) == (12, 1)


def test_ollamas_done_reason_tells_the_end_from_a_fragment() -> None:
    end = ollama("", done_reason="stop")
    del end["logprobs"]
    assert texts(read("Ollama generate", end)) == [(None, "", True)]
    fragment = ollama("", logprobs=None)
    assert texts(read("Ollama generate", fragment)) == [(None, "", False)]
    after = ollama(" a", done_reason="stop")
    assert texts(read("Ollama generate", after)) == [(None, " a", False), (None, "", True)]


def test_an_older_ollamas_replacement_character_leaves_the_bytes_open() -> None:
    token = {"token": "\ufffd", "bytes": [239, 191, 189], "logprob": -0.5}
    (position,) = read("Ollama generate", ollama("\ufffd", logprobs=[token])).positions
    assert data(position) is None


def test_an_ollama_without_logprobs_is_refused() -> None:
    with pytest.raises(LargeProtocolError, match="no logprobs"):
        read("Ollama generate", ollama(" a", logprobs=[]))


# mlx_lm


def test_mlx_lms_padding_rows_are_not_alternatives() -> None:
    chosen = {"id": 7, "token": "Ġa", "logprob": -0.5}
    padding = {"id": 151_999, "token": None, "logprob": -9.0}
    content = [{**padding, "top_logprobs": [padding, chosen]}]
    reply = {"choices": [{"text": "", "finish_reason": "length", "logprobs": {"content": content}}]}
    (position,) = read("mlx_lm completions", reply).positions
    assert (position.token.token_id, position.token.piece) == (7, "Ġa")
    assert [other.token_id for other in position.top] == [7]


def test_mlx_lm_without_alternatives_is_refused() -> None:
    content = [{"id": 7, "logprob": -0.5}]
    reply = {"choices": [{"text": "", "finish_reason": "length", "logprobs": {"content": content}}]}
    with pytest.raises(LargeProtocolError):
        read("mlx_lm completions", reply)


def test_mlx_lms_top_logprobs_are_11_at_most() -> None:
    request = dialect("mlx_lm completions").request(TEXT, RequestOptions(2, 40, None))
    assert request["top_logprobs"] == 11


# OpenAI's completions


def test_togethers_alternatives_may_lack_the_list_around_them() -> None:
    logprobs = {
        "token_ids": [7],
        "tokens": [" a"],
        "token_logprobs": [-0.5],
        "top_logprobs": {" a": -0.5, "zz": -2.0},
    }
    choice = {"text": " a", "finish_reason": "length", "logprobs": logprobs}
    (position,) = read("OpenAI completions", {"choices": [choice]}).positions
    assert (position.token.token_id, position.token.text) == (7, " a")
    assert [(other.text, other.logprob) for other in position.top] == [(" a", -0.5), ("zz", -2.0)]


def test_openais_names_of_bytes_are_parts_of_characters() -> None:
    logprobs = {
        "tokens": ["bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "bytes: \\xc3"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"bytes:\\xf0\\x9f": -0.5, "bytes:x": -2.0}, {}, {}],
    }
    choice = {"text": "😀", "finish_reason": "length", "logprobs": logprobs}
    first, *others = read("OpenAI completions", {"choices": [choice]}).positions
    assert (data(first), [data(other) for other in others]) == (
        b"\xf0\x9f",
        [b"\x98\x80", b" \xc3"],
    )
    assert [TokenReader().text_bytes(token) for token in first.top] == [b"\xf0\x9f", b"bytes:x"]


@pytest.mark.parametrize("text", ["", "\ufffd", "\ufffd\ufffd"])
def test_the_only_part_of_a_character_is_not_compared_with_the_text(text: str) -> None:
    logprobs = {"tokens": ["bytes:\\xf0\\x9f"], "token_logprobs": [-0.5]}
    choice = {"text": text, "finish_reason": "length", "logprobs": logprobs}
    (position,) = read("OpenAI completions", {"choices": [choice]}).positions
    assert data(position) == b"\xf0\x9f"


def test_fireworks_names_ids_and_bytes_in_chat_logprobs() -> None:
    token = {"token": " a", "token_id": 7, "bytes": list(b" a"), "logprob": -0.5}
    logprobs = {"content": [token | {"top_logprobs": [token]}]}
    choice = {"text": " a", "finish_reason": "length", "logprobs": logprobs}
    (position,) = read("OpenAI completions", {"choices": [choice]}).positions
    assert (position.token.token_id, position.token.data) == (7, b" a")


def test_a_text_without_logprobs_is_one_position() -> None:
    for name in ("OpenAI completions", "OpenAI completions, text only"):
        choice = {"text": " a b", "finish_reason": "length", "logprobs": None}
        assert texts(read(name, {"choices": [choice]})) == [(None, " a b", False)]


def test_text_with_stop_is_a_token_and_then_the_end() -> None:
    choice = {"text": " a", "finish_reason": "stop"}
    completion = read("OpenAI completions, text only", {"choices": [choice]})
    assert texts(completion) == [(None, " a", False), (None, "", True)]
    assert completion.ends


def test_deepseeks_own_name_for_cached_tokens_is_read() -> None:
    choice = {"text": " a", "finish_reason": "length"}
    usage = {"prompt_tokens": 12, "completion_tokens": 1, "prompt_cache_hit_tokens": 8}
    completion = read("OpenAI completions", {"choices": [choice], "usage": usage})
    assert (completion.prompt_tokens, completion.cached_tokens) == (12, 8)


def test_a_thinking_ollamas_text_is_in_another_field() -> None:
    """Servers that parse a raw answer for thinking, although it has no template, move the text."""
    assert texts(read("Ollama generate", ollama("", thinking=" a"))) == [(None, "", False)]
    moved = ollama("", thinking=" a")
    moved["logprobs"][0]["token"] = " a"
    completion = read("Ollama generate", moved)
    assert (texts(completion), completion.text) == ([(None, " a", False)], " a")
    ended = moved | {"done_reason": "stop"}
    assert texts(read("Ollama generate", ended)) == [(None, " a", False), (None, "", True)]


# Chat


def chat(content: str | None, *, finish: str = "length", **token: Any) -> dict[str, Any]:
    logprobs = {"content": [{"logprob": -0.5, **token}]} if token else None
    message = {"role": "assistant", "content": content}
    return {"choices": [{"message": message, "finish_reason": finish, "logprobs": logprobs}]}


def test_a_chat_tokens_bytes_count_not_its_text() -> None:
    reply = chat("\ufffd", token="\\xf0\\x9f\\x8c", bytes=[240, 159, 140])
    (position,) = read("chat continuation (prefix)", reply).positions
    assert data(position) == bytes([240, 159, 140])


@pytest.mark.parametrize("content", ["", None])
def test_a_chat_reply_without_content_and_with_stop_ends_the_answer(content: str | None) -> None:
    for name in ("chat continuation (flags)", "chat continuation (trailing turn, text only)"):
        assert texts(read(name, chat(content, finish="stop"))) == [(None, "", True)]


def spelled(*texts: str, content: str) -> dict[str, Any]:
    """Return an ended reply whose logprobs name these tokens."""
    reply = chat(content, finish="stop", token="x")
    reply["choices"][0]["logprobs"]["content"] = [{"token": t, "logprob": -0.5} for t in texts]
    return reply


@pytest.mark.parametrize(
    ("tokens", "content", "last"),
    [
        # Logprobs without the end token: it follows the last token.
        (["Re", "d", "."], "Red.", ""),
        ([" Re", "d", "."], "Red.", ""),
        (["Red"], "Red", ""),
        # Logprobs with the end token, which is no text.
        (["Re", "d", "<|im_end|>"], "Red", "<|im_end|>"),
        (["Re", "d", ""], "Red", ""),
    ],
)
def test_the_end_of_a_chat_answer_is_after_its_text(
    tokens: list[str], content: str, last: str
) -> None:
    completion = read("chat continuation (flags)", spelled(*tokens, content=content))
    *before, end = texts(completion)
    assert end == (None, last, True)
    assert [ends for _, _, ends in before] == [False] * len(before)
    assert "".join(text or "" for _, text, _ in before).strip() == content


def test_an_end_token_without_bytes_is_the_end_of_a_chat_answer() -> None:
    reply = spelled("Re", "d", "<|im_end|>", content="Red")
    reply["choices"][0]["logprobs"]["content"][-1]["bytes"] = []
    completion = read("chat continuation (flags)", reply)
    assert texts(completion) == [
        (None, "Re", False),
        (None, "d", False),
        (None, "<|im_end|>", True),
    ]


def test_a_chat_reply_with_thoughts_in_place_of_text_is_refused() -> None:
    for key in ("reasoning_content", "reasoning", "thinking"):
        reply = chat(None, token="Okay")
        reply["choices"][0]["message"][key] = "Okay"
        with pytest.raises(LargeProtocolError, match="thinks first"):
            read("chat continuation (flags)", reply)
        reply["choices"][0]["message"]["content"] = "Okay"
        assert read("chat continuation (flags)", reply).text == "Okay"


def test_a_fragment_has_an_empty_name_and_no_bytes() -> None:
    (position,) = read("chat continuation (flags)", chat("", token="", bytes=[])).positions
    assert (data(position), position.ends) == (None, False)


def test_an_echo_of_the_answer_start_is_removed() -> None:
    name = "chat continuation (prefix, echoing, text only)"
    assert read(name, chat("Hello")).text == "llo"
    assert texts(read(name, chat("Hello"))) == [(None, "llo", False)]
    assert texts(read(name, chat("He", finish="stop"))) == [(None, "", True)]
    with pytest.raises(LargeProtocolError, match="does not begin with"):
        read(name, chat("llo"))


def test_an_echo_is_removed_from_the_text_not_from_the_tokens() -> None:
    reply = chat("Hello", token="llo", bytes=list(b"llo"))
    completion = read("chat continuation (trailing turn, echoing)", reply)
    assert (completion.text, data(completion.positions[0])) == ("llo", b"llo")


def test_a_chat_reply_without_the_requested_logprobs_is_refused() -> None:
    with pytest.raises(LargeProtocolError, match="no logprobs"):
        read("chat continuation (flags)", chat("llo"))
    assert read("chat continuation (trailing turn, text only)", chat("llo")).text == "llo"


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"choices": []},
        {"choices": [{"finish_reason": "stop"}]},
        {"choices": [{"message": {"content": 5}}]},
        {"choices": [{"message": {"content": "\ud800"}}]},
        chat("a", token="a", logprob=0.7),
        chat("a", token="a", logprob=float("nan")),
        chat("a", token="a", bytes=[300]),
        chat("a", token=None),
    ],
)
def test_a_malformed_chat_reply_is_refused(reply: dict[str, Any]) -> None:
    with pytest.raises(LargeProtocolError):
        read("chat continuation (flags)", reply)


def test_an_id_of_a_known_vocabulary_is_read_whatever_the_text() -> None:
    """vLLM, SGLang, TGI and llama-server give a fragment by id alone."""
    vocabulary = TableVocabulary(["Ã", "a"])
    reader = TokenReader()
    reader.learn_vocabulary(vocabulary)
    identity = vocabulary.id_of("Ã")
    for name, reply in {
        "vLLM completions": vllm([identity], [""]),
        "SGLang generate": sglang([[-0.5, identity, "\ufffd"]]),
        "TGI generate": tgi([(identity, "")]),
        "llama-server completion": llama([identity], []),
    }.items():
        assert reader.text_bytes(read(name, reply).positions[0].token) == b"\xc3", name
