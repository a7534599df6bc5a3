"""The systems under test, by the names that the command line has."""

from benchmarks.systems import of_keras
from benchmarks.systems import of_transformers

SYSTEMS = {
    "ours": of_keras.Ours,
    "in_batches": of_keras.InBatches,
    "keras_hub": of_keras.KerasHub,
    "transformers": of_transformers.Transformers,
    "transformers_compiled": of_transformers.TransformersCompiled,
}
