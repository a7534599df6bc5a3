"""Reads GGUF files, and notices when they are damaged."""


def read(path):
    """Opens a GGUF file that is whole.

    Args:
        path: Path.

    Returns:
        A `gguf.GGUFReader`. Its tensors are views of the file.

    Raises:
        ImportError: If the package `gguf` is not installed.
        OSError: If the file cannot be read.
        Exception: Whatever `gguf` raises of a file that is damaged, or of
            another format.
    """
    import gguf
    import numpy as np

    class StrictReader(gguf.GGUFReader):
        # Some vocabularies take a million slices to read, and each takes three
        # times as long of an `np.memmap` as of a plain array over it.
        @property
        def data(self):
            return self._data

        @data.setter
        def data(self, x):
            self._data = x.view(np.ndarray)

        # Past the end of a file the library reads empty arrays. It would
        # count through an array whose damaged length says 2**60.
        def _get(self, offset, dtype, count=1, *args, **kwargs):
            x = super()._get(offset, dtype, count, *args, **kwargs)
            if len(x) != count:
                raise ValueError(f"the file ends at or before byte {offset}")
            return x

    return StrictReader(path)
