"""Many prompts from a file, answered into another, in as many goes as it takes.

`prompts_file.py` says what is read, `answers_file.py` how answers are kept and
whose they are, `answering.py` what becomes of a prompt that cannot be answered.
`job.py` puts them together for one model, `ray_cluster.py` for one per worker.
"""

from keras_nlp_cache.batch_job.job import run
from keras_nlp_cache.batch_job.job import Summary
from keras_nlp_cache.batch_job.ray_cluster import run_on_ray

__all__ = ["Summary", "run", "run_on_ray"]
