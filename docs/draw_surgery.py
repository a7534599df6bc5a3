"""Draws the graphs in the README: `python docs/draw_surgery.py`.

Needs graphviz' program `dot`.
"""

import pathlib

import keras
import pydot

from keras_nlp_cache import surgery
from keras_nlp_cache.models import LlamaBackbone

PICTURE = pathlib.Path(__file__).with_name("surgery.svg")


def draw():
    """The graph of a small backbone before and after surgery."""
    backbone = LlamaBackbone(
        vocabulary_size=100,
        num_layers=3,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
    )
    edited = surgery.remove(backbone, 1)
    edited = surgery.insert_after(
        edited, slice(None), lambda block: keras.layers.Dense(32)
    )
    # Strict: one edge where a layer takes the same input twice.
    picture = pydot.Dot(rankdir="TB", strict=True, fontname="Helvetica")
    for title, model in (("before", backbone), ("after", edited)):
        drawn = keras.utils.model_to_dot(model, show_layer_names=True)
        cluster = pydot.Cluster(title, label=title, fontsize=28)
        # Keras names nodes by their `id()`, which differs every time.
        names = {}
        for node in drawn.get_nodes():
            if node.get_name() in ("node", "edge", "graph"):
                continue
            names[node.get_name()] = f"{title}_{len(names)}"
            node.set_name(names[node.get_name()])
            node.set("shape", "plaintext")
            node.set("fontname", "Helvetica")
            cluster.add_node(node)
        for edge in drawn.get_edges():
            source, destination = edge.get_source(), edge.get_destination()
            cluster.add_edge(pydot.Edge(names[source], names[destination]))
        picture.add_subgraph(cluster)
    return picture


if __name__ == "__main__":
    draw().write(str(PICTURE), format="svg")
