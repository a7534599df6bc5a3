"""What `keras-nlp-cache steer` trains on and how it shows what came of it."""

# Two near synonyms each, for what they share to stand out.
POSITIVE = ("happy", "joyful")
NEGATIVE = ("sad", "miserable")

_INSTRUCTION = "Act as if you're extremely {}."
# How an answer may begin. The hidden state after its last token is the one
# that is compared, so what varies here is averaged out of the direction.
_BEGINNINGS = (
    "I",
    "I feel",
    "Today",
    "Today was",
    "The weather",
    "My friends",
    "When I look at",
    "Life is",
    "People",
    "The best thing",
    "This morning",
    "Well,",
    "Let me tell you",
    "I think that",
    "It is",
    "Yesterday I",
)
# Columns narrower than this break most lines after two or three words.
_MIN_COLUMN_WIDTH = 20


def train(lm, positive, negative, chat_prompt):
    """Trains a control vector on a contrast of personas.

    Args:
        lm: A `CausalLM` with a preprocessor.
        positive: List of strings, such as "happy".
        negative: List of as many strings.
        chat_prompt: Function that formats an instruction as the model expects
            it, up to where its answer begins.

    Returns:
        A `ControlVector`.
    """
    from keras_nlp_cache.surgery.control_vector import ControlVector

    return ControlVector.train(
        lm, _prompts(positive, chat_prompt), _prompts(negative, chat_prompt)
    )


def chat_prompt(lm, question):
    """Puts a question into the chat template of a model, if it has one.

    Args:
        lm: A `CausalLM` with a preprocessor.
        question: str.

    Returns:
        str, without the start token that the preprocessor will put first.
    """
    if lm.chat_template is None:
        return question
    prompt = lm.chat_template.render([{"role": "user", "content": question}])
    tokenizer, start_token = lm.preprocessor.tokenizer, None
    if getattr(lm.preprocessor, "add_start_token", False):
        start_token = tokenizer.id_to_token(tokenizer.start_token_id)
    return prompt.removeprefix(start_token or "")


def _prompts(personas, chat_prompt):
    """Prompts that have a model begin to answer as each of some personas."""
    prompts = []
    for persona in personas:
        instruction = _INSTRUCTION.format(persona)
        prompt = chat_prompt(instruction)
        if prompt == instruction:  # No template: text that simply goes on.
            prompt += " "
        prompts += [prompt + beginning for beginning in _BEGINNINGS]
    return prompts


def show(answers):
    """Prints answers side by side, or one by one in a narrow terminal.

    Args:
        answers: Dictionary from headings to answers.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    # Captured, since rich has its own way to end a process whose output
    # nobody reads any more.
    with console.capture() as capture:
        if console.width < _MIN_COLUMN_WIDTH * len(answers):
            for heading, answer in answers.items():
                console.print(Text(heading, style="bold"))
                console.print(Text(answer), end="\n\n")
        else:
            table = Table(expand=True)
            for heading in answers:
                table.add_column(heading, ratio=1)
            # `Text`, for an answer may hold what rich reads as its markup.
            table.add_row(*(Text(answer) for answer in answers.values()))
            console.print(table)
    print(capture.get(), end="", flush=True)
