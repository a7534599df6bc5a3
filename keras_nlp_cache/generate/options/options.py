"""What a user gave, and what a compiled loop needs of it."""

import dataclasses
import math
import typing

import numpy as np

from keras_nlp_cache.generate.options import bad_words
from keras_nlp_cache.generate.options import checking
from keras_nlp_cache.generate.options.structure import Same
from keras_nlp_cache.generate.options.structure import Structure


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """How tokens are to be picked, and what is to be told of them.

    What is left out, `None`, or changes nothing (a penalty of 1 or of 0, no
    words) is off and costs nothing. For the order see `process()`.

    Args:
        repetition_penalty: Optional number above 0. The logit of each token
            that is in the text, prompt included, is divided by it if it is
            positive, and multiplied with it if it is negative. As in
            transformers.
        presence_penalty: Optional number. What is subtracted from the logit of
            each token that was generated. As in OpenAI's API, prompts do not
            count.
        frequency_penalty: Optional number. What is subtracted from the logit
            of a token as often as it was generated.
        min_p: Optional number from 0 to 1. Tokens are left out whose
            probability, at the sampler's temperature, is less than this share
            of that of the likeliest token.
        logit_bias: Optional dictionary from token ids to what is added to
            their logits. -inf is never picked.
        bad_words: Optional sequence of what is not to be generated. A list of
            token ids is not completed: its last token is left out where those
            before it stand at the end of the text. A string is taken as the
            tokenizer spells it with a space before it and without. Other
            spellings, such as one token for each letter, stay possible.
        logits_processor: Optional function `(token_ids, logits, lengths)` to
            logits: int32 `(B, S)`, zeros after the texts, float32
            `(B, vocabulary_size)` and int32 `(B,)`, all of them tensors of the
            backend. It is traced: on JAX and TensorFlow it is called once, and
            what it does besides is done once. Pass the same function again for
            what was compiled to be used again.
        stop_strings: Optional string, or sequence of strings. A text ends
            before the first of them.
        return_logprobs: Optional int. Of how many likely tokens to tell the
            log probabilities, besides that of the one that was picked.

    Raises:
        ValueError: If one of them is something else.
    """

    repetition_penalty: typing.Any = None
    presence_penalty: typing.Any = None
    frequency_penalty: typing.Any = None
    min_p: typing.Any = None
    logit_bias: typing.Any = None
    bad_words: typing.Any = None
    logits_processor: typing.Any = None
    stop_strings: typing.Any = None
    return_logprobs: typing.Any = None

    def __post_init__(self):
        checks = {
            "repetition_penalty": lambda *x: checking.penalty(*x, 1.0, True),
            "presence_penalty": lambda *x: checking.penalty(*x, 0.0),
            "frequency_penalty": lambda *x: checking.penalty(*x, 0.0),
            "min_p": checking.share,
            "logit_bias": checking.biases,
            "bad_words": checking.words,
            "logits_processor": checking.function,
            "stop_strings": checking.strings,
            "return_logprobs": checking.count,
        }
        for name, check in checks.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    @classmethod
    def of(cls, arguments):
        """Options from what a method takes besides arguments of its own.

        Args:
            arguments: Dictionary.

        Returns:
            `Options`.

        Raises:
            TypeError: If there is no option of some name.
        """
        names = {x.name for x in dataclasses.fields(cls)}
        unknown = sorted(set(arguments) - names)
        if unknown:
            raise TypeError(
                "Expected arguments of the method, or options, which are "
                f"{', '.join(f'`{x}`' for x in sorted(names))}. Received: "
                f"{', '.join(f'`{x}`' for x in unknown)}."
            )
        return cls(**arguments)

    def tokenized(self, tokenizer):
        """These options with token ids in place of bad words that are strings.

        Args:
            tokenizer: A `keras_hub.tokenizers.Tokenizer`, or `None` if the
                model has none.

        Returns:
            `Options`.

        Raises:
            ValueError: If there are strings and no tokenizer, or one of them
                has no tokens.
        """
        return dataclasses.replace(
            self, bad_words=bad_words.tokenized(self.bad_words, tokenizer)
        )

    @property
    def structure(self):
        """A `Structure`: what a loop has to be compiled again for.

        Bad words have to be `tokenized()`, and have no shape before.
        """
        function = self.logits_processor
        return Structure(
            logit_bias=bool(self.logit_bias),
            repetition_penalty=self.repetition_penalty != 1,
            counts=bool(self.presence_penalty or self.frequency_penalty),
            bad_words=bad_words.shape(self.bad_words),
            logits_processor=None if function is None else Same(function),
            min_p=self.min_p > 0,
            return_logprobs=self.return_logprobs,
        )

    def values(self, vocabulary_size):
        """What a compiled loop is passed, and not compiled again for.

        Args:
            vocabulary_size: int. The size of the logits.

        Returns:
            A dictionary of NumPy arrays, float32 and int32, whose keys and
            shapes the `structure` says.

        Raises:
            ValueError: If the model does not know a token id, if no token is
                left to pick, or if it has fewer tokens than are to be told.
        """
        self._check(vocabulary_size)
        structure, values = self.structure, {}
        if structure.logit_bias:
            dense = np.zeros(vocabulary_size, "float32")
            dense[list(self.logit_bias)] = list(self.logit_bias.values())
            values["logit_bias"] = dense
        if structure.repetition_penalty:
            values["repetition_penalty"] = np.float32(self.repetition_penalty)
        if structure.counts:
            values["presence_penalty"] = np.float32(self.presence_penalty)
            values["frequency_penalty"] = np.float32(self.frequency_penalty)
        if structure.bad_words:
            values["bad_words"], values["bad_word_lengths"] = bad_words.arrays(
                self.bad_words
            )
        if structure.min_p:
            values["log_min_p"] = np.float32(math.log(self.min_p))
        return {name: np.asarray(x) for name, x in values.items()}

    def _check(self, size):
        checking.in_vocabulary("logit_bias", self.logit_bias, size)
        shape = bad_words.shape(self.bad_words)  # Refuses strings.
        if shape:
            ids = (x for word in self.bad_words for x in word)
            checking.in_vocabulary("bad_words", ids, size)
        never = {word[0] for word in self.bad_words if len(word) == 1}
        never |= {x for x, y in self.logit_bias.items() if y == -math.inf}
        if len(never) == size:
            raise ValueError(
                "Expected `logit_bias` and `bad_words` to leave a token to "
                f"pick. Received: all {size} tokens of the vocabulary."
            )
        if (self.return_logprobs or 0) > size:
            raise ValueError(
                f"Expected `return_logprobs` to be at most {size}, the "
                "vocabulary of the model. Received: "
                f"{self.return_logprobs}."
            )
