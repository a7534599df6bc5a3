"""Writes the tokenizer in a GGUF file as files that Keras and others read."""

import json

# What GGUF files say of a token.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6


def write(folder, model):
    """Writes the tokenizer of a model.

    Args:
        folder: Path.
        model: An `architectures.Model`.

    Raises:
        ValueError: If this package has no such tokenizer for that model.
    """
    kind = model.field("tokenizer.ggml.model")
    kinds = _KINDS[model.architecture]
    if kind not in kinds:
        model.refuse(
            f"a tokenizer of one of the kinds {kinds}, as "
            f"{model.architecture} models here have",
            repr(kind),
            "Choose another",
        )
    tokens = model.field("tokenizer.ggml.tokens", [])
    size = model.config["vocab_size"]
    if len(tokens) != size:
        model.refuse(f"{size} tokens", len(tokens), "Convert it again")
    types = model.field("tokenizer.ggml.token_type", [1] * size)
    special = {
        name: model.field(f"tokenizer.ggml.{key}_token_id")
        for name, key in _SPECIAL.items()
    }
    for name, token in special.items():
        if token is not None and not token < size:
            model.refuse(f"a {name} below {size}", token, "Convert it again")
    if special["eos_token"] is None:
        model.refuse("an end token", "none", "Convert it again")
    if kind == "llama":
        _write_sentence_piece(folder, model, tokens, types, special)
    else:
        _write_byte_pair(folder, model, tokens, types)
    names = {
        name: tokens[token]
        for name, token in special.items()
        if token is not None
    }
    config = {
        "tokenizer_class": kinds[kind],
        # Upstream asks for one, and a text may begin with its predecessor's.
        "bos_token": names["eos_token"],
        **names,
        "add_bos_token": model.field(
            "tokenizer.ggml.add_bos_token", kind == "llama"
        ),
        "chat_template": model.field("tokenizer.chat_template"),
    }
    config = {name: x for name, x in config.items() if x is not None}
    _write_json(folder / "tokenizer_config.json", config)


def _write_byte_pair(folder, model, tokens, types):
    import tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = model.field("tokenizer.ggml.merges", [])
    try:
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab=vocabulary,
                merges=[tuple(merge.split(" ")) for merge in merges],
            )
        )
    except Exception as e:  # The library raises nothing more specific.
        model.refuse("merges of its tokens", e, "Convert it again")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    for kind, add in (
        (_CONTROL, tokenizer.add_special_tokens),
        (_USER_DEFINED, tokenizer.add_tokens),
    ):
        add(
            [
                tokenizers.AddedToken(token, normalized=False)
                for token, x in zip(tokens, types)
                if x == kind
            ]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    if model.architecture == "gpt2":
        # What upstream reads for GPT-2.
        _write_json(folder / "vocab.json", vocabulary)
        text = "".join(f"{merge}\n" for merge in merges)
        (folder / "merges.txt").write_text(text, encoding="utf-8")


def _write_sentence_piece(folder, model, tokens, types, special):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    trainer = proto.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = _BYTE in types
    for key in ("unk", "bos", "eos", "pad"):
        token = special[f"{key}_token"]
        setattr(trainer, f"{key}_id", -1 if token is None else token)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = model.field(
        "tokenizer.ggml.add_space_prefix", model.architecture == "llama"
    )
    proto.normalizer_spec.remove_extra_whitespaces = False
    scores = model.field("tokenizer.ggml.scores", [0.0] * len(tokens))
    named = set(special.values())
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types)):
        if i == special["unk_token"]:
            # Files of Gemma take it for one control token more.
            kind = _UNKNOWN
        if kind == _CONTROL and i not in named:
            # Chat templates spell them out, and they have to be found.
            kind = _USER_DEFINED
        if kind == _USER_DEFINED and not token.strip(" "):
            # Gemma's runs of spaces lost their spelling.
            token = "\u2581" * len(token)
        proto.pieces.add(piece=token, score=score, type=kind)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def _write_json(path, content):
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
# For each architecture, by what GGUF calls a kind of tokenizer: what reads it.
_KINDS = {
    "gpt2": {"gpt2": "GPT2Tokenizer"},
    "gemma": {"llama": "GemmaTokenizer"},
    "gemma2": {"llama": "GemmaTokenizer"},
    "gemma3": {"llama": "GemmaTokenizer"},
    "llama": {"gpt2": "PreTrainedTokenizerFast", "llama": "LlamaTokenizer"},
}
