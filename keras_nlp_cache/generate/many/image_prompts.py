"""What a user wants answered by a model that sees, as requests."""

import typing

from keras_nlp_cache.generate import reading
from keras_nlp_cache.generate.many.requests import Prompts
from keras_nlp_cache.generate.placeholders import of_each_prompt
from keras_nlp_cache.generate.prompts import check_vocabulary


class _Pictured(typing.NamedTuple):
    """A prompt and its images."""

    text: typing.Any
    images: typing.Any


class ImagePrompts(Prompts):
    """Turns prompts into requests, of which some may have images.

    A prompt with images is a dictionary of `prompt`, a string with a
    placeholder for each, and of `images`, arrays `(height, width, 3)`. The
    tower sees them once, however many texts are to follow.

    Takes the arguments of `Prompts`.
    """

    keys = (*Prompts.keys, "images")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Of the last prompt, what is read with it. It is read by each request.
        self._seen = None

    def _checked(self, i, prompt):
        said = super()._checked(i, prompt)
        images = said.get("images")
        if images is None or not len(images):
            return said
        if not isinstance(said["prompt"], str):
            raise ValueError(
                f"Expected `prompt` of prompt {i}, which has `images`, to be a "
                f"string. Received: {said['prompt']!r}."
            )
        return {**said, "prompt": _Pictured(said["prompt"], images)}

    def _token_ids(self, i, prompt):
        self._seen = None
        if not isinstance(prompt, _Pictured):
            return super()._token_ids(i, prompt)
        prefix = self._prefix or ""
        if not isinstance(prefix, str):
            raise ValueError(
                "Expected a `prefix` that is a string, for prompts with "
                f"images. Received: {prefix!r}."
            )
        if self._lm.preprocessor is None:
            raise ValueError(
                "Expected prompts without `images`, since the model has no "
                f"`preprocessor`. Received: {len(prompt.images)} of prompt {i}."
                " Set `lm.preprocessor`."
            )
        token_ids, seen = self._lm.see(prefix + prompt.text, prompt.images)
        check_vocabulary(token_ids, self._lm.backbone)
        self._seen = self._lm.source_in_turn(seen, token_ids, 0)
        return token_ids

    def _source(self, i, prompt):
        return self._seen

    def _cut(self, i, token_ids, length, why=" to fit"):
        if self._seen is not None and len(token_ids) > length:
            raise ValueError(
                f"Expected prompts with images to have at most {length} "
                f"tokens, for them and what is generated{why}. Received: "
                f"prompt {i} of {len(token_ids)} tokens. Shorten it, or raise "
                "the limit: images are not cut."
            )
        return super()._cut(i, token_ids, length, why)


def are_with_images(lm, inputs):
    """Whether prompts and images were passed to a task in whose text they are.

    Args:
        lm: A `CausalLM`.
        inputs: As for its `generate()`.
    """
    sees = lm.sees_in_turns and lm.backbone.sees
    return sees and isinstance(inputs, dict) and "prompts" in inputs


def prompts_with_images(inputs, preprocessor):
    """The prompts that a user passed with images.

    Args:
        inputs: Dictionary of `prompts`, a string or several, and of `images`,
            as the task's `generate()` takes it.
        preprocessor: That of a task that sees.

    Returns:
        `(prompts, is_scalar, as_arrays)`, as `prompts_in()`.

    Raises:
        ValueError: If there is something else in it, or there are not as many
            images as placeholders.
    """
    unknown = sorted(set(inputs) - {"prompts", "images"})
    texts = inputs["prompts"]
    is_scalar = isinstance(texts, str)
    texts = [texts] if is_scalar else reading.texts(texts)
    if unknown or texts is None:
        raise ValueError(
            "Expected `prompts`, strings, and `images`, which is what goes "
            "with further arguments. Received: "
            f"{', '.join(f'`{x}`' for x in sorted(inputs))}, with prompts of "
            f"the type {type(inputs['prompts']).__name__}."
        )
    mark = reading.mark_of("image", preprocessor)
    images = of_each_prompt(texts, inputs.get("images"), mark, "images", 3)
    prompts = [
        {"prompt": text, "images": some} for text, some in zip(texts, images)
    ]
    return prompts, is_scalar, False
