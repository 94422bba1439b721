"""Squeeze and unsqueeze in plain PyTorch."""

from torch import Tensor

from fastflow.ops.layout import memory_format

REALNVP_PIXELS = (0, 3, 1, 2)  # indices in a 2x2 block (00, 01, 10, 11): the main diagonal first


def squeeze(x: Tensor, order: str, inverse: bool) -> Tensor:
    n, c, h, w = x.shape
    c, h, w = (c // 4, h, w) if inverse else (c, h // 2, w // 2)
    layout = memory_format(x)
    if order == "realnvp" and inverse:
        x = x.reshape(n, 4, c, h, w)[:, [REALNVP_PIXELS.index(k) for k in range(4)]].flatten(1, 2)
    if inverse:
        if order == "channel":
            pixels = x.reshape(n, c, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        else:
            pixels = x.reshape(n, 2, 2, c, h, w).permute(0, 3, 4, 1, 5, 2)
        y = pixels.reshape(n, c, 2 * h, 2 * w)
    else:
        blocks = x.reshape(n, c, h, 2, w, 2).permute(0, 1, 3, 5, 2, 4)
        if order != "channel":
            blocks = blocks.permute(0, 2, 3, 1, 4, 5)
        y = blocks.reshape(n, 4 * c, h, w)
    if order == "realnvp" and not inverse:
        y = y.view(n, 4, c, h, w)[:, list(REALNVP_PIXELS)].flatten(1, 2)
    # new memory: for some sizes (2x2) reshape returns a view, and an op must not return its input
    return y.clone(memory_format=layout)
