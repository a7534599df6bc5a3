"""What works with which family on which backend, from tests that ran.

Prints Markdown tables, one of what reads text alone and one of what reads more,
from the results of one run per backend:

    KERAS_BACKEND=jax pytest --junitxml=jax.xml
    python -m tests.compatibility jax.xml tensorflow.xml torch.xml
"""

import argparse
import pathlib
import re
import xml.etree.ElementTree

import tabulate

# Feature: the tests that show it, as patterns of `file::test`.
FEATURES = {
    "a cache in the graph": "test_cached_decoding::",
    "`generate()` as upstream: greedy, top-k, top-p, random, beam, "
    "contrastive": "test_generate::test_tokens",
    "empty prompts, `truncation`, `max_length`": "test_prompts::",
    "samplers of users": "test_generate::test_samplers_of_users",
    "an index for each row": "test_rows::",
    "many prompts of any length": "test_many::",
    "what transformers and OpenAI call its options": "test_options::",
    "a draft model, guesses from the prompt": "test_speculative::",
    "cache policies": "test_policies::",
    "chat": "test_chat::",
    "`stream()`, sessions": "test_(streaming|sessions)::",
    "threads": "test_threads::",
    "`fit()`, `evaluate()`, `predict()`": "test_inputs::test_training",
    "`keras.RematScope`": "test_training::",
    "`score()`": "test_score::",
    "LoRA": "test_quantization::test_adapters",
    **{
        f'`quantize("{mode}")`': f"test_quantization::test_as_upstream.*{mode}"
        for mode in ("int8", "int4", "float8", "gptq", "awq")
    },
    "bfloat16, float16, mixed": "test_cached_decoding::test_reduced_precision",
    "a dtype for each layer": "test_quantization::test_a_policy",
    "files and presets, both ways": "test_(weights_and_files|subclasses)::",
    "pickling": "test_pickling::",
    "`export()` of a backbone": "test_export::",
    "`StepModel.export()`": "test_step_model::test_same_tokens",
    # The real Gemma 3 is there for whoever takes its terms.
    "GGUF files": "test_gguf_preset::(?!test_gemma_3_270m)",
    "GGUF files, kept as they are stored": "test_kept_quantized::",
    "surgery": "test_surgery",
    "surgery inside of blocks": "test_surgery_parts::",
    "surgery of quantized models": "test_surgery_quantized::",
    "layers of another model": "test_merging::",
    "control vectors": (
        "test_(control_vectors|partial_steering|vector_files)::"
    ),
    "several devices": "test_distribution::",
    "in the scope of a `tf.distribute` strategy": "test_strategies::",
}
FAMILIES = {
    "GPT-2, OPT": r"(?i)gpt2|opt",
    "Llama 1 to 3, Mistral": r"(?i)llama3?|mistral",
    "Gemma 1 to 3": r"(?i)gemma[23]?(_27b)?",
    "Gemma 3n, 4": r"(?i)gemma(3n|4)",
    "Qwen 2, 3": r"(?i)qwen3?(_window)?",
    "Phi-3, SmolLM3": r"(?i)phi3(_long)?|smollm3",
    "BLOOM, Falcon, GPT-NeoX": r"(?i)bloom|falcon|gpt_?neo_?x",
    "experts: Mixtral, Qwen MoE, gpt-oss": (
        r"(?i)mixtral|qwen3?_?moe|gpt_?oss(_even)?"
    ),
    "states: Qwen 3.5, RWKV-7": r"qwen3_5(_moe)?|rwkv7",
}
# Of models that read more than text.
FEATURES_OF_READERS = {
    "a cache, cut at the encoder or the image; `generate()`; edits": (
        "test_(encoder_decoder|images|images_in_grids|sound)::"
    ),
    "as transformers computes it": "test_transformers_parity::",
    "files and presets, both ways": (
        "test_(weights_and_files|sound::test_presets)"
    ),
    "many prompts, with all options": "test_image_sessions::test_many",
    "sessions": "test_(source_sessions|image_sessions|images)::.*session",
}
READERS = {
    "BART, T5": "bart|t5",
    "T5Gemma 1, 2": "t5gemma2?",
    "Moonshine": "moonshine",
    "PaliGemma": "pali_gemma",
    "BLIP-2": "blip2(_t5)?",
    "images in Gemma 3, 3n, 4": "gemma(3|3n|4)_vision",
    "images in Qwen 3.5": "qwen3_5(_moe)?_vision",
    "sound in Gemma 4": "gemma4_sound(_and_images)?",
}
# Where what others show says nothing: GGUF files are read for these alone.
_OF_GGUF = ("GPT-2, OPT", "Llama 1 to 3, Mistral", "Gemma 1 to 3")
OF_SOME = {
    "GGUF files": _OF_GGUF,
    "GGUF files, kept as they are stored": _OF_GGUF,
    "many prompts, with all options": (
        "images in Gemma 3, 3n, 4",
        "images in Qwen 3.5",
    ),
    # Sound is refused in them.
    "sessions": [x for x in READERS if not x.startswith("sound")],
}
BACKENDS = {"jax": "J", "tensorflow": "T", "torch": "P"}


def outcomes(path):
    """Pairs of `file::test[parameters]` and what became of it."""
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        file = case.get("classname").removeprefix("tests.")
        kinds = {child.tag for child in case}
        outcome = "passed"
        if kinds & {"failure", "error"}:
            outcome = "failed"
        elif "skipped" in kinds:
            outcome = "skipped"
        yield f"{file}::{case.get('name')}", outcome


def cell(results, feature, family, features=FEATURES, families=FAMILIES):
    """The letters of the backends on which all tests of a feature passed.

    In lower case where some were skipped. Tests that are not repeated for each
    family count for all, as do those that families take turns in, for a family
    that had none, or none that ran.
    """
    if family not in OF_SOME.get(feature, families):
        return "---"
    letters = ""
    for backend, tests in results.items():
        found, of_others = set(), set()
        for name, outcome in tests:
            if not re.match(features[feature], name):
                continue
            parameters = re.split(r"[\[\]-]", name)
            named = [
                x
                for x, pattern in families.items()
                if any(re.fullmatch(pattern, y) for y in parameters)
            ]
            if not named or family in named:
                found.add(outcome)
            else:
                of_others.add(outcome)
        if found <= {"skipped"}:
            found |= of_others
        letter = BACKENDS[backend]
        if "passed" in found and "failed" not in found:
            letters += letter.lower() if "skipped" in found else letter
        else:
            letters += "-"
    return letters


def table(results, features=FEATURES, families=FAMILIES):
    """The Markdown of a table.

    Args:
        results: Dictionary from backends to lists of `outcomes()`.
        features: Dictionary from features to the tests that show them.
        families: Dictionary from families to what tests call them.
    """
    rows = [
        [
            feature,
            *(cell(results, feature, x, features, families) for x in families),
        ]
        for feature in features
    ]
    return tabulate.tabulate(rows, ["", *families], tablefmt="github")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for backend in BACKENDS:
        parser.add_argument(
            backend, type=pathlib.Path, metavar=f"{backend}.xml"
        )
    args = parser.parse_args()
    results = {
        backend: list(outcomes(getattr(args, backend))) for backend in BACKENDS
    }
    print(table(results), end="\n\n")
    print(table(results, FEATURES_OF_READERS, READERS))


if __name__ == "__main__":
    main()
