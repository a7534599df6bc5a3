"""The graph of Qwen 3.5, in whose text images may stand."""

import keras_hub
import numpy as np

from keras_nlp_cache.drop_in import replaces
from keras_nlp_cache.graph.image_text import ImageTextBackbone
from keras_nlp_cache.graph.media_places import check_in_grids
from keras_nlp_cache.graph.roles import Medium
from keras_nlp_cache.graph.roles import Roles
from keras_nlp_cache.models.qwen3_5 import layers  # noqa: F401 (replace upstream)


class SeesInGrids:
    """What a backbone of Qwen 3.5 has because of its tower of images."""

    @property
    def media_roles(self):
        # Blocks of other families have no sections.
        in_grids = any(getattr(x, "mrope_section", None) for x in self.blocks)
        return Roles(
            media=(
                Medium(
                    "image",
                    "pixel_values",
                    beside=("image_grid_thw", "vision_indices"),
                    with_given=("image_grid_thw",),
                    output="img_embeddings",
                ),
            ),
            embeddings="embeddings",
            grid_positions="position_ids" if in_grids else None,
        )

    def mend(self):
        # Attention has no window.
        for block in self.blocks:
            if block.layer_type == "full_attention":
                block._self_attention_layer.sliding_window_size = None
        for layer in self.prefill_layers:
            # What has no weights upstream does not build, and Keras quantizes
            # no model before.
            layer.built = layer.built or not layer.weights

    def new_spans(self, inputs, **kwargs):
        return None

    def __call__(self, inputs, *args, **kwargs):
        # Without upstream's, which makes images of no size.
        return ImageTextBackbone.__call__(self, inputs, *args, **kwargs)

    def unpacked(self, images):
        def with_rows(name, rank):
            x = images.get(name)
            if x is None or isinstance(x, (list, tuple)):
                x = None if x is None else np.asarray(x)
            shape = getattr(x, "shape", ())
            return x[None] if len(shape) == rank - 1 else x

        ranks = {"pixel_values": 6, "image_grid_thw": 3, "vision_indices": 2}
        ranks["img_embeddings"] = 3
        found = {name: with_rows(name, rank) for name, rank in ranks.items()}
        empty = {k for k, x in found.items() if 0 in getattr(x, "shape", ())}
        if found["pixel_values"] is None or "pixel_values" in empty:
            # As upstream says that there are none.
            found.update(dict.fromkeys(empty))
        return {**images, **found}

    def check_media(self, media, text):
        merged = self.vision_encoder.spatial_merge_size
        check_in_grids(media, text, self.roles, merged)


@replaces(keras_hub.models.Qwen3_5Backbone)
class Qwen3_5Backbone(
    SeesInGrids, keras_hub.models.Qwen3_5Backbone, ImageTextBackbone
):
    """Qwen 3.5 with a cache in its graph.

    A drop-in replacement for `keras_hub.models.Qwen3_5Backbone`: the same
    arguments, weights and files. `CachedBackbone` describes what it can be
    called with beyond upstream's inputs, and `ImageTextBackbone`, if it has a
    `vision_encoder`, how images are read.

    Tokens of images stand in the text, and see no more than others of what
    follows them. So each call may read some, of which `vision_indices` says
    where in its `token_ids` they are, counted over all rows. Images are of any
    size, so rows may have different numbers of patches: then all are in one
    row, `pixel_values` is `(1, N, ...)`. Text needs none of these.

    With `mrope_section`, there is one more optional input, `position_ids`, `(B,
    4, T)`, as upstream's preprocessor makes it: where tokens stand, of which
    those of an image stand in a grid. Without it, all stand in a row, as in
    upstream's graph, which has no such input. Later calls go on from there:
    where a text stands is the last entry of a cache.

    Differs from upstream, on purpose: no attention has a window, as in the
    models that were trained. Upstream's has `sliding_window_size` on
    TensorFlow, and none elsewhere.

    Example:

    ```python
    backbone = keras_nlp_cache.models.Qwen3_5Backbone(
        vocabulary_size=100, num_layers=4, num_query_heads=4,
        num_key_value_heads=2, hidden_dim=32, intermediate_dim=64,
        head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )
    cache = backbone.make_cache(batch_size=1, max_length=8)
    hidden_states, cache = backbone(
        {"token_ids": [[1, 2, 3]], "cache": cache, "cache_update_index": 0}
    )
    ```

    Reference:
        https://arxiv.org/abs/2412.06464, https://arxiv.org/abs/2409.12191
    """
