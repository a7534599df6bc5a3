"""What was said in a session, and which of its tokens say it."""

import json

from keras_nlp_cache.files.chat_template import ChatTemplate
from keras_nlp_cache.generate.options.stop_strings import StopStrings
from keras_nlp_cache.generate.pieces import TextPieces
from keras_nlp_cache.generate.prompts import check_count
from keras_nlp_cache.generate.prompts import is_int
from keras_nlp_cache.generate.prompts import stop_tokens
from keras_nlp_cache.generate.template_tokens import Span
from keras_nlp_cache.generate.template_tokens import TemplateTokens

_ROLES = ("system", "developer", "user", "assistant", "tool")
_QUOTES = ("'{}'", '"{}"')
_TURN = "user"


class Conversation:
    """The messages of a session, and what of them the session has read.

    Args:
        messages: List of dictionaries.
        spans: List of `Span`s, all tokens of the session that say them.
    """

    def __init__(self, messages=(), spans=()):
        self.messages, self.spans = list(messages), list(spans)

    def copy(self):
        """Returns one that goes its own way."""
        return Conversation([dict(x) for x in self.messages], self.spans)

    def to_json(self):
        """Returns what `from_json()` takes, a string."""
        spans = [[x.text, x.token_ids, x.is_closed] for x in self.spans]
        return json.dumps({"messages": self.messages, "spans": spans})

    @classmethod
    def from_json(cls, text):
        """Restores a conversation.

        Raises:
            ValueError: If the text is damaged.
        """
        try:
            content = json.loads(text)
            spans = [
                Span(str(text), tuple(int(x) for x in ids), bool(is_closed))
                for text, ids, is_closed in content["spans"]
            ]
            return cls(checked(content["messages"]), spans)
        except (KeyError, TypeError) as e:
            raise ValueError(f"{type(e).__name__}: {e}") from e

    @property
    def token_ids(self):
        """The tokens of all spans, a list of ints."""
        return _token_ids(self.spans)

    def forget(self, token_ids):
        """Forgets spans that a session does not hold any more.

        Args:
            token_ids: The tokens of the session.

        Raises:
            ValueError: If the session holds others besides.
        """
        held = [int(x) for x in token_ids]
        spans, count = [], 0
        for span in self.spans:
            end = count + len(span.token_ids)
            if tuple(held[count:end]) != span.token_ids:
                break
            spans.append(span)
            count = end
        rest = self.token_ids[count:]
        if _common(rest, held[count:]) != len(held) - count:
            raise ValueError(
                "Expected a session in which all was said by `chat()`, to know "
                "what the chat template has to add. Received one that holds "
                f"{len(held) - count} tokens of a text that was sent "
                "otherwise. Start another session, or rewind this one."
            )
        # Of a span that was rewound in part, what is left is found again.
        self.spans = spans

    def plan(self, tokens, text, held):
        """What to read for the session to hold a text.

        Args:
            tokens: A `TemplateTokens`.
            text: str, as `TemplateTokens.render()` returns it.
            held: List of ints, the tokens of the session.

        Returns:
            `(spans, kept)`: all spans of the text, and how many of their tokens
            the session holds.
        """
        kept, end = [], 0
        for span in self.spans:
            if not text.startswith(span.text, end):
                break
            kept.append(span)
            end += len(span.text)
        # Text that goes on otherwise may have other tokens.
        while kept and not kept[-1].is_closed:
            if tokens.begins_special(text, end) and kept[-1].text:
                break
            end -= len(kept.pop().text)
        before = _token_ids(kept)
        new = tokens.read(text[end:], before[-1] if before else None)
        spans = kept + new
        return spans, _common(held, _token_ids(spans))


def _token_ids(spans):
    return [x for span in spans for x in span.token_ids]


def _common(first, second):
    """How many elements two sequences begin with in common."""
    pairs = enumerate(zip(first, second))
    differ = next((i for i, (x, y) in pairs if x != y), None)
    return min(len(first), len(second)) if differ is None else differ


# === Messages ===


def checked(messages):
    """Checks the messages of a conversation, and copies them.

    Args:
        messages: A string, what a user says, a dictionary with `"role"` and
            `"content"`, or a list of such.

    Raises:
        ValueError: If they are something else.
    """
    if isinstance(messages, str):
        messages = {"role": _TURN, "content": messages}
    if isinstance(messages, dict):
        messages = [messages]
    expected = (
        "Expected messages to be a string, or dictionaries of a `role` and a "
        "`content` that are strings. Received: "
    )
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"{expected}{messages!r}.")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{expected}{message!r} as message {i}.")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"{expected}{message!r} as message {i}.")
    return [dict(x) for x in messages]


def check_answerable(messages, template):
    """Checks that a model may go on with a conversation.

    Args:
        messages: List of dictionaries.
        template: A `ChatTemplate`.

    Raises:
        ValueError: If there is none, a role is unknown, or the model had the
            last word.
    """
    if not messages:
        raise ValueError(
            "Expected messages to answer. Received none. Begin with one of the "
            f"role {_TURN!r}."
        )
    for i, message in enumerate(messages):
        role = message["role"]
        # Some templates know others, and others take what they do not know.
        named = any(quote.format(role) in template.source for quote in _QUOTES)
        if role not in _ROLES and not (role and named):
            raise ValueError(
                f"Expected the role of message {i} to be one of {_ROLES}, or "
                f"one that the chat template names. Received: {role!r}."
            )
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            "Expected the last message to be one to answer. Received one of "
            "the role 'assistant'. Add what the user says to it."
        )
    if messages[-1]["role"] == _TURN and not messages[-1]["content"].strip():
        raise ValueError(
            "Expected the last message to say something. Received: "
            f"{messages[-1]['content']!r}."
        )


def template_for(value, tokenizer, before):
    """The chat template that a user assigned to a task.

    Args:
        value: `None`, a `ChatTemplate`, or a string in Jinja.
        tokenizer: The tokenizer of the task, or `None`.
        before: The template of the task until then, or `None`.
    """
    if value is None or isinstance(value, ChatTemplate):
        return value
    if before is not None:
        tokens = before.special_tokens
    else:
        named = {
            name: getattr(tokenizer, attribute, None)
            for name, attribute in (
                ("bos_token", "start_token"),
                ("eos_token", "end_token"),
                ("pad_token", "pad_token"),
            )
        }
        tokens = {name: x for name, x in named.items() if isinstance(x, str)}
    template = ChatTemplate(value, tokens)
    template.check()
    return template


# === Turns ===


def stream_turn(
    session, messages, max_new_tokens, stop_token_ids, variables, options
):
    """Does what `Session.stream_chat()` says."""
    tokens = template_tokens(session.lm)
    messages = checked([*session.messages, *checked(messages)])
    check_answerable(messages, tokens.template)
    check_count("max_new_tokens", max_new_tokens)
    stops = stop_tokens(stop_token_ids)
    stops = tokens.stop_ids if stops == "auto" else (stops or ())
    conversation = session.conversation
    conversation.forget(session.token_ids)
    text = tokens.render(messages, **(variables or {}))
    held = [int(x) for x in session.token_ids]
    spans, kept = conversation.plan(tokens, text, held)
    token_ids = _token_ids(spans)
    if not token_ids:
        raise ValueError(
            "Expected the chat template to make at least one token of the "
            f"messages. Received: {text!r}."
        )
    limit = session.lm.backbone.max_positions
    if limit is not None and len(token_ids) + max_new_tokens > limit:
        raise ValueError(
            f"Expected the conversation and its answer to fit the {limit} "
            "positions that the model learned. Received: "
            f"{len(token_ids)} tokens of messages, "
            f"max_new_tokens={max_new_tokens}. Leave out or rewind earlier "
            "turns, or lower `max_new_tokens`."
        )
    # The last token is read by the step after it.
    kept = session.reachable(min(kept, len(token_ids) - 1))
    session.rewind(len(held) - kept)
    conversation.spans = spans
    steps = session.stream_tokens(
        token_ids[kept:], max_new_tokens, stops, options
    )
    until = StopStrings(options.stop_strings or ())
    return _answer(
        session, tokens, messages, steps, stops, until, session.changes
    )


def _answer(session, tokens, messages, steps, stops, until, changes):
    """Yields an answer in pieces, and keeps it with the question.

    Both are kept from its first token on. An answer that is left before that
    leaves the conversation as it was.
    """
    conversation, tokenizer = session.conversation, tokens.tokenizer
    answer = {"role": "assistant", "content": ""}
    pieces = TextPieces(tokenizer.detokenize)

    def say(piece, token_ids, is_closed, is_last=False):
        conversation.spans.append(Span(piece, token_ids, is_closed))
        shown = until.add(piece)
        if is_last:
            shown += until.rest()
        answer["content"] += shown
        return shown

    try:
        while True:
            if changes != session.changes:
                raise RuntimeError(
                    "Expected the session to be left alone while an answer is "
                    "streamed. It was changed in between. Start another "
                    "stream, or `fork()` the session first."
                )
            token_id = next(steps, None)
            conversation.messages = [*messages, answer]
            if token_id is None or token_id in stops:
                break
            is_text = token_id not in tokens.control_ids
            piece = pieces.add(token_id) if is_text else ""
            # Where no text is certain, the next token is of the same
            # character.
            is_closed = bool(piece) or not is_text
            yield say(piece, (token_id,), is_closed)
            if until.found is not None:
                return
        # Nothing completes what there is of a character, or there is nothing.
        rest = say(pieces.rest(), (), is_closed=True, is_last=True)
        if token_id is not None:
            text = tokenizer.id_to_token(token_id)
            if isinstance(text, bytes):  # RWKV-7 has parts of characters.
                text = text.decode("utf-8", errors="replace")
            conversation.spans.append(Span(text, (token_id,), is_closed=True))
        if rest:
            yield rest
    finally:
        if changes == session.changes:
            # One that was interrupted before anybody saw it, was not said.
            unsaid = len(session.token_ids) - len(conversation.token_ids)
            session.rewind(max(0, unsaid))


def rewind_turns(session, count):
    """Does what `Session.rewind_turn()` says."""
    messages = session.messages
    turns = [i for i, x in enumerate(messages) if x["role"] == _TURN]
    if not is_int(count) or not 0 <= count <= len(turns):
        raise ValueError(
            f"Expected `count` to be an integer from 0 to {len(turns)}, the "
            f"turns of this session. Received: count={count!r}."
        )
    if not count:
        return
    conversation = session.conversation
    conversation.forget(session.token_ids)
    messages = messages[: turns[-count]]
    tokens = template_tokens(session.lm)
    held, kept = [int(x) for x in session.token_ids], 0
    if any(x["role"] == _TURN for x in messages):
        try:
            text = tokens.render(messages, add_generation_prompt=False)
        except ValueError:
            text = ""  # Not all templates can stop anywhere.
        _, kept = conversation.plan(tokens, text, held)
    session.rewind(len(held) - kept)
    conversation.messages = messages


def template_tokens(lm):
    """What reads the chat template of a task with its tokenizer.

    Raises:
        ValueError: If the task has no template.
    """
    template, tokenizer = lm.chat_template, lm.preprocessor.tokenizer
    if template is None:
        raise ValueError(
            "Expected a model with a chat template, which the directories and "
            "files of models that are tuned for chat carry. Received: "
            "chat_template=None. Set `lm.chat_template` to one, a string in "
            "Jinja, or send text as it is by `lm.start_session().send()`."
        )
    kept = getattr(lm, "_template_tokens", None)
    if (
        kept is None
        or kept.template is not template
        or kept.tokenizer is not tokenizer
    ):
        kept = lm._template_tokens = TemplateTokens(
            tokenizer, template, lm.turn_end_id()
        )
    return kept
