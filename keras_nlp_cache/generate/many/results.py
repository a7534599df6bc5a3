"""What a user gets of answers."""

import numpy as np
from tqdm import tqdm

from keras_nlp_cache.generate.loops.answers import padded


class Results:
    """What a user gets of answers.

    Args:
        lm: A `CausalLM`.
        strip_prompt: bool. Whether to leave the prompt out.
        watch: Optional `Watch` that looked at the texts.
        options: `Options`.
        return_dict: bool.
    """

    def __init__(self, lm, strip_prompt, watch, options, return_dict):
        self._lm, self._strip_prompt = lm, strip_prompt
        self._watch, self._options = watch, options
        self._return_dict = return_dict

    def of(self, answer):
        """The text of an `Answer`, or a dictionary.

        Without a preprocessor, token ids stand for a text.
        """
        shown = answer.token_ids
        if self._strip_prompt:
            shown = shown[answer.given :]
        text = shown
        if self._lm.preprocessor is not None:
            text = self._text(answer, shown)
        if not self._return_dict:
            return text
        new = answer.token_ids[answer.given :]
        result = {
            "text": text,
            "token_ids": new,
            "prompt_tokens": answer.given,
            "finish_reason": answer.finish_reason,
        }
        if self._lm.preprocessor is None:
            del result["text"]
        if self._options.return_logprobs is not None:
            result["logprobs"] = [
                {
                    "token_id": int(token_id),
                    "logprob": float(logprob),
                    "top_logprobs": [
                        (int(i), float(x)) for i, x in zip(ids, top)
                    ],
                }
                for token_id, logprob, ids, top in zip(new, *answer.logprobs)
            ]
        return result

    def _text(self, answer, shown):
        cut = None
        if self._watch is not None:
            cut = self._watch.text(answer.number)
        if cut is None:
            return self._detokenized(shown)
        if self._strip_prompt:
            return cut
        return self._detokenized(answer.token_ids[: answer.given]) + cut

    def _detokenized(self, token_ids):
        if not len(token_ids):
            return ""
        roles = self._lm.backbone.roles
        (text,) = self._lm.preprocessor.generate_postprocess(
            {
                roles.token_ids: np.asarray(token_ids)[None],
                roles.padding_mask: np.ones((1, len(token_ids)), "bool"),
            }
        )
        return text


def shown_progress(results, total, progress):
    """The results, with a bar that says how many there are.

    Args:
        results: Iterable.
        total: int, or `None` if nobody knows.
        progress: bool, or `None` for a bar where somebody can see it, and only
            if the work takes a while.
    """
    if total == 1 and progress is None:
        return results
    return tqdm(
        results,
        total=total,
        unit="text",
        disable=None if progress is None else not progress,
        delay=5 if progress is None else 0,
    )


def as_arrays(rows, roles):
    """Rows of token ids, padded at their end, as upstream returns them."""
    token_ids, mask = padded(rows)
    return {roles.token_ids: token_ids, roles.padding_mask: mask}
