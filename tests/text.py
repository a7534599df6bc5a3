"""Tokenizers small enough to be made on the spot."""

import functools
import io

import sentencepiece

CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "airplane at airport",
    "what is the capital of france",
    "the capital of france is paris",
)


# Which families have the tokenizer of which others.
_SAME = {
    "Moonshine": "Llama",
    "T5Gemma2": "T5Gemma",
    "Qwen3_5Moe": "Qwen3_5",
}


def tokenizer_arguments(prefix):
    """Constructor arguments of the tokenizer of a model family."""
    if prefix in ("Bart", "BLIP2", "GPT2", "Llama3", "Qwen3_5", "Qwen3_5Moe"):
        return _byte_pair(prefix)
    return {"proto": _sentence_piece(_SAME.get(prefix, prefix))}


def _byte_pair(prefix):
    letters = sorted(set("".join(CORPUS)) - {" "})
    merges = ["Ġ t", "h e", "Ġt he", "a i", "ai r", "Ġ a", "Ġa t", "p o"]
    pieces = ["!", "Ġ", *letters, *(x.replace(" ", "") for x in merges)]
    special = {
        # What ends a text is a new line.
        "BLIP2": ["</s>", "Ċ", "<pad>", "<image>"],
        "Bart": ["<s>", "<pad>", "</s>", "<mask>"],
        "GPT2": ["<|endoftext|>"],
        "Llama3": [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|eot_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
        ],
        "Qwen3_5": [
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|image_pad|>",
            "<|video_pad|>",
        ],
    }[_SAME.get(prefix, prefix)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *special])}
    return {"vocabulary": vocabulary, "merges": merges}


@functools.cache
def _sentence_piece(prefix):
    model = io.BytesIO()
    gemma = dict(
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
    )
    special = {
        "Gemma": gemma,
        "T5": dict(
            pad_id=0,
            eos_id=1,
            bos_id=-1,
            unk_id=2,
            pad_piece="<pad>",
            eos_piece="</s>",
            unk_piece="<unk>",
        ),
        "T5Gemma": gemma,
        "PaliGemma": gemma,
        "Gemma3": dict(
            gemma,
            user_defined_symbols=[
                "<img>",
                "<start_of_image>",
                "<end_of_image>",
                "<end_of_turn>",
                "\n",
            ],
        ),
        "Gemma4": dict(
            gemma,
            user_defined_symbols=[
                "<|image>",
                "<|image|>",
                "<image|>",
                "<|video|>",
                "<|audio>",
                "<|audio|>",
                "<audio|>",
                "<turn|>",
                "\n",
            ],
        ),
        "Gemma3n": dict(
            gemma,
            user_defined_symbols=[
                "<image_soft_token>",
                "<audio_soft_token>",
                "<start_of_image>",
                "<end_of_image>",
                "<start_of_audio>",
                "<end_of_audio>",
                "<start_of_turn>",
                "<end_of_turn>",
                "<mask>",
                "[multimodal]",
            ],
        ),
        "Llama": dict(
            unk_id=0,
            bos_id=1,
            eos_id=2,
            unk_piece="<unk>",
            bos_piece="<s>",
            eos_piece="</s>",
        ),
    }[prefix]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
        **special,
    )
    return model.getvalue()
