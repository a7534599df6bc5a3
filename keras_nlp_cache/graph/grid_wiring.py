"""How a cache is threaded through a graph in which images stand in grids.

Beside what layers remember, such a cache has an entry of its own, the last one:
where the text goes on. See `cache/grid_positions.py`.
"""

import keras

from keras_nlp_cache.cache.grid_positions import GridPositions
from keras_nlp_cache.cache.grid_positions import OFFSET_SHAPES
from keras_nlp_cache.cache.grid_positions import PositionOffset
from keras_nlp_cache.graph.media_wiring import MediaWiring


class GridWiring(MediaWiring):
    """The inputs of one graph, and what is threaded through it.

    Args are those of `MediaWiring`.
    """

    def _place_tokens(self, **arguments):
        name = self._roles.grid_positions
        self.inputs[name] = keras.Input(
            (4, None), dtype="int32", name=name, optional=True
        )
        self._offset = tuple(
            keras.Input(
                shape, dtype="float32", name=f"cache_offset_{x}", optional=True
            )
            for x, shape in zip(("key", "value"), OFFSET_SHAPES)
        )
        positions = GridPositions(dtype=self._dtype, name="positions")
        return positions(
            self.inputs[self._roles.token_ids],
            grid_positions=self.inputs[name],
            offset=self._offset[0],
            **arguments,
        )

    def graph(self, hidden_states, *further):
        inputs, (x, updated, *rest) = super().graph(hidden_states, *further)
        offset = PositionOffset(dtype=self._dtype, name="position_offset")(
            self._offset[0],
            self.positions,
            grid_positions=self.inputs[self._roles.grid_positions],
            index=self.inputs["cache_update_index"],
            padding_mask=self.inputs[self._roles.padding_mask],
        )
        self.windows.append(None)
        inputs["cache"] = *inputs["cache"], self._offset
        updated = *updated, (offset, self._offset[1])
        return inputs, (x, updated, *rest)
