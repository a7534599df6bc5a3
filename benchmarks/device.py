"""Where PyTorch computes."""


def torch_device():
    """Where Keras puts tensors of PyTorch: on a GPU, if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
