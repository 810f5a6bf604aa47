"""The answer so far, as an immutable value that branches share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from mlxroute.engine.characters import CharacterState
from mlxroute.engine.protocols import SmallProtocol
from mlxroute.errors import ContextTooLong, UsageError
from mlxroute.messages import read_messages
from mlxroute.types import LargeContext, Message, PromptText, Span, Vocabulary


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A conversation, its text in the small model's chat template, and the ids of that text.

    `answer_start`, the end of the text, is the part of the answer that was there before.
    `drops_space` is as in `EncodedPrompt`.
    """

    vocabulary: Vocabulary
    messages: tuple[Message, ...]
    rendered: PromptText
    ids: tuple[int, ...]
    answer_start: str = ""
    drops_space: bool = False

    @property
    def text(self) -> str:
        """The text."""
        return self.rendered.text


def render_prompt(
    small: SmallProtocol, messages: Sequence[Message], *, answer_start: str = ""
) -> RenderedPrompt:
    """Render a conversation; `answer_start` is the part of the answer at its end.

    Raises UsageError for an empty prompt and for messages that are not text, ContextTooLong for a
    prompt that does not fit in the context.
    """
    conversation = read_messages(messages)
    encoded = small.encode_conversation(conversation)
    ids = encoded.ids
    if not ids:
        raise UsageError("the prompt is empty")
    check_prompt_fits(ids, small.context_length)
    return RenderedPrompt(
        small.vocabulary,
        conversation,
        encoded.rendered,
        ids,
        answer_start,
        drops_space=encoded.drops_space,
    )


def check_prompt_fits(ids: Sequence[int], context_length: int) -> None:
    """Raise ContextTooLong for a prompt that leaves no room for a token of the answer."""
    if len(ids) >= context_length:
        raise ContextTooLong(
            f"the prompt has {len(ids):,} tokens and the small model's context holds"
            f" {context_length:,}; shorten it"
        )


@dataclass(frozen=True, slots=True)
class WrittenToken:
    """A token of the answer, with the text it adds.

    `large_ids` are the large model's own ids for it: empty for a token of the small model, None for
    the second and later tokens of a large token that is spelled as several small ones. `is_asked`
    is True where the large model is asked, whatever it replies.
    """

    token_id: int
    text: str
    large_ids: tuple[int, ...] | None
    is_asked: bool = False

    @property
    def starts_decision(self) -> bool:
        """Whether this is the first token of what was decided at one position."""
        return self.large_ids is not None


@dataclass(frozen=True, slots=True)
class Transcript:
    """A prompt and the tokens of its answer, committed or provisional.

    `extend` returns a longer transcript and leaves this one as it is.
    """

    prompt: RenderedPrompt
    tokens: tuple[WrittenToken, ...] = ()
    ids: tuple[int, ...] = ()
    characters: CharacterState = field(default_factory=CharacterState)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ends_in_character(self) -> bool:
        """Whether the answer ends inside a character."""
        return bool(self.characters.fragment_ids)

    def extend(
        self,
        token_ids: Sequence[int],
        *,
        ends: bool,
        large_ids: tuple[int, ...] = (),
        is_asked: bool = False,
    ) -> Transcript:
        """Return the transcript with what was decided at one position.

        `token_ids` are one token, or a large token spelled as several small ones, and `large_ids`
        the large model's own ids for them. A token that `ends` the answer adds no text. `is_asked`
        is as in `WrittenToken`.
        """
        tokens, characters = list(self.tokens), self.characters
        for number, token_id in enumerate(token_ids):
            text = ""
            if not ends:
                data = self.prompt.vocabulary.token_bytes(token_id)
                characters, text = characters.push(token_id, data)
            own_ids = None if number else large_ids
            tokens.append(WrittenToken(token_id, text, own_ids, is_asked))
        ids = (*self.ids, *token_ids)
        return replace(self, tokens=tuple(tokens), ids=ids, characters=characters)

    def texts_from(self, index: int) -> tuple[str, ...]:
        """Return the texts that the tokens from number `index` on add to what the answer shows.

        The context keeps a space at its beginning that `drops_space` leaves out here.
        """
        texts = [token.text for token in self.tokens[index:]]
        if self.prompt.drops_space:
            first = next((i for i, token in enumerate(self.tokens) if token.text), -1)
            if first >= index:
                texts[first - index] = texts[first - index].removeprefix(" ")
        return tuple(texts)

    @property
    def text(self) -> str:
        """The text of the prompt and of the answer, up to its last whole character."""
        return self.prompt.text + "".join(token.text for token in self.tokens)

    def context(self) -> LargeContext:
        """Return the large model's input for the position after the last token."""
        fragment_ids = self.characters.fragment_ids
        whole = self.tokens[: len(self) - len(fragment_ids)]
        return LargeContext(
            text=self.prompt.text + "".join(token.text for token in whole),
            token_ids=(*self.prompt.ids, *self.ids),
            fragment_ids=fragment_ids,
            vocabulary=self.prompt.vocabulary,
            messages=self.prompt.messages,
            spans=group_spans(
                [
                    (self.prompt.answer_start, (), False),
                    *((token.text, token.large_ids, token.is_asked) for token in whole),
                ]
            ),
            prompt=self.prompt.rendered,
        )


def group_spans(tokens: Iterable[tuple[str, tuple[int, ...] | None, bool]]) -> tuple[Span, ...]:
    """Group an answer's text by the model that wrote it.

    `tokens` are triples of text, `large_ids` and `is_asked` as in `WrittenToken`. Adjacent text of
    the small model becomes one span; each token of the large model is a span with its own ids. So
    is each token whose position is asked: a call that is made before the reply then has the spans
    that it would have after it.
    """
    groups: list[tuple[list[str], tuple[int, ...]]] = []
    in_large_token = is_open = False
    for text, ids, is_asked in tokens:
        large_ids = ids if ids is not None or in_large_token else ()
        in_large_token = large_ids is None or bool(large_ids)
        is_apart = is_asked or in_large_token
        if large_ids is None or (text and is_open and not is_apart):
            groups[-1][0].append(text)
        elif text or large_ids:
            groups.append(([text], large_ids))
        is_open = not is_apart and (is_open or bool(text))
    return tuple(Span("".join(texts), ids) for texts, ids in groups)
