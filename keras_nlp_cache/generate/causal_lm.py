"""The task that generates through the backbone's graph."""

import contextlib
import contextvars
import inspect
import threading

import keras
import keras_hub
from keras import ops
from keras import tree
from keras.src.models.functional import Functional
from keras_hub.src.utils.pipeline_model import PipelineModel
from keras_hub.src.utils.python_utils import classproperty

from keras_nlp_cache import drop_in
from keras_nlp_cache.cache import policies
from keras_nlp_cache.cache.access import access
from keras_nlp_cache.cache.access import accessing
from keras_nlp_cache.files.chat_template import ChatTemplate
from keras_nlp_cache.files.preset_loader import dtype_in
from keras_nlp_cache.files.preset_loader import template_of
from keras_nlp_cache.generate import conversation
from keras_nlp_cache.generate import loops
from keras_nlp_cache.generate import prompts
from keras_nlp_cache.generate import reading
from keras_nlp_cache.generate import scoring
from keras_nlp_cache.generate.loops.access import loop_access
from keras_nlp_cache.generate.loops.batch import generate_batch
from keras_nlp_cache.generate.loops.conditions import Conditions
from keras_nlp_cache.generate.loops.sampling import supports
from keras_nlp_cache.generate.many import call as many
from keras_nlp_cache.generate.session import Session
from keras_nlp_cache.graph.backbone import CachedBackbone
from keras_nlp_cache.graph.backbone import without_taps
from keras_nlp_cache.graph.calling import floating_dtype
from keras_nlp_cache.graph.kept_weights import loader_of
from keras_nlp_cache.quantization.quantizing import layer_structure
from keras_nlp_cache.quantization.quantizing import leaving_out
from keras_nlp_cache.quantization.quantizing import quantizing

# Upstream's `generate()` hands prompts on to a function of its own.
_assistant_model = contextvars.ContextVar(
    "keras_nlp_cache_assistant_model", default=None
)

# Threads that generate with one model share its loop.
_making_loop = threading.RLock()


# For the second base see `CachedBackbone`.
class CausalLM(keras_hub.models.CausalLM, Functional):
    """Base of the language modeling tasks that treat a backbone as one call.

    A drop-in replacement for `keras_hub.models.CausalLM`. Where upstream's
    tasks call the layers of their backbone by hand to generate, these call the
    backbone, so whatever was done to its graph shows in what it generates.
    They use nothing of it but its call, its `make_cache()`, and its
    `token_embedding` to turn hidden states into logits.

    Attributes:
        embeddings_name: Name of the layer of the backbone that returns what
            `score()` calls the embeddings.
        has_encoder: bool. Whether its backbone has to have an encoder, or must
            not have one.

    Args:
        backbone: A backbone of this package.
        preprocessor: A `keras_hub.models.CausalLMPreprocessor`, or `None` to
            pass token ids instead of strings.

    Example:
    ```python
    backbone = GPT2Backbone(
        vocabulary_size=100, num_layers=2, num_heads=4, hidden_dim=32,
        intermediate_dim=64, max_sequence_length=32,
    )
    lm = GPT2CausalLM(backbone, preprocessor=None)
    lm.compile(sampler="greedy")
    prompt = {
        "token_ids": np.array([[5, 6, 7, 0, 0, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0, 0, 0, 0, 0]]),
    }
    lm.generate(prompt, stop_token_ids=None)
    ```

    Reference:
        https://github.com/keras-team/keras-hub/issues/1862
    """

    embeddings_name = "token_embedding"
    has_encoder = False
    _chat_template = None

    def __init__(self, *args, **kwargs):
        # In upstream's order, which is not the same for all families.
        given = inspect.signature(super().__init__).bind(*args, **kwargs)
        backbone = given.arguments.get("backbone")
        if not isinstance(backbone, CachedBackbone):
            raise ValueError(
                "Expected `backbone` to be a backbone of "
                "`keras_nlp_cache.models`. Received an instance of "
                f"{type(backbone).__module__}.{type(backbone).__name__}. Build "
                "it with the class of the same name from "
                "`keras_nlp_cache.models`; weights and presets are shared."
            )
        if (backbone.roles.source is not None) != self.has_encoder:
            raise ValueError(
                f"Expected `backbone` to be one with"
                f"{'' if self.has_encoder else 'out'} an encoder, for a "
                f"`{type(self).__name__}`. Received a "
                f"`{type(backbone).__name__}` that takes "
                f"{sorted(backbone.input)}. Another task is for that."
            )
        try:
            with without_taps():
                super().__init__(*args, **kwargs)
        finally:
            # The constructor of `PipelineModel` takes `Functional` from its
            # bases for Keras to put back. Keras sees no need to, since it is
            # among ours, and upstream's tasks would be left without it.
            PipelineModel.__bases__ = (Functional,)

    def run_backbone(self, token_ids, cache, cache_update_index, **inputs):
        """Runs the backbone on some tokens of a sequence.

        Takes the arguments of `call_with_cache()` and further inputs of the
        backbone, and returns its hidden states and cache, without the logits.
        """
        with without_taps():
            return self.backbone(
                {
                    self.backbone.roles.token_ids: token_ids,
                    "cache": cache,
                    "cache_update_index": cache_update_index,
                    # One that is left out may be one that the model has not.
                    **{k: x for k, x in inputs.items() if x is not None},
                }
            )

    def call_with_cache(self, token_ids, cache, cache_update_index, **inputs):
        """Runs the model on some tokens of a sequence.

        Args:
            token_ids: int tensor `(B, T)`.
            cache: A cache from `backbone.make_cache()` or an earlier call. It
                is not modified.
            cache_update_index: int scalar, the slot of the first token.
            **inputs: Further optional inputs of the backbone, or `None`.

        Returns:
            A tuple `(logits, hidden_states, cache)`: logits of shape
            `(B, T, vocabulary_size)`, hidden states of shape
            `(B, T, hidden_dim)`, and the updated cache.

        Raises:
            ValueError: If the cache does not fit the model or the tokens.

        Example:
        ```python
        cache = lm.backbone.make_cache(batch_size=1, max_length=8)
        logits, _, cache = lm.call_with_cache([[5, 6, 7]], cache, 0)
        logits, _, cache = lm.call_with_cache([[8]], cache, 3)
        ```
        """
        hidden_states, cache = self.run_backbone(
            token_ids, cache, cache_update_index, **inputs
        )
        return self._logits(hidden_states), hidden_states, cache

    def read(self, token_ids, cache, cache_update_index, **inputs):
        """Runs what the model is on some tokens, for their cache.

        Takes the arguments of `call_with_cache()`, and returns its hidden
        states and cache. Calls that method if it was overridden.
        """
        if not self.overridden("call_with_cache"):
            return self.run_backbone(
                token_ids, cache, cache_update_index, **inputs
            )
        _, hidden_states, cache = self.call_with_cache(
            token_ids, cache, cache_update_index, **inputs
        )
        return hidden_states, cache

    def read_source(self, token_ids, cache, source):
        """Begins to read a text, with what is not of it.

        Args:
            token_ids: int tensor `(B, S)`, all of the text.
            cache: An empty cache.
            source: Dictionary of further inputs of the backbone. See
                `Roles.of_prefill`.

        Returns:
            The cache.
        """
        return self.read(token_ids[:, :1], cache, 0, **source)[1]

    def read_more_source(self, token_ids, cache, source, start):
        """Does what `read_source()` does, where a text goes on.

        Args:
            token_ids: int tensor `(B, S)`, all of the text.
            cache: A cache of its first tokens.
            source: Dictionary as for `read_source()`, of what follows these.
            start: int scalar. How many they are.

        Returns:
            The cache.
        """
        raise NotImplementedError

    def read_with(self, source):
        """How many tokens need not be read again after `read_source()`.

        Args:
            source: Dictionary, empty if that is not called.
        """
        return 0

    def fitted_source(self, source, length, slots, chunk):
        """What `read_source()` is to read of a text of some length.

        Args:
            source: Dictionary of arrays.
            length: int. How many tokens the text has.
            slots: int. For how many there is a place.
            chunk: int. `read_with()` is to be a multiple of it.

        Returns:
            The dictionary, with arrays.
        """
        return source

    @property
    def source_names(self):
        """Names of what is read of a batch of prompts beside its text."""
        return self.backbone.roles.of_prefill

    def fitted(self, inputs, max_length, truncation):
        """A batch of prompts that are token ids, padded to some length.

        Takes and returns what `reading.fitted()` does.
        """
        masks = self.backbone.roles.masks
        return reading.fitted(inputs, max_length, truncation, masks)

    def overridden(self, *names):
        """Which methods are not those of this package.

        Args:
            *names: Names of methods by which upstream's users say how a model
                generates. With `"make_generate_function"`, counts a
                `generate_function` that was assigned, too.

        Returns:
            A list of those that a subclass or an attribute overrides.
        """
        found = [
            name
            for name in names
            if name in vars(self)
            or not _is_ours(inspect.getattr_static(type(self), name))
        ]
        if "make_generate_function" in names:
            if self.generate_function not in (None, self._generate):
                found.append("generate_function")
        return found

    def _logits(self, hidden_states):
        return access().logits(self.backbone.output_embedding, hidden_states)

    def _build_cache(self, token_ids):
        # Called by upstream's `generate_step()`, which fills the cache here
        # and then decodes with `call_with_cache()`.
        batch_size, max_length = ops.shape(token_ids)
        cache = self.backbone.make_cache(batch_size, max_length)
        return self.read(token_ids, cache, 0)

    def generate_step(self, inputs, stop_token_ids=None):
        """Upstream's method, which `generate()` calls if it is overridden.

        Otherwise it calls it only for samplers with a loop of their own.
        """
        self.refuse_partial_steering()
        self.refuse_states()
        if self.overridden("_build_cache", "call_with_cache"):
            # They may keep the cache.
            return super().generate_step(inputs, stop_token_ids)
        with accessing(loop_access()):
            return super().generate_step(inputs, stop_token_ids)

    def refuse_states(self):
        """Raises a `ValueError` if a token must not be read twice."""
        if self.backbone.has_states:
            raise ValueError(
                "Expected a sampler that picks one token at a time, such as "
                '"greedy", for a model in which layers keep a state. Received: '
                f"{type(self.sampler).__name__}, on a loop that reads padding, "
                "and tokens twice, by which a state would change."
            )

    def refuse_partial_steering(self):
        """Raises a `ValueError` if it matters which tokens are generated."""
        if self.backbone.takes_generated:
            raise ValueError(
                "Expected a sampler that picks one token at a time, such as "
                '"greedy", and no override of `generate_step()`, for a model '
                "that is steered at generated tokens only. Received: "
                f"{type(self.sampler).__name__}, on a loop that does not say "
                "which tokens these are. Apply the control vector to all."
            )

    def compile(self, *args, cache_dtype=None, cache_policy=None, **kwargs):
        """Configures training and generation.

        Upstream's method. `run_eagerly` and `jit_compile` hold for generation
        too. `jit_compile="auto"`, the default, uses XLA on TensorFlow, on a
        CPU as well, and not PyTorch's Inductor, which `True` asks for.

        Args:
            *args: As for `keras_hub.models.CausalLM.compile()`.
            cache_dtype: Optional floating dtype of the keys and values that
                are kept while generating. Defaults to the compute dtype.
                `"bfloat16"` halves the memory of float32.
            cache_policy: Which of them are kept, and how. See
                `CachedBackbone.make_cache()`.
            **kwargs: As for `keras_hub.models.CausalLM.compile()`.

        Raises:
            ValueError: If `cache_dtype` is not floating, or there is no such
                sampler or no such policy, or none for this model.
        """
        if cache_dtype is not None:
            cache_dtype = floating_dtype("cache_dtype", cache_dtype)
        policy = policies.get(cache_policy)
        policy.check(self.backbone)
        with loops.outside_of_strategies():
            # For its seeds to be where the cache is.
            sampler = keras_hub.samplers.get(kwargs.pop("sampler", "top_k"))
        if not callable(sampler):
            raise ValueError(
                "Expected `sampler` to be a `keras_hub.samplers.Sampler` or "
                f'the name of one, such as "top_k". Received: {sampler!r}.'
            )
        super().compile(*args, sampler=sampler, **kwargs)
        self.cache_dtype, self.cache_policy = cache_dtype, policy
        self._jit_compile_option = kwargs.get("jit_compile", "auto")
        self._jit_compile_resolved = self.jit_compile
        self._loop = self._compiled_step = None

    @property
    def generation_jit_compile(self):
        """What `jit_compile` is for generation, `"auto"` if nobody said."""
        if self.jit_compile != self._jit_compile_resolved:
            return self.jit_compile  # Assigned since.
        return self._jit_compile_option

    @property
    def generation_loop(self):
        """The `generate.loops.Loop` that the model generates with.

        Kept, with what it compiled, while the model has the same variables,
        whose values may change, and the same sampler, called and compiled as
        it was.
        """
        with _making_loop:
            CausalLM.make_generate_function(self)
            if self._loop is None or not self._loop.is_current():
                self._loop = loops.make_loop(self)
            return self._loop

    def make_generate_function(self):
        """Returns the function that generates from a batch of tokens.

        As upstream's, it is kept as `generate_function`. Assign `None` to that
        to have everything compiled anew, or a function to have it called.
        """
        with _making_loop:
            if self.generate_function is None:
                self._loop = self._compiled_step = None
                self.generate_function = self._generate
            return self.generate_function

    def _generate(self, inputs, stop_token_ids=None):
        stops = prompts.stop_tokens(stop_token_ids)
        own_step = self.overridden("generate_step")
        if not own_step:  # What that takes is its business.
            prompts.check_tokens(inputs, self.backbone)
            if self._has_loop():
                return generate_batch(
                    self, inputs, stops, _assistant_model.get()
                )
        if not (own_step or callable(self.sampler)):
            raise ValueError(
                "Expected `sampler` to be a `keras_hub.samplers.Sampler`. "
                f"Received: {self.sampler!r}. Assign one, or call "
                "`compile(sampler=...)`."
            )
        return self._compiled_generate_step()(
            inputs, stop_token_ids=stops or None
        )

    def _has_loop(self):
        """Whether what generates is a loop of ours, and no step of a user's."""
        return supports(self.sampler) and not self.overridden(
            "generate_step", "_build_cache"
        )

    def _compiled_generate_step(self):
        """What upstream makes of `generate_step()`, while it is current."""
        with _making_loop:
            made_for = Conditions(
                self, "call_with_cache", "_build_cache", "generate_step"
            )
            if (
                self._compiled_step is None
                or self._compiled_step[0] != made_for
            ):
                self.generate_function = None
                step = super().make_generate_function()
                self._compiled_step = made_for, step
                self.generate_function = self._generate
            return self._compiled_step[1]

    def _normalize_generate_outputs(self, outputs, input_is_scalar):
        # Upstream concatenates, which JAX compiles for every new length, even
        # if there is one batch.
        if len(outputs) == 1 and isinstance(outputs[0], dict):
            if not input_is_scalar:
                return tree.map_structure(ops.convert_to_numpy, outputs[0])
        return super()._normalize_generate_outputs(outputs, input_is_scalar)

    def generate(
        self,
        inputs,
        max_length=None,
        stop_token_ids="auto",
        strip_prompt=False,
        assistant_model=None,
        truncation="error",
        max_new_tokens=None,
        batch_size=None,
        prefix=None,
        seed=None,
        num_return_sequences=1,
        prompt_lookup_num_tokens=None,
        return_dict=False,
        progress=None,
        **options,
    ):
        """Generates text after a prompt.

        Upstream's method, with its arguments and its results. In addition it
        refuses prompts that upstream would cut or continue from nothing, and
        takes further arguments, which may be combined.

        Each prompt's text is what it is alone, whatever is generated beside
        it. Samplers draw for each from a stream of its own: for the first as
        upstream would for that prompt alone, for the others as with other
        seeds.

        Args:
            inputs: As for `keras_hub.models.CausalLM.generate()`. An empty
                string is continued from the start token that the preprocessor
                adds. With one of the further arguments, any iterable of strings
                or of lists of token ids, or of dictionaries with one of these
                as `prompt` and, if wanted, a `max_new_tokens` and a `seed` of
                its own, and a `stream`, an int that says which of the random
                numbers of a seed it draws, by default its place among the
                prompts.
            max_length: As for `keras_hub.models.CausalLM.generate()`. Without a
                preprocessor, what token ids are padded to.
            stop_token_ids: As for `keras_hub.models.CausalLM.generate()`, or
                any collection of ints.
            strip_prompt: As for `keras_hub.models.CausalLM.generate()`.
            assistant_model: Optional smaller `CausalLM` of this package with
                the same vocabulary, for speculative decoding: it guesses, and
                this model checks several guesses at once. What is generated
                has the distribution that it has without; with the greedy
                sampler it is the same. Five tokens are guessed at a time,
                unless the model was compiled with a
                `keras_hub.samplers.SpeculativeSampler` that says otherwise.
            truncation: What becomes of a prompt of more than `max_length`
                tokens: `"error"`, or what of it fills them, `"left"` for its
                last tokens after the start token or `"right"` for its first.
            max_new_tokens: Optional int. How many tokens to generate for each
                prompt at most. Prompts may then be of any length.
            batch_size: Optional int. How many texts to generate at a time, the
                others wait. Defaults to 16.
            prefix: Optional string or token ids, what every prompt begins with.
                It is read once, as is whatever else a prompt has in common with
                the one before it.
            seed: Optional int, what the sampler would be made with.
            num_return_sequences: int. How many texts to generate for each
                prompt. They come one after the other, in a list.
            prompt_lookup_num_tokens: Optional int. Guess that many tokens from
                what followed the same words earlier in the text, for the model
                to check at once, as with `assistant_model`.
            return_dict: bool. Whether to return a dictionary for each text,
                with `text`, the generated `token_ids`, `prompt_tokens`, a
                `finish_reason` of `"stop"` or `"length"`, and `logprobs` if
                they are asked for.
            progress: bool. Whether to show a bar. By default it is shown on a
                terminal, for several prompts, if they take a while.
            **options: What `generate.options.options.Options` takes:
                `repetition_penalty`, `presence_penalty`, `frequency_penalty`,
                `min_p`, `logit_bias`, `bad_words`, `logits_processor`,
                `stop_strings`, `return_logprobs`.

        Raises:
            ValueError: If prompts have no tokens, or more than `max_length`,
                and are not to be cut; if one needs more positions than the
                model learned, or holds ids that are not in its vocabulary; if
                an argument is not what it should be; or if the assistant does
                not fit the model or its sampler.
            TypeError: If there is no argument or option of some name.

        Example:
        ```python
        draft = keras_nlp_cache.surgery.remove(lm, 1)
        lm.generate("the fox", max_length=16, assistant_model=draft)
        lm.generate(["the fox", "a dog"], max_new_tokens=8, stop_strings=".")
        ```

        Reference:
            Leviathan et al., 2022, https://arxiv.org/abs/2211.17192
        """
        prompts.check_max_length(max_length)
        stop_token_ids = prompts.stop_tokens(stop_token_ids)
        reading.check_truncation(truncation)
        prompts.check_assistant(self, assistant_model)
        further = dict(
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            prefix=prefix,
            seed=seed,
            num_return_sequences=num_return_sequences,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            return_dict=return_dict,
            options=options,
        )
        if many.is_asked_for(inputs, **further):
            return many.generate(
                self,
                inputs,
                max_length=max_length,
                stop_token_ids=stop_token_ids,
                strip_prompt=strip_prompt,
                truncation=truncation,
                assistant=assistant_model,
                progress=progress,
                **further,
            )
        token = _assistant_model.set(assistant_model)
        try:
            # Upstream's, with a say in how prompts are read. Not all know that
            # prompts can be stripped.
            generate = super().generate.__func__
            strip = {"strip_prompt": strip_prompt}
            knows = "strip_prompt" in inspect.signature(generate).parameters
            call = reading.Call(
                self, max_length, truncation, **({} if knows else strip)
            )
            scope = contextlib.nullcontext()
            if self._has_loop() and not self.overridden(
                "make_generate_function"
            ):
                scope = call.with_whole_prompts()
            with scope:
                return generate(
                    call,
                    inputs,
                    max_length=max_length,
                    stop_token_ids=stop_token_ids,
                    **(strip if knows else {}),
                )
        finally:
            _assistant_model.reset(token)

    def generate_many(
        self,
        prompts,
        max_new_tokens=256,
        max_length=None,
        batch_size=None,
        stop_token_ids="auto",
        strip_prompt=False,
        truncation="error",
        prefix=None,
        seed=None,
        num_return_sequences=1,
        return_dict=False,
        progress=None,
        **options,
    ):
        """Generates text after many prompts, and yields each when it ends.

        A text that ends gives its place to the next prompt, of which few are
        asked for ahead.

        Args:
            prompts: Iterable of prompts, as `generate()` takes them with
                `max_new_tokens`. Where images stand in the text, a prompt may
                be a dictionary of `prompt` and `images`, a list of arrays
                `(height, width, 3)`, too.
            max_new_tokens: int. How many tokens to generate for each prompt at
                most.
            max_length: Optional int. How many tokens texts have at most,
                prompts included. What is needed to keep them all has a size
                then from the start.
            batch_size: Optional int. How many texts to generate at a time.
                Defaults to 16.
            stop_token_ids: As for `generate()`, like all that follow.
            strip_prompt: bool.
            truncation: str.
            prefix: Optional.
            seed: Optional int.
            num_return_sequences: int.
            return_dict: bool.
            progress: bool.
            **options: See `generate()`.

        Yields:
            `(index, text)`, in the order in which texts end. Prompts are
            counted as they come, from 0; of several texts for a prompt, each
            counts.

        Raises:
            ValueError: As `generate()`.

        Example:
        ```python
        for index, text in lm.generate_many(["the fox", "a dog"], 8):
            print(index, text)
        ```
        """
        return many.generate_many(
            self,
            prompts,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            batch_size=batch_size,
            stop_token_ids=stop_token_ids,
            strip_prompt=strip_prompt,
            truncation=truncation,
            prefix=prefix,
            seed=seed,
            num_return_sequences=num_return_sequences,
            return_dict=return_dict,
            progress=progress,
            options=options,
        )

    # Whether images stand in a text, where a later turn may have some, too.
    sees_in_turns = False

    def see(self, text, images):
        """What a turn of a session with images is made of.

        Args:
            text: str.
            images: List of arrays `(height, width, 3)`.

        Returns:
            `(token_ids, seen)`: int32 array `(T,)`, as a text of its own, and
            `SessionImages` of it.

        Raises:
            ValueError: If the model does not read images turn by turn, or
                those do not fit the text.
        """
        raise ValueError(
            "Expected no `images` for a model that reads text alone. Received "
            f"{len(images)} of them, for a `{type(self).__name__}`."
        )

    def turn_end_id(self):
        """The token at which upstream's `generate()` stops, beside the end.

        Returns:
            An int, or `None` if there is no such token.
        """
        return getattr(self.preprocessor.tokenizer, "end_token2_id", None)

    def stream(
        self,
        prompt,
        max_new_tokens=256,
        stop_token_ids="auto",
        truncation="error",
        **options,
    ):
        """Generates text after a prompt, and yields it as it is produced.

        Args:
            prompt: str, as for `generate()`.
            max_new_tokens: int. Stop after that many tokens.
            stop_token_ids: As for `generate()`.
            truncation: As for `Session.send()`.
            **options: As for `Session.send()`, with its `images`.

        Returns:
            An iterator with one string for each token, which may be left
            early. See `Session.stream()`.

        Raises:
            ValueError: If the model has no preprocessor, the sampler has a
                loop of its own (beam search, say), or for `Session.stream()`'s
                reasons.

        Example:
        ```python
        for piece in lm.stream("the fox", max_new_tokens=8):
            print(piece, end="", flush=True)
        ```
        """
        return Session(self).stream(
            prompt, max_new_tokens, stop_token_ids, truncation, **options
        )

    @property
    def chat_template(self):
        """How the model expects conversations, `None` if nobody says.

        A `ChatTemplate`, which presets carry. Assign one, a string in Jinja, or
        `None`. `save_to_preset()` keeps it.
        """
        return self._chat_template

    @chat_template.setter
    def chat_template(self, template):
        self._chat_template = conversation.template_for(
            template,
            getattr(self.preprocessor, "tokenizer", None),
            self._chat_template,
        )

    def chat(self, messages, max_new_tokens=256, **options):
        """Answers a conversation in the form that the model was trained on.

        Args:
            messages: List of dictionaries with `"role"` and `"content"`. Or a
                string, what a user says.
            max_new_tokens: int. Stop after that many tokens.
            **options: As for `Session.chat()`.

        Returns:
            str, the answer, without tokens of the template.

        Raises:
            ValueError: If the model has no chat template or no preprocessor, or
                for `Session.chat()`'s reasons.

        Example:
        ```python
        lm.chat_template = (
            "{% for m in messages %}{{ m.content }} {% endfor %}"
        )
        lm.chat([{"role": "user", "content": "the fox"}], max_new_tokens=4)
        ```
        """
        return Session(self).chat(messages, max_new_tokens, **options)

    def stream_chat(self, messages, max_new_tokens=256, **options):
        """Does what `chat()` does, and yields the answer as it is produced.

        Returns:
            An iterator as that of `stream()`.
        """
        return Session(self).stream_chat(messages, max_new_tokens, **options)

    def start_session(self, path=None):
        """Starts a text that can be continued turn by turn.

        Args:
            path: Optional. A file that `Session.save()` wrote, to go on with.

        Returns:
            A `keras_nlp_cache.generate.session.Session`.

        Raises:
            ValueError: If the model has no preprocessor, or the file is
                damaged or of another model.
        """
        session = Session(self)
        if path is not None:
            session.load(path)
        return session

    def score(
        self,
        token_ids,
        padding_mask=None,
        scoring_mode="logits",
        layer_intercept_fn=None,
        target_ids=None,
    ):
        """Scores token ids, with a say in what each decoder block returns.

        Upstream's method. Where upstream calls the layers of the backbone one
        by one, this runs through the backbone's graph, edits included.

        Args:
            token_ids: int tensor `(B, T)`. Or a dictionary of that and what
                else the backbone takes, such as images.
            padding_mask: Optional tensor `(B, T)`, 0 for padding.
            scoring_mode: `"logits"` or `"loss"`.
            layer_intercept_fn: Optional function from hidden states
                `(B, T, hidden_dim)` and the index of a decoder block, in the
                order of calls, to the hidden states to go on with. The index
                of the embeddings is -1.
            target_ids: int tensor `(B, T)`, what to compare with in
                `scoring_mode="loss"`.

        Returns:
            Logits `(B, T, vocabulary_size)`, or the loss of each token
            `(B, T)`.

        Raises:
            ValueError: If `scoring_mode` is neither of the two, or is `"loss"`
                without `target_ids`.

        Example:
        ```python
        norms = {}

        def intercept(x, index):
            norms[index] = keras.ops.norm(x, axis=-1)
            return x

        tokens = np.array([[5, 6, 7, 8]])
        lm.score(tokens[:, :-1], None, "loss", intercept, tokens[:, 1:])
        ```
        """
        return scoring.score(
            self,
            token_ids,
            padding_mask,
            scoring_mode,
            layer_intercept_fn,
            target_ids,
        )

    @property
    def embeddings_layer(self):
        """The layer that returns what `score()` calls the embeddings."""
        return getattr(self.backbone, self.embeddings_name)

    def export_to_transformers(self, path):
        """Exports the task in the format of Hugging Face Transformers.

        Raises:
            ValueError: If its backbone was edited, which that format has no
                words for, or is of a family that upstream does not export.
        """
        self.backbone.refuse_edits("Transformers")
        super().export_to_transformers(path)

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """Quantizes the weights, as `keras.Model.quantize()` does.

        The experts of a mixture stay as they are: they are weights of a layer
        that Keras cannot quantize. Their routers are quantized.

        On a CPU, with numba installed, decode steps then read small weights as
        they are, rather than widen them first; see `keras_nlp_cache.products`.
        """
        if isinstance(self.preprocessor, keras.layers.Layer):
            # Keras would go through these, too, and refuse a tokenizer, which
            # is not built.
            filters = leaving_out(self.preprocessor, filters)
        with quantizing(self.backbone):
            super().quantize(mode, config=config, filters=filters, **kwargs)

    def get_quantization_layer_structure(self, mode):
        """What GPTQ and AWQ quantize, in which order. See `quantize()`."""
        if mode not in ("gptq", "awq"):
            return None
        return layer_structure(self.backbone)

    def __reduce__(self):
        _, args = super().__reduce__()
        return drop_in.unpickle, args

    # === Presets ===

    @classmethod
    def is_for(cls, config):
        """Whether a preset of its family is one for this task.

        Args:
            config: Dictionary, what the preset says of the backbone.
        """
        return True

    @classproperty
    def presets(cls):
        return drop_in.presets(cls)

    @classmethod
    def from_preset(
        cls, preset, load_weights=True, *, keep_quantized=False, **kwargs
    ):
        """Loads a task from a preset that either package saved.

        Called on `CausalLM`, picks the class that fits the preset. Called on a
        subclass of your own, returns one of it, on a backbone of its
        `backbone_cls`. What such a class saves, it loads, too; for others to
        do so, register it with `keras.saving.register_keras_serializable()`.

        Args:
            preset: What `keras_hub.models.CausalLM.from_preset()` takes: a
                built-in name, a hub handle, or the path of a local preset or
                Hugging Face directory. Or the path of a GGUF file, which is
                converted once.
            load_weights: bool. Whether to load the weights.
            keep_quantized: bool. Of a GGUF file, whether matrices in `Q8_0`,
                `Q4_0` and `Q4_1` stay small as they are stored, in memory and
                in what the model saves, rather than become floats. They are
                frozen. What a product cannot be made with becomes floats, as
                all other formats do; what was kept is printed.
            **kwargs: Passed on to the task and, as `dtype`, to its backbone.

        Raises:
            ValueError: If the preset is not one, or is of a model that this
                package does not cover, or not of class `cls`.
        """
        own = drop_in.family(cls)
        with drop_in.scope(*((cls, cls.backbone_cls) if own else ())):
            loader = loader_of(preset, keep_quantized)
            backbone_cls = drop_in.replacement(loader.check_backbone_class())
            task = drop_in.task_for(cls, backbone_cls, loader.config)
            if task is None:
                family = drop_in.family(backbone_cls)
                what = f" of a `{own.backbone_cls.__name__}`" if own else ""
                raise ValueError(
                    f"Expected a preset{what} for `{cls.__name__}`. Received: "
                    f"preset={preset!r}, of a `{family.__name__}`. Call "
                    "`CausalLM.from_preset`, which picks the class."
                )
            if "dtype" in kwargs:
                kwargs["dtype"] = dtype_in(loader, kwargs["dtype"])
            lm = loader.load_task(task, load_weights, True, **kwargs)
        lm.chat_template = template_of(loader)
        return lm

    @classmethod
    def from_config(cls, config):
        # Entered again: while Keras restores an object, what is registered
        # globally takes precedence over a scope for the objects inside it.
        own = (cls.backbone_cls,) if drop_in.family(cls) else ()
        with drop_in.scope(*own):
            return super().from_config(config)

    def save_assets(self, dir_path):
        """Keras' hook: what of a task is in no config. See `load_assets()`."""
        if self.chat_template is not None:
            self.chat_template.save(dir_path)

    def load_assets(self, dir_path):
        """Keras' hook: keras_hub's classes pass over it, as they have none."""
        if dir_path is not None:
            self.chat_template = ChatTemplate.from_preset(
                dir_path, of_keras=True
            )

    def save_to_preset(self, preset_dir, max_shard_size=10):
        with drop_in.saving_preset(preset_dir) as folder:
            super().save_to_preset(folder, max_shard_size=max_shard_size)
            if self.chat_template is not None:
                self.chat_template.save(folder)
        if self.chat_template is None:
            # Of an older preset in the same folder.
            ChatTemplate.remove(preset_dir)


def _is_ours(method):
    """Whether a method is one of this package, and not of a user's."""
    return getattr(method, "__module__", "").startswith("keras_nlp_cache.")
