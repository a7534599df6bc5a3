"""A batch job: prompts from a file, answers into another."""

import contextlib
import errno
import os
import sys
from typing import NamedTuple

import tqdm

from keras_nlp_cache.batch_job import answering
from keras_nlp_cache.batch_job.answers_file import AnswersFile
from keras_nlp_cache.batch_job.prompts_file import PromptsFile
from keras_nlp_cache.generate import prompts as prompt_checks

# So many prompts may be refused before one is answered.
_MOST_REFUSED = 64


class Summary(NamedTuple):
    """What a job did.

    Attributes:
        prompts: int. How many there are.
        earlier: int. How many of them were done when it was started.
        errors: int. How many it found that cannot be answered.
    """

    prompts: int
    earlier: int
    errors: int


def run(
    lm,
    input,
    output,
    *,
    max_new_tokens=256,
    batch_size=16,
    stop_token_ids="auto",
    strip_prompt=True,
    chat_prompt=None,
    overwrite=False,
    progress=None,
    **options,
):
    r"""Answers the prompts in a file, and goes on where it stopped.

    Each line of `output` is an object with the `"id"` of the prompt, or its
    line number if it has none, its `"index"`, which counts from 0, the
    `"answer"`, the number of its `"tokens"` and its `"finish_reason"`, in the
    order in which they are done. An answer is written as
    soon as it is there. Whatever ends the job, started again with the same
    arguments it answers what is left. A prompt that the model refuses, one
    that is too long, say, has an `"error"` in place of an answer.

    Beside the output lies a file `*.job` that says what the answers are of.
    With another model, other prompts or other settings, answers are not gone
    on with.

    Args:
        lm: A `CausalLM` with a preprocessor.
        input: Path of a file of JSON lines in UTF-8, objects with a
            `"prompt"`, or with `"messages"`, a list of objects with a
            `"role"` and a `"content"`, and optionally an `"id"`, a string or
            an integer, and a `"max_new_tokens"` and a `"seed"` of its own. All
            are looked through before anything is generated.
        output: Path of the file of answers.
        max_new_tokens: int. How many tokens an answer has at most.
        batch_size: int. How many prompts to answer at once.
        stop_token_ids: As for `CausalLM.generate_many()`.
        strip_prompt: bool. Whether answers are without their prompts.
        chat_prompt: Optional function from a list of messages to a text or
            token ids for the model. A `"prompt"` is the one message of a user.
            Without it, prompts are passed on as they are, and messages refused.
        overwrite: bool. Whether to begin anew, whatever is in `output`.
        progress: bool. Whether to show a progress bar on standard error.
            `None` shows it on a terminal.
        **options: Further arguments of `CausalLM.generate_many()`.

    Returns:
        A `Summary`.

    Raises:
        ValueError: If lines of `input` are no prompts, if `output` holds
            something else or answers of another job, or if the model can
            answer none of the first prompts.
        OSError: If a file cannot be read or written, or another job writes to
            `output`.
        KeyboardInterrupt: With words on how far it came.

    Example:
    ```python
    with open("prompts.jsonl", "w") as file:
        file.write('{"prompt": "the fox"}\n{"prompt": "the dog"}\n')
    keras_nlp_cache.batch_job.run(
        lm, "prompts.jsonl", "answers.jsonl", max_new_tokens=8
    )
    ```
    """
    options = settings(max_new_tokens, stop_token_ids, strip_prompt, options)
    with open_job(input, output, chat_prompt, options, overwrite) as job:
        model = answering.identity(lm)
        asked = {}

        def texts():
            for i, prompt in enumerate(job.unfinished()):
                asked[i] = prompt
                yield prompt.asked

        answers = answering.answer_each(
            lm, texts(), batch_size=batch_size, **options
        )
        job.write_all(((asked.pop(i), x, model) for i, x in answers), progress)
    return job.summary()


def settings(max_new_tokens, stop_token_ids, strip_prompt, options):
    """The arguments of `generate_many()` that answers depend on, checked."""
    if not prompt_checks.is_int(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(
            "Expected `max_new_tokens` to be an integer of 1 or more. "
            f"Received: {max_new_tokens!r}."
        )
    return {
        "max_new_tokens": int(max_new_tokens),
        "stop_token_ids": prompt_checks.stop_tokens(stop_token_ids),
        "strip_prompt": bool(strip_prompt),
        **options,
    }


@contextlib.contextmanager
def open_job(input, output, chat_prompt, options, overwrite):
    """Opens both files, and says how far it came if it is cut short.

    Args:
        input: As for `run()`.
        output: As for `run()`.
        chat_prompt: As for `run()`.
        options: What `settings()` returns.
        overwrite: As for `run()`.

    Yields:
        A `Job`.
    """
    if os.path.exists(output) and os.path.samefile(input, output):
        raise ValueError(
            "Expected answers to go to another file than that of the prompts. "
            f"Received: {os.fspath(output)!r} for both."
        )
    with (
        PromptsFile(input, chat_prompt) as prompts,
        AnswersFile(output, overwrite) as answers,
    ):
        kept = {**options, "chat_prompt": chat_prompt is not None}
        answers.begin(prompts.digest, answering.plain(kept))
        job = Job(prompts, answers)
        try:
            yield job
        except KeyboardInterrupt as e:
            raise KeyboardInterrupt(job.how_far()) from e
        except OSError as e:
            words = f"{e.strerror or e}; {job.how_far()}"
            raise OSError(e.errno or errno.EIO, words) from e


class Job:
    """A job that is under way.

    Args:
        prompts: A `PromptsFile`.
        answers: An `AnswersFile`.
    """

    def __init__(self, prompts, answers):
        self.prompts, self.answers = prompts, answers
        self._earlier, self._errors = len(answers.done), 0

    def unfinished(self):
        """Yields each `Prompt` that has no answer."""
        for prompt in self.prompts:
            if prompt.id not in self.answers.done:
                yield prompt

    def write_all(self, answered, progress=None):
        """Writes answers as they come.

        Args:
            answered: Iterable of `(prompt, answer, model)`: the `Prompt`, a
                dictionary of what to write, and the `identity()` of the model.
            progress: As for `run()`.
        """
        bar = tqdm.tqdm(
            total=self.prompts.count,
            initial=self._earlier,
            unit=" prompts",
            disable=None if progress is None else not progress,
            file=sys.stderr,
        )
        with bar:
            for prompt, answer, model in self._with_an_answer(answered):
                self.answers.claim(model)
                self.answers.write(
                    {"id": prompt.id, "index": prompt.index, **answer}
                )
                self._errors += "error" in answer
                bar.update()

    def _with_an_answer(self, answered):
        """Keeps errors back until something is answered.

        If nothing is, it is not the prompts that are wrong.
        """
        refused, any_answer = [], bool(self.answers.done)
        for item in answered:
            _, answer, _ = item
            any_answer = any_answer or "error" not in answer
            refused.append(item)
            if any_answer:
                yield from refused
                refused = []
            elif len(refused) == _MOST_REFUSED:
                break
        if refused:
            _, answer, _ = refused[0]
            raise ValueError(
                f"Expected prompts that the model can answer. Received: "
                f"{len(refused)} prompts that it refuses. Of the first it "
                f"says: {answer['error']}"
            )

    def how_far(self):
        return (
            f"{len(self.answers.done)} of {self.prompts.count} prompts are "
            f"done, in {os.fspath(self.answers.path)!r}; started again, the "
            "job goes on from there"
        )

    def summary(self):
        return Summary(self.prompts.count, self._earlier, self._errors)
